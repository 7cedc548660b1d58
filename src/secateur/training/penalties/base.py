"""What every penalty is: a number to add to the loss, or a step after that of the optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from secateur.errors import InputError, RecipeError
from secateur.kinds.weights import parse
from secateur.masks.hold import moved_by
from secateur.model.admit import admit
from secateur.model.protect import patterns_of
from secateur.registry import Registry, one_of, real_number
from secateur.training.settings import listed_optimizers
from secateur.types import Example, Protect

Method = Literal["subgradient", "proximal"]


class Penalty(ABC):
    """Makes some parameters of a model pay for their size while your loop trains it.

    With an optimizer it needs no further call: its gradient joins those of the loss just before every step
    ("subgradient"), or the weights are shrunk just after it ("proximal", which reaches exact zeros). Without one, add
    ``penalty()`` to the loss, or call ``penalty.step(lr)`` after the optimizer's step.

    Args:
        model: trained by your loop.
        example: what one forward takes, where units have to be found.
        strength: factor of the penalty.
        method: "subgradient" or "proximal".
        optimizer: what moves the parameters.
        protect: what does not pay, as for `secateur.plan`.

    Raises:
        RecipeError: a word or number out of range, or a method that the penalty does not have.
        InputError: nothing of the model would pay, or the optimizer moves none of it.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    methods: ClassVar[tuple[str, ...]] = ("subgradient", "proximal")
    follows_cuts: ClassVar[bool] = True  # whether what pays can be found anew in a model that was cut

    def __init__(
        self,
        model: nn.Module,
        example: Example = None,
        *,
        strength: float,
        method: Method = "subgradient",
        optimizer: Optimizer | None = None,
        protect: Protect = (),
    ) -> None:
        one_of("method", method, self.methods)
        self.model, self.example = admit(model), example
        self.strength = real_number(f"{self.name}: strength", strength)
        self.method, self.protect = method, patterns_of(self.model, protect)
        self.paying: dict[str, nn.Parameter] = self._paying()
        if not self.paying:
            raise InputError(f"nothing of {type(self.model).__name__} pays for {self.name!r}", hint="check protect")
        self._shapes = self._shapes_now()
        self._hooks: list[RemovableHandle] = []
        if optimizer is not None:
            self.hold(optimizer)

    # -- what a subclass says ---------------------------------------------------------------------------------

    def _paying(self) -> dict[str, nn.Parameter]:
        """The parameters that pay, by name; all prunable weights unless a subclass says otherwise."""
        groups, _ = parse("element").found(self.model, self.protect, self.example)
        return {group.name: self.model.get_parameter(group.name) for group in groups}

    @abstractmethod
    def cost(self) -> Tensor:
        """What is paid at strength 1: a scalar with a gradient."""

    def shrink(self, rates: Mapping[str, float]) -> None:
        """The proximal step of strength times learning rate, for every parameter that pays.

        Args:
            rates: name of the parameter -> strength times learning rate.
        """
        raise RecipeError(f"{self.name!r} has no proximal step.", hint='method="subgradient"')

    # -- in the loop ------------------------------------------------------------------------------------------

    def __call__(self) -> Tensor:
        """What to add to the loss."""
        self._follow()
        return self.strength * self.cost()

    def step(self, lr: float) -> None:
        """Shrink the weights, after the optimizer's step at this learning rate."""
        self._follow()
        with torch.no_grad():
            self.shrink(dict.fromkeys(self.paying, self.strength * lr))

    def hold(self, optimizer: Optimizer) -> None:
        """Join every step of an optimizer from now on.

        Raises:
            InputError: it moves none of the parameters that pay.
        """
        (optimizer,) = listed_optimizers([optimizer])
        moved = moved_by(optimizer)
        if not any(id(parameter) in moved for parameter in self.paying.values()):
            raise InputError(f"the optimizer moves nothing that pays for {self.name!r}")
        hooks = (optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after))
        self._hooks += hooks

    def remove(self) -> None:
        """Let the optimizer go."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _shapes_now(self) -> dict[str, torch.Size]:
        return {name: parameter.shape for name, parameter in self.paying.items()}

    def _follow(self) -> None:
        """Find what pays anew where the model was cut meanwhile: its units have other numbers then."""
        if self._shapes_now() == self._shapes:
            return
        if not self.follows_cuts:
            raise InputError(
                f"the model was cut while {self.name!r} was paid",
                why="the units that it was made for have other numbers now",
                hint="end the penalty before you cut, and make it anew",
            )
        self.paying = self._paying()
        self._shapes = self._shapes_now()

    def _before(self, *_: object) -> None:
        if self.method != "subgradient":
            return
        self._follow()
        paying = [parameter for parameter in self.paying.values() if parameter.requires_grad]
        with torch.enable_grad():
            gradients = torch.autograd.grad(self(), paying, allow_unused=True)
        for parameter, gradient in zip(paying, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def _after(self, optimizer: Optimizer, *_: object) -> None:
        if self.method != "proximal":
            return
        self._follow()
        lr = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        with torch.no_grad():
            self.shrink({n: self.strength * lr[id(p)] for n, p in self.paying.items() if id(p) in lr})


PENALTIES: Registry[type[Penalty]] = Registry("penalty", "penalties")
P = TypeVar("P", bound=Penalty)
names = PENALTIES.names


def register(cls: type[P]) -> type[P]:
    """Class decorator: make a penalty known under its name."""
    return PENALTIES.register(cls.name)(cls)


def penalty(name: str, model: nn.Module, example: Example = None, **options: object) -> Penalty:
    """A penalty by name, on a model.

    Args:
        name: l1, l2, slimming, group_lasso, growing, gates or hard_concrete.
        model: trained by your loop.
        example: what one forward takes, where units have to be found.
        **options: of the penalty: strength, method, optimizer, protect, and its own.

    Raises:
        RecipeError: an unknown name or option.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        >>> float(penalty("slimming", net, strength=0.5)().detach())
        1.0
    """
    return PENALTIES.build(name, {"model": model, "example": example, **options})


def soft_threshold(parameter: Tensor, amount: float) -> None:
    """Move every element towards 0 by an amount, in place; those that would pass it become +0.0."""
    size = parameter.abs() - amount
    parameter.copy_(torch.where(size > 0, size.copysign(parameter), torch.zeros_like(parameter)))
