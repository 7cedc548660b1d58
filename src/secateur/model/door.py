"""What the user gives as data, looked at once: its parts, whether it can be read again, and what it asks of a model.

Every stage reads the data again: its first batch is the example, then it is scored with, trained with, and measured
with. So the questions that all of them would have to ask are answered here, before anything long starts: a stage gets
`Parts`, and believes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from secateur.errors import InputError, RecipeError, SecateurError
from secateur.model.call import call, describe, device_of, prediction, to_device, to_example, to_target
from secateur.model.guard import evaluating
from secateur.model.labels import own_loss, takes_labels, with_labels
from secateur.model.share import Share
from secateur.types import Batch, Data, Example

NAMES = ("train", "calibration", "test")
ABOUT_PARTS = {
    **dict.fromkeys(("val", "valid", "validation", "eval", "dev"), "quality is measured on test: write test"),
    **dict.fromkeys(("calib", "calibrate", "scoring"), "write calibration"),
    **dict.fromkeys(("training", "trainset", "train_loader"), "write train"),
}


@runtime_checkable
class HasParts(Protocol):
    """Something that names its parts, as `secateur.sources.DataSet` does."""

    @property
    def train(self) -> Data | None: ...  # noqa: D102

    @property
    def calibration(self) -> Data | None: ...  # noqa: D102

    @property
    def test(self) -> Data | None: ...  # noqa: D102

    @property
    def notes(self) -> tuple[str, ...]: ...  # noqa: D102


Given = Data | Mapping[str, Data] | HasParts
"""What may be given as data: batches, a mapping with train, calibration and test, or a `DataSet`."""


@dataclass(frozen=True, eq=False)
class Parts:
    """Data as the stages see it. Every part can be read any number of times.

    Args:
        train: batches to recover with.
        calibration: batches for statistics and scores, where others than those of `train` were given.
        test: batches for quality, which neither training nor scoring reads.
        notes: sentences for the report, for example on how the test part came about.
        share: of several processes, what this one takes of `scoring`; all else is read whole.
    """

    train: Data | None = None
    calibration: Data | None = None
    test: Data | None = None
    notes: tuple[str, ...] = ()
    share: Share | None = None

    @property
    def scoring(self) -> Data | None:
        """The batches for statistics and scores: calibration, or the training data where there is none."""
        # By identity: a loader whose length is 0 until it is read is falsy, and given all the same.
        return self.train if self.calibration is None else self.calibration

    @property
    def deciding(self) -> Data | None:
        """The batches by which it is decided what goes: those of `scoring`, or this process's share of them."""
        return self.scoring if self.share is None else self.share

    @property
    def judging(self) -> tuple[Data | None, str]:
        """The batches for quality, and what they are: the test part, else whatever was given, called by its name."""
        if self.test is not None:
            return self.test, "the test part"
        return (self.calibration, "calibration data") if self.train is None else (self.train, "training data")

    def first(self) -> Batch:
        """The first batch of what is trained or scored with.

        Raises:
            InputError: there are no data, or they hold no batch.
        """
        data = self.scoring if self.train is None else self.train
        if data is None:
            raise InputError(
                "there are neither data nor an example", hint="pass example=the inputs of one forward pass"
            )
        return first_batch(data)

    def example(self) -> Example:
        """The input of the first batch, as `secateur.model.call.call` takes it.

        Raises:
            InputError: as for `first`.
        """
        return to_example(self.first())


@dataclass(frozen=True)
class Task:
    """What labelled batches ask of a model.

    Args:
        kind: "classification" (integer targets, one score per class), "regression" (float targets of the output's
            shape), "own loss" (the model is given the labels and returns a loss, as Hugging Face models do), or
            "none".
        why: where it is none, the reason in words.
    """

    kind: Literal["classification", "regression", "own loss", "none"]
    why: str = ""


def enter(data: Given | None, *, calibration: Data | None = None, test: Data | None = None) -> Parts:
    """Decide what the user gave.

    Args:
        data: batches to train and score with; a mapping of train, calibration and test; a `DataSet`; or None.
        calibration: batches to score with.
        test: batches to measure quality on.

    Returns:
        The parts; those that were not given are None.

    Raises:
        InputError: a part can be read only once, is no iterable of batches, or is a single batch.
        RecipeError: a part is given twice.

    Example:
        >>> import torch
        >>> parts = enter({"train": [torch.zeros(2, 3)], "test": [torch.ones(2, 3)]})
        >>> parts.scoring is parts.train, parts.judging[1]
        (True, 'the test part')
    """
    named, notes = _named(data)
    for name, given in (("calibration", calibration), ("test", test)):
        if given is not None and named.get(name) is not None:
            raise RecipeError(f"{name} is given twice", hint=f"leave it out of data, or leave out {name}=")
        named[name] = named.get(name) if given is None else given
    for name, part in named.items():
        if part is not None:
            _require_batches(part, "the data" if name == "train" else f"the {name} data")
    plain = {name: part.data if isinstance(part, Share) else part for name, part in named.items()}
    shares = {name: part for name, part in named.items() if isinstance(part, Share)}
    # Only what scores is shared: whoever trains or measures reads all of it.
    share = shares.get("train" if named["calibration"] is None else "calibration")
    return Parts(plain.get("train"), plain["calibration"], plain["test"], notes, share)


def _named(data: Given | None) -> tuple[dict[str, Data | None], tuple[str, ...]]:
    if isinstance(data, Mapping):
        if not data or not set(data) <= set(NAMES):
            keys = ", ".join(map(str, data)) or "no key"
            # A mapping of tensors is what a loader of Hugging Face data hands out: one batch, not many.
            single = any(isinstance(value, Tensor) for value in data.values())
            strange = next((str(key) for key in data if key not in NAMES), "")
            meant = ABOUT_PARTS.get(strange, "")
            listed = f"its keys are {', '.join(NAMES)}; give train at least"
            hint = "put the batch into a list" if single else f"{meant}; {listed}" if meant else listed
            raise InputError(f"the data are a mapping with {keys}", hint=hint)
        return dict(data), ()
    if isinstance(data, HasParts):
        return {name: getattr(data, name) for name in NAMES}, data.notes
    return {"train": data}, ()


def _require_batches(data: object, what: str) -> None:
    """Refuse what cannot be read as batches, over and over."""
    if isinstance(data, Tensor):
        raise InputError(f"{what} is one tensor, {describe(data)}", hint="give an iterable of batches: [tensor]")
    if isinstance(data, str) or not isinstance(data, Iterable):
        hint = "give a list of batches or a DataLoader"
        # Datasets of torch have a length and items, and iterate over samples at best.
        if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
            hint = "wrap the data set: torch.utils.data.DataLoader(dataset, batch_size=64)"
        raise InputError(f"{what} is a {type(data).__name__}, no iterable of batches", hint=hint)
    if isinstance(data, Iterator):
        raise InputError(
            f"{what} is a {type(data).__name__} that can be read only once",
            why="the example, the scores, every epoch and every measurement read it from its start",
            hint="give a list of batches, a DataLoader or an object whose __iter__ starts anew",
        )


def first_batch(data: Data) -> Batch:
    """The first batch.

    Raises:
        InputError: there is none.
    """
    for batch in data:
        return batch
    raise InputError("the data hold no batch", hint="is the loader empty or used up?")


def task_of(model: nn.Module, batch: Batch) -> Task:
    """Find out what labelled batches ask of a model, from one of them and the output for it.

    Args:
        model: left as it is.
        batch: one data batch.

    Returns:
        The task; "none" with the reason where there are no labels, or none that fit the output.

    Cost: one forward pass.

    Example:
        >>> import torch
        >>> task_of(nn.Linear(3, 4), (torch.zeros(2, 3), torch.tensor([0, 3]))).kind
        'classification'
        >>> task_of(nn.Linear(3, 4), torch.zeros(2, 3)).why
        'the batches hold no target (the first is float32[2, 3])'
    """
    target = to_target(batch)
    if target is None:
        return Task("none", f"the batches hold no target (the first is {describe(batch)})")
    moved = to_device(batch, device_of(model))
    labelled = takes_labels(model, moved)
    try:
        with evaluating(model):
            output = call(model, with_labels(model, moved) if labelled else to_example(moved))
            predicted = prediction(output)
    except SecateurError as error:
        # The stage that needs this forward refuses it with the whole message; a figure is not worth the run.
        return Task("none", f"the model does not run on the first batch: {error.what}")
    return _task(predicted, target, own=labelled and own_loss(output) is not None)


def _task(predicted: Tensor, target: Tensor, *, own: bool) -> Task:
    shapes = f"the target {describe(target)} and the output {describe(predicted)}"
    fits = predicted.dim() >= 2 and predicted.shape[:1] + predicted.shape[2:] == target.shape
    if not target.is_floating_point() and fits and predicted.shape[1] > 1:
        # [batch, tokens, words] with as many tokens as words fits by chance; a model with a loss of its own knows.
        return Task("own loss" if own and predicted.dim() > 2 else "classification")
    if own:
        return Task("own loss")
    if target.is_floating_point() and target.shape == predicted.shape:
        return Task("regression")
    if not target.is_floating_point() and (target.shape == predicted.shape or fits):
        # argmax over one number is always class 0: an accuracy of it would be a figure about nothing.
        return Task("none", f"{shapes} show no classes to choose from")
    return Task("none", f"{shapes} fit neither classes [batch, classes, ...] nor a regression of equal shapes")
