"""Searches: what a trial says is true, nothing is done twice, and a dead worker loses its trial alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from pattern_problem import patterns
from torch import nn

import secateur as sc
from secateur.errors import RecipeError, TargetError, UnsupportedError
from secateur.measure import accuracy, macs
from secateur.objective.evaluate import Objective
from secateur.search.page import write_search
from secateur.search.study import search
from secateur.sources import TensorData

pytest.importorskip("optuna")

CHOICE = TensorData(*patterns(300, 7), batch_size=100)
SPACE = {
    "base": {"target": {"macs": 0.6}, "recover": [{"method": "finetune", "steps": 3}], "measure": {"latency": False}},
    "criterion": ["magnitude", "random"],
    "target.macs": {"low": 0.3, "high": 0.9},
    "allocation": ["global", "sensitivity"],
}


@pytest.fixture
def data(train: TensorData, test: TensorData) -> dict[str, TensorData]:
    return {"train": train, "calibration": CHOICE, "test": test}


def test_trials_are_what_their_recipes_bring(
    models: Sequence[nn.Module], data: dict[str, TensorData], tmp_path: Path
) -> None:
    found = search(models[0], data=data, space=SPACE, trials=2, storage=tmp_path / "s.db")
    assert (found.made, len(found.values)) == (2, 2)
    example = next(iter(CHOICE))[0][:1]
    for number in found.front:
        # The same recipe by the whole pipeline, read where it was chosen by a count of its own.
        model = sc.prune(models[0], data=data, recipe=found.recipes[number]).model
        assert found.values[number]["accuracy"] == accuracy(model, CHOICE)
        share = macs(model, example) / macs(models[0], example)
        assert found.values[number]["macs"] == pytest.approx(share, rel=1e-4)
    # Known recipes come first: the base, and the base by its curves.
    assert "macs: 0.6" in found.recipes[0]
    assert "name: sensitivity" in found.recipes[1]


@pytest.mark.slow
def test_a_search_goes_on_and_does_nothing_twice(
    models: Sequence[nn.Module], data: dict[str, TensorData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    evaluate = Objective.evaluate

    def counted(self: Objective, recipe: sc.Recipe, **more: object) -> object:
        done.append(str(recipe.model_dump()))
        return evaluate(self, recipe, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Objective, "evaluate", counted)
    few = {"base": SPACE["base"], "target.macs": [0.5, 0.7]}
    given = {"data": data, "space": few, "storage": tmp_path / "s.db"}
    first = search(models[0], **given, trials=2)
    again = search(models[0], **given, trials=3)
    assert (len(first.values), len(again.values), again.made) == (2, 5, 3)
    assert len(done) == len(set(done)) <= 2, "five trials of two recipes: two evaluations"
    assert {number: again.values[number] for number in first.values} == first.values
    with pytest.raises(RecipeError, match="something else"):
        search(models[1], **given, trials=1)
    with pytest.raises(RecipeError, match="something else"):
        search(models[0], **{**given, "space": {**few, "target.macs": [0.4, 0.7]}}, trials=1)


@pytest.mark.slow
def test_recipes_that_cannot_be_end_their_trial_only(
    models: Sequence[nn.Module], data: dict[str, TensorData], tmp_path: Path
) -> None:
    space = {"base": SPACE["base"], "target.macs": [0.6, 0.0001]}
    found = search(models[0], data=data, space=space, trials=4, sampler="random", storage=tmp_path / "s.db")
    assert found.states["fail"] >= 1
    assert all("macs: 0.6" in recipe for recipe in found.recipes.values())
    with pytest.raises(TargetError, match="No recipe"):
        search(models[0], data=data, space={"base": SPACE["base"], "target.macs": [0.0001]}, trials=1)


@pytest.mark.parametrize("sampler", ["nsga2", pytest.param("random", marks=pytest.mark.slow)])
def test_every_sampler_and_a_single_objective(
    sampler: str, models: Sequence[nn.Module], data: dict[str, TensorData]
) -> None:
    found = search(models[0], data=data, space=SPACE, trials=2, sampler=sampler, objectives=["accuracy"])
    assert len(found.values) + found.states.get("pruned", 0) == 2


def test_the_page_shows_every_trial_and_the_commands_of_the_front(
    models: Sequence[nn.Module], data: dict[str, TensorData], tmp_path: Path
) -> None:
    found = search(models[0], data=data, space=SPACE, trials=2, objectives=["quality", "macs", "size"])
    files = write_search(found, tmp_path / "out", model="<b>net</b>.py:build", data="npz:d.npz")
    page = Path(files["front"]).read_text("utf-8")
    assert "<b>net" not in page
    assert page.count("<circle") == 2 * len(found.values)
    for number in found.front:
        assert f'id="t{number}"' in page
        assert f"recipes/{number}.yaml" in page
        assert sc.load_recipe(tmp_path / "out" / "recipes" / f"{number}.yaml")
    assert sc.load_recipe(files["recommended"]) == sc.load_recipe(found.recipes[found.best])


@pytest.mark.slow
def test_a_descent_takes_the_best_group_at_every_step(
    models: Sequence[nn.Module], data: dict[str, TensorData], tmp_path: Path
) -> None:
    given = {"data": data, "space": SPACE, "sampler": "descent", "to": {"macs": 0.6}, "storage": tmp_path / "s.db"}
    few = search(models[0], **given, trials=2)
    assert (few.made, len(few.values)) == (2, 2)
    found = search(models[0], **given)
    # The same way again, of which two proposals were there.
    assert found.made == len(found.values) - 2
    assert search(models[0], **given).made == 0
    assert {number: found.values[number] for number in few.values} == few.values
    last = found.values[max(found.values)]
    assert min(one["macs"] for one in found.values.values()) <= 0.6
    assert last["macs"] >= 0.3, "no further than was asked, but for the width of a step"
    for recipe in found.recipes.values():
        assert set(sc.load_recipe(recipe).target.given()["sparsity"]) == {"conv1", "conv2"}


@pytest.mark.parametrize(
    ("more", "kind", "words"),
    [
        ({"objectives": ["flops"]}, RecipeError, "not known"),
        ({"objectives": ["macs", "accuracy"]}, RecipeError, "quality comes first"),
        ({"objectives": ["accuracy", "macs", "macs"]}, RecipeError, "comes once"),
        ({"trials": None}, RecipeError, "needs an end"),
        ({"trials": 0}, RecipeError, "above 0"),
        ({"sampler": "grid"}, RecipeError, "not known"),
        ({"sampler": "descent"}, RecipeError, "belong together"),
        ({"to": {"macs": 0.5}}, RecipeError, "belong together"),
        ({"sampler": "descent", "to": {"macs": 2}}, RecipeError, "leads nowhere"),
        ({"sampler": "descent", "to": {"flops": 0.5}}, RecipeError, "not known"),
        ({"sampler": "descent", "to": {"macs": 0.5, "params": 0.5}}, RecipeError, "one bound"),
        ({"storage": "postgresql://nobody:secret@localhost:1/none"}, UnsupportedError, "cannot be opened"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    more: dict[str, object], kind: type[Exception], words: str, models: Sequence[nn.Module], data: dict[str, TensorData]
) -> None:
    with pytest.raises(kind) as caught:
        search(models[0], **{"data": data, "space": SPACE, "trials": 1, **more})  # type: ignore[arg-type]
    assert words in str(caught.value)
    assert "secret" not in str(caught.value)


WORKER = """
import sys, time
sys.path[:0] = {paths!r}
import torch; torch.set_num_threads(1)
from pattern_problem import Net, patterns
from secateur.objective.evaluate import Objective
from secateur.search import storage
from secateur.search.study import search
from secateur.sources import TensorData
storage.BEAT, storage.GRACE = 1, 3
evaluate = Objective.evaluate
def slow(self, recipe, **more):
    print("begun", flush=True)
    time.sleep({pause})
    return evaluate(self, recipe, **more)
Objective.evaluate = slow
torch.manual_seed(0)
data = {{"train": TensorData(*patterns(64, 1)), "calibration": TensorData(*patterns(200, 7)),
         "test": TensorData(*patterns(64, 2))}}
found = search(Net(), data=data, space={space!r}, trials={trials}, storage={storage!r})
print(found.made, found.states, flush=True)
"""


def worker(folder: Path, *, trials: int, pause: float) -> subprocess.Popen[str]:
    space = {**SPACE, "allocation": ["global", "uniform"]}
    code = WORKER.format(
        paths=[str(Path(__file__).parents[1])], pause=pause, space=space, trials=trials, storage=str(folder / "s.db")
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env)


@pytest.mark.slow
def test_a_worker_that_is_killed_loses_its_trial_alone(tmp_path: Path) -> None:
    import optuna

    first = worker(tmp_path, trials=50, pause=0.5)
    assert first.stdout is not None
    for _ in range(4):
        assert first.stdout.readline() == "begun\n"
    first.send_signal(signal.SIGKILL)
    first.communicate()
    url = f"sqlite:///{tmp_path / 's.db'}"
    before = {one.number: one for one in optuna.load_study(study_name="secateur", storage=url).trials}
    states = [one.state.name for one in before.values()]
    ended = [number for number, one in before.items() if one.state.name == "COMPLETE"]
    assert len(ended) >= 3
    assert states.count("RUNNING") == 1
    time.sleep(4)  # longer than the grace of a worker without a sign of life
    pair = [worker(tmp_path, trials=4, pause=0.1) for _ in range(2)]
    told = [one.communicate(timeout=200)[0] for one in pair]
    assert [one.returncode for one in pair] == [0, 0], told
    after = {one.number: one for one in optuna.load_study(study_name="secateur", storage=url).trials}
    # What had ended is as it was; what ran is given up; the others did all of theirs, each a number of its own.
    assert all(after[number].values == before[number].values for number in ended)
    assert [after[number].state.name for number, one in before.items() if one.state.name == "RUNNING"] == ["FAIL"]
    fresh = [one for number, one in after.items() if number not in before]
    assert len(fresh) + sum(one.state.name == "WAITING" for one in before.values()) >= 8
    assert all(one.state.name == "COMPLETE" for one in fresh)
