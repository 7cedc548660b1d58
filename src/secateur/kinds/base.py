"""One interface for every kind of removal: find what may go, price it, write it down, prove it.

Deciding stands outside (`planning.decide`): a kind only says what competes and under which constraints. A new kind is a
room with a `kind.py` that implements `Candidates`, and one line in `kinds.find`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import ClassVar, Literal

from torch import Tensor, nn

from secateur.errors import UnsupportedError
from secateur.kinds.edit import Edit
from secateur.request import PROOF, Efforts, Request
from secateur.structure.groups import Structure
from secateur.structure.trace import Trace
from secateur.types import Certificate, Condition, Example, Group, LeftOut

Keep = Mapping[str, Tensor]  # group name -> bool tensor, True = the unit stays


@dataclass(frozen=True, eq=False)
class Family:
    """Groups that must keep equally many units, as one number somewhere sizes them all.

    Args:
        name: of the family.
        groups: names of its members.
        size: units of every member.
        step: units that go at a time.
        least: units that stay in every member.
    """

    name: str
    groups: tuple[str, ...]
    size: int
    step: int = 1
    least: int = 1

    @property
    def chunks(self) -> int:
        """How often something can go; where the step does not divide the size, the odd rest goes first."""
        return -(-self.size // self.step)

    def units(self, chunks: int) -> int:
        """Units that so many chunks hold."""
        return self.size if chunks >= self.chunks else chunks * self.step


class Left:
    """What a choice leaves: counts at once, and which units where somebody asks.

    Args:
        counts: group name -> kept units.
        keep: gives the masks; called at most once.
    """

    def __init__(self, counts: Mapping[str, int], keep: Callable[[], Keep]) -> None:
        self.counts, self._keep = counts, keep

    @cached_property
    def keep(self) -> Keep:
        """Group name -> bool tensor, True = the unit stays."""
        return self._keep()

    @classmethod
    def of(cls, keep: Keep) -> Left:
        """What given masks leave."""
        return cls({name: int(mask.sum()) for name, mask in keep.items()}, lambda: keep)


class Candidates(ABC):
    """What of one kind may go from one model.

    Args:
        model: the original, whole.
        example: what one forward takes; None for masks.
        request: what was asked.
        examples: further examples, which the plan holds for as well.

    Attributes:
        groups: the units that compete, with every slice that goes with each of them.
        trace: the run that they were found in, for criteria that watch it; None where none was made.
        conditions: what finding them depended on, beside what the trace says.
        structure: what the engine found, free and locked, for reports; None where it was not asked.
        families: groups that keep equally many units; empty where every group stands for itself.
        left_out: weights that masks do not cover, or branches that may not go, each with its reason; empty for other
            cuts, which lock dimensions.
        floors: group name -> units that stay in it, where they were fixed on the model before earlier cuts.
    """

    physical: ClassVar[bool] = True  # whether units are removed for real; else zeros are written
    saves: ClassVar[Literal["macs", "params"]] = "macs"  # the cost that its units take with them
    scope: ClassVar[str | None] = None  # fixed by the kind, where its units cannot compete freely
    unread: ClassVar[tuple[str, ...]] = ()  # keywords of `secateur.plan` that mean nothing for its units

    def __init__(self, model: nn.Module, example: Example, request: Request, examples: Sequence[Example] = ()) -> None:
        self.model, self.example, self.request, self.examples = model, example, request, tuple(examples)
        self.groups: Sequence[Group] = ()
        self.trace: Trace | None = None
        self.conditions: Sequence[Condition] = ()
        self.structure: Structure | None = None
        self.families: Sequence[Family] = ()
        self.left_out: Sequence[LeftOut] = ()
        self.floors: Mapping[str, int] = {}

    def least(self, group: Group, scope: str) -> int:
        """Units that stay in a group; a share of each under a global ranking, so that its scale cannot empty it."""
        if group.name in self.floors:
            return min(group.size, self.floors[group.name])
        share = ceil(self.request.min_keep_fraction * group.size) if scope == "global" else 1
        return min(group.size, max(self.request.min_keep, share))

    def why_least(self) -> str:
        """What else keeps units in a group, to be said where a target cannot be reached; "" if nothing."""
        return ""

    def grid(self, group: Group) -> int:
        """Multiple that the kept count of a group is rounded up to."""
        return self.request.grid(group.size, group.granularity)

    def stays(self, group: Group) -> Tensor | None:
        """Bool [size], True = this unit stays whatever its score; None where all may go."""
        return None

    @abstractmethod
    def price(self, what: str, left: Left) -> int:
        """Exact cost of what is left: "params", "macs" (for one sample) or "memory_bytes"."""

    @abstractmethod
    def write(self, keep: Keep) -> Edit:
        """The choice as an edit of the model: slices, layers, masks, and the integers that follow."""

    def about(self, keep: Keep, edit: Edit) -> Sequence[Condition]:
        """Conditions of this very choice, beside those of the model."""
        return ()

    @abstractmethod
    def prove(
        self,
        whole: nn.Module,
        cut: nn.Module,
        keep: Keep,
        *,
        dtype: str,
        tolerance: float | None,
        effort: Efforts = PROOF,
        edit: Edit | None = None,
    ) -> Certificate:
        """The certificate that `cut` is `whole` without what was chosen.

        Args:
            whole: the original.
            cut: the smaller model.
            keep: what was chosen.
            dtype: in which outputs are compared.
            tolerance: as in `secateur.model.agreement.agreement`.
            effort: on which inputs.
            edit: what made `cut` of `whole`, where it is known; None: what `write` says.

        Raises:
            CertificateError: it is not.
        """

    def locks(self) -> list[str]:
        """Why units that exist may not go, the most frequent reason first."""
        reasons: dict[str, int] = {}
        for group in self.structure.groups if self.structure is not None else ():
            for lock in group.locks[:1]:
                text = f"{lock.reason} ({lock.where})" if lock.where else lock.reason
                reasons[text] = reasons.get(text, 0) + 1
        return sorted(reasons, key=lambda reason: -reasons[reason])


def nothing(model: nn.Module, what: str, *, why: str, hint: str) -> UnsupportedError:
    """The one error for models in which there is nothing of a kind."""
    return UnsupportedError(f"{type(model).__name__} has no {what}.", why=why, hint=hint)
