"""Random operators that answer the same whatever the size: two models of different widths can then be compared.

A cut model draws fewer numbers than the original, so with the same generator state the two would still see other
noise, and no proof could tell noise from a mistake. Held, every draw is a number that its distribution could give, the
same at every position; what is drawn without a size (an order, a choice) is the first one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.errors import UnsupportedError
from secateur.model.place import users_line

SHARE = 0.375  # of the way through a distribution: neither its middle nor an end, and exact in every precision
Arguments = Mapping[str, Any]


class HeldRandomness(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, random operators answer with fixed values.

    Attributes:
        seen: the random operators that were asked, with the line of the user's code.

    Raises:
        UnsupportedError: an operator draws in a way that has no fixed answer here.

    Example:
        >>> with HeldRandomness() as held:
        ...     torch.rand(2).tolist(), len(held.seen)
        ([0.375, 0.375], 1)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()

    def __torch_dispatch__(
        self, func: OpOverload[..., object], types: object, args: Sequence[object] = (), kwargs: Arguments | None = None
    ) -> object:
        kwargs = kwargs or {}
        if not draws(func, args, kwargs):
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        where = users_line()
        self.seen.add(f"{name.rstrip('_')} at {where}" if where else name.rstrip("_"))
        answer = ANSWERS.get(name)
        if answer is None:
            raise UnsupportedError(
                f"The forward draws at random with {func}, whose draws cannot be held still.",
                why="the cut model draws other numbers than the original, so the two cannot be compared",
                hint="Give the numbers as an input of the forward, or protect what they are computed from.",
            )
        return answer(_bound(func, args, kwargs), lambda: cast(Tensor, func(*args, **kwargs)))


# Attention kernels and dropout are tagged as random whether or not they drop anything.
DRAWS_IF_TOLD = {
    "native_dropout",
    "dropout",  # whole in inference mode only, as those below
    "feature_dropout",
    "alpha_dropout",
    "feature_alpha_dropout",
    "rrelu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
}


def draws(func: OpOverload[..., object], args: Sequence[object], kwargs: Arguments) -> bool:
    """Whether a call draws random numbers."""
    if not _may_draw(func):
        return False
    if func._schema.name.removeprefix("aten::") not in DRAWS_IF_TOLD:
        return True
    named = _bound(func, args, kwargs)
    if "p" in named:
        return bool(named.get("train", True)) and named["p"] > 0
    if "training" in named:
        return bool(named["training"])
    return bool(named.get("dropout_p", 0.0))


@cache
def _may_draw(func: OpOverload[..., object]) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


def _bound(func: OpOverload[..., object], args: Sequence[object], kwargs: Arguments) -> dict[str, Any]:
    """Arguments by name, with the defaults of the operator."""
    named = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
    named.update((a.name, value) for a, value in zip(func._schema.arguments, args, strict=False))
    return {**named, **kwargs}


def _fill(value: Callable[[Arguments], Any]) -> Callable[[Arguments, Callable[[], Tensor]], Tensor]:
    """An answer that is the same number everywhere, in a tensor such as the operator itself would give."""
    return lambda named, draw: draw().fill_(value(named))


def _chance(named: Arguments, draw: Callable[[], Tensor]) -> Tensor:
    chance = named["self"] if named.get("p") is None else named["p"]
    # What is missing is NaN, which the operator itself takes for no chance.
    drawn = torch.empty_like(named["self"]) if chance is named["self"] else draw()
    return drawn.copy_(torch.as_tensor(chance, device=drawn.device) > SHARE)


def _normal(named: Arguments, draw: Callable[[], Tensor]) -> Tensor:
    mean, std = named.get("mean", 0.0), named.get("std", 1.0)
    drawn = draw()
    return drawn.copy_(torch.as_tensor(mean + SHARE * std, device=drawn.device))


def _kept(named: Arguments, draw: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    x: Tensor = named["input"]
    return x.clone(), torch.ones_like(x, dtype=torch.bool)  # nothing is dropped, so nothing has to be scaled


def _order(named: Arguments, draw: Callable[[], Tensor]) -> Tensor:
    drawn = draw()
    return drawn.copy_(torch.arange(len(drawn), device=drawn.device))


def _likeliest(named: Arguments, draw: Callable[[], Tensor]) -> Tensor:
    chances: Tensor = named["self"]
    count = named["num_samples"]
    order = torch.argsort(chances, dim=-1, descending=True, stable=True)
    return order[..., :1].expand(*order.shape[:-1], count).clone() if named["replacement"] else order[..., :count]


def _slope(named: Arguments, draw: Callable[[], Tensor]) -> Tensor:
    x, low, high = named["self"], named["lower"], named["upper"]
    slope = low + SHARE * (high - low) if named["training"] else (low + high) / 2
    named["noise"].fill_(slope)
    return torch.where(x >= 0, x, slope * x)


_integers = _fill(lambda a: a.get("low", 0) + int(SHARE * (a["high"] - a.get("low", 0))))
ANSWERS: Mapping[str, Callable[[Any, Callable[[], Tensor]], object]] = {
    **dict.fromkeys(("rand", "rand_like"), _fill(lambda a: SHARE)),
    **dict.fromkeys(("randn", "randn_like"), _fill(lambda a: SHARE)),
    **dict.fromkeys(("randint", "randint_like"), _integers),
    "uniform_": _fill(lambda a: a["from"] + SHARE * (a["to"] - a["from"])),
    "exponential_": _fill(lambda a: SHARE / a["lambd"]),
    "random_": _fill(lambda a: 0 if a.get("from") is None else a["from"]),
    **dict.fromkeys(("normal", "normal_"), _normal),
    **dict.fromkeys(("bernoulli", "bernoulli_"), _chance),
    "native_dropout": _kept,
    "rrelu_with_noise": _slope,
    "randperm": _order,
    "multinomial": _likeliest,
}
