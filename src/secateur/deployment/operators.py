"""The product with a packed matrix as an operator of PyTorch: compiled, exported and differentiated like any other.

The parts are ordinary tensors, so nothing of PyTorch's sparse layouts is needed. The gradient reaches inputs and bias;
the weights are frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from secateur.deployment import direct, native, on_gpu
from secateur.deployment.formats import Format, format_of
from secateur.errors import InputError

_ABOUT = "Tensor[] parts, Tensor? scale, Tensor? bias, str format, SymInt rows, SymInt columns"
_LIBRARY = torch.library.Library("secateur", "DEF")  # type: ignore[no-untyped-call]
_TAGS = (torch.Tag.pt2_compliant_tag,)
_LIBRARY.define(f"packed_linear(Tensor x, {_ABOUT}) -> Tensor", tags=_TAGS)  # type: ignore[no-untyped-call]
# The same without a gradient. Compiled code takes its place on the CPU as soon as it is built (`direct.connect`).
_LIBRARY.define(f"packed_product(Tensor x, {_ABOUT}) -> Tensor", tags=_TAGS)  # type: ignore[no-untyped-call]
_UNPACKED = "unpacked(Tensor[] parts, Tensor? scale, str format, SymInt rows, SymInt columns) -> Tensor"
_LIBRARY.define(_UNPACKED, tags=_TAGS)  # type: ignore[no-untyped-call]


# Inputs at once from which unpacking the weight and a dense product take less than a kernel: a prompt, not a token.
MANY = 256


def packed_linear(
    x: Tensor, parts: Sequence[Tensor], scale: Tensor | None, bias: Tensor | None, format: str, rows: int, columns: int
) -> Tensor:
    """``x W^T + bias`` with a packed W.

    Args:
        x: (..., columns).
        parts: what the format packed.
        scale: one factor per row for weights of whole numbers, else None.
        bias: (rows,) or None.
        format: name of the format.
        rows: outputs.
        columns: inputs.

    Returns:
        (..., rows), of the dtype of x.

    Raises:
        InputError: x has other columns or no floating-point numbers, or not all tensors are on one device.
    """
    _require(x, columns)  # here, because an error cannot keep its class on its way through compiled code
    grows = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    call = torch.ops.secateur.packed_linear if grows else torch.ops.secateur.packed_product
    found: Tensor = call(x, list(parts), scale, bias, format, rows, columns)
    return found


def unpacked(parts: Sequence[Tensor], scale: Tensor | None, format: str, rows: int, columns: int) -> Tensor:
    """The matrix itself: bit for bit where there is no scale, else in float32."""
    found: Tensor = torch.ops.secateur.unpacked(list(parts), scale, format, rows, columns)
    return found


def _linear(
    x: Tensor, parts: list[Tensor], scale: Tensor | None, bias: Tensor | None, format: str, rows: int, columns: int
) -> Tensor:
    _require(x, columns)
    _require_one_device(x, *parts, scale, bias)
    layout = format_of(format)
    if x.numel() and native.takes(layout, parts[0].dtype, x.dtype, x.device):
        if x.numel() >= MANY * columns:
            weight = native.unpacked(parts, scale, layout, rows, columns)
            found = functional.linear(x.float(), weight, None if bias is None else bias.float())
            return found.to(x.dtype)
        return native.linear(x, parts, scale, bias, layout, rows, columns)
    inputs = x.numel() // columns if columns else 0
    if on_gpu.takes(layout, parts[0].dtype, x.dtype, x.device, inputs):
        return on_gpu.linear(x, parts, scale, bias, rows, columns)
    _warn(x, layout, parts[0].dtype, inputs)
    weight = _unpacked(parts, scale, format, rows, columns).to(x.dtype)
    return functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _product(
    x: Tensor, parts: list[Tensor], scale: Tensor | None, bias: Tensor | None, format: str, rows: int, columns: int
) -> Tensor:
    # The first call alone comes here where the operator can be built; nothing is compiled before it is needed.
    if x.is_cpu and native.isa() != native.WITHOUT:
        direct.connect(MANY)
    return _linear(x, parts, scale, bias, format, rows, columns)


def _warn(x: Tensor, layout: Format, dtype: torch.dtype, inputs: int) -> None:
    """That unpacking at every product is slow, where it is not the better way."""
    if x.is_cpu:
        native.warn_once()
    elif inputs <= on_gpu.MOST:
        on_gpu.warn_once(on_gpu.problem(layout, dtype, x.dtype) or f"no kernel runs on {x.device.type}")


def _unpacked(parts: list[Tensor], scale: Tensor | None, format: str, rows: int, columns: int) -> Tensor:
    _require_one_device(*parts, scale)
    dense = format_of(format).unpack(parts, rows, columns)
    return dense if scale is None else dense.float() * scale.float().unsqueeze(1)


def _require(x: Tensor, columns: int) -> None:
    if x.dim() == 0 or x.shape[-1] != columns:
        raise InputError(f"the layer takes {columns} numbers in the last dimension, not {tuple(x.shape)}")
    if not x.is_floating_point():
        raise InputError(f"the layer takes floating-point numbers, not {x.dtype}")


def _require_one_device(first: Tensor, *others: Tensor | None) -> None:
    for other in others:
        if other is not None and other.device != first.device:
            raise InputError(
                f"the tensors of a packed product are on {first.device} and on {other.device}",
                hint="move the model and its inputs to one device, as by .to(device)",
            )


def _linear_shape(
    x: Tensor, parts: list[Tensor], scale: Tensor | None, bias: Tensor | None, format: str, rows: int, columns: int
) -> Tensor:
    _require_one_device(x, *parts, scale, bias)
    return x.new_empty((*x.shape[:-1], rows))


def _unpacked_shape(parts: list[Tensor], scale: Tensor | None, format: str, rows: int, columns: int) -> Tensor:
    _require_one_device(*parts, scale)
    return parts[0].new_empty((rows, columns), dtype=parts[0].dtype if scale is None else torch.float32)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, parts, scale, bias, ctx.format, ctx.rows, ctx.columns = inputs
    ctx.scaled, ctx.bias = scale is not None, None if bias is None else bias.dtype
    ctx.save_for_backward(*parts, *([] if scale is None else [scale]))


def _backward(ctx: Any, gradient: Tensor) -> tuple[object, ...]:
    saved = list(ctx.saved_tensors)
    scale = saved.pop() if ctx.scaled else None
    weight = torch.ops.secateur.unpacked(saved, scale, ctx.format, ctx.rows, ctx.columns).to(gradient.dtype)
    for_x = gradient @ weight if ctx.needs_input_grad[0] else None
    for_bias = None
    if ctx.bias is not None and ctx.needs_input_grad[3]:
        for_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0).to(ctx.bias)
    return for_x, [None] * len(saved), None, for_bias, None, None, None


_LIBRARY.impl("packed_linear", _linear, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_LIBRARY.impl("packed_product", _product, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_LIBRARY.impl("unpacked", _unpacked, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("secateur::packed_linear", _linear_shape, lib=_LIBRARY)
torch.library.register_fake("secateur::packed_product", _linear_shape, lib=_LIBRARY)
torch.library.register_fake("secateur::unpacked", _unpacked_shape, lib=_LIBRARY)
torch.library.register_autograd("secateur::packed_linear", _backward, setup_context=_remember, lib=_LIBRARY)
