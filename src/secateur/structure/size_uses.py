"""Python calls in which an integer fixes the size of a dimension.

Every handler ties each integer of its call to the dimension that it sizes. A literal locks the dimension at once; an
attribute or a size from `shape` becomes a `SizeUse`, which is checked and followed when the cut is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from secateur.structure.axes import Axis, Conflict, lock
from secateur.structure.function_call import FunctionCall, plain
from secateur.structure.provenance import TrackedInt
from secateur.structure.trace import Args, Kwargs

Handler = Callable[[FunctionCall], None]
HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Register a handler for functions and methods by name."""

    def add(handler: Handler) -> Handler:
        for name in names:
            HANDLERS[name] = handler
        return handler

    return add


def ints(values: Sequence[object]) -> list[object]:
    """Sizes given as separate arguments or as one sequence."""
    if len(values) == 1 and isinstance(values[0], (tuple, list)):
        return list(values[0])
    return list(values)


def _sizes(args: Args, kwargs: Kwargs, *names: str) -> list[object]:
    for name in names:
        if name in kwargs:
            return ints([kwargs[name]])
    return ints(args)


@handles("view", "reshape", "expand", "broadcast_to", "zeros", "ones", "empty", "rand", "randn", "new_zeros",
         "new_ones", "new_empty", "new_full", "full")  # fmt: skip
def result_sizes(call: FunctionCall) -> None:
    """Each integer is the size of a dimension of the result."""
    rest = call.args[1:] if call.args and isinstance(call.args[0], Tensor) else call.args
    sizes = _sizes(rest, call.kwargs, "size", "shape")
    if call.name in ("full", "new_full"):  # what follows the sizes is the value to fill with
        sizes = ints(sizes[:1])
    if not isinstance(call.result, Tensor) or len(sizes) != call.result.dim():
        return
    call.recorder.made.clear()  # every size is accounted for below
    for value, axis in zip(sizes, call.axes(call.result), strict=True):
        call.tie(value, axis)


@handles("new")
def sizes_of_old_code(call: FunctionCall) -> None:
    """`tensor.new(2, 3)`, as code from before `new_zeros` has it: sizes, unless it is given numbers to hold."""
    given = call.args[1:]
    shape = given[0] if len(given) == 1 else given
    if isinstance(shape, (torch.Size, int)) or (len(given) > 1 and all(plain(size) is not None for size in given)):
        result_sizes(call)


@handles("expand_as", "view_as", "reshape_as")
def as_another(call: FunctionCall) -> None:
    """The sizes are those of another tensor, whose dimensions these are from now on."""
    for a, b in zip(call.axes(call.result), call.axes(call.tensor(1, "other")), strict=True):
        call.recorder.unify(a, b)


@handles("broadcast_tensors", "meshgrid")
def all_alike(call: FunctionCall) -> None:
    """All results have the same dimensions, each of them that of one operand."""
    shapes = [call.axes(t) for t in cast("Sequence[Tensor]", call.result)]
    for other in shapes[1:]:
        for a, b in zip(shapes[0], other, strict=True):
            call.recorder.unify(a, b)


@handles("one_hot")
def one_hot(call: FunctionCall) -> None:
    """The integer counts the classes; all other sizes are those of the numbers."""
    call.recorder.made.clear()
    classes = call.get(1, "num_classes", default=-1)
    if int(cast(int, classes)) < 0:  # as many as the largest number says
        lock(call.axes(call.result)[-1], call.recorder.reason("as many classes as the largest number says"))
    else:
        call.tie(classes, call.axes(call.result)[-1])


@handles("chunk")
def chunk(call: FunctionCall) -> None:
    """Pieces are equal, or a cut would move their borders."""
    dim = call.integer(2, "dim")
    if len({axis.size for axis in call.pieces(dim)}) > 1:
        lock(call.axes(call.args[0])[dim], call.recorder.reason("cut into pieces of unequal size"))


@handles("tensor_split", "hsplit", "vsplit", "dsplit")
def tensor_split(call: FunctionCall) -> None:
    """Borders follow from the size of the whole: equal pieces must shrink alike, others cannot be cut."""
    tensor, given = call.tensor(0, "input"), call.get(1, "indices_or_sections", "sections", "indices")
    if call.name == "tensor_split":
        dim = call.integer(2, "dim")
    else:
        dim = {"vsplit": 0, "hsplit": min(1, tensor.dim() - 1), "dsplit": 2}[call.name]
    pieces = call.pieces(dim)
    # Below this function are plain slices, which know of their own borders only.
    if not isinstance(given, int):
        lock(call.axes(tensor)[dim], call.recorder.reason("cut at positions from the code"))
    elif len({axis.size for axis in pieces}) > 1:
        lock(call.axes(tensor)[dim], call.recorder.reason("cut into pieces of unequal size"))
    else:
        for other in pieces[1:]:
            call.recorder.unify(pieces[0], other)


@handles("pad")
def pad(call: FunctionCall) -> None:
    """The amounts must stay what they were."""
    for amount in cast(Sequence[object], call.get(1, "pad")):
        call.watch(amount)


@handles("interpolate", "upsample", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
         "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d")  # fmt: skip
def space_sizes(call: FunctionCall) -> None:
    """Each integer is the size of a dimension of space, which may be features that stay as many as they are."""
    result = call.result[0] if isinstance(call.result, tuple) else call.result
    axes = call.axes(result)
    rank = len(axes) - 2 if "pool" not in call.name else int(call.name[-2])
    given = call.get(1, "size", "output_size")
    sizes = list(given) if isinstance(given, (tuple, list)) else [given] * rank
    for value, axis in zip(sizes, axes[len(axes) - rank :], strict=False):
        call.tie(value, axis)


@handles("unflatten")
def unflatten(call: FunctionCall) -> None:
    """Each integer is one factor of the dimension."""
    sizes = list(cast(Sequence[int], call.get(2, "sizes")))
    start = call.integer(1, "dim") % cast(Tensor, call.args[0]).dim()
    for value, axis in zip(sizes, call.axes(call.result)[start : start + len(sizes)], strict=True):
        call.tie(value, axis)


@handles("repeat", "tile")
def repeat(call: FunctionCall) -> None:
    """Each integer counts the copies of a dimension."""
    times = cast(list[int], _sizes(call.args[1:], call.kwargs, "repeats", "dims"))
    # From the right: repetitions may be fewer than dimensions (tile) or more (repeat, which adds dimensions in front).
    for value, axis in zip(reversed(times), reversed(call.axes(call.result)), strict=False):
        if 1 < value < axis.size:
            call.tie(value, call.factor(axis, int(value), outer=True))
        elif value > 1:
            call.tie(value, axis)


@handles("repeat_interleave")
def repeat_interleave(call: FunctionCall) -> None:
    """The integer counts the copies of each position."""
    value, dim = call.get(1, "repeats"), call.get(2, "dim")
    if isinstance(value, int) and isinstance(dim, int) and value > 1:
        call.tie(value, call.factor(call.axes(call.result)[dim], int(value), outer=False))


@handles("split", "split_with_sizes", "split_copy", "split_with_sizes_copy", "unsafe_split",
         "unsafe_split_with_sizes")  # fmt: skip
def split(call: FunctionCall) -> None:
    """Integers are the sizes of the pieces."""
    sizes = cast("int | Sequence[int]", call.get(1, "split_size_or_sections", "split_size"))
    pieces = call.pieces(call.integer(2, "dim"))
    axis = call.axes(call.args[0])[call.integer(2, "dim")]
    if isinstance(sizes, int):  # how many pieces there are depends on it
        call.bounded(sizes, axis, inside=True)
    for value in () if isinstance(sizes, int) else sizes:
        call.reached(value, axis)
        call.bounded(value, axis)
    if len(pieces) == 1:
        return
    wanted = [sizes] * len(pieces) if isinstance(sizes, int) else list(sizes)
    for value, axis in zip(wanted, pieces, strict=True):
        if axis.size == int(value):  # the last piece may be shorter than asked for
            call.tie(value, axis)


@handles("narrow")
def narrow(call: FunctionCall) -> None:
    """Start and length of an interval."""
    dim = call.integer(1, "dim")
    _bound(call, call.get(2, "start"), call.axes(call.args[0])[dim])
    for mark in (call.reached, call.bounded):
        mark(call.get(3, "length"), call.axes(call.args[0])[dim])
    call.tie(call.get(3, "length"), call.axes(call.result)[dim])


@handles("__getitem__")
def getitem(call: FunctionCall) -> None:
    """Bounds of slices: a literal bound locks what lies before it."""
    tensor, key = call.args
    items = key if isinstance(key, tuple) else (key,)
    if not any(isinstance(item, slice) for item in items):
        return
    axes, d = call.axes(tensor), 0
    given = sum(1 for item in items if item is not None and item is not Ellipsis)
    for item in items:
        if item is Ellipsis:
            d += len(axes) - given
        elif isinstance(item, slice) and item.step not in (None, 1):
            d += 1  # the rule of the operator has judged a strided slice
        elif isinstance(item, slice):
            for bound in (item.start, item.stop):
                _bound(call, bound, axes[d])
            d += 1
        elif isinstance(item, Tensor) and item.dim() > 1 and item.dtype in (torch.bool, torch.uint8):
            d += item.dim()  # a mask takes as many dimensions as it has
        elif item is not None:
            d += 1


def _bound(call: FunctionCall, given: object, axis: Axis) -> None:
    """A slice bound counts the positions before it (or after it, when negative)."""
    bound = plain(given)
    if bound is None:
        return
    size, position = axis.size, int(bound)
    call.reached(bound, axis)
    call.bounded(bound, axis)
    if not isinstance(given, int) and position not in (0, size):
        # A number of another library may have been computed from this very size: neither side of it can change.
        lock(axis, call.recorder.reason("cut at a position of which nobody knows where it comes from"))
        return
    if position in (0, size) or abs(position) > size:
        return
    if position < 0 and not isinstance(bound, TrackedInt):
        _tie_side(call, -position, axis, size + position, before=False)
        return
    _tie_side(call, bound, axis, position % size, before=True)


def _tie_side(call: FunctionCall, value: object, axis: Axis, at: int, *, before: bool) -> None:
    try:
        low, high = call.recorder.space.split_sum(axis, at)
    except Conflict:
        lock(axis, call.recorder.reason("a slice does not follow the structure of this dimension"))
        return
    call.tie(value, low if before else high)


@handles("layer_norm", "rms_norm")
def normalized_shape(call: FunctionCall) -> None:
    """Sizes of the normalised dimensions."""
    shape = cast(Sequence[int], call.get(1, "normalized_shape"))
    axes = call.axes(call.result)
    for value, axis in zip(shape, axes[len(axes) - len(shape) :], strict=True):
        call.tie(value, axis)


@handles("instance_norm", "batch_norm")
def num_features(call: FunctionCall) -> None:
    """A norm without parameters keeps its width in an attribute only."""
    owner = call.recorder.modules.get(call.recorder.here.module)
    if isinstance(owner, nn.modules.batchnorm._NormBase):
        call.tie(owner.num_features, call.axes(call.args[0])[1])


@handles("group_norm")
def num_groups(call: FunctionCall) -> None:
    """The number of normalisation groups."""
    value = call.integer(1, "num_groups")
    if value > 1:
        call.tie(value, call.factor(call.axes(call.result)[1], int(value), outer=True))


@handles("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_groups(call: FunctionCall) -> None:
    """The number of convolution groups."""
    # The seventh argument of all six, although what stands before it differs.
    value = call.integer(6, "groups", 1)
    if value > 1:
        call.tie(value, call.factor(call.axes(call.tensor(1, "weight"))[0], int(value), outer=True))


@handles("multi_head_attention_forward")
def multi_head_attention(call: FunctionCall) -> None:
    """nn.MultiheadAttention takes embed_dim = heads x head size for granted, so its input width is that product.

    Whole heads then go with their share of the width, or the same coordinates of every head with theirs.
    """
    space = call.recorder.space
    width, embed_dim, heads = call.axes(call.get(0, "query"))[-1], *cast("tuple[int, int]", call.args[3:5])
    packed = call.get(5, "in_proj_weight")
    separate = [call.kwargs.get(f"{name}_proj_weight") for name in "qkv"]
    inner = [call.axes(weight)[0] for weight in separate if isinstance(weight, Tensor)]
    try:
        if isinstance(packed, Tensor) and not inner:
            inner = [space.split_product(call.axes(packed)[0], 3)[1]]
        for axis in inner:
            space.unify(width, axis)
        call.tie(heads, space.split_product(width, int(heads))[0])
    except Conflict:
        reason = call.recorder.reason("the width of nn.MultiheadAttention does not follow its heads")
        for axis in (width, *inner):
            lock(axis, reason)
    call.tie(embed_dim, width)
