"""What a pruner does to a model, whatever it removes: masks that are held, or slices that are cut."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.criteria.base import Context, Criterion
from secateur.kinds.base import Candidates
from secateur.planning.averages import Averages
from secateur.planning.plan import Plan
from secateur.request import Request, Target
from secateur.training.together import Together
from secateur.types import Data, Example, Loss


@dataclass(eq=False)
class PruningJob:
    """What a removal works with.

    Args:
        model: changed in place.
        example: what one forward takes; None for masks that need none.
        request: everything but how much.
        rule: the criterion.
        data: batches, where the criterion needs them.
        loss: of the batches.
        optimizers: whose state follows.
        ema: averaged weights, which follow too.
        together: the processes that decide as one.
        dtype: precision of certificates.
        tolerance: of certificates.
    """

    model: nn.Module
    example: Example
    request: Request
    rule: Criterion
    data: Data | None
    loss: Loss | None
    optimizers: Sequence[Optimizer]
    ema: Averages | None
    together: Together
    dtype: str = "float32"
    tolerance: float | None = None

    def scores(self, candidates: Candidates) -> dict[str, Tensor]:
        """Scores of what is there now; the model is left as it is, its gradients and modes included."""
        context = Context(
            self.model,
            candidates.groups,
            data=self.data,
            loss=self.loss,
            example=self.example,
            seed=self.request.seed,
            capture=candidates.trace,
        )
        return self.together.mean(self.rule.score(context))


class Remover(ABC):
    """Brings a model to a target, again and again; what is gone stays gone.

    Args:
        job: what it works with.
    """

    physical: ClassVar[bool]

    def __init__(self, job: PruningJob) -> None:
        self.job = job

    @abstractmethod
    def whole(self, what: str) -> int:
        """What the model had at the beginning: "count" (units), "memory_bytes"."""

    @abstractmethod
    def prune(self, target: Target, *, last: bool) -> None:
        """Remove until a target holds.

        Args:
            target: what must hold, counted from the model at the beginning.
            last: whether it is the one that was asked for.
        """

    @abstractmethod
    def removed(self) -> tuple[int, int]:
        """Units that are gone, and how many there were."""

    @abstractmethod
    def enforce(self) -> None:
        """Write again what other hands may have changed."""

    @abstractmethod
    def enforce_unheld(self) -> None:
        """As `enforce`, of what none of the job's optimizers moves."""

    @abstractmethod
    def plan(self) -> Plan | None:
        """What leads from the model at the beginning to the one now; None where nothing is gone yet."""

    @abstractmethod
    def state_dict(self) -> dict[str, object]:
        """What a checkpoint needs."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Bring the model to where a checkpoint was.

        Raises:
            InputError: it is no state of such a removal.
        """
