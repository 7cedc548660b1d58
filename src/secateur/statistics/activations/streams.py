"""Statistics of activations over unlabelled data, streamed: counts in int64, sums in float64.

Legend: a the activation at a site, p its positions along the dimension of interest (channels, features), u units.
Everything is kept per position p, [size of dim], and reduced to units at the end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import NonFiniteError
from secateur.model.call import to_example
from secateur.model.padding import real_tokens, without_padding
from secateur.model.samples import map_rows
from secateur.model.share import Share
from secateur.statistics.activations.observe import Observer, Site
from secateur.statistics.gradients.functional import batches
from secateur.structure.capture import capture, quiet
from secateur.structure.trace import Trace
from secateur.types import Data, Example, Group

Find = Callable[[Trace], Sequence[Site]]
Total = Callable[[Tensor], Tensor]
LEARN = 2  # samples of the first batch on which the calls are learned


class Statistic(ABC):
    """Numbers gathered at one site."""

    @abstractmethod
    def add(self, value: Tensor, dim: int) -> None:
        """Take in the activations of one batch; `dim` holds the positions."""

    @abstractmethod
    def join(self, total: Total) -> None:
        """Become the statistic of all processes; `total` adds up a tensor of theirs."""

    def passed(self, samples: int) -> None:  # noqa: B027 - most statistics do not count samples
        """Hear of samples that another process takes in."""


def gather(
    model: nn.Module,
    data: Data,
    find: Find,
    make: Callable[[Site], Statistic],
    *,
    trace: Trace | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Trace, dict[Site, Statistic]]:
    """Run the model over the data and gather a statistic at every site.

    Args:
        model: in eval mode; left as it is.
        data: batches; labels are not read, and tokens that `attention_mask` leaves out do not count.
        find: trace -> sites.
        make: site -> empty statistic.
        trace: a whole trace of this model, where there is one; else the first batch is captured.
        progress: called as ``progress(done, total)``.

    Returns:
        the trace and the statistics by site.

    Raises:
        InputError: the data holds no batch.
        UnsupportedError: no site, or a batch on which the model makes other calls.

    Cost:
        One forward pass over the data, one over two samples, and the statistics.
    """
    observer: Observer | None = None
    found: dict[Site, Statistic] = {}

    real: Tensor | None = None

    def receive(site: Site, value: Tensor) -> None:
        # Of [batch, tokens, width] and of its rows the width is what statistics are about, and it stays the last.
        last = site.dim == value.dim() - 1
        rows = without_padding(value, real) if last else value
        if len(rows):
            found[site].add(rows, rows.dim() - 1 if last else site.dim)

    total = len(data) if isinstance(data, Sized) else 0
    before = 0  # samples of others, ahead of the first batch of this process

    def passed(samples: int) -> None:
        nonlocal before
        before += samples if observer is None else 0
        for statistic in found.values():
            statistic.passed(samples)

    # Around all batches, so that what a forward leaves behind is put back once and not per batch.
    with quiet(model):
        for number, (batch, size) in enumerate(batches(model, data, passed), start=1):
            example = to_example(batch)
            real = real_tokens(example)
            if observer is None:
                if trace is None:
                    # Two samples tell the calls; one would let a batch size of 1 pass for a broadcast dimension.
                    trace = capture(model, few_samples(example, size))
                sites = list(find(trace))
                found.update({site: make(site) for site in sites})
                for statistic in found.values():
                    statistic.passed(before)
                observer = Observer(
                    model, trace, sites, last=True
                )  # the forward ends behind the last site: heads and losses are never run
            observer.run(example, receive)
            if progress is not None:
                progress(number, max(total, number))
    assert trace is not None
    if isinstance(data, Share):
        for statistic in found.values():
            statistic.join(data.summed)
    return trace, found


def few_samples(example: Example, size: int) -> Example:
    """The first samples of an example; what is one tensor stays one (attention asks whether keys are values).

    Args:
        example: what the model is called with.
        size: number of its samples.
    """
    known: dict[int, Tensor] = {}

    return map_rows(example, size, lambda tensor: known.setdefault(id(tensor), tensor[:LEARN]))


def others(value: Tensor, dim: int) -> list[int]:
    """All dimensions but one."""
    return [d for d in range(value.dim()) if d != dim]


class Norms(Statistic):
    """Per position the sum of |a|^power, power 1 or 2.

    Args:
        power: 1 or 2.
    """

    def __init__(self, power: int) -> None:
        self.power = power
        self.total: Tensor | None = None
        self.count = 0

    def add(self, value: Tensor, dim: int) -> None:
        """Take in one batch."""
        dtype = torch.promote_types(value.dtype, torch.float32)
        # One fused reduction: |a|^2 as a tensor of its own would be as large as the activation.
        norm = torch.linalg.vector_norm(value, self.power, others(value, dim), dtype=dtype).double()
        norm = norm if self.power == 1 else norm.square()
        self.total = norm if self.total is None else self.total + norm
        self.count += value.numel() // max(value.shape[dim], 1)

    def join(self, total: Total) -> None:
        """Add up sums and counts."""
        assert self.total is not None
        self.total, self.count = total(self.total), whole(total, self.count)

    def sums(self) -> Tensor:
        """Float64 [p].

        Raises:
            NonFiniteError: an activation is NaN or Inf.
        """
        assert self.total is not None
        return finite(self.total)


class Zeros(Statistic):
    """Per position how many activations are zero, or smaller than a bound.

    Args:
        bound: |a| <= bound counts as zero.
    """

    def __init__(self, bound: float = 0.0) -> None:
        self.bound = bound
        self.zeros: Tensor | None = None
        self.count = 0

    def add(self, value: Tensor, dim: int) -> None:
        """Take in one batch."""
        count = value.numel() // max(value.shape[dim], 1)
        # No copy of |a| where exact zeros are asked for.
        small = value == 0 if self.bound == 0.0 else value.abs() <= self.bound
        zeros = small.sum(others(value, dim))
        self.zeros = zeros if self.zeros is None else self.zeros + zeros
        self.count += count

    def join(self, total: Total) -> None:
        """Add up counts."""
        assert self.zeros is not None
        self.zeros, self.count = total(self.zeros), whole(total, self.count)


class Moments(Statistic):
    """Per position mean and sum of squared deviations, merged without cancellation."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(())
        self.squares = torch.zeros(())

    def add(self, value: Tensor, dim: int) -> None:
        """Take in one batch (Chan, Golub, LeVeque 1979, equation 2.1)."""
        # Half precision holds no mean of thousands of values.
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        centre = value.mean(others(value, dim), keepdim=True)
        # About the mean of this batch; the difference of the means is added below. Sums of squares would cancel.
        spread = torch.linalg.vector_norm(value - centre, 2, others(value, dim)).double()
        mean = centre.flatten().double()
        n = value.numel() // max(value.shape[dim], 1)
        total = self.count + n
        delta = mean - self.mean.to(mean.device)
        self.squares = self.squares.to(mean.device) + spread.square() + delta.square() * (self.count * n / total)
        self.mean = self.mean.to(mean.device) + delta * (n / total)
        self.count = total

    def join(self, total: Total) -> None:
        """The mean of all first: deviations are then taken from it, and nothing cancels."""
        count = whole(total, self.count)
        mean = total(self.mean * self.count) / count
        self.squares = total(self.squares + self.count * (self.mean - mean).square())
        self.mean, self.count = mean, count


def whole(total: Total, count: int) -> int:
    """A count, added up over processes."""
    return int(total(torch.tensor(count)))


def finite(values: Tensor) -> Tensor:
    """The values, if they are finite.

    Raises:
        NonFiniteError: an activation is NaN or Inf.
    """
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(
            "an activation is NaN or Inf",
            why=f"at position {int(torch.nonzero(~torch.isfinite(values))[0, 0])} of its channels",
            hint="check the data and the weights; activations in half precision may overflow",
        )
    return values


def per_unit(values: Tensor, unit: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Sums of position values per unit, and the number of positions: float64 [size] each, on the CPU."""
    unit, values = unit.cpu(), values.detach().double().cpu()
    owned = unit >= 0
    total = torch.zeros(size, dtype=torch.float64).index_add_(0, unit[owned], values[owned])
    return total, torch.bincount(unit[owned], minlength=size).double()


def mean_of_sites(groups: Sequence[Group], parts: Mapping[str, Sequence[tuple[Tensor, Tensor]]]) -> dict[str, Tensor]:
    """Every unit's mean over the sites that have it, each site counting once.

    Args:
        groups: the groups.
        parts: group name -> (value [u], number of positions [u]) of every site.
    """
    means: dict[str, Any] = {}
    for group in groups:
        value = torch.zeros(group.size, dtype=torch.float64)
        seen = torch.zeros(group.size, dtype=torch.float64)
        for part, positions in parts[group.name]:
            # A unit that a site does not have is not zero there; it is not there.
            value += torch.where(positions > 0, part, 0.0)
            seen += positions > 0
        means[group.name] = (value / seen.clamp(min=1)).view(group.shape)
    return means
