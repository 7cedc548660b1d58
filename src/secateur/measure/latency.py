"""Latency of several models on one machine, measured so that they can be compared."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from secateur.errors import ForwardError, InputError, RecipeError
from secateur.model.call import call, device_of, to_device
from secateur.model.guard import evaluating
from secateur.model.samples import batch_size_of, with_batch_size
from secateur.types import Example, Latency, Stop

Timer = Callable[[], float]

# The fewest rounds that can say anything: were two models equally fast, each round would be a toss, and all of n rounds
# would fall alike with probability 2 / 2^n: 1/16 for five rounds, and 1/32, below 5 %, for six (sign test, two sides).
FEWEST_ROUNDS = 6
WARMUP_SHARE = 0.25  # of the time budget that warming up may use


def latency(
    models: Mapping[str, nn.Module],
    example: Example,
    *,
    rounds: int = 30,
    warmup: int = 3,
    seconds: float | None = None,
    spread: float = 0.0,
    threads: int | None = None,
    batch_size: int | None = None,
    timer: Timer = time.perf_counter,
) -> dict[str, Latency]:
    """Time the forward passes of models, interleaved: every round runs each model once, in alternating order.

    Interleaving lets a busy or throttling machine slow all models alike. Compare only numbers of one call;
    numbers of two calls differ by whatever the machine did in between.

    With `seconds` or `spread` the rounds end as soon as the time is used up or the models are compared closely enough,
    though never before the sixth: fewer cannot tell a difference from chance. Neither rule looks at which model is
    faster, so stopping early favours none.

    Args:
        models: name -> model; all take the same example.
        example: what `secateur.model.call.call` takes.
        rounds: timed forward passes per model at most, at least 1.
        warmup: untimed rounds before them at most.
        seconds: time budget for all rounds together; a quarter of it is for warming up, which is once at least where it
            is asked for at all. None = no budget.
        spread: stop when p10 and p90 of every ratio (of the times, where there is one model) lie at most this far
            apart, as a fraction of the median. 0 = never.
        threads: CPU threads to use; None leaves the setting alone. Put back afterwards.
        batch_size: repeat or trim the example to this size; None leaves it as it is.
        timer: a clock in seconds.

    Returns:
        Name -> median, 10th and 90th percentile in milliseconds, and the same of the ratio to the first model,
        round by round, and why the rounds ended.

    Raises:
        InputError: there is no model.
        RecipeError: rounds, warmup, seconds, spread or threads out of range.
        ForwardError: a forward fails.

    Cost: ``(rounds + warmup)`` forward passes per model, fewer where a rule ends them.
    """
    taken, threads, size, stopped = timed(
        models, example, rounds=rounds, warmup=warmup, seconds=seconds, spread=spread, threads=threads,
        batch_size=batch_size, timer=timer,
    )  # fmt: skip
    first = next(iter(taken))
    return {
        name: _summary(values, threads, size, stopped, None if name == first else taken[first])
        for name, values in taken.items()
    }


def timed(
    models: Mapping[str, nn.Module],
    example: Example,
    *,
    rounds: int,
    warmup: int = 3,
    seconds: float | None = None,
    spread: float = 0.0,
    threads: int | None = None,
    batch_size: int | None = None,
    timer: Timer = time.perf_counter,
    chance: random.Random | None = None,
) -> tuple[dict[str, list[float]], int, int, Stop]:
    """The rounds of `latency` themselves.

    Args:
        models: as for `latency`; one module may stand under several names, and is then timed as often.
        example: as for `latency`.
        rounds: as for `latency`.
        warmup: as for `latency`.
        seconds: as for `latency`.
        spread: as for `latency`.
        threads: as for `latency`.
        batch_size: as for `latency`.
        timer: as for `latency`.
        chance: draws the order of every round; None = they take turns.

    Returns:
        Name -> seconds of every round, threads that were used, batch size, why the rounds ended.

    Raises:
        InputError: there is no model.
        RecipeError: rounds, warmup, seconds, spread or threads out of range.
        ForwardError: a forward fails.
    """
    if not models:
        raise InputError("there is no model to measure")
    _check_options(rounds, warmup, seconds, spread, threads)
    if batch_size is not None:
        example = with_batch_size(example, batch_size)
    # Copied once, before the clock starts: moving the input is no part of the model.
    inputs = {name: to_device(example, device_of(model)) for name, model in models.items()}
    taken: dict[str, list[float]] = {name: [] for name in models}

    def one_round(number: int) -> None:
        # Whoever runs second finds the other's data in the cache, so they take turns.
        order = list(models) if number % 2 == 0 else list(models)[::-1]
        if chance is not None:
            chance.shuffle(order)
        for name in order:
            taken[name].append(_time(models[name], inputs[name], timer))

    def all_rounds() -> Stop:
        budget = _Budget(seconds, timer)
        for number in range(warmup):
            one_round(number - warmup)
            # The first passes choose kernels and fill caches, so one is taken however little time there is.
            if budget.used(WARMUP_SHARE):
                break
        for values in taken.values():
            values.clear()
        return _timed_rounds(one_round, taken, rounds, spread, budget)

    with _threads(threads) as used, evaluating(*models.values(), example=inputs), _no_collection():
        try:
            with torch.inference_mode():
                stopped = all_rounds()
        except ForwardError:
            # A forward that asks for gradients itself (forces of an energy, an inner step of training) gets them in no
            # inference mode: then all models are timed without it.
            stopped = all_rounds()
    return taken, used, batch_size_of(example), stopped


class _Budget:
    """How much of the time for all rounds is used up."""

    def __init__(self, seconds: float | None, timer: Timer) -> None:
        self.seconds, self.timer, self.begun = seconds, timer, timer()

    def used(self, share: float = 1.0) -> bool:
        """Whether this share of the budget is gone; never, where there is no budget."""
        return self.seconds is not None and self.timer() - self.begun >= share * self.seconds


def _timed_rounds(
    one_round: Callable[[int], None], taken: Mapping[str, list[float]], rounds: int, spread: float, budget: _Budget
) -> Stop:
    """Run rounds until a rule ends them, and say which."""
    for number in range(rounds):
        one_round(number)
        if number + 1 in range(FEWEST_ROUNDS, rounds):
            if spread and all(_spread(values) <= spread for values in _compared(taken)):
                return "spread"
            if budget.used():
                return "time"
    return "rounds"


def _compared(taken: Mapping[str, list[float]]) -> list[list[float]]:
    """What is compared: every model with the first one, round by round; a model alone with itself."""
    first, *others = taken.values()
    return [_ratios(values, first) for values in others] if others and min(first) > 0 else [first]


def _ratios(seconds: list[float], first: list[float]) -> list[float]:
    return [mine / other for mine, other in zip(seconds, first, strict=True)]


def _spread(values: list[float]) -> float:
    median, p10, p90 = _outward(values)
    return (p90 - p10) / median if median else 0.0


def _outward(values: list[float]) -> tuple[float, float, float]:
    """Median, p10 and p90; the last two are values that are there, so that nine of ten lie on this side of either.

    Interpolated percentiles of few rounds would promise more agreement than there was: with one round of six above 1,
    p90 can lie below it.
    """
    low, high = np.percentile(values, 10, method="lower"), np.percentile(values, 90, method="higher")
    return float(np.median(values)), float(low), float(high)


def _check_options(rounds: int, warmup: int, seconds: float | None, spread: float, threads: int | None) -> None:
    whole = (("rounds", rounds, 1), ("warmup", warmup, 0), ("threads", 1 if threads is None else threads, 1))
    for name, value, least in (*whole, ("seconds", seconds or 0, 0), ("spread", spread, 0)):
        if value < least:
            raise RecipeError(f"{name} is {value}", hint=f"give at least {least}")


def _time(model: nn.Module, example: Example, timer: Timer) -> float:
    device = device_of(model)
    synchronize(device)
    start = timer()
    call(model, example)
    synchronize(device)
    return timer() - start


def synchronize(device: torch.device) -> None:
    """Wait for a GPU: its kernels are only queued by a call, and a clock would time the queueing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summary(seconds: list[float], threads: int, batch_size: int, stopped: Stop, first: list[float] | None) -> Latency:
    p10, median, p90 = (float(value) for value in np.percentile(np.array(seconds) * 1e3, [10, 50, 90]))
    ratio = _outward(_ratios(seconds, first)) if first is not None and min(first) > 0 else None
    return Latency(median, p10, p90, len(seconds), threads, batch_size, ratio, stopped)


@contextmanager
def _threads(wanted: int | None) -> Iterator[int]:
    before = torch.get_num_threads()
    if wanted is not None:
        torch.set_num_threads(wanted)
    try:
        yield torch.get_num_threads()
    finally:
        if wanted is not None:
            torch.set_num_threads(before)


@contextmanager
def _no_collection() -> Iterator[None]:
    # A collection that falls into one model's turn would be charged to that model.
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
