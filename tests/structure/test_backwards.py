"""Backward passes of the user's own: no gradient is compared, so each is a condition with its line."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g * 10 / g.shape[-1]


scale = Scale.apply


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 3)

    def between(self, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(self.up(x).relu()))


class Named(Net):
    def between(self, h: Tensor) -> Tensor:
        return Scale.apply(h)  # type: ignore[no-any-return]


class Alias(Net):
    def between(self, h: Tensor) -> Tensor:
        return scale(h)  # type: ignore[no-any-return]


def helper(h: Tensor) -> Tensor:
    return Scale.apply(h)  # type: ignore[no-any-return]


class Helped(Net):
    def between(self, h: Tensor) -> Tensor:
        return helper(h)


class OfTensor(Net):
    def between(self, h: Tensor) -> Tensor:
        if h.requires_grad:
            h.register_hook(lambda g: g * 10 / g.shape[-1])
        return h


class OfModule(Net):
    def __init__(self) -> None:
        super().__init__()
        self.down.register_full_backward_hook(lambda m, i, o: (i[0] * 10 / i[0].shape[-1],))


class OfPre(Net):
    def __init__(self) -> None:
        super().__init__()
        self.down.register_full_backward_pre_hook(lambda m, g: (g[0] * 10 / m.in_features,))


class Vjp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def vjp(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g * 10 / g.shape[-1]


class OfVjp(Net):
    def between(self, h: Tensor) -> Tensor:
        return Vjp.apply(h)  # type: ignore[no-any-return]


class Inner(Net):
    def between(self, h: Tensor) -> Tensor:
        def inner(t: Tensor) -> Tensor:
            return Scale.apply(t)  # type: ignore[no-any-return]

        return inner(h)


class Held(Net):
    act: Any

    def between(self, h: Tensor) -> Tensor:
        return self.act.apply(h)  # type: ignore[no-any-return]


def held() -> nn.Module:
    model = Held()
    model.act = Scale
    return model


space: Any = ModuleType("space")
space.Other = Scale


class OfSpace(Net):
    def between(self, h: Tensor) -> Tensor:
        return space.Other.apply(h)  # type: ignore[no-any-return]


def closed() -> nn.Module:
    own = Scale

    class Closed(Net):
        def between(self, h: Tensor) -> Tensor:
            return own.apply(h)  # type: ignore[no-any-return]

    return Closed()


WAYS = [Named, Alias, Helped, OfTensor, OfModule, OfPre, OfVjp, Inner, held, OfSpace, closed]


def said(model: nn.Module) -> list[str]:
    plan = sc.plan(model, X, granularity="neuron", remove={"up": [0, 3]})
    return [c.where for c in plan.conditions if "gradients were not compared" in c.text]


@pytest.mark.parametrize("make", WAYS)
def test_a_backward_pass_of_its_own_is_a_condition(make: Callable[[], nn.Module]) -> None:
    (where,) = said(make())
    assert where.startswith("structure/test_backwards.py:")


def test_no_backward_pass_of_its_own_says_nothing() -> None:
    assert said(Net()) == []
