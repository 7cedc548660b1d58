"""What stands around a plan and its use: nothing is left changed, and what changed meanwhile is noticed."""

from __future__ import annotations

import random
import warnings
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import secateur as sc
from secateur.errors import SecateurError

from .references import Kept, zeroed
from .usages import (
    RANDOM,
    Convnet,
    Former,
    Mlp,
    applied,
    data,
    equal,
    planned,
    seeded,
    steps,
)


def test_nothing_around_the_call_changes() -> None:
    """Generators, modes, gradients, hooks, defaults: all as they were, after a cut as after a refusal."""
    # What is imported at first use adds filters of its own.
    sc.estimate(seeded(Mlp), data(5, 8), target={"sparsity": 0.3})
    model, x = seeded(Convnet), data(2, 3, 8, 8)
    model.train()
    model(x).sum().backward()
    model.a.weight.requires_grad_(False)
    model.bn.eval()
    x.requires_grad_()

    def around() -> Any:
        return (
            torch.get_rng_state().tolist(),
            random.getstate(),
            numpy.random.get_state()[1].tolist(),  # noqa: NPY002 - the global state is what is asked about
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.mha.get_fastpath_enabled(),
            [m.training for m in model.modules()],
            [p.requires_grad for p in model.parameters()],
            [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
            [b.tolist() for b in model.buffers()],
            [p._version for p in model.parameters()],
            [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
            x._version,
            x.grad,
            x.requires_grad,
            __import__("sys").getrecursionlimit(),
            len(warnings.filters),
            [sorted(vars(m)) for m in model.modules()],
        )

    before = around()
    plan = planned(model, x)
    cut = applied(plan, model)
    assert around() == before
    assert [m.training for m in cut.modules()] == [m.training for m in model.modules()]
    assert [p.requires_grad for p in cut.parameters()] == [p.requires_grad for p in model.parameters()]
    with pytest.raises(SecateurError):
        sc.plan(model, x, granularity="channel", target={"macs": 1e-9})
    sc.score(model, x, granularity="channel")
    sc.inspect(model, x)
    sc.estimate(model, x, target={"macs": 0.5})
    assert around() == before


class HoldsGenerators(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.generator, self.chance, self.array = torch.Generator(), random.Random(1), numpy.random.default_rng(1)
        self.numbers = iter(range(1000))
        self.log: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(float(x.sum()))
        h = self.fc1(x).relu() + 0 * torch.randn(1, generator=self.generator)
        return self.fc3(self.fc2(h + 0 * self.chance.random()).relu())


def test_generators_of_the_model_stay() -> None:
    model, x = seeded(HoldsGenerators), data(5, 8)

    def state() -> Any:
        return (
            model.generator.get_state().tolist(),
            model.chance.getstate(),
            str(model.array.bit_generator.state),
            model.numbers.__reduce__(),
            list(model.log),
        )

    before = state()
    try:
        plan = sc.plan(model, x, **RANDOM)
        plan.apply(model)
    except SecateurError:
        pass
    assert state() == before


def test_the_example_is_used_again_by_its_owner() -> None:
    """A loader's buffer is overwritten between plan and apply."""
    model, x = seeded(Mlp), data(5, 8)
    plan = planned(model, x)
    x.zero_()
    cut = applied(plan, model)
    equal(zeroed(model, Kept(model, plan))(data(7, 8)), cut(data(7, 8)))


class Switch(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.flipped = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x).relu()
        if self.flipped:
            h = h.flip(-1)
        return self.fc3(self.fc2(h).relu())


@pytest.mark.parametrize("where", ["before apply", "after apply"])
def test_a_switch_is_turned(where: str) -> None:
    """Between plan and apply it has to be noticed; afterwards something has to have been said."""
    model, x = seeded(Switch), data(5, 8)
    plan = planned(model, x, remove={"fc1": [0, 1, 5]})
    if where == "before apply":
        model.flipped = True
    cut = applied(plan, model)
    truth = zeroed(model, Kept(model, plan))
    truth.flipped = cut.flipped = True
    try:
        equal(truth(data(7, 8)), cut(data(7, 8)))
    except Exception:
        if where == "before apply" or "flipped" not in plan.explain():
            raise


def test_trained_between_plan_and_apply() -> None:
    model, x = seeded(Former), data(2, 6, 8)
    plan = planned(model, x, granularity="head_dim")
    steps(model, torch.optim.SGD(model.parameters(), lr=0.01), x)
    cut = applied(plan, model)
    equal(zeroed(model, Kept(model, plan))(data(3, 9, 8)), cut(data(3, 9, 8)))


class HeadsElsewhere(Former):
    """Another number of heads under the same shapes, in a place that no integer attribute shows."""

    def __init__(self, heads: int) -> None:
        super().__init__(4)
        for block in self.blocks:
            block.heads = Number(heads)  # type: ignore[assignment]


class Number(int):
    """An integer of a class of its own."""


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("kind", ["head", "head_dim"])
def test_plan_for_other_heads_of_the_same_shapes(kind: str, loaded: bool) -> None:
    plan = planned(seeded(lambda: HeadsElsewhere(4)), data(2, 6, 8), granularity=kind)
    if loaded:
        plan.certify()
        plan = sc.Plan.from_data(__import__("json").loads(plan.to_json()))
    other = seeded(lambda: HeadsElsewhere(8))
    cut = applied(plan, other, example=data(2, 6, 8))
    equal(zeroed(other, Kept(other, plan))(data(3, 9, 8)), cut(data(3, 9, 8)))
