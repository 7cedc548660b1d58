"""Hooks that hold a weight by themselves: a copy would read that of the original, so the cut is made in place only."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.errors import UnsupportedError

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)).eval()


def add(weight: Tensor, module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out + weight.sum()


def by_closure(model: nn.Module) -> Callable[..., Any]:
    weight = model[2].weight
    return lambda module, args, out: out + weight.sum()


def by_default(model: nn.Module) -> Callable[..., Any]:
    return lambda module, args, out, weight=model[2].weight: out + weight.sum()


def by_partial(model: nn.Module) -> Callable[..., Any]:
    return functools.partial(add, model[2].weight)


def by_list(model: nn.Module) -> Callable[..., Any]:
    held = {"weights": [model[2].weight]}
    return lambda module, args, out: out + held["weights"][0].sum()


def by_another(model: nn.Module) -> Callable[..., Any]:
    inner = by_closure(model)
    return lambda module, args, out: inner(module, args, out)


@pytest.mark.parametrize("hold", [by_closure, by_default, by_partial, by_list, by_another])
def test_a_hook_that_holds_a_weight_is_refused_by_name(hold: Callable[[nn.Module], Callable[..., Any]]) -> None:
    model = net()
    model.register_forward_hook(hold(model))
    plan = sc.plan(model, X, remove={"0": [1, 2]}, granularity="channel")
    with pytest.raises(UnsupportedError, match=r"hook of 'Sequential' holds the weight '2.weight'[\s\S]*inplace=True"):
        plan.apply(model)
    wanted = model(X)
    assert torch.equal(model(X), wanted)
    assert plan.apply(model, inplace=True)[0].out_features == 7


def test_hooks_that_take_it_from_their_module_are_let_through() -> None:
    model, offset = net(), torch.ones(4)
    model[2].register_forward_hook(lambda module, args, out: out + module.weight.sum() + offset)
    cut = sc.plan(model, X, remove={"0": [1, 2]}, granularity="channel").apply(model)
    assert cut[0].out_features == 7
