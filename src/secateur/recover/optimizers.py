"""Optimizers as data, and learning-rate schedules."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from secateur.errors import RecipeError, UnsupportedError
from secateur.registry import suggestion

Factory = Callable[[Sequence[nn.Parameter]], Optimizer]
Schedule = Callable[[int, int], float]
OptimizerSpec = Mapping[str, object] | Factory  # {"name": ..., options}, or a callable that builds it

DEFAULT_OPTIMIZER: Mapping[str, object] = {"name": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
SCHEDULES: Mapping[str, Schedule] = {
    "constant": lambda step, total: 1.0,
    "linear": lambda step, total: 1.0 - step / total,
    "cosine": lambda step, total: 0.5 * (1.0 + math.cos(math.pi * step / total)),
}


def build_optimizer(spec: OptimizerSpec | None, parameters: Sequence[nn.Parameter]) -> Optimizer:
    """Make an optimizer for these parameters.

    Args:
        spec: ``{"name": ..., "lr": ..., ...}`` with the name of any optimizer in ``torch.optim`` and its options, a
            callable ``parameters -> Optimizer``, or None for SGD with momentum 0.9, learning rate 0.01 and weight
            decay 5e-4.
        parameters: what it moves.

    Raises:
        RecipeError: unknown name or option, or a bad value.
        UnsupportedError: an optimizer whose step needs a closure (LBFGS).

    Example:
        >>> type(build_optimizer({"name": "adam", "lr": 1e-3}, [nn.Parameter(torch.zeros(1))])).__name__
        'Adam'
    """
    # Asked before `callable`: a built optimizer may hold the parameters of another model, and would train those.
    if isinstance(spec, Optimizer):
        raise RecipeError(
            "the optimizer is already built, for parameters that may not be these",
            hint="give a callable that builds it: lambda parameters: SGD(parameters, lr=0.01)",
        )
    if callable(spec):
        optimizer = spec(parameters)
    else:
        optimizer = _from_mapping(DEFAULT_OPTIMIZER if spec is None else spec, parameters)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UnsupportedError(
            "LBFGS calls the model several times per step, which this loop does not offer",
            hint="use sgd or adamw, or a loop of your own, where handle.hold(optimizer) holds masks",
        )
    return optimizer


def _from_mapping(spec: Mapping[str, object], parameters: Sequence[nn.Parameter]) -> Optimizer:
    options = dict(spec)
    name = str(options.pop("name", "sgd"))
    kinds = optimizers()
    if name.lower() not in kinds:
        names = ["sgd", "adam", "adamw", *(kind.__name__ for kind in kinds.values())]
        raise RecipeError(f"unknown optimizer {name!r}", hint=suggestion(name, names))
    kind = kinds[name.lower()]
    known = [key for key in inspect.signature(kind).parameters if key != "params"]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise RecipeError(f"the optimizer {name} has no option {unknown[0]!r}", hint=suggestion(unknown[0], known))
    # Adaptive methods take steps of about the learning rate in every weight, plain gradients are far smaller.
    if name.lower() in ("sgd", "adam", "adamw"):
        options.setdefault("lr", 0.01 if name.lower() == "sgd" else 1e-3)
    # JSON and YAML have no tuples, and some optimizers of torch take nothing else.
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    try:
        return kind(parameters, **plain)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"the options of the optimizer {name} are wrong", why=str(error)) from error


def optimizers() -> dict[str, Callable[..., Optimizer]]:
    """Optimizers of this version of torch, by their name in lower case."""
    kinds = [value for value in vars(torch.optim).values() if isinstance(value, type) and issubclass(value, Optimizer)]
    return {kind.__name__.lower(): kind for kind in kinds if kind not in (Optimizer, torch.optim.SparseAdam)}


def resolve_schedule(schedule: str | Schedule) -> Schedule:
    """A schedule by name, or the callable ``(step, total steps) -> factor of the learning rate`` itself.

    Raises:
        RecipeError: unknown name.
    """
    if callable(schedule):
        return schedule
    if schedule not in SCHEDULES:
        raise RecipeError(f"unknown schedule {schedule!r}", hint=suggestion(str(schedule), SCHEDULES))
    return SCHEDULES[schedule]


def rate_factor(schedule: Schedule, step: int, total: int, *, warmup: int) -> float:
    """Factor of the learning rate at a step counted from 0: linear warm-up, then the schedule over the rest.

    Example:
        >>> [rate_factor(SCHEDULES["linear"], step, 4, warmup=2) for step in range(4)]
        [0.5, 1.0, 1.0, 0.5]
    """
    if step < warmup:
        return (step + 1) / warmup
    return float(schedule(step - warmup, max(total - warmup, 1)))
