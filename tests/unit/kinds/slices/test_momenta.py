"""The state of an optimizer follows a cut in place, or the cut is refused and nothing has changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.errors import UnsupportedError

GONE = [1, 5, 6]


def net(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(widths[0], widths[1]), nn.ReLU(), nn.Linear(widths[1], widths[2])).eval()


def numbered(*shape: int) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


def optimizer_with(model: nn.Module, make: Callable[[Tensor], Any]) -> torch.optim.Optimizer:
    """An optimizer whose state is as given, beside a count of steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for p in model.parameters():
        optimizer.state[p].update({"step": torch.tensor(3.0), "count": 3, "made": make(p.detach())})
    return optimizer


def cut(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    example = torch.randn(3, model[0].in_features)
    sc.plan(model, example, remove={"0": GONE}, granularity="channel").apply(model, inplace=True, optimizer=optimizer)


FOLLOW: dict[str, Callable[[Tensor], Any]] = {
    "alike": lambda p: numbered(*p.shape),
    "in a list": lambda p: [numbered(*p.shape), None],
    "in a tuple": lambda p: (numbered(*p.shape), 7),
    "in a mapping": lambda p: {"m": {"deep": numbered(*p.shape)}},
    "rows": lambda p: numbered(p.shape[0], *[1] * (p.dim() - 1)),
    "columns": lambda p: numbered(*[1] * (p.dim() - 1), p.shape[-1]),
    "one number": lambda p: torch.ones(1),
}


def first(value: Any) -> Tensor:
    while not isinstance(value, Tensor):
        value = next(iter(value.values())) if isinstance(value, dict) else value[0]
    return value


@pytest.mark.parametrize("name", FOLLOW)
def test_state_of_the_form_of_its_weight_follows(name: str) -> None:
    model = net(6, 9, 4)
    optimizer = optimizer_with(model, FOLLOW[name])
    before, stays = copy.deepcopy(optimizer.state_dict()["state"]), [i for i in range(9) if i not in GONE]
    cut(model, optimizer)
    for number, (p, dim) in enumerate(zip(model.parameters(), (0, 0, 1, None), strict=True)):
        state = optimizer.state[p]
        old = first(before[number]["made"])
        wanted = (
            old
            if dim is None or old.dim() <= dim or old.shape[dim] != 9
            else old.index_select(dim, torch.tensor(stays))
        )
        assert torch.equal(first(state["made"]), wanted)
        assert type(state["made"]) is type(before[number]["made"])
        assert (float(state["step"]), state["count"]) == (3.0, 3)


STUCK: dict[str, Callable[[Tensor], Any]] = {
    "flat": lambda p: torch.zeros(p.numel() + (p.dim() == 1)),
    "turned": lambda p: torch.zeros(p.shape[::-1]) if p.dim() == 2 else torch.zeros(p.shape),
    "rows without a dimension": lambda p: torch.zeros(p.shape[0]),
    "a shape": lambda p: tuple(p.shape),
    "deep": lambda p: {"m": [torch.zeros(p.numel() + 1)]},
}


@pytest.mark.parametrize("name", STUCK)
def test_state_of_another_form_is_refused_before_anything_changes(name: str) -> None:
    model = net(6, 9, 4)
    optimizer = optimizer_with(model, STUCK[name])
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(UnsupportedError, match=r"state of SGD cannot follow[\s\S]*'made' of[\s\S]*state.clear"):
        cut(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(weights.values(), model.state_dict().values(), strict=True))
    assert str(state) == str(optimizer.state_dict())


def test_turned_state_of_a_square_weight_is_known_by_that_of_others() -> None:
    model = net(9, 9, 4)
    optimizer = optimizer_with(model, STUCK["turned"])
    assert optimizer.state[model[0].weight]["made"].shape == model[0].weight.shape
    with pytest.raises(UnsupportedError, match="cannot follow"):
        cut(model, optimizer)


@pytest.mark.parametrize("clear", [False, True])
def test_a_history_of_all_weights_in_one(clear: bool) -> None:
    """LBFGS keeps it at its first parameter, which need not be one that is cut."""
    model = nn.Sequential(nn.Linear(6, 6), *net(6, 9, 4)).eval()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)
    x = torch.randn(3, 6)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = model(x).square().mean()
        value.backward()
        return value

    optimizer.step(loss)
    plan = sc.plan(model, x, remove={"1": GONE}, granularity="channel")
    assert "0.weight" not in plan.cuts
    if not clear:
        with pytest.raises(UnsupportedError, match="state of LBFGS cannot follow"):
            plan.apply(model, inplace=True, optimizer=optimizer)
        return
    optimizer.state.clear()
    plan.apply(model, inplace=True, optimizer=optimizer)
    assert model[1].out_features == 6


def test_without_state_nothing_is_refused() -> None:
    model = net(6, 9, 4)
    cut(model, torch.optim.LBFGS(model.parameters()))
    assert model[0].out_features == 6
