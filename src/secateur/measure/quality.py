"""Quality: what is measured where the user says nothing, and the form that every result is brought into.

`yardstick` decides once, before anything is cut, so that all models of a run are held against the same figure, on the
same batches; where there is none it says why.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import InputError, NonFiniteError
from secateur.measure.named import NAMES, Hits, Module, adapted
from secateur.measure.perplexity import perplexity, predicts_next
from secateur.model.call import call, default_loss, describe, device_of, prediction, to_device, to_example, to_target
from secateur.model.door import Parts, first_batch, task_of
from secateur.model.guard import evaluating, guard
from secateur.model.samples import batch_size_of
from secateur.types import Batch, Data, Evaluate, Judge, Loss, Metric

# Training data may have no end, and say little of quality: so much of them shows whether the model still works.
MOST_BATCHES = 64
LOWER_IS_BETTER = ("loss", "error", "perplexity", "ppl", "mse", "mae", "nll")


@dataclass(frozen=True, eq=False)
class Yardstick:
    """How the quality of a run is measured.

    Args:
        evaluate: ``evaluate(model)`` -> figures by name; None where quality is not measured.
        on: which data the figures are of ("the test part"), "" where the user's own function knows alone.
        why: why quality is not measured, "" where it is.
        samples: figure -> on how many samples it is a share, as far as that is known once it was measured.
    """

    evaluate: Callable[[nn.Module], dict[str, float]] | None
    on: str = ""
    why: str = ""
    samples: Callable[[], dict[str, int]] = dict


def yardstick(model: nn.Module, data: Parts, judge: Judge | None = None, *, loss: Loss | None = None) -> Yardstick:
    """Decide how quality is measured, and on which data.

    Without `judge`: accuracy for classification, the mean squared error ("mse") for regression, the mean loss ("loss")
    for models with a loss of their own and wherever `loss` is given and no classes are found; loss and perplexity for
    models that predict the next token. See `secateur.model.door.task_of`. The test part is read whole; training and
    calibration data, where there is no test part, up to `MOST_BATCHES` batches and always the same ones, as far as
    torch's generator decides which.

    Args:
        model: left as it is; one batch of it shows the task.
        data: the parts that were given.
        judge: ``evaluate(model)``, a metric with update, compute and reset (of torchmetrics, or alike), the name of
            one (see `secateur.measure.named`), one of the library `evaluate`, or a mapping of names to such.
        loss: ``loss(model, batch)`` of the training.

    Returns:
        the yardstick; without `evaluate`, but with the reason, where quality cannot be measured.

    Raises:
        InputError: a judge of another kind, or a metric without labelled data.

    Cost: one forward pass where there is no `judge`.

    Example:
        >>> data = Parts(test=[(torch.eye(3), torch.tensor([0, 1, 1]))])
        >>> found = yardstick(nn.Identity(), data)
        >>> found.on, round(found.evaluate(nn.Identity())["accuracy"], 3)
        ('the test part', 0.667)
    """
    batches, on = data.judging
    # A test part has an end, and its figure is quoted: read whole.
    if batches is not None and data.test is None:
        batches = _Leading(batches)
        on += f" (at most {MOST_BATCHES} batches)"
    if judge is not None:
        return _asked(judge, batches, on)
    if batches is None:
        return Yardstick(None, why="there are no data")
    # A loader that shuffles draws even for one batch; whoever draws next must not notice.
    with torch.random.fork_rng(devices=[]):
        task = task_of(model, first_batch(batches))
    if task.kind == "classification":
        hits = _Hits(batches)
        return Yardstick(_repeatable(hits), on, samples=hits.samples)
    # What the user trains for is a better figure than one guessed from shapes, except where a share of hits is there.
    if loss is not None:
        figure: Evaluate = _loss_on(batches, loss, "loss")
    elif task.kind == "none":
        return Yardstick(None, why=task.why)
    elif task.kind == "own loss" and predicts_next(model, first_batch(batches)):
        figure = _perplexity_on(batches)
    else:
        figure = _loss_on(batches, default_loss, "mse" if task.kind == "regression" else "loss")
    return Yardstick(_repeatable(figure), on)


class _Leading:
    """The first batches of some data, the same number at every reading."""

    def __init__(self, data: Data) -> None:
        self._data = data

    def __iter__(self) -> Iterator[Batch]:
        return islice(iter(self._data), MOST_BATCHES)


def _repeatable(evaluate: Evaluate) -> Callable[[nn.Module], dict[str, float]]:
    """With the same random numbers every time: a loader that shuffles then hands out the same batches."""

    def measured(model: nn.Module) -> dict[str, float]:
        with torch.random.fork_rng(devices=[]):
            # The CPU's alone, from which loaders draw: `torch.manual_seed` would set those of every GPU for good.
            torch.default_generator.manual_seed(0)
            return quality(model, evaluate)

    return measured


def _asked(judge: Judge, batches: Data | None, on: str) -> Yardstick:
    # Metrics first: those of torchmetrics are modules, and calling one means to update it.
    several = judge if isinstance(judge, Mapping) else {judge if isinstance(judge, str) else "": judge}
    named: dict[str, Any] = {name: adapted(one) for name, one in several.items()}
    for name, one in named.items():
        # The class of a metric has all that a metric has, and can be called: it would take the model for an option.
        if isinstance(one, type) or not (callable(one) or isinstance(one, Metric)):
            what = f"the class {one.__name__}" if isinstance(one, type) else f"a {type(one).__name__}"
            raise InputError(
                f"evaluate{f'[{name!r}]' if name else ''} is {what}",
                hint="give evaluate(model) -> number or mapping, a metric with update, compute and reset, a name "
                f"({', '.join(NAMES)}), or a mapping of names to such",
            )
    # One pass over the data serves all metrics; each function reads what it reads.
    metrics = {name or _name_of(one): one for name, one in named.items() if isinstance(one, Metric)}
    functions = {name: one for name, one in named.items() if not isinstance(one, Metric)}
    if metrics and (batches is None or to_target(first_batch(batches)) is None):
        raise InputError(
            "a metric needs batches with targets, and there are none",
            hint="pass test= (or data=) with batches of (input, target), or evaluate(model) of your own",
        )

    def measured(model: nn.Module) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, one in functions.items():
            found |= _under(name, quality(model, one))
        if metrics and batches is not None:
            found |= _metrics(model, metrics, batches)
        return found

    # A function of the user's reads whatever it likes, so only metrics are known to be of these data.
    return Yardstick(
        _repeatable(measured) if metrics else measured,
        on if metrics and not functions else "",
        samples=lambda: {name: one.count for name, one in metrics.items() if isinstance(one, Hits) and one.count},
    )


def _metrics(model: nn.Module, metrics: Mapping[str, Metric], batches: Data) -> dict[str, float]:
    """All metrics in one pass over the data."""
    device = device_of(model)
    for metric in metrics.values():
        metric.reset()
    with evaluating(model):
        for number, batch in enumerate(batches):
            moved = to_device(batch, device)
            target = to_target(moved)
            if target is None:
                raise InputError(f"batch {number}, {describe(batch)}, holds no target")
            predicted = prediction(call(model, to_example(moved)))
            for metric in metrics.values():
                # A metric keeps its sums where it was put; those without a device keep numbers.
                place = getattr(metric, "device", None) or torch.device("cpu")
                metric.update(predicted.to(place), target.to(place))
    found: dict[str, float] = {}
    for name, metric in metrics.items():
        result = metric.compute()
        found |= _under(name, dict(result)) if isinstance(result, Mapping) else _under(name, {"": result})
    return found


def _under(name: str, figures: Mapping[str, object]) -> dict[str, float]:
    """Figures with the name that the user gave in front: ``{"top": evaluate}`` gives "top", or "top_a" and "top_b"."""
    if not name:
        return _numbers(figures, figures)
    bare = len(figures) == 1 and set(figures) <= {"", "quality", name}
    return _numbers({name if bare else f"{name}_{key}": value for key, value in figures.items()}, figures)


def _name_of(metric: Metric) -> str:
    """``MulticlassAccuracy()`` -> ``multiclass_accuracy``: reports know a share by the words of its name."""
    if isinstance(metric, Module):
        return metric.name
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(metric).__name__).lower()


def _loss_on(batches: Data, loss: Loss, name: str) -> Callable[[nn.Module], dict[str, float]]:
    """Mean of a loss over the batches, each weighed by its samples."""

    def measured(model: nn.Module) -> dict[str, float]:
        total = samples = 0.0
        for value, size in losses(model, batches, loss):
            total += value * size
            samples += size
        if not samples:
            raise InputError("the data for the loss hold no sample", hint="is the loader used up or empty?")
        return {name: total / samples}

    return measured


def losses(model: nn.Module, batches: Data, loss: Loss) -> Iterator[tuple[float, int]]:
    """The loss of every batch, and how many samples it holds."""
    device = device_of(model)
    with evaluating(model):
        for batch in batches:
            moved = to_device(batch, device)
            yield float(loss(model, moved)), batch_size_of(to_example(moved))


def _perplexity_on(batches: Data) -> Evaluate:
    return lambda model: perplexity(model, batches)


def higher_is_better(name: str) -> bool:
    """Whether a larger figure of this name is the better one: losses and errors are told by their names.

    Example:
        >>> higher_is_better("accuracy"), higher_is_better("test_loss"), higher_is_better("mse")
        (True, False, False)
    """
    return not any(word in name.lower() for word in LOWER_IS_BETTER)


def accuracy(model: nn.Module, data: Data) -> float:
    """Fraction of targets that the largest output hits; misleading where classes are very unequal in number.

    Args:
        model: gives ``[batch, classes, ...]``, or an output with such ``logits``.
        data: batches of ``(input, integer target [batch, ...])`` or mappings with a label key. Negative
            targets are ignored.

    Returns:
        A number in [0, 1], an exact count over all targets.

    Raises:
        InputError: no batch, no target, or target and output do not fit.
        NonFiniteError: an output is NaN.

    Cost: one forward pass over the data.

    Example:
        >>> x = torch.eye(3)
        >>> accuracy(nn.Identity(), [(x, torch.tensor([0, 1, 1]))])  # doctest: +ELLIPSIS
        0.666...
    """
    right, total = _right(model, data)
    return right / total


def _right(model: nn.Module, data: Data) -> tuple[int, int]:
    """How many targets are hit, and how many there are."""
    right = total = 0
    for hit, counted in hits(model, data):
        right += int((hit & counted).sum())
        total += int(counted.sum())
    if not total:
        raise InputError("the data for accuracy holds no target", hint="is the loader used up or empty?")
    return right, total


def hits(model: nn.Module, data: Data) -> Iterator[tuple[Tensor, Tensor]]:
    """Of every batch which targets the largest output hits, and which targets count; see `accuracy`."""
    device = device_of(model)
    with evaluating(model):
        for number, batch in enumerate(data):
            moved = to_device(batch, device)
            target = to_target(moved)
            if target is None or target.is_floating_point():
                raise InputError(f"batch {number}, {describe(batch)}, holds no integer target")
            predicted = prediction(call(model, to_example(moved)))
            # Negative labels are the usual way to say "not this one".
            yield _classes(predicted, target, number) == target, target >= 0


class _Hits:
    """Accuracy on some data, which remembers how many targets it was counted on."""

    def __init__(self, data: Data) -> None:
        self._data, self._total = data, 0

    def __call__(self, model: nn.Module) -> dict[str, float]:
        right, self._total = _right(model, self._data)
        return {"accuracy": right / self._total}

    def samples(self) -> dict[str, int]:
        return {"accuracy": self._total} if self._total else {}


def _classes(predicted: Tensor, target: Tensor, number: int) -> Tensor:
    # The largest of several NaN is the first, which would count as class 0 and now and then be right.
    if predicted.isnan().any():
        raise NonFiniteError(f"the output for batch {number} of the evaluation data has NaN")
    if predicted.dim() < 2 or predicted.shape[:1] + predicted.shape[2:] != target.shape:
        raise InputError(
            f"the output {describe(predicted)} does not fit the target {describe(target)}",
            hint="accuracy needs an output [batch, classes, ...] for targets [batch, ...]",
        )
    return predicted.argmax(1)


def accuracy_on(data: Data) -> Callable[[nn.Module], dict[str, float]]:
    """Make an ``evaluate(model)`` that gives ``{"accuracy": ...}`` on this data."""
    return lambda model: {"accuracy": accuracy(model, data)}


def quality(model: nn.Module, evaluate: Evaluate) -> dict[str, float]:
    """Call ``evaluate(model)`` and bring the result into named floats.

    Args:
        model: any module; given back as it was, whatever mode the evaluation leaves it in.
        evaluate: returns a number or a mapping of numbers.

    Returns:
        Name -> value; a bare number is called "quality".

    Raises:
        InputError: the result is neither.
        NonFiniteError: a value is NaN or infinite.
    """
    with guard(model):  # an evaluation that ends in eval mode, or draws numbers, changes nothing for what follows
        result = evaluate(model)
    # A bare number has no name that a table could show.
    return _numbers(dict(result) if isinstance(result, Mapping) else {"quality": result}, result)


def _numbers(named: Mapping[str, object], source: object) -> dict[str, float]:
    try:
        values = {str(name): float(value) for name, value in named.items()}  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"evaluate(model) returned a {type(source).__name__} that is no number or mapping of numbers",
            why=str(error),
        ) from error
    for name, value in values.items():
        if not math.isfinite(value):
            raise NonFiniteError(f"evaluate(model) returned {value} for {name!r}")
    return values
