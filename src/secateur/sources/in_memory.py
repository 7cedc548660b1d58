"""Data that lies in memory: batches of tensors, and splits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from secateur.errors import InputError, RecipeError
from secateur.types import Data, Example

Array = npt.NDArray[np.generic]
Arrays = tuple[Array, Array]
Normalize = tuple[tuple[float, ...], tuple[float, ...]]
CALIBRATION_SAMPLES = 512
SET_ASIDE = (
    "{name} has no test part of its own; one was made of {share}. The model may have seen it in training: "
    "the model's accuracy may be too good, before pruning most of all."
)


class TensorData:
    """Batches ``(input, target)`` out of two tensors; iterating twice gives the same batches twice.

    With ``shuffle`` the order depends on the seed and on the epoch, which `set_epoch` sets (as
    `secateur.recover.finetune` does), never on how often the data was read. A bad choice for data that does
    not fit into memory.

    Args:
        inputs: ``[samples, ...]``; uint8 where ``normalize`` is given.
        targets: ``[samples, ...]``.
        batch_size: samples per batch; the last batch holds what is left.
        shuffle: another order for each epoch.
        seed: of the orders.
        normalize: (mean, std) per channel; a batch is then ``(x / 255 - mean) / std`` in float32.

    Raises:
        InputError: no sample, or not as many targets as inputs.
        RecipeError: batch size below 1.

    Example:
        >>> data = TensorData(torch.arange(3.0), torch.arange(3), batch_size=2)
        >>> [target.tolist() for _, target in data]
        [[0, 1], [2]]
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        *,
        batch_size: int = 64,
        shuffle: bool = False,
        seed: int = 0,
        normalize: Normalize | None = None,
    ) -> None:
        if len(inputs) != len(targets):
            raise InputError(f"there are {len(inputs)} inputs and {len(targets)} targets")
        if len(inputs) == 0:
            raise InputError("there is no sample in the data")
        if batch_size < 1:
            raise RecipeError(f"the batch size is {batch_size}", hint="give at least 1")
        self.inputs, self.targets = inputs, targets
        self.batch_size, self.shuffle, self.seed, self.normalize = batch_size, shuffle, seed, normalize
        self.epoch = 0

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        return len(self.inputs)

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the following passes."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.arange(self.num_samples)
        if self.shuffle:
            # By numpy, seeded anew: torch's generator belongs to the training that reads these batches.
            order = torch.from_numpy(np.random.default_rng([self.seed, self.epoch]).permutation(len(order)))
        for start in range(0, len(order), self.batch_size):
            index = order[start : start + self.batch_size]
            yield self._scaled(self.inputs[index]), self.targets[index]

    def divided(self, share: float) -> tuple[TensorData, TensorData]:
        """Two parts of the samples, each class in the same proportion where targets are integers.

        Args:
            share: of the second part.
        """
        kept, out = split_indices(self.targets.numpy(), fraction=share, seed=self.seed)
        return self._part(kept, shuffle=self.shuffle), self._part(out, shuffle=False)

    def _part(self, indices: npt.NDArray[np.int64], *, shuffle: bool) -> TensorData:
        chosen = torch.from_numpy(indices)
        return TensorData(
            self.inputs[chosen],
            self.targets[chosen],
            batch_size=self.batch_size,
            shuffle=shuffle,
            seed=self.seed,
            normalize=self.normalize,
        )

    def _scaled(self, batch: Tensor) -> Tensor:
        if self.normalize is None:
            return batch
        shape = (1, -1) + (1,) * (batch.dim() - 2)
        mean, std = (torch.tensor(values).reshape(shape) for values in self.normalize)
        return (batch.float() / 255 - mean) / std


@dataclass(frozen=True, eq=False)
class DataSet:
    """Loaders of one data set, and what a model for it looks like.

    Args:
        name: the word it came from.
        train: shuffled batches with targets.
        calibration: batches for statistics and scores, taken from the training samples.
        test: batches that neither training nor calibration reads; None where the source has none.
        example: an input for `secateur.model.call.call`, or None where the source does not say.
        num_classes: number of classes, or None where the targets are none or the source does not say.
        notes: sentences for the report, for example on how the test part came about.
    """

    name: str
    train: Data
    calibration: Data
    test: Data | None
    example: Example = None
    num_classes: int | None = None
    notes: tuple[str, ...] = ()


def split_indices(
    targets: npt.NDArray[np.generic], *, fraction: float = 0.2, seed: int = 0
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Split samples into train and test, each class in the same proportion where targets are integers.

    Args:
        targets: ``[samples, ...]``; integers ``[samples]`` are taken as classes.
        fraction: share of the test part, rounded per class; a class of one sample stays in train.
        seed: of the choice.

    Returns:
        Sorted indices of train and of test; disjoint, together all samples.
    """
    rng = np.random.default_rng(seed)
    # Drawn class by class: a rare class would else be missing from one of the parts by chance.
    classes = targets if targets.ndim == 1 and np.issubdtype(targets.dtype, np.integer) else None
    labels = np.zeros(len(targets), dtype=np.int64) if classes is None else classes
    test: list[npt.NDArray[np.int64]] = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        # At least one of a class to test with, if there is another to train with.
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        test.append(members[:count])
    chosen = np.sort(np.concatenate(test))
    return np.setdiff1d(np.arange(len(targets)), chosen), chosen


def build_dataset(
    name: str, train: Arrays, test: Arrays | None, *, batch_size: int, seed: int, split: bool = True
) -> DataSet:
    """Make the loaders of (inputs, targets) arrays.

    Args:
        name: the word the data came from.
        train: inputs ``[samples, ...]`` and targets ``[samples, ...]``; uint8 inputs are images with the
            channels at dimension 1, standardised by the mean and std of the training part.
        test: the same, or None.
        batch_size: samples per batch.
        seed: of split, shuffles and the choice of calibration samples.
        split: where there is no test part, split off 20 % of the training part.

    Raises:
        InputError: no sample, or lengths that differ.
    """
    (inputs, targets), held = train, test
    notes: tuple[str, ...] = ()
    if len(inputs) != len(targets):
        raise InputError(f"{name} has {len(inputs)} inputs and {len(targets)} targets")
    if held is None and split and len(targets) > 1:
        kept, out = split_indices(targets, seed=seed)
        if len(out):
            held = inputs[out], targets[out]
            notes = (SET_ASIDE.format(name=name, share="20 % of the samples"),)
        inputs, targets = inputs[kept], targets[kept]
    # Standardised by the training part alone: the statistics of the test part are not known in use either.
    normalize = channel_statistics(inputs.astype(np.uint8, copy=False)) if inputs.dtype == np.uint8 else None

    def loader(x: Array, y: Array, *, shuffle: bool = False) -> TensorData:
        return TensorData(
            _tensor(x), _tensor(y), batch_size=batch_size, shuffle=shuffle, seed=seed, normalize=normalize
        )

    # Another stream than that of the split and of the shuffles, so that one does not follow from the other.
    chosen = np.random.default_rng([seed, 1]).permutation(len(inputs))[:CALIBRATION_SAMPLES]
    calibration = loader(inputs[chosen], targets[chosen])
    classes = np.issubdtype(targets.dtype, np.integer) and targets.ndim == 1
    return DataSet(
        name=name,
        train=loader(inputs, targets, shuffle=True),
        calibration=calibration,
        test=None if held is None else loader(*held),
        example=next(iter(calibration))[0][:1],
        num_classes=int(targets.max()) + 1 if classes else None,
        notes=notes,
    )


def channel_statistics(images: npt.NDArray[np.uint8]) -> Normalize:
    """Mean and std per channel (dimension 1) of uint8 images, on the scale [0, 1].

    From the 256-bin histogram of each channel: exact, and without a float copy of the images.
    """
    channels = images.reshape(len(images), 1, -1) if images.ndim < 3 else images
    means, stds = [], []
    for channel in range(channels.shape[1]):
        counts = np.bincount(channels[:, channel].ravel(), minlength=256).astype(np.float64)
        levels = np.arange(256) / 255
        mean = float(counts @ levels / counts.sum())
        means.append(mean)
        stds.append(float(np.sqrt(counts @ (levels - mean) ** 2 / counts.sum())) or 1.0)  # constant: not divided by 0
    return tuple(means), tuple(stds)


def _tensor(array: Array) -> Tensor:
    """uint8 stays, floats become float32, other integers int64."""
    if array.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(array))
    kind = np.float32 if np.issubdtype(array.dtype, np.floating) else np.int64
    return torch.from_numpy(np.ascontiguousarray(array, dtype=kind))
