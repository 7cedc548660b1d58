"""Rules for products that sum over a dimension: matrix products and convolutions."""

from __future__ import annotations

from math import lcm

from torch import Tensor

from secateur.structure.axes import ONE, Axis, Conflict, leaves, product
from secateur.structure.rules.base import Call, broadcast, register
from secateur.structure.rules.spatial import windows
from secateur.structure.trace import Axes, Restrict


@register("mm", "addmm", "mv", "addmv", "_addmm_activation", "dot", "vdot", "_int_mm")
def mm(call: Call) -> Axes:
    """[m, k] x [k, n], with an addend broadcast to the result."""
    a, b = (call.operand(1), call.operand(2)) if "addm" in _name(call) else (call.first, call.operand(1))
    axes_a, axes_b = call.axes(a), call.axes(b)
    call.unify(axes_a[-1], axes_b[0])
    call.contract(a, -1)
    call.contract(b, 0)
    out = (*axes_a[:-1], *axes_b[1:])
    call.cost.append((*axes_a, *axes_b[1:]))
    return _with_addend(call, out) if "addm" in _name(call) else out


@register("bmm", "baddbmm")
def bmm(call: Call) -> Axes:
    """[b, m, k] x [b, k, n]."""
    a, b = (call.operand(1), call.operand(2)) if "badd" in _name(call) else (call.first, call.operand(1))
    axes_a, axes_b = call.axes(a), call.axes(b)
    call.unify(axes_a[0], axes_b[0])
    call.unify(axes_a[2], axes_b[1])
    call.contract(a, -1)
    call.contract(b, -2)
    if {call.number(a), call.number(b)} & call.recorder.weights:
        call.recorder.trace.parallel.append(axes_a[0])
    if call.is_activation(a) and call.is_activation(b):
        call.recorder.trace.heads.append(axes_a[0])
        call.recorder.trace.inner += [axes_a[2], axes_a[1], axes_b[2]]
    out = (axes_a[0], axes_a[1], axes_b[2])
    call.cost.append((*axes_a, axes_b[2]))
    return _with_addend(call, out) if "badd" in _name(call) else out


@register("_grouped_mm")
def grouped_mm(call: Call) -> Axes:
    """[tokens, k] x [experts, k, n], the tokens sorted by expert; other layouts are a barrier."""
    a, b, bias = call.tensor("self"), call.tensor("mat2"), call.optional("bias")
    axes_a, axes_b = call.axes(a), call.axes(b)
    if a.dim() != 2 or b.dim() != 3:
        for axis in (*axes_a, *axes_b):
            call.lock(axis, "a grouped product of this layout")
        return tuple(call.fresh(n, "a grouped product of this layout") for n in call.results[0].shape)
    call.lock(axes_b[0], "experts are addressed by number")
    call.unify(axes_a[1], axes_b[1])
    call.contract(a, -1)
    call.contract(b, -2)
    call.cost.append((*axes_a, axes_b[2]))
    rows = 1 if b.stride(1) == 1 else 2  # the dimension whose numbers lie side by side
    for axis, size in ((axes_a[1], a.shape[1]), (axes_b[rows], b.shape[rows])):
        for atom in leaves(axis):
            atom.multiple = lcm(atom.multiple, _aligned(size, a.element_size()))
    out = (axes_a[0], axes_b[2])
    return broadcast(call, [out, call.axes(bias)[-1:]]) if isinstance(bias, Tensor) else out


def _aligned(size: int, width: int) -> int:
    """Numbers in 16 bytes, at multiples of which the kernel wants rows to begin.

    Of half precision, where the model as it stands can be cast to that: its cut is cast as well.
    """
    return 8 if size % 8 == 0 else max(1, 16 // width)


@register("linear")
def linear(call: Call) -> Axes:
    """X [..., k] times weight [n, k] plus bias [n]."""
    x, weight, bias = call.tensor("input"), call.tensor("weight"), call.optional("bias")
    axes, (rows, columns) = call.axes(x), call.axes(weight)
    call.unify(axes[-1], columns)
    call.contract(x, -1)
    call.contract(weight, -1)
    if isinstance(bias, Tensor):
        call.unify(call.axes(bias)[0], rows)
    call.cost.append((*axes, rows))
    return (*axes[:-1], rows)


@register("_trilinear")
def trilinear(call: Call) -> Axes:
    """Three tensors, spread to a common shape, multiplied and summed over some dimensions (nn.Bilinear)."""
    spread = []
    for i, name in enumerate(("expand1", "expand2", "expand3")):
        tensor, where = call.operand(i), call.integers(name)
        axes = list(call.axes(tensor))
        dims = list(range(len(axes)))
        for d in sorted(where):
            axes.insert(d, ONE)
            dims.insert(d, -1)
        spread.append((tensor, tuple(axes), dims))
    summed = set(call.integers("sumdim"))
    out = broadcast(call, [axes for _, axes, _ in spread])
    for tensor, _, dims in spread:
        call.contract(tensor, *(dims[d] for d in summed if dims[d] >= 0))
    return tuple(axis for d, axis in enumerate(out) if d not in summed)


@register("_cdist_forward", "_euclidean_dist")
def cdist(call: Call) -> Axes:
    """Distances between the rows of two batches: the last dimension is mixed and vanishes."""
    a, b = call.first, call.operand(1)
    axes_a, axes_b = call.axes(a), call.axes(b)
    call.unify(axes_a[-1], axes_b[-1])
    call.restricted = Restrict([(call.number(t), t.dim() - 1, call.axes(t)[-1]) for t in (a, b)], aligned=[(0, 1)])
    return (*broadcast(call, [axes_a[:-2], axes_b[:-2]]), axes_a[-2], axes_b[-2])


def _name(call: Call) -> str:
    return str(call.func._schema.name)


def _with_addend(call: Call, out: Axes) -> Axes:
    return broadcast(call, [out, call.axes(call.first)])


@register("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution")
def convolution(call: Call) -> Axes:
    """Convolution of any rank, grouped, depthwise or transposed.

    Input channels are groups x in-per-group, output channels are groups x out-per-group; with one group the
    products are trivial, with one channel per group the group is the channel.
    """
    x, weight, bias = call.first, call.tensor("weight"), call.optional("bias")
    groups, transposed = call.integer("groups", 1), bool(call.get("transposed"))
    axes_x, axes_w = call.axes(x), call.axes(weight)
    spatial = weight.dim() - 2
    lead, channels = axes_x[: -spatial - 1], axes_x[-spatial - 1]
    for axis in axes_w[2:]:
        call.lock(axis, "the kernel's extent in space")
    group, first = _split_groups(call, axes_w[0], groups)
    inner, outer = (first, axes_w[1]) if transposed else (axes_w[1], first)
    call.unify(channels, product([group, inner]))
    call.contract(x, -spatial - 1)
    call.contract(weight, *([0] if transposed else [1]))
    if transposed and groups > 1:  # dimension 0 is groups x in: only the inner factor is summed over
        call.recorder.trace.roles.setdefault((_source(call, weight), 1), "out")
    out_channels = product([group, outer])
    if isinstance(bias, Tensor):
        call.unify(call.axes(bias)[0], out_channels)
    space = windows(
        call,
        axes_x[-spatial:],
        kernel=weight.shape[2:],
        stride=call.integers("stride"),
        padding=[*call.integers("padding"), *call.integers("output_padding")],
    )
    call.cost.append((*lead, *(axes_x[-spatial:] if transposed else space), *axes_w))
    return (*lead, out_channels, *space)


def _split_groups(call: Call, axis: Axis, groups: int) -> tuple[Axis, Axis]:
    try:
        return call.recorder.space.split_product(axis, groups)
    except Conflict:
        why = "convolution groups do not follow the structure of the channels"
        call.lock(axis, why)
        return call.fresh(groups, why), call.fresh(axis.size // groups, why)


def _source(call: Call, tensor: Tensor) -> str:
    return call.recorder.sources.get(call.number(tensor), ("", ()))[0]
