"""Functions at hand that no run called, and modules that none reached: how many run is a number of another input."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.planning.plan import Plan

Made = Callable[["Net", Tensor, int], Tensor]
FEW, MANY = (torch.randn(n, 8, generator=torch.Generator().manual_seed(n)) for n in (3, 11))
FUNCTION, MODULE = "is not called, as on the example", "what was not called on the example"


class Flip(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(1)


class Net(nn.Module):
    """A model whose `of` mixes its units on large batches."""

    def __init__(self, of: Made, *layers: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.of = nn.Linear(8, 16), nn.Linear(16, 4), of
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0] // 10  # 0 on the example; the smaller and larger ones of the proof do not reach 1
        return self.b(self.of(self, F.relu(self.a(x)), n))

    def step(self, h: Tensor, _: Any) -> Tensor:
        return h.flip(1)

    STEPS = (torch.tanh, torch.fliplr)

    def walk(self, h: Tensor, n: int) -> Tensor:
        for function in self.STEPS[: 1 + n]:
            h = function(h)
        return h


def flip(h: Tensor) -> Tensor:
    return h.flip(1)


def by_a_nested_function(s: Net, h: Tensor, n: int) -> Tensor:
    def step(t: Tensor, _: int) -> Tensor:
        return t.flip(1)

    return functools.reduce(step, range(n), h)


def by_a_list(s: Net, h: Tensor, n: int) -> Tensor:
    for function in [torch.relu, torch.fliplr][: 1 + n]:
        h = function(h)
    return h


STEPS = [torch.relu, flip]
TABLE = {"a": torch.relu, "b": flip}


def by_a_global_list(s: Net, h: Tensor, n: int) -> Tensor:
    for function in STEPS[: 1 + n]:
        h = function(h)
    return h


def by_number(s: Net, h: Tensor, n: int) -> Tensor:
    for i in range(1 + n):
        h = STEPS[i](h)
    return h


def zipped(s: Net, h: Tensor, n: int) -> Tensor:
    for function, _ in zip(STEPS, range(1 + n), strict=False):
        h = function(h)
    return h


def by_a_table(s: Net, h: Tensor, n: int) -> Tensor:
    for function in list(TABLE.values())[: 1 + n]:
        h = function(h)
    return h


def by_a_list_of_the_class(s: Net, h: Tensor, n: int) -> Tensor:
    return s.walk(h, n)


def by_next(s: Net, h: Tensor, n: int) -> Tensor:
    functions = iter([torch.relu, torch.fliplr])
    for _ in range(1 + n):
        h = next(functions)(h)
    return h


def by_popping(s: Net, h: Tensor, n: int) -> Tensor:
    functions = [flip, torch.relu]
    for _ in range(1 + n):
        h = functions.pop()(h)
    return h


def through_modules(s: Net, h: Tensor, n: int) -> Tensor:
    for layer in s.layers[: 1 + n]:
        h = layer(h)
    return h


def numbered_modules(s: Net, h: Tensor, n: int) -> Tensor:
    for i in range(1 + n):
        h = s.layers[i](h)
    return h


def zipped_modules(s: Net, h: Tensor, n: int) -> Tensor:
    for layer, _ in zip(s.layers, range(1 + n), strict=False):
        h = layer(h)
    return h


def sliced_modules(s: Net, h: Tensor, n: int) -> Tensor:
    for layer in itertools.islice(s.layers, 1 + n):
        h = layer(h)
    return h


UNCALLED: dict[str, Any] = {
    "reduce": lambda s, h, n: functools.reduce(lambda t, _: t.flip(1), range(n), h),
    "reduce of a list": lambda s, h, n: functools.reduce(lambda t, f: f(t), [flip] * n, h),
    "reduce of a method": lambda s, h, n: functools.reduce(s.step, range(n), h),
    "reduce of a part": lambda s, h, n: functools.reduce(functools.partial(lambda t, _: t.flip(1)), range(n), h),
    "reduce of a nested function": by_a_nested_function,
    "accumulate": lambda s, h, n: list(itertools.accumulate(range(n), lambda t, _: t.flip(1), initial=h))[-1],
    "map": lambda s, h, n: sum(map(flip, [h] * n), h),
    "map of torch": lambda s, h, n: sum(map(torch.fliplr, [h] * n), h),
    "a list": by_a_list,
    "a global list": by_a_global_list,
    "a global list by number": by_number,
    "a global list zipped": zipped,
    "a global table": by_a_table,
    "a list of the class": by_a_list_of_the_class,
    "next": by_next,
    "pop": by_popping,
    "modules made here": lambda s, h, n: nn.Sequential(*[Flip()] * n)(h),
}
UNREACHED: dict[str, Any] = {
    "modules": through_modules,
    "numbered modules": numbered_modules,
    "zipped modules": zipped_modules,
    "sliced modules": sliced_modules,
}


def keeping(s: Net, h: Tensor, n: int) -> Tensor:
    if h.requires_grad:
        h.register_hook(lambda gradient: gradient * 2)
    return h


def keeping_always(s: Net, h: Tensor, n: int) -> Tensor:
    s.a.register_forward_pre_hook(lambda module, given: (given[0].flip(1),)).remove()
    return h


CALLED: dict[str, Any] = {
    "reduce": lambda s, h, n: functools.reduce(lambda t, _: 2 * t, range(1 + n), h),
    "map": lambda s, h, n: sum(map(torch.tanh, [h, h])),
    "nothing to do": lambda s, h, n: functools.reduce(lambda t, _: t, range(n), h),
    "of a table by its key": lambda s, h, n: TABLE["a"](h),
    "of a table by a name": lambda s, h, n: TABLE["ab"[n]](h),
    "of a global list by its number": lambda s, h, n: STEPS[0](h),
    "length of a global list": lambda s, h, n: h * len(STEPS),
    "compared": lambda s, h, n: h * 2 if s.of is not flip else h,
    "asked for": lambda s, h, n: h * 2 if callable(flip) else h,
    "kept for later": keeping,
    "kept for a moment": keeping_always,
    "functions of torch": lambda s, h, n: functools.reduce(lambda t, f: f(t), [F.relu, torch.tanh], h),
}


def planned(of: Made, *layers: nn.Module) -> tuple[Net, Plan]:
    net = Net(of, *layers).eval()
    return net, sc.plan(net, FEW, granularity="channel", target={"sparsity": 0.5}, criterion={"name": "random"})


@pytest.mark.parametrize("name", UNCALLED)
def test_a_function_that_another_input_calls_is_a_condition(name: str) -> None:
    net, plan = planned(UNCALLED[name])
    differs_on_many(net, plan)
    assert [c for c in plan.conditions if FUNCTION in c.text and "test_uncalled.py:" in c.where]


@pytest.mark.parametrize("name", UNREACHED)
def test_a_module_that_another_input_reaches_is_a_condition(name: str) -> None:
    net, plan = planned(UNREACHED[name], nn.ReLU(), Flip())
    differs_on_many(net, plan)
    assert [c for c in plan.conditions if MODULE in c.text and "layers.1 (Flip)" in c.text]


def differs_on_many(net: Net, plan: Plan) -> None:
    """The cut model is the original with zeros on the example, and another one on a larger batch."""
    cut = plan.apply(net)
    zeros = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    gone = torch.ones(16, dtype=torch.bool).index_fill(0, plan.cuts["a.weight"][0], False).nonzero().flatten()
    for key, d in (("a.weight", 0), ("a.bias", 0), ("b.weight", 1)):
        zeros[key].index_fill_(d, gone, 0)
    with torch.no_grad():
        for x, same in ((FEW, True), (MANY, False)):
            assert torch.allclose(torch.func.functional_call(net, zeros, (x,)), cut(x), atol=1e-5) == same


@pytest.mark.parametrize("name", CALLED)
def test_what_was_called_or_does_nothing_is_none(name: str) -> None:
    found = [c for c in planned(CALLED[name])[1].conditions if FUNCTION in c.text]
    assert not found


class Roller:
    def __call__(self, h: Tensor) -> Tensor:
        return h.roll(1, 1)


HELD: dict[str, Any] = {
    "of torch": torch.fliplr,
    "of the user": flip,
    "a lambda": lambda h: h.flip(1),
    "a part": functools.partial(torch.roll, shifts=1, dims=1),
    "an object": Roller(),
}


@pytest.mark.parametrize("name", HELD)
def test_a_function_in_a_list_that_a_module_holds(name: str) -> None:
    def walk(s: Net, h: Tensor, n: int) -> Tensor:
        for function in itertools.islice(s.held.values(), 1 + n):
            h = function(h)
        return h

    net = Net(walk).eval()
    net.held = {"a": torch.tanh, "b": HELD[name]}
    plan = sc.plan(net, FEW, granularity="channel", target={"sparsity": 0.5}, criterion={"name": "random"})
    differs_on_many(net, plan)
    assert [c for c in plan.conditions if MODULE in c.text and "held (dict)" in c.text]
    net.held.pop("b")
    plan = sc.plan(net, FEW, granularity="channel", target={"sparsity": 0.5}, criterion={"name": "random"})
    assert not [c for c in plan.conditions if MODULE in c.text]


def test_modules_are_named_once_and_only_where_they_could_mix_units() -> None:
    plan = sc.plan(Spare(), FEW, granularity="channel", target={"sparsity": 0.5})
    said = [c.text for c in plan.conditions if MODULE in c.text]
    assert said == ["holds where what was not called on the example stays so: spare.0 (Flip), spare.1 (Softmax)"]


class Spare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)
        self.spare = nn.Sequential(Flip(), nn.Softmax(1), nn.Dropout(), nn.ReLU(), nn.Identity())
        self.loss = nn.MSELoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))
