"""The runs of a comparison, as a list that is known before anything is run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from secateur.comparison.contestants import RANDOM, Contestant
from secateur.comparison.protocol import Protocol
from secateur.comparison.recoveries import NO_RECOVERY

DENSE, SCRATCH = "dense", "scratch"
AS_IS, SHUFFLED, INVERTED = "as is", "shuffled", "inverted"


@dataclass(frozen=True)
class Cell:
    """One run: the address under which its result is kept.

    Args:
        seed: of base model, scores and recovery.
        label: the criterion.
        variant: "as is", "shuffled" or "inverted".
        level: fraction removed.
        recovery: name of the recovery.
        key: hash of everything that decides about the result.
    """

    seed: int
    label: str
    variant: str
    level: float
    recovery: str
    key: str = field(compare=False, default="")


def planned(protocol: Protocol, contestants: Sequence[Contestant]) -> list[Cell]:
    """Every run of one comparison in order, without keys: what is to be done, and how much of it."""
    return [cell for seed in protocol.seeds for cell in cells_of(protocol, contestants, seed)]


def cells_of(protocol: Protocol, contestants: Sequence[Contestant], seed: int) -> Iterator[Cell]:
    """The runs of one seed, without keys.

    Runs that share a plan stand next to each other, so that only one plan and one cut model are held at a time.
    """
    # The dense model gets every recovery too: what extra training does to it is no merit of pruning.
    for recovery in protocol.recoveries:
        yield Cell(seed, DENSE, AS_IS, 0.0, recovery)
    for one in contestants:
        for level in protocol.levels:
            for recovery in protocol.recoveries:
                if recovery == NO_RECOVERY or level in protocol.recover_levels:
                    yield Cell(seed, one.label, AS_IS, level, recovery)
            # Random scores in another random order are random scores.
            if level in protocol.ablation_levels and one.criterion.name != RANDOM:
                yield Cell(seed, one.label, SHUFFLED, level, NO_RECOVERY)
                yield Cell(seed, one.label, INVERTED, level, NO_RECOVERY)
    if protocol.scratch:
        for level in protocol.recover_levels:
            yield Cell(seed, SCRATCH, AS_IS, level, SCRATCH)
