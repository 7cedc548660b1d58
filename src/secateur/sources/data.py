"""DATA words: ``demo:mnist``, ``npz:FILE``, ``csv:PATH``... -> loaders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np

from secateur.errors import InputError, RecipeError, UnsupportedError
from secateur.model.door import Given, enter
from secateur.registry import suggestion
from secateur.sources.arrays import load_npz
from secateur.sources.bundled import load_digits, load_mnist
from secateur.sources.images import LABEL_COLUMNS, decode, image_bytes, load_folder, load_parquet
from secateur.sources.in_memory import Arrays, DataSet, build_dataset
from secateur.sources.prose import NAME as PROSE
from secateur.sources.tables import KINDS, dataset_of, load_table
from secateur.sources.text import SEQUENCES, TOKENS, Tokenizer, block_length, load_prose, load_text
from secateur.sources.words import call_factory, is_python, which_factory

DATA_KINDS = ("csv", "demo", "folder", "hf", "jsonl", "npz", "parquet", "py", "text", "tsv")
ENDINGS = {".npz": "npz", ".npy": "npz", ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".json": "jsonl",
           ".parquet": "parquet", ".txt": "text"}  # fmt: skip
NOT_READ = "was not read:"
_DEMOS = {"mnist": load_mnist, "digits": load_digits}


def resolve_data(
    word: str,
    *,
    batch_size: int = 64,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    text: Mapping[str, int | None] | None = None,
    numbers: Mapping[str, int] | None = None,
    longest: int | None = None,
) -> DataSet:
    """Turn a DATA word into loaders for training, calibration and test.

    Args:
        word: ``demo:mnist``, ``demo:digits``, ``demo:prose``, ``npz:FILE``, ``csv:PATH``, ``tsv:PATH``, ``jsonl:PATH``,
            ``parquet:PATH``, ``folder:PATH``, ``text:PATH``, ``hf:ID``, ``py:package.module:factory`` or
            ``file.py:factory``.
        batch_size: samples per batch.
        seed: of splits and shuffles.
        tokenizer: for text; the one of the hf: model.
        text: for ``text:`` and ``demo:prose``; a recipe's tokens, sequences, batch and test, where given.
        numbers: label -> class number, of the hf: model, for labels that are words.
        longest: tokens of a block of text at most, of the hf: model; a note says where that made blocks shorter.

    Returns:
        The loaders. Calibration samples come from the training part, never from the test part.

    Raises:
        RecipeError: unknown word.
        InputError: data that cannot be read, or does not fit.
        UnsupportedError: a package is missing; the message names the extra.
    """
    kind, colon, rest = word.partition(":")
    if kind not in DATA_KINDS and is_python(word):
        kind, colon, rest = "py", ":", word
    if not colon or not rest or kind not in DATA_KINDS:
        raise RecipeError(f"unknown data {word!r}", hint=_meant(word, kind if colon else ""))
    given = {key: value for key, value in (text or {}).items() if value is not None}
    if word == PROSE or kind == "text":
        tokens, notes = block_length(given.get("tokens", TOKENS), longest)
        blocks = {"batch_size": given.get("batch", batch_size), "tokens": tokens,
                  "calibration": given.get("sequences", SEQUENCES)}  # fmt: skip
        load = load_prose if word == PROSE else partial(load_text, rest)
        found = load(tokenizer=tokenizer, test=given.get("test"), **blocks)
        return replace(found, notes=(*found.notes, *notes))
    if given:
        found = resolve_data(word, batch_size=batch_size, seed=seed, tokenizer=tokenizer, numbers=numbers)
        note = f"calibration ({', '.join(given)}) {NOT_READ} {word} is no text that is cut into blocks."
        return replace(found, notes=(*found.notes, note))
    if kind == "demo":
        if rest not in _DEMOS:
            names = [*_DEMOS, PROSE.partition(":")[2]]
            raise RecipeError(f"there is no demo data {rest!r}", hint=suggestion(rest, names, form="demo:{}"))
        return _DEMOS[rest](batch_size=batch_size, seed=seed)
    if kind == "npz":
        return load_npz(rest, batch_size=batch_size, seed=seed)
    if kind in KINDS:
        return load_table(kind, rest, tokenizer=tokenizer, numbers=numbers, batch_size=batch_size, seed=seed)
    if kind == "parquet":
        return load_parquet(rest, tokenizer=tokenizer, numbers=numbers, batch_size=batch_size, seed=seed)
    if kind == "folder":
        return load_folder(rest, batch_size=batch_size, seed=seed)
    if kind == "hf":
        return _load_hub(rest, tokenizer=tokenizer, numbers=numbers, batch_size=batch_size, seed=seed)
    return _from_factory(word, call_factory(rest))


def _meant(word: str, kind: str) -> str:
    """What a DATA word that is none may have been: a file by its ending, a folder, a known name, another kind."""
    path = Path(word)
    if path.suffix.lower() in ENDINGS and not kind:
        return f"did you mean {ENDINGS[path.suffix.lower()]}:{word}?"
    if path.is_dir():
        ending = next((ENDINGS[end] for end in ENDINGS if any(path.glob(f"*{end}"))), "folder")
        return f"did you mean {ending}:{word}?"
    if which_factory(word):
        return which_factory(word)
    listed = f"write KIND:WHAT, with KIND one of {', '.join(DATA_KINDS)}, or FILE.py:factory"
    if kind:
        rest = word.partition(":")[2].replace("{", "{{").replace("}", "}}")
        return suggestion(kind, DATA_KINDS, form=f"{{}}:{rest}", otherwise=listed)
    return suggestion(word, _DEMOS, form="demo:{}", otherwise=listed)


def _from_factory(word: str, made: object) -> DataSet:
    """What a factory may return: a DataSet, a mapping of loaders, or one iterable of batches."""
    # Made by hand, it may hold what `enter` would not guess: an example of another form, the number of classes.
    if isinstance(made, DataSet):
        return made
    try:
        # Whatever else it is, `enter` says what is wrong with it.
        parts = enter(cast(Given, made))
        if made is None or parts.scoring is None:
            raise InputError("there is nothing to train or score with", hint="give train or calibration")
        train = parts.scoring if parts.train is None else parts.train
        return DataSet(word, train, parts.scoring, parts.test, parts.example(), notes=parts.notes)
    except InputError as error:
        raise InputError(
            f"{word} returned data that cannot be used: {error.what}", why=error.why, hint=error.hint
        ) from error


def _load_hub(
    name: str, *, tokenizer: Tokenizer | None, numbers: Mapping[str, int] | None, batch_size: int, seed: int
) -> DataSet:
    try:
        import datasets
    except ImportError as error:
        raise UnsupportedError("hf: data needs the package datasets", hint="pip install datasets") from error
    try:
        # Versions before 4 run a script of the data set where they are allowed to; later ones know no scripts.
        old = int(str(datasets.__version__).split(".")[0]) < 4
        parts = datasets.load_dataset(name, **({"trust_remote_code": False} if old else {}))
    except Exception as error:
        raise InputError(
            f"the data set {name!r} could not be loaded",
            why=f"{type(error).__name__}: {error}",
            hint="is the name right and the hub reachable? Local files go by parquet: or folder:",
        ) from error
    if "train" not in parts:
        raise InputError(f"hf:{name} has the parts {sorted(parts)}, and no train")
    # Test first: a validation part may have been used to choose the model.
    test = next((parts[part] for part in ("test", "validation", "valid") if part in parts), None)
    if not {"image", "img"} & set(parts["train"].column_names):
        tables = [None if part is None else {c: list(part[c]) for c in part.column_names} for part in
                  (parts["train"], test)]  # fmt: skip
        assert tables[0] is not None
        return dataset_of(f"hf:{name}", tables[0], tables[1], tokenizer=tokenizer, numbers=numbers,
                          batch_size=batch_size, seed=seed)  # fmt: skip
    train = _hub_arrays(parts["train"], name)
    held = _hub_arrays(test, name) if test is not None else None
    return build_dataset(f"hf:{name}", train, held, batch_size=batch_size, seed=seed)


def _hub_arrays(part: Any, name: str) -> Arrays:
    columns = list(part.column_names)
    label = next((column for column in LABEL_COLUMNS if column in columns), None)
    image = next((column for column in ("image", "img") if column in columns), None)
    if label is None or image is None:
        raise InputError(f"hf:{name} has the columns {columns}", hint="it needs an image, or text, and a label")
    # The bytes, not the pictures: the library would open them in any format, and this project opens four.
    datasets = import_module("datasets")
    rows = part.cast_column(image, datasets.Image(decode=False))[image]
    return decode((image_bytes(row) for row in rows), f"hf:{name}"), np.asarray(list(part[label]), dtype=np.int64)
