"""Tables as data: numbers and text, from csv, tsv, jsonl and parquet, all read alike; what is no table is refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import FileRefusedError, InputError, NonFiniteError, UnsupportedError
from secateur.sources import resolve_data
from secateur.sources.labelled_text import encode

ROWS = [{"a": 0.5 * i, "b": float(-i), "label": i % 3} for i in range(20)]
SAYINGS = [{"sentence": "good " * (i % 4 + 1) + f'"{i}', "label": i % 2} for i in range(20)]


class Words:
    """A tokenizer: one number per word, and no token for padding."""

    eos_token_id = 7

    def __call__(self, *columns: Sequence[str], truncation: bool, max_length: int) -> Mapping[str, list[list[int]]]:
        joined = [" [s] ".join(parts).split() for parts in zip(*columns, strict=True)]
        return {"input_ids": [[len(word) + 10 for word in words][:max_length] for words in joined]}


def write(path: Path, rows: Sequence[Mapping[str, object]]) -> str:
    kind = path.suffix[1:]
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "tsv":
        lines = ["\t".join(rows[0]), *("\t".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(list(rows)), path)
    return f"{kind}:{path}"


KINDS = ("csv", "tsv", "jsonl", "parquet")


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_with_classes(kind: str, tmp_path: Path) -> None:
    found = resolve_data(write(tmp_path / f"d.{kind}", ROWS), batch_size=4)
    assert found.num_classes == 3
    assert found.test is not None
    x = torch.cat([inputs for part in (found.train, found.test) for inputs, _ in part])
    y = torch.cat([targets for part in (found.train, found.test) for _, targets in part])
    rows = {(row["a"], row["b"]): row["label"] for row in ROWS}
    assert len(y) == 20
    assert y.dtype == torch.int64
    assert all(rows[a, b] == label for (a, b), label in zip(x.tolist(), y.tolist(), strict=True))
    assert found.example.shape == (1, 2)
    assert "no test part of its own" in found.notes[0]


@pytest.mark.parametrize("kind", KINDS)
def test_text_with_classes(kind: str, tmp_path: Path) -> None:
    word = write(tmp_path / f"d.{kind}", SAYINGS)
    found = resolve_data(word, batch_size=4, tokenizer=Words())  # type: ignore[arg-type]
    assert found.test is not None
    batches = [*found.train, *found.test]
    assert {key for batch in batches for key in batch} == {"input_ids", "attention_mask", "labels"}
    ours = sorted((len(row["sentence"].split()), row["label"]) for row in SAYINGS)
    theirs = sorted(
        (int(mask.sum()), int(label))
        for batch in batches
        for mask, label in zip(batch["attention_mask"], batch["labels"], strict=True)
    )
    assert theirs == ours
    assert set(found.example) == {"input_ids", "attention_mask"}
    orders = []
    for epoch in (0, 1, 0):
        found.train.set_epoch(epoch)  # type: ignore[attr-defined]
        orders.append(torch.cat([batch["input_ids"] for batch in found.train]).tolist())
    assert orders[0] == orders[2]
    assert orders[0] != orders[1]
    with pytest.raises(UnsupportedError, match="needs a tokenizer"):
        resolve_data(word)


def test_padding_is_masked_and_pairs_are_joined() -> None:
    found = encode([["a bb", "a"], ["c", "d e f"]], Words())
    assert found["input_ids"].tolist() == [[11, 12, 13, 11, 7], [11, 13, 11, 11, 11]]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1] * 5]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_folder_has_parts(kind: str, tmp_path: Path) -> None:
    write(tmp_path / f"train.{kind}", ROWS)
    write(tmp_path / f"validation.{kind}", ROWS[:6])
    found = resolve_data(f"{kind}:{tmp_path}")
    assert found.test is not None
    assert sum(len(y) for _, y in found.test) == 6
    assert sum(len(y) for _, y in found.train) == 20
    assert found.notes == ()


def test_words_as_labels_are_numbered_as_the_model_does_or_said_to_be_guessed(tmp_path: Path) -> None:
    rows = [{"text": "x", "label": name} for name in ("Positive", "negative") * 5]
    word = write(tmp_path / "d.csv", rows)
    model = {"NEGATIVE": 1, "POSITIVE": 0}
    for numbers, positive, noted in ((model, 0, False), (None, 0, True), ({"LABEL_0": 0}, 0, True)):
        found = resolve_data(word, tokenizer=Words(), numbers=numbers)  # type: ignore[arg-type]
        (batch,) = found.train
        assert set(batch["labels"].tolist()) == {0, 1}
        assert ("numbered in the order of their names" in " ".join(found.notes)) is noted
        assert positive == 0
    with_model = resolve_data(word, tokenizer=Words(), numbers=model)  # type: ignore[arg-type]
    alone = resolve_data(word, tokenizer=Words())  # type: ignore[arg-type]
    assert sorted(with_model.train.labels.tolist()) == sorted(alone.train.labels.tolist())  # type: ignore[attr-defined]


def test_a_regression_is_pruned_and_measured(tmp_path: Path) -> None:
    rows = [{"a": 0.1 * i, "b": 1.0, "y": 0.3 * i + 0.05} for i in range(20)]
    found = resolve_data(write(tmp_path / "d.csv", rows))
    net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
    recipe = {"target": {"sparsity": 0.5}, "granularity": "neuron", "measure": {"latency": False}}
    result = sc.prune(net, data=found, recipe=recipe)
    assert set(result.report.after.quality) == {"mse"}


@pytest.mark.parametrize(
    ("name", "text", "kind", "words"),
    [
        ("d.csv", "a,b\n1,2\n", InputError, "none is the target"),
        ("d.csv", "a,label\n1,0\n2\n", FileRefusedError, "d.csv:3 has 1 fields, the header 2"),
        ("d.csv", "a,a,label\n1,2,0\n", FileRefusedError, "a name twice"),
        ("d.csv", "a,label\nblue,0\n", InputError, "the column 'a' holds could not convert string to float: 'blue'"),
        ("d.csv", "a,label\nnan,0\n1,1\n", NonFiniteError, "NaN or Inf in row 1"),
        ("d.csv", "a,label\n1,-1\n", InputError, "negative"),
        ("d.csv", "label\n1\n", InputError, "and no other"),
        ("d.csv", "", InputError, "no row"),
        ("d.csv", "a,label\n", InputError, "no row"),
        ("d.csv", 'a,label\n"1,0\n', FileRefusedError, "cannot be read as csv"),
        ("d.jsonl", '{"a": 1, "label": 0}\n{"a": 1}\n', FileRefusedError, "d.jsonl:2"),
        ("d.jsonl", "{\n", FileRefusedError, "d.jsonl:1 is no JSON"),
        ("d.jsonl", "[" * 100_000, FileRefusedError, "is no JSON"),
        ("d.jsonl", '{"text": 3, "label": 0}\n', UnsupportedError, "needs a tokenizer"),
        ("d.tsv", "text\tlabel\n\xe4\xff", FileRefusedError, "cannot be read as tsv"),
    ],
)
def test_what_is_no_table(name: str, text: str, kind: type[Exception], words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(kind, match=words.replace("'", ".")):
        resolve_data(f"{name.split('.')[1]}:{tmp_path / name}")


def test_no_file_and_another_label_in_the_test_part(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no file"):
        resolve_data(f"csv:{tmp_path / 'none.csv'}")
    with pytest.raises(InputError, match=r"no train\.csv"):
        resolve_data(f"csv:{tmp_path}")
    write(tmp_path / "train.csv", [{"a": 1, "label": "x"}, {"a": 2, "label": "y"}])
    write(tmp_path / "test.csv", [{"a": 1, "label": "z"}])
    with pytest.raises(InputError, match="label 'z', which the training part has not"):
        resolve_data(f"csv:{tmp_path}")
