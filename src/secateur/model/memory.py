"""What tensors held: kept from the start, or when somebody is about to write into their memory by whatever name.

A view, a detached tensor, an array of NumPy and a capsule share the memory of the tensor that they were made of, but
are other objects. What is written is therefore found by the memory that it lies in, and never by the object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import _disable_current_modes

from secateur.model.call import tensors_in
from secateur.model.tensors import has_values

# Methods that give the memory of a tensor to code which writes without any operator of torch.
OPENINGS = (
    "numpy", "__array__", "__dlpack__", "to_dlpack", "_to_dlpack", "data_ptr", "storage", "untyped_storage",
    "_typed_storage",
)  # fmt: skip
# These write their running statistics where their `training` is true, and their signatures do not say so.
UNDECLARED = frozenset(
    getattr(torch.ops.aten, name).default
    for name in ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "batch_norm")
)
STATISTICS = ("running_mean", "running_var")
# From the class below `Tensor`, whose own methods tell who opens a memory while a model is captured
# (`secateur.model.written`): nobody is to be told that this package looks.
storage_of = torch._C.TensorBase.untyped_storage
address_of = torch._C.TensorBase.data_ptr
Argument = tuple[int, str]  # of an operator: its place and its name
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# The parts of layouts that have more than one memory.
_PARTS: dict[torch.layout, tuple[Callable[[Tensor], Tensor], ...]] = {
    torch.sparse_coo: (Tensor._indices, Tensor._values),
    torch.sparse_csr: (Tensor.crow_indices, Tensor.col_indices, Tensor.values),
    torch.sparse_bsr: (Tensor.crow_indices, Tensor.col_indices, Tensor.values),
    torch.sparse_csc: (Tensor.ccol_indices, Tensor.row_indices, Tensor.values),
    torch.sparse_bsc: (Tensor.ccol_indices, Tensor.row_indices, Tensor.values),
}


class Contents:
    """What a tensor held, and where.

    Args:
        tensor: any.
        copied: whether its values are kept at once, and not only its place.
    """

    def __init__(self, tensor: Tensor, *, copied: bool) -> None:
        self.tensor = tensor
        self.memory = tensor.detach()  # another handle, for the case that the tensor is given other memory
        self.copy: Tensor | None = None
        self.parts = [Contents(part, copied=copied) for part in parts_of(self.memory)]
        self.bytes = -1 if self.parts else _bytes(self.memory)
        self.place = _place(self.memory) if self.bytes >= 0 and tensor.layout == torch.strided else None
        if copied:
            self.keep()

    def keep(self) -> None:
        """Copy the values, once."""
        for part in self.parts:
            part.keep()
        if self.copy is None and not self.parts:
            self.copy = _without_repeats(self.memory).clone()

    def changed(self) -> bool:
        """Whether it holds other values than it did."""
        if self.parts:
            now = parts_of(self.tensor)
            return any(
                old.copy is not None and (old.copy.shape != new.shape or not _same_bits(new, old.copy))
                for old, new in zip(self.parts, now, strict=True)
            )
        return self.copy is not None and not _same_bits(_without_repeats(self.tensor.detach()), self.copy)

    def put_back(self) -> None:
        """Give the tensor its memory and the memory its values."""
        if self.parts:
            for part in self.parts:
                part.put_back()
            self.tensor.data = self.memory  # an operator may have given it other parts
            return
        if self.place is not None and self.tensor.layout == torch.strided and _place(self.tensor) != self.place:
            self.tensor.data = self.memory
        if self.bytes >= 0 and _bytes(self.memory) != self.bytes:
            self._shrink()
        if self.copy is None:
            return
        now = _without_repeats(self.memory)
        # Compared by value: batch norm writes its statistics without counting up their version. Written only where
        # something differs: a tensor in memory that may not be written is left alone.
        if not _same_bits(now, self.copy):
            now.copy_(self.copy)

    def _shrink(self) -> None:
        """Give memory that a run has enlarged its size again; what NumPy has seen since keeps it, and is replaced."""
        storage = storage_of(self.memory)
        if storage.resizable():
            storage.resize_(self.bytes)
            return
        every = torch.empty(0, dtype=torch.uint8, device=self.memory.device).set_(storage, 0, (self.bytes,), (1,))
        kept = every.clone()
        place = self.memory.storage_offset(), self.memory.shape, self.memory.stride()
        self.memory = self.memory.new_empty(0).set_(kept.untyped_storage(), *place)
        self.place = _place(self.memory)
        self.tensor.data = self.memory


class Saved:
    """Tensors from outside of a run; the values of those whose memory it is about to write to are kept.

    Example:
        >>> x, kept = torch.zeros(3), Saved()
        >>> kept.add(x)
        >>> _ = kept.before(x[:2])
        >>> _ = x[:2].fill_(1)
        >>> kept.put_back()
        >>> x
        tensor([0., 0., 0.])
    """

    def __init__(self) -> None:
        self._held: dict[int, list[Tensor]] = {}  # by memory; held, so that none of it is given to another tensor
        self._values: dict[int, Contents] = {}

    def add(self, tensor: Tensor) -> None:
        """A tensor from outside."""
        if not has_values(tensor):
            return
        memories = [memory_of(tensor)]
        if tensor.layout in _PARTS:
            with _disable_current_modes():
                memories += [memory_of(part) for part in parts_of(tensor)]
        for memory in memories:
            self._held.setdefault(memory, []).append(tensor)

    def before(self, tensor: Tensor) -> list[Tensor]:
        """Somebody may write to this tensor; returns whose values are kept for that from now on."""
        if not self._held or tensor.is_meta:
            return []
        near = [t for t in self._held.get(memory_of(tensor), ()) if id(t) not in self._values and _overlap(t, tensor)]
        if near:
            with _disable_current_modes():  # a copy is no part of the run
                self._values.update((id(each), Contents(each, copied=True)) for each in near)
        return near

    def changed(self, tensor: Tensor) -> bool:
        """Whether a tensor from outside holds other values than before."""
        return id(tensor) in self._values and self._values[id(tensor)].changed()

    def put_back(self) -> None:
        """Give back what was written to."""
        with _disable_current_modes():
            for values in self._values.values():
                values.put_back()


def written(func: OpOverload[..., object], args: Sequence[object], kwargs: Mapping[str, object]) -> Iterable[Tensor]:
    """The tensors that a call of an operator is going to write to."""
    names, only_if = _written_names(func)
    if not names or (only_if is not None and not _given(only_if, args, kwargs)):
        return ()
    return [tensor for argument in names for tensor in tensors_in(_given(argument, args, kwargs))]


def _given(argument: Argument, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
    place, name = argument
    return args[place] if place < len(args) else kwargs.get(name)


# Asked at every call; operators are few and live as long as the process.
@cache
def _written_names(func: OpOverload[..., object]) -> tuple[tuple[Argument, ...], Argument | None]:
    """What a call writes to, and the flag without which it does not; None where it always does."""
    given = tuple(enumerate(func._schema.arguments))
    if func in UNDECLARED:
        places = {a.name: (place, a.name) for place, a in given}
        return tuple(places[name] for name in STATISTICS), places["training"]
    return tuple((place, a.name) for place, a in given if a.alias_info is not None and a.alias_info.is_write), None


def parts_of(tensor: Tensor) -> list[Tensor]:
    """The tensors that a sparse one is made of, which share its memory; none of any other."""
    return [part(tensor) for part in _PARTS.get(tensor.layout, ())]


def memory_of(tensor: Tensor) -> int:
    """A number for the memory that a tensor lies in: views of one tensor share it."""
    try:
        return int(storage_of(tensor)._cdata)
    except (RuntimeError, NotImplementedError):  # layouts without one storage
        return id(tensor)


def _bytes(tensor: Tensor) -> int:
    """Size of the memory that a tensor lies in; -1 where it has none of its own."""
    try:
        return int(storage_of(tensor).nbytes())
    except (RuntimeError, NotImplementedError):
        return -1


def _place(tensor: Tensor) -> tuple[object, ...]:
    """What a strided tensor covers of which memory; asked of the tensor itself, so that no mode hears of it."""
    return memory_of(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one memory may share some of it: many weights may lie side by side in one file."""
    if a.layout != torch.strided or b.layout != torch.strided:
        return True
    (a_first, a_end), (b_first, b_end) = _extent(a), _extent(b)
    return a_first < b_end and b_first < a_end


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First byte and end of what a tensor covers of its memory."""
    first = tensor.storage_offset()
    if tensor.numel() == 0:  # may be made larger in place
        return 0, int(storage_of(tensor).nbytes()) + 1
    last = first + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(first * tensor.element_size()), int((last + 1) * tensor.element_size())


def _without_repeats(tensor: Tensor) -> Tensor:
    """One of each: expanded dimensions say the same many times, and can be neither copied cheaply nor written."""
    if tensor.layout == torch.strided:
        for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            if size > 1 and stride == 0:
                tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape hold the same bits: NaN equals itself, and 0.0 is not -0.0."""
    if a.layout != torch.strided or a.is_quantized:
        return False
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    bits = _BITS.get(a.element_size())
    return torch.equal(a, b) if bits is None else torch.equal(a.view(bits), b.view(bits))
