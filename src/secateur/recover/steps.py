"""One recovery step of a recipe, run on a pruned model; and the same steps run on the model that was not pruned."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence

import torch
from pydantic import TypeAdapter
from torch import nn

from secateur.errors import RecipeError
from secateur.model.guard import generators
from secateur.planning.history import copy_to_go_on_with
from secateur.recipe.schema import REPEATABLE, BatchNormRefresh, Finetune, ObsUpdate, Refit, Step
from secateur.recipe.training import Lessons
from secateur.recover.adapters import AdapterSpec
from secateur.recover.bn import refresh_batchnorm
from secateur.recover.damage import Damage, untouched, warn_of_lost_zeros, zero_shares
from secateur.recover.distil import Distil
from secateur.recover.finetune import finetune
from secateur.recover.loop import Keeper, TrainStep
from secateur.recover.optimizers import build_optimizer, optimizers
from secateur.recover.rates import Rates
from secateur.recover.validation import divided
from secateur.solve.gaps import refit_gaps
from secateur.solve.obs_update import obs_update
from secateur.solve.refit import refit_consumers
from secateur.types import Data, Loss

_STEP: TypeAdapter[Step] = TypeAdapter(Step)


def recover(
    model: nn.Module,
    step: Step | Mapping[str, object],
    damage: Damage,
    *,
    train: Data,
    scoring: Data,
    loss: Loss | None,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    keeper: Keeper | None = None,
) -> tuple[TrainStep, ...]:
    """Run one recovery step of a recipe in place.

    Args:
        model: the pruned model.
        step: a step of a recipe, or a mapping with its keys; what is left out has its default.
        damage: what was pruned.
        train: batches to train with.
        scoring: batches for closed-form solutions, the ones that were scored.
        loss: of the training.
        seed: of the training and of whatever is drawn.
        progress: called as ``progress(done, total)``.
        keeper: keeps states of a training, and may have one to go on from.

    Returns:
        The optimizer steps, where the step trains.

    Raises:
        RecipeError: a step that does not fit what was pruned: obs_update for whole layers, refit for sub-blocks.
    """
    # Comparisons keep steps as plain data, which their addresses are made of.
    step = _STEP.validate_python(dict(step)) if isinstance(step, Mapping) else step
    if any(entry.get("stubs") for entry in damage.layers.values()) and isinstance(step, (ObsUpdate, Refit)):
        raise RecipeError(
            f"recover: {step.method} does not apply to sub-blocks (attention or MLP taken out of a layer).",
            why="closed forms are there for what reads inputs that are gone, and for gaps of whole blocks",
            hint="Use finetune, or remove whole layers (granularity layer).",
        )
    if damage.layers and (isinstance(step, ObsUpdate) or (isinstance(step, Refit) and step.what == "bias")):
        raise RecipeError(
            f"recover: {step.method}{', what: bias' * isinstance(step, Refit)} does not apply to whole layers.",
            why="it changes what reads the inputs that are gone, and layers hand on all of theirs",
            hint="Use refit (what: weights) or finetune for layers.",
        )
    zeros = zero_shares(model)
    records = _run(model, step, damage, train, scoring, loss, seed, progress, keeper)
    warn_of_lost_zeros(model, zeros, f"recover: {step.method}")
    return records


def _run(
    model: nn.Module,
    step: Step,
    damage: Damage,
    train: Data,
    scoring: Data,
    loss: Loss | None,
    seed: int,
    progress: Callable[[int, int], None] | None,
    keeper: Keeper | None,
) -> tuple[TrainStep, ...]:
    if isinstance(step, BatchNormRefresh):
        # It draws nothing itself, but a loader that shuffles does: model and control must see the same batches.
        with generators(seed):
            refresh_batchnorm(model, train, step.batches)
    elif isinstance(step, Refit):
        _refit(model, step, damage, scoring, seed, progress)
    elif isinstance(step, ObsUpdate):
        obs_update(
            damage.original,
            model,
            scoring,
            cuts=damage.cuts,
            masks=damage.masks,
            loss=loss,
            seed=seed,
            form=step.form,
            gradients=step.gradients,
            block_size=step.block_size,
            damping=step.damping,
        )
    else:
        return _finetune(model, step, damage, train, loss, seed, progress, keeper)
    return ()


def dense_control(
    original: nn.Module,
    steps: Sequence[Step],
    *,
    train: Data,
    loss: Loss | None,
    seed: int,
    training: Callable[[nn.Module], str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    keep: Callable[[int], Keeper | None] = lambda number: None,
) -> tuple[nn.Module, tuple[str, ...]]:
    """What the recovery steps would have made of the model without any pruning: the measure of their own part.

    More training makes many a model better, pruned or not. Only against this copy, which saw the same batches with
    the same seed, a gain over the original can be put down to pruning.

    Args:
        original: left as it is.
        steps: those of the recipe. The closed forms (refit, obs_update) make up for what is gone, and nothing is
            gone here: they are left out.
        train: batches to train with.
        loss: of the training.
        seed: of the training.
        training: trains the copy before the steps, as the pruned model was trained; returns the name of the step.
        progress: called as ``progress(done, total)``.
        keep: number of a step -> its keeper.

    Returns:
        the copy after the steps, and which they were.

    Cost: that of the steps on the unpruned model, and memory for its copy.
    """
    model = copy_to_go_on_with(original)
    first = () if training is None else (training(model),)
    repeated = [step for step in steps if step.method in REPEATABLE]
    damage = untouched(original)
    for number, step in enumerate(repeated):
        recover(
            model, step, damage, train=train, scoring=train, loss=loss, seed=seed, progress=progress,
            keeper=keep(number),
        )  # fmt: skip
    return model, (*first, *(step.method for step in repeated))


def _refit(
    model: nn.Module,
    step: Refit,
    damage: Damage,
    scoring: Data,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    ridge = None if step.ridge == "auto" else step.ridge
    # The dense model of a comparison goes through the same steps, and has nothing to make up for.
    if damage.layers:
        refit_gaps(
            damage.original, model, scoring, layers=damage.layers, masks=damage.masks, ridge=ridge, progress=progress
        )
    if damage.cuts or damage.made:
        refit_consumers(
            damage.original,
            model,
            scoring,
            cuts=damage.cuts,
            seed=seed,
            progress=progress,
            ridge=ridge,
            positions=step.positions,
            masks={name: mask for name, mask in damage.masks.items() if name in damage.made},
            zeros=damage.masks,
            what=step.what,
        )


def _finetune(
    model: nn.Module,
    step: Finetune,
    damage: Damage,
    train: Data,
    loss: Loss | None,
    seed: int,
    progress: Callable[[int, int], None] | None,
    keeper: Keeper | None,
) -> tuple[TrainStep, ...]:
    train, validation = (train, None) if step.holdout is None else divided(train, step.holdout)
    return finetune(
        model,
        train,
        loss,
        optimizer=optimizer_of(step),
        schedule=step.schedule,
        warmup_steps=step.warmup_steps,
        steps=step.steps,
        epochs=step.epochs,
        last_of=step.last_of,
        masks=damage.masks or None,
        accumulate=step.accumulate,
        amp=step.amp,
        validation=validation,
        best=step.best,
        patience=step.patience,
        teacher=None if step.distil is None else damage.original,
        distil=None if step.distil is None else Distil(**step.distil.model_dump()),
        cuts=damage.cuts,
        adapters=None if step.adapters is None else AdapterSpec(**step.adapters.model_dump()),
        keeper=keeper,
        progress=progress,
        seed=seed,
    ).records


def optimizer_of(step: Finetune | Lessons) -> dict[str, object]:
    """The optimizer of a step as `build_optimizer` takes it."""
    given = step.optimizer.model_dump()
    more = given.pop("options")
    options = {**given, **more}
    # The schema has their defaults for every optimizer; torch's other ones do not all take them.
    return options if step.optimizer.name.lower() == "sgd" else _taken(options, step)


def _taken(options: dict[str, object], step: Finetune | Lessons) -> dict[str, object]:
    # weight_decay 0 is what is meant by leaving it out, and not AdamW's own default of 0.01.
    own = {"name", "lr", *step.optimizer.options}
    return {k: v for k, v in options.items() if k in own or (k == "weight_decay" and _decays(step.optimizer.name, v))}


def _decays(name: str, value: object) -> bool:
    kind = optimizers().get(name.lower())
    return bool(value) or (kind is not None and "weight_decay" in inspect.signature(kind).parameters)


def check_training(steps: Sequence[Step]) -> None:
    """Look up optimizers and schedules of recovery steps before anything long starts.

    Raises:
        RecipeError: an unknown name or option.
    """
    for step in steps:
        if isinstance(step, Finetune):
            built = build_optimizer(optimizer_of(step), [nn.Parameter(torch.zeros(2, 2))])
            Rates(built, step.schedule, total=100, passes=10, warmup=step.warmup_steps)
