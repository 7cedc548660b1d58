"""What brings a pruned network back, the same for every criterion; and new weights for the scratch control."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from secateur.apply.cut import Cuts
from secateur.errors import RecipeError, UnsupportedError
from secateur.files.seeds import seed_everything
from secateur.recover import finetune, refresh_batchnorm
from secateur.solve.refit import refit_consumers
from secateur.types import Batch, Data, Loss

SGD_ONLY = ("momentum", "nesterov")


@dataclass(frozen=True, eq=False)
class Damage:
    """What a plan did, as far as recovery needs it.

    Args:
        original: the model before.
        cuts: slices that are gone; empty for masks and for the dense model.
        masks: zeros that must stay; empty for cuts.
    """

    original: nn.Module
    cuts: Cuts
    masks: Mapping[str, Tensor]


def recover(
    model: nn.Module,
    step: Mapping[str, Any],
    damage: Damage,
    *,
    train: Data,
    scoring: Sequence[Batch],
    loss: Loss | None,
    seed: int,
) -> None:
    """Run one recovery step of a recipe in place.

    Args:
        model: the pruned model.
        step: as `check_steps` gives it.
        damage: what was pruned.
        train: batches to train with.
        scoring: batches to refit with, the ones that were scored.
        loss: of the training.
        seed: of the training and of the refit's samples.

    Raises:
        RecipeError: a step that a comparison does not know, or a refit of masks.
    """
    if step["method"] == "bn_refresh":
        refresh_batchnorm(model, train, step["batches"])
    elif step["method"] == "refit":
        if damage.masks:
            raise RecipeError(
                "refit needs a cut", why="masks leave every input in place", hint="use finetune for masks"
            )
        if damage.cuts:
            options = {key: value for key, value in step.items() if key != "method"}
            refit_consumers(damage.original, model, scoring, cuts=damage.cuts, seed=seed, **options)
    elif step["method"] == "finetune":
        _finetune(model, step, damage.masks, train, loss, seed)
    else:
        raise RecipeError(f"a comparison cannot run the recovery step {step['method']!r}")


def _finetune(
    model: nn.Module, step: Mapping[str, Any], masks: Mapping[str, Tensor], train: Data, loss: Loss | None, seed: int
) -> None:
    optimizer = step["optimizer"]
    if optimizer["name"] != "sgd":
        optimizer = {key: value for key, value in optimizer.items() if key not in SGD_ONLY}
    finetune(
        model,
        train,
        loss,
        optimizer=optimizer,
        schedule=step["schedule"],
        warmup_steps=step["warmup_steps"],
        steps=step.get("steps"),
        epochs=step.get("epochs"),
        masks=masks or None,
        seed=seed,
    )


def reinitialise(model: nn.Module, seed: int) -> None:
    """New weights of the same shapes, by every module's own ``reset_parameters``.

    Raises:
        UnsupportedError: a parameter that no module knows how to start; it is named.
    """
    known: set[int] = set()
    with seed_everything(seed):
        for module in model.modules():
            reset: Callable[[], None] | None = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
                known |= {id(parameter) for parameter in module.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in known:
            raise UnsupportedError(
                f"the scratch control cannot start {name!r} anew",
                why="its module has no reset_parameters()",
                hint="give the module one, or leave scratch out",
            )
