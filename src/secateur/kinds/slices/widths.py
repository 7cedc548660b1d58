"""Widths as the cut model would see them, where the original's code reckons with one.

A norm that is written by hand divides by its width, and over the kept coordinates it has to divide by their number. In
the ablated original the width is still the whole one. Inside `KeptWidths` a width is a number of two values: whole
where it shapes a tensor, kept where it becomes a value.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from types import CodeType
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from secateur.kinds.slices.missing import Missing
from secateur.model.place import users_functions, users_line


class Width(int):
    """An integer of the original, and what it is once units are gone.

    Args:
        whole: its value.
        kept: its value in the cut model.
        told: is called with the width that it comes from where the kept value is used.
        width: whole and kept value of that, where this one was reckoned from it.

    Example:
        >>> width = Width(16, 9, lambda width: None)
        >>> width + 0, width ** 0.5, (width // 2).kept
        (16, 3.0, 4)
    """

    kept: int
    told: Callable[[tuple[int, int]], None]
    width: tuple[int, int]

    def __new__(
        cls, whole: int, kept: int, told: Callable[[tuple[int, int]], None], width: tuple[int, int] | None = None
    ) -> Width:
        """See the class."""
        self = super().__new__(cls, whole)
        self.kept, self.told, self.width = kept, told, width or (whole, kept)
        return self

    def value(self) -> int:
        """The kept value, noted as used."""
        self.told(self.width)
        return self.kept

    def __float__(self) -> float:
        return float(self.value())

    def __deepcopy__(self, memo: object) -> int:
        return int(self)

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)


def _as_size(name: str) -> None:
    """Arithmetic of sizes gives sizes: both values are reckoned with."""
    plain = getattr(operator, name)

    def forth(self: Width, other: object) -> object:
        if type(other) is not int and not isinstance(other, Width):
            return plain(self.value(), other) if isinstance(other, (float, complex)) else NotImplemented
        right = other.kept if isinstance(other, Width) else other
        return Width(plain(int(self), int(other)), plain(self.kept, right), self.told, self.width)

    def back(self: Width, other: object) -> object:
        if type(other) is not int:
            return plain(other, self.value()) if isinstance(other, (float, complex)) else NotImplemented
        if name in ("floordiv", "mod") and self.kept == 0:
            return NotImplemented
        return Width(plain(other, int(self)), plain(other, self.kept), self.told, self.width)

    setattr(Width, f"__{name}__", forth)
    setattr(Width, f"__r{name}__", back)


def _as_value(name: str) -> None:
    """Arithmetic that makes a number of it."""
    plain = getattr(operator, name)

    def forth(self: Width, other: object) -> object:
        return plain(self.value(), other.kept if isinstance(other, Width) else other)

    def back(self: Width, other: object) -> object:
        return plain(other, self.value())

    setattr(Width, f"__{name}__", forth)
    setattr(Width, f"__r{name}__", back)


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    _as_size(_name)
for _name in ("truediv", "pow"):
    _as_value(_name)

# Functions of torch to which a width among the arguments is a number to reckon with, and no size.
_ARITHMETIC = ("add", "sub", "mul", "div", "truediv", "pow")
_RECKONS = frozenset(
    [f"{before}{name}{after}" for name in _ARITHMETIC for before, after in (("", ""), ("", "_"), ("__", "__"))]
    + [f"__{letter}{name}__" for name in _ARITHMETIC for letter in "ri"]
    + ["true_divide", "divide", "multiply", "subtract", "rsub", "float_power", "clamp", "clamp_min", "clamp_max"]
    + ["full", "full_like", "tensor", "as_tensor", "scalar_tensor", "fill_"]
)


class KeptWidths(TorchFunctionMode):
    """Inside, sizes of dimensions that miss slices are widths of two values.

    Args:
        missing: says what is missing from a tensor.

    Attributes:
        used: where the kept value was used, "file:line" of the user's code, and the width that it comes from; with the
            functions in which it was.
    """

    def __init__(self, missing: Missing) -> None:
        super().__init__()
        self.missing = missing
        self.used: dict[tuple[str, tuple[int, int]], set[CodeType]] = {}

    def note(self, width: tuple[int, int]) -> None:
        """Remember the innermost line of the user's code."""
        self.used.setdefault((users_line(), width), set()).update(users_functions()[:1])

    def __torch_function__(
        self, func: Any, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in _RECKONS:
            args = tuple(a.value() if isinstance(a, Width) else a for a in args)
            kwargs = {key: a.value() if isinstance(a, Width) else a for key, a in kwargs.items()}
        if name == "scaled_dot_product_attention" and kwargs.get("scale") is None and args:
            width = self._shared_width(cast(Tensor, args[0]))
            kwargs.update({} if width is None else {"scale": 1 / math.sqrt(width.value())})
        result = func(*args, **kwargs)
        if func is torch.Tensor.size or getattr(func, "__self__", None) is torch.Tensor.shape:
            return self._sizes(args[0], result, args, kwargs)
        return result

    def _shared_width(self, query: Tensor) -> Width | None:
        """The width by which fused attention scales of itself, where part of it is missing."""
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            gone = self.missing.anywhere(query).get(query.dim() - 1)
            size = query.shape[-1]
        return None if gone is None else Width(size, size - len(gone), self.note)

    def _sizes(self, tensor: Tensor, result: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> object:
        with torch._C.DisableTorchFunction(), _disable_current_modes():  # looking is no part of the run
            absent = self.missing.anywhere(tensor)
        if not absent:
            return result
        if isinstance(result, int):
            d = (args[1] if len(args) > 1 else kwargs["dim"]) % tensor.dim()
            return self._width(result, absent.get(d))
        return torch.Size([self._width(size, absent.get(d)) for d, size in enumerate(result)])

    def _width(self, size: int, gone: Tensor | None) -> int:
        return size if gone is None else Width(size, size - len(gone), self.note)
