"""Moments of what the consumers of groups read, a part of the groups at a time: all at once may be too large."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import cast

import torch
from torch import nn

from secateur.errors import ResourceError
from secateur.model.call import require_reiterable, to_example
from secateur.model.room import require_room
from secateur.statistics.activations.gram import Geometry, Gram, Reading, Sampler, geometry
from secateur.statistics.activations.observe import Flow, Site, consumer_sites
from secateur.statistics.activations.streams import few_samples, finite, gather
from secateur.statistics.gradients.functional import batches
from secateur.structure.capture import capture, quiet
from secateur.structure.trace import Trace
from secateur.types import Advance, Data, Group

MAX_COLUMNS = 8192  # 512 MiB per matrix
TIMES, LEAST = 2, 1 << 26  # matrices of one pass: twice the weights of the model, and 64 MiB are always taken

Places = list[tuple[Site, Geometry]]


def readings(
    model: nn.Module,
    data: Data,
    groups: Iterable[Group],
    *,
    positions: int | None = 16,
    seed: int = 0,
    trace: Trace | None = None,
    progress: Advance | None = None,
    most: int | None = None,
) -> Iterator[tuple[Group, list[Reading]]]:
    """Second moments of what the consumers of every group read, group by group.

    Where the matrices of all groups take more than `most`, the data are read once for each part of the groups whose
    matrices do not: what was handed out need not be held any more when the next part is gathered.

    Args:
        model: in eval mode; left as it is.
        data: batches.
        groups: the groups.
        positions: places in space taken per image and convolution, None for all.
        seed: of the places.
        trace: a whole trace of this model, where there is one.
        progress: called as ``progress(done, total)``.
        most: bytes of the matrices of one pass; a single group may have more. Default: twice the weights of the model,
            and at least 64 MiB.

    Yields:
        Each group and its consumers.

    Raises:
        UnsupportedError: a consumer that is no linear layer or plain convolution.
        ResourceError: a consumer with more than 8192 columns, or more memory than is free; before the data are read.
        InputError: data that can be read only once, where there are several parts or no trace.

    Cost:
        One forward pass over the data for each part, N k^2 multiplications per consumer, k^2 numbers of 8 bytes each.
    """
    groups = list(groups)
    trace = _traced(model, data) if trace is None else trace
    found = _found(trace, groups)
    parts = _parts(groups, {name: _bytes(places) for name, places in found.items()}, _most(model, most))
    if len(parts) > 1:
        require_reiterable(data, f"{len(parts)} passes, one for each part of the groups whose moments fit into memory")
    for number, part in enumerate(parts):
        where = dict(pair for group in part for pair in found[group.name])
        step = None if progress is None else partial(_advance, progress, number, len(parts))
        result = _gathered(model, data, where, trace, positions, seed, step)
        for group in part:
            yield group, result.pop(group.name)


def _traced(model: nn.Module, data: Data) -> Trace:
    require_reiterable(data, "the calls of the model, which are looked at before its moments are gathered")
    batch, size = next(batches(model, data))
    with quiet(model):
        return capture(model, few_samples(to_example(batch), size))


def _found(trace: Trace, groups: list[Group]) -> dict[str, Places]:
    """Where the consumers of every group read, all of them checked before anything is gathered."""
    flow, found = Flow(trace), dict[str, Places]()
    for site in consumer_sites(trace, groups):
        how = geometry(flow, trace.steps[site.step])
        columns = how.columns(site.unit).shape[1]
        if columns > MAX_COLUMNS:
            raise ResourceError(
                f"the Gram matrix of {site.weight!r} would have {columns} columns, the most is {MAX_COLUMNS}",
                hint=f"protect group {site.group!r}, or score it with another criterion",
            )
        found.setdefault(site.group, []).append((site, how))
    return found


def _bytes(places: Places) -> int:
    shapes = [how.columns(site.unit).shape for site, how in places]
    return sum(8 * of_groups * columns**2 for of_groups, columns in shapes)


def _most(model: nn.Module, asked: int | None) -> int:
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return max(TIMES * weights, LEAST) if asked is None else asked


def _parts(groups: list[Group], sizes: Mapping[str, int], most: int) -> list[list[Group]]:
    """Neighbouring groups whose matrices together take at most so much; what is too large alone has a pass alone.

    Raises:
        ResourceError: a part is larger than what is free.
    """
    parts: list[list[Group]] = []
    filled = 0
    for group in groups:
        if not parts or filled + sizes[group.name] > most:
            parts.append([])
            filled = 0
        parts[-1].append(group)
        filled += sizes[group.name]
    for part in parts:
        hint = "score fewer groups at a time (protect), or take a criterion that needs no such matrices, as 'taylor'"
        wanted = sum(sizes[group.name] for group in part)
        require_room(f"Gram matrices of {len(part)} groups", wanted, torch.device("cpu"), hint=hint)
    return parts


def _advance(progress: Advance, number: int, parts: int, done: int, total: int) -> None:
    progress(number * total + done, parts * total)


def _gathered(
    model: nn.Module,
    data: Data,
    where: Mapping[Site, Geometry],
    trace: Trace,
    positions: int | None,
    seed: int,
    progress: Advance | None,
) -> dict[str, list[Reading]]:
    def make(site: Site) -> Gram:
        return Gram(where[site], Sampler(positions, seed))

    _, found = gather(model, data, lambda _: list(where), make, trace=trace, progress=progress)
    result: dict[str, list[Reading]] = {}
    for site, statistic in found.items():
        gram = cast(Gram, statistic)
        # Per row: consumers that see more positions weigh no more than others.
        mean = gram.total.div_(max(gram.rows, 1)).cpu()
        # A sum of squares shows every NaN and Inf of its column.
        finite(mean.diagonal(dim1=-2, dim2=-1).flatten())
        matrix = where[site].matrix(model.get_parameter(site.weight)).cpu()
        result.setdefault(site.group, []).append(Reading(site.weight, mean, matrix, where[site].columns(site.unit)))
    return result
