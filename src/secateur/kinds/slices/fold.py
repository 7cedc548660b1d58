"""Scales that the code takes from a width, kept as they were by a factor in the weights in front of them.

Attention divides by the root of its width. Cut to fewer coordinates it would divide by another number, and that
changes the function of what is left. Every score is linear in the queries (and in the keys), so a factor in the rows
that make one of them undoes it exactly. Which rows these are, and what the code's power of the width is, is not read
from the code: it is tried, and held against the original with the coordinates missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product, zip_longest

import torch
from torch import Tensor, nn

from secateur.errors import PlanMismatchError
from secateur.model.tensors import named_tensors
from secateur.structure.axes import Atom, Axis, Prod, Sum, leaves, resolve
from secateur.types import Cuts, Group

POWERS = (0.5, 1.0, -0.5)  # of kept / all: the code divides by the root of the width, by the width, or multiplies by it
PAIRS = 20  # that are tried
PIECES = (2, 3)  # equal parts of one matrix: keys and values, or queries, keys and values


@dataclass(frozen=True)
class Scale:
    """A factor on part of a tensor, in the numbers of the tensor before the cut.

    Args:
        tensor: its name.
        dim: the dimension that the part lies in.
        start: first position.
        stop: one after the last.
        factor: what the part is multiplied by.
    """

    tensor: str
    dim: int
    start: int
    stop: int
    factor: float


def check_scales(tensors: Mapping[str, Tensor], scales: Sequence[Scale]) -> None:
    """Refuse factors that do not fit.

    Raises:
        PlanMismatchError: names the tensor and what does not fit.
    """
    for scale in scales:
        shape = tuple(tensors[scale.tensor].shape) if scale.tensor in tensors else None
        if shape is None or not scale.dim < len(shape) or scale.stop > shape[scale.dim]:
            raise PlanMismatchError(
                f"The plan multiplies part of {scale.tensor!r}, which this model does not have in that form.",
                why="there is no such tensor" if shape is None else f"its shape is {shape}",
                hint="Load the plan onto the model that it was made for, before any other cut.",
            )


def rescale(tensors: Mapping[str, Tensor], scales: Sequence[Scale], cuts: Cuts) -> None:
    """Write factors, in place.

    Args:
        tensors: parameters and buffers by name, after the cut; what is not among them is skipped.
        scales: the factors.
        cuts: tensor name -> dimension -> kept indices, as far as `tensors` are cut.
    """
    with torch.no_grad():
        for scale in scales:
            tensor, kept = tensors.get(scale.tensor), cuts.get(scale.tensor, {}).get(scale.dim)
            if tensor is None:
                continue
            ends = torch.tensor([scale.start, scale.stop])
            start, stop = (ends if kept is None else torch.searchsorted(kept, ends)).tolist()
            tensor.detach().narrow(scale.dim, start, stop - start).mul_(scale.factor)


def rescaled(tensors: Mapping[str, Tensor], scales: Sequence[Scale]) -> dict[str, Tensor]:
    """The tensors of a whole model, those with a factor as copies that hold it."""
    result = dict(tensors)
    for scale in scales:
        result[scale.tensor] = tensors[scale.tensor].detach().clone()
    rescale({scale.tensor: result[scale.tensor] for scale in scales}, scales, {})
    return result


def same_scales(mine: Sequence[Scale], theirs: Sequence[Scale], cuts: Cuts) -> bool:
    """Whether two lists of factors do the same to what is left: steps that follow each other say in two what one says.

    Args:
        mine: of one plan.
        theirs: of another with the same cuts.
        cuts: tensor name -> dimension -> kept indices.
    """
    places = {(scale.tensor, scale.dim) for scale in (*mine, *theirs)}
    ends = {place: max(s.stop for s in (*mine, *theirs) if (s.tensor, s.dim) == place) for place in places}

    def factors(scales: Sequence[Scale], tensor: str, dim: int) -> Tensor:
        line = torch.ones(ends[tensor, dim], dtype=torch.float64)
        for scale in scales:
            if (scale.tensor, scale.dim) == (tensor, dim):
                line[scale.start : scale.stop] *= scale.factor
        kept = cuts.get(tensor, {}).get(dim)
        return line if kept is None else line[kept[kept < len(line)]]

    return all(torch.allclose(factors(mine, *p), factors(theirs, *p), rtol=1e-9, atol=0) for p in places)


def composed_scales(first: Sequence[Scale], second: Sequence[Scale], cuts: Cuts) -> tuple[Scale, ...]:
    """The factors of two steps, in the numbers before the first.

    Args:
        first: of the first step.
        second: of the second, under the names before the first.
        cuts: what the first step keeps.
    """
    found = list(first)
    for scale in second:
        kept = cuts.get(scale.tensor, {}).get(scale.dim)
        if kept is None:
            found.append(scale)
        else:  # positions between them are gone, so they may be multiplied too
            start, stop = int(kept[scale.start]), int(kept[scale.stop - 1]) + 1
            found.append(Scale(scale.tensor, scale.dim, start, stop, scale.factor))
    return tuple(found)


def fold(
    model: nn.Module,
    groups: Sequence[tuple[Group, Atom, int]],
    dimensions: Mapping[str, Sequence[Axis]],
    holds: Callable[[tuple[Scale, ...]], bool],
) -> tuple[Scale, ...] | None:
    """Factors with which a cut gives what the original gives without these coordinates.

    Args:
        model: the original.
        groups: coordinates that are cut: the group, its dimension, and how many stay.
        dimensions: tensor name -> its dimensions.
        holds: whether the cut model agrees with the original under these factors.

    Returns:
        the factors; none where the cut agrees as it is; None where nothing that was tried agrees.

    Cost: one call of `holds` for every way, at most some dozens; one where nothing is to be done.
    """
    if holds(()):
        return ()
    ways: dict[tuple[object, ...], list[tuple[str, int, int, int, float]]] = {}
    for group, atom, left in groups:
        for way, found in _ways(model, group, atom, dimensions):
            ways.setdefault(way, []).extend((*place, left / group.size) for place in found)
    tensors = named_tensors(model)
    # Two at once: attention to itself holds its queries in one matrix with keys and values, that to others may not.
    pairs = [[*a, *b] for (x, a), (y, b) in combinations(ways.items(), 2) if x[0] == y[0] and x[1] != y[1]][:PAIRS]
    for power, places in product(POWERS, [*ways.values(), *pairs]):
        scales = tuple(Scale(name, d, start, stop, kept**power) for name, d, start, stop, kept in dict.fromkeys(places))
        if all(tensors[scale.tensor].is_floating_point() for scale in scales) and holds(scales):
            return scales
    return None


def _ways(
    model: nn.Module, group: Group, atom: Atom, dimensions: Mapping[str, Sequence[Axis]]
) -> Iterator[tuple[tuple[object, ...], list[Part]]]:
    """Places that a factor could stand in: rows of a weight and as many of a bias, and a name for all such places.

    Attention of one model is written once, so what helps in one layer is what all layers of the name need.
    """
    modules: dict[str, dict[tuple[str, int], bool]] = {}
    for span in group.spans:
        found = [d for d, axis in enumerate(dimensions[span.tensor]) if atom in leaves(axis)]
        rank = len(dimensions[span.tensor])
        if found and (span.role in ("out", "scale") or (span.role == "bias" and rank == 1)):
            place = (span.tensor, found[0])
            modules.setdefault(span.tensor.rpartition(".")[0], {})[place] = span.role == "bias"
    for path, places in modules.items():
        module = model.get_submodule(path)
        # A layer with one weight is told apart by its own name, others by what they are.
        plain = {name for name, _ in module.named_parameters(recurse=False)} <= {"weight", "bias"}
        who = path.rpartition(".")[2] if plain else type(module).__name__
        biases = [_parts(dimensions[name][d], name, d) for (name, d), is_bias in places.items() if is_bias]
        for (name, d), is_bias in places.items():
            parts = [] if is_bias else _parts(dimensions[name][d], name, d)
            for number, part in enumerate(parts):
                fitting = [_fitting(part, number, len(parts), other) for other in biases]
                for order, pieces in enumerate(zip_longest(*fitting) if any(fitting) else [()]):
                    way = (who, name.rpartition(".")[2], number, order)
                    yield way, [part, *(piece for piece in pieces if piece is not None)]


Part = tuple[str, int, int, int]


def _fitting(part: Part, number: int, count: int, bias: Sequence[Part]) -> list[Part]:
    """Parts of a bias that belong to part of a weight: the one in the same place, else all of the same size."""
    size = part[3] - part[2]
    if len(bias) == count and bias[number][3] - bias[number][2] == size:
        return [bias[number]]
    return [piece for piece in bias if piece[3] - piece[2] == size]


def _parts(axis: Axis, name: str, d: int) -> list[Part]:
    """Intervals of a dimension of a tensor: the whole, and the pieces that it is made of."""
    node = resolve(axis)
    ends = [(0, node.size)]
    if isinstance(node, Sum):
        start = 0
        for part in node.parts:
            ends.append((start, start + part.size))
            start += part.size
    elif isinstance(node, Prod) and resolve(node.parts[0]).size in PIECES:
        step = node.size // resolve(node.parts[0]).size
        ends += [(i, i + step) for i in range(0, node.size, step)]
    return [(name, d, *each) for each in ends]
