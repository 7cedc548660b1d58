"""The compiled kernels: found, built where a compiler is there, called; or a clear word on why they are not.

``SECATEUR_ISA`` chooses: ``avx512vbmi2``, ``avx512``, ``avx2`` or ``scalar``; ``torch`` does without compiled code. A
processor that lacks what was chosen takes the best that it has.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from secateur.deployment.formats import Format
from secateur.errors import InputError, RecipeError, ResourceError
from secateur.registry import suggestion

VERSION = 3  # of the arguments and the layouts; a library of another one is not called
LEVELS = ("scalar", "avx2", "avx512", "avx512vbmi2")
WITHOUT = "torch"
VARIABLE = "SECATEUR_ISA"
_WEIGHTS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_INPUTS = {torch.float32: 0, torch.bfloat16: 1}


def isa() -> str:
    """The instruction set in use: one of `LEVELS`, or "torch" where there is no compiled code.

    Raises:
        RecipeError: ``SECATEUR_ISA`` is no known word.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked not in (*LEVELS, WITHOUT, ""):
        raise RecipeError(f"{VARIABLE}={asked!r} is not known", hint=suggestion(asked, (*LEVELS, WITHOUT)))
    if asked == WITHOUT or library() is None:
        return WITHOUT
    best = _best()
    return LEVELS[min(LEVELS.index(asked), best)] if asked else LEVELS[best]


def why_not() -> str:
    """Why there is no compiled code, in words; "" where there is."""
    return _load()[1]


def takes(layout: Format, dtype: torch.dtype, x: torch.dtype, device: torch.device) -> bool:
    """Whether a kernel is there for weights and inputs of these dtypes on this device."""
    known = layout.kernel is not None and dtype in _WEIGHTS and x in _INPUTS
    return known and device.type == "cpu" and isa() != WITHOUT


def linear(
    x: Tensor,
    parts: Sequence[Tensor],
    scale: Tensor | None,
    bias: Tensor | None,
    layout: Format,
    rows: int,
    columns: int,
) -> Tensor:
    """``x W^T * scale + bias`` by a kernel, where `takes` said so. Sums are of float32.

    Args:
        x: (..., columns), on the CPU.
        parts: what the layout packed, and nothing else: offsets are followed without looking.
        scale: per row, or None.
        bias: per row, or None.
        layout: the format.
        rows: outputs.
        columns: inputs.

    Raises:
        ResourceError: there is no memory for the inputs as floats.
        InputError: a tensor is not in the memory of the CPU.
    """
    flat = x.reshape(-1, columns).contiguous()
    y = x.new_empty((*x.shape[:-1], rows))
    keep = [part.contiguous() for part in parts]
    pointers = (ctypes.c_void_p * len(keep))(*(_at(part) for part in keep))
    scale, bias = (None if each is None else each.detach().float().contiguous() for each in (scale, bias))
    failed = _called()(
        LEVELS.index(isa()), layout.kernel, _WEIGHTS[keep[0].dtype], pointers, rows, columns, _at(scale), _at(bias),
        _at(flat), _INPUTS[x.dtype], len(flat), _at(y), torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise ResourceError(f"there is no memory for {len(flat)} inputs of {columns} numbers")
    return y


def unpacked(parts: Sequence[Tensor], scale: Tensor | None, layout: Format, rows: int, columns: int) -> Tensor:
    """The matrix in float32, times its scale, by compiled code; `takes` must have said so.

    Args:
        parts: what the layout packed, and nothing else.
        scale: per row, or None.
        layout: the format.
        rows: outputs.
        columns: inputs.

    Raises:
        InputError: a tensor is not in the memory of the CPU.
    """
    keep = [part.contiguous() for part in parts]
    pointers = (ctypes.c_void_p * len(keep))(*(_at(part) for part in keep))
    dense = torch.empty(rows, columns, device="cpu")
    factor = None if scale is None else scale.detach().float().contiguous()
    compiled = library()
    assert compiled is not None, "takes() was not asked"
    compiled.secateur_unpack(
        layout.kernel, _WEIGHTS[keep[0].dtype], pointers, ctypes.c_int64(rows), ctypes.c_int64(columns),
        _pointer(factor), _pointer(dense), torch.get_num_threads(),
    )  # fmt: skip
    return dense


def convolution(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    table: Tensor,
    bias: Tensor | None,
    pixels: int,
    y: Tensor,
    *,
    relu: bool = False,
) -> None:
    """Sums over shifted planes: ``y[n, o, p] = bias[o] + sum of values[i] * x[n, table[columns[i]] + p]``.

    Args:
        x: (images, numbers per image), float32 and contiguous.
        values: of all outputs in turn.
        columns: which entry of the table every value goes with.
        starts: where each output's values start, and where the last one's end.
        table: int64, where in an image the plane of every column starts.
        bias: per output, or None.
        pixels: of an output plane, and at most as many as lie behind every start.
        y: (images, outputs, ...) to fill; each output has room for the pixels.
        relu: negative outputs become 0; NaN stays NaN.
    """
    compiled = library()
    assert compiled is not None, "isa() was not asked"
    numbers = [ctypes.c_int64(each) for each in (len(x), x.stride(0), y.shape[1], y.stride(0), y.stride(1), pixels)]
    tensors = [_pointer(each) for each in (values, columns, starts, table, bias, x, y)]
    compiled.secateur_convolution(LEVELS.index(isa()), *tensors, *numbers, int(relu), torch.get_num_threads())


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(_at(tensor))


def warn_once() -> None:
    """Say once that products are slow because there is no compiled code, unless that was asked for."""
    if os.environ.get(VARIABLE) != WITHOUT and why_not():
        _warn()


@cache
def _warn() -> None:
    warnings.warn(
        f"the compiled kernels of secateur are not there ({why_not()}): weights are unpacked at every product, which "
        "is slow; install a C++ compiler or the wheel secateur-native, or call densify()",
        stacklevel=2,
    )


def _at(tensor: Tensor | None) -> int | None:
    """Where its numbers are. Compiled code follows every pointer that it is given, so none of another memory is."""
    if tensor is None:
        return None
    if not tensor.is_cpu:
        raise InputError(f"a compiled kernel reads the memory of the CPU, and a tensor is on {tensor.device}")
    return tensor.data_ptr()


def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where there are none."""
    return _load()[0]


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or why there is none."""
    source = home()
    if source is None:
        return None, "the package secateur-native is not installed"
    try:
        path = source.library()
        found = _open(source, path)
    except (source.BuildError, OSError) as error:
        return None, str(error)
    if found.secateur_version() != VERSION:
        return None, f"{path} is of another version"
    return found, ""


def _open(source: ModuleType, path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        # PyTorch has brought no OpenMP whose symbols can be seen: the compiler's own is named instead.
        target = source.cache_folder() / f"{path.stem}-openmp.so"
        return ctypes.CDLL(str(target if target.is_file() else source.build(target, link_openmp=True)))


def home() -> ModuleType | None:
    """The package with the sources: installed, or beside this one in a checkout."""
    found = importlib.util.find_spec("secateur_native")
    if found is None:
        file = Path(__file__).parents[3] / "native" / "secateur_native" / "__init__.py"
        if not file.is_file():
            return None
        where = [str(file.parent)]
        found = importlib.util.spec_from_file_location("secateur_native", file, submodule_search_locations=where)
    if "secateur_native" in sys.modules:
        return sys.modules["secateur_native"]
    if found is None or found.loader is None:
        return None
    module = importlib.util.module_from_spec(found)
    sys.modules["secateur_native"] = module
    found.loader.exec_module(module)
    return module


@cache
def _best() -> int:
    found = library()
    return 0 if found is None else int(found.secateur_best_isa())


@cache
def _called() -> Any:
    found = library()
    assert found is not None, "takes() was not asked"
    number, pointer, long = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64
    function = found.secateur_linear
    function.argtypes = [
        number, number, number, ctypes.POINTER(pointer), long, long, pointer, pointer, pointer, number, long, pointer,
        number,
    ]  # fmt: skip
    function.restype = number
    return function
