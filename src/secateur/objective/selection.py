"""Which samples recipes are chosen by: some that their recovery does not train on, and that are not the test part."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch

from secateur.errors import InputError, RecipeError
from secateur.model.call import inputs, to_example
from secateur.model.door import Parts
from secateur.model.hashing import raw
from secateur.recover.validation import divided
from secateur.types import Data

SHARE = 0.2  # of the training data, where a part of them has to be set aside
BATCHES = 256  # of the training data that are looked through for samples of the calibration part


@dataclass(frozen=True, eq=False)
class Selection:
    """The data of a choice between recipes.

    Args:
        batches: what they are chosen by.
        given: what they are scored and recovered with.
        on: what the batches are, in words.
    """

    batches: Data
    given: Parts
    on: str


def selection_of(given: Parts) -> Selection:
    """Decide what recipes are chosen by.

    Calibration data that the training does not hold serve as they are. Where there are none, or the training holds
    them, a fifth of the training data is set aside for as long as recipes are compared: what a recovery has trained on
    it knows by heart, and would seem to have lost nothing of.

    Args:
        given: the data of the run.

    Raises:
        InputError: nothing is left to choose by.
    """
    if given.calibration is not None and (given.train is None or not _shared(given.calibration, given.train)):
        return Selection(given.calibration, given, "the calibration data, which nothing trains on")
    if given.train is None:
        raise InputError(
            "There are no data to choose by.",
            why="the test part confirms the choice, so it must not make it",
            hint="Pass calibration= with batches that have targets.",
        )
    try:
        train, held = divided(given.train, SHARE)
    except RecipeError as error:
        raise InputError(
            "There are no data to choose by.",
            why=f"{error.what}, and the calibration data are none of their own",
            hint="Pass calibration= with batches that training does not read.",
        ) from error
    return Selection(held, replace(given, train=train), "a fifth of the training data, set aside meanwhile")


def _shared(part: Data, train: Data) -> bool:
    """Whether a sample of one set is found in the first batches of another."""
    # A loader that shuffles draws, and whoever draws next must not notice.
    with torch.random.fork_rng(devices=[]):
        known = set(_samples(part))
        return any(one in known for one in _samples(train))


def _samples(data: Data) -> Iterator[bytes]:
    for batch in islice(iter(data), BATCHES):
        first = next(iter(inputs(to_example(batch))), None)
        for row in () if first is None else first:
            flat = np.frombuffer(raw(row), np.uint8)
            # Without the padding at its end, of which the same text has more in a batch of longer ones.
            other = np.flatnonzero(flat != flat[-1:])
            yield hashlib.sha256(flat[: int(other.max(initial=-1)) + 1].tobytes()).digest()
