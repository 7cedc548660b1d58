"""Operators that put data beside other data, or beside a number that fills a place: padding, masks, writes into zeros.

A unit that one of the parts misses is missing in all of the result, as in arithmetic element by element: what fills its
place elsewhere is no value of it, and goes with the cut. Without this a padded row would make the unit look present,
and the next norm would run over nothing.
"""

from __future__ import annotations

from collections.abc import Container, Iterator

import torch
from torch import Tensor

from secateur.kinds.slices.gaps import NAN, GapCall, Gaps
from secateur.model.tensors import can_be_nan

Part = tuple[Tensor, int]  # a part, and by how many dimensions the result has more of them in front


def _blank(mode: Gaps, result: Tensor, parts: Iterator[Part], moved: Container[int] = ()) -> Tensor:
    """The result without what its parts miss; positions of the dimensions `moved` are not those of a part."""
    if not can_be_nan(result):
        return result
    for part, shift in parts:
        for d, gone in mode.anywhere(part).items():
            e = d + shift
            if e >= 0 and e not in moved and part.shape[d] == result.shape[e]:
                result = result.index_fill(e, gone, NAN)
    return result


def _trailing(result: Tensor, *values: object) -> Iterator[Part]:
    """Parts that are aligned from the right."""
    return ((t, result.dim() - t.dim()) for t in values if isinstance(t, Tensor))


def padded(mode: Gaps, call: GapCall) -> object:
    """A number around a tensor: positions move on by what stands before them."""
    x, pads = call.args[0], call.get("pad")
    result: Tensor = call.run()
    for d, gone in mode.anywhere(x).items():
        at = 2 * (x.dim() - 1 - d)
        now = gone + pads[at] if at < len(pads) else gone
        result = result.index_fill(d, now[(now >= 0) & (now < result.shape[d])], NAN)
    return result


def filled(mode: Gaps, call: GapCall) -> Tensor:
    """One or the other at every place, by a truth value."""
    result: Tensor = call.run()
    return _blank(mode, result, _trailing(result, *call.args))


def joined(mode: Gaps, call: GapCall) -> object:
    """Tensors one after the other along a dimension, on which each keeps its own."""
    result: Tensor = call.run()
    along = int(call.get("dim")) % result.dim()
    stacked = call.func._schema.name == "aten::stack"
    parts = (t.unsqueeze(along) if stacked else t for t in call.args[0])
    return _blank(mode, result, ((t, 0) for t in parts if t.dim() == result.dim()), (along,))


def put_along(mode: Gaps, call: GapCall) -> object:
    """Written at positions of one dimension (`scatter`, `index_add`, `index_copy`): the others are as they were."""
    result: Tensor = call.run()
    along = int(call.get("dim")) % max(result.dim(), 1)
    source = call.get("src", call.get("source"))
    parts = ((t, 0) for t in (call.args[0], source) if isinstance(t, Tensor) and t.dim() == result.dim())
    return _blank(mode, result, parts, (along,))


def put_at(mode: Gaps, call: GapCall) -> object:
    """Written where tensors of numbers or of truth values say: dimensions without such a tensor are as they were."""
    result: Tensor = call.run()
    chosen: set[int] = set()
    first = 0  # the dimension that the next index is for: truth values choose along as many as they have
    for index in call.get("indices"):
        wide = 1 if index is None or index.dtype not in (torch.bool, torch.uint8) else index.dim()
        chosen |= set() if index is None else set(range(first, first + wide))
        first += wide
    values: Tensor = call.get("values")
    result = _blank(mode, result, _trailing(result, call.args[0]), chosen)
    return _blank(mode, result, _trailing(result, values), chosen if values.dim() == result.dim() else range(first))


class Bases:
    """Tensors that code makes of no data and then writes data into, part by part.

    What a part misses along the dimension of units the rest misses as well: else a row that nothing was written to
    would make the unit look present.
    """

    def __init__(self) -> None:
        self.found: dict[int, list[Tensor]] = {}

    def leave(self, part: Tensor, constants: dict[int, tuple[Tensor, Tensor]], stored: Container[int]) -> None:
        """Data are about to be written: neither the part nor what it is a part of is a constant any longer.

        Args:
            part: what is written to.
            constants: by id, each with its value in the whole model; what depends on data from now on leaves them.
            stored: memory of the model's own tensors, whose parts stand for themselves.
        """
        place = part.untyped_storage()._cdata
        if constants.pop(id(part), None) is None or place in stored:
            return
        whole = [t for t, _ in constants.values() if t.untyped_storage()._cdata == place]
        self.found.setdefault(place, []).extend(whole)
        for tensor in whole:
            del constants[id(tensor)]

    def blank(self, mode: Gaps, part: Tensor) -> None:
        """Take what a part misses out of what it is a part of."""
        bases = self.found.get(part.untyped_storage()._cdata, ()) if self.found and can_be_nan(part) else ()
        for d, gone in mode.anywhere(part).items() if bases else ():
            for base in bases:
                for e in range(base.dim()):
                    if (base.stride(e), base.shape[e]) == (part.stride(d), part.shape[d]):
                        base.index_fill_(e, gone, NAN)
