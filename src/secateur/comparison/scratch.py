"""New weights for the scratch control."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from secateur.errors import UnsupportedError
from secateur.files.seeds import seed_everything


def reinitialise(model: nn.Module, seed: int) -> None:
    """New weights of the same shapes, by every module's own ``reset_parameters``.

    Raises:
        UnsupportedError: a parameter that no module knows how to start; it is named.
    """
    known: set[int] = set()  # by identity: a tied parameter has two names, and is started once
    with seed_everything(seed):
        for module in model.modules():
            reset: Callable[[], None] | None = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
                known |= {id(parameter) for parameter in module.parameters()}
    # Trained weights that stayed would be an inheritance, which this control is to be without.
    for name, parameter in model.named_parameters():
        if id(parameter) not in known:
            raise UnsupportedError(
                f"the scratch control cannot start {name!r} anew",
                why="its module has no reset_parameters()",
                hint="give the module one, or leave scratch out",
            )
