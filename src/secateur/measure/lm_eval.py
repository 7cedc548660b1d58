"""Tasks of lm-eval, the evaluation harness that papers on language models quote, where it is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from torch import nn

from secateur.errors import InputError, UnsupportedError
from secateur.model.call import device_of
from secateur.model.guard import evaluating

PREFIX = "lm-eval:"


def lm_eval(
    model: nn.Module, tokenizer: object, tasks: Sequence[str], *, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Run tasks of lm-eval on a model in memory.

    Args:
        model: of transformers; left as it is, on the device that it is on.
        tokenizer: of that model.
        tasks: names of the harness ("hellaswag").
        limit: samples per task at most, the first ones; None: all.

    Returns:
        task -> metric -> value, as the harness names them, its standard errors included.

    Raises:
        UnsupportedError: lm-eval is not installed, or the model has no tokenizer.
        InputError: the harness fails: an unknown task, or data that it cannot fetch.
    """
    try:
        harness: Any = import_module("lm_eval")
        adapter: Any = import_module("lm_eval.models.huggingface").HFLM
    except ImportError as error:
        raise UnsupportedError(
            f"{PREFIX}{','.join(tasks)} needs the package lm-eval", why=str(error), hint="pip install 'secateur[eval]'"
        ) from error
    if tokenizer is None:
        raise UnsupportedError("lm-eval gives text, and the model brings no tokenizer", hint="use hf:FOLDER")
    try:
        with evaluating(model):
            # One sample at a time: larger batches pad, and what pads is another figure for some models.
            wrapped = adapter(pretrained=model, tokenizer=tokenizer, batch_size=1, device=str(device_of(model)))
            found = harness.simple_evaluate(model=wrapped, tasks=list(tasks), limit=limit, log_samples=False)
    except Exception as error:
        raise InputError(
            f"lm-eval failed on {', '.join(tasks)}",
            why=f"{type(error).__name__}: {str(error).strip()[:400]}",
            hint="`lm-eval ls tasks` names the tasks; most fetch their data from a hub",
        ) from error
    results: Mapping[str, Mapping[str, object]] = found["results"]
    return {task: _numbers(values) for task, values in results.items()}


def _numbers(values: Mapping[str, object]) -> dict[str, float]:
    """The figures of a task, without its name and its marks."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
