"""Arithmetic on tensors of which slices are missing: what the original computes once these slices are not there.

A missing slice is one that is NaN at every element. Operators that act element by element and those that move elements
hand NaN on by themselves. What is left are the operators that put several positions together, and these leave the
missing ones out: a sum of products runs over what both factors have, a mean or a norm over what its input has. Nothing
here asks which dimensions of a model belong together, so a mistake of the structure engine about that cannot be
repeated here. NaN that does not fill a slice is a result like any other, and is handed on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from secateur.model.place import users_line

Op = OpOverload[..., Any]
Arguments = dict[str, Any]
NAN = float("nan")
PRODUCTS = frozenset(
    ["mm", "addmm", "bmm", "baddbmm", "convolution", "linear", "addmv"]
)  # make an activation, also of constants
SERVES = {  # where a weight stands among the arguments
    "mm": (1,), "addmm": (2,), "linear": (1,), "convolution": (1,), "embedding": (0,), "mul": (0, 1), "div": (1,),
    "_trilinear": (1,), "_grouped_mm": (1,), "addmv": (1,),
}  # fmt: skip
SAME = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Missing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, missing slices are left out wherever positions are put together.

    What is computed from weights alone (a weight over its norm, a softmax of gates) is reckoned twice, with and without
    what is missing. Where such a result serves as a weight, both must agree, or the cut changes the weight: a norm of a
    weight that is taken again over what is left is another norm.

    Args:
        weights: tensors of the model, of which slices were made NaN, each with the same tensor whole. What is whole
            stands for itself.

    Attributes:
        reduced: sizes of dimensions that were summed up, and how many of their positions were there.
        changed: lines of the user's code where a weight is used that is not what it was.
        absent: truth values and counts cannot be NaN: what was missing where they come from stands here.

    Example:
        >>> with Missing():
        ...     torch.tensor([1.0, NAN, 5.0]).mean().item()
        3.0
    """

    def __init__(self, weights: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.whole: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        for tensor, whole in weights:
            self.whole[tensor] = whole
        self.stored = {t.untyped_storage()._cdata for t, _ in weights}
        self.poisoned = {t.untyped_storage()._cdata for t, whole in weights if t is not whole}
        self.reduced: set[tuple[int, int]] = set()
        self.changed: set[str] = set()
        self.absent: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._known: dict[tuple[object, ...], Tensor | None] = {}

    def __torch_dispatch__(
        self, func: Op, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> object:
        kwargs = dict(kwargs or {})
        name = func._schema.name.removeprefix("aten::")
        operands = _tensors((args, kwargs))
        written = _written(func, args, kwargs) if func._schema.is_mutable else []
        if name not in PRODUCTS and all(t in self.whole for t in operands):
            return self._of_weights(func, args, kwargs, {id(t) for t in written})
        for place in SERVES.get(name, ()):
            self._require_same(args[place])
        for tensor in written:  # a statistic that is written in training depends on the data from now on
            self.whole.pop(tensor, None)  # type: ignore[no-untyped-call]
        return self._run(func, args, kwargs)

    def _of_weights(self, func: Op, args: Sequence[Any], kwargs: Arguments, written: set[int]) -> object:
        """A weight or a constant, with and without what is missing."""

        def whole(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return self.whole[value].clone() if id(value) in written else self.whole[value]

        if all(self.whole[t] is t for t in _tensors((args, kwargs))):
            result = func(*args, **kwargs)
            full = result
        else:
            instead = pytree.tree_map(whole, (list(args), kwargs))
            full, result = func(*instead[0], **instead[1]), self._run(func, args, kwargs)
        if not isinstance(result, (Tensor, tuple, list)):
            return full  # a number for Python: that of the original
        for mine, other in zip(_tensors(result), _tensors(full), strict=True):
            self.whole[mine] = other
        return result

    def _require_same(self, weight: object) -> None:
        """Note where a computed weight is not, as far as it is there, what it is in the original."""
        if not isinstance(weight, Tensor) or weight.untyped_storage()._cdata in self.stored:
            return
        whole = self.whole.get(weight)  # type: ignore[no-untyped-call]
        if whole is None or whole is weight or not weight.is_floating_point():
            return
        error = torch.where(torch.isnan(weight), 0, weight - whole).abs().max()
        if float(error) > SAME[weight.dtype] * float(whole.abs().max()):
            self.changed.add(users_line())

    def _run(self, func: Op, args: Sequence[Any], kwargs: Arguments) -> object:
        name = func._schema.name.removeprefix("aten::")
        handler = HANDLERS.get(name)
        if handler is not None:
            return handler(self, Call(func, args, kwargs))
        changed = HANDLERS.get(name.removesuffix("_")) if func._schema.is_mutable and name.endswith("_") else None
        if changed is not None:
            functional = getattr(torch.ops.aten, name.removesuffix("_"))
            plain = getattr(functional, func._overloadname, None)
            if plain is not None:
                return args[0].copy_(changed(self, Call(plain, args, kwargs)))
        return func(*args, **kwargs)

    def of(self, tensor: Tensor, dim: int) -> Tensor | None:
        """Ascending numbers of the missing positions of a dimension; None where nothing is missing."""
        noted = self.absent.get(tensor)  # type: ignore[no-untyped-call]
        if noted is not None:
            return cast("dict[int, Tensor]", noted).get(dim % tensor.dim())
        if tensor.dim() == 0 or not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() == 0:
            return None
        if tensor.untyped_storage()._cdata not in self.poisoned:
            return _look(tensor, dim) if _has_nan(tensor) else None
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), dim % tensor.dim())
        if place not in self._known:
            self._known[place] = _look(tensor, dim)
        return self._known[place]

    def anywhere(self, tensor: Tensor) -> dict[int, Tensor]:
        """Dimension -> its missing positions, of the dimensions that miss some but not all."""
        if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() == 0 or not _has_nan(tensor):
            return {}
        found = ((d, self.of(tensor, d)) for d in range(tensor.dim()))
        return {d: gone for d, gone in found if gone is not None and len(gone) < tensor.shape[d]}


class Call:
    """An operator and what it is called with.

    Args:
        func: the operator.
        args: its arguments by place.
        kwargs: its arguments by name.
    """

    def __init__(self, func: Op, args: Sequence[Any], kwargs: Arguments) -> None:
        self.func, self.args, self.kwargs = func, list(args), kwargs

    def get(self, name: str, default: object = None) -> Any:
        """An argument by its name in the operator's schema."""
        if name in self.kwargs:
            return self.kwargs[name]
        for i, argument in enumerate(self.func._schema.arguments):
            if argument.name == name:
                if i < len(self.args):
                    return self.args[i]
                return argument.default_value if argument.has_default_value() else default
        return default

    def put(self, name: str, value: object) -> None:
        """Another value for an argument."""
        for i, argument in enumerate(self.func._schema.arguments):
            if argument.name == name and i < len(self.args):
                self.args[i] = value
                return
        self.kwargs[name] = value

    def run(self) -> Any:
        """Call the operator."""
        return self.func(*self.args, **self.kwargs)


def _tensors(value: object) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def _written(func: Op, args: Sequence[Any], kwargs: Arguments) -> list[Tensor]:
    """Operands that a call writes to."""
    named = [(a, args[i] if i < len(args) else kwargs.get(a.name)) for i, a in enumerate(func._schema.arguments)]
    return [t for a, value in named if a.alias_info is not None and a.alias_info.is_write for t in _tensors(value)]


# -- looking ----------------------------------------------------------------------------------------------------------


def _has_nan(tensor: Tensor) -> bool:
    """One pass that makes nothing; infinities of both signs give a needless yes."""
    return bool(torch.isnan(tensor.detach().sum()))


def _look(tensor: Tensor, dim: int) -> Tensor | None:
    """Positions of a dimension that are NaN throughout."""
    dim %= tensor.dim()
    line = tensor[tuple(slice(None) if d == dim else 0 for d in range(tensor.dim()))]
    maybe = torch.isnan(line).nonzero().flatten()  # a slice that is NaN throughout begins with NaN
    if len(maybe) == 0:
        return None
    inside = torch.isnan(tensor.index_select(dim, maybe)).movedim(dim, 0).reshape(len(maybe), -1)
    gone = maybe[inside.all(1)]
    return gone if len(gone) else None


def _rest(size: int, gone: Tensor) -> Tensor:
    stays = torch.ones(size, dtype=torch.bool, device=gone.device)
    stays[gone] = False
    return stays.nonzero().flatten()


def _pick(tensor: Tensor, dim: int, stay: Tensor) -> Tensor:
    """`index_select`, along the rows in memory where the tensor is a transposed matrix (three times as fast)."""
    if tensor.dim() == 2 and tensor.stride(0) == 1:
        return tensor.t().index_select(1 - dim % 2, stay).t()
    return tensor.index_select(dim, stay)


def _spread(tensor: Tensor, dim: int, size: int, stay: Tensor) -> Tensor:
    """At full size again; what is missing is NaN."""
    shape = list(tensor.shape)
    shape[dim] = size
    blank = NAN if tensor.is_floating_point() or tensor.is_complex() else 0
    return tensor.new_full(shape, blank).index_copy_(dim, stay, tensor)


# -- sums of products -------------------------------------------------------------------------------------------------


def _product(*factors: tuple[int, int]) -> Callable[[Missing, Call], object]:
    """A sum of products over one dimension of each of two factors: (argument, dimension)."""

    def handler(mode: Missing, call: Call) -> object:
        found = [(i, d % call.args[i].dim(), mode.of(call.args[i], d)) for i, d in factors]
        gone = [missing for _, _, missing in found if missing is not None]
        sizes = {call.args[i].shape[d] for i, d, _ in found}
        if gone and len(sizes) == 1:  # factors that do not fit are refused by the operator, as in the original
            stay = _rest(sizes.pop(), torch.cat(gone))
            if len(stay):  # where nothing is left, the result is missing, and NaN says so
                for i, d, _ in found:
                    call.args[i] = _pick(call.args[i], d, stay)
        return call.run()

    return handler


def _convolution(mode: Missing, call: Call) -> object:
    x, weight = call.get("input"), call.get("weight")
    groups, transposed = call.get("groups"), call.get("transposed")
    dim = 1 if x.dim() == weight.dim() else 0  # without a batch the channels come first
    gone = mode.of(x, dim)
    if x.shape[dim] != weight.shape[0 if transposed else 1] * (1 if transposed else groups):
        return call.run()  # refused by the operator, as in the original
    if groups == 1:
        absent = mode.of(weight, 0 if transposed else 1)
        missing = [each for each in (gone, absent) if each is not None]
        if missing:
            stay = _rest(x.shape[dim], torch.cat(missing))
            if len(stay):
                call.put("input", x.index_select(dim, stay))
                call.put("weight", weight.index_select(0 if transposed else 1, stay))
        return call.run()
    if gone is None and not _has_nan(weight):
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


def _trilinear(mode: Missing, call: Call) -> object:
    """A sum of products of three factors, each of which lacks some of the dimensions."""
    for d in call.get("sumdim"):
        places = []
        for i in range(3):
            lacking = call.get(f"expand{i + 1}")
            if d not in lacking:
                places.append((i, d - sum(other < d for other in lacking)))
        gone = [missing for i, own in places if (missing := mode.of(call.args[i], own)) is not None]
        if gone:
            stay = _rest(call.args[places[0][0]].shape[places[0][1]], torch.cat(gone))
            for i, own in places if len(stay) else ():
                call.args[i] = call.args[i].index_select(own, stay)
    return call.run()


def _attention(mode: Missing, call: Call) -> object:
    """Fused attention: coordinates without a partner count nothing, heads that are missing stay missing."""
    query, key, value = (call.get(name) for name in ("query", "key", "value"))
    if not any(_has_nan(t) for t in (query, key, value)):
        return call.run()
    coordinates = mode.of(value, -1)
    alive = [~torch.isnan(t).flatten(2).all(2) for t in (query, key, value)]  # [batch, heads]
    whole = alive[0]
    for other in alive[1:]:  # fewer heads of keys and values serve several heads of queries
        whole = whole & other.repeat_interleave(whole.shape[1] // other.shape[1], 1)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        dims = mode.of(tensor, -1)
        heads = torch.isnan(tensor).flatten(2).all(2)[:, :, None, None]
        filled = tensor.masked_fill(heads, 0)
        call.put(name, filled if dims is None else filled.index_fill(-1, dims, 0))
    results = call.run()
    first: Tensor = results[0].masked_fill(~whole[:, :, None, None], NAN)
    if coordinates is not None:
        first = first.index_fill(-1, coordinates, NAN)
    return (first, *results[1:])


# -- reductions -------------------------------------------------------------------------------------------------------


def _dims(call: Call, rank: int) -> list[int]:
    given = call.get("dim")
    if given is None or given == []:
        return list(range(rank))
    return [d % rank for d in ([given] if isinstance(given, int) else given)] if rank else []


def _without(mode: Missing, call: Call, dims: Sequence[int]) -> dict[int, Tensor]:
    """Take what is missing out of the input; dimension -> what stays."""
    x: Tensor = call.args[0]
    found = {d: gone for d in dims if (gone := mode.of(x, d)) is not None and len(gone) < x.shape[d]}
    kept = {d: _rest(x.shape[d], gone) for d, gone in found.items()}
    for d, stay in kept.items():
        call.args[0] = call.args[0].index_select(d, stay)
    return kept


def _reduction(mode: Missing, call: Call) -> object:
    """Positions become one number, or one number and its place."""
    x: Tensor = call.args[0]
    kept = _without(mode, call, _dims(call, x.dim()))
    mode.reduced |= {(x.shape[d], len(stay)) for d, stay in kept.items()}
    result = call.run()
    if len(kept) != 1:
        return result
    (stay,) = kept.values()
    if isinstance(result, Tensor):
        return stay[result] if call.func._schema.name in PLACES else result
    return type(result)((result[0], *(_places(t, stay) for t in result[1:]))) if kept else result


def _distance(mode: Missing, call: Call) -> object:
    """An error for each place of two tensors, then its mean or sum over the places that both have."""
    if call.get("reduction") == 0:
        return call.run()
    operands = [i for i, t in enumerate(call.args) if isinstance(t, Tensor)]
    full = torch.broadcast_tensors(*(call.args[i] for i in operands))
    for i, tensor in zip(operands, full, strict=True):
        call.args[i] = tensor
    for d in range(full[0].dim()):
        gone = [absent for t in full if (absent := mode.of(t, d)) is not None]
        stay = _rest(full[0].shape[d], torch.cat(gone)) if gone else None
        if stay is not None and len(stay):
            mode.reduced.add((full[0].shape[d], len(stay)))
            for i in operands:
                call.args[i] = call.args[i].index_select(d, stay)
    return call.run()


PLACES = {"aten::argmax", "aten::argmin"}


def _places(tensor: Tensor, stay: Tensor) -> Tensor:
    """Numbers of positions as the whole tensor counts them; variances and means are no such numbers."""
    return tensor if tensor.is_floating_point() or tensor.is_complex() else stay[tensor]


def _full_size(mode: Missing, call: Call) -> object:
    """The result has the input's size: a softmax, a running sum, an order."""
    x: Tensor = call.args[0]
    kept = _without(mode, call, _dims(call, x.dim()))
    result = call.run()
    for d, stay in kept.items():
        size = x.shape[d]
        if isinstance(result, Tensor):
            result = _spread(result, d, size, stay)
        else:
            result = type(result)(_spread(_places(t, stay), d, size, stay) for t in result)
    return result


def _chosen(mode: Missing, call: Call) -> object:
    """The first few in an order."""
    x: Tensor = call.args[0]
    kept = _without(mode, call, _dims(call, x.dim()))
    result = call.run()
    for stay in kept.values():
        result = type(result)(_places(t, stay) for t in result)
    return result


# -- norms ------------------------------------------------------------------------------------------------------------


def _over_last(mode: Missing, call: Call) -> object:
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
        result[0] = _spread(result[0], d, x.shape[d], stay)
    return tuple(result)


def _batch_norm(mode: Missing, call: Call) -> object:
    """In training a mean over all dimensions but the channels: also how weights are standardised."""
    x: Tensor = call.args[0]
    if not call.get("training", True):
        return call.run()
    kept = _without(mode, call, [d for d in range(x.dim()) if d != 1])
    result = list(call.run())
    for d, stay in kept.items():
        result[0] = _spread(result[0], d, x.shape[d], stay)
    return tuple(result)


def _group_norm(mode: Missing, call: Call) -> object:
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


def _weight_norm(mode: Missing, call: Call) -> object:
    """A direction of length one times a length: along all dimensions but one."""
    v: Tensor = call.get("v")
    keep = call.get("dim") % v.dim()
    kept = _without(mode, call, [d for d in range(v.dim()) if d != keep])
    result = list(call.run())
    for d, stay in kept.items():
        result[0] = _spread(result[0], d, v.shape[d], stay)
    return tuple(result)


# -- truth values -----------------------------------------------------------------------------------------------------


def _question(mode: Missing, call: Call) -> object:
    """Truth values of numbers: what is missing stays so, under another name than NaN."""
    result: Tensor = call.run()
    for operand in call.args[:2]:
        if isinstance(operand, Tensor) and operand.shape == result.shape:
            absent = mode.absent.get(operand) or mode.anywhere(operand)  # type: ignore[no-untyped-call]
            if absent:
                mode.absent[result] = absent
                for d, gone in cast("dict[int, Tensor]", absent).items():
                    if call.func._schema.name in ("aten::isnan", "aten::isfinite"):  # it is neither: it is not there
                        result.index_fill_(d, gone, call.func._schema.name == "aten::isfinite")
    return result


def _as_number(mode: Missing, call: Call) -> object:
    """What was missing as a truth value is NaN again as a number."""
    result: Tensor = call.run()
    absent = mode.absent.get(call.args[0])  # type: ignore[no-untyped-call]
    if absent:
        if result.is_floating_point() or result.is_complex():
            for d, gone in cast("dict[int, Tensor]", absent).items():
                result = result.index_fill(d, gone, NAN)
        else:
            mode.absent[result] = absent
    return result


def _repaired(mode: Missing, call: Call) -> object:
    """NaN is replaced where it is a number gone wrong, not where a slice is missing."""
    absent = mode.anywhere(call.args[0])
    result: Tensor = call.run()
    for d, gone in absent.items():
        result = result.index_fill(d, gone, NAN)
    return result


def _table(*rows: tuple[str, Callable[[Missing, Call], object]]) -> dict[str, Callable[[Missing, Call], object]]:
    return {name: handler for names, handler in rows for name in names.split()}


HANDLERS = _table(
    ("mm", _product((0, 1), (1, 0))),
    ("addmm", _product((1, 1), (2, 0))),
    ("bmm", _product((0, 2), (1, 1))),
    ("baddbmm", _product((1, 2), (2, 1))),
    ("mv", _product((0, 1), (1, 0))),
    ("addmv", _product((1, 1), (2, 0))),
    ("dot vdot", _product((0, 0), (1, 0))),
    ("linear", _product((0, -1), (1, 1))),
    ("_grouped_mm", _product((0, -1), (1, -2))),
    ("_cdist_forward", _product((0, -1), (1, -1))),
    ("_trilinear", _trilinear),
    ("convolution", _convolution),
    (
        "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention",
        _attention,
    ),
    (
        "sum mean var std var_mean std_mean amax amin max min prod nansum logsumexp norm linalg_vector_norm "
        "count_nonzero any all argmax argmin median mode kthvalue",
        _reduction,
    ),
    (
        "softmax _softmax log_softmax _log_softmax _safe_softmax cumsum cumprod cummax cummin logcumsumexp sort",
        _full_size,
    ),
    ("topk", _chosen),
    (
        "mse_loss smooth_l1_loss huber_loss soft_margin_loss binary_cross_entropy binary_cross_entropy_with_logits",
        _distance,
    ),
    ("native_layer_norm _fused_rms_norm", _over_last),
    ("native_batch_norm _native_batch_norm_legit _batch_norm_with_update cudnn_batch_norm", _batch_norm),
    ("native_group_norm", _group_norm),
    ("_weight_norm_interface", _weight_norm),
    ("eq ne lt le gt ge isnan isfinite isinf logical_not logical_and logical_or bitwise_and bitwise_or", _question),
    ("_to_copy", _as_number),
    ("nan_to_num", _repaired),
)
