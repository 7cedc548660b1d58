"""Data of which every process takes its share, and sums over them that are those of all the data.

Whatever is gathered over batches is a sum, so this is the one place that knows of processes: data are read through
`walk`, a batch is somebody's, and a walk ends with `over_processes` or with `Statistic.join`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from secateur.errors import InputError
from secateur.model.samples import batch_size_of
from secateur.model.tensors import has_values
from secateur.processes import Processes
from secateur.types import Batch, Data

NEAR = 1e-6  # relative: sums of the same numbers differ in rounding between machines


class Share:
    """The batches of this process: every n-th of n processes, in the order of the data.

    All processes read the same data in the same order, and each runs its own part of them.

    Args:
        data: batches; the same for all.
        processes: who shares them.
    """

    def __init__(self, data: Data, processes: Processes) -> None:
        self.data, self.processes = data, processes
        self._read: tuple[int, float] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return (batch for batch, mine in self.walk() if mine)

    def walk(self) -> Iterator[tuple[Batch, bool]]:
        """Every batch of the data, and whether it is this process's.

        Raises:
            InputError: fewer batches than processes.
        """
        number, mark = 0, 0.0
        for batch in self.data:
            number += 1
            mark += number * _mark(batch)
            yield batch, (number - 1) % self.processes.world == self.processes.rank
        if number < self.processes.world:
            raise InputError(
                f"there are {number} batches for {self.processes.world} processes",
                hint="give smaller batches, more of them, or start fewer processes",
            )
        self._read = (number, mark)

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum of what all processes have gathered from their shares.

        Raises:
            InputError: they have not read the same data.
        """
        if self._read is not None:
            read, self._read = self._read, None
            everybody = self.processes.gathered(read)
            if any(one[0] != read[0] or abs(one[1] - read[1]) > NEAR * abs(read[1]) for one in everybody):
                counts = ", ".join(str(one[0]) for one in everybody)
                raise InputError(
                    f"the processes read different data (batches: {counts})",
                    why="each takes its share of the same batches, in the same order",
                    hint="seed what shuffles or draws alike in all processes, or leave shuffling out",
                )
        return self.processes.summed(tensor)

    def require_same_model(self, model: nn.Module) -> None:
        """Refuse processes that each score another model.

        Raises:
            InputError: names or values of the parameters differ.
        """
        mine = {name: _sum(p) for name, p in model.named_parameters() if has_values(p)}
        for rank, theirs in enumerate(self.processes.gathered(mine)):
            other = [name for name in mine if name not in theirs or not _near(theirs[name], mine[name])]
            if other or len(theirs) != len(mine):
                raise InputError(
                    f"process {rank} has another model",
                    why=f"parameter {(other or sorted({*theirs} - {*mine}))[0]!r} differs",
                    hint="make the model with one seed, or load the same weights, in all processes",
                )


def shared(data: Data) -> Share:
    """Data of which every process of the default group takes its share: for `plan` and `score` under torchrun.

    Args:
        data: batches that can be read in every process, in the same order.

    Returns:
        Batches to pass as `data`; criteria that add up over them then give the same scores in all processes, those of
        one process but for rounding, and a plan is the same in all.

    Raises:
        RecipeError: there is no group of processes.

    Example:
        >>> shared([])  # without torch.distributed.init_process_group
        Traceback (most recent call last):
        ...
        secateur.errors.RecipeError: There is no group of processes to share the work with.
          do:  start by torchrun, and call torch.distributed.init_process_group("gloo") first
    """
    return Share(data, Processes.of_group())


def walk(data: Data) -> Iterable[tuple[Batch, bool]]:
    """Every batch, and whether it is for this process."""
    return data.walk() if isinstance(data, Share) else ((batch, True) for batch in data)


def over_processes(data: Data | None, sums: Mapping[str, Tensor], count: int) -> tuple[dict[str, Tensor], int]:
    """Sums over this process's batches -> those over all batches, with their number of samples.

    Args:
        data: what was read; of anything but a `Share` the sums are complete.
        sums: by name; a name that others have and this one lacks counts zero here.
        count: samples that were read.
    """
    if not isinstance(data, Share):
        return dict(sums), count
    total = int(data.summed(torch.tensor(count)))
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in sums.items()}
    known = {name: like for one in data.processes.gathered(shapes) for name, like in one.items()}
    device = next((value.device for value in sums.values()), torch.device("cpu"))
    result = {}
    for name in sorted(known):
        shape, dtype = known[name]
        own = sums[name] if name in sums else torch.zeros(shape, dtype=dtype, device=device)
        result[name] = data.summed(own)
    return {name: result[name] for name in (*sums, *(n for n in result if n not in sums))}, total


def everywhere(data: Data | None, names: Iterable[str]) -> list[str]:
    """Those names that every process has found in its share."""
    names = list(names)
    if not isinstance(data, Share):
        return names
    theirs = data.processes.gathered(names)
    return [name for name in names if all(name in one for one in theirs)]


def _mark(batch: Batch) -> float:
    """A number by which the same batch is known."""
    tensors = [batch] if isinstance(batch, Tensor) else _tensors(batch)
    return float(batch_size_of(batch)) + sum(_sum(tensor) for tensor in tensors)


def _tensors(batch: Batch) -> list[Tensor]:
    values = batch.values() if isinstance(batch, Mapping) else batch
    return [value for value in values if isinstance(value, Tensor)]


def _sum(tensor: Tensor) -> float:
    wide = tensor.detach()
    wide = wide.real if wide.is_complex() else wide
    return float(wide.sum(dtype=torch.float64))


def _near(one: float, other: float) -> bool:
    return abs(one - other) <= NEAR * max(abs(one), abs(other), 1.0)
