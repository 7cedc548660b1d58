"""Frozen records that the stages hand to each other, and that a report holds as they are. Nothing here computes.

`Count`, `Amount` and `Text` say what a number or a text may be once it is written down. The stages make records without
a check, so that making one costs nothing; a report checks every record that it takes in, and every one that it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NotRequired, Protocol, TypedDict, runtime_checkable

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from secateur import shown

# Plain data: what a JSON file can hold, and what canonical JSON writes (tuples as lists).
Json = str | int | float | bool | None | Sequence["Json"] | Mapping[str, "Json"]
Batch = Any  # a tensor, a tuple or a mapping of tensors
Example = Any  # what one forward takes: a tensor, a tuple of positional or a mapping of keyword arguments
Data = Iterable[Batch]
# What a `state_dict` gives: tensors, numbers, texts, and lists and mappings of them, typed as torch types its own.
# A reader knows its keys and checks what a file may have made of them; `files.states` writes it without pickle.
StateDict = dict[str, Any]
Protect = Sequence[object]  # names, patterns, modules and parameters of the model, classes of modules
MacsPer = Literal["sample", "example"]
Loss = Callable[[nn.Module, Batch], Tensor]
Progress = Callable[[str, int, int], None]  # called as ``progress(stage, done, total)``; total 0 = not known
Advance = Callable[[int, int], None]  # the same within one stage: ``advance(done, total)``
Cuts = Mapping[str, Mapping[int, Tensor]]  # tensor name -> dimension -> kept indices (int64, ascending)
Evaluate = Callable[[nn.Module], "float | Mapping[str, float]"]


@runtime_checkable
class Metric(Protocol):
    """What torchmetrics calls a metric: predictions and targets go in batch by batch, a figure comes out."""

    def update(self, prediction: Tensor, target: Tensor, /) -> object:
        """Take the predictions and targets of a batch."""

    def compute(self) -> object:
        """The figure, a number or a mapping of numbers."""

    def reset(self) -> object:
        """Forget everything."""


Judge = Evaluate | Metric | str | Mapping[str, Evaluate | Metric | str]
"""How quality may be asked for: ``evaluate(model)``, a metric or the name of one, or several of these by name."""


def _well_formed(value: object) -> object:
    # Layer names may hold lone surrogates, which no UTF-8 file can: they become visible escapes.
    return value.encode("utf-8", "backslashreplace").decode("utf-8") if isinstance(value, str) else value


Text = Annotated[str, BeforeValidator(_well_formed), Field(max_length=100_000)]
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]  # what other readers of JSON can hold
Amount = Annotated[float, Field(ge=0)]
Stop = Literal["rounds", "spread", "time"]


@dataclass(frozen=True)
class Lock:
    """Why units may not be cut.

    Args:
        reason: one sentence, for example "the size 768 is written in the code".
        op: the operation that caused it, for example "aten.view" ("" when there is none).
        module: qualified name of the module that ran the operation.
        where: "file:line" in the user's code, or "".
        hint: what the user can do about it.
    """

    reason: Text
    op: Text = ""
    module: Text = ""
    where: Text = ""
    hint: Text = ""


@dataclass(frozen=True)
class Condition:
    """What the run that a plan was learned from depended on: the plan holds where it is so again.

    Args:
        text: one sentence, for example "holds for dimension 1 of the input > 16 (here 20)".
        where: "file:line" in the user's code, or "".
        module: qualified name of the module that ran, or "".
    """

    text: Text
    where: Text = ""
    module: Text = ""

    def __str__(self) -> str:
        return f"{self.text} ({self.where})" if self.where else self.text


@dataclass(frozen=True, eq=False, repr=False)
class Span:
    """One place where the units of a group live.

    Args:
        tensor: qualified name of a parameter or buffer (the first name where tied).
        index: int64, as many dimensions as the tensor, each of size 1 or the tensor's own; the value is
            the number of the unit that owns the element, -1 where no unit does. None stands for
            ``arange(numel).view(shape)`` (granularity element) without storing it.
        role: "out" (produces the unit), "in" (consumes it), "bias", "scale", "state" or "self"
            (the weight itself: element, vector, kernel, block).
    """

    tensor: str
    index: Tensor | None  # None: single weights number themselves, and an index would be larger than the weight
    role: str

    def __repr__(self) -> str:
        return f"<Span: {self.role} of {self.tensor}>"

    def units(self, tensor: Tensor) -> Tensor:
        """The number of the unit that owns each element of its tensor: the index, spelt out where there is none.

        Args:
            tensor: of the span, or one of its shape; the result lies on its device and broadcasts over its shape.

        Example:
            >>> Span("weight", None, "self").units(torch.zeros(2, 3))
            tensor([[0, 1, 2],
                    [3, 4, 5]])
        """
        if self.index is None:
            return torch.arange(tensor.numel(), device=tensor.device).view(tensor.shape)
        return self.index.to(tensor.device)


@dataclass(frozen=True, eq=False, repr=False)
class Group:
    """Units that compete with each other, and every slice that goes with each of them.

    Args:
        name: stable and readable, for example "conv1" or "encoder.layer.0.attention".
        granularity: element, vector, kernel, n:m, block, channel, head, ...
        shape: shape of the group's score tensor; ``prod(shape)`` units, numbered row-major.
        spans: where the units live.
        locks: reasons why the group may not be cut; empty = free.
        attributes: what else is known (for example {"n": 2, "m": 4}).
    """

    name: str
    granularity: str
    shape: tuple[int, ...]
    spans: tuple[Span, ...]
    locks: tuple[Lock, ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        why = f"locked: {self.locks[0].reason}" if self.locks else ""
        return shown.line(
            "Group", self.name, f"{self.size:,} {self.granularity} units", f"{len(self.spans)} slices", why
        )

    @property
    def size(self) -> int:
        """Number of units."""
        return int(torch.Size(self.shape).numel())


class StubEntry(TypedDict):
    """What takes the place of a module: zeros of its input's shape, alone (items 0) or first in a tuple of so many."""

    items: int


class LayerEntry(TypedDict):
    """What goes from one stack.

    Its size before, the places of the blocks that go, [owner, name] of lists that are shortened; and by the name before
    the removal the modules of branches that go, which leave something without weights in their place.
    """

    size: int
    removed: list[int]
    lists: list[list[str]]
    stubs: NotRequired[dict[str, StubEntry]]


@dataclass(frozen=True)
class LeftOut:
    """A weight that masks do not cover.

    Args:
        name: of the parameter.
        params: its elements.
        why: the reason.
        hint: what to do to have it covered.
        wanted: whether it belongs to what was asked, so that leaving it out degrades the run; False for what is covered
            on request only, or has no such units.
    """

    name: Text
    params: Count
    why: Text
    hint: Text = ""
    wanted: bool = False


class Removal(TypedDict):
    """What goes from one group: what its units are, how many there were, the numbers of those that go."""

    granularity: str
    size: int
    removed: list[int]


class Units(TypedDict):
    """How many units go, all groups together."""

    what: str
    removed: int
    total: int
    sparsity: float


class Scores(dict[str, Tensor]):
    """Group name -> scores, higher = keep, with the groups that were scored.

    Args:
        values: the scores.
        groups: what their units are.
    """

    def __init__(self, values: Mapping[str, Tensor], groups: Sequence[Group] = ()) -> None:
        super().__init__(values)
        self.groups = tuple(groups)

    def __repr__(self) -> str:
        units = sum(score.numel() for score in self.values())
        return f"<Scores: {units:,} units in {len(self)} group{'s' * (len(self) != 1)}>"

    def _repr_html_(self) -> str:
        rows = [
            (name, str(score.numel()), f"{score.min():.4g}", f"{score.mean():.4g}", f"{score.max():.4g}")
            for name, score in self.items()
            if score.numel()
        ]
        return shown.table(repr(self)[1:-1], ("group", "units", "lowest", "mean", "highest"), rows)


class Kept(dict[str, Tensor]):
    """Group name -> bool tensor, True = the unit stays, with the groups that were selected from.

    Args:
        values: the masks of units.
        groups: what the units are; empty where only scores were known.
    """

    def __init__(self, values: Mapping[str, Tensor], groups: Sequence[Group] = ()) -> None:
        super().__init__(values)
        self.groups = tuple(groups)

    def __repr__(self) -> str:
        kept, units = (sum(int(count) for count in counts) for counts in zip(*_counts(self.values()), strict=True))
        return f"<Kept: {kept:,} of {units:,} units in {len(self)} group{'s' * (len(self) != 1)}>"

    def _repr_html_(self) -> str:
        rows = [(name, f"{int(mask.sum())} of {mask.numel()}") for name, mask in self.items()]
        return shown.table(repr(self)[1:-1], ("group", "kept"), rows)


def _counts(masks: Iterable[Tensor]) -> list[tuple[int, int]]:
    return [(int(mask.sum()), mask.numel()) for mask in masks] or [(0, 0)]


@dataclass(frozen=True)
class Latency:
    """Latency of one forward pass in milliseconds over interleaved rounds.

    Args:
        median, p10, p90: of the rounds.
        rounds: how many there were.
        threads: CPU threads.
        batch_size: samples in the timed input.
        ratio: median, p10 and p90 of this model's time over that of the first model in the same round: what both
            suffer from a busy machine cancels. None for the first model. p10 and p90 are rounds that took place, the
            next ones outwards, so that at least nine of ten rounds lie on this side of either.
        stopped: why there were no more rounds: all that were asked for, the spread was small enough, or the time for
            them was used up. None where it is not known.
    """

    median: Amount
    p10: Amount
    p90: Amount
    rounds: Count
    threads: Count = 1
    batch_size: Count = 1
    ratio: tuple[Amount, Amount, Amount] | None = None
    stopped: Stop | None = None

    def __post_init__(self) -> None:
        # A report may come from anywhere, and its verdict trusts this order.
        if not self.p10 <= self.median <= self.p90:
            raise ValueError("latency needs p10 <= median <= p90")


@dataclass(frozen=True)
class Snapshot:
    """What a model is at one moment: the ``before`` and ``after`` of a report.

    Args:
        params: number of parameters (tied ones once).
        nonzero: parameters that are not zero.
        macs: multiply-accumulates of one forward pass for one sample, or None where the forward was not run.
        size_bytes: bytes of the weights as a safetensors file.
        latency_ms: measured latency, or None if not asked for.
        quality: named quality figures, for example {"accuracy": 0.97}.
        macs_per: "sample", or "example" where the example's leading dimension holds no samples (a sequence, a vector):
            `macs` is then that of the whole example.
    """

    params: Count
    nonzero: Count
    macs: Count | None
    size_bytes: Count
    latency_ms: Latency | None = None
    quality: Mapping[Text, float] = field(default_factory=dict)
    macs_per: MacsPer = "sample"


@dataclass(frozen=True)
class Trial:
    """One input on which the cut model gave what the original gives without what is removed.

    Args:
        input: what it was, for example "other values, batch 3 for 2, size 4 for 12".
        method: how the original was run without what is removed.
        error: the largest error.
    """

    input: Text
    method: Text
    error: Amount


@dataclass(frozen=True)
class Certificate:
    """Proof that a cut model gives the outputs of the original with the removed parts left out.

    Args:
        max_abs_error: the largest of all methods and inputs.
        tolerance: that it was held to.
        dtype: in which the outputs were compared.
        method: of the first proof, on the example.
        outputs: compared tensors.
        trials: inputs on which the second proof held: the original run eagerly, without what is removed.
        notes: what the proof does not show, and what it takes for granted.
        effort: on which inputs it was made: "example", "default" or "full".
    """

    max_abs_error: Amount
    tolerance: Amount
    dtype: Text
    method: Text
    outputs: Count = 1
    trials: tuple[Trial, ...] = ()
    notes: tuple[Text, ...] = ()
    effort: Literal["example", "default", "full"] = "default"


@dataclass(frozen=True)
class Degradation:
    """Something that was done less well than asked, and is said aloud: it sets exit code 7."""

    stage: Text
    what: Text
    why: Text = ""
