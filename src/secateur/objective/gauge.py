"""The one figure of quality that decides, read from every model on the same samples so that falls have bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from secateur.errors import InputError
from secateur.measure import yardstick
from secateur.measure.paired import Fall, Outcomes, fall_between
from secateur.measure.quality import higher_is_better, hits, losses
from secateur.model.call import default_loss
from secateur.model.door import Parts, first_batch, task_of
from secateur.types import Data, Judge, Loss

FallUnit = Literal["points", "percent"]


@dataclass(frozen=True, eq=False)
class GaugeReading:
    """The figure of one model, and what it did on every sample where that is known."""

    figure: float
    outcomes: Outcomes | None = None


@dataclass(frozen=True, eq=False)
class Gauge:
    """How the quality is read that a limit is about.

    Args:
        name: of the figure.
        read: model -> reading.
        higher: whether more of it is better.
    """

    name: str
    read: Callable[[nn.Module], GaugeReading]
    higher: bool

    def unit(self, before: GaugeReading) -> FallUnit:
        """Points where the figure is a share in [0, 1], else percent of what it was."""
        return "points" if self.higher and 0 <= before.figure <= 1 else "percent"

    def fall(self, before: GaugeReading, after: GaugeReading, *, confidence: float) -> Fall:
        """How much worse the second reading is.

        Raises:
            InputError: a figure of 0 or below, of which there are no percent.
        """
        if before.outcomes is not None and after.outcomes is not None:
            return fall_between(before.outcomes, after.outcomes, confidence=confidence)
        worse = before.figure - after.figure if self.higher else after.figure - before.figure
        if self.unit(before) == "points":
            return Fall(100 * worse)
        if before.figure == 0:
            raise InputError(f"{self.name} of the model as it came is 0, of which there are no percent")
        return Fall(100 * worse / abs(before.figure))


def gauge_of(model: nn.Module, batches: Data, evaluate: Judge | None = None, loss: Loss | None = None) -> Gauge:
    """Decide which figure counts: accuracy for classes, else the loss; or what the caller measures by.

    Args:
        model: left as it is; one batch of it shows the task.
        batches: that are read for every model.
        evaluate: as for `prune`. Of its figures the first one counts; of a figure that is not read sample by sample
            no bounds are known.
        loss: of the training.

    Raises:
        InputError: there is no figure of quality to hold a limit against.
    """
    if evaluate is not None and evaluate != "accuracy":
        return _asked(model, batches, evaluate)
    with torch.random.fork_rng(devices=[]):
        task = task_of(model, first_batch(batches))
    if task.kind == "classification":
        return Gauge("accuracy", _repeatably(lambda one: _hits(one, batches)), higher=True)
    if task.kind == "none" and loss is None:
        raise InputError("there is no figure of quality to limit", why=task.why, hint="Pass evaluate= or loss=.")
    return loss_gauge(batches, loss or default_loss, "mse" if task.kind == "regression" and loss is None else "loss")


def loss_gauge(batches: Data, loss: Loss, name: str = "loss") -> Gauge:
    """The mean of a loss over the batches."""
    return Gauge(name, _repeatably(lambda one: _losses(one, batches, loss)), higher=False)


def _asked(model: nn.Module, batches: Data, evaluate: Judge) -> Gauge:
    judged = yardstick(model, Parts(test=batches), evaluate).evaluate
    assert judged is not None
    name = next(iter(judged(model)))
    return Gauge(name, lambda one: GaugeReading(judged(one)[name]), higher=higher_is_better(name))


def _repeatably(read: Callable[[nn.Module], Outcomes]) -> Callable[[nn.Module], GaugeReading]:
    """With the same random numbers every time: a loader that shuffles then hands out the same batches."""

    def reading(model: nn.Module) -> GaugeReading:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            outcomes = read(model)
        if not len(outcomes.values):
            raise InputError("the data to select by hold no target", hint="is the loader used up or empty?")
        return GaugeReading(outcomes.figure, outcomes)

    return reading


def _hits(model: nn.Module, batches: Data) -> Outcomes:
    values, weights = [], []
    for hit, counted in hits(model, batches):
        # Targets of one sample hang together (the pixels of an image), so a sample is the unit and not its targets.
        counts = counted.flatten(1).sum(1) if counted.dim() > 1 else counted.long()
        found = (hit & counted).flatten(1).sum(1) if counted.dim() > 1 else (hit & counted).long()
        there = counts > 0
        values += (found[there].double() / counts[there]).tolist()
        weights += counts[there].tolist()
    return Outcomes(np.asarray(values, np.float64), np.asarray(weights, np.float64), hits=True)


def _losses(model: nn.Module, batches: Data, loss: Loss) -> Outcomes:
    # Only a whole batch has a loss: what it is of single samples a loss of the user's need not say.
    found = list(losses(model, batches, loss))
    values = np.asarray([value for value, _ in found], np.float64)
    return Outcomes(values, np.asarray([size for _, size in found], np.float64), hits=False, what="batches")
