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


def switched(model: nn.Module) -> None:
    model.gate = True  # type: ignore[assignment]


def hooked(model: nn.Module) -> None:
    model.a.register_forward_hook(lambda module, given, out: out * 2 if float(out.max()) > 50 else out)


def listed(model: nn.Module) -> None:
    model.steps.append(lambda h: h * 2 if float(h.max()) > 50 else h)


def replaced(model: nn.Module) -> None:
    model.last = Last()


class Last(nn.Identity):
    def forward(self, h: Tensor) -> Tensor:
        return h * 2 if float(h.abs().max()) > 500 else h


class Settable(Net):
    """What a user sets on a model between plan and apply."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Callable[[Tensor], Tensor]] = []
        self.last = nn.Identity()

    def forward(self, x: Tensor, mode: str = "a") -> Tensor:
        h = super().forward(x, mode)
        for step in self.steps:
            h = step(h)
        return self.last(h)


@pytest.mark.parametrize("change", [switched, hooked, listed, replaced])
def test_a_model_that_was_set_otherwise_is_another_one(change: Callable[[nn.Module], None]) -> None:
    """Only the new setting looks at the data: the run that the plan was learned from did not see that line."""
    model = Settable().eval()
    plan = sc.plan(model, X, remove={"a": [1, 4, 9]})
    assert READ not in said(plan)
    change(model)
    plan.apply(model)
    assert READ in said(plan)
    assert "numbers made from widths were not followed" not in plan.explain()


def test_a_model_that_ran_and_learned_meanwhile_is_not_captured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(8, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Dropout(0.1), nn.LSTM(20, 12)).eval()
    plan = sc.plan(model, X, remove={"0": [1, 4]})
    model.train()(X)[0].square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the engine ran again")

    monkeypatch.setattr("secateur.planning.plan.prove_anew", never)
    plan.apply(model)
    plan.apply(model.eval(), inplace=True)
    assert plan.certificate is not None
