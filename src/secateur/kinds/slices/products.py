"""Sums of products with what is missing left out: matrices, convolutions, attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from secateur.kinds.slices.gaps import NAN, GapCall, Gaps, has_nan, others, pick, spread

Handler = Callable[[Gaps, GapCall], object]


def product(*factors: tuple[int, int], bias: str | None = None) -> Handler:
    """A sum of products over one dimension of each of two factors: (argument, dimension).

    With the name of what is added the second factor may be a weight, whose other dimension the result has last.
    """

    def handler(mode: Gaps, call: GapCall) -> object:
        found = [(i, d % call.args[i].dim(), mode.of(call.args[i], d)) for i, d in factors]
        sizes = {call.args[i].shape[d] for i, d, _ in found}
        if len(sizes) != 1:  # factors that do not fit are refused by the operator, as in the original
            return call.run()
        (first, along, _), (at, summed, _) = found
        size = sizes.pop()
        weight: Tensor = call.args[at]
        stay = _stay(mode, weight, summed, size, [missing for _, _, missing in found])
        if stay is not None and not len(stay):  # nothing is left: the result is missing, and NaN says so
            return call.run()
        if stay is not None:
            call.args[first] = pick(call.args[first], along, stay)
        if bias is None or weight.dim() != 2 or not mode.is_weight(weight):
            if stay is not None:
                call.args[at] = pick(weight, summed, stay)
                mode.multiplies(call.args[first], call.args[at], along, summed, size)
            return call.run()
        call.args[at], rows = _there(mode, weight, summed, stay, 1 - summed)
        return _spread_over(call, bias, -1, weight.shape[1 - summed], rows)

    return handler


def _stay(mode: Gaps, weight: Tensor, dim: int, size: int, missing: Sequence[Tensor | None]) -> Tensor | None:
    """Positions that a sum over a weight's dimension runs over; None where it is all of them."""
    known = [each for each in missing if each is not None]
    if not known:
        return None
    if len(known) == 2 and mode.is_weight(weight) and torch.equal(known[0], known[1]):  # as mostly: looked up once
        stay = mode.left(weight, dim)
        if stay is not None:
            return stay
    return others(size, torch.cat(known))


def _there(mode: Gaps, weight: Tensor, summed: int, stay: Tensor | None, free: int) -> tuple[Tensor, Tensor | None]:
    """A weight as far as a product needs it, and the positions of the free dimension that it then has.

    What is missing of the dimension that the result inherits is NaN in the result, and need not be reckoned.
    """
    rows = mode.left(weight, free)
    picks = {d: positions for d, positions in ((summed, stay), (free, rows)) if positions is not None}
    return mode.picked(weight, picks), rows


def _spread_over(call: GapCall, bias: str, dim: int, size: int, rows: Tensor | None) -> object:
    """Run a product with some rows of its weight, and put the result where these rows stand."""
    if rows is None:
        return call.run()
    added = call.get(bias)
    if isinstance(added, Tensor) and added.dim() and added.shape[-1] == size:  # else it is broadcast
        call.put(bias, added.index_select(-1, rows))
    return spread(call.run(), dim, size, rows)


def convolution(mode: Gaps, call: GapCall) -> object:
    """Channels that are summed up, in one group or several."""
    x, weight = call.get("input"), call.get("weight")
    groups, transposed = call.get("groups"), call.get("transposed")
    dim = 1 if x.dim() == weight.dim() else 0  # without a batch the channels come first
    gone = mode.of(x, dim)
    if x.shape[dim] != weight.shape[0 if transposed else 1] * (1 if transposed else groups):
        return call.run()  # refused by the operator, as in the original
    if groups == 1:
        summed = 0 if transposed else 1
        stay = _stay(mode, weight, summed, x.shape[dim], [gone, mode.of(weight, summed)])
        if stay is not None and not len(stay):
            return call.run()
        if stay is not None:
            call.put("input", x.index_select(dim, stay))
        if not mode.is_weight(weight):
            if stay is not None:
                call.put("weight", weight.index_select(summed, stay))
            return call.run()
        small, rows = _there(mode, weight, summed, stay, 1 - summed)
        call.put("weight", small)
        return _spread_over(call, "bias", dim, weight.shape[1 - summed], rows)
    if gone is not None and _is_depthwise(mode, weight, groups, gone):
        stay = others(groups, gone)
        call.put("input", x.index_select(dim, stay))
        call.put("weight", mode.picked(weight, {0: stay}))
        call.put("groups", len(stay))
        return _spread_over(call, "bias", dim, groups, stay)
    if gone is None and not has_nan(weight):
        return call.run()
    # Groups hold their channels by place, so nothing can be taken out: what a sum leaves out is zero in both factors.
    table = weight.detach().clone().view(groups, -1, *weight.shape[1:]).flatten(3) if weight.dim() > 2 else weight
    table = table.transpose(1, 2) if transposed else table  # [group, out, in, kernel]
    silent = torch.isnan(table).flatten(2).all(2)  # results that are missing themselves, and stay so
    absent = (torch.isnan(table).all(3) | silent[:, :, None]).all(1) & ~silent.all(1)[:, None]  # [group, in]
    if gone is not None:
        absent.view(-1)[gone] = True
    table.masked_fill_(absent[:, None, :, None] & ~silent[:, :, None, None], 0)
    table = table.transpose(1, 2) if transposed else table
    call.put("weight", table.reshape(weight.shape))
    call.put("input", x.index_fill(dim, absent.flatten().nonzero().flatten(), 0))
    return call.run()


def _is_depthwise(mode: Gaps, weight: Tensor, groups: int, gone: Tensor) -> bool:
    """Whether every channel stands for itself, and those that are missing have no weight either."""
    if len(weight) != groups or weight.shape[1] != 1 or not mode.is_weight(weight) or len(gone) == groups:
        return False
    absent = mode.of(weight, 0)
    return absent is not None and torch.equal(absent, gone)


def trilinear(mode: Gaps, call: GapCall) -> object:
    """A sum of products of three factors, each of which lacks some of the dimensions."""
    for d in call.get("sumdim"):
        places = []
        for i in range(3):
            lacking = call.get(f"expand{i + 1}")
            if d not in lacking:
                places.append((i, d - sum(other < d for other in lacking)))
        gone = [missing for i, own in places if (missing := mode.of(call.args[i], own)) is not None]
        if gone:
            stay = others(call.args[places[0][0]].shape[places[0][1]], torch.cat(gone))
            for i, own in places if len(stay) else ():
                call.args[i] = call.args[i].index_select(own, stay)
    return call.run()


def attention(mode: Gaps, call: GapCall) -> object:
    """Fused attention: coordinates without a partner count nothing, heads that are missing stay missing."""
    query, key, value = (call.get(name) for name in ("query", "key", "value"))
    if not any(has_nan(t) for t in (query, key, value)):
        return call.run()
    coordinates = mode.of(value, -1)
    alive = [~torch.isnan(t).flatten(2).all(2) for t in (query, key, value)]  # [batch, heads]
    whole = alive[0]
    for other in alive[1:]:  # fewer heads of keys and values serve several heads of queries
        whole = whole & other.repeat_interleave(whole.shape[1] // other.shape[1], 1)
    # A key of zeros that the code adds has every coordinate: what one factor misses, the product leaves out.
    found = [gone for t in (query, key) if (gone := mode.of(t, -1)) is not None]
    inner = torch.unique(torch.cat(found)) if found else None
    for name, tensor, dims in (("query", query, inner), ("key", key, inner), ("value", value, coordinates)):
        heads = torch.isnan(tensor).flatten(2).all(2)[:, :, None, None]
        filled = tensor.masked_fill(heads, 0)
        call.put(name, filled if dims is None else filled.index_fill(-1, dims, 0))
    results = call.run()
    first: Tensor = results[0].masked_fill(~whole[:, :, None, None], NAN)
    if coordinates is not None:
        first = first.index_fill(-1, coordinates, NAN)
    return (first, *results[1:])
