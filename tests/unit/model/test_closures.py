"""Functions that hold a weight by themselves: those of a copy hold its own, or the copy is refused."""

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


def total(weight: Tensor, out: Tensor) -> Tensor:
    """A product with data: of a sum of weights alone, which is an offset, no cut may take a part."""
    return (out @ weight).square().sum()


def add(weight: Tensor, module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out + total(weight, out)


def by_closure(model: nn.Module) -> Callable[..., Any]:
    weight = model[2].weight
    return lambda module, args, out: out + total(weight, out)


def by_default(model: nn.Module) -> Callable[..., Any]:
    return lambda module, args, out, weight=model[2].weight: out + total(weight, out)


def by_partial(model: nn.Module) -> Callable[..., Any]:
    return functools.partial(add, model[2].weight)


def by_list(model: nn.Module) -> Callable[..., Any]:
    held = {"weights": [model[2].weight]}
    return lambda module, args, out: out + total(held["weights"][0], out)


def by_another(model: nn.Module) -> Callable[..., Any]:
    inner = by_closure(model)
    return lambda module, args, out: inner(module, args, out)


class Holder:
    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def add(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out + total(self.weight, out)


def by_module(model: nn.Module) -> Callable[..., Any]:
    return lambda module, args, out: out + total(model[2].weight, out)


def by_object(model: nn.Module) -> Callable[..., Any]:
    held = Holder(model[2].weight)
    return lambda module, args, out: held.add(module, args, out)


def by_bound_method(model: nn.Module) -> Callable[..., Any]:
    return Holder(model[2].weight).add


def by_itself(model: nn.Module) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, out: Tensor, depth: int = 1) -> Tensor:
        return hook(module, args, out, 0) if depth else out + total(model[2].weight, out)

    return hook


def by_keyword(model: nn.Module) -> Callable[..., Any]:
    return functools.partial(lambda module, args, out, *, more: out + total(more[0], out), more=(model[2].weight,))


HOLD = [by_closure, by_default, by_partial, by_list, by_another, by_module, by_object, by_bound_method, by_itself]
HOLD += [by_keyword]


def at_hook(model: nn.Module, function: Callable[..., Any]) -> None:
    model.register_forward_hook(function)


def at_forward(model: nn.Module, function: Callable[..., Any]) -> None:
    plain = type(model).forward
    model.forward = lambda x: function(model, (x,), plain(model, x))


def at_attribute(model: nn.Module, function: Callable[..., Any]) -> None:
    model.extra = {"each": [function]}
    model.forward = lambda x: model.extra["each"][0](model, (x,), nn.Sequential.forward(model, x))


@pytest.mark.parametrize("put", [at_hook, at_forward, at_attribute])
@pytest.mark.parametrize("hold", HOLD)
def test_functions_of_the_copy_hold_its_own_weights(
    hold: Callable[[nn.Module], Callable[..., Any]], put: Callable[[nn.Module, Callable[..., Any]], None]
) -> None:
    model = net()
    put(model, hold(model))
    plan = sc.plan(model, X, remove={"0": [1, 2]}, granularity="channel")
    cut = plan.apply(model)
    before, wanted = cut(X), model(X)
    with torch.no_grad():
        cut[2].weight[0, 0] += 100
    after = cut(X)
    assert (after[:, 1:] - before[:, 1:] > 50).all()  # beside the product, the sum that the function adds
    assert torch.equal(model(X), wanted)
    with torch.no_grad():
        model[2].bias += 1
    assert (model(X) - wanted).abs().min() > 0.5
    assert torch.equal(cut(X), after)
    plan.apply(model, inplace=True)
    with torch.no_grad():
        model[2].bias -= 1
    assert torch.allclose(model(X), before, atol=1e-5)


def test_what_the_weights_are_not_in_is_shared_with_the_copy() -> None:
    model, log, count = net(), [], 0

    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        nonlocal count
        log.append(model[2].weight.shape)
        count += 1

    model.register_forward_hook(hook)
    cut = sc.plan(model, X, remove={"0": [1, 2]}, granularity="channel").apply(model)
    log.clear()
    seen = count
    cut(X)
    assert (log, count) == ([(4, 7)], seen + 1)


class Shy:
    """Cannot be copied, nor be looked into."""

    __slots__ = ("take",)

    def __deepcopy__(self, memo: object) -> Shy:
        return self


KEPT: dict[int, Tensor] = {}


def by_global(model: nn.Module) -> Callable[..., Any]:
    KEPT[0] = model[2].weight
    return lambda module, args, out: out + total(KEPT[0], out)


def by_own_copy(model: nn.Module) -> Callable[..., Any]:
    shy = Shy()
    shy.take = [model[2].weight]
    return lambda module, args, out: out + total(shy.take[0], out)


@pytest.mark.parametrize("hold", [by_global, by_own_copy])
def test_a_copy_that_still_reads_the_original_is_refused(hold: Callable[[nn.Module], Callable[..., Any]]) -> None:
    model = net()
    model.register_forward_hook(hold(model))
    plan = sc.plan(model, X, remove={"0": [1, 2]}, granularity="channel")
    wanted = model(X)
    with pytest.raises(UnsupportedError, match=r"'2.weight'"):
        plan.apply(model)
    assert torch.equal(model(X), wanted)


def test_hooks_that_take_it_from_their_module_are_let_through() -> None:
    model, offset = net(), torch.ones(4)
    model[2].register_forward_hook(lambda module, args, out: out + total(module.weight, out) + offset)
    cut = sc.plan(model, X, remove={"0": [1, 2]}, granularity="channel").apply(model)
    assert cut[0].out_features == 7


def test_a_forward_that_a_closure_has_wrapped_runs_the_copy() -> None:
    model = net()
    model.down, model.up = nn.Parameter(torch.randn(2, 9)), nn.Parameter(torch.randn(4, 2))
    plain = model[2].forward
    model[2].forward = lambda x: plain(x) + x @ model.down.T @ model.up.T
    cut = sc.plan(model, X, remove={"0": [1, 2]}, granularity="channel").apply(model)
    hidden = model[1](model[0](X)).index_fill(1, torch.tensor([1, 2]), 0)
    assert torch.allclose(cut(X), plain(hidden) + hidden @ model.down.T @ model.up.T, atol=1e-5)
    assert cut.down.shape == (2, 7)


def test_arrays_that_share_memory_with_the_original_are_refused() -> None:
    model = net()
    array = model[2].bias.detach().numpy()
    model.register_forward_hook(lambda module, args, out: out * torch.from_numpy(array))
    with pytest.raises(UnsupportedError, match=r"still reads .2\.bias. of the original"):
        sc.plan(model, X, remove={"0": [1, 2]}, granularity="channel").apply(model)


class Transformed(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.a, self.b, self.way = nn.Linear(6, 9), nn.Linear(9, 4), way

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        if self.way == "vmap":
            return torch.vmap(self.b)(h)
        return self.b(h) + torch.func.grad(lambda v: self.b(v).sum())(h).sum()


@pytest.mark.parametrize("way", ["vmap", "grad"])
def test_transforms_are_refused_in_words_of_their_own(way: str) -> None:
    with pytest.raises(UnsupportedError, match=r"torch\.func, torch\.vmap") as caught:
        sc.plan(Transformed(way).eval(), X, remove={"a": [1, 2]}, granularity="channel")
    assert "report" not in str(caught.value)
