"""The latency of a model before and after, timed together as a recipe asks for it."""

from __future__ import annotations

from torch import nn

from secateur.measure.latency import latency
from secateur.recipe.schema import Measure
from secateur.types import Example, Latency

ROUNDS_OF_ZEROS = 5  # a median and a spread, and one round less than any claim needs


def time_pair(
    before: nn.Module, after: nn.Module, example: Example, wanted: Measure, *, zeros_only: bool
) -> tuple[Latency | None, Latency | None]:
    """Time two models in the same rounds.

    Args:
        before: the model as it came.
        after: the model as it goes.
        example: what both take.
        wanted: the section `measure` of a recipe.
        zeros_only: the second holds zeros and no smaller tensor. Dense kernels multiply zeros like other numbers, so no
            difference is expected, and five rounds at most are taken to show the order of magnitude.

    Returns:
        Latency before and after; None twice where the recipe asks for none.

    Raises:
        ForwardError: a forward fails.

    Cost: forward passes of both, for as long as the recipe's budget allows and at least six of each.
    """
    if not wanted.latency:
        return None, None
    timed = latency(
        {"before": before, "after": after},
        example,
        rounds=min(wanted.rounds, ROUNDS_OF_ZEROS) if zeros_only else wanted.rounds,
        warmup=wanted.warmup,
        seconds=wanted.seconds,
        spread=wanted.spread,
        threads=wanted.threads,
        batch_size=wanted.batch_size,
    )
    return timed["before"], timed["after"]
