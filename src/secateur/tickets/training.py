"""How a ticket is trained: by the project's own loop, or by one of the user's; both can start at an early state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypedDict, cast

from torch import Tensor, nn

from secateur.errors import InputError, RecipeError
from secateur.files.checkpoint import Checkpoint
from secateur.model.tensors import named_tensors
from secateur.recover import finetune
from secateur.recover.loop import TakeState, write_tensors
from secateur.recover.optimizers import OptimizerSpec
from secateur.recover.own import own_training
from secateur.recover.precision import Amp
from secateur.recover.rates import ScheduleSpec
from secateur.types import Data, Loss, StateDict

Bundle = StateDict
"""Everything at one step: weights, buffers, optimizer, schedule, random generators, place in the data."""


@dataclass(frozen=True)
class TrainingSpan:
    """A part of a training.

    Args:
        start: steps that were made before; 0 = from the beginning.
        stop: steps in all when it ends.
        seed: of data order and everything random.
        state: what the loop returned at `start` (optimizer, schedule, ...), or None.
    """

    start: int
    stop: int
    seed: int
    state: StateDict | None = None


OwnTrain = Callable[[nn.Module, TrainingSpan], StateDict | None]
"""``train(model, span) -> state``: train in place; what it returns comes back as ``span.state`` after a rewind."""


class Training(Protocol):
    """Trains one network."""

    def run(
        self,
        model: nn.Module,
        masks: Mapping[str, Tensor],
        *,
        seed: int,
        start: Bundle | None,
        capture: int | None,
        kept: Checkpoint,
        progress: Callable[[int, int], None] | None,
    ) -> Bundle | None:
        """Train in place.

        Args:
            model: freshly built.
            masks: parameter name -> bool, True = keep; held through every step.
            seed: of everything random.
            start: the state to start from; None = the beginning.
            capture: the step whose state is returned.
            kept: where the state is kept on the way.
            progress: called as ``progress(done, total)``.
        """


class TrainingOptions(TypedDict, total=False):
    """Keywords of `finetune` that belong to a training from the start; recovery has more."""

    epochs: int
    steps: int
    optimizer: OptimizerSpec
    schedule: ScheduleSpec
    warmup_steps: int
    accumulate: int
    amp: Amp


class Builtin:
    """The loop of `secateur.recover.finetune`.

    Args:
        data: training batches.
        loss: ``loss(model, batch) -> scalar``, or None.
        options: keywords of `finetune`: epochs or steps, optimizer, schedule, warmup_steps, accumulate, amp.

    Raises:
        RecipeError: an option that belongs to recovery and not to a training from the start.
    """

    KNOWN = tuple(TrainingOptions.__annotations__)

    def __init__(self, data: Data, loss: Loss | None, options: Mapping[str, object]) -> None:
        unknown = sorted(set(options) - set(self.KNOWN))
        if unknown:
            raise RecipeError(
                f"the training of a ticket has no option {unknown[0]!r}", hint=f"options: {', '.join(self.KNOWN)}"
            )
        self.data, self.loss, self.options = data, loss, cast(TrainingOptions, dict(options))

    def step_of(self, rewind: Mapping[str, int]) -> int:
        """The step of {"step": k} or {"epoch": e}."""
        if "step" in rewind:
            return rewind["step"]
        try:
            batches = len(self.data)  # type: ignore[arg-type]
        except TypeError:
            raise RecipeError("data without a length have no epochs to count", hint='rewind={"step": ...}') from None
        return rewind["epoch"] * -(-batches // self.options.get("accumulate", 1))

    def run(
        self,
        model: nn.Module,
        masks: Mapping[str, Tensor],
        *,
        seed: int,
        start: Bundle | None,
        capture: int | None,
        kept: Checkpoint,
        progress: Callable[[int, int], None] | None,
    ) -> Bundle | None:
        """See `Training`."""
        keeper = _Keeper(kept, start, capture)
        finetune(model, self.data, self.loss, masks=masks, keeper=keeper, progress=progress, seed=seed, **self.options)
        if capture is not None and keeper.bundle is None:
            raise RecipeError(f"the training ends before step {capture}, which is to be rewound to")
        return keeper.bundle


class _Keeper:
    """Starts where an interrupted training was left, else from the bundle; keeps the step that is asked for."""

    def __init__(self, kept: Checkpoint, start: Bundle | None, capture: int | None) -> None:
        self._kept, self._start, self._capture = kept, start, capture
        self.bundle: Bundle | None = kept.get("bundle")

    def found(self) -> Bundle | None:
        left: Bundle | None = self._kept.get("training")
        return self._start if left is None else left

    def keep(self, step: int, state: TakeState) -> None:
        if step == self._capture and self.bundle is None:
            # Copied now: these are the very tensors with which the loop goes on.
            self.bundle = copy.deepcopy(state())
            self._kept.put("bundle", self.bundle)
        elif step and self._kept.due():
            self._kept.put("training", state())


class Own:
    """A loop of the user's.

    Args:
        train: see `OwnTrain`.
        steps: how many it makes in all, in whatever it counts.
    """

    def __init__(self, train: OwnTrain, steps: int) -> None:
        self.train, self.steps = train, steps

    def step_of(self, rewind: Mapping[str, int]) -> int:
        """The step of {"step": k}."""
        if "step" not in rewind:
            raise RecipeError("a loop of your own counts steps and no epochs", hint='rewind={"step": ...}')
        return rewind["step"]

    def run(
        self,
        model: nn.Module,
        masks: Mapping[str, Tensor],
        *,
        seed: int,
        start: Bundle | None,
        capture: int | None,
        kept: Checkpoint,
        progress: Callable[[int, int], None] | None,
    ) -> Bundle | None:
        """See `Training`. It is interrupted as a whole: how far it came within a span is its own to know."""
        first, state = (0, None) if start is None else (int(start["step"]), start["state"])
        if start is not None:
            write_tensors(model, start["model"])
        bundle = None
        if capture is not None:
            if not first <= capture < self.steps:
                raise RecipeError(f"the training ends before step {capture}, which is to be rewound to")
            state = self._span(model, masks, TrainingSpan(first, capture, seed, state)) if capture > first else state
            # The loop may write into what it has handed out, and other tickets start from this.
            bundle = copy.deepcopy({"step": capture, "state": state, "model": named_tensors(model)})
            kept.put("bundle", bundle)
            first = capture
        self._span(model, masks, TrainingSpan(first, self.steps, seed, copy.deepcopy(state)))
        return bundle

    def _span(self, model: nn.Module, masks: Mapping[str, Tensor], span: TrainingSpan) -> StateDict | None:
        found: list[StateDict | None] = []
        own_training(model, lambda net: found.append(self.train(net, span)), masks, seed=span.seed)
        if found[0] is not None and not isinstance(found[0], Mapping):
            raise InputError("train= returns a mapping of data, or nothing", hint="for example optimizer.state_dict()")
        return found[0]


__all__ = ["Builtin", "Bundle", "Own", "OwnTrain", "TrainingSpan", "Training"]
