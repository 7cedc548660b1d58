"""The loop of a training: steps, passes, what is kept on the way, and where it can go on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import ForwardError, InputError, NonFiniteError, SecateurError
from secateur.files.checkpoint import Checkpoint
from secateur.model.call import describe, device_of, to_device
from secateur.model.failure import fail
from secateur.model.generators import drawn, set_drawn
from secateur.model.tensors import named_tensors
from secateur.recover.adapters import Adapters
from secateur.recover.rates import Rates
from secateur.recover.reader import Reader
from secateur.recover.validation import HeldOut
from secateur.types import Batch, Loss, StateDict

TakeState = Callable[[], StateDict]


@dataclass(frozen=True)
class TrainStep:
    """One optimizer step: number from 0, epoch, loss before it, learning rate; sparsity and quality where known."""

    step: int
    epoch: int
    loss: float
    lr: float
    sparsity: float | None = None
    quality: float | None = None


class Follower(Protocol):
    """Who prunes while a loop trains; see `secateur.training.Pruner`."""

    @property
    def sparsity(self) -> float | None:
        """Share of the units that is gone; None where nothing goes meanwhile."""

    def step(self) -> bool:
        """Called after every step of the optimizer; whether anything changed."""

    def state_dict(self) -> StateDict:
        """What it goes on from."""

    def load_state_dict(self, state: StateDict) -> None:
        """Go on, before the states of model and optimizer are loaded: shapes may change."""


class Keeper(Protocol):
    """Who keeps states of a training."""

    def found(self) -> StateDict | None:
        """The state to go on from, or None to begin."""

    def keep(self, step: int, state: TakeState) -> None:
        """Called before the first step and after every one, with the number of steps done."""


class WatchedProgress(Protocol):
    """Progress that also draws and logs: what a loop tells it beside how far it is."""

    def watch(self, records: Sequence[TrainStep]) -> None:
        """Called after every step with all of them."""

    def quality(self, model: nn.Module) -> float | None:
        """Called after every pass; the figure, where one is to be had."""


class KeptState:
    """A keeper that writes to a checkpoint whenever that is due.

    Args:
        checkpoint: where.
        name: of the state.
    """

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self.checkpoint, self.name = checkpoint, name

    def found(self) -> StateDict | None:
        """What was kept under the name."""
        state: StateDict | None = self.checkpoint.get(self.name)
        return state

    def keep(self, step: int, state: TakeState) -> None:
        """Write, if it is time."""
        if step and self.checkpoint.due():
            self.checkpoint.put(self.name, state())


class Loop:
    """Optimizer steps over the passes of a reader.

    Its state is everything that the next step depends on: weights and buffers, optimizer, rates, place in the data,
    random generators, the best pass so far.

    Args:
        model: in train mode.
        loss: ``loss(model, batch) -> scalar``.
        optimizer: moves the model's parameters, or those of the adapters.
        rates: of the optimizer.
        reader: of the batches.
        accumulate: batches per step.
        judge: looks at the model after each pass.
        adapters: where they are trained in the place of the weights.
        follower: prunes after every step.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: Optimizer,
        rates: Rates,
        reader: Reader,
        *,
        accumulate: int = 1,
        judge: HeldOut | None = None,
        adapters: Adapters | None = None,
        follower: Follower | None = None,
    ) -> None:
        self.follower = follower
        self._sparsity = None if follower is None else follower.sparsity
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.rates, self.reader, self.judge, self.adapters = rates, reader, judge, adapters
        self.accumulate = accumulate
        self._watched: WatchedProgress | None = None
        self.records: list[TrainStep] = []
        self.over = False

    def run(
        self,
        steps: int | None = None,
        keeper: Keeper | None = None,
        progress: Callable[[int, int], None] | None = None,
        total: int = 0,
    ) -> None:
        """Train until the passes are over, or so many steps are made in all."""
        self._watched = progress if hasattr(progress, "watch") else None  # type: ignore[assignment]
        if keeper is not None and not self.records:
            keeper.keep(0, self.state_dict)
        while not self.over and (steps is None or len(self.records) < steps):
            batches = self.reader.read(self.accumulate)
            if batches:
                self._step(batches)
            else:
                self._pass_ended()
            if batches and keeper is not None:
                keeper.keep(len(self.records), self.state_dict)
            if batches and progress is not None:
                self._tell(progress, total)
            if self._watched is not None:
                self._watched.watch(self.records)
        if self.judge is not None:
            # A training by steps may end in the middle of a pass, which is judged as well.
            if not self.over and self.reader.place:
                self.judge.look(self.model)
            self.judge.finish(self.model)

    def _tell(self, progress: Callable[[int, int], None], total: int) -> None:
        if not getattr(progress, "takes_note", False):
            progress(len(self.records), total)
            return
        last = self.records[-1]
        pruned = "" if last.sparsity is None else f", sparsity {last.sparsity:.3f}"
        progress(len(self.records), total, f"loss {last.loss:.4g}{pruned}")  # type: ignore[call-arg]

    def _step(self, batches: Sequence[Batch]) -> None:
        step = len(self.records)
        lr = self.rates.before(step)
        value = gradients(self.model, batches, self.loss, self.optimizer, step)
        if self.adapters is not None:
            self.adapters.take_gradients()
        self.optimizer.step()
        if self.adapters is not None:
            self.adapters.write()
        self.rates.after()
        if self.follower is not None and self.follower.step():
            self._sparsity = self.follower.sparsity
        self.records.append(TrainStep(step, self.reader.epoch, value, lr, self._sparsity))

    def _looked(self) -> None:
        if self._watched is None or not self.records:
            return
        # Whoever looks must not move what is drawn next: watched or not, the weights are the same.
        before = drawn()
        figure = self._watched.quality(self.model)
        set_drawn(before)
        self.records[-1] = replace(self.records[-1], quality=figure)

    def _pass_ended(self) -> None:
        self._looked()
        figure = None if self.judge is None else self.judge.look(self.model)
        self.rates.pass_ended(figure)
        more = self.reader.turn()
        self.over = not more or (self.judge is not None and self.judge.patience_is_over)

    # -- going on ---------------------------------------------------------------------------------------------

    def state_dict(self) -> StateDict:
        """Everything that the next step depends on, as data; tensors are not copied."""
        return {
            "model": named_tensors(self.model),
            "optimizer": self.optimizer.state_dict(),
            "adapters": [] if self.adapters is None else list(self.adapters.parameters),
            "rates": self.rates.state_dict(),
            "reader": self.reader.state_dict(),
            "generators": drawn(),
            "judge": {} if self.judge is None else self.judge.state_dict(),
            "follower": {} if self.follower is None else self.follower.state_dict(),
            "records": torch.tensor([_row(record) for record in self.records], dtype=torch.float64),
        }

    def load_state_dict(self, state: StateDict) -> None:
        """Take over `state_dict`; the data are read up to where they were left.

        Raises:
            InputError: the state belongs to another model, or the data give other batches.
        """
        # The data first: they may be other ones, and nothing has been changed by then.
        self.reader.load_state_dict(state["reader"])
        if self.follower is not None:
            self.follower.load_state_dict(state["follower"])
            self._sparsity = self.follower.sparsity
        write_tensors(self.model, state["model"])
        # Copied: the optimizer takes tensors over as they are, and the state may be loaded again.
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        if self.adapters is not None:
            with torch.no_grad():
                for parameter, value in zip(self.adapters.parameters, state["adapters"], strict=True):
                    parameter.copy_(value)
        self.rates.load_state_dict(state["rates"])
        if self.judge is not None:
            self.judge.load_state_dict(state["judge"])
        rows = state["records"].tolist()
        self.records = [
            TrainStep(int(step), int(epoch), loss, lr, _known(gone), _known(quality))
            for step, epoch, loss, lr, gone, quality in rows
        ]
        set_drawn(state["generators"])


def _row(record: TrainStep) -> list[float]:
    gone, quality = (math.nan if one is None else one for one in (record.sparsity, record.quality))
    return [record.step, record.epoch, record.loss, record.lr, gone, quality]


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def write_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy values into the parameters and buffers of a model, by name.

    Raises:
        InputError: other names, shapes or dtypes.
    """
    have = named_tensors(model)
    for name, value in have.items():
        given = tensors.get(name)
        if given is None or given.shape != value.shape or given.dtype != value.dtype:
            raise InputError(
                f"the state is of another model: {name!r} is {describe(value)} here",
                why="it has no such tensor" if given is None else f"there it is {describe(given)}",
                hint="build the same model as before",
            )
    with torch.no_grad():
        for name, value in have.items():
            value.copy_(tensors[name])


def gradients(model: nn.Module, batches: Sequence[Batch], loss: Loss, optimizer: Optimizer, step: int) -> float:
    """Mean gradient of the losses of some batches, left in the parameters; returns the mean loss.

    Raises:
        NonFiniteError: a loss is NaN or infinite.
        ForwardError: forward or loss fail.
        InputError: a loss is no scalar with a gradient.
    """
    optimizer.zero_grad(set_to_none=True)
    value = 0.0
    for batch in batches:
        result = _loss(model, batch, loss, step)
        one = float(result.detach())
        # Before backward: gradients of a NaN would reach weights and moments, and nothing could be taken back.
        if not math.isfinite(one):
            raise NonFiniteError(
                f"the loss is {one} at step {step}",
                why="the step was not made",
                hint="lower the learning rate, add warm-up steps, or look for NaN in the data",
            )
        result.backward()  # type: ignore[no-untyped-call]
        value += one / len(batches)
    if len(batches) > 1:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(len(batches))
    return value


def _loss(model: nn.Module, batch: Batch, loss: Loss, step: int) -> Tensor:
    moved = to_device(batch, device_of(model))
    try:
        result = loss(model, moved)
    except ForwardError as error:
        raise ForwardError(f"step {step}: {error.what}", why=error.why, hint=error.hint) from error
    except SecateurError:
        raise  # says already what is wrong
    except Exception as error:
        fail(error, model, f"the loss failed at step {step} on the batch {describe(batch)}")
    # A loss of detached outputs would run and move nothing but by weight decay.
    if not isinstance(result, Tensor) or result.numel() != 1 or not result.requires_grad:
        raise InputError(
            f"the loss returned {describe(result)}, which is no scalar with a gradient",
            hint="loss(model, batch) returns one number that depends on the weights",
        )
    return result.reshape(())
