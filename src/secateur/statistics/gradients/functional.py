"""The model as a function of some of its parameters: what every derivative is taken of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from secateur.errors import InputError, NonFiniteError, UnsupportedError
from secateur.model import call, samples
from secateur.model.share import walk
from secateur.types import Batch, Data, Loss

Tensors = dict[str, Tensor]
CountedBatch = tuple[Batch, int]  # a batch and its number of samples


class _Whole(nn.Module):
    """Model and loss as one module, so that a loss may call the model in any way it likes."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self._loss = (loss,)  # in a tuple: a loss that is a module must not add its parameters

    def forward(self, batch: Batch) -> Tensor:
        return self._loss[0](self.model, batch)


def parameters(model: nn.Module, names: Iterable[str]) -> Tensors:
    """The named parameters, detached.

    Raises:
        InputError: a name is not a floating-point parameter of the model (tied ones go by their first name).
        UnsupportedError: it is complex.
    """
    known = dict(model.named_parameters())
    names = list(dict.fromkeys(names))
    for name in names:
        if name in known and known[name].is_complex():
            raise UnsupportedError(
                f"{name!r} is complex",
                why="per-sample gradients and curvature are those of real weights",
                hint="protect it, or use what takes complex weights, such as magnitude",
            )
        if name not in known or not known[name].is_floating_point():
            raise InputError(
                f"{name!r} is no floating-point parameter of the model",
                hint="use names of model.named_parameters(); tied parameters go by their first name",
            )
    return {name: known[name].detach() for name in names}


def loss_value(model: nn.Module, loss: Loss, batch: Batch, weights: Mapping[str, Tensor]) -> Tensor:
    """``loss(model, batch)`` with some parameters replaced; differentiable in them.

    Args:
        model: any module; swapped tensors are put back before this returns.
        loss: ``loss(model, batch) -> scalar``, the mean over the samples.
        batch: one data batch.
        weights: parameter name -> tensor of the parameter's shape.

    Raises:
        InputError: the loss is not a scalar tensor.
    """
    swapped = {f"model.{name}": tensor for name, tensor in weights.items()}
    value = functional_call(_Whole(model, loss), swapped, (batch,))
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise InputError(
            f"the loss returned {call.describe(value)}, not a scalar",
            hint="loss(model, batch) must return the mean over the samples as a tensor with one element",
        )
    return value.reshape(())


def require_finite_loss(value: Tensor, number: int) -> None:
    """Refuse a loss of NaN or Inf.

    Raises:
        NonFiniteError: names the batch.
    """
    if not bool(torch.isfinite(value).all()):
        raise NonFiniteError(
            f"the loss is {value.detach().flatten().tolist()[:4]} on batch {number}",
            hint="check the data and the weights; a loss in half precision may overflow",
        )


def batches(model: nn.Module, data: Data, passed: Callable[[int], None] | None = None) -> Iterator[tuple[Batch, int]]:
    """The batches of the data on the model's device, each with its number of samples.

    Args:
        model: says the device.
        data: batches; of a `Share` only those of this process come.
        passed: called with the number of samples of every batch that another process takes.

    Raises:
        InputError: the data holds no batch.
    """
    device, empty = call.device_of(model), True
    for batch, mine in walk(data):
        empty = False
        if mine:
            yield call.to_device(batch, device), samples.batch_size_of(batch)
        elif passed is not None:
            passed(samples.batch_size_of(batch))
    if empty:
        raise InputError("the data holds no batch", hint="give an iterable of at least one batch")


def per_sample_leaves(batch: Batch, size: int) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Batch]]:
    """Tensors of a batch whose first dimension is the sample, and how to put others in their place."""
    found: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    samples.map_rows(batch, size, collect)

    def rebuild(leaves: Sequence[Tensor]) -> Batch:
        rest = iter(leaves)
        return samples.map_rows(batch, size, lambda _: next(rest))

    return found, rebuild


def samples_of(batch: Batch, size: int, which: Sequence[int] | slice) -> Batch:
    """The batch reduced to some of its samples."""
    leaves, rebuild = per_sample_leaves(batch, size)
    index = which if isinstance(which, slice) else torch.as_tensor(which, dtype=torch.long)
    return rebuild([leaf[index if isinstance(index, slice) else index.to(leaf.device)] for leaf in leaves])


def set_aside(model: nn.Module, data: Data, held: int) -> tuple[list[Batch], list[CountedBatch]]:
    """Hold samples out, evenly spaced over the data, so that data sorted by class is no trap.

    Args:
        model: the batches come on its device.
        data: batches; all of them are kept in memory.
        held: how many samples to hold out; at most a fifth of what there is.

    Returns:
        The batches without these samples, and the samples.

    Raises:
        InputError: the data holds no batch.
    """
    whole = list(batches(model, data))
    total = sum(size for _, size in whole)
    aside = torch.zeros(total, dtype=torch.bool)
    count = min(held, total // 5)
    if count:
        aside[torch.linspace(0, total - 1, count, dtype=torch.float64).round().long()] = True
    rest, kept, start = [], [], 0
    for batch, size in whole:
        here = aside[start : start + size]
        start += size
        if not bool(here.all()):
            rest.append(samples_of(batch, size, (~here).nonzero().flatten().tolist()))
        if bool(here.any()):
            kept.append((samples_of(batch, size, here.nonzero().flatten().tolist()), int(here.sum())))
    return rest, kept


def mean_loss(model: nn.Module, loss: Loss, kept: Sequence[CountedBatch], weights: Mapping[str, Tensor]) -> float:
    """Mean loss over some batches with some parameters replaced; float64."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch, size in kept:
            total += size * float(loss_value(model, loss, batch, weights))
            count += size
    return total / count
