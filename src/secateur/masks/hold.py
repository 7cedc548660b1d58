"""Masks held through the steps of an optimizer: what it reads, what it writes, what it remembers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# State that has a parameter's shape where that is a scalar, or that says how far to go rather than where: counters,
# the step sizes of Rprop, the running products of NAdam and ASGD. Zero would be a wrong value for them.
_NO_MOMENTS = frozenset({"step", "step_size", "eta", "mu", "mu_product"})


Dropped = tuple[nn.Parameter, Tensor]  # a parameter and a bool tensor, True = masked, that broadcasts to its shape


class Owner(Protocol):
    """What a hold needs of whoever owns the masks."""

    def dropped(self) -> Iterable[Dropped]:
        """Masked parameters, each with a bool tensor that is True at the masked places."""


class Hold:
    """Masks held through the steps of one optimizer, until ``remove()`` or the end of a ``with`` block.

    Zeroing the weights alone is not enough: momentum and the moments of Adam go on moving them, and a place that is
    taken up again later would start with the momentum of long ago. So before each step the masked gradients become
    0, and after it the masked weights +0.0 and the masked state 0.

    Made by `MaskHandle.hold`.
    """

    def __init__(self, owner: Owner, optimizer: Optimizer) -> None:
        self._owner = owner
        # The optimizer itself is not kept: it keeps the hooks, and would be kept alive by its own hold.
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        self.active = True

    def remove(self) -> None:
        """Let the optimizer move the masked weights again; they stay zero until it does."""
        self.active = False
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> Hold:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _before(
        self, optimizer: Optimizer, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        mask_gradients(self._mine(optimizer))

        def masking(closure: Callable[[], object]) -> Callable[[], object]:
            def masked() -> object:
                loss = closure()
                mask_gradients(self._mine(optimizer))
                return loss

            return masked

        # A closure makes new gradients inside the step, LBFGS several times: they are masked as it returns. The
        # first argument is the optimizer itself.
        wrapped = tuple(masking(arg) if callable(arg) else arg for arg in args[1:])
        return (*args[:1], *wrapped), {key: masking(arg) if callable(arg) else arg for key, arg in kwargs.items()}

    def _after(self, optimizer: Optimizer, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        mask_weights(self._mine(optimizer))
        mask_state(optimizer, self._mine(optimizer))

    def _mine(self, optimizer: Optimizer) -> Iterator[Dropped]:
        """Of the masked parameters those of this optimizer, which may have been given more since."""
        moved = moved_by(optimizer)
        return ((parameter, drop) for parameter, drop in self._owner.dropped() if id(parameter) in moved)


def moved_by(optimizer: Optimizer) -> set[int]:
    """Ids of the parameters of an optimizer."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def mask_weights(dropped: Iterable[Dropped]) -> None:
    """Write +0.0 into masked weights. A fill, not a product: a NaN times zero is a NaN, and -1 times zero is -0.0."""
    with torch.no_grad():
        for parameter, drop in dropped:
            parameter.masked_fill_(drop, 0.0)


def mask_gradients(dropped: Iterable[Dropped]) -> None:
    """Write 0 into masked gradients, dense or sparse."""
    for parameter, drop in dropped:
        gradient = parameter.grad
        if gradient is None:
            continue
        if gradient.layout == torch.sparse_coo:
            # Rows that occur several times (an embedding whose word came twice) are masked each on its own.
            rows = tuple(gradient._indices())
            gradient._values().masked_fill_(drop.expand(parameter.shape)[rows], 0)
        else:
            gradient.detach().masked_fill_(drop, 0)


def mask_state(optimizer: Optimizer, dropped: Iterable[Dropped]) -> None:
    """Write 0 into what an optimizer remembers of masked places: every state tensor of the parameter's shape."""
    for parameter, drop in dropped:
        for key, value in optimizer.state.get(parameter, {}).items():
            if key not in _NO_MOMENTS and isinstance(value, Tensor) and value.shape == parameter.shape:
                value.masked_fill_(drop, 0)


def forget(optimizer: Optimizer, dropped: Iterable[Dropped]) -> None:
    """After masks have changed: as `mask_state`; LBFGS starts anew.

    LBFGS keeps pairs of steps and changes of the gradient over all weights in one vector, with their products. With
    some places struck out the products would be wrong, and with them the direction of every later step.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.state.clear()
    else:
        mask_state(optimizer, dropped)
