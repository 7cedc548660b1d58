"""Quality: the default, accuracy, and the form that every ``evaluate`` result is brought into."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from secateur.errors import InputError, NonFiniteError
from secateur.model.call import (
    call,
    describe,
    device_of,
    evaluating,
    prediction,
    to_device,
    to_example,
    to_target,
)
from secateur.types import Data, Evaluate


def accuracy(model: nn.Module, data: Data) -> float:
    """Fraction of targets that the largest output hits; misleading where classes are very unequal in number.

    Args:
        model: gives ``[batch, classes, ...]``, or an output with such ``logits``.
        data: batches of ``(input, integer target [batch, ...])`` or mappings with a label key. Negative
            targets are ignored.

    Returns:
        A number in [0, 1], an exact count over all targets.

    Raises:
        InputError: no batch, no target, or target and output do not fit.
        NonFiniteError: an output is NaN.

    Cost: one forward pass over the data.

    Example:
        >>> x = torch.eye(3)
        >>> accuracy(nn.Identity(), [(x, torch.tensor([0, 1, 1]))])  # doctest: +ELLIPSIS
        0.666...
    """
    hits = total = 0
    device = device_of(model)
    with evaluating(model):
        for number, batch in enumerate(data):
            moved = to_device(batch, device)
            target = to_target(moved)
            if target is None or target.is_floating_point():
                raise InputError(f"batch {number}, {describe(batch)}, holds no integer target")
            predicted = prediction(call(model, to_example(moved)))
            counted = target >= 0  # negative labels are the usual way to say "not this one"
            hits += int(((_classes(predicted, target, number) == target) & counted).sum())
            total += int(counted.sum())
    if not total:
        raise InputError("the data for accuracy holds no target", hint="is the loader used up or empty?")
    return hits / total


def _classes(predicted: Tensor, target: Tensor, number: int) -> Tensor:
    # The largest of several NaN is the first, which would count as class 0 and now and then be right.
    if predicted.isnan().any():
        raise NonFiniteError(f"the output for batch {number} of the evaluation data has NaN")
    if predicted.dim() < 2 or predicted.shape[:1] + predicted.shape[2:] != target.shape:
        raise InputError(
            f"the output {describe(predicted)} does not fit the target {describe(target)}",
            hint="accuracy needs an output [batch, classes, ...] for targets [batch, ...]",
        )
    return predicted.argmax(1)


def accuracy_on(data: Data) -> Callable[[nn.Module], dict[str, float]]:
    """Make an ``evaluate(model)`` that gives ``{"accuracy": ...}`` on this data."""
    return lambda model: {"accuracy": accuracy(model, data)}


def quality(model: nn.Module, evaluate: Evaluate) -> dict[str, float]:
    """Call ``evaluate(model)`` and bring the result into named floats.

    Args:
        model: any module.
        evaluate: returns a number or a mapping of numbers.

    Returns:
        Name -> value; a bare number is called "quality".

    Raises:
        InputError: the result is neither.
        NonFiniteError: a value is NaN or infinite.
    """
    # An evaluation that draws at random must not change what the run draws after it.
    with torch.random.fork_rng(devices=[]):
        result = evaluate(model)
    # A bare number has no name that a table could show.
    named = dict(result) if isinstance(result, Mapping) else {"quality": result}
    try:
        values = {str(name): float(value) for name, value in named.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"evaluate(model) returned a {type(result).__name__} that is no number or mapping of numbers",
            why=str(error),
        ) from error
    for name, value in values.items():
        if not math.isfinite(value):
            raise NonFiniteError(f"evaluate(model) returned {value} for {name!r}")
    return values
