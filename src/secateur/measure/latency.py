"""Latency of several models on one machine, measured so that they can be compared."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from secateur.errors import InputError, RecipeError
from secateur.model.call import batch_size_of, call, device_of, to_device, with_batch_size
from secateur.model.guard import evaluating
from secateur.types import Example, Latency

Timer = Callable[[], float]


def latency(
    models: Mapping[str, nn.Module],
    example: Example,
    *,
    rounds: int = 30,
    warmup: int = 3,
    threads: int | None = None,
    batch_size: int | None = None,
    timer: Timer = time.perf_counter,
) -> dict[str, Latency]:
    """Time the forward passes of models, interleaved: every round runs each model once, in alternating order.

    Interleaving lets a busy or throttling machine slow all models alike. Compare only numbers of one call;
    numbers of two calls differ by whatever the machine did in between.

    Args:
        models: name -> model; all take the same example.
        example: what `secateur.model.call.call` takes.
        rounds: timed forward passes per model, at least 1.
        warmup: untimed rounds before them.
        threads: CPU threads to use; None leaves the setting alone. Put back afterwards.
        batch_size: repeat or trim the example to this size; None leaves it as it is.
        timer: a clock in seconds.

    Returns:
        Name -> median, 10th and 90th percentile in milliseconds, and the same of the ratio to the first model,
        round by round.

    Raises:
        InputError: there is no model.
        RecipeError: rounds, warmup or threads out of range.
        ForwardError: a forward fails.

    Cost: ``(rounds + warmup)`` forward passes per model.
    """
    if not models:
        raise InputError("there is no model to measure")
    for name, value, least in (("rounds", rounds, 1), ("warmup", warmup, 0), ("threads", threads or 1, 1)):
        if value < least:
            raise RecipeError(f"{name} is {value}", hint=f"give at least {least}")
    if batch_size is not None:
        example = with_batch_size(example, batch_size)
    inputs = {name: to_device(example, device_of(model)) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with (
        _threads(threads) as used,
        evaluating(*models.values(), example=inputs),
        torch.inference_mode(),
        _no_collection(),
    ):
        for number in range(-warmup, rounds):
            order = list(models) if number % 2 == 0 else list(models)[::-1]
            for name in order:
                taken = _time(models[name], inputs[name], timer)
                if number >= 0:
                    seconds[name].append(taken)
    size = batch_size_of(example)
    first = next(iter(seconds))
    return {
        name: _summary(values, used, size, None if name == first else seconds[first])
        for name, values in seconds.items()
    }


def _time(model: nn.Module, example: Example, timer: Timer) -> float:
    device = device_of(model)
    _synchronize(device)
    start = timer()
    call(model, example)
    _synchronize(device)
    return timer() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summary(seconds: list[float], threads: int, batch_size: int, first: list[float] | None) -> Latency:
    p10, median, p90 = (float(value) for value in np.percentile(np.array(seconds) * 1e3, [10, 50, 90]))
    ratio = None
    if first is not None and min(first) > 0:
        low, middle, high = (float(v) for v in np.percentile(np.array(seconds) / np.array(first), [10, 50, 90]))
        ratio = (middle, low, high)
    return Latency(median, p10, p90, len(seconds), threads, batch_size, ratio)


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
