"""One recovery step of a recipe, run on a pruned model; and the same steps run on the model that was not pruned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from secateur.errors import RecipeError
from secateur.kinds.slices.cut import Cuts, cut_copy
from secateur.recipe.schema import REPEATABLE, BatchNormRefresh, Finetune, ObsUpdate, Refit, Step
from secateur.recover.bn import refresh_batchnorm
from secateur.recover.finetune import TrainStep, finetune
from secateur.solve.obs_update import obs_update
from secateur.solve.refit import refit_consumers
from secateur.types import Data, Loss

SGD_ONLY = ("momentum", "nesterov")
_STEP: TypeAdapter[Step] = TypeAdapter(Step)


@dataclass(frozen=True, eq=False)
class Damage:
    """What a plan did, as far as recovery needs it.

    Args:
        original: the model before.
        cuts: slices that are gone; empty for masks and for the dense model.
        masks: zeros that must stay; empty for cuts.
        layers: whole layers that are gone; empty for everything else.
    """

    original: nn.Module
    cuts: Cuts
    masks: Mapping[str, Tensor]
    layers: Mapping[str, object] = field(default_factory=dict)


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

    Returns:
        The optimizer steps, where the step trains.

    Raises:
        RecipeError: a step that does not fit what was pruned: a refit of masks, or a closed form for whole layers.
    """
    # Comparisons keep steps as plain data, which their addresses are made of.
    step = _STEP.validate_python(dict(step)) if isinstance(step, Mapping) else step
    if damage.layers and isinstance(step, Refit | ObsUpdate):
        raise RecipeError(
            f"recover: {step.method} does not apply to whole layers.",
            why="it changes what reads the inputs that are gone, and layers hand on all of theirs",
            hint="Use finetune for layers.",
        )
    if isinstance(step, BatchNormRefresh):
        # It draws nothing itself, but a loader that shuffles does: model and control must see the same batches.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
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
        return _finetune(model, step, damage.masks, train, loss, seed, progress)
    return ()


def dense_control(
    original: nn.Module,
    steps: Sequence[Step],
    *,
    train: Data,
    loss: Loss | None,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
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
        progress: called as ``progress(done, total)``.

    Returns:
        the copy after the steps, and which they were.

    Cost: that of the steps on the unpruned model, and memory for its copy.
    """
    model = cut_copy(original, {}, {})
    # cut_copy and not deepcopy: it knows the modules that a plain copy breaks.
    repeated = [step for step in steps if step.method in REPEATABLE]
    untouched = Damage(original, {}, {})
    for step in repeated:
        recover(model, step, untouched, train=train, scoring=train, loss=loss, seed=seed, progress=progress)
    return model, tuple(step.method for step in repeated)


def _refit(
    model: nn.Module,
    step: Refit,
    damage: Damage,
    scoring: Data,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    if damage.masks:
        raise RecipeError(
            "recover: refit needs a cut.", why="masks leave every input in place", hint="Use finetune for masks."
        )
    # The dense model of a comparison goes through the same steps, and has nothing to make up for.
    if damage.cuts:
        refit_consumers(
            damage.original,
            model,
            scoring,
            cuts=damage.cuts,
            seed=seed,
            progress=progress,
            ridge=step.ridge,
            positions=step.positions,
        )


def _finetune(
    model: nn.Module,
    step: Finetune,
    masks: Mapping[str, Tensor],
    train: Data,
    loss: Loss | None,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[TrainStep, ...]:
    optimizer = step.optimizer.model_dump()
    # The schema has their defaults for every optimizer; torch's other ones do not take them.
    if step.optimizer.name != "sgd":
        optimizer = {key: value for key, value in optimizer.items() if key not in SGD_ONLY}
    return finetune(
        model,
        train,
        loss,
        optimizer=optimizer,
        schedule=step.schedule,
        warmup_steps=step.warmup_steps,
        steps=step.steps,
        epochs=step.epochs,
        masks=masks or None,
        progress=progress,
        seed=seed,
    ).records
