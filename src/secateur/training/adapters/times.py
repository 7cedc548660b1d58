"""Times of a loop of others: steps, or shares of a length that is known only when the loop begins."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from secateur.errors import RecipeError
from secateur.registry import suggestion
from secateur.training.movement import MovementPruner
from secateur.training.pruner import Pruner
from secateur.training.settings import Optimizers
from secateur.types import StateDict
from secateur.words import about_key

AnyPruner = Pruner | MovementPruner
Make = Callable[..., AnyPruner]
TIMES = ("begin", "end", "every")
GIVEN = ("model", "optimizer", "state")


def check_settings(kind: Make, settings: Mapping[str, object]) -> None:
    """Refuse a wrong word when a callback is made, and not when the training has been set up.

    Args:
        kind: `Pruner` or `MovementPruner`.
        settings: of it.

    Raises:
        RecipeError: an argument that it does not have, or that the loop gives.

    Example:
        >>> check_settings(Pruner, {"sparsity": 0.5, "end": 0.8})
    """
    known = inspect.signature(kind).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known):
        return
    words = [p.name for p in known if p.name not in GIVEN]
    for name in settings:
        if name in GIVEN:
            raise RecipeError(f"{name}= is what the loop gives to the pruner", hint="leave it out")
        if name not in words:
            called = getattr(kind, "__name__", "the pruner")
            hint = about_key(name) or suggestion(name, words, form="{}")
            raise RecipeError(f"{called}() has no argument {name!r}", hint=hint)


def in_steps(settings: Mapping[str, object], total: int) -> dict[str, Any]:
    """Settings whose times are steps.

    Args:
        settings: of a pruner; begin, end and every may be shares of the loop (floats in [0, 1]).
        total: optimizer steps of the loop; 0 or less where it is not known.

    Raises:
        RecipeError: a share of a loop whose length nobody knows, or out of range.

    Example:
        >>> in_steps({"begin": 0.25, "end": 0.5, "every": 10}, 200)
        {'begin': 50, 'end': 100, 'every': 10}
    """
    result = dict(settings)
    for name in TIMES:
        value = result.get(name)
        if not isinstance(value, float):
            continue
        if total <= 0:
            raise RecipeError(f"{name}={value:g} is a share of a loop without a known length", hint="give steps")
        if not 0 <= value <= 1:
            raise RecipeError(f"{name}={value:g} is no share in [0, 1]", hint="give a share, or steps as an integer")
        result[name] = max(round(value * total), 1 if name == "every" else 0)
    return result


def made(
    kind: Make,
    model: nn.Module,
    optimizer: Optimizers,
    settings: Mapping[str, object],
    *,
    total: int,
    together: bool,
    state: StateDict | None,
) -> AnyPruner:
    """The pruner of a loop that has just begun.

    Args:
        kind: `Pruner` or `MovementPruner`.
        model: of the loop.
        optimizer: of the loop.
        settings: of the pruner.
        total: optimizer steps of the loop.
        together: whether several processes train this model.
        state: of the checkpoint that the loop goes on from; the loop has loaded its weights.
    """
    settings = in_steps(settings, total)
    example = settings.pop("example", None)
    return kind(model, example, optimizer=optimizer, state=state, **{"distributed": together, **settings})
