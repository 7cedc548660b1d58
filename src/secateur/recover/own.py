"""A training loop of the user's, with masks held around whatever optimizers it makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from secateur.errors import InputError, NonFiniteError, RecipeError
from secateur.masks import mask_model
from secateur.model.guard import guard

Train = Callable[[nn.Module], object]
"""``train(model)``: any loop that trains a model in place."""


def require_loop(train: object) -> None:
    """Refuse what cannot be called, before anything long starts.

    Raises:
        RecipeError: it is no function.
    """
    if not callable(train):
        what = f"train= is no function ({type(train).__name__})"
        raise RecipeError(what, hint="a function that trains the model it is given")


def own_training(model: nn.Module, train: Train, masks: Mapping[str, Tensor], *, seed: int) -> None:
    """Run a loop of the user's on a model, in place; masked weights are +0.0 after every step of any optimizer.

    Args:
        model: in train mode at the start; its modes are put back. On an error it is as it was.
        train: called with the model. What it returns is not looked at.
        masks: parameter name -> bool, True = keep.
        seed: of the global generators, which are put back.

    Raises:
        InputError: it replaced parameters that are masked, or changed the structure of the model.
        NonFiniteError: a weight is NaN or infinite afterwards.
    """
    require_loop(train)
    with guard(model, mode="train", gradients=True, seed=seed, rollback=True):
        before = [id(parameter) for parameter in model.parameters()]
        handle = mask_model(model, dict(masks), keep_originals=False)
        held: set[Optimizer] = set()
        own = set(before)

        def hold(optimizer: Optimizer, _args: object, _kwargs: object) -> None:
            moved = {id(one) for group in optimizer.param_groups for one in group["params"]}
            if masks and optimizer not in held and moved & own:
                held.add(optimizer)
                handle.hold(optimizer)

        # Of all optimizers of the process, since the loop makes its own; only those of this model are held.
        hook = register_optimizer_step_pre_hook(hold)
        try:
            train(model)
        finally:
            hook.remove()
        if [id(parameter) for parameter in model.parameters()] != before:
            raise InputError(
                "train= replaced parameters of the model", hint="train the model that it is given, in place"
            )
        handle.enforce()
        for name, parameter in model.named_parameters():
            if not parameter.detach().isfinite().all():
                raise NonFiniteError(f"{name!r} has NaN or Inf after train=", why="the model is as it was before it")
