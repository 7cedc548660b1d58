"""Figures of quality by name: ``evaluate="accuracy"``, and what the library `evaluate` of Hugging Face hands out."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from numbers import Real
from typing import Protocol, cast

import torch
from torch import Tensor

from secateur.errors import InputError, RecipeError
from secateur.registry import suggestion
from secateur.types import Metric

NAMES = ("accuracy", "top5", "f1", "precision", "recall", "mse", "mae")
_TOP = re.compile(r"top_?(\d{1,3})")


class Hits:
    """Share of the targets among the largest outputs; negative targets are ignored.

    Args:
        top: how many of the largest count.
    """

    def __init__(self, top: int = 1) -> None:
        self.top = top
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.hits = self.count = 0

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Take ``[batch, classes, ...]`` and ``[batch, ...]``."""
        _require_classes(prediction, target)
        # Of fewer classes than that, every target is among them.
        found = prediction.topk(min(self.top, prediction.shape[1]), dim=1).indices
        counted = target >= 0
        self.hits += int(((found == target.unsqueeze(1)).any(1) & counted).sum())
        self.count += int(counted.sum())

    def compute(self) -> float:
        """The share."""
        return self.hits / _some(self.count)


class PerClass:
    """Precision, recall or their harmonic mean, of every class that occurs, averaged over the classes (macro).

    Args:
        which: "f1", "precision" or "recall".
    """

    def __init__(self, which: str) -> None:
        self.which = which
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.right: dict[int, int] = {}
        self.said: dict[int, int] = {}
        self.true: dict[int, int] = {}

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Take ``[batch, classes, ...]`` and ``[batch, ...]``."""
        _require_classes(prediction, target)
        chosen, counted = prediction.argmax(1), target >= 0
        for counts, labels in ((self.said, chosen), (self.true, target)):
            _count(counts, labels[counted])
        _count(self.right, target[counted & (chosen == target)])

    def compute(self) -> float:
        """The mean over the classes; a class that is never predicted has a precision of 0."""
        # Not all outputs: a class that nobody has and nobody says would only lower the mean.
        classes = sorted({*self.said, *self.true})
        return sum(self._of(one) for one in classes) / _some(len(classes))

    def _of(self, one: int) -> float:
        right, said, true = (counts.get(one, 0) for counts in (self.right, self.said, self.true))
        if self.which == "f1":
            return 2 * right / max(said + true, 1)
        return right / max(said if self.which == "precision" else true, 1)


class Distance:
    """Mean of the squared or absolute differences.

    Args:
        power: 2 or 1.
    """

    def __init__(self, power: int) -> None:
        self.power = power
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.total, self.count = 0.0, 0

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Take two tensors of one shape."""
        if prediction.shape != target.shape:
            raise InputError(
                f"the output {tuple(prediction.shape)} has not the shape of the target {tuple(target.shape)}",
                hint="reshape the target, or give evaluate(model) of your own",
            )
        # In double precision, since a long sum in single precision swallows small differences.
        self.total += float(((prediction.double() - target.double()).abs() ** self.power).sum())
        self.count += target.numel()

    def compute(self) -> float:
        """The mean."""
        return self.total / _some(self.count)


class LibraryMetric(Protocol):
    """A metric of the library `evaluate`, as far as it is used here."""

    def add_batch(self, *, predictions: list[object], references: list[object]) -> object:
        """Take a batch."""

    def compute(self) -> object:
        """The figures, after which nothing is remembered."""


class Module:
    """A metric of the library `evaluate` as one with update, compute and reset; classes are the largest outputs.

    Args:
        held: an object with ``add_batch(predictions=, references=)`` and ``compute()``.
    """

    def __init__(self, held: LibraryMetric) -> None:
        self.held = held
        self.name = str(getattr(held, "name", ""))

    def reset(self) -> None:
        """Nothing to forget: `compute` of the library empties it."""

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Take a batch."""
        chosen = prediction if target.is_floating_point() else prediction.argmax(1)
        # NaN, the one value that is not equal to itself, marks a target that is missing, as negative classes do.
        counted = target == target if target.is_floating_point() else target >= 0
        self.held.add_batch(predictions=chosen[counted].tolist(), references=target[counted].tolist())

    def compute(self) -> object:
        """What the library computes: a mapping of figures, of which those that are numbers count."""
        found = self.held.compute()
        if isinstance(found, Mapping):
            return {name: value for name, value in found.items() if isinstance(value, Real)}
        return found


def metric_named(name: str) -> Metric:
    """A metric by its name: ours, or one that the library `evaluate` loads.

    Args:
        name: accuracy, top5 (or any topK), f1, precision, recall (each the mean over classes), mse, mae.

    Raises:
        RecipeError: nobody knows the name.

    Example:
        >>> import torch
        >>> rule = metric_named("top2")
        >>> rule.update(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([1]))
        >>> rule.compute()
        1.0
    """
    top = _TOP.fullmatch(name)
    if name == "accuracy" or (top and int(top[1])):
        return Hits(int(top[1]) if top else 1)
    if name in ("f1", "precision", "recall"):
        return PerClass(name)
    if name in ("mse", "mae"):
        return Distance(2 if name == "mse" else 1)
    try:
        library = importlib.import_module("evaluate")
        return Module(library.load(name))
    except ImportError:
        hint = suggestion(name, NAMES, otherwise=f"known: {', '.join(NAMES)}; the package evaluate knows more")
        raise RecipeError(f"no figure of quality is called {name!r}", hint=hint) from None
    except Exception as error:
        # The library raises whatever its loaders do (files, network, modules): the cause is quoted and not told
        # apart.
        hint = suggestion(name, NAMES, otherwise=f"known here: {', '.join(NAMES)}")
        why = f"{type(error).__name__}: {str(error)[:200]}"
        raise RecipeError(f"the package evaluate has no {name!r}", why=why, hint=hint) from error


def adapted(judge: object) -> object:
    """Names, and metrics of the library `evaluate`, as metrics; everything else comes back as it is."""
    if isinstance(judge, str):
        return metric_named(judge)
    like_library = callable(getattr(judge, "add_batch", None)) and callable(getattr(judge, "compute", None))
    return Module(cast(LibraryMetric, judge)) if like_library and not isinstance(judge, (type, Metric)) else judge


def _require_classes(prediction: Tensor, target: Tensor) -> None:
    if (
        target.is_floating_point()
        or prediction.dim() < 2
        or prediction.shape[:1] + prediction.shape[2:] != target.shape
    ):
        raise InputError(
            f"the output {tuple(prediction.shape)} does not fit the target {tuple(target.shape)}",
            hint="this figure needs an output [batch, classes, ...] and integer targets [batch, ...]",
        )


def _count(counts: dict[int, int], labels: Tensor) -> None:
    found, numbers = torch.unique(labels, return_counts=True)
    for label, number in zip(found.tolist(), numbers.tolist(), strict=True):
        counts[label] = counts.get(label, 0) + number


def _some(count: int) -> int:
    if not count:
        raise InputError("the data for quality hold no target", hint="is the loader used up or empty?")
    return count
