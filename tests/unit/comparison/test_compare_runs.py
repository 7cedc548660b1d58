"""Whole comparisons on a tiny problem: exact, paired, resumable, and honest about what cannot be told."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from secateur.comparison import Comparison, Protocol, compare, seed_run
from secateur.criteria import Context, Criterion, Magnitude
from secateur.errors import InputError, RecipeError
from secateur.measure import accuracy_on
from secateur.planning import make_plan
from secateur.sources import TensorData
from secateur.testing.scenes import tiny_scene

RECOVER = ({"method": "bn_refresh", "batches": 4}, {"method": "finetune", "steps": 6})


def kept_mass(model: nn.Module) -> float:
    """An exact truth: magnitude keeps the most of it that any choice can, its inverse the least."""
    return float(sum(p.detach().abs().sum() for p in model.parameters()))


@pytest.fixture(scope="module")
def elements(models: list[nn.Module], train: TensorData, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    out = tmp_path_factory.mktemp("elements")
    twin = {"name": "magnitude", "norm": "l1"}  # of a single weight every norm is the same
    return compare(
        models, train, criteria=[twin], evaluate=kept_mass, out=out, granularity="element", calibration_batches=2
    )


@pytest.fixture(scope="module")
def channels(
    models: list[nn.Module], train: TensorData, test: TensorData, tmp_path_factory: pytest.TempPathFactory
) -> Comparison:
    return compare(
        models,
        train,
        criteria=["taylor"],
        evaluate=accuracy_on(test),
        out=tmp_path_factory.mktemp("channels"),
        levels=[0.3, 0.5, 0.7],
        calibration_batches=4,
        recover=RECOVER,
        recover_levels=[0.5],
        scratch=[{"method": "finetune", "steps": 12}],
        rounds=2,
    )


def rows_of(found: Comparison, **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in found.rows if all(row[key] == value for key, value in wanted.items())]


def line_of(lines: Sequence[dict[str, Any]], criterion: str) -> dict[str, Any]:
    return next(line for line in lines if line["criterion"] == criterion)


def test_counts_are_exact_at_every_level(elements: Comparison) -> None:
    rows = [row for row in elements.rows if row["criterion"] != "dense"]
    assert {row["level"] for row in rows} == {0.5, 0.67, 0.8, 0.9, 0.95, 0.98}
    for row in rows:
        assert row["units_removed"] == int(row["level"] * row["units_total"] + 0.5)
        assert row["nonzero"] <= row["params"] - row["units_removed"]


def test_controls_run_unasked(elements: Comparison) -> None:
    assert {row["criterion"] for row in elements.rows} == {"magnitude norm=l1", "magnitude", "random", "dense"}
    assert {row["variant"] for row in elements.rows} == {"as is", "shuffled", "inverted"}
    assert {row["level"] for row in elements.rows if row["variant"] != "as is"} == {0.8}
    assert len(rows_of(elements, criterion="dense")) == 3


def test_equal_criteria_cannot_be_told_apart_and_random_is_worse(elements: Comparison) -> None:
    lines = elements.summary["curve_means"]["none"]
    twin, random = line_of(lines, "magnitude norm=l1"), line_of(lines, "random")
    assert (twin["difference"], twin["verdict"]) == (0.0, "not distinguishable")
    assert random["verdict"] == "worse"
    assert random["p_holm"] < 0.05
    assert random["difference"] + random["half"] < 0
    board = elements.summary["boards"][0]["lines"]
    assert {line["criterion"] for line in board if line["leading"]} == {"magnitude", "magnitude norm=l1"}


def test_order_within_layers_matters_for_magnitude(elements: Comparison) -> None:
    line = line_of(elements.summary["ablations"], "magnitude")
    assert line["as is"] > line["shuffled"] > line["inverted"]
    assert line["over_shuffled"]["difference"] - line["over_shuffled"]["half"] > 0


@pytest.mark.slow
def test_cuts_meet_the_multiply_accumulates_and_are_certified(channels: Comparison) -> None:
    dense = rows_of(channels, criterion="dense", recovery="none")[0]["macs"]
    for row in rows_of(channels, variant="as is", status="ok"):
        if row["criterion"] not in ("dense", "scratch"):
            assert row["macs"] <= (1 - row["level"]) * dense
            assert row["macs"] > (1 - row["level"] - 0.15) * dense  # units of this net are up to a tenth of it
            assert row["certificate"] < 1e-4


@pytest.mark.parametrize("criterion", ["magnitude", "taylor"])  # one whose scores compare between layers, and one not
def test_a_run_removes_what_a_plan_by_its_criterion_removes(
    models: list[nn.Module], train: TensorData, channels: Comparison, criterion: str
) -> None:
    batches = list(islice(iter(train), 4))
    for row in rows_of(channels, criterion=criterion, variant="as is", recovery="none"):
        plan = make_plan(
            models[row["seed"]], batches[0][0][:1], data=batches, criterion=criterion, granularity="channel",
            target={"macs": 1 - row["level"]}, round_to=1, seed=row["seed"],
        )  # fmt: skip
        assert plan.evidence is not None
        assert row["kept"] == {name: float(keep.float().mean()) for name, keep in plan.evidence.keep.items()}


def test_recoveries_of_a_seed_see_the_same_batches(channels: Comparison) -> None:
    hashes = {(row["seed"], row["recovery_hash"]) for row in rows_of(channels, recovery="recovered")}
    assert len(hashes) == 3
    assert channels.summary["pairing"] == {"checked": 6, "broken": []}
    assert {row["recovery_batches"] for row in rows_of(channels, recovery="recovered")} == {10}
    dense = rows_of(channels, criterion="dense", recovery="recovered")
    assert len(dense) == 3, "the dense model gets the same extra training"


def test_scratch_is_trained_in_magnitudes_shape(channels: Comparison) -> None:
    scratch = rows_of(channels, criterion="scratch")
    wanted = rows_of(channels, criterion="magnitude", level=0.5, recovery="recovered")
    assert [row["params"] for row in scratch] == [row["params"] for row in wanted]
    assert "scratch" in channels.summary["curves"]["recovered"]


def test_costs_are_measured(channels: Comparison) -> None:
    costs = {line["criterion"]: line for line in channels.summary["scoring"]}
    assert set(costs) == {"taylor", "magnitude", "random"}
    assert costs["taylor"]["seconds"] > costs["random"]["seconds"] > 0
    assert costs["taylor"]["epochs"] > 0
    assert all(cost["peak_bytes"] is None or cost["peak_bytes"] >= 0 for cost in costs.values())
    timed = [row for row in channels.rows if "latency_ms" in row]
    assert len(timed) == 3 * 3 * 3
    assert all(row["latency_ms"]["rounds"] == 2 for row in timed)


def test_training_beats_no_training_here(channels: Comparison) -> None:
    board = {b["recovery"]: b["lines"] for b in channels.summary["boards"] if b["level"] == 0.5}
    assert line_of(board["recovered"], "taylor")["mean"] > line_of(board["none"], "taylor")["mean"]


def test_base_models_are_left_alone(models: list[nn.Module], channels: Comparison) -> None:
    assert {row["base"] for row in channels.rows} == {seed_run.hash_model(model) for model in models}


def test_csv_has_one_line_per_run(channels: Comparison) -> None:
    lines = list(csv.DictReader(io.StringIO((channels.out / "results.csv").read_text())))
    assert len(lines) == len(channels.rows)
    assert {line["key"] for line in lines} == {row["key"] for row in channels.rows}
    for line, row in zip(lines, channels.rows, strict=True):
        assert float(line["quality.accuracy"]) == row["quality"]["accuracy"]
        assert line["criterion"] == row["criterion"]


def small(models: Any, train: TensorData, out: Path, **changes: Any) -> Comparison:
    settings: dict[str, Any] = {
        "criteria": ["magnitude"], "evaluate": kept_mass, "granularity": "element", "levels": [0.5, 0.8],
        "calibration_batches": 1, "seeds": 2,
    }  # fmt: skip
    return compare(models, train, out=out, **{**settings, **changes})


def test_nothing_is_done_twice(
    models: list[nn.Module], train: TensorData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = small(models[:2], train, tmp_path)
    texts = {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}
    with monkeypatch.context() as patch:
        patch.setattr(seed_run, "measure_scores", forbidden)
        patch.setattr(seed_run, "make_plan", forbidden)
        again = small(models[:2], train, tmp_path)
    assert (first.reused, again.reused) == (0, len(first.rows))
    assert again.rows == first.rows
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.*")} == texts
    monkeypatch.setattr(seed_run, "measure_scores", forbidden)  # a new level needs plans, and no new scores
    more = small(models[:2], train, tmp_path, levels=[0.5, 0.8, 0.9], ablation_levels=[0.5])
    assert more.reused == len(first.rows)
    assert len(more.rows) == len(first.rows) + 2 * 2


def test_what_is_read_back_is_what_was_measured(models: list[nn.Module], train: TensorData, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"granularity": "channel", "levels": [0.5], "seeds": 2, "rounds": 1, "probes": 3}
    first = small(models[:2], train, tmp_path, **settings)
    assert any("latency_ms" in row for row in first.rows)
    texts = {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}
    again = small(models[:2], train, tmp_path, **settings)
    assert again.reused == len(first.rows)
    assert again.rows == first.rows
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.*")} == texts


def test_a_protocol_stands_for_its_parts(models: list[nn.Module], train: TensorData, tmp_path: Path) -> None:
    first = small(models[:1], train, tmp_path, seeds=1, levels=[0.5])
    shared: dict[str, Any] = {
        "criteria": ["magnitude"], "evaluate": kept_mass, "calibration_batches": 1, "out": tmp_path
    }  # fmt: skip
    protocol = Protocol.of(granularity="element", levels=[0.5], seeds=1)
    again = compare(models[:1], train, protocol=protocol, **shared)
    assert (again.rows, again.protocol) == (first.rows, first.protocol)
    assert again.reused == len(first.rows)
    with pytest.raises(RecipeError, match="beside a protocol"):
        compare(models[:1], train, protocol=protocol, levels=[0.5], **shared)
    with pytest.raises(TypeError, match="no option 'level'"):
        compare(models[:1], train, level=[0.5], **shared)


def forbidden(*_: object, **__: object) -> None:
    raise AssertionError("this was done already")


@pytest.fixture(scope="module")
def whole(models: list[nn.Module], train: TensorData, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return small(models[:2], train, tmp_path_factory.mktemp("whole"))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("calls", [1, 4, 9])
def test_a_killed_comparison_goes_on(
    models: list[nn.Module], train: TensorData, whole: Comparison, tmp_path: Path, calls: int
) -> None:
    left = [calls]

    def interrupted(model: nn.Module) -> float:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return kept_mass(model)

    interrupted.__qualname__ = kept_mass.__qualname__
    with pytest.raises(KeyboardInterrupt):
        small(models[:2], train, tmp_path, evaluate=interrupted)
    assert not (tmp_path / "results.csv").exists()
    finished = small(models[:2], train, tmp_path)
    assert finished.reused == calls - 1  # the first call only asks for the names of the qualities
    assert [row["quality"] for row in finished.rows] == [row["quality"] for row in whole.rows]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "change",
    [{"tag": "other"}, {"scope": "local"}, {"calibration_batches": 2}, {"protect": ["conv1"]}],
    ids=lambda change: next(iter(change)),
)
def test_what_decides_about_a_result_is_in_its_address(
    models: list[nn.Module], train: TensorData, tmp_path: Path, change: dict[str, Any]
) -> None:
    small(models[:1], train, tmp_path, seeds=1, levels=[0.5])
    assert small(models[:1], train, tmp_path, seeds=1, levels=[0.5]).reused == 5
    assert small(models[:1], train, tmp_path, seeds=1, levels=[0.5], **change).reused == 0


class HeadsOnly(Magnitude):
    name = "heads-only"
    granularities = ("head",)


def test_what_cannot_be_scored_is_said_and_the_rest_goes_on(
    models: list[nn.Module], train: TensorData, tmp_path: Path
) -> None:
    found = small(models[:2], train, tmp_path, criteria=[HeadsOnly(), "magnitude"])
    refused = found.summary["refused"]
    assert [(line["criterion"], line["status"]) for line in refused] == [("heads-only", "refused")]
    assert "cannot score 'element' units" in refused[0]["why"]
    assert all(row["status"] == "ok" for row in found.rows if row["criterion"] != "heads-only")
    assert "cannot score" in (tmp_path / "compare.md").read_text()


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("scene", "asked", "match"),
    [("expert", ["reap", "taylor"], "params"), ("layer", ["block-influence", "every"], "macs")],
)
def test_experts_and_layers(scene: str, asked: list[str], match: str, tmp_path: Path) -> None:
    model, data = tiny_scene(scene).model, tiny_scene(scene).data
    found = compare(
        model,
        data,
        criteria=asked,
        evaluate=kept_mass,
        out=tmp_path,
        granularity=scene,
        levels=[0.2],
        seeds=2,
        rounds=2,
    )
    assert found.protocol.match == match
    assert {row["criterion"] for row in found.rows} == {*asked, "magnitude", "random", "dense"}
    for row in found.rows:
        assert row["status"] == "ok", row["why"]
        whole = next(iter(rows_of(found, criterion="dense")))
        assert row[match] <= (1 - row["level"]) * whole[match]
        assert row["criterion"] == "dense" or row["units_removed"] >= 1
    assert all(row["latency_ms"] for row in found.rows if row["variant"] == "as is" and row["criterion"] != "dense")


def test_a_level_out_of_reach_is_refused_alone(models: list[nn.Module], train: TensorData, tmp_path: Path) -> None:
    found = small(models[:1], train, tmp_path, granularity="channel", levels=[0.5, 0.999], seeds=1, rounds=0)
    by = {level: {row["status"] for row in found.rows if row["level"] == level} for level in (0.5, 0.999)}
    assert by == {0.5: {"ok"}, 0.999: {"refused"}}


def test_a_recovery_that_diverges_is_no_result(models: list[nn.Module], train: TensorData, tmp_path: Path) -> None:
    wild = [{"method": "finetune", "steps": 30, "optimizer": {"lr": 1e30}}]
    found = small(models[:1], train, tmp_path, seeds=1, levels=[0.5], recover=wild)
    assert {row["status"] for row in found.rows if row["recovery"] == "recovered"} == {"diverged"}
    assert {row["status"] for row in found.rows if row["recovery"] == "none"} == {"ok"}


@pytest.mark.slow
def test_several_recoveries_side_by_side(
    models: list[nn.Module], train: TensorData, test: TensorData, tmp_path: Path
) -> None:
    adam = {"method": "finetune", "steps": 8, "optimizer": {"name": "adam", "lr": 0.01}}
    named = {"refitted": [{"method": "refit"}, {"method": "bn_refresh"}], "trained": [{"method": "bn_refresh"}, adam]}
    found = small(
        models[:1], train, tmp_path, seeds=1, levels=[0.5], granularity="channel", rounds=0, recover=named,
        evaluate=accuracy_on(test), calibration_batches=8,
    )  # fmt: skip
    assert {row["status"] for row in found.rows} == {"ok"}
    quality = {
        recovery: rows_of(found, criterion="magnitude", recovery=recovery, variant="as is")[0]["quality"]["accuracy"]
        for recovery in ("none", "refitted", "trained")
    }
    assert quality["none"] < quality["refitted"]
    assert quality["none"] < quality["trained"]
    dense = {row["quality"]["accuracy"] for row in rows_of(found, criterion="dense")}
    assert max(dense) > 0.8
    masks = small(
        models[:1],
        train,
        tmp_path,
        seeds=1,
        levels=[0.5],
        recover=[{"method": "finetune", "steps": 1, "adapters": {"rank": 5000}}],
    )
    (why,) = {r["why"] for r in rows_of(masks, criterion="random", recovery="recovered")}
    assert why.startswith("adapters: rank 5000 is larger than")


def test_one_seed_is_no_test(models: list[nn.Module], train: TensorData, tmp_path: Path) -> None:
    found = small(models[0], train, tmp_path, seeds=1)
    assert {line["verdict"] for line in found.summary["curve_means"]["none"]} == {"reference", "not tested"}
    assert "One seed" in (tmp_path / "compare.md").read_text()


def test_one_base_for_all_seeds_is_said(models: list[nn.Module], train: TensorData, tmp_path: Path) -> None:
    small(models[0], train, tmp_path, levels=[0.5])
    assert "share one base model" in (tmp_path / "compare.md").read_text()


def test_lower_is_better_where_the_name_says_so(models: list[nn.Module], train: TensorData, tmp_path: Path) -> None:
    found = small(models, train, tmp_path, seeds=3, evaluate=lambda model: {"loss": -kept_mass(model)}, metric="loss")
    assert line_of(found.summary["curve_means"]["none"], "random")["verdict"] == "worse"
    assert found.summary["curve_means"]["none"][0]["criterion"] == "magnitude"


Wrong = Callable[[list[nn.Module]], dict[str, Any]]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"seeds": 0}, RecipeError),
        ({"seeds": 3}, RecipeError),  # two models
        ({"confidence": 1.0}, RecipeError),
        ({"recover_levels": [0.3], "recover": RECOVER}, RecipeError),
        ({"ablation_levels": [0.3]}, RecipeError),
        ({"metric": "speed"}, RecipeError),
        ({"calibration": []}, InputError),
        ({"calibration_batches": 0}, RecipeError),
        ({"evaluate": lambda model: {}}, InputError),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(
    models: list[nn.Module], train: TensorData, tmp_path: Path, changes: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        small(models[:2], train, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_recovery_needs_data(models: list[nn.Module], tmp_path: Path) -> None:
    batches = [torch.randn(4, 1, 6, 6)]
    with pytest.raises(RecipeError, match="training data"):
        small(models[:2], None, tmp_path, calibration=batches, recover=RECOVER)  # type: ignore[arg-type]
    assert len(small(models[:2], None, tmp_path, calibration=batches).rows) == 14  # type: ignore[arg-type]


def test_scores_come_from_the_same_samples_in_the_same_order(
    models: list[nn.Module], train: TensorData, tmp_path: Path
) -> None:
    seen: list[list[int]] = []

    class Looks(Criterion):
        name, summary, speed, best_for = "looks", "-", "-", "-"

        def _score(self, context: Context) -> dict[str, torch.Tensor]:
            seen.append([id(batch) for batch in context.data])
            return Magnitude().score(context)

    class LooksAgain(Looks):
        name = "looks-again"

    small(models[:2], train, tmp_path, criteria=[Looks(), LooksAgain()], calibration_batches=3)
    assert len(seen) == 4
    assert len(seen[0]) == 3
    assert all(order == seen[0] for order in seen)
