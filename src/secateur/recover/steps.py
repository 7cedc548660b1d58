"""One recovery step of a recipe, run on a pruned model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from secateur.errors import RecipeError
from secateur.kinds.slices.cut import Cuts
from secateur.recover.bn import refresh_batchnorm
from secateur.recover.finetune import TrainStep, finetune
from secateur.solve.obs_update import obs_update
from secateur.solve.refit import refit_consumers
from secateur.types import Data, Loss

SGD_ONLY = ("momentum", "nesterov")


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
    layers: Mapping[str, Any] = field(default_factory=dict)


def recover(
    model: nn.Module,
    step: Mapping[str, Any],
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
        step: a step as a recipe holds it, with its defaults filled in.
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
    if damage.layers and step["method"] in ("refit", "obs_update"):
        raise RecipeError(
            f"recover: {step['method']} does not apply to whole layers.",
            why="it changes what reads the inputs that are gone, and layers hand on all of theirs",
            hint="Use finetune for layers.",
        )
    options = {key: value for key, value in step.items() if key != "method"}
    if step["method"] == "bn_refresh":
        refresh_batchnorm(model, train, step["batches"])
    elif step["method"] == "refit":
        if damage.masks:
            raise RecipeError(
                "recover: refit needs a cut.", why="masks leave every input in place", hint="Use finetune for masks."
            )
        if damage.cuts:
            refit_consumers(damage.original, model, scoring, cuts=damage.cuts, seed=seed, progress=progress, **options)
    elif step["method"] == "obs_update":
        obs_update(
            damage.original, model, scoring, cuts=damage.cuts, masks=damage.masks, loss=loss, seed=seed, **options
        )
    else:
        return _finetune(model, options, damage.masks, train, loss, seed, progress)
    return ()


def _finetune(
    model: nn.Module,
    options: Mapping[str, Any],
    masks: Mapping[str, Tensor],
    train: Data,
    loss: Loss | None,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[TrainStep, ...]:
    optimizer = options["optimizer"]
    if optimizer["name"] != "sgd":
        optimizer = {key: value for key, value in optimizer.items() if key not in SGD_ONLY}
    return finetune(
        model,
        train,
        loss,
        optimizer=optimizer,
        schedule=options["schedule"],
        warmup_steps=options["warmup_steps"],
        steps=options.get("steps"),
        epochs=options.get("epochs"),
        masks=masks or None,
        progress=progress,
        seed=seed,
    ).records
