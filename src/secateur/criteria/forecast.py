"""What a criterion is going to take, said before it begins, and refused where nobody would wait for it."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from secateur.errors import ResourceError
from secateur.model.call import default_loss
from secateur.statistics.curvature.output_curvature import output_width
from secateur.statistics.gradients.functional import batches

if TYPE_CHECKING:
    from secateur.criteria.base import Context

EPOCHS, SECONDS = 5, 60  # over the scoring data, and on this machine: what takes more than both says so
HOURS = 12  # on this machine: what would take more is refused


class CostWarning(UserWarning):
    """A criterion is going to take many passes over the data: said before the first one."""


@dataclass(frozen=True)
class EpochForecast:
    """What a criterion will take on the data and model at hand.

    Args:
        epochs: forward and backward passes over the scoring data.
        why: what they are for, in words.
        less: how to need fewer.
    """

    epochs: float
    why: str
    less: str


def outputs(context: Context) -> int | None:
    """Outputs of the model per sample, of the first batch; None where the loss is no function of one output."""
    data, loss = context.data, context.loss or default_loss
    assert data is not None
    batch, _ = next(batches(context.model, data))
    found = output_width(context.model, loss, batch)
    return None if math.isinf(found) else int(found)


def announce(name: str, forecast: EpochForecast | None, context: Context) -> None:
    """Say what will take long, with the time that the first batch makes of it, and refuse what will take very long.

    Args:
        name: of the criterion.
        forecast: of it; None says nothing.
        context: what is scored, in the state in which it will be.

    Raises:
        ResourceError: more than `HOURS` hours.

    Warns:
        CostWarning: more than `EPOCHS` epochs, and more than `SECONDS` where the data have a length to tell by.

    Cost: a forward and backward pass of the first batch, where there is something to say.
    """
    if forecast is None or forecast.epochs <= EPOCHS:
        return
    seconds = _seconds(context)
    passes = f"criterion {name!r} takes about {forecast.epochs:,.0f} epochs over the scoring data ({forecast.why})"
    if seconds is None:
        warnings.warn(f"{passes}; {forecast.less}", CostWarning, stacklevel=4)
        return
    hours = forecast.epochs * seconds / 3600
    told = f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
    if hours > HOURS:
        raise ResourceError(
            f"{passes}, by the first batch {told} on this machine, and the most is {HOURS}",
            hint=f"{forecast.less}, or score with fewer samples (calibration=)",
        )
    if 3600 * hours > SECONDS:
        said = f"{passes}, by the first batch {told} on this machine; {forecast.less}"
        warnings.warn(said, CostWarning, stacklevel=4)


def _seconds(context: Context) -> float | None:
    """Of one epoch; None where the data do not say how many batches they have."""
    data, loss = context.data, context.loss or default_loss
    if data is None or not isinstance(data, Sized):
        return None
    batch, _ = next(batches(context.model, data))
    weights = [weight for weight in context.model.parameters() if weight.requires_grad]
    started = time.perf_counter()
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        value = loss(context.model, batch)
        if weights and value.requires_grad:
            torch.autograd.grad(value, weights, allow_unused=True)
    return (time.perf_counter() - started) * len(data)
