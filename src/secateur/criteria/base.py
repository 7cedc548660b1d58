"""What every criterion is: numbers per unit, higher = keep, computed without leaving a trace on the model.

Most criteria are additive: a unit is worth the sum (mean, maximum) of what its elements are worth. They
implement `contributions`, one tensor per parameter, and the base class reduces it over the spans of every
group. The others override `_score`.
"""

from __future__ import annotations

import random
from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import InputError, RecipeError
from secateur.model.call import default_loss
from secateur.model.tensors import named_tensors, require_finite
from secateur.registry import Registry, option_names, suggestion
from secateur.types import Data, Example, Group, Loss

Reduction = Literal["sum", "mean", "max"]
NEEDS = frozenset({"data", "labels", "gradients", "training"})
PROMISES = frozenset({"permutation", "batch_split", "zero_lowest"})
CHUNK = 65_536  # elements that are squared at a time
TINY = 1e-15  # below it the squares of float32 numbers begin to vanish
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


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
    keyword-only dataclass does both). A subclass states the class variables below and implements
    `contributions` (additive) or `_score`.

    `needs` says what the context must hold, `mode` the mode in which the model is scored. `promises` are
    properties that the contract suite then tests: "permutation" (units that are reordered take their scores
    with them), "batch_split" (the same samples in other batches score the same), "zero_lowest" (no unit
    scores below one whose weights and activations are all zero).
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    complexity: ClassVar[str]
    speed: ClassVar[str]
    granularities: ClassVar[tuple[str, ...]] = ("any",)
    best_for: ClassVar[str]
    source: ClassVar[str]
    mode: ClassVar[Literal["eval", "train"]] = "eval"
    comparable: ClassVar[bool] = False  # scores of different layers share one scale, for example a loss change
    promises: ClassVar[frozenset[str]] = frozenset({"permutation"})

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

    def options(self) -> dict[str, Any]:
        """The constructor's arguments, so that ``type(c)(**c.options()) == c``."""
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
        model = context.model
        with untouched(model, seed=context.seed):
            model.train(self.mode == "train")
            with torch.inference_mode(False), torch.set_grad_enabled("gradients" in self.needs):
                scores = self._score(context)
        return {group.name: self._checked(scores, group) for group in context.groups}

    def weights(self, context: Context) -> dict[str, Tensor]:
        """Parameters that count for some group, by name, detached, in the order of the groups."""
        known = named_tensors(context.model)
        spans = (span for group in context.groups for span in group.spans)
        return {s.tensor: known[s.tensor].detach() for s in spans if counts(s.role, self.roles)}

    def _score(self, context: Context) -> dict[str, Tensor]:
        values = self.contributions(context)
        return {
            g.name: self.finish(reduce_spans(values, g, self.reduction, roles=self.roles, squared=self.squared))
            for g in context.groups
        }

    def _check(self, context: Context) -> None:
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
        TypeError: a class variable is missing or holds an unknown word, or the name is taken.
    """
    for attribute in ("name", "summary", "complexity", "speed", "best_for", "source"):
        if not getattr(cls, attribute, ""):
            raise TypeError(f"{cls.__name__}.{attribute} is empty")
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
        found = _squares(wide, dims)
        if dims and not bool(torch.isfinite(found).all() & (found > TINY**2).all()):  # squares that leave float32
            found = _squares(wide.to(torch.float64), dims)
        return found
    if not dims:
        return value
    return value.amax(dims, True) if how == "max" else value.sum(dims, True, dtype=torch.float64)


def _squares(value: Tensor, dims: list[int]) -> Tensor:
    """Sums of squares along `dims`, which stay with size one, in float64."""
    if not dims:
        return value.to(torch.float64).square()
    if 0 not in dims or not value.is_contiguous():
        norms: Tensor = torch.linalg.vector_norm(value, 2, dims, True)
        return norms.to(torch.float64).square()
    # A norm over the rows of a matrix walks down every column, ten times slower than along the memory. So rows are
    # squared and added a few at a time, few enough that they stay in the cache.
    flat = value.reshape(value.shape[0], -1)
    total = torch.zeros(flat.shape[1], dtype=torch.float64, device=value.device)
    for rows in torch.split(flat, max(1, CHUNK // flat.shape[1])):
        total += rows.square().sum(0)
    total = total.view(1, *value.shape[1:])
    rest = [d for d in dims if d != 0]
    return total.sum(rest, True) if rest else total


@contextmanager
def untouched(model: nn.Module, *, seed: int | None = None) -> Iterator[None]:
    """Give the model back as it was found, also when an exception passes through.

    Restored are: training flags, hooks of modules, requires_grad, the gradients (put aside meanwhile, so that
    a backward pass cannot add to them), buffers, and the random states of Python, NumPy and torch.
    Weights are not copied: nothing inside may write to them.

    Args:
        model: the model.
        seed: seeds all three generators on entry, if given.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> with untouched(layer):
        ...     _ = layer.eval()
        >>> layer.training
        True
    """
    modules, parameters, buffers = list(model.modules()), list(model.parameters()), list(model.buffers())
    training = [m.training for m in modules]
    hooks = [(getattr(m, h), dict(getattr(m, h))) for m in modules for h in HOOKS if hasattr(m, h)]
    grads = [(p, p.requires_grad, p.grad) for p in parameters]
    copies = [(b, b.detach().clone()) for b in buffers]
    generators = _random_states()
    try:
        for parameter in parameters:
            parameter.grad = None
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002 - user data may draw from the global generator
            torch.manual_seed(seed)
        yield
    finally:
        for module, flag in zip(modules, training, strict=True):
            module.training = flag
        for live, kept in hooks:
            if live != kept:
                live.clear()
                live.update(kept)
        for parameter, wanted, grad in grads:
            parameter.requires_grad_(wanted)
            parameter.grad = grad
        with torch.no_grad():
            for buffer, copy in copies:
                # Compared by value: batch norm changes its statistics without a new version number.
                if not buffer.is_meta and not torch.equal(buffer, copy):
                    buffer.copy_(copy)
        _restore_random_states(generators)


def _random_states() -> tuple[Any, Any, Tensor, list[Tensor]]:
    cuda: list[Tensor] = []
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        cuda = torch.cuda.get_rng_state_all()
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda  # noqa: NPY002


def _restore_random_states(states: tuple[Any, Any, Tensor, list[Tensor]]) -> None:
    python, numpy, cpu, cuda = states
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
