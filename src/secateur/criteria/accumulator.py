"""What a criterion may be given that a training loop has filled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

State = Mapping[str, object]


class Accumulator(Protocol):
    """Gathers something at every step of a training, and can go on after an interruption.

    A criterion takes one as a live argument (`Criterion.live`), not as an option: it holds tensors of the size of the
    weights, which belong into a checkpoint and not into a plan.
    """

    steps: int
    sums: dict[str, Tensor]

    def observe(self) -> None:
        """Take in one step: after the backward pass, before the optimiser moves the weights."""

    def state_dict(self) -> State:
        """All that was gathered."""

    def load_state_dict(self, state: State) -> None:
        """Go on from what was gathered before."""
