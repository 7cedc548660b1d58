"""Text with labels: tokens, padded to one length, in mappings that a model of transformers takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.errors import InputError, RecipeError
from secateur.sources.in_memory import CALIBRATION_SAMPLES, SET_ASIDE, Array, DataSet, split_indices
from secateur.sources.text import Tokenizer

TOKENS = 128  # of one sample at most
Texts = Sequence[Sequence[str]]  # one column of text, or two


class LabelledText:
    """Batches ``{"input_ids", "attention_mask", ..., "labels"}``; iterating twice gives the same batches twice.

    Args:
        encoded: name -> int64 ``[samples, tokens]``.
        labels: ``[samples]``.
        batch_size: samples per batch.
        shuffle: another order for each epoch, as in `TensorData`.
        seed: of the orders.

    Raises:
        InputError: there is no sample.
        RecipeError: batch size below 1.
    """

    def __init__(
        self, encoded: Mapping[str, Tensor], labels: Tensor, *, batch_size: int, shuffle: bool = False, seed: int = 0
    ) -> None:
        if len(labels) == 0:
            raise InputError("there is no sample in the data")
        if batch_size < 1:
            raise RecipeError(f"the batch size is {batch_size}", hint="give at least 1")
        self.encoded, self.labels, self.batch_size = dict(encoded), labels, batch_size
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the following passes."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order = torch.arange(len(self.labels))
        if self.shuffle:
            order = torch.from_numpy(np.random.default_rng([self.seed, self.epoch]).permutation(len(order)))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            yield {**{name: values[rows] for name, values in self.encoded.items()}, "labels": self.labels[rows]}


def labelled_text(
    name: str,
    train: tuple[Texts, Array],
    test: tuple[Texts, Array] | None,
    *,
    tokenizer: Tokenizer,
    batch_size: int,
    seed: int,
    notes: tuple[str, ...] = (),
) -> DataSet:
    """Make the loaders of (texts, targets).

    Args:
        name: the word the data came from.
        train: columns of text, and targets ``[samples]``: integers are classes, floats are regressed on.
        test: the same; without it 20 % of the training part is set aside.
        tokenizer: turns text into tokens, of which `TOKENS` are kept.
        batch_size: samples per batch.
        seed: of split, shuffles and the choice of calibration samples.
        notes: sentences for the report.
    """
    texts, targets = train
    if test is None and len(targets) > 1:
        kept, out = split_indices(targets, seed=seed)
        test = [[column[i] for i in out] for column in texts], targets[out]
        texts, targets = [[column[i] for i in kept] for column in texts], targets[kept]
        notes = (SET_ASIDE.format(name=name, share="20 % of the samples"), *notes)
    encoded = encode(texts, tokenizer)
    chosen = np.random.default_rng([seed, 1]).permutation(len(targets))[:CALIBRATION_SAMPLES]
    some = {key: values[torch.from_numpy(chosen)] for key, values in encoded.items()}
    held = None
    if test is not None and len(test[1]):
        held = LabelledText(encode(test[0], tokenizer), torch.from_numpy(test[1].copy()), batch_size=batch_size)
    return DataSet(
        name=name,
        train=LabelledText(encoded, torch.from_numpy(targets.copy()), batch_size=batch_size, shuffle=True, seed=seed),
        calibration=LabelledText(some, torch.from_numpy(targets[chosen]), batch_size=batch_size),
        test=held,
        example={key: values[:1] for key, values in encoded.items()},
        num_classes=int(targets.max()) + 1 if targets.dtype.kind == "i" else None,
        notes=notes,
    )


def encode(texts: Texts, tokenizer: Any, *, tokens: int = TOKENS) -> dict[str, Tensor]:
    """Tokens of one or two columns of text, padded at the end to the longest sample.

    Args:
        texts: columns.
        tokenizer: ``tokenizer(list, [list], truncation=True, max_length=...)`` gives lists of numbers by name.
        tokens: of one sample at most.

    Returns:
        name -> int64 ``[samples, tokens]``; ``attention_mask`` is 0 where there is padding.
    """
    found = tokenizer(*(list(column) for column in texts), truncation=True, max_length=tokens)
    rows: dict[str, list[list[int]]] = {key: list(values) for key, values in dict(found).items()}
    rows.setdefault("attention_mask", [[1] * len(row) for row in rows["input_ids"]])
    width = max(1, *(len(row) for row in rows["input_ids"]))
    # Models without a token for padding never look at it: the mask hides it.
    filler = next(
        (
            n
            for n in (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None))
            if n is not None
        ),
        0,
    )
    return {
        key: torch.tensor([[*row, *[filler if key == "input_ids" else 0] * (width - len(row))] for row in values])
        for key, values in rows.items()
    }
