"""Products of activations with weights, seen while a model runs: which weight, which way round, and what it multiplies.

Calls are recognised, not modules: linear layers, Conv1D of transformers, raw parameters and the experts of a fused
three-dimensional weight all end in one of a few functions of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.statistics.activations.gram import Geometry

MatrixSite = tuple[str, int]  # name of the parameter, number of the matrix in a stack; -1 where it is no stack
WHOLE = -1
_LINEAR = ("linear",)
_RIGHT = ("matmul", "__matmul__", "mm", "bmm")
_ADDED = ("addmm", "baddbmm")
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")


@dataclass(frozen=True, eq=False)
class Use:
    """One product that is about to be computed.

    Args:
        site: which matrix.
        rows: what it multiplies: [..., d], or [matrices, ..., d] where a whole stack is multiplied at once.
        turned: the parameter lies as [d, o] and not as [o, d].
        geometry: of a convolution, whose rows are windows of its input.
        stacked: a whole stack is multiplied at once.
    """

    site: MatrixSite
    rows: Tensor
    turned: bool
    geometry: Geometry | None = None
    stacked: bool = False

    def same_input(self, other: Use) -> bool:
        """Whether another product reads the very same values."""
        a, b = self.rows, other.rows
        return (
            self.geometry == other.geometry
            and not self.stacked
            and not other.stacked
            and a.data_ptr() == b.data_ptr()
            and (a.shape, a.stride(), a._version) == (b.shape, b.stride(), b._version)
        )


class Products(TorchFunctionMode):
    """Tells of every product with one of the given parameters before it is computed.

    Args:
        parameters: by name.
        visit: called with every use; it may wait, or raise.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], visit: Callable[[Use], None]) -> None:
        super().__init__()
        self._visit = visit
        # By memory and not by identity: experts are views of their stack. One storage may hold many parameters, as of
        # weights that lie in a mapped file or in one flat buffer.
        self._held: dict[int, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in parameters.items():
            self._held.setdefault(parameter.untyped_storage().data_ptr(), []).append((name, parameter))

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Look at one call, then make it."""
        kwargs = kwargs or {}
        use = self._use(getattr(func, "__name__", ""), args, kwargs)
        if use is not None:
            self._visit(use)
        return func(*args, **kwargs)

    def _use(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Use | None:
        if name in _LINEAR:
            return self._matrix(_given(args, kwargs, 0, "input"), _given(args, kwargs, 1, "weight"), right=False)
        if name in _RIGHT or name in _ADDED:
            first = 1 if name in _ADDED else 0
            left, right = (args[first], args[first + 1]) if len(args) > first + 1 else (None, None)
            return self._matrix(left, right, right=True) or self._left(left, right)
        if name in _CONVOLUTIONS:
            return self._convolution(args, kwargs)
        return None

    def _matrix(self, rows: Any, weight: Any, *, right: bool) -> Use | None:
        """A product rows @ weight (right), or rows @ weight^T."""
        known = self._known(weight.mT if right and isinstance(weight, Tensor) and weight.dim() > 1 else weight)
        if known is None or not isinstance(rows, Tensor):
            return None
        (name, part), turned = known
        stacked = part == WHOLE and weight.dim() == 3
        return Use((name, part), rows, turned, stacked=stacked)

    def _left(self, weight: Any, columns: Any) -> Use | None:
        """A product weight @ columns."""
        known = self._known(weight)
        if known is None or not isinstance(columns, Tensor) or columns.dim() < 2 or weight.dim() != 2:
            return None
        return Use(known[0], columns.mT, known[1])

    def _known(self, weight: Any) -> tuple[MatrixSite, bool] | None:
        """Which matrix [o, d] an operand is, and whether its parameter lies the other way round."""
        found = self._holder(weight)
        if found is None:
            return None
        name, parameter = found
        if weight.dim() == parameter.dim() and weight.numel() == parameter.numel() and weight.dim() in (2, 3):
            turned = _turned(weight, parameter)
            return None if turned is None else ((name, WHOLE), turned)
        if weight.dim() != 2 or parameter.dim() != 3 or weight.numel() * len(parameter) != parameter.numel():
            return None
        part, rest = divmod(weight.storage_offset() - parameter.storage_offset(), parameter.stride(0))
        turned = _turned(weight, parameter[0]) if rest == 0 else None
        return None if turned is None else ((name, part), turned)

    def _holder(self, weight: Any) -> tuple[str, nn.Parameter] | None:
        """The parameter in whose memory an operand begins."""
        if not _plain(weight):
            return None
        near, begin = self._held.get(weight.untyped_storage().data_ptr(), ()), weight.storage_offset()
        return next((one for one in near if 0 <= begin - one[1].storage_offset() < one[1].numel()), None)

    def _convolution(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Use | None:
        value, weight = _given(args, kwargs, 0, "input"), _given(args, kwargs, 1, "weight")
        found = self._holder(weight)
        if found is None or weight.shape != found[1].shape:
            return None
        rank = weight.dim() - 2
        stride, padding, dilation = (
            _sizes(_given(args, kwargs, i, name, default), rank)
            for i, name, default in ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))
        )
        if stride is None or padding is None or dilation is None:
            return None
        groups = int(_given(args, kwargs, 6, "groups", 1))
        shape = Geometry(False, tuple(weight.shape[2:]), stride, padding, dilation, groups)
        return Use((found[0], WHOLE), value, False, shape)


def _plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type != "meta"


def _turned(weight: Tensor, parameter: Tensor) -> bool | None:
    """Whether a view [.., o, d] is its parameter turned round; None where it is neither."""
    if weight.shape == parameter.shape and weight.stride() == parameter.stride():
        return False
    other = parameter.mT
    return True if weight.shape == other.shape and weight.stride() == other.stride() else None


def _given(args: Sequence[Any], kwargs: Mapping[str, Any], place: int, name: str, default: Any = None) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)


def _sizes(value: Any, rank: int) -> tuple[int, ...] | None:
    """One size per dimension; None for words ("same"), whose sizes the call alone knows."""
    if isinstance(value, str):
        return None
    sizes = [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)]
    return tuple(sizes * rank if len(sizes) == 1 else sizes)
