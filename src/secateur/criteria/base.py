"""What every criterion is: numbers per unit, higher = keep, computed without leaving a trace on the model.

Most criteria are additive: a unit is worth the sum (mean, maximum) of what its elements are worth. They
implement `contributions`, one tensor per parameter, and the base class reduces it over the spans of every
group. The others override `_score`.
"""

from __future__ import annotations

import sys
from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from secateur.criteria.docstrings import section
from secateur.errors import InputError, RecipeError
from secateur.model.call import default_loss
from secateur.model.carried import refuse_carried_masks
from secateur.model.guard import guard
from secateur.model.tensors import named_tensors, require_finite
from secateur.registry import Registry, option_names, suggestion
from secateur.types import Data, Example, Group, Json, Loss

Reduction = Literal["sum", "mean", "max"]
NEEDS = frozenset({"data", "labels", "gradients", "training"})
STATED = ("name", "summary", "speed", "best_for")  # class variables that every criterion gives a value
DOCUMENTED = ("Cost", "Source")  # sections that its docstring has
PROMISES = frozenset({"permutation", "batch_split", "zero_lowest"})
TINY = 1e-15  # below it the squares of float32 numbers begin to vanish


@dataclass(frozen=True)
class Context:
    """What a criterion may look at.

    Args:
        model: the model; a criterion leaves it as it found it.
        groups: the units to score.
        data: batches, where the criterion needs them; may be walked through more than once.
        loss: ``loss(model, batch) -> scalar``; if a criterion needs one and none is given, `default_loss` of
            (input, target) and labelled batches is taken.
        example: example inputs of the model.
        seed: everything random follows from it.
        capture: the structure engine's record of one forward pass, where it was made.
        progress: called as ``progress(done, total)``, total 0 = unknown.
    """

    model: nn.Module
    groups: Sequence[Group]
    data: Data | None = None
    loss: Loss | None = None
    example: Example = None
    seed: int = 0
    capture: Any = None
    progress: Callable[[int, int], None] | None = None


class Criterion(ABC):
    """A rule that says what matters least.

    Options are keyword-only constructor arguments, stored as attributes of the same name (a frozen
    keyword-only dataclass does both). A subclass states the class variables below, says in its docstring what it
    costs ("Cost:") and where it comes from ("Source:"), and implements `contributions` (additive) or `_score`.

    `needs` says what the context must hold, `mode` the mode in which the model is scored. `promises` are
    properties that the contract suite then tests: "permutation" (units that are reordered take their scores
    with them), "batch_split" (the same samples in other batches score the same), "zero_lowest" (no unit
    scores below one whose weights and activations are all zero). `live` names constructor arguments that no recipe
    can write and no plan can hold, for example an `Accumulator`; they are no options.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    speed: ClassVar[str]
    granularities: ClassVar[tuple[str, ...]] = ("any",)
    best_for: ClassVar[str]
    mode: ClassVar[Literal["eval", "train"]] = "eval"
    comparable: ClassVar[bool] = False  # scores of different layers share one scale, for example a loss change
    promises: ClassVar[frozenset[str]] = frozenset({"permutation"})
    live: ClassVar[frozenset[str]] = frozenset()  # constructor arguments that are objects of a running program

    @property
    def reduction(self) -> Reduction:
        """How the elements of a unit are put together."""
        return "sum"

    @property
    def squared(self) -> bool:
        """Whether the squares of the contributions are reduced."""
        return False

    @property
    def roles(self) -> frozenset[str] | None:
        """Roles of the spans that count; None stands for all but "state"."""
        return None

    def contributions(self, context: Context) -> dict[str, Tensor]:
        """What every element is worth: parameter name -> tensor of the parameter's shape.

        Tensors that are left out do not count; ``self.weights(context)`` gives those that can.
        """
        raise TypeError(f"{type(self).__name__} implements neither contributions nor _score")

    def finish(self, values: Tensor) -> Tensor:
        """Last step from the reduced contributions to the score (a root, a division by two)."""
        return values

    def options(self) -> dict[str, Json]:
        """The constructor's arguments as plain data; ``type(c)(**c.options()) == c``, save for what is `live`."""
        return {name: getattr(self, name) for name in option_names(type(self))}

    def score(self, context: Context) -> dict[str, Tensor]:
        """Score the units of every group.

        Args:
            context: model, groups, and the data and loss that `needs` asks for.

        Returns:
            Group name -> float32 tensor of the group's shape, higher = keep; all values finite.

        Raises:
            RecipeError: a granularity that the criterion cannot score, or data is missing.
            NonFiniteError: NaN or Inf in a weight or in a score; names the tensor and the first index.
        """
        self._check(context)
        if not context.groups:
            return {}
        if "labels" in self.needs and context.loss is None:
            context = replace(context, loss=default_loss)
        gradients = "gradients" in self.needs
        # Out of inference mode, whoever calls: what a criterion makes there could have no gradient.
        with torch.inference_mode(False), self._guard(context, gradients=gradients):
            scores = self._score(context)
        return {group.name: self._checked(scores, group) for group in context.groups}

    def _guard(self, context: Context, *, gradients: bool | None = None) -> AbstractContextManager[None]:
        """The model as it is scored, and given back as it was."""
        return guard(context.model, mode=self.mode, gradients=gradients, seed=context.seed, example=context.example)

    def weights(self, context: Context) -> dict[str, Tensor]:
        """Parameters that count for some group, by name, detached, in the order of the groups."""
        known = named_tensors(context.model)
        spans = (span for group in context.groups for span in group.spans)
        return {s.tensor: known[s.tensor].detach() for s in spans if counts(s.role, self.roles)}

    def _score(self, context: Context) -> dict[str, Tensor]:
        values = self.contributions(context)
        # In single precision at once: sums and roots in double precision of all single weights would be twice the
        # size of the model.
        return {
            g.name: self.finish(reduce_spans(values, g, self.reduction, roles=self.roles, squared=self.squared)).float()
            for g in context.groups
        }

    def _check(self, context: Context) -> None:
        refuse_carried_masks(context.model)
        for group in context.groups:
            if "any" not in self.granularities and group.granularity not in self.granularities:
                raise RecipeError(
                    f"{self.name!r} cannot score {group.granularity!r} units (group {group.name!r})",
                    hint=f"it scores: {', '.join(self.granularities)}",
                )
        if self.needs & {"data", "labels"} and context.data is None:
            raise RecipeError(f"criterion {self.name!r} needs data", hint="pass data=, an iterable of batches")
        known = named_tensors(context.model)
        for name in dict.fromkeys(span.tensor for group in context.groups for span in group.spans):
            if name not in known:
                raise InputError(f"the model has no tensor {name!r}", hint=suggestion(name, known))
            require_finite(known[name], name)

    def _checked(self, scores: Mapping[str, Tensor], group: Group) -> Tensor:
        score = scores[group.name].detach().to(torch.float32).contiguous()
        if tuple(score.shape) != tuple(group.shape):
            raise TypeError(f"{self.name}: score of {group.name!r} is {tuple(score.shape)}, not {group.shape}")
        require_finite(score, group.name, what=f"score ({self.name})")
        return score


CRITERIA: Registry[type[Criterion]] = Registry("criterion", "criteria")
C = TypeVar("C", bound=Criterion)


def register(cls: type[C]) -> type[C]:
    """Class decorator: make a criterion known under its name.

    Raises:
        TypeError: a class variable or a section of the docstring is missing, a class variable holds an unknown word,
            or the name is taken.
    """
    for attribute in STATED:
        if not getattr(cls, attribute, ""):
            raise TypeError(f"{cls.__name__}.{attribute} is empty")
    for title in DOCUMENTED:
        if sys.flags.optimize < 2 and not section(cls, title):  # -OO takes all docstrings away
            raise TypeError(f"the docstring of {cls.__name__} has no section {title!r}")
    if not cls.needs <= NEEDS or not cls.promises <= PROMISES:
        raise TypeError(f"{cls.__name__}: needs are {sorted(NEEDS)}, promises {sorted(PROMISES)}")
    return CRITERIA.register(cls.name)(cls)


names = CRITERIA.names


def get(criterion: str | Criterion, options: Mapping[str, object] | None = None) -> Criterion:
    """A criterion by name, or the object itself.

    Args:
        criterion: a registered name, or a `Criterion`.
        options: constructor arguments, with a name only.

    Raises:
        RecipeError: unknown name or option; the hint names the nearest one.

    Example:
        >>> get("magnitude", {"norm": "l2"}).options()["norm"]
        'l2'
    """
    if isinstance(criterion, Criterion):
        if options:
            raise RecipeError("options go with the name of a criterion, not with an object")
        return criterion
    return CRITERIA.build(criterion, options)


def counts(role: str, roles: frozenset[str] | None) -> bool:
    """Whether spans of a role count; None stands for all but "state"."""
    return role != "state" if roles is None else role in roles


def reduce_spans(
    values: Mapping[str, Tensor],
    group: Group,
    how: Reduction = "sum",
    *,
    roles: frozenset[str] | None = None,
    squared: bool = False,
) -> Tensor:
    """Reduce element values to one value per unit.

    Args:
        values: tensor name -> value of each element, of the tensor's shape. Spans of tensors that are not
            in here do not count.
        group: the units and where they live.
        how: "sum", "mean" over the counted elements of the unit, or "max". A unit without any gets 0.
        roles: roles of the spans that count; None stands for all but "state".
        squared: reduce the squares of the values (sum or mean), which are never stored.

    Returns:
        Tensor of ``group.shape`` on the device of the values: float64, or for granularity element (a span
        without index) the values as they are.

    Raises:
        InputError: no span of the group counts.

    Cost:
        One pass over the counted elements; nothing of the size of a tensor is allocated for channels.
    """
    spans = [s for s in group.spans if s.tensor in values and counts(s.role, roles)]
    if not spans:
        raise InputError(
            f"no tensor of group {group.name!r} has a value for this criterion",
            hint="choose another criterion, or count every coupled tensor",
        )
    if spans[0].index is None:
        whole = values[spans[0].tensor].reshape(group.shape)
        return whole.to(torch.float64).square() if squared else whole
    # Units are gathered on the CPU: atomics on a GPU add in changing order, and plans must be reproducible.
    total = torch.full((group.size,), -torch.inf if how == "max" else 0.0, dtype=torch.float64)
    count = torch.zeros(group.size, dtype=torch.float64)
    for span in spans:
        value = values[span.tensor].detach()
        index = (span.index if span.index is not None else torch.arange(value.numel()).view(value.shape)).cpu()
        dims = [d for d in range(value.dim()) if index.shape[d] == 1 and value.shape[d] != 1]
        times = float(np.prod([value.shape[d] for d in dims]))
        value = _along(value, dims, how, squared=squared)
        flat, unit = value.cpu().to(torch.float64).flatten(), index.flatten()
        if bool((unit < 0).any()):
            flat, unit = flat[unit >= 0], unit[unit >= 0]
        if how == "max":
            total.scatter_reduce_(0, unit, flat, "amax")
        else:
            total.index_add_(0, unit, flat)
        count += times * torch.bincount(unit, minlength=group.size)
    if how == "mean":
        total /= count.clamp(min=1)
    total[count == 0] = 0.0
    return total.view(group.shape).to(values[spans[0].tensor].device)


def _along(value: Tensor, dims: list[int], how: Reduction, *, squared: bool) -> Tensor:
    """Reduce the dimensions that no unit depends on."""
    if squared:
        wide = value if value.dtype in (torch.float32, torch.float64) else value.to(torch.float32)
        norm = torch.linalg.vector_norm(wide, 2, dims, True).to(torch.float64) if dims else wide.to(torch.float64)
        if dims and not bool(torch.isfinite(norm).all() & (norm > TINY).all()):  # squares that leave float32
            norm = torch.linalg.vector_norm(wide.to(torch.float64), 2, dims, True)
        return norm.square()
    if not dims:
        return value
    return value.amax(dims, True) if how == "max" else value.sum(dims, True, dtype=torch.float64)
