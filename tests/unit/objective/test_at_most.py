"""At most this loss: what is found keeps the limit where it was chosen, and what is said of the test part is true."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from pattern_problem import patterns
from torch import nn

import secateur as sc
from secateur.asking import Asked
from secateur.errors import RecipeError, TargetError
from secateur.measure.paired import Fall
from secateur.model.call import as_loss
from secateur.model.door import enter
from secateur.objective import at_most, evaluate
from secateur.objective.evaluate import Objective
from secateur.objective.limits import AtMost
from secateur.report import Report, plain_lines, render_html
from secateur.report.bound import Limit, Measured
from secateur.sources import TensorData

QUICK = {"measure": {"latency": False}, "verify": {"proof": "example"}}
RECIPE = {"target": {"sparsity": 0.5}, "recover": [{"method": "finetune", "steps": 4}], **QUICK}
CHOICE = TensorData(*patterns(300, 7), batch_size=100)


def right(model: nn.Module, data: TensorData) -> torch.Tensor:
    """Which samples a model gets right, counted here and not by the package."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(x).argmax(1) == y for x, y in data])


@pytest.mark.parametrize(
    ("granularity", "word"),
    [
        ("channel", "macs"),
        pytest.param("channel", "params", marks=pytest.mark.slow),
        ("element", "sparsity"),
        pytest.param("vector", None, marks=pytest.mark.slow),
    ],
)
def test_the_amount_that_is_found_keeps_the_limit(
    granularity: str, word: str | None, models: Sequence[nn.Module], train: TensorData, test: TensorData
) -> None:
    data = {"train": train, "calibration": CHOICE, "test": test}
    result = sc.prune(
        models[0], data=data, recipe={**RECIPE, "granularity": granularity}, max_drop=3.0, smallest=word, confidence=0.8
    )
    limit = result.report.limit
    kept = [one for one in limit.attempts if one.kept]
    lost = [one for one in limit.attempts if not one.kept]
    for one in kept:
        assert one.high <= 3.0
    for one in lost:
        assert one.drop is None or one.high > 3.0
    # The one that was chosen is the one of which most goes, and every step behind it was lost or not tried.
    best = max(kept, key=lambda one: one.removed)
    assert limit.amount in [one.amount for one in kept if one.removed == best.removed]
    assert limit.chosen.drop == best.drop
    assert all(one.removed >= best.removed or one.drop is None for one in lost)
    assert len(limit.attempts) <= 1 + at_most.LOOKS
    # Calibration data of their own: the run is the attempt, so its fall there is that of the attempt.
    before, after = right(models[0], CHOICE), right(result.model, CHOICE)
    assert limit.chosen.drop == pytest.approx(100 * float(before.float().mean() - after.float().mean()))
    before, after = right(models[0], test), right(result.model, test)
    assert limit.test.drop == pytest.approx(100 * float(before.float().mean() - after.float().mean()))
    assert limit.test.method.startswith(f"{int((before & ~after).sum())} samples lost")
    assert result.report.status == ("target_missed" if limit.test.drop > 3.0 else "ok")
    assert result.report.achieved["max_drop"] == limit.test.drop
    assert result.recipe.target.given() == {limit.smallest: limit.amount}
    # The criterion stands in the plan, although scores were handed on.
    assert result.plan.request.criterion.name == "magnitude"


@pytest.mark.slow
def test_amounts_nest(models: Sequence[nn.Module], train: TensorData, test: TensorData) -> None:
    data = {"train": train, "calibration": CHOICE, "test": test}
    gone = []
    for limit in (2.0, 20.0):
        found = sc.prune(models[1], data=data, recipe={**RECIPE, "granularity": "element"}, max_drop=limit).plan
        gone.append({name: ~mask for name, mask in found.masks.items()})
    less, more = gone
    assert sum(int(mask.sum()) for mask in more.values()) > sum(int(mask.sum()) for mask in less.values())
    assert all(bool((more[name] | ~less[name]).all()) for name in less)


def test_the_report_says_it_everywhere(models: Sequence[nn.Module], train: TensorData, test: TensorData) -> None:
    data = {"train": train, "calibration": CHOICE, "test": test}
    result = sc.prune(models[0], data=data, recipe=RECIPE, max_drop=5.0, confidence=0.8)
    read = Report.from_json(result.report.to_json())
    assert read.limit == result.report.limit
    text, page, explained = "\n".join(plain_lines(read)), render_html(read, charts=False), result.plan.explain()
    for said in (text, page, explained):
        assert "at most 5 points of accuracy" in said
        assert said.count("tried macs") == len(read.limit.attempts)
        assert f"lost {read.limit.test.drop:.2f} points" in said


def test_a_promise_that_the_test_part_breaks_is_said(models: Sequence[nn.Module], train: TensorData) -> None:
    clean, labels = patterns(400, 3)
    kind = [clean[labels == number].mean(0) for number in range(4)]
    # Chosen by samples without noise, which any ruin of the network gets right; tested on noisy ones.
    easy = TensorData(torch.stack(kind)[torch.arange(600) % 4], torch.arange(600) % 4, batch_size=100)
    data = {"train": train, "calibration": easy, "test": TensorData(*patterns(300, 4), batch_size=100)}
    result = sc.prune(models[0], data=data, recipe={**RECIPE, "recover": []}, max_drop=1.0)
    assert result.report.limit.verdict == "missed"
    assert (result.report.status, result.report.exit_code) == ("target_missed", 5)
    assert "max_drop 1.00 was asked" in plain_lines(result.report)[0]


def test_without_a_test_part_nothing_is_confirmed(models: Sequence[nn.Module], train: TensorData) -> None:
    result = sc.prune(models[0], data={"train": train, "calibration": CHOICE}, recipe=RECIPE, max_drop=5.0)
    assert result.report.limit.verdict == "unconfirmed"
    assert (result.report.status, result.report.exit_code) == ("degraded", 7)


def test_too_few_samples_to_promise_anything(models: Sequence[nn.Module], train: TensorData) -> None:
    few = TensorData(*patterns(40, 5), batch_size=40)
    with pytest.raises(TargetError, match="No macs is sure") as caught:
        sc.prune(models[0], data={"train": train, "calibration": few, "test": few}, recipe=RECIPE, max_drop=1.0)
    assert "268 or more" in caught.value.hint  # 1.645 ** 2 * 0.99 / 0.01, the quantile of 0.95


def test_a_loss_falls_in_percent(train: TensorData) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
    x = torch.randn(128, 4)
    y = x[:, :1] * 2 + 0.1 * torch.randn(128, 1)
    batches = list(zip(x.split(8), y.split(8), strict=True))
    data = {"train": batches[:4], "calibration": batches[4:], "test": batches[4:]}
    limit = sc.prune(
        net, data=data, recipe={**RECIPE, "recover": []}, max_drop=90.0, granularity="element"
    ).report.limit
    assert (limit.figure, limit.unit) == ("mse", "percent")
    assert limit.test.drop == pytest.approx(limit.chosen.drop)


@pytest.mark.slow
def test_a_figure_of_the_users_own_has_no_bounds(
    models: Sequence[nn.Module], train: TensorData, test: TensorData
) -> None:
    result = sc.prune(
        models[0], data={"train": train, "test": test}, recipe=RECIPE, max_drop=5.0,
        evaluate=lambda model: float(right(model, test).float().mean()),
    )  # fmt: skip
    limit = result.report.limit
    assert limit.chosen.high is None
    assert limit.verdict in ("held", "missed")


@pytest.mark.slow
def test_an_interrupted_search_does_no_attempt_twice(
    models: Sequence[nn.Module], train: TensorData, test: TensorData, tmp_path, monkeypatch
) -> None:
    data = {"train": train, "calibration": CHOICE, "test": test}
    given = {"data": data, "recipe": RECIPE, "max_drop": 5.0, "confidence": 0.8}
    whole, done = sc.prune(models[0], **given), []
    evaluate = Objective.evaluate

    def watched(self, recipe, **more):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(recipe.target.given())
        return evaluate(self, recipe, **more)

    monkeypatch.setattr(at_most.Objective, "evaluate", watched)
    with pytest.raises(KeyboardInterrupt):
        sc.prune(models[0], **given, checkpoint=tmp_path / "run")
    first = list(done)
    done.clear()

    def counted(self, recipe, **more):
        done.append(recipe.target.given())
        return evaluate(self, recipe, **more)

    monkeypatch.setattr(at_most.Objective, "evaluate", counted)
    again = sc.resume(tmp_path / "run", models[0], data=data)
    assert len(first) == 2
    assert done
    assert not any(one in first for one in done)
    plain = [report.limit.model_dump(exclude={"attempts"}) for report in (whole.report, again.report)]
    assert plain[0] == plain[1]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])


@pytest.mark.parametrize(
    ("drop", "high", "verdict"),
    [(0.5, 0.9, "sure"), (1.0, 1.0, "sure"), (0.5, 1.5, "held"), (0.5, None, "held"), (1.5, 2.0, "missed")],
)
def test_a_limit_is_sure_only_where_its_bound_keeps_it_too(
    drop: float, high: float | None, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = SimpleNamespace(read=lambda model: None, fall=lambda *_, confidence: Fall(drop, None, high))
    monkeypatch.setattr(at_most, "gauge_of", lambda *_: told)
    limit = Limit(
        max_drop=1.0, unit="points", figure="accuracy", smallest="macs", confidence=0.95, amount=0.5, chosen_by="them",
        chosen=Measured(drop=0.0, low=None, high=None, method="told"), attempts=(),
    )  # fmt: skip
    asked = SimpleNamespace(given=SimpleNamespace(test=[1]), model=None, evaluate=None, loss=None)
    assert at_most.confirmed(limit, asked, nn.Identity()).verdict == verdict  # type: ignore[arg-type]


def objective_of(model: nn.Module, train: TensorData) -> Objective:
    given, recipe = enter({"train": train, "calibration": CHOICE}), sc.load_recipe(RECIPE)
    return Objective(Asked(model, given.example(), (), given, recipe, None, {}, as_loss(None), None, None, "", ""))


def test_every_criterion_has_an_order_of_its_own(models: Sequence[nn.Module], train: TensorData) -> None:
    objective = objective_of(models[0], train)
    for criterion in ("magnitude", "random", "magnitude"):
        asked = {"criterion": criterion, "target": {"sparsity": 0.4}}
        found = objective.plan(sc.load_recipe({**RECIPE, **asked})).groups
        wanted = sc.plan(models[0], next(iter(CHOICE))[0], proof="example", **asked).groups
        assert {name: one["removed"] for name, one in found.items()} == {
            name: one["removed"] for name, one in wanted.items()
        }


def test_a_trial_recovers_with_the_seed_of_its_recipe(
    models: Sequence[nn.Module], train: TensorData, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = []
    monkeypatch.setattr(evaluate, "run_step", lambda *_, seed, **__: seeds.append(seed))
    objective_of(models[0], train).evaluate(sc.load_recipe({**RECIPE, "seed": 5}))
    assert seeds == [5]


class Ask(Exception):
    """What a search wants to know next."""


@pytest.mark.parametrize("power", [1.0, 0.7, 0.0])
def test_a_promise_is_wrong_no_more_often_than_was_said(power: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ways that a search can go, with the chance of each.

    Up to a step all amounts keep the limit, and a bound says so with this chance; of those behind it a bound is wrong
    as often as its confidence allows, each by itself.
    """
    search = object.__new__(at_most.Bisection)
    search.wanted = AtMost(1.0, confidence=0.95)
    monkeypatch.setattr(at_most.Bisection, "amount", lambda self, step: step)
    monkeypatch.setattr(at_most.Bisection, "at", lambda self, step: step)
    monkeypatch.setattr(at_most.Bisection, "_limit", lambda self, tried, best: None)
    monkeypatch.setattr(at_most.Bisection, "_none", lambda self, tried: TargetError("none"))

    def wrong(last: int, answers: tuple[bool, ...]) -> float:
        left = list(answers)

        def once(name: str, work: partial[object]) -> dict[str, object]:
            if not left:
                raise Ask(*work.args)
            return {"amount": work.args[0], "kept": left.pop(0)}

        try:
            return float(search.find(once)[0] > last)  # type: ignore[arg-type, operator]
        except TargetError:
            return 0.0
        except Ask as asked:
            step, confidence = asked.args
            kept = power if step <= last else 1 - confidence
            chances = {True: kept, False: 1 - kept}
            return sum(chance * wrong(last, (*answers, yes)) for yes, chance in chances.items() if chance)

    # Where all of them lose too much nothing is given away either.
    assert max(wrong(last, ()) for last in range(at_most.STEPS)) == pytest.approx(0.05, abs=1e-12)


def test_several_looks_share_one_confidence() -> None:
    wanted = AtMost(1.0, confidence=0.94)
    assert 6 * (1 - wanted.each(6)) == pytest.approx(1 - 0.94)
    assert AtMost(1.0, confidence=0.5).each(6) == 0.5, "figures alone"
    assert 2**at_most.LOOKS == at_most.STEPS


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"max_drop": 1.0, "target": {"macs": 0.5}}, "both say how much goes"),
        ({"max_drop": 1.0, "granularity": "2:4"}, "fixes how much goes"),
        ({"max_drop": 1.0, "granularity": "element", "smallest": "macs"}, "leave macs as it is"),
        ({"max_drop": 1.0, "masks": {"conv1.weight": torch.ones(8, 1, 3, 3, dtype=torch.bool)}}, "exactly what goes"),
        ({"max_drop": 1.0, "recipe": "gradual-90"}, "amount of its own"),
        ({"max_drop": 1.0, "smallest": "flops"}, "not known"),
        ({"max_drop": 1.0, "confidence": 95}, r"not in \[0.5, 1\)"),
        ({"max_drop": 0}, "above 0"),
        ({"max_drop": -1.0}, "above 0"),
        ({"max_drop": float("nan")}, "above 0"),
        ({"max_drop": True}, "above 0"),
        ({"max_drop": "1"}, "above 0"),
        ({"smallest": "macs"}, "belong to max_drop"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    more: dict[str, object], words: str, models: Sequence[nn.Module], train: TensorData
) -> None:
    with pytest.raises(RecipeError, match=words):
        sc.prune(models[0], data=train, **{"recipe": RECIPE, **more})
