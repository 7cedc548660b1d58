"""Operators that put several positions together, with what is missing left out; one function for each kind."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.kinds.slices.gaps import NAN, GapCall, Gaps, has_nan, line, others, spread
from secateur.kinds.slices.placed import filled, joined, padded, put_along, put_at
from secateur.kinds.slices.products import Handler, attention, convolution, product, trilinear
from secateur.model.place import users_functions
from secateur.model.tensors import can_be_nan

# -- reductions -------------------------------------------------------------------------------------------------------


def _dims(call: GapCall, rank: int) -> list[int]:
    given = call.get("dim")
    if given is None or given == []:
        return list(range(rank))
    return [d % rank for d in ([given] if isinstance(given, int) else given)] if rank else []


def _without(mode: Gaps, call: GapCall, dims: Sequence[int]) -> dict[int, Tensor]:
    """Take what is missing out of the input; dimension -> what stays."""
    x: Tensor = call.args[0]
    found = {d: gone for d in dims if (gone := mode.of(x, d)) is not None and len(gone) < x.shape[d]}
    kept = {d: others(x.shape[d], gone) for d, gone in found.items()}
    for d, stay in kept.items():
        call.args[0] = call.args[0].index_select(d, stay)
    return kept


def _reduction(mode: Gaps, call: GapCall) -> object:
    """Positions become one number, or one number and its place."""
    x: Tensor = call.args[0]
    dims = _dims(call, x.dim())
    kept = _without(mode, call, dims)
    # A count of units is no sum that excuses a width beside it.
    for d, stay in () if mode.counts(call, x, dims, kept) else kept.items():
        mode.reduced.setdefault((x.shape[d], len(stay)), set()).update(users_functions())
    result = call.run()
    if len(kept) != 1:
        return result
    (stay,) = kept.values()
    if isinstance(result, Tensor):
        return stay[result] if call.func._schema.name in PLACES else result
    return type(result)((result[0], *(_places(t, stay) for t in result[1:]))) if kept else result


def _distance(mode: Gaps, call: GapCall) -> object:
    """An error for each place of two tensors, then its mean or sum over the places that both have."""
    if call.get("reduction") == 0:
        return call.run()
    operands = [i for i, t in enumerate(call.args) if isinstance(t, Tensor)]
    full = torch.broadcast_tensors(*(call.args[i] for i in operands))  # type: ignore[no-untyped-call]
    for i, tensor in zip(operands, full, strict=True):
        call.args[i] = tensor
    for d in range(full[0].dim()):
        gone = [absent for t in full if (absent := mode.of(t, d)) is not None]
        stay = others(full[0].shape[d], torch.cat(gone)) if gone else None
        if stay is not None and len(stay):
            mode.reduced.setdefault((full[0].shape[d], len(stay)), set()).update(users_functions())
            for i in operands:
                call.args[i] = call.args[i].index_select(d, stay)
    return call.run()


PLACES = {"aten::argmax", "aten::argmin"}


def _places(tensor: Tensor, stay: Tensor) -> Tensor:
    """Numbers of positions as the whole tensor counts them; variances and means are no such numbers."""
    return tensor if tensor.is_floating_point() or tensor.is_complex() else stay[tensor]


def _full_size(mode: Gaps, call: GapCall) -> object:
    """The result has the input's size: a softmax, a running sum, an order."""
    x: Tensor = call.args[0]
    dims = _dims(call, x.dim())
    kept = _without(mode, call, dims)
    mode.counts(call, x, dims, kept)
    result = call.run()
    for d, stay in kept.items():
        size = x.shape[d]
        if isinstance(result, Tensor):
            result = spread(result, d, size, stay)
        else:
            result = type(result)(spread(_places(t, stay), d, size, stay) for t in result)
    return result


def _sorted(mode: Gaps, call: GapCall) -> object:
    """An order of what is there; the last places stay empty."""
    x: Tensor = call.args[0]
    kept = _without(mode, call, _dims(call, x.dim()) if call.get("dim") is not None else [x.dim() - 1])
    result = call.run()
    for d, stay in kept.items():
        first = torch.arange(len(stay), device=x.device)
        result = tuple(spread(_places(t, stay), d, x.shape[d], first) for t in result)
    return result


def _chosen(mode: Gaps, call: GapCall) -> object:
    """The first few in an order."""
    x: Tensor = call.args[0]
    kept = _without(mode, call, _dims(call, x.dim()))
    result = call.run()
    for stay in kept.values():
        result = type(result)(_places(t, stay) for t in result)
    return result


# -- norms ------------------------------------------------------------------------------------------------------------


def _over_last(mode: Gaps, call: GapCall) -> object:
    """Layer norm and its like: the last dimensions, with weights of the same shape."""
    x: Tensor = call.args[0]
    shape = list(call.get("normalized_shape"))
    first = x.dim() - len(shape)
    kept = _without(mode, call, range(first, x.dim()))
    for d, stay in kept.items():
        shape[d - first] = len(stay)
        for name in ("weight", "bias"):
            if isinstance(call.get(name), Tensor):
                call.put(name, call.get(name).index_select(d - first, stay))
    call.put("normalized_shape", shape)
    result = list(call.run())
    for d, stay in kept.items():
        result[0] = spread(result[0], d, x.shape[d], stay)
    return tuple(result)


def _batch_norm(mode: Gaps, call: GapCall) -> object:
    """In training a mean over all dimensions but the channels: also how weights are standardised."""
    x: Tensor = call.args[0]
    if not call.get("training", True):
        return call.run()
    kept = {} if _has_whole_channel(x) else _without(mode, call, [d for d in range(x.dim()) if d != 1])
    result = list(call.run())
    for d, stay in kept.items():
        result[0] = spread(result[0], d, x.shape[d], stay)
    return tuple(result)


def _has_whole_channel(x: Tensor) -> bool:
    """Whether a channel lacks nothing, so that no other dimension can miss a position."""
    if x.numel() == 0 or not can_be_nan(x):
        return False
    there = (~torch.isnan(line(x, 1, 0))).nonzero()
    return len(there) > 0 and not has_nan(x[:, int(there[0])])


def _group_norm(mode: Gaps, call: GapCall) -> object:
    """Every group over the channels that it still has."""
    x: Tensor = call.get("input")
    gone = mode.of(x, 1)
    if gone is None:
        return call.run()
    groups, shape = call.get("group"), [1, -1, *[1] * (x.dim() - 2)]
    stays = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
    stays[gone] = False
    each = x.nan_to_num(0).reshape(x.shape[0], groups, x.shape[1] // groups, -1)
    here = stays.view(1, groups, -1, 1)
    count = here.sum((2, 3), keepdim=True) * each.shape[3]
    mean = (each * here).sum((2, 3), keepdim=True) / count
    variance = ((each - mean).square() * here).sum((2, 3), keepdim=True) / count
    scale = (variance + call.get("eps")).rsqrt()
    out = ((each - mean) * scale).reshape(x.shape)
    for name, combine in (("weight", torch.mul), ("bias", torch.add)):
        if isinstance(call.get(name), Tensor):
            out = combine(out, call.get(name).view(shape))
    return out.index_fill(1, gone, NAN), mean.flatten(1), scale.flatten(1)


def _weight_norm(mode: Gaps, call: GapCall) -> object:
    """A direction of length one times a length: along all dimensions but one."""
    v: Tensor = call.get("v")
    keep = call.get("dim") % v.dim()
    kept = _without(mode, call, [d for d in range(v.dim()) if d != keep])
    result = list(call.run())
    for d, stay in kept.items():
        result[0] = spread(result[0], d, v.shape[d], stay)
    return tuple(result)


# -- truth values -----------------------------------------------------------------------------------------------------


def _question(mode: Gaps, call: GapCall) -> object:
    """Truth values of numbers: what is missing stays so, under another name than NaN."""
    result: Tensor = call.run()
    name = call.func._schema.name.removeprefix("aten::")
    for operand in call.args[:2]:
        if isinstance(operand, Tensor) and operand.shape == result.shape:
            absent = mode.noted(operand) or mode.anywhere(operand)
            if absent:
                mode.note(result, absent)
                for d, gone in absent.items():
                    if name in ("isnan", "isfinite") or (len(call.args) > 1 and call.args[0] is call.args[1]):
                        result.index_fill_(d, gone, name in ("isfinite", "eq", "le", "ge"))  # it is no NaN
    return result


def _by_truth(place: int) -> Handler:
    """What is chosen by a truth value of something missing is missing too, whichever number was chosen."""

    def run(mode: Gaps, call: GapCall) -> object:
        result: Tensor = filled(mode, call)
        truth = call.args[place]
        absent = mode.noted(truth) if truth.shape == result.shape else {}
        if absent and not can_be_nan(result):
            mode.note(result, absent)
            return result
        for d, gone in absent.items():
            result = result.index_fill(d, gone, NAN)
        return result

    return run


def _as_number(mode: Gaps, call: GapCall) -> object:
    """What was missing as a truth value is NaN again as a number."""
    result: Tensor = call.run()
    absent = mode.noted(call.args[0])
    if not absent and not can_be_nan(result) and can_be_nan(call.args[0]):
        absent = mode.anywhere(call.args[0])
        if absent:  # zero is a number of every position, of a table or a dimension
            call.args[0] = call.args[0].nan_to_num(0)
            result = call.run()
    if absent:
        if result.is_floating_point() or result.is_complex():
            for d, gone in absent.items():
                result = result.index_fill(d, gone, NAN)
        else:
            mode.note(result, absent)
    return result


def _repaired(mode: Gaps, call: GapCall) -> object:
    """NaN is replaced where it is a number gone wrong, not where a slice is missing."""
    absent = mode.anywhere(call.args[0])
    result: Tensor = call.run()
    for d, gone in absent.items():
        result = result.index_fill(d, gone, NAN)
    return result


def _swallowed(mode: Gaps, call: GapCall) -> object:
    """Some of these give a number also for NaN (`x ** 0` is one, its sign 0): what is missing stays so."""
    result: Tensor = call.run()
    for tensor in call.args[:2]:
        if isinstance(tensor, Tensor) and can_be_nan(result):
            shift = result.dim() - tensor.dim()
            for d, gone in mode.anywhere(tensor).items():
                result = result.index_fill(d + shift, gone, NAN)
    return result


def _table(*rows: tuple[str, Handler]) -> dict[str, Handler]:
    return {name: handler for names, handler in rows for name in names.split()}


HANDLERS = _table(
    ("mm", product((0, 1), (1, 0), bias="none")),
    ("addmm _addmm_activation", product((1, 1), (2, 0), bias="self")),
    ("bmm", product((0, 2), (1, 1))),
    ("baddbmm", product((1, 2), (2, 1))),
    ("mv", product((0, 1), (1, 0))),
    ("addmv", product((1, 1), (2, 0))),
    ("dot vdot", product((0, 0), (1, 0))),
    ("linear", product((0, -1), (1, 1), bias="bias")),
    ("_grouped_mm", product((0, -1), (1, -2))),
    ("_cdist_forward _euclidean_dist", product((0, -1), (1, -1))),
    ("_trilinear", trilinear),
    ("convolution _convolution", convolution),
    (
        "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention",
        attention,
    ),
    (
        "sum mean var std var_mean std_mean amax amin max min prod nansum logsumexp norm linalg_vector_norm "
        "count_nonzero any all aminmax argmax argmin median mode kthvalue",
        _reduction,
    ),
    (
        "softmax _softmax log_softmax _log_softmax _safe_softmax cumsum cumprod cummax cummin logcumsumexp",
        _full_size,
    ),
    ("sort", _sorted),
    ("topk", _chosen),
    (
        "mse_loss smooth_l1_loss huber_loss soft_margin_loss binary_cross_entropy binary_cross_entropy_with_logits",
        _distance,
    ),
    ("native_layer_norm _fused_rms_norm", _over_last),
    ("native_batch_norm _native_batch_norm_legit _batch_norm_with_update cudnn_batch_norm", _batch_norm),
    ("native_group_norm", _group_norm),
    ("_weight_norm_interface", _weight_norm),
    (
        "eq ne lt le gt ge isnan isfinite isinf signbit logical_not logical_and logical_or bitwise_and bitwise_or",
        _question,
    ),
    ("_to_copy", _as_number),
    ("nan_to_num", _repaired),
    ("pow fmax fmin sign sgn heaviside softshrink", _swallowed),
    ("where", _by_truth(0)),
    ("masked_fill", _by_truth(1)),
    ("constant_pad_nd", padded),
    ("cat stack", joined),
    ("scatter scatter_add scatter_reduce index_add index_copy", put_along),
    ("index_put", put_at),
)
