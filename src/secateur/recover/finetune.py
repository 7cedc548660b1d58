"""Fine-tuning with masks held exactly; without masks it is plain training."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import InputError, NonFiniteError, RecipeError
from secateur.masks import mask_model
from secateur.model.call import as_loss, default_loss, device_of, require_reiterable
from secateur.model.guard import guard
from secateur.recover.adapters import Adapters, AdapterSpec
from secateur.recover.distil import Distil, taught
from secateur.recover.loop import Keeper, Loop, TrainStep, gradients
from secateur.recover.optimizers import OptimizerSpec, build_optimizer
from secateur.recover.precision import Amp, in_precision
from secateur.recover.rates import Rates, ScheduleSpec
from secateur.recover.reader import Reader
from secateur.recover.validation import HeldOut
from secateur.types import Advance, Batch, Cuts, Data, Loss


@dataclass(frozen=True)
class History:
    """What a fine-tuning did, step by step.

    Args:
        records: one for each optimizer step.
        seconds: wall time of this process.
        validation: loss on the held-out data after each pass; empty without them.
        best: the pass that was kept, from 0; None where the last one stays.
    """

    records: tuple[TrainStep, ...]
    seconds: float
    validation: tuple[float, ...] = ()
    best: int | None = None

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
    schedule: ScheduleSpec = "constant",
    warmup_steps: int = 0,
    steps: int | None = None,
    epochs: int | None = None,
    last_of: int | None = None,
    masks: Mapping[str, Tensor] | None = None,
    accumulate: int = 1,
    amp: Amp | None = None,
    validation: Data | None = None,
    best: bool = False,
    patience: int | None = None,
    teacher: nn.Module | None = None,
    distil: Distil | None = None,
    cuts: Cuts | None = None,
    adapters: AdapterSpec | None = None,
    keeper: Keeper | None = None,
    progress: Advance | None = None,
    seed: int = 0,
) -> History:
    """Train a model in place; masked weights are +0.0 before, between and after all steps.

    A bad choice with a few hundred samples and a large learning rate: it then over-fits what was calibrated
    on. On any error, an interrupt included, the model is put back bit for bit.

    Args:
        model: changed in place; runs in train mode, its modes and gradients are put back.
        data: batches. Where it has ``set_epoch``, that is called before each pass. More than one pass needs
            data that can be read again. They draw from random streams of their own, so that what the model draws
            does not change their order.
        loss: ``loss(model, batch) -> scalar``; None = `secateur.model.call.default_loss`.
        optimizer: ``{"name": ..., "lr": ...}`` with any optimizer of ``torch.optim`` and its options, a callable
            ``parameters -> Optimizer``, or None for SGD (0.01, momentum 0.9, weight decay 5e-4).
        schedule: "constant", "linear", "cosine", a callable ``(step, total steps) -> factor``, or ``{"name": ...}``
            with a scheduler of ``torch.optim.lr_scheduler`` and its options, stepped at every step, or with ``"per":
            "epoch"`` after every pass.
        warmup_steps: steps of linear warm-up before the schedule.
        steps: number of optimizer steps; passes over the data are repeated as needed.
        epochs: number of passes instead; neither = one pass.
        last_of: learning-rate rewinding: the rates are those of the last part of a training of so many epochs (or
            steps, whichever is given).
        masks: parameter name -> bool, True = keep.
        accumulate: batches whose mean gradient makes one step; the last step of a pass takes those that are left.
        amp: "bf16" runs forward and loss in mixed precision; weights and optimizer stay as they are.
        validation: batches that nothing trains on, for `best`, `patience` and schedules that ask for a figure.
        best: keep the weights of the pass with the lowest loss on `validation`.
        patience: stop after so many passes without a lower loss on `validation`.
        teacher: the dense model, left as it is; with `distil`.
        distil: what the teacher says.
        cuts: what was cut, so that hidden states of a teacher can be compared.
        adapters: train low-rank changes of the weights alone, merged with every zero where it was.
        keeper: is shown the state after every step, and may have one to go on from.
        progress: called after each step with (steps done, steps in all, or 0 where not known).
        seed: of dropout and of loaders that draw from the global generators of Python, NumPy or torch; all are put
            back.

    Returns:
        The history. The same seed, data, model and thread count give the same weights on one machine.

    Raises:
        RecipeError: both steps and epochs, an option out of range, or options that mean nothing together.
        InputError: no batch; one-shot data that is needed twice; nothing to train; a bad mask or target.
        NonFiniteError: the loss, or a weight at the end, is NaN or infinite; the step is named.
        ForwardError: forward or loss fail on a batch; its shapes are named.

    Cost: about three forward passes per batch; memory for one more copy of the weights, besides the optimizer, and for
        another one with `best`.

    Source: masks held as in Han et al., "Learning both Weights and Connections", 2015, section 3; `last_of`: Renda,
        Frankle, Carbin, "Comparing Rewinding and Fine-tuning in Neural Network Pruning", 2020, section 3.
    """
    _check(accumulate=accumulate, patience=patience, teacher=teacher, distil=distil, cuts=cuts)
    loss = as_loss(loss)
    judge = HeldOut.of(validation, loss, best=best, patience=patience)
    total, skipped = _lengths(
        data, steps, epochs, schedule=schedule, warmup=warmup_steps, accumulate=accumulate, last_of=last_of
    )
    trained = _trainable(model)
    started = time.perf_counter()
    with ExitStack() as stack:
        if teacher is not None and distil is not None:
            stack.enter_context(guard(teacher, mode="eval"))
            loss = taught(loss, teacher, distil, model, cuts or {})
        stack.enter_context(guard(model, mode="train", gradients=True, seed=seed, rollback=True))
        # Nobody takes these masks back, so what they hide need not be stored. The hold ends with the optimizer.
        handle = mask_model(model, masks or {}, keep_originals=False)
        low_rank = None if adapters is None else Adapters(model, adapters, masks or {})
        built = build_optimizer(optimizer, trained if low_rank is None else low_rank.parameters)
        passes = None if steps is not None else (epochs or 1)
        rates = Rates(built, schedule, total=total, passes=passes or 0, warmup=warmup_steps, skipped=skipped)
        if rates.needs_figure and judge is None:
            raise RecipeError("this schedule asks for a figure after each pass", hint="pass validation=")
        reader = Reader(data, passes)
        # Closed at once, also when a step raises: the data get their epoch back then, not when the garbage is taken.
        stack.callback(reader.close)
        loop = Loop(
            model, in_precision(loss or default_loss, amp, device_of(model)), built, rates, reader,
            accumulate=accumulate, judge=judge, adapters=low_rank,
        )  # fmt: skip
        _go_on(loop, keeper)
        if low_rank is None:
            handle.hold(built)
        _run(loop, steps, keeper, progress, total)
        check_weights(model)
    seconds = time.perf_counter() - started
    return History(tuple(loop.records), seconds, *(() if judge is None else (tuple(judge.figures), judge.kept)))


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    found = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not found:
        raise InputError("no parameter of the model requires a gradient", hint="call model.requires_grad_()")
    return found


def _go_on(loop: Loop, keeper: Keeper | None) -> None:
    found = None if keeper is None else keeper.found()
    if found is not None:
        loop.load_state_dict(found)


def _run(loop: Loop, steps: int | None, keeper: Keeper | None, progress: Advance | None, total: int) -> None:
    try:
        loop.run(steps, keeper, progress, total)
    except NonFiniteError as error:
        # The loop says that the step was not made; the guard around it takes back all steps before it as well.
        why = "the model is back at the state before the fine-tuning"
        raise NonFiniteError(error.what, why=why, hint=error.hint) from error


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
    value = gradients(model, [batch], as_loss(loss) or default_loss, optimizer, step)
    if after_backward is not None:
        after_backward()
    optimizer.step()
    return value


def _check(
    *, accumulate: int, patience: int | None, teacher: nn.Module | None, distil: Distil | None, cuts: Cuts | None
) -> None:
    for name, value in (("accumulate", accumulate), ("patience", patience)):
        if value is not None and value < 1:
            raise RecipeError(f"{name} is {value}", hint="give at least 1")
    if (teacher is None) != (distil is None):
        raise RecipeError("teacher and distil belong together", hint="pass teacher=dense_model, distil=Distil(...)")


def _lengths(
    data: Data,
    steps: int | None,
    epochs: int | None,
    *,
    schedule: ScheduleSpec,
    warmup: int,
    accumulate: int,
    last_of: int | None,
) -> tuple[int, tuple[int, int]]:
    """Steps in all (0 where not known and not needed), and the (steps, passes) that a rewound schedule leaves out."""
    total = total_steps(data, steps=steps, epochs=epochs, schedule=schedule, warmup=warmup, accumulate=accumulate)
    if last_of is None:
        return total, (0, 0)
    length = steps or epochs or 1
    if last_of < length:
        raise RecipeError(f"last_of is {last_of}, and {length} are to be trained", hint=f"give at least {length}")
    if schedule == "constant":
        raise RecipeError(
            "last_of rewinds the learning rate, and a constant one is the same everywhere",
            hint="give the schedule of the original training, or leave last_of out",
        )
    if steps is not None:
        return total, (last_of - steps, 0)
    return total, (total * (last_of - length) // length, last_of - length)


def total_steps(
    data: Data, *, steps: int | None, epochs: int | None, schedule: ScheduleSpec, warmup: int, accumulate: int
) -> int:
    """Steps in all; 0 where the data has no length and the schedule does not need it.

    Raises:
        RecipeError: a number out of range, or a length that is needed and not there.
    """
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
        return passes * -(-len(data) // accumulate)  # type: ignore[arg-type]
    except TypeError:
        if schedule == "constant":  # the one that never asks how far it is
            return 0
        raise RecipeError(
            f"the schedule {schedule!r} needs the number of steps, and the data has no length",
            hint="give steps=...",
        ) from None


def check_weights(model: nn.Module) -> None:
    """Refuse a trained model with NaN or Inf in it.

    Raises:
        NonFiniteError: names the weight.
    """
    # The loss of each step was seen before it; what the last step did was not.
    for name, parameter in model.named_parameters():
        if not parameter.detach().isfinite().all():
            raise NonFiniteError(
                f"{name!r} has NaN or Inf after the last step",
                why="the model is back at the state before the training",
                hint="lower the learning rate",
            )
