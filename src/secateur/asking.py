"""What a run is asked for: keywords over a recipe, the plan that both ask for, and what is refused at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict, cast

from torch import Tensor, nn

from secateur.amounts.allocate.sensitivity import HasAllocation, Spread
from secateur.criteria.base import Criterion
from secateur.errors import RecipeError
from secateur.kinds.weights.granularity import Granularity
from secateur.model.door import Parts
from secateur.model.tensors import require_finite_weights
from secateur.planning import Plan, make_plan
from secateur.planning.build import CriterionLike, GranularityLike, implied_target
from secateur.planning.solved import Blocks, solver_of
from secateur.recipe import Recipe, load_recipe
from secateur.recipe.overrides import Setting, setting_of
from secateur.recover.during import check_lessons
from secateur.recover.own import Train
from secateur.recover.steps import check_training
from secateur.request import CRITERION, Amount, Target
from secateur.types import Advance, Data, Example, Judge, Loss, Protect

DEFAULT_RECIPE = "channel-half-macs"
SOLVED_RECIPE = "language-model"
VERIFIED = ("dtype", "tolerance", "proof")  # keywords that a recipe has under verify
EXACT = ("keep", "remove", "masks")  # say which units go, so that no target is needed


class ByHand(TypedDict, total=False):
    """What no recipe can hold: units, or the scores that decide about them, as `secateur.plan` takes them."""

    scores: Mapping[str, Tensor]
    comparable: bool
    keep: Mapping[str, Tensor]
    remove: Mapping[str, Sequence[int]]
    masks: Mapping[str, Tensor]


class Decided(ByHand, total=False):
    """What `secateur.plan` can be told about what goes; see there."""

    target: Target | Mapping[str, Amount]
    criterion: CriterionLike
    granularity: GranularityLike
    scope: str
    allocation: Spread
    protect: Protect
    min_keep: int
    min_keep_fraction: float
    round_to: int | Literal["auto"] | None
    seed: int
    dtype: str
    tolerance: float | None
    expressible: bool
    scales: str
    proof: str
    blocks: Blocks


@dataclass(frozen=True, eq=False)
class Asked:
    """What a run of `prune` was given, admitted and checked; see there."""

    model: nn.Module
    example: Example
    examples: Sequence[Example]
    given: Parts
    settings: Recipe
    criterion: CriterionLike | None
    by_hand: ByHand
    loss: Loss | None
    evaluate: Judge | None
    train: Train | None
    title: str
    command: str
    planned: Callable[[], Plan] | None = None  # makes the plan, where a search has scored already


def settings_of(
    recipe: Recipe | Mapping[str, object] | str | Path | None,
    overrides: Sequence[str],
    decision: Decided,
    given: Parts,
    *,
    recover: str | Mapping[str, object] | Sequence[Mapping[str, object]] | None,
    own: bool,
) -> tuple[Recipe, list[str]]:
    """The recipe with what the keywords decide in its place, and what is left out of it for want of data.

    Args:
        recipe: as the caller gave it.
        overrides: "key.sub=value" settings on top of it.
        decision: keywords that say what goes.
        given: the data.
        recover: recovery steps in the place of the recipe's.
        own: whether the caller trains, or wants no recovery, so that the default recipe's steps are left out.

    Raises:
        RecipeError: the recipe or a keyword is wrong.
    """
    _require_one_each(overrides, decision, recover=recover is not None)
    default = default_recipe(decision.get("criterion", CRITERION), decision.get("blocks"))
    # The target at once: a recipe that leaves it to the keywords may hold none.
    target = _plain(decision["target"]) if "target" in decision else None
    told = [] if target is None else [Setting(("target",), target, "target")]
    settings = load_recipe(default if recipe is None else recipe, [*told, *overrides])
    # Through plain data and the reader once more, so that a keyword is checked like a line of a recipe.
    plain = settings.model_dump(mode="json", by_alias=True, exclude_none=True)
    for name, value in decision.items():
        if name in ByHand.__annotations__:
            continue
        if name in VERIFIED:
            plain["verify"][name] = value
        elif name == "blocks":
            plain["blocks"] = _blocks(value)
        else:
            plain[name] = _plain(value)
    implied = implied_target(decision.get("granularity"))
    if recipe is None and implied is not None and "target" not in decision:
        # Nobody asked for the default recipe's target, and the pattern says what goes.
        plain["target"] = implied.given()
    if recover is not None:
        plain["recover"] = _steps(recover)
    elif recipe is None and own:
        plain["recover"] = []
    left_out = []
    # Somebody who asks for a recipe gets what it says or an error; the default's recovery is only what is usual.
    if recipe is None and recover is None and not own and settings.recover and given.train is None:
        plain["recover"] = []
        left_out.append("Nothing was recovered: no data were given to recover with.")
    return load_recipe(plain), left_out


def _require_one_each(overrides: Sequence[str], decision: Decided, *, recover: bool) -> None:
    """Refuse an override of what a keyword says as well, which would take its place."""
    names = [*(name for name in decision if name not in ByHand.__annotations__), *(["recover"] if recover else [])]
    for one in map(setting_of, overrides):
        for name in names:
            keys = ("verify", name) if name in VERIFIED else (name,)
            if one.keys[: len(keys)] == keys[: len(one.keys)]:
                raise RecipeError(
                    f"{name}= and overrides={one.label.removeprefix('--set ')!r} both say what {'.'.join(keys)} is.",
                    hint="Leave one of them out.",
                )


def _steps(recover: str | Mapping[str, object] | Sequence[Mapping[str, object]]) -> list[object]:
    """The keyword `recover` as a recipe writes it."""
    if isinstance(recover, str):
        return [{"method": recover}]
    return [dict(recover)] if isinstance(recover, Mapping) else list(recover)


def _blocks(value: object) -> object:
    """The keyword `blocks` as a recipe writes it: settings alone ask for block by block."""
    if isinstance(value, Mapping):
        folder = value.get("checkpoint")
        return {"use": True, **value, **({} if folder is None else {"checkpoint": str(folder)})}
    return {} if value is None else {"use": value}


def by_hand(decision: Decided, settings: Recipe) -> ByHand:
    """What of the keywords decides in the place of the recipe.

    Raises:
        RecipeError: a target or a training would decide as well.
    """
    given = {name: decision[name] for name in ByHand.__annotations__ if decision.get(name) is not None}  # type: ignore[literal-required]
    exact = [name for name in EXACT if name in given]
    if exact and "target" in decision:
        raise RecipeError(f"{exact[0]}= says exactly what goes.", hint="Leave out target.")
    if given and settings.training is not None and settings.training.decides:
        raise RecipeError(
            f"{next(iter(given))}= and training: {settings.training.method} both decide what goes.",
            hint="Leave one of them out.",
        )
    return cast(ByHand, given)


def default_recipe(criterion: object, blocks: Blocks = None) -> str:
    """The bundled recipe that stands in where none is given: solvers have one of their own.

    Example:
        >>> default_recipe("admm"), default_recipe("taylor")
        ('language-model', 'channel-half-macs')
    """
    return SOLVED_RECIPE if solver_of(criterion, blocks) is not None else DEFAULT_RECIPE


def _plain(value: object) -> object:
    """A keyword of `plan` as a recipe writes it."""
    if isinstance(value, (Criterion, Granularity)):
        return {"name": value.name, **value.options()}
    if isinstance(value, Target):
        return value.given()
    if isinstance(value, HasAllocation):
        return value.allocation()
    return list(value) if isinstance(value, tuple) else value


def plan_by(
    model: nn.Module,
    example: Example,
    recipe: Recipe,
    data: Data | None = None,
    loss: Loss | None = None,
    criterion: CriterionLike | None = None,
    examples: Sequence[Example] = (),
    by_hand: ByHand | None = None,
    progress: Advance | None = None,
    finished: Path | None = None,
) -> Plan:
    """The plan that a recipe asks for; nothing is changed. See `secateur.planning.make_plan`.

    Args:
        model: left as it is.
        example: what one forward takes.
        recipe: what is asked for.
        data: batches to score with.
        loss: of the batches.
        criterion: takes the place of the recipe's, which cannot hold an object that has seen a training.
        examples: further ones.
        by_hand: the units or scores, where they were decided before.
        progress: of a solver.
        finished: where a solver keeps finished blocks, and goes on behind them, unless the recipe names a folder.
    """
    plain = recipe.model_dump(by_alias=True)
    decides = plain["criterion"] if criterion is None else criterion
    # A folder that the recipe names is the user's own, and outlives the run.
    if plain["blocks"]["checkpoint"] is None and solver_of(decides, plain["blocks"]) is not None:
        plain["blocks"]["checkpoint"] = finished
    return make_plan(
        model,
        example,
        target=None if set(EXACT) & set(by_hand or {}) else recipe.target.given(),
        **(by_hand or {}),
        criterion=decides,
        data=data,
        loss=loss,
        protect=recipe.protect,
        expressible=recipe.expressible,
        examples=examples,
        **recipe.choices(),
        blocks=plain["blocks"],
        progress=progress,
    )


def check_asked(model: nn.Module, given: Parts, recipe: Recipe) -> None:
    """Refuse what cannot end well before anything is measured.

    Raises:
        InputError: NaN or Inf in a weight.
        RecipeError: a training without data, or with options that mean nothing together.
    """
    require_finite_weights(model)
    if recipe.recover and given.train is None:
        raise RecipeError("The recipe recovers, which needs data.", hint="Pass data (--data), or set recover to [].")
    if recipe.training is not None:
        if given.train is None:
            raise RecipeError("The recipe trains, which needs data.", hint="Pass data (--data), or leave training out.")
        check_lessons(recipe.training)
    check_training(recipe.recover)
