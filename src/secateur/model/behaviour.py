"""Whether a forward gives the same twice: does it draw random numbers, and does anything else move its outputs?

A proof compares two runs. Where a model answers by chance, they differ for a reason that has nothing to do with the
cut, and this is the place that finds out and says so.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.errors import CertificateError, SecateurError, UnsupportedError
from secateur.model.call import call, fresh, tensors_in
from secateur.model.guard import guard
from secateur.model.held import draws
from secateur.model.place import users_line
from secateur.model.state import State
from secateur.model.tensors import dense
from secateur.types import Example

Operator: TypeAlias = OpOverload[..., object]
NOISE = 1e-5  # relative to the largest output: kernels that add in any order differ by less


@dataclass(frozen=True)
class Behaviour:
    """What moves the outputs of a forward in eval mode, on one input.

    Args:
        draws: what drew random numbers, each with its line: operators of torch, "numpy", "random" or a generator that
            the model holds; empty = nothing.
        by_seed: largest difference between two runs from other states of the generators, relative to the outputs.
        by_itself: the same from equal states of generators, model and input: what is left is a clock, another source
            of chance, or state that nobody can see.
    """

    draws: tuple[str, ...]
    by_seed: float
    by_itself: float

    @property
    def random(self) -> bool:
        """Whether chance decides what comes out."""
        return bool(self.draws) and self.by_seed > NOISE

    @property
    def restless(self) -> bool:
        """Whether two equal runs differ."""
        return self.by_itself > NOISE


def behaviour(model: nn.Module, example: Example) -> Behaviour:
    """Run a model twice from one state, and once more from another where it draws random numbers.

    Args:
        model: left as it is, with all generators.
        example: what `secateur.model.call.call` takes; left as it is.

    Raises:
        ForwardError: the forward fails.

    Cost: two forward passes; three where the first one draws.

    Example:
        >>> behaviour(nn.Linear(2, 2), torch.ones(1, 2)).random
        False
        >>> behaviour(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), torch.ones(1, 2)).draws
        ()
    """
    held = State([model], example, copies=False, weights=False).generators
    drawn = _Draws()
    first = _run(model, example, 0, held, drawn)
    again = _run(model, example, 0, held)
    other = _run(model, example, 1, held) if drawn.found else again
    return Behaviour(tuple(drawn.found), _distance(first, other), _distance(first, again))


def unprovable(error: Exception, model: nn.Module, example: Example) -> Exception:
    """What to raise in the place of an error that a proof ended with.

    Args:
        error: a disagreement, or whatever an operator raised on the way.
        model: the original.
        example: what it was proved on.

    Returns:
        An `UnsupportedError` where the model answers by chance, or where the proof itself could not be run; else the
        error as it is.

    Cost: as `behaviour`, where the two runs of a proof differ or one of them fails.
    """
    if isinstance(error, SecateurError) and not isinstance(error, CertificateError):
        return error
    try:
        found = behaviour(model, example)
    except SecateurError:
        found = Behaviour((), 0.0, 0.0)
    if found.random or (found.draws and not isinstance(error, CertificateError)):
        return _by_chance(model, found)
    if found.restless:
        return UnsupportedError(
            f"{type(model).__name__} gives other outputs each time, so no cut of it can be proved; nothing was changed",
            why=f"two runs on one input, from one state, differ by {found.by_itself:.2g} of the largest output",
            hint="its forward asks a clock, another source of chance, or keeps state where nobody sees it: give it a "
            "way to switch that off in eval mode",
        )
    if isinstance(error, CertificateError):
        return error
    return UnsupportedError(
        f"a cut of {type(model).__name__} cannot be proved here, so it was not made; nothing was changed",
        why=f"{type(error).__name__}: {error} - the proof puts NaN in the place of removed parts, and an operator "
        "that reads them cannot take it",
        hint="protect the layers in front of it (protect=[...]), or cut at another granularity",
    )


def _by_chance(model: nn.Module, found: Behaviour) -> UnsupportedError:
    differ = f"; runs from other seeds differ by {found.by_seed:.2g} of the largest output" if found.random else ""
    return UnsupportedError(
        f"{type(model).__name__} draws random numbers in eval mode, so no cut of it can be proved; nothing was changed",
        why="; ".join(found.draws[:3]) + differ,
        hint="switch it off in eval mode (training=self.training for functional.dropout), or hand the noise in as an "
        "input; switch it on again on what comes back",
    )


# -- runs ----------------------------------------------------------------------------------------------------------


class _Draws(TorchDispatchMode):
    """Names the operators that take from a generator, and the line that called them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Operator, types: object, args: Sequence[object] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        if draws(func, args, kwargs or {}):
            self.add(f"{func.overloadpacket.__name__}{_at_line()}")
        return func(*args, **(kwargs or {}))

    def add(self, what: str) -> None:
        """Keep each once."""
        if what not in self.found:
            self.found.append(what)


def _run(
    model: nn.Module, example: Example, seed: int, held: list[object], drawn: _Draws | None = None
) -> list[Tensor]:
    mine = fresh(example)
    with guard(model, mode="eval", gradients=False, seed=seed, example=mine):
        for generator in held:
            _seed(generator, seed)
        before = _states(held)
        if drawn is None:
            answer = call(model, mine)
        else:
            with drawn:
                answer = call(model, mine)
            for (name, old), (_, new) in zip(before.items(), _states(held).items(), strict=True):
                # What no operator of torch tells: generators of Python and NumPy, and those that the model holds.
                if old != new and not (name == "torch" and drawn.found):
                    drawn.add(f"the generator of {name}")
        return [dense(tensor.detach()).clone() for tensor in tensors_in(answer)]


def _states(held: list[object]) -> dict[str, object]:
    numpy = np.random.get_state()  # noqa: NPY002
    states: dict[str, object] = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "random": random.getstate(),
        "numpy": str((numpy[0], numpy[1].tobytes(), *numpy[2:])),  # type: ignore[index]
    }
    for i, generator in enumerate(held):
        states[f"the model itself ({type(generator).__name__}, number {i})"] = _state(generator)
    return states


def _state(generator: object) -> object:
    if isinstance(generator, torch.Generator):
        return generator.get_state().cpu().numpy().tobytes()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return str(generator.get_state(legacy=False))
    return str(cast(np.random.Generator, generator).bit_generator.state)


def _seed(generator: object, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, (random.Random, np.random.RandomState)):
        generator.seed(seed)
    else:
        bits = cast(np.random.Generator, generator).bit_generator
        bits.state = type(bits)(seed).state


def _distance(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest difference relative to the largest value; infinite where shapes, numbers or NaNs differ."""
    if [t.shape for t in a] != [t.shape for t in b]:
        return float("inf")
    worst = 0.0
    for one, other in zip(a, b, strict=True):
        if one.is_meta or one.numel() == 0 or torch.equal(one, other):
            continue
        x, y = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (one, other))
        gap = torch.nan_to_num((x - y).abs(), nan=0.0)
        alone = torch.isnan(x) != torch.isnan(y)
        if bool(alone.any()):
            return float("inf")
        worst = max(worst, float(gap.max()) / max(float(torch.nan_to_num(x).abs().max()), 1e-30))
    return worst


def _at_line() -> str:
    line = users_line(whole=True)
    return line and f" at {line}"
