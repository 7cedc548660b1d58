"""``--metric``: a figure of quality by its name, or by the file or module of the user's that holds it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import cast

from torch import nn

from secateur.errors import InputError, RecipeError
from secateur.measure.named import adapted, metric_named
from secateur.sources.words import is_python, named_object
from secateur.types import Evaluate, Judge, Metric


def resolve_metric(words: Sequence[str]) -> Judge | None:
    """What METRIC words ask for.

    Args:
        words: names (accuracy, top5, f1, mse ... or one of the library `evaluate`), ``file.py:NAME`` or
            ``py:package.module:NAME``. NAME is a metric (of torchmetrics, or alike), a class or a function without
            arguments that makes one, or ``evaluate(model)``.

    Returns:
        What `secateur.prune` takes as `evaluate`; None where there are no words.

    Raises:
        RecipeError: no such name, or something that is no metric.
        InputError: the user's code raised.
    """
    found: dict[str, Evaluate | Metric | str] = {}
    for word in words:
        title, one = _resolved(word)
        if title in found:
            raise RecipeError(f"--metric {word}: {title!r} is there twice")
        found[title] = one
    if len(found) == 1:
        ((title, one),) = found.items()
        # Alone, a function's own names for its figures need nothing in front of them.
        if not isinstance(one, (str, Metric)):
            return _titled(title, one)
    return found or None


def needs_labels(words: Sequence[str]) -> bool:
    """Whether a METRIC word is a name, which says nothing without data."""
    return any(not (word.startswith("py:") or is_python(word)) for word in words)


def _resolved(word: str) -> tuple[str, Evaluate | Metric | str]:
    if needs_labels([word]):
        metric_named(word)  # an unknown name is refused before anything long begins
        return word, word
    target = word.removeprefix("py:")
    title, made = target.rpartition(":")[2], named_object(target)
    if isinstance(made, type) or (inspect.isroutine(made) and not _takes_a_model(made)):
        try:
            made = cast(Callable[[], object], made)()
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            hint = "NAME() must make the metric: write a function that gives it its arguments"
            raise InputError(f"--metric {word}: {title}() failed", why=why, hint=hint) from error
    judge = adapted(made)
    if not (isinstance(judge, Metric) or callable(judge)):
        raise RecipeError(
            f"--metric {word} is a {type(made).__name__}",
            hint="NAME is a metric with update, compute and reset, what makes one, or evaluate(model)",
        )
    return title, judge


def _takes_a_model(function: object) -> bool:
    """Whether a function has an argument that must be given: ``evaluate(model)``, and no factory."""
    needed = [
        one
        for one in inspect.signature(cast(Callable[..., object], function)).parameters.values()
        if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    ]
    return bool(needed)


def _titled(title: str, evaluate: Evaluate) -> Evaluate:
    """A bare number gets the name of the function that found it."""

    def measured(model: nn.Module) -> float | Mapping[str, float]:
        result = evaluate(model)
        return result if isinstance(result, Mapping) else {title: result}

    return measured
