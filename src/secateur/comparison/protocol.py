"""What is held fixed in a comparison, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from secateur.errors import RecipeError
from secateur.version import __version__

SCHEMA = 1


@dataclass(frozen=True)
class Protocol:
    """Everything that is the same for all criteria; its hash goes into every cell.

    Args:
        granularity: what is removed, as in a recipe.
        match: what the levels count: "units" (exact counts), "macs" or "params".
        levels: fractions removed of what is matched, ascending.
        recoveries: name -> steps; "none" is always there.
        recover_levels: levels at which recovery is run.
        ablation_levels: levels at which every criterion's scores are also shuffled within layers and inverted.
        scope: where units compete.
        allocation: how a global amount is spread.
        protect: what stays whole.
        seeds: of base models, scores and recovery.
        metric: the quality that is compared.
        maximize: whether higher is better.
        rounds: timed rounds of the latency of cut models; 0 = not timed.
        confidence: of the intervals; 1 - confidence is the level of the tests.
        probes: units per seed that are set to zero one by one, to see what each score tells of the loss; 0 = none.
        scratch: steps with which the equal-size network is trained from new weights; empty = not run.
        tag: free text for what cannot be hashed (the loss and evaluate functions).

    Raises:
        RecipeError: a confidence that is no probability, or a negative number of probes.
    """

    granularity: str | dict[str, Any]
    match: str
    levels: tuple[float, ...]
    recoveries: dict[str, tuple[dict[str, Any], ...]]
    recover_levels: tuple[float, ...]
    ablation_levels: tuple[float, ...]
    scope: str
    allocation: str
    protect: tuple[str, ...]
    seeds: tuple[int, ...]
    metric: str
    maximize: bool
    rounds: int
    confidence: float
    probes: int = 0
    scratch: tuple[dict[str, Any], ...] = ()
    tag: str = ""

    def __post_init__(self) -> None:
        """Refuse a confidence that is none, and a negative count."""
        if not 0 < self.confidence < 1:
            raise RecipeError(f"confidence={self.confidence} is no probability", hint="for example 0.95")
        if self.probes < 0:
            raise RecipeError(f"probes={self.probes} is negative", hint="0 measures no units, 64 is the default")

    def of_cell(self) -> dict[str, Any]:
        """The part that decides about a single cell: levels and seeds may be added later without losing cells."""
        return {
            "schema": SCHEMA,
            "secateur": __version__,
            "torch": str(torch.__version__).partition("+")[0],
            "granularity": self.granularity,
            "match": self.match,
            "scope": self.scope,
            "allocation": self.allocation,
            "protect": list(self.protect),
            "rounds": self.rounds,
            "tag": self.tag,
        }

    def target(self, level: float) -> dict[str, float]:
        """The plan's target of a level."""
        return {"sparsity": level} if self.match == "units" else {self.match: 1 - level}
