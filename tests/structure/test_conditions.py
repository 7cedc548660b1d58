"""What a run depended on is said, with its line; the other side is looked at; several examples hold together."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from independent import holds, left, locked, zeroed
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.structure.capture import MAX_BRANCHES, capture
from secateur.types import Condition


class Net(nn.Module):
    """`mid` is what a case does to the hidden state."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.fc1, self.fc2, self.aux = nn.Linear(8, width), nn.Linear(width, 4), nn.Linear(width, 4)

    def mid(self, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.mid(F.relu(self.fc1(x))))


class Training(Net):
    def mid(self, h: Tensor) -> Tensor:
        return h.roll(1, -1) if self.training else h


class TrainingByMode(Net):
    """The flag travels as an argument."""

    def apply_in(self, h: Tensor, mode: str) -> Tensor:
        return h.flip(-1) if mode == "train" else h

    def mid(self, h: Tensor) -> Tensor:
        return self.apply_in(h, "train" if self.training else "test")


class NotTraining(Net):
    def mid(self, h: Tensor) -> Tensor:
        if not self.training:
            return h
        return h * torch.arange(h.shape[-1])


class Long(Net):
    def mid(self, h: Tensor) -> Tensor:
        return h.flip(-1) if h.shape[1] > 16 else h


class LongLoop(Net):
    def mid(self, h: Tensor) -> Tensor:
        while h.shape[1] >= 10:
            h = h[:, ::2].cumsum(-1)
        return h


class LongByRemainder(Net):
    def mid(self, h: Tensor) -> Tensor:
        return h.flip(-1) if h.size(1) % 2 else h


class LongByConditional(Net):
    def mid(self, h: Tensor) -> Tensor:
        return (h, h.sort(-1).values)[int(max(h.shape[1], 9) != 9)] if h.shape[1] < 99 else h.cumsum(-1)


class Single(Net):
    def mid(self, h: Tensor) -> Tensor:
        return h.flip(-1) if len(h.shape) == 3 and h.shape[0] == 1 else h


class Loud(Net):
    def mid(self, h: Tensor) -> Tensor:
        return h.flip(-1) if h.norm() > 1e3 else h


class LoudInside(Net):
    """A module of its own, called with what decides."""

    class Gate(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            if (h > 1e3).any():
                return h.roll(2, -1)
            return h

    def __init__(self) -> None:
        super().__init__()
        self.gate = self.Gate()

    def mid(self, h: Tensor) -> Tensor:
        return self.gate(h)


BRANCHES = [
    (Training, "eval mode"), (TrainingByMode, "eval mode"), (NotTraining, "eval mode"),
    (Long, "dimension 1 of input <= 16 (here 5)"), (LongLoop, "dimension 1 of input < 10"),
    (LongByRemainder, "dimension 1 of input % 2 != 0"), (LongByConditional, "dimension 1 of input < 99"),
    (Single, "dimension 0 of input != 1"), (Loud, "this value of the data is False"),
    (LoudInside, "this value of the data is False"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), BRANCHES, ids=[kind.__name__ for kind, _ in BRANCHES])
def test_the_other_branch_constrains_and_is_named(kind: type[Net], text: str) -> None:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(2, 5, 8)
    conditions = [str(c) for c in capture(model, x).conditions]
    assert any(text in c and "test_conditions.py:" in c for c in conditions), conditions
    assert any(reasons for name, reasons in locked(model, x).items() if name.startswith("fc1")), "nothing was seen"
    others = [torch.randn(1, 5, 8), torch.randn(2, 4, 8), torch.randn(3, 21, 8), torch.randn(2, 5, 8) * 1e4]
    assert holds(model, x, others, train=True) is None


class Aux(Net):
    """A head that only training reaches."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.fc1(x))
        if self.training:
            return self.fc2(h) + 0.3 * self.aux(h)
        return self.fc2(h)


class AuxOfLong(Net):
    """A head that only long sequences reach."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.fc1(x))
        return self.fc2(h) + self.aux(h) if x.shape[1] > 8 else self.fc2(h)


class AuxBySwitch(Net):
    def forward(self, x: Tensor, more: bool = False) -> Tensor:
        h = F.relu(self.fc1(x))
        return self.fc2(h) + self.aux(h) if more else self.fc2(h)


@pytest.mark.parametrize("kind", [Aux, AuxOfLong, AuxBySwitch])
def test_what_only_another_branch_reaches_is_cut_along(kind: type[Net]) -> None:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(2, 5, 8)
    others: list[Any] = [torch.randn(2, 12, 8), *([(x, True)] if kind is AuxBySwitch else [])]
    plan = holds(model, x, others, train=True)
    assert plan is not None
    assert 1 in plan.cuts["aux.weight"]
    assert left(model, plan) < 0.7


class Fails(Aux):
    """Training needs what an example does not hold."""

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        h = F.relu(self.fc1(x))
        if self.training:
            print("training")
            return self.fc2(h) - target + self.aux(h)
        return self.fc2(h)


def test_a_branch_that_does_not_run_to_its_end_is_said_and_its_parameters_are_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = Fails().eval()
    conditions = [c.text for c in capture(model, torch.randn(2, 8)).conditions]
    assert any("up to its TypeError" in text for text in conditions)
    assert any("never reached" in text and "aux.weight" in text for text in conditions)
    assert any("defaults for target" in text for text in conditions)
    assert capsys.readouterr().out == ""
    plan = holds(model, torch.randn(2, 8))
    assert plan is not None
    assert "aux.weight" not in plan.cuts


class Rates(Net):
    """Train mode changes numbers only."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(F.relu(self.fc1(x)), 0.1, self.training)
        h = F.dropout(h, p=0.2 if self.training else 0.0, training=self.training)
        return self.fc2(F.alpha_dropout(h, 0.1, training=self.training))


class HandsOn(Training):
    """Torch's own function takes a plain bool only."""

    def mid(self, h: Tensor) -> Tensor:
        return super().mid(torch.dropout(h, 0.1, self.training))


def test_a_mode_that_is_handed_on_unseen_is_looked_at_all_the_same() -> None:
    model, x = HandsOn().eval(), torch.randn(2, 8)
    trace = capture(model, x)
    assert len(trace.beside) == 1
    assert any("hands on" in c.text for c in trace.conditions)
    assert any("rolled" in reason for reason in locked(model, x)["fc1"])
    assert type(model.training) is bool


def test_numbers_that_the_mode_chooses_are_no_branch() -> None:
    trace = capture(Rates().eval(), torch.randn(2, 8))
    assert trace.beside == []
    assert not any("mode" in c.text for c in trace.conditions)


def test_a_plain_model_has_no_conditions_and_runs_once() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    model(torch.randn(2, 3, 8, 8))
    trace = capture(model.eval(), torch.randn(2, 3, 8, 8))
    assert trace.conditions == []
    assert trace.beside == []


class Many(Net):
    def mid(self, h: Tensor) -> Tensor:
        n = h.shape[1]
        a = 1.0 if n > 20 else 2.0
        b = 1.0 if n > 21 else 2.0
        c = 1.0 if n > 22 else 2.0
        d = 1.0 if n > 23 else 2.0
        e = 1.0 if n > 24 else 2.0
        f = 1.0 if n > 25 else 2.0
        return h * (a + b + c + d + e + f)


def test_the_number_of_further_runs_is_bounded_and_what_was_not_seen_is_said() -> None:
    trace = capture(Many().eval(), torch.randn(2, 5, 8))
    assert len(trace.beside) == MAX_BRANCHES
    texts = [c.text for c in trace.conditions if "of input" in c.text]
    assert len(texts) == 6
    assert sum("was not seen" in text for text in texts) == 6 - MAX_BRANCHES


class Stateful(Net):
    """Counts its runs, in an attribute and in a buffer; training has a norm that writes statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.runs, self.seen = 0, []
        self.register_buffer("count", torch.zeros(()))
        self.norm = nn.BatchNorm1d(32)

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        self.seen.append(x.shape[0])
        self.count += 1
        h = self.norm(self.fc1(x))
        return self.fc2(h + torch.rand(32) if self.training else h)


def test_runs_beside_leave_nothing_behind() -> None:
    model, x = Stateful().eval(), torch.randn(6, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    trace = capture(model, x)
    assert len(trace.beside) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert (model.runs, model.seen, model.training, type(model.training)) == (0, [], False, bool)


# -- rows, one by one ----------------------------------------------------------------------------------------------


def in_a_loop(x: Tensor, h: Tensor) -> Tensor:
    return torch.stack([row * 2 for row in h])


def in_a_star(x: Tensor, h: Tensor) -> Tensor:
    first, *rest = h
    return torch.stack([first, *rest])


def beside_others(x: Tensor, h: Tensor) -> Tensor:
    return torch.stack([a + b.sum() for a, b in zip(h, x, strict=True)])


def in_names(x: Tensor, h: Tensor) -> Tensor:
    a, b, c, d = h
    return torch.stack([a, b, c, d])


def of_no_input(x: Tensor, h: Tensor) -> Tensor:
    return sum(torch.stack([h, h, h]), torch.zeros(()))


@pytest.mark.parametrize(
    ("mid", "looped"), [(in_a_loop, 1), (in_a_star, 1), (beside_others, 1), (in_names, 0), (of_no_input, 0)]
)
def test_a_loop_over_rows_is_said_as_what_it_is(mid: Callable[[Tensor, Tensor], Tensor], looped: int) -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(mid(x, self.fc1(x)))

    found = [c.text for c in capture(Rows().eval(), torch.randn(4, 8)).conditions]
    assert found == ["holds for 4 rows, over which the code loops"] * looped


# -- where conditions stand --------------------------------------------------------------------------------------


def test_conditions_stand_in_plan_file_words_view_and_report(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = AuxOfLong().eval(), torch.randn(2, 5, 8)
    result = sc.prune(model, x, target={"sparsity": 0.3}, scope="local")
    plan = result.plan
    assert len(plan.conditions) == 1, [str(c) for c in plan.conditions]
    (condition,) = plan.conditions
    assert condition.text.startswith("holds for dimension 1 of input <= 8 (here 5)")
    assert condition.where.startswith("structure/test_conditions.py:")
    assert str(condition) in plan.explain()
    plan.save(tmp_path / "plan.json")
    assert sc.Plan.load(tmp_path / "plan.json").conditions == plan.conditions
    assert str(condition) in sc.Plan.load(tmp_path / "plan.json").explain()
    assert result.report.conditions == plan.conditions
    assert json.loads(result.report.to_json())["conditions"] == [dataclasses.asdict(condition)]
    view = sc.inspect(model, x)
    assert view.conditions == plan.conditions
    assert str(condition) in str(view)
    assert view.to_dict()["conditions"] == [dataclasses.asdict(condition)]


def test_plans_without_conditions_and_with_damaged_ones_are_refused() -> None:
    data = json.loads(_plan(AuxOfLong()).to_json())
    assert sc.Plan.from_data(data).conditions
    with pytest.raises(sc.errors.FileRefusedError, match="conditions"):
        sc.Plan.from_data({key: value for key, value in data.items() if key != "conditions"})
    for damage in ([{"text": 1, "where": "", "module": ""}], [{"text": "x"}], ["x"], 5):
        with pytest.raises(sc.errors.FileRefusedError):
            sc.Plan.from_data({**data, "conditions": damage})


def test_composed_plans_hold_under_the_conditions_of_both() -> None:
    torch.manual_seed(0)
    model, x = AuxOfLong().eval(), torch.randn(2, 5, 8)
    first = sc.plan(model, x, target={"sparsity": 0.2})
    middle = first.apply(model)
    second = dataclasses.replace(
        sc.plan(middle, x, target={"sparsity": 0.2}), conditions=(Condition("holds for more", "net.py:1"),)
    )
    both = first.then(second, model)
    assert both.conditions == (*first.conditions, *second.conditions)


def _plan(model: nn.Module) -> sc.Plan:
    torch.manual_seed(0)
    return sc.plan(model.eval(), torch.randn(2, 5, 8), target={"sparsity": 0.3}, scope="local")


# -- several examples ----------------------------------------------------------------------------------------------


class Modes(nn.Module):
    """Three ways through, by a word that no example but its own shows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 24) for _ in range(3))
        self.out = nn.Linear(24, 4)

    def forward(self, x: Tensor, how: str = "a") -> Tensor:
        h = F.relu({"a": self.a, "b": self.b, "c": self.c}[how](x))
        return self.out(h.flip(1) if how == "c" else h)


def test_examples_reach_what_one_does_not_and_all_are_proved() -> None:
    torch.manual_seed(0)
    model, x = Modes().eval(), torch.randn(3, 8)
    alone = holds(model, x)
    assert alone is not None
    assert any("defaults for how" in c.text for c in alone.conditions)
    assert any("never reached" in c.text and "b.weight" in c.text for c in alone.conditions)
    both = [x, (torch.randn(2, 8), "b")]
    plan = holds(model, None, both, examples=both)
    assert plan is not None
    assert {"a.weight", "b.weight"} <= set(plan.cuts)
    assert torch.equal(plan.cuts["a.weight"][0], plan.cuts["b.weight"][0])
    assert holds(model, x, both, examples=both[1:], dtype="float64", tolerance=1e-6) is not None


def test_what_one_example_needs_is_locked_for_all() -> None:
    model, x = Modes().eval(), torch.randn(3, 8)
    examples = [x, (x, "b"), (x, "c")]
    assert any("rolled or flipped" in r for r in locked(model, None, examples=examples)["a"])
    assert holds(model, None, examples, examples=examples) is None


def test_the_certificate_is_that_of_the_worst_example(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Modes().eval(), torch.randn(3, 8)
    plan = sc.plan(model, examples=[x, (x, "b")], target={"sparsity": 0.3})
    cut = plan.apply(model)
    with torch.no_grad():  # a cut that is right on the first example only
        cut.b.bias.add_(1.0)
    assert plan.evidence is not None
    assert plan.evidence.certify is not None
    with pytest.raises(sc.errors.CertificateError):
        plan.evidence.certify(model, cut)


def test_examples_of_different_lengths_in_prune() -> None:
    torch.manual_seed(0)
    model, short, long = AuxOfLong().eval(), torch.randn(2, 5, 8), torch.randn(2, 11, 8)
    result = sc.prune(model, target={"sparsity": 0.3}, examples=[short, long])
    reference = zeroed(model, result.plan)
    for x in (short, long):
        torch.testing.assert_close(result.model.eval()(x), reference(x))
    texts = [c.text for c in result.plan.conditions]
    assert not any("never reached" in text for text in texts)


class Emptiness(Net):
    """As a cache asks whether it holds anything."""

    def __init__(self, asks: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.asks = asks

    def mid(self, h: Tensor) -> Tensor:
        return h if self.asks(h) else 2 * h


@pytest.mark.parametrize(
    ("asks", "free"),
    [
        (lambda h: h.numel() > 0, True),
        (lambda h: h.numel() != 0, True),
        (lambda h: h.shape[0] * h.shape[-1] != 0, True),
        (lambda h: h.numel() > 40, False),
        (lambda h: h.shape[0] - h.shape[-1] != 0, False),
        (lambda h: h.shape[-1] // h.shape[0] > 0, False),
    ],
    ids=["more than none", "none", "product", "more than some", "difference", "quotient"],
)
def test_whether_there_is_anything_is_no_question_of_the_width(asks: Callable[[Tensor], bool], free: bool) -> None:
    model, x = Emptiness(asks).eval(), torch.randn(3, 8)
    assert ("fc1" not in locked(model, x)) is free
    if free:
        assert holds(model, x, [torch.randn(1, 8), torch.randn(40, 8)])
