"""A search over recipes: Optuna proposes, the objective evaluates, a storage keeps; any number of workers."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

from torch import nn

from secateur import shown
from secateur.asking import Asked
from secateur.comparison.hashes import hash_batches
from secateur.errors import NonFiniteError, RecipeError, TargetError
from secateur.files.seeds import seed_everything, stable_hash
from secateur.model.admit import admit
from secateur.model.call import as_loss
from secateur.model.door import Given, enter
from secateur.model.hashing import hash_model
from secateur.model.tensors import require_finite_weights
from secateur.objective.evaluate import Evaluation, Objective, Partial
from secateur.recipe import Recipe, dump_recipe
from secateur.registry import suggestion
from secateur.search.descent import Bound, Descent
from secateur.search.front import Goals, Values, front, recommended
from secateur.search.sensitivity import sensitivity
from secateur.search.space import SENSITIVITY, Params, RecipeSpace, load_space
from secateur.search.storage import SOON, Samplers, opened_first, quiet, require_optuna, sampler_of
from secateur.types import Advance, Data, Example, Json, Judge, Loss

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

RECIPE, FALL = "recipe", "fall"  # what a trial keeps beside Optuna's own
LONGEST = 10.0  # seconds that a worker waits for the start of a study that another one has made
COSTS = ("macs", "params", "nonzero", "size", "latency_ms")


@dataclass(frozen=True, eq=False, repr=False)
class SearchResult:
    """What a search has found up to now, by all workers.

    Args:
        goals: the objectives.
        values: number of a trial -> what it reached, of those that ended well.
        recipes: number of a trial -> its recipe, as YAML.
        falls: number of a trial -> what it lost, in words.
        front: numbers of the trials that no other one beats.
        best: the one that is recommended.
        why: the reason.
        states: how many trials are in which state.
        made: trials of this call.
        storage: where the study lies.
    """

    goals: Goals
    values: dict[int, Values]
    recipes: dict[int, str]
    falls: dict[int, str]
    front: tuple[int, ...]
    best: int
    why: str
    states: dict[str, int] = field(default_factory=dict)
    made: int = 0
    storage: str = ""

    def __repr__(self) -> str:
        return shown.line("SearchResult", f"{len(self.values)} trials", f"{len(self.front)} on the front")

    def _repr_html_(self) -> str:
        rows = [[str(n), *(f"{self.values[n][name]:.4g}" for name in self.goals.names)] for n in self.front]
        return shown.table(repr(self)[1:-1], ("trial", *self.goals.names), rows, notes=[f"{self.best}: {self.why}"])


def search(
    model: nn.Module,
    example: Example = None,
    *,
    data: Given,
    space: RecipeSpace | str | Path | dict[str, object],
    objectives: Sequence[str] = ("accuracy", "macs"),
    minutes: float | None = None,
    trials: int | None = None,
    storage: str | Path = "",
    sampler: Samplers = "tpe",
    to: Mapping[str, float] | None = None,
    calibration: Data | None = None,
    test: Data | None = None,
    evaluate: Judge | None = None,
    loss: Loss | None = None,
    seed: int = 0,
    progress: Advance | None = None,
    crew: Callable[[], int] | None = None,
) -> SearchResult:
    """Search for recipes that trade quality for cost best on the user's own model and data.

    Every trial is one recipe, planned, recovered and read as by `prune(max_drop=)`: on samples that nothing trains on,
    never on the test part. A study in a storage goes on where it stopped, and any number of processes may work on it:
    trials are independent, and what a dead worker was doing is all that is lost. The number of workers changes only
    which results a sampler knew when it proposed.

    Args:
        model: left as it is.
        example: forward inputs; default from the data.
        data: as for `prune`.
        space: what may be chosen: see `secateur.search.space.load_space`.
        objectives: the quality first ("accuracy", or "quality" for whatever figure the data give), then costs: macs,
            params, nonzero and size as shares of the model as it came, latency_ms in milliseconds.
        minutes: after which no trial is begun.
        trials: of this call at most. One of both is needed.
        storage: a file of SQLite, or any URL of a storage of Optuna; "" keeps the study in memory.
        sampler: "tpe", "nsga2" or "random"; or "descent": greedy steps from the base recipe down to `to`, one group
            at a time, without a space of its own.
        to: where a descent ends: {"macs": 0.5}, {"params": 0.5} or {"latency_ms": 8.0}.
        calibration: as for `prune`.
        test: as for `prune`; not read.
        evaluate: as for `prune`.
        loss: as for `prune`.
        seed: of the sampler; recipes have their own.
        progress: called as ``progress(done, total)``.
        crew: evaluates in the place of this process, once the study is there: has others search in the same storage,
            and returns how many trials they have made.

    Returns:
        All results of the study, the front and the recommended one.

    Raises:
        RecipeError: an unknown objective or sampler, or a study of something else.
        UnsupportedError: Optuna is missing, or the storage cannot be opened.
        TargetError: no trial ended well.
    """
    require_optuna()
    found = space if isinstance(space, RecipeSpace) else load_space(space)
    bound = bound_of(sampler, to)
    _check(sampler, minutes, trials, bound)
    model, given = admit(model, copied=True), enter(data, calibration=calibration, test=test)
    require_finite_weights(model)
    example = given.example() if example is None else example
    asked = Asked(model, example, (), given, found.base, None, {}, as_loss(loss), evaluate, None, "", "")
    objective = Objective(asked)
    goals = goals_of(objectives, objective.gauge.name, higher=objective.gauge.higher)
    about = stable_hash(
        [hash_model(model), hash_batches(objective.selection.batches), found.to_data(), list(goals.names)]
    )
    study, first = opened_first(storage, goals, about)
    worker = _Worker(objective, found, goals, study, given, example)
    if bound is not None:
        made = worker.descend(bound, minutes, trials, progress)
        return _result(study, goals, made, str(storage))
    # The first worker draws by the seed; with one seed for all, they would propose the same recipes at the same time.
    study.sampler = sampler_of(sampler, seed if worker.begins(first=first) else seed + os.getpid())
    made = worker.run(minutes, trials, progress) if crew is None else crew()
    return _result(study, goals, made, str(storage))


class _Worker:
    """Takes trials from a study until its time is over."""

    def __init__(
        self, objective: Objective, space: RecipeSpace, goals: Goals, study: Study, given: Given, example: Example
    ) -> None:
        self.objective, self.space, self.goals, self.study = objective, space, goals, study
        self._given, self._example = given, example
        self._curves: dict[str, Json] = {}

    def begins(self, *, first: bool) -> bool:
        """Whether the study begins here; then what is known to be sound comes first, for all workers.

        Args:
            first: whether this worker has made the study.
        """
        # Whoever comes second waits for the start; if the first died before it, it is made by those who waited.
        waits = 0 if first else LONGEST
        while not (begun := bool(self.study.user_attrs.get("begun"))) and waits > 0:
            time.sleep(SOON)
            waits -= SOON
        if begun:
            return False
        for params in self.space.starts():
            self.study.enqueue_trial(params, skip_if_exists=True)
            if self.space.spreads_by_curves:
                self.study.enqueue_trial({**params, "allocation": SENSITIVITY}, skip_if_exists=True)
        self.study.set_user_attr("begun", True)
        return True

    def run(self, minutes: float | None, trials: int | None, progress: Advance | None) -> int:
        """Evaluate; returns how many trials were made."""
        made, started = 0, time.monotonic()
        optuna = import_module("optuna")

        def over(study: Study, trial: FrozenTrial) -> None:
            nonlocal made
            made += 1
            if progress is not None:
                progress(made, trials or 0)

        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            left = None if minutes is None else max(60 * minutes - (time.monotonic() - started), 0.0)
            # A recipe that cannot be is a result of the search and ends its trial only.
            self.study.optimize(
                self._trial,
                n_trials=trials,
                timeout=left,
                callbacks=[over],
                catch=(TargetError, NonFiniteError, RecipeError),
            )
        return made

    def descend(self, bound: Bound, minutes: float | None, trials: int | None, progress: Advance | None) -> int:
        """Walk down greedily; every proposal is a trial of the study, and one that is there is not made again."""
        optuna, made, started = import_module("optuna"), 0, time.monotonic()

        def over() -> bool:
            late = minutes is not None and time.monotonic() - started > 60 * minutes
            return late or (trials is not None and made >= trials)

        def quality(recipe: Recipe) -> float | None:
            nonlocal made
            text = dump_recipe(recipe)
            known = self._known(text)
            if known is None:
                if over():
                    raise _OutOfTimeError
                try:
                    values, fall = self._values(recipe, None)
                except (TargetError, NonFiniteError):
                    return None
                made += 1
                if progress is not None:
                    progress(made, trials or 0)
                known = optuna.trial.create_trial(values=values, user_attrs={RECIPE: text, FALL: fall})
                self.study.add_trial(known)
            first = float(known.values[0])
            return first if self.goals.higher else -first

        with quiet(), contextlib.suppress(_OutOfTimeError):
            for _ in Descent(self.objective, self.space.base, bound, quality).run():
                if over():
                    break
        return made

    def _values(self, recipe: Recipe, partial: Partial | None) -> tuple[list[float], str]:
        # Seeded trial by trial: what a recovery draws must not depend on the trials before it.
        with seed_everything(recipe.seed):
            found = self.objective.evaluate(recipe, timed="latency_ms" in self.goals.names, partial=partial)
        return [value_of(found, name) for name in self.goals.names], fall_words(found, self.objective)

    def _trial(self, trial: Trial) -> float | Sequence[float]:
        params = {key: choice.suggest(trial, key) for key, choice in self.space.keys.items()}
        recipe = self.space.recipe(params, self._allocation(params))
        trial.set_user_attr(RECIPE, dump_recipe(recipe))
        known = self._known(trial.user_attrs[RECIPE])
        if known is not None:
            trial.set_user_attr(FALL, known.user_attrs[FALL])
            return [float(value) for value in known.values]
        values, fall = self._values(recipe, self._partial(trial))
        trial.set_user_attr(FALL, fall)
        return values

    def _partial(self, trial: Trial) -> Partial | None:
        # Optuna's pruners compare one number, so with several objectives every trial is seen through.
        if len(self.goals.names) > 1:
            return None
        optuna = import_module("optuna")

        def report(step: int, figure: float) -> None:
            trial.report(figure, step)
            if trial.should_prune():
                raise optuna.TrialPruned

        return report

    def _known(self, text: str) -> FrozenTrial | None:
        """A trial that has evaluated the same recipe: the same inputs give the same result, and cost nothing."""
        optuna = import_module("optuna")
        done = self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
        return next((one for one in done if one.user_attrs.get(RECIPE) == text), None)

    def _allocation(self, params: Params) -> Json:
        if params.get("allocation") != SENSITIVITY:
            return None
        recipe = self.space.recipe({**params}, {"name": SENSITIVITY, "curves": [_ANY]})
        plain = recipe.model_dump(mode="json", by_alias=True)
        kept: dict[str, Json] = {key: plain[key] for key in ("criterion", "granularity", "protect")}
        key = stable_hash(kept)
        if key not in self._curves:
            objective = self.objective
            curves = sensitivity(
                objective.asked.model, self._example, data=self._given, granularity=plain["granularity"],
                criterion=plain["criterion"], protect=recipe.protect, loss=objective.asked.loss, seed=recipe.seed,
            )  # fmt: skip
            self._curves[key] = cast(Json, curves.allocation())
        return self._curves[key]


_ANY: Json = {"group": "any", "ratios": [0.5], "falls": [1.0]}


def goals_of(objectives: Sequence[str], figure: str, *, higher: bool) -> Goals:
    """The objectives by name, the quality by that of its figure.

    Raises:
        RecipeError: an unknown one, one twice, or no quality in the first place.
    """
    known = (figure, "quality", *COSTS)
    for name in objectives:
        if name not in known:
            answer = "write size, the share of the bytes" if name == "memory_bytes" else suggestion(name, known)
            raise RecipeError(f"objective {name!r} is not known", hint=answer)
    names = tuple(figure if name == "quality" else name for name in objectives)
    if not names or names[0] != figure or len(set(names)) != len(names):
        raise RecipeError(
            f"objectives {', '.join(objectives) or 'none'}: the quality comes first, and each comes once.",
            hint=f"for example {figure},macs",
        )
    return Goals(names, frozenset({figure} if higher else ()))


def value_of(found: Evaluation, name: str) -> float:
    """What an evaluation reached in an objective."""
    if name == "latency_ms":
        assert found.latency_ms is not None
        return found.latency_ms
    return found.shares[name] if name in COSTS else found.figure


def fall_words(found: Evaluation, objective: Objective) -> str:
    """What a recipe lost or gained, with the bound on it."""
    return found.fall.words(objective.gauge.unit(objective.before), objective.confidence)


class _OutOfTimeError(Exception):
    """A descent has no time for another proposal."""


def bound_of(sampler: str, to: Mapping[str, float] | None) -> Bound | None:
    """Where a descent ends; None for every other sampler.

    Raises:
        RecipeError: one without the other, or several bounds.
    """
    if (sampler == "descent") != (to is not None):
        raise RecipeError("sampler 'descent' and to= belong together.", hint='for example to={"macs": 0.5}')
    if to is None:
        return None
    if len(to) != 1:
        raise RecipeError(f"a descent has one bound, not {len(to)}", hint='for example to={"macs": 0.5}')
    return Bound(*next(iter(to.items())))


def _check(sampler: str, minutes: float | None, trials: int | None, bound: Bound | None) -> None:
    if sampler not in get_args(Samplers):
        raise RecipeError(f"sampler {sampler!r} is not known", hint=suggestion(sampler, get_args(Samplers)))
    if minutes is None and trials is None and bound is None:
        raise RecipeError("a search needs an end", hint="give minutes, or trials")
    for name, value in (("minutes", minutes), ("trials", trials)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0):
            raise RecipeError(f"{name}={value!r} is not a number above 0")


def _result(study: Study, goals: Goals, made: int, storage: str) -> SearchResult:
    trials = study.get_trials(deepcopy=False)
    done = [one for one in trials if one.values is not None and one.state.name == "COMPLETE"]
    if not done:
        raise TargetError(
            "No recipe of the search ended well.",
            why=f"{len(trials)} were tried: targets out of reach, or recoveries that diverged",
            hint="Allow smaller steps in the space, or more time.",
        )
    values = {one.number: dict(zip(goals.names, one.values, strict=True)) for one in done}
    numbers, listed = list(values), list(values.values())
    best, why = recommended(listed, goals)
    states: dict[str, int] = {}
    for one in trials:
        states[one.state.name.lower()] = states.get(one.state.name.lower(), 0) + 1
    return SearchResult(
        goals, cast("dict[int, Values]", values), {one.number: one.user_attrs[RECIPE] for one in done},
        {one.number: one.user_attrs[FALL] for one in done},
        tuple(numbers[place] for place in front(listed, goals)), numbers[best], why, states, made, storage,
    )  # fmt: skip
