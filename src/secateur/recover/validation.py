"""What is looked at after each pass: the loss on held-out data, the best weights, and whether it is time to stop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset

from secateur.errors import InputError, RecipeError
from secateur.model.call import default_loss, device_of, to_device, to_example
from secateur.model.guard import evaluating
from secateur.model.samples import batch_size_of
from secateur.model.tensors import named_tensors
from secateur.types import Batch, Data, Loss


class JudgeState(TypedDict):
    """What the passes gave so far, and the weights of the best one where they are kept."""

    figures: list[float]
    weights: dict[str, Tensor] | None


class HeldOut:
    """Measures a model after each pass.

    Args:
        data: batches that nothing trains on.
        loss: of the labels.
        best: remember the weights of the best pass, and put them back at the end.
        patience: passes without a lower loss after which it is time to stop; None = never.
    """

    def __init__(self, data: Data, loss: Loss, *, best: bool, patience: int | None) -> None:
        self.data, self.loss, self.best, self.patience = data, loss, best, patience
        self.figures: list[float] = []
        self._weights: dict[str, Tensor] | None = None

    @classmethod
    def of(cls, data: Data | None, loss: Loss | None, *, best: bool, patience: int | None) -> HeldOut | None:
        """A judge, or None where none is asked for.

        Raises:
            RecipeError: the best pass or patience is asked for, and there are no data to measure with.
        """
        if data is None and (best or patience is not None):
            raise RecipeError(
                f"{'best' if best else 'patience'} needs data that nothing trains on",
                why="on the training data the last pass is nearly always the best one",
                hint="pass validation=, or holdout in a recipe",
            )
        return None if data is None else cls(data, loss or default_loss, best=best, patience=patience)

    @property
    def lowest(self) -> int:
        """The pass with the lowest loss, from 0; the first of equals. NaN is never the lowest."""
        return min(range(len(self.figures)), key=lambda i: (math.isnan(self.figures[i]), self.figures[i]))

    @property
    def kept(self) -> int | None:
        """The pass whose weights stay, where the best is asked for."""
        return self.lowest if self.best and self.figures else None

    @property
    def patience_is_over(self) -> bool:
        """Whether the last passes brought nothing."""
        return self.patience is not None and len(self.figures) - 1 - self.lowest >= self.patience

    def look(self, model: nn.Module) -> float:
        """Measure after a pass; returns the mean loss."""
        self.figures.append(self._measure(model))
        if self.best and self.lowest == len(self.figures) - 1:
            self._weights = {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}
        return self.figures[-1]

    def finish(self, model: nn.Module) -> None:
        """Put the best weights back."""
        if self._weights is not None:
            with torch.no_grad():
                for name, tensor in named_tensors(model).items():
                    tensor.copy_(self._weights[name])

    def state_dict(self) -> JudgeState:
        """Figures, and the best weights."""
        return {"figures": self.figures, "weights": self._weights}

    def load_state_dict(self, state: JudgeState) -> None:
        """Take over `state_dict`."""
        self.figures, self._weights = list(state["figures"]), state["weights"]

    def _measure(self, model: nn.Module) -> float:
        total, count = 0.0, 0
        with evaluating(model):
            for batch in self.data:
                size = _samples(batch)
                total += float(self.loss(model, to_device(batch, device_of(model)))) * size
                count += size
        if not count:
            raise InputError("the validation data hold no batch", hint="is the loader empty or used up?")
        return total / count


def divided(data: Data, share: float) -> tuple[Data, Data]:
    """Training data and data to judge by, of one set.

    Args:
        data: a list of batches, a `DataLoader` over a data set with a length, whose samples are divided, or an object
            with ``divided(share) -> (train, validation)``, as `TensorData` has.
        share: of the second part, above 0 and below 1.

    Raises:
        RecipeError: the data cannot be divided, since nothing says which samples a batch will hold.
    """
    divide = getattr(data, "divided", None)
    if callable(divide):
        train, held = divide(share)
        return train, held
    if isinstance(data, DataLoader) and _plain(data):
        chosen = _spread(len(data.dataset), share)  # type: ignore[arg-type]
        kept = [i for i in range(len(data.dataset)) if i not in chosen]  # type: ignore[arg-type]
        return _loader(data, kept, like=True), _loader(data, sorted(chosen), like=False)
    if isinstance(data, Sequence) and len(data) > 1:
        chosen = _spread(len(data), share)
        train = [batch for i, batch in enumerate(data) if i not in chosen]
        return train, [batch for i, batch in enumerate(data) if i in chosen]
    raise RecipeError(
        f"holdout cannot divide a {type(data).__name__}",
        why="nothing says which samples will be in which batch: it may be another one in each pass",
        hint="give a list of batches, a DataLoader over a data set with a length and no sampler of its own, or "
        "secateur.sources.TensorData, or train with finetune(validation=...)",
    )


def _spread(length: int, share: float) -> set[int]:
    """Places of a share, spread evenly: samples and batches may be sorted."""
    count = min(max(round(length * share), 1), length - 1)
    return {round((i + 0.5) * length / count - 0.5) for i in range(count)}


def _plain(loader: DataLoader[Batch]) -> bool:
    """Whether a loader reads every sample of its data set once, in order or shuffled, in batches of its own making."""
    sampler, dataset = loader.sampler, loader.dataset
    whole = isinstance(sampler, SequentialSampler) or (
        isinstance(sampler, RandomSampler) and not sampler.replacement and sampler.num_samples == len(dataset)  # type: ignore[arg-type]
    )
    made = type(loader) is DataLoader and type(loader.batch_sampler) is BatchSampler
    return made and whole and not isinstance(dataset, IterableDataset) and len(dataset) > 1  # type: ignore[arg-type]


def _loader(loader: DataLoader[Batch], places: list[int], *, like: bool) -> DataLoader[Batch]:
    """A loader of some samples; like the one that it is made of, or in order and whole, to judge by."""
    part = Subset(loader.dataset, places)
    # The very generators of the loader: where they stand is a part of a run's state.
    shuffled = RandomSampler(part, generator=getattr(loader.sampler, "generator", None))
    return DataLoader(
        part,
        batch_size=loader.batch_size,
        sampler=shuffled if like and isinstance(loader.sampler, RandomSampler) else None,
        drop_last=loader.drop_last and like,
        generator=loader.generator if like else None,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        persistent_workers=loader.persistent_workers,
    )


def _samples(batch: Batch) -> int:
    return max(batch_size_of(to_example(batch)), 1)
