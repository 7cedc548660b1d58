"""What every criterion is: numbers per unit, higher = keep, computed without leaving a trace on the model.

Most criteria are additive: a unit is worth the sum (mean, maximum) of what its elements are worth. They
implement `contributions`, one tensor per parameter, and the base class reduces it over the spans of every
group. The others override `_score`.
"""

from __future__ import annotations

import sys
from abc import ABC
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from secateur import words
from secateur.criteria.docstrings import section
from secateur.criteria.forecast import EpochForecast, announce
from secateur.criteria.sums import Reduction, Sums, counts
from secateur.errors import InputError, NonFiniteError, RecipeError, UnsupportedError
from secateur.model.call import default_loss
from secateur.model.carried import refuse_carried_masks
from secateur.model.guard import guard
from secateur.model.modules import named_parameters
from secateur.model.share import Share
from secateur.model.tensors import has_values, named_tensors, require_finite
from secateur.registry import Registry, option_names, suggestion
from secateur.structure.trace import Trace
from secateur.types import Data, Example, Group, Json, Loss

Reads = Literal["values", "sums", "nothing"]
NEEDS = frozenset({"data", "labels", "gradients", "training"})
STATED = ("name", "summary", "speed", "best_for")  # class variables that every criterion gives a value
DOCUMENTED = ("Cost", "Source")  # sections that its docstring has
PROMISES = frozenset({"permutation", "batch_split", "zero_lowest"})


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
        capture: the structure engine's trace of one forward pass, where it was made.
        progress: called as ``progress(done, total)``, total 0 = unknown.
    """

    model: nn.Module
    groups: Sequence[Group]
    data: Data | None = None
    loss: Loss | None = None
    example: Example = None
    seed: int = 0
    capture: Trace | None = None
    progress: Callable[[int, int], None] | None = None


class Criterion(ABC):
    """Says what matters least: one number per unit, higher = keep.

    Options are keyword-only constructor arguments, stored as attributes of the same name (a frozen
    keyword-only dataclass does both). A subclass states the class variables below, says in its docstring what it
    costs ("Cost:") and where it comes from ("Source:"), and implements `contributions` (additive) or `_score`.

    `needs` says what the context must hold, `mode` the mode in which the model is scored. `promises` are
    properties that the contract suite then tests: "permutation" (units that are reordered take their scores
    with them), "batch_split" (the same samples in other batches score the same), "zero_lowest" (no unit
    scores below one whose weights and activations are all zero). `live` names constructor arguments that no recipe
    can write and no plan can hold, for example an `Accumulator`; they are no options. `shares` says that all it takes
    from the data are sums that `secateur.model.share` adds up over processes, so that each may read a part.

    `reads` says what it does with the values of the weights. "values": anything, so that NaN and Inf are looked for
    beforehand; "sums": it adds up functions of single weights that are NaN or Inf where the weight is, so that each
    weight is read once, and looked at again only where a sum is not finite; "nothing": it works for a model on the
    meta device too. Those two run no forward, and so the model is not walked through to give it back as it was.
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
    reads: ClassVar[Reads] = "values"
    shares: ClassVar[bool] = False  # whether its sums over the data may be those of several processes
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
        if isinstance(context.data, Share):
            with context.data.processes.working():
                return self._all_scores(context)
        return self._all_scores(context)

    def _all_scores(self, context: Context) -> dict[str, Tensor]:
        context = self._admitted(context)
        if not context.groups:
            return {}
        gradients = "gradients" in self.needs
        # Out of inference mode, whoever calls: what a criterion makes there could have no gradient.
        with torch.inference_mode(False), self._guard(context, gradients=gradients):
            if not isinstance(context.data, Share):  # of which one process may have no batch to foretell by
                announce(self.name, self.forecast(context), context)
            scores = self._score(context)
        try:
            return {group.name: self._checked(scores, group) for group in context.groups}
        except NonFiniteError:
            self._require_finite(context)  # names the weight, where one is the cause
            raise

    def _admitted(self, context: Context) -> Context:
        """The context as the criterion sees it: checked, with weights only, and with a loss where one is needed."""
        self._check(context)
        if "labels" in self.needs and context.loss is None:
            context = replace(context, loss=default_loss)
        weights = {name for name, p in named_parameters(context.model) if p.is_floating_point() or p.is_complex()}
        return replace(context, groups=[_of_weights(group, weights) for group in context.groups])

    def _guard(self, context: Context, *, gradients: bool | None = None) -> AbstractContextManager[object]:
        """The model as it is scored, and given back as it was."""
        if self.reads != "values" and not self.needs:
            return guard(gradients=gradients, seed=context.seed)
        return guard(context.model, mode=self.mode, gradients=gradients, seed=context.seed, example=context.example)

    def weights(self, context: Context, known: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Parameters that count for some group, by name, detached, in the order of the groups.

        Args:
            context: model and groups.
            known: the tensors of the model by name, where they are at hand.
        """
        known = named_tensors(context.model) if known is None else known
        counted = (s.tensor for group in context.groups for s in group.spans if counts(s.role, self.roles))
        return {name: known[name].detach() for name in dict.fromkeys(counted) if name in known}

    def forecast(self, context: Context) -> EpochForecast | None:
        """How many epochs this will take, where it depends on model and options; None: about as many as `speed` says.

        Args:
            context: what is to be scored, with data and loss, in the mode in which it will be.
        """
        return None

    def _score(self, context: Context) -> dict[str, Tensor]:
        sums = Sums(self.contributions(context), self.reduction, squared=self.squared)
        # In single precision at once: roots in double precision of all single weights would be twice the model.
        scores = {group.name: self.finish(sums.of(group, self.roles)).float() for group in context.groups}
        if not sums.finite:
            self._require_finite(context)
        return scores

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
        if isinstance(context.data, Share):
            self._check_share(context.model, context.data)
        known = named_tensors(context.model)
        # These show in the sums over them, and a second reading would cost as much as the criterion itself.
        summed = set(self.weights(context, known)) if self.reads == "sums" else set()
        for name in dict.fromkeys(span.tensor for group in context.groups for span in group.spans):
            if name not in known:
                raise InputError(f"the model has no tensor {name!r}", hint=suggestion(name, known))
            if has_values(known[name]):
                if name not in summed:
                    require_finite(known[name], name)
            elif self.reads != "nothing":
                raise InputError(
                    f"tensor {name!r} has no values yet",
                    why=f"criterion {self.name!r} reads them",
                    hint="load the weights, run one forward pass, or choose criterion 'random', which reads nothing",
                )

    def _check_share(self, model: nn.Module, data: Share) -> None:
        if self.needs & {"data", "labels"} and not self.shares:
            able = [name for name in CRITERIA.names() if CRITERIA.find(name).shares]
            raise UnsupportedError(
                f"criterion {self.name!r} cannot share its data among processes",
                why="what it gathers is no plain sum over the batches",
                hint=f"run it in one process, or choose one that can: {', '.join(able)}",
            )
        data.require_same_model(model)

    def _require_finite(self, context: Context) -> None:
        for name, weight in self.weights(context).items():
            require_finite(weight, name)

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
    meant = words.translated({"name": criterion, **(options or {})}, words.CRITERIA)
    choice = dict(meant) if isinstance(meant, Mapping) else {"name": meant}
    name = str(choice.pop("name"))
    if name not in CRITERIA:
        more = f"`secateur criteria list` shows all {len(CRITERIA.names())} of them, among them magnitude and taylor"
        hint = words.right_word(name, CRITERIA.names(), words.ABOUT_CRITERIA, more=more)
        raise RecipeError(f"unknown criterion {name!r}", hint=hint)
    return CRITERIA.build(name, choice)


def _of_weights(group: Group, weights: Set[str]) -> Group:
    """The group without spans of buffers and of whole numbers, which no criterion can score; "state" never counts.

    Raises:
        InputError: nothing is left: its units hold no weight.
    """
    spans = tuple(span for span in group.spans if span.tensor in weights or span.role == "state")
    if group.spans and not any(span.tensor in weights for span in spans):
        raise InputError(
            f"the units of group {group.name!r} hold no weights",
            why=f"{group.spans[0].tensor!r} is a buffer, or holds whole numbers",
            hint="protect it: nothing says what its units are worth",
        )
    return group if len(spans) == len(group.spans) else replace(group, spans=spans)
