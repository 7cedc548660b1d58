"""Movement: weights that training moves towards zero matter least."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from secateur.criteria.accumulator import Accumulator, State
from secateur.criteria.base import Context, register
from secateur.criteria.gradients.loss_gradient import (
    CoupledCriterion,
    accumulable,
    backward,
    refuse_unused,
    require_finite_gradient,
    walk,
)
from secateur.errors import InputError, RecipeError
from secateur.registry import listed
from secateur.types import Batch


class MovementAccumulator:
    """Sums up -g w while you train; call `observe` after every backward pass, before the optimiser's step.

    It reads the gradients that your loop has anyway. Call it once per optimiser step: when gradients of
    several batches are accumulated, after the last of them; under automatic mixed precision after unscaling.
    Under a mask the published score takes the gradient with respect to the *masked* weight, g' = dL/d(w m), and
    the weight without mask; with plain weights that were set to zero g w is zero, so that removed weights keep
    the score that they had.

    Args:
        model: the model that is trained.
        names: the parameters to watch; None watches all that require gradients.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> _ = layer.weight.data.fill_(2.0)
        >>> movement = MovementAccumulator(layer)
        >>> layer(torch.ones(1, 1)).sum().backward()
        >>> movement.observe()
        >>> movement.sums["weight"].item(), movement.steps
        (-2.0, 1)
    """

    def __init__(self, model: nn.Module, names: Iterable[str] | None = None) -> None:
        known = dict(model.named_parameters())
        chosen = [n for n, p in known.items() if p.requires_grad] if names is None else list(names)
        unknown = [name for name in chosen if name not in known]
        if unknown:
            raise RecipeError(f"the model has no parameter {listed(unknown)}")
        self._watched = {name: known[name] for name in chosen}
        self.sums: dict[str, Tensor] = {}
        self.steps = 0

    @torch.no_grad()
    def observe(self, gradients: Mapping[str, Tensor] | None = None) -> None:
        """Add -g w of this step.

        Args:
            gradients: by parameter name; None takes ``parameter.grad``. Parameters without one are passed over.

        Raises:
            NonFiniteError: a gradient with NaN or Inf; nothing of this step is added.
        """
        step: dict[str, Tensor] = {}
        for name, parameter in self._watched.items():
            gradient = parameter.grad if gradients is None else gradients.get(name)
            if gradient is not None:
                value = accumulable(gradient)
                require_finite_gradient(value, name)
                step[name] = value * accumulable(parameter)
        for name, value in step.items():
            self.sums[name] = self.sums[name] - value if name in self.sums else -value
        self.steps += 1

    def state_dict(self) -> dict[str, object]:
        """The sums and the number of steps, to go on after an interruption."""
        return {"sums": dict(self.sums), "steps": self.steps}

    def load_state_dict(self, state: State) -> None:
        """Go on from a saved state.

        Raises:
            InputError: it is no state of an accumulator of these parameters.
        """
        sums, steps = state.get("sums"), state.get("steps")
        if not isinstance(sums, Mapping) or not isinstance(steps, int):
            raise InputError("this is no state of a movement accumulator", hint="give what state_dict() returned")
        for name, value in sums.items():
            if name not in self._watched or value.shape != self._watched[name].shape:
                raise InputError(
                    f"the saved movement of {name!r} belongs to no watched parameter",
                    hint="load it for the same model and the same names",
                )
        # On the device of the parameters: a checkpoint is often read on the CPU.
        self.sums = {name: value.to(self._watched[name].device) for name, value in sums.items()}
        self.steps = steps


@register
@dataclass(frozen=True, kw_only=True)
class Movement(CoupledCriterion):
    """Score a weight by -sum_t g_t w_t over training steps t: positive where the weight moved away from zero.

    The idea: when a pretrained model is fine-tuned, magnitudes still tell what mattered for pretraining; the
    direction in which the new task pushes a weight tells what it needs. A bad choice without fine-tuning
    (after few steps it is the signed slope, times the number of steps), and at low sparsity, where magnitude
    is as good.

    Give the `MovementAccumulator` of your own training loop. Without one, the criterion trains a *copy* of the
    model: plain gradient descent over the data in eval mode. (In train mode the sum of g w over a filter in
    front of a batch norm is zero whatever the filter is worth, so that channels would be scored by noise.)

    Args:
        accumulator: what was observed in your loop; None trains a copy. It is no option: a plan says "movement", and
            not what was observed.
        steps: gradient descent steps on the copy, through the data as often as needed; None is one walk
            through the data.
        lr: learning rate of these steps.
        coupled: "all" weights that go with the unit, "out" the producing ones, "in" the consuming ones. Their
            movements are added with their signs.
        normalize: "none"; "mean" and "l2" divide by the group's mean |score| and L2 norm.
        frozen: "error" refuses parameters with requires_grad=False, "score" scores them all the same.
        unused: "error" refuses parameters that no step gave a gradient, "zero" scores them 0.

    Raises:
        RecipeError: no data and no accumulator, an accumulator without steps, or numbers out of range.
        InputError: frozen or unused parameters; the message names them.
        NonFiniteError: the loss or a gradient is NaN or Inf (too large a learning rate?).

    Cost:
        One product per weight and training step of an accumulator, else one forward and backward pass per step and a
        copy of the model.

    Source:
        Sanh, Wolf, Rush, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", 2020, section 4, equation 2
        (there S = -lr sum g w; the factor does not change the order).

    Example:
        >>> from secateur.types import Group, Span
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[2.0, -1.0]]))
        >>> movement = MovementAccumulator(layer)
        >>> layer(torch.tensor([[-1.0, -3.0]])).sum().backward()  # pushes both weights up
        >>> movement.observe()
        >>> group = Group("weight", "element", (1, 2), (Span("weight", None, "self"),))
        >>> Movement(accumulator=movement).score(Context(layer, [group]))["weight"]
        tensor([[ 2., -3.]])
    """

    name: ClassVar[str] = "movement"
    summary: ClassVar[str] = "weights that training moves towards zero matter least: -sum of g w"
    needs: ClassVar[frozenset[str]] = frozenset({"data", "labels", "gradients", "training"})
    speed: ClassVar[str] = "medium: one epoch over the scoring data; free inside your own training loop"
    best_for: ClassVar[str] = "fine-tuning a pretrained model, at high sparsity"
    comparable: ClassVar[bool] = True
    live: ClassVar[frozenset[str]] = frozenset({"accumulator"})

    accumulator: Accumulator | None = None
    steps: int | None = None
    lr: float = 1e-3

    def __post_init__(self) -> None:
        """Refuse unknown words and numbers out of range."""
        super().__post_init__()
        if self.steps is not None and self.steps < 1:
            raise RecipeError(f"steps={self.steps} of movement", hint="use at least 1")
        if not self.lr > 0:
            raise RecipeError(f"lr={self.lr} of movement", hint="use a positive learning rate")
        if self.accumulator is not None and self.accumulator.steps == 0:
            raise RecipeError("the movement accumulator has seen no step", hint="call observe() after backward()")

    def contributions(self, context: Context) -> dict[str, Tensor]:
        """The accumulated -g w."""
        parameters = self.trainable(context)
        accumulator = self.accumulator or self._trained(context, list(parameters))
        return self.complete(accumulator.sums, parameters)

    def _check(self, context: Context) -> None:
        observed = self.accumulator is not None and context.data is None
        super()._check(replace(context, data=()) if observed else context)

    def _trained(self, context: Context, names: list[str]) -> Accumulator:
        model = copy.deepcopy(context.model).eval()
        parameters = [model.get_parameter(name) for name in names]
        optimizer = torch.optim.SGD(parameters, lr=self.lr)
        accumulator = MovementAccumulator(model, names)
        own = replace(context, model=model)
        for number, batch in enumerate(_endless(own, self.steps)):
            optimizer.zero_grad()
            backward(own, batch, number)
            accumulator.observe()
            optimizer.step()
        refuse_unused([n for n in names if n not in accumulator.sums] if self.unused == "error" else [])
        return accumulator


def _endless(context: Context, steps: int | None) -> Iterator[Batch]:
    """So many batches, through the data again and again; once through it for None."""
    done = 0
    while steps is None or done < steps:
        for batch, _ in walk(context):
            yield batch
            done += 1
            if done == steps:
                return
        if steps is None:
            return
