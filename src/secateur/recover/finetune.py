"""Fine-tuning with masks held exactly; without masks it is plain training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import ForwardError, InputError, NonFiniteError, RecipeError, SecateurError
from secateur.masks import mask_model
from secateur.model.call import default_loss, describe, device_of, require_reiterable, to_device
from secateur.model.failure import fail
from secateur.model.guard import guard
from secateur.recover.optimizers import OptimizerSpec, Schedule, build_optimizer, rate_factor, resolve_schedule
from secateur.types import Batch, Data, Loss

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TrainStep:
    """One optimizer step: its number from 0, its epoch, the loss before it, the learning rate used."""

    step: int
    epoch: int
    loss: float
    lr: float


@dataclass(frozen=True)
class History:
    """What a fine-tuning did, step by step."""

    records: tuple[TrainStep, ...]
    seconds: float

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return len(self.records)

    @property
    def losses(self) -> tuple[float, ...]:
        """Loss before every step."""
        return tuple(record.loss for record in self.records)


def finetune(
    model: nn.Module,
    data: Data,
    loss: Loss | None = None,
    *,
    optimizer: OptimizerSpec | None = None,
    schedule: str | Schedule = "constant",
    warmup_steps: int = 0,
    steps: int | None = None,
    epochs: int | None = None,
    masks: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> History:
    """Train a model in place; masked weights are +0.0 before, between and after all steps.

    A bad choice with a few hundred samples and a large learning rate: it then over-fits what was calibrated
    on. On any error, an interrupt included, the model is put back bit for bit.

    Args:
        model: changed in place; runs in train mode, its modes and gradients are put back.
        data: batches. Where it has ``set_epoch``, that is called before each pass. More than one pass needs
            data that can be read again.
        loss: ``loss(model, batch) -> scalar``; None = `secateur.model.call.default_loss`.
        optimizer: ``{"name": "sgd"|"adam"|"adamw", "lr": ...}``, a callable ``parameters -> Optimizer``, or
            None for SGD (0.01, momentum 0.9, weight decay 5e-4).
        schedule: "constant", "linear", "cosine" or a callable ``(step, total steps) -> factor``.
        warmup_steps: steps of linear warm-up before the schedule.
        steps: number of optimizer steps; passes over the data are repeated as needed.
        epochs: number of passes instead; neither = one pass.
        masks: parameter name -> bool, True = keep.
        progress: called after each step with (steps done, steps in all, or 0 where not known).
        seed: of dropout and of loaders that draw from the global generators of Python, NumPy or torch; all are put
            back.

    Returns:
        The history. The same seed, data, model and thread count give the same weights on one machine.

    Raises:
        RecipeError: both steps and epochs, or an option out of range.
        InputError: no batch; one-shot data that is needed twice; nothing to train; a bad mask or target.
        NonFiniteError: the loss, or a weight at the end, is NaN or infinite; the step is named.
        ForwardError: forward or loss fail on a batch; its shapes are named.

    Cost: about three forward passes per step; memory for one more copy of the weights, besides the optimizer.

    Source: masks held as in Han et al., "Learning both Weights and Connections", 2015, section 3.
    """
    total = _total_steps(data, steps=steps, epochs=epochs, schedule=schedule, warmup=warmup_steps)
    factor = resolve_schedule(schedule)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise InputError("no parameter of the model requires a gradient", hint="call model.requires_grad_()")
    started, records = time.perf_counter(), list[TrainStep]()
    with guard(model, mode="train", gradients=True, seed=seed, rollback=True):
        built = build_optimizer(optimizer, trained)
        base = [float(group["lr"]) for group in built.param_groups]
        # Nobody takes these masks back, so what they hide need not be stored. The hold ends with the optimizer.
        mask_model(model, masks or {}, keep_originals=False).hold(built)
        passes = None if steps is not None else (epochs or 1)
        # Closed at once, also when a step raises: the data get their epoch back then, not when the garbage is taken.
        with closing(_passes(data, passes)) as batches:
            for step, (epoch, batch) in enumerate(islice(batches, steps)):
                scale = rate_factor(factor, step, total, warmup=warmup_steps)
                for group, rate in zip(built.param_groups, base, strict=True):
                    group["lr"] = rate * scale
                try:
                    value = train_step(model, batch, loss, optimizer=built, step=step)
                except NonFiniteError as error:
                    why = "the model is back at the state before the fine-tuning"
                    raise NonFiniteError(error.what, why=why, hint=error.hint) from error
                records.append(TrainStep(step, epoch, value, base[0] * scale))
                if progress is not None:
                    progress(step + 1, total)
        _check_weights(model)
    return History(tuple(records), time.perf_counter() - started)


def train_step(
    model: nn.Module,
    batch: Batch,
    loss: Loss | None = None,
    *,
    optimizer: Optimizer,
    step: int = 0,
    after_backward: Callable[[], None] | None = None,
) -> float:
    """One step of training: gradients of one batch, and what the optimizer makes of them.

    `finetune` is a loop around it; a loop of your own may be another one. Masks hold through it where a handle
    holds the optimizer (``handle.hold(optimizer)``).

    Args:
        model: changed in place; in the mode that it is in.
        batch: moved to the model's device.
        loss: ``loss(model, batch) -> scalar``; None = `secateur.model.call.default_loss`.
        optimizer: moves parameters of the model.
        step: its number, for errors.
        after_backward: called between backward and the step, for example to read or clip gradients. Masked places
            still have theirs then.

    Returns:
        the loss before the step.

    Raises:
        NonFiniteError: the loss is NaN or infinite; no weight was moved.
        ForwardError: forward or loss fail on the batch; its shapes are named.
        InputError: the loss is no scalar with a gradient.

    Example:
        >>> import torch
        >>> net = nn.Linear(1, 1)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> batch = (torch.ones(1, 1), torch.zeros(1, 1))
        >>> train_step(net, batch, optimizer=optimizer) >= train_step(net, batch, optimizer=optimizer)
        True
    """
    optimizer.zero_grad(set_to_none=True)
    result = _loss(model, batch, loss or default_loss, step)
    value = float(result.detach())
    # Before backward: gradients of a NaN would reach weights and moments, and nothing could be taken back.
    if not math.isfinite(value):
        raise NonFiniteError(
            f"the loss is {value} at step {step}",
            why="the step was not made",
            hint="lower the learning rate, add warm-up steps, or look for NaN in the data",
        )
    result.backward()  # type: ignore[no-untyped-call]
    if after_backward is not None:
        after_backward()
    optimizer.step()
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


def _total_steps(data: Data, *, steps: int | None, epochs: int | None, schedule: str | Schedule, warmup: int) -> int:
    """Steps in all; 0 where the data has no length and the schedule does not need it."""
    if steps is not None and epochs is not None:
        raise RecipeError("both steps and epochs are given", hint="give one of them")
    for name, value, least in (("steps", steps, 1), ("epochs", epochs, 1), ("warmup_steps", warmup, 0)):
        if value is not None and value < least:
            raise RecipeError(f"{name} is {value}", hint=f"give at least {least}")
    if steps is not None:
        return steps
    passes = epochs or 1
    if passes > 1:
        require_reiterable(data, f"{passes} epochs")
    # Loaders of streams have a length that raises, so it is asked for and not looked up.
    try:
        return passes * len(data)  # type: ignore[arg-type]
    except TypeError:
        if schedule == "constant":  # the one that never asks how far it is
            return 0
        raise RecipeError(
            f"the schedule {schedule!r} needs the number of steps, and the data has no length",
            hint="give steps=...",
        ) from None


def _passes(data: Data, passes: int | None) -> Generator[tuple[int, Batch], None, None]:
    """(epoch, batch) over so many passes, without end for None."""
    # Data that shuffle by their epoch give the same order in every fine-tuning, and are left at the epoch they had.
    set_epoch, before = getattr(data, "set_epoch", None), getattr(data, "epoch", 0)
    epoch = 0
    try:
        while passes is None or epoch < passes:
            if epoch:
                require_reiterable(data, f"pass {epoch + 1}")
            if callable(set_epoch):
                set_epoch(epoch)
            empty = True
            for batch in data:
                empty = False
                yield epoch, batch
            if empty:
                why = "" if epoch == 0 else f"pass {epoch + 1} gave no batch, though the first did"
                raise InputError("the data holds no batch", why=why, hint="is the loader empty or used up?")
            epoch += 1
    finally:
        if callable(set_epoch):
            set_epoch(before)


def _check_weights(model: nn.Module) -> None:
    # The loss of each step was seen before it; what the last step did was not.
    for name, parameter in model.named_parameters():
        if not parameter.detach().isfinite().all():
            raise NonFiniteError(
                f"{name!r} has NaN or Inf after the last step",
                why="the model is back at the state before the fine-tuning",
                hint="lower the learning rate",
            )
