"""Doors out of the graph: calls that turn a tensor into something that no operator rule can follow.

What a cut changes in there nobody sees, so the dimensions that were read are locked, with the line that read them.
"""

from __future__ import annotations

from dis import opname
from types import FrameType
from typing import cast

from torch import Tensor

from secateur.structure.axes import leaves, lock
from secateur.structure.conditions import is_of_input
from secateur.structure.made_of import made_of
from secateur.structure.provenance import Apply, Dim, Expr, TrackedInt, is_literal
from secateur.structure.recorder import Recorder
from secateur.structure.trace import Args, Axes, SizeUse
from secateur.types import Lock

READS = {
    "item": "a Python number", "__int__": "a Python number", "__float__": "a Python number",
    "__complex__": "a Python number", "__index__": "a Python number", "__bool__": "a Python bool",
    "is_nonzero": "a Python bool", "tolist": "a Python list", "numpy": "a NumPy array", "__array__": "a NumPy array",
    "__dlpack__": "a DLPack capsule", "to_dlpack": "a DLPack capsule", "_to_dlpack": "a DLPack capsule",
    "data_ptr": "an address", "storage": "its storage", "untyped_storage": "its storage",
    "_typed_storage": "its storage",
    "__repr__": "text", "__str__": "text", "__format__": "text", "__contains__": "a Python bool",
    "__reduce_ex__": "a pickle", "equal": "a Python bool", "allclose": "a Python bool",
}  # fmt: skip
HINT = "keep the computation in tensors, or protect the layers that it reads"
BOOLS = ("__bool__", "is_nonzero", "equal", "allclose")
RANKS = ("dim", "ndimension")
# What a tensor is: plain answers, and no numbers that a cut changes. Asked for as attributes and by methods.
FACTS = {
    getattr(Tensor, name): name
    for name in ("dtype", "device", "layout", "requires_grad", "is_leaf", "grad_fn", "is_sparse", "is_cuda")
}
FACT_METHODS = (
    "is_floating_point", "is_complex", "is_signed", "is_contiguous", "is_inference", "is_conj", "is_neg", "is_pinned",
    "stride", "storage_offset", "dim_order", "element_size", "get_device", "type",
)  # fmt: skip


def read(recorder: Recorder, name: str, args: Args, result: object) -> object:
    """A tensor went through a door: lock what was read of it; returns what the code gets."""
    numbers = [recorder.number(tensor) for tensor in args[: 2 if name in PAIRS else 1] if isinstance(tensor, Tensor)]
    reason = recorder.reason(f"its values leave the graph here as {READS[name]}", HINT)
    for number in numbers:
        for axis in (*recorder.trace.axes[number], *recorder.positions.get(number, ())):
            lock(axis, reason)
        _stay(recorder, number, reason)
    if recorder.data.isdisjoint(numbers):
        return result
    recorder.watch.value(name, result)
    if name in ("item", "tolist"):
        return _numbers(recorder, result)
    return recorder.watch.answer(bool(result), recorder.here.place().where) if name in BOOLS else result


def _stay(recorder: Recorder, number: int, reason: Lock) -> None:
    """What was made of weights alone is another value once they are cut: of a sum no dimension is left to be locked."""
    if number not in recorder.data:
        for own in made_of(recorder.trace, number):
            for axis in recorder.trace.axes[own]:
                lock(axis, reason)


def scalar(recorder: Recorder, tensor: Tensor) -> None:
    """Torch itself took the one value of a tensor: for an argument that has to be a plain number, or for a script."""
    _stay(
        recorder, recorder.number(tensor), recorder.reason(f"its values leave the graph here as {READS['item']}", HINT)
    )


def _numbers(recorder: Recorder, value: object) -> object:
    """Integers that the data hold (lengths, say) are sizes of the data when they size something."""
    if type(value) is list:
        return [_numbers(recorder, item) for item in value]
    if type(value) is not int or value < 2:
        return value
    return TrackedInt(value, Dim(recorder.space.fresh(value, Lock("a number that the data hold"))), recorder.watch)


def ranked(recorder: Recorder, name: str, args: Args, result: object) -> object:
    """The number of dimensions: another input may have more of them, so a line that compares it is a condition."""
    tensor = args[0] if args else None
    frame = recorder.here.caller()
    if not isinstance(tensor, Tensor) or type(result) is not int or frame is None:
        return result
    if recorder.here.is_iterated():
        _gone_through(recorder, tensor, frame)
        return result
    if result < 2:  # no number that is followed
        told(recorder, name if name in RANKS else "ndim", args, result)
        return result
    if recorder.numbers.get(tensor) not in recorder.data:
        return result
    axis = recorder.space.fresh(result, Lock("a number of dimensions"))
    for atom in leaves(axis):
        recorder.input_names[atom.id] = "the number of dimensions"
        recorder.watch.ranks.add(atom.id)
    return TrackedInt(result, Dim(axis), recorder.watch)


def _gone_through(recorder: Recorder, tensor: Tensor, frame: FrameType) -> None:
    """Rows one by one: one turn for each of them, or a name for each, which fails where there are others."""
    unpacked = opname[frame.f_code.co_code[frame.f_lasti]] == "UNPACK_SEQUENCE"
    if not unpacked and tensor.dim() and recorder.numbers.get(tensor) in recorder.data:
        axis = recorder.axes(tensor)[0]
        if any(is_of_input(atom) for atom in leaves(axis)):
            recorder.watch.rows(axis.size)


def told(recorder: Recorder, name: str, args: Args, result: object) -> None:
    """What a tensor is was asked for: of an input and what comes of it, or of a weight, it may be otherwise later."""
    tensor = args[0] if args else None
    if not isinstance(tensor, Tensor) or isinstance(result, Tensor) or recorder.here.caller() is None:
        return
    # Without giving it a number: a weight of which no more is asked has not been reached.
    if recorder.numbers.get(tensor) in recorder.data or recorder.own.name(tensor) is not None:
        recorder.watch.fact(name, result)


def exported(recorder: Recorder, tensor: Tensor) -> None:
    """A tensor became a capsule by a function that no mode sees."""
    recorder.kept.before(tensor)
    read(recorder, "to_dlpack", (tensor,), None)


def counted(recorder: Recorder, name: str, args: Args, result: object) -> object:
    """`numel` is the product of the sizes; `len` is a plain number, so what it counts has to stay."""
    tensor = args[0] if args else None
    if not isinstance(tensor, Tensor) or not isinstance(result, int):
        return result
    axes = recorder.axes(tensor)
    if name == "nbytes":
        bytes_ = recorder.space.fresh(tensor.element_size(), Lock("bytes of an element"))
        recorder.watch.ranks.update(atom.id for atom in leaves(bytes_))
        axes = (*axes, bytes_)
    if name == "__len__":
        if axes:
            lock(axes[0], recorder.reason("counted by len(), which gives a plain number", "use the size from shape"))
            if recorder.number(tensor) in recorder.data:
                recorder.lengths.add(result)
                recorder.watch.length(result, "entries")
        return result
    return _product(recorder, axes, result)


def strides(recorder: Recorder, args: Args, result: object) -> object:
    """Steps from one position to the next: products of the sizes behind them, where the tensor is dense."""
    tensor = args[0] if args else None
    if not isinstance(tensor, Tensor):
        return result
    axes = recorder.axes(tensor)
    if not tensor.is_contiguous():
        for axis in axes:
            lock(axis, recorder.reason("its strides are read as numbers", HINT))
        return result
    if isinstance(result, tuple):
        return tuple(_product(recorder, axes[d + 1 :], step) for d, step in enumerate(result))
    dim = args[1] if len(args) > 1 else 0
    return _product(recorder, axes[cast(int, dim) % len(axes) + 1 :], cast(int, result)) if axes else result


def _product(recorder: Recorder, axes: Axes, value: int) -> int:
    expr: Expr | None = None
    for axis in axes:
        expr = Dim(axis) if expr is None else Apply("mul", expr, Dim(axis))
    return value if expr is None else TrackedInt(value, expr, recorder.watch)


PAIRS = ("equal", "allclose")  # of tensors that are compared
COUNTS = ("numel", "nelement", "__len__")
MAKERS = ("tensor", "as_tensor", "scalar_tensor", "asarray")  # of tensors from the numbers that they are given


def watched_numbers(recorder: Recorder, tree: object) -> None:
    """Integers that become values of a tensor, or leave the model beside its tensors, have to stay what they are."""
    if isinstance(tree, TrackedInt):
        if not is_literal(tree.expr):
            recorder.trace.size_uses.append(SizeUse(tree.expr, int(tree), recorder.here.use()))
    elif isinstance(tree, (list, tuple, set)):
        for item in tree:
            watched_numbers(recorder, item)
    elif isinstance(tree, dict):
        for item in tree.values():
            watched_numbers(recorder, item)


def given_out(recorder: Recorder, result: object) -> None:
    """Numbers among the outputs are what the user relies on, like tensors."""
    recorder.here.function = "output"
    watched_numbers(recorder, result)
    recorder.here.function = ""
