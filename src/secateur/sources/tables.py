"""Tables as data: csv, tsv, jsonl and parquet, of numbers with a target, or of text with labels for a tokenizer."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from secateur.errors import FileRefusedError, InputError, NonFiniteError, ResourceError, UnsupportedError
from secateur.files.safe import memory
from secateur.files.sniff import open_regular
from secateur.sources.in_memory import Array, DataSet, build_dataset
from secateur.sources.labelled_text import labelled_text
from secateur.sources.text import Tokenizer

Table = Mapping[str, Sequence[object]]
KINDS = ("csv", "tsv", "jsonl")
LABELS = ("label", "labels", "target", "targets", "class", "y")
TEXTS = (
    ("text",), ("sentence",), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
    ("question", "sentence"), ("review",), ("content",),
)  # fmt: skip
NAMES = {"train": ("train",), "test": ("test", "validation", "valid", "val", "dev")}
MAX_ROWS = 1 << 24
NUMBERED = "{name}: classes are numbered in the order of their names: {classes}"


def load_table(
    kind: str,
    path: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    numbers: Mapping[str, int] | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> DataSet:
    """Read a table with a header: a column of labels, and columns of numbers or of text.

    Args:
        kind: csv, tsv (no quotes: a quotation mark is a letter), or jsonl (one object per line).
        path: a file, then split 80 to 20; or a folder with ``train.KIND`` and ``test.KIND`` (or ``validation.KIND``).
        tokenizer: for columns of text; that of the hf: model.
        numbers: label -> class number, as the model's config has it; else classes are numbered by their names.
        batch_size: samples per batch.
        seed: of split and shuffles.

    Raises:
        InputError: no such file, no column of labels, or a column that is neither numbers nor text.
        FileRefusedError: no table.
        NonFiniteError: NaN or Inf in it.
        UnsupportedError: text without a tokenizer.
    """
    path = Path(path)
    train, test = (path, None) if not path.is_dir() else (_part(path, kind, "train"), _part(path, kind, "test"))
    if train is None:
        raise InputError(f"{path} holds no train.{kind}", hint=f"name the parts train.{kind} and test.{kind}")
    held = None if test is None else read_rows(kind, test)
    name = f"{kind}:{path}"
    return dataset_of(
        name, read_rows(kind, train), held, tokenizer=tokenizer, numbers=numbers, batch_size=batch_size, seed=seed
    )


def _part(folder: Path, kind: str, part: str) -> Path | None:
    return next((path for name in NAMES[part] if (path := folder / f"{name}.{kind}").is_file()), None)


def read_rows(kind: str, path: Path) -> Table:
    """A file as columns.

    Raises:
        InputError: no such file, or no row.
        FileRefusedError: it is no table.
        ResourceError: it is too large for this machine.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    try:
        with open_regular(path) as stream:
            if stream.seek(0, 2) > memory() // 8:
                raise ResourceError(f"{path} is too large to be held in memory as a table")
            stream.seek(0)
            text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
            columns = _objects(text, path) if kind == "jsonl" else _lines(text, kind, path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise FileRefusedError(f"{path} cannot be read as {kind}", why=str(error)) from error
    if not columns or not len(next(iter(columns.values()))):
        raise InputError(f"{path} holds no row", hint="it needs a header and at least one line")
    return columns


def _lines(text: Iterable[str], kind: str, path: Path) -> Table:
    # Tab-separated files are written without quotes as a rule: a sentence may hold one quotation mark.
    plain: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == "tsv" else {}
    reader = csv.reader(text, strict=True, **plain)
    head = [name.strip() for name in next(reader, [])]
    if len(set(head)) != len(head):
        raise FileRefusedError(f"{path} is refused: a column has a name twice", why=", ".join(head))
    columns: dict[str, list[object]] = {name: [] for name in head}
    for row in reader:
        if not row:
            continue
        if len(row) != len(head):
            raise FileRefusedError(
                f"{path}:{reader.line_num} has {len(row)} fields, the header {len(head)}",
                hint="each line needs as many fields as the header, with text in quotes where it holds the delimiter",
            )
        _count(columns[head[0]], path)
        for name, field in zip(head, row, strict=True):
            columns[name].append(field)
    return columns


def _objects(text: Iterable[str], path: Path) -> Table:
    columns: dict[str, list[object]] = {}
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FileRefusedError(f"{path}:{number} is no JSON", why=str(error)) from error
        if not isinstance(row, dict) or (columns and row.keys() != columns.keys()):
            hint = f"each line is one object with the keys {', '.join(columns) or 'of the first'}"
            raise FileRefusedError(f"{path}:{number} is no object with the keys of the first line", hint=hint)
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
        _count(next(iter(columns.values()), []), path)
    return columns


def _count(rows: Sequence[object], path: Path) -> None:
    if len(rows) > MAX_ROWS:
        raise FileRefusedError(f"{path} is refused: it has more than {MAX_ROWS} rows")


def dataset_of(
    name: str,
    train: Table,
    test: Table | None,
    *,
    tokenizer: Tokenizer | None,
    numbers: Mapping[str, int] | None,
    batch_size: int,
    seed: int,
) -> DataSet:
    """Loaders of a table; see `load_table`."""
    label = next((column for column in LABELS if column in train), None)
    if label is None:
        raise InputError(
            f"{name} has the columns {', '.join(train)}, and none is the target",
            hint=f"call it {LABELS[0]}; names that are known: {', '.join(LABELS)}",
        )
    if test is not None and set(test) != set(train):
        raise InputError(f"{name}: the test part has the columns {', '.join(test)}, train has {', '.join(train)}")
    targets, classes, guessed = _targets(train[label], None, numbers, name)
    held = None if test is None else _targets(test[label], classes, numbers, name)[0]
    notes = (NUMBERED.format(name=name, classes=_listed(classes)),) if guessed else ()
    texts = next((columns for columns in TEXTS if set(columns) <= set(train)), None)
    if texts is not None:
        if tokenizer is None:
            raise UnsupportedError(
                f"{name} holds text ({', '.join(texts)}), which needs a tokenizer, and the model brings none",
                hint="text is for hf: models whose folder has a tokenizer; give numbers otherwise",
            )

        def columns(part: Table) -> list[list[str]]:
            return [_text(part[column], column, name) for column in texts]

        given_test = None if test is None or held is None else (columns(test), held)
        return labelled_text(
            name, (columns(train), targets), given_test, tokenizer=tokenizer, batch_size=batch_size, seed=seed,
            notes=notes,
        )  # fmt: skip
    inputs = _inputs(train, label, name)
    test_part = None if test is None or held is None else (_inputs({c: test[c] for c in train}, label, name), held)
    # A model that gives one number gives it as [batch, 1].
    wide = [t if t is None or t.dtype.kind == "i" else t[:, None] for t in (targets, held)]
    assert wide[0] is not None
    given = None if test_part is None or wide[1] is None else (test_part[0], wide[1])
    made = build_dataset(name, (inputs, wide[0]), given, batch_size=batch_size, seed=seed)
    return DataSet(**{**vars(made), "notes": (*made.notes, *notes)})


def _inputs(table: Table, label: str, name: str) -> Array:
    columns = [_numbers(values, column, name) for column, values in table.items() if column != label]
    if not columns:
        raise InputError(f"{name} has the column {label} and no other", hint="it needs columns of numbers, or text")
    return np.stack(columns, axis=1).astype(np.float32)


def _numbers(values: Sequence[object], column: str, name: str) -> Array:
    try:
        array = np.asarray([float(value) for value in values])  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name}: the column {column!r} holds {error}",
            hint=f"columns are numbers, or text under one of {', '.join(' + '.join(t) for t in TEXTS)}",
        ) from error
    if not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array))[0]) + 1
        raise NonFiniteError(f"{name}: the column {column!r} has NaN or Inf in row {row}")
    return array


def _text(values: Sequence[object], column: str, name: str) -> list[str]:
    wrong = next((number for number, value in enumerate(values, 1) if not isinstance(value, str)), None)
    if wrong is not None:
        raise InputError(f"{name}: row {wrong} of the column {column!r} is no text")
    return [str(value) for value in values]


def _targets(
    values: Sequence[object], classes: Mapping[str, int] | None, numbers: Mapping[str, int] | None, name: str
) -> tuple[Array, Mapping[str, int] | None, bool]:
    """Class numbers or numbers to regress on, label -> number where labels are words, and whether that was guessed."""
    if classes is None and all(_is_number(value) for value in values):
        plain = _numbers(values, "target", name)
        whole = all(float(v).is_integer() and "." not in str(v) for v in values)  # type: ignore[arg-type]
        if whole and plain.min() < 0:
            raise InputError(f"{name}: a class number is negative", hint="classes are 0, 1, 2 ...")
        return plain.astype(np.int64 if whole else np.float32), None, False
    known, guessed = classes, False
    if known is None:
        words = sorted({str(value) for value in values})
        said = {str(word).lower(): number for word, number in (numbers or {}).items()}
        guessed = not all(word.lower() in said for word in words)
        known = {word: number for number, word in enumerate(words)} if guessed else {w: said[w.lower()] for w in words}
    strange = next((str(value) for value in values if str(value) not in known), None)
    if strange is not None:
        raise InputError(f"{name}: the test part has the label {strange[:60]!r}, which the training part has not")
    return np.asarray([known[str(value)] for value in values], dtype=np.int64), known, guessed


def _is_number(value: object) -> bool:
    if isinstance(value, bool):
        return False
    try:
        return isinstance(float(value), float) and not math.isnan(float(value))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False


def _listed(classes: Mapping[str, int] | None) -> str:
    return ", ".join(f"{word} {number}" for word, number in list((classes or {}).items())[:10])
