"""A proof made anew names what it depends on itself: on another input or model the code takes other branches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.planning.plan import Plan

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
READ = "of which values are read"  # how a branch on the data is named


class Net(nn.Module):
    """Where the gate is open, large inputs go another way, on which a removed unit would still count."""

    def __init__(self, gate: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.gate = nn.Linear(8, 20), nn.Linear(20, 4), gate

    def forward(self, x: Tensor, mode: str = "a") -> Tensor:
        h = self.a(x).relu()
        if (self.gate or mode == "b") and float(x.abs().max()) > 50:
            h = h * (1 + (h.shape[-1] - 20) / 20)
        return self.b(h)


def made(**options: object) -> tuple[nn.Module, Plan]:
    model = Net().eval()
    given = {} if options else {"example": X}
    return model, sc.plan(model, **given, **options, remove={"a": [1, 4, 9]})  # type: ignore[arg-type]


def said(plan: Plan) -> str:
    return "\n".join(condition.text for condition in plan.conditions)


def on_another_input(model: nn.Module, plan: Plan, tmp_path: Path) -> Plan:
    plan.apply(model, example=(X, "b"))
    return plan


def on_another_model(model: nn.Module, plan: Plan, tmp_path: Path) -> Plan:
    plan.apply(Net(gate=True).eval())
    return plan


def by_prove(model: nn.Module, plan: Plan, tmp_path: Path) -> Plan:
    plan.prove(model, (X, "b"))
    return plan


def from_a_file(model: nn.Module, plan: Plan, tmp_path: Path) -> Plan:
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    loaded.apply(copy.deepcopy(model), example=(X, "b"))
    return loaded


def composed(model: nn.Module, plan: Plan, tmp_path: Path) -> Plan:
    between = plan.apply(model, example=(X, "b"))
    return plan.then(sc.plan(between, X, remove={"a": [0]}), model)


def saved_again(model: nn.Module, plan: Plan, tmp_path: Path) -> Plan:
    on_another_input(model, plan, tmp_path).save(tmp_path / "plan.json")
    return Plan.load(tmp_path / "plan.json")


WAYS = [on_another_input, on_another_model, by_prove, from_a_file, composed, saved_again]


@pytest.mark.parametrize("way", WAYS)
def test_the_branch_of_this_proof_is_named(way: Callable[[nn.Module, Plan, Path], Plan], tmp_path: Path) -> None:
    model, plan = made()
    assert READ not in said(plan)
    assert READ in said(way(model, plan, tmp_path))


def test_what_this_proof_did_not_see_is_no_longer_claimed() -> None:
    model, plan = made()
    assert "mode='a'" in said(plan)
    plan.prove(model, (X, "b"))
    assert "mode='b'" in said(plan)
    assert "mode='a'" not in said(plan)


def test_conditions_come_back_with_the_proof_on_the_first_model() -> None:
    model, plan = made()
    before = plan.conditions
    plan.apply(Net(gate=True).eval())
    assert plan.conditions != before
    plan.apply(model)
    assert plan.conditions == before


def test_a_fresh_plan_and_a_proof_anew_agree() -> None:
    _, plan = made()
    other = Net(gate=True).eval()
    plan.apply(other)
    assert set(plan.conditions) == set(sc.plan(other, X, remove={"a": [1, 4, 9]}).conditions)


def test_another_model_is_proved_on_all_examples() -> None:
    """The second example takes the branch of large inputs, on the other model alone: no cut is right there."""
    _, plan = made(examples=[X, X * 100])
    with pytest.raises(sc.SecateurError):
        plan.apply(Net(gate=True).eval())
