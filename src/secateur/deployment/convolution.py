"""A convolution whose weight is mostly zeros: sums over shifted planes of the input, one for each number left."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.deployment import native
from secateur.errors import InputError, UnsupportedError

AT_ONCE = 1 << 20  # numbers of the images worked off together: what one step writes, the next finds in the cache
_ABOUT = "Tensor values, Tensor columns, Tensor starts, Tensor? bias, SymInt[] shape, SymInt[] stride, SymInt[] padding"
_LIBRARY = torch.library.Library("secateur", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(f"packed_convolution(Tensor x, {_ABOUT}) -> Tensor")  # type: ignore[no-untyped-call]


class SparseConv2d(nn.Module):
    """``nn.Conv2d`` with the numbers of its weight that are not zero, output by output. For inference.

    Args:
        layer: as `why_not` takes it; left as it is.

    Raises:
        UnsupportedError: the layer is of a kind that is not computed.
    """

    values: Tensor
    columns: Tensor
    starts: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        problem = why_not(layer)
        if problem:
            raise UnsupportedError("this convolution cannot be packed", why=problem)
        weight = layer.weight.detach().flatten(1)
        there = weight != 0
        self.shape = [int(size) for size in layer.weight.shape]
        self.stride = [int(step) for step in layer.stride]
        self.padding = [0, 0] if isinstance(layer.padding, str) else [int(each) for each in layer.padding]
        self.register_buffer("values", weight[there].clone())
        self.register_buffer("columns", there.nonzero()[:, 1].int())
        self.register_buffer("starts", functional.pad(there.sum(1).cumsum(0), (1, 0)))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        self.register_load_state_dict_post_hook(_check_loaded)  # type: ignore[no-untyped-call]
        self.train(layer.training)

    def check(self) -> None:
        """Refuse tensors that packing cannot have written: the kernel follows them without looking.

        Raises:
            InputError: they are damaged.
        """
        values, columns, starts = self.values, self.columns, self.starts
        whole = (values.dtype, columns.dtype, starts.dtype) == (torch.float32, torch.int32, torch.int64)
        whole = whole and values.dim() == 1 and values.shape == columns.shape and len(starts) == self.shape[0] + 1
        whole = whole and int(starts[0]) == 0 and int(starts[-1]) == len(values) and bool((starts.diff() >= 0).all())
        inputs = self.shape[1] * self.shape[2] * self.shape[3]
        if not whole or bool(((columns < 0) | (columns >= inputs)).any()):
            raise InputError("the tensors of a packed convolution are damaged", hint="get the file again")

    def forward(self, x: Tensor) -> Tensor:
        """The convolution, in float32."""
        own = self._buffers
        found: Tensor = torch.ops.secateur.packed_convolution(
            x, own["values"], own["columns"], own["starts"], own["bias"], self.shape, self.stride, self.padding
        )
        return found

    @property
    def weight(self) -> Tensor:
        """The kernel, put together anew each time."""
        return _dense(self.values, self.columns, self.starts, self.shape)

    def densify(self) -> nn.Conv2d:
        """An ordinary layer with the same weights, bit for bit."""
        outputs, inputs, *size = self.shape
        layer = nn.Conv2d(
            inputs, outputs, (size[0], size[1]), stride=(self.stride[0], self.stride[1]),
            padding=(self.padding[0], self.padding[1]), bias=self.bias is not None, device="meta",
        )  # fmt: skip
        layer.weight = nn.Parameter(self.weight)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.clone())
        return layer.train(self.training)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"shape={self.shape}, stride={self.stride}, padding={self.padding}, numbers={len(self.values)}"


def _check_loaded(module: nn.Module, keys: object) -> None:
    assert isinstance(module, SparseConv2d)
    module.check()


def why_not(layer: nn.Conv2d) -> str:
    """Why a convolution cannot be packed, in words; "" where it can."""
    if layer.groups != 1:
        return "its channels are in groups"
    if tuple(layer.dilation) != (1, 1) or layer.padding_mode != "zeros" or layer.padding == "same":
        return "it is dilated, or padded by other than a number of zeros"
    if layer.weight.dtype != torch.float32 or layer.weight.device.type != "cpu":
        return "its weight is not of float32 on the CPU"
    return ""


def _convolution(
    x: Tensor, values: Tensor, columns: Tensor, starts: Tensor, bias: Tensor | None,
    shape: list[int], stride: list[int], padding: list[int],
) -> Tensor:  # fmt: skip
    if x.dim() != 4 or x.shape[1] != shape[1]:
        raise InputError(f"the convolution takes (images, {shape[1]}, height, width), not {tuple(x.shape)}")
    if x.dtype != torch.float32 or native.isa() == native.WITHOUT:
        weight = _dense(values, columns, starts, shape).to(x.dtype)
        return functional.conv2d(x, weight, None if bias is None else bias.to(x.dtype), stride, padding)
    height, width = _output_size(x, shape, stride, padding)
    y = x.new_empty(x.shape[0], shape[0], height, width)
    some = max(1, AT_ONCE // max(1, x[:1].numel()))
    for images, found in zip(x.split(some), y.split(some), strict=True):
        laid, across = _planes(images, shape, stride, padding)
        whole = found if across == width else x.new_empty(len(images), shape[0], height, across)
        # The last row of an output ends with its last pixel: nothing behind the planes is read.
        pixels = (height - 1) * across + width
        table = _table(shape[1], shape[2], shape[3], stride[0], stride[1], laid.shape[-2], laid.shape[-1])
        native.convolution(laid.flatten(1), values, columns, starts, table, bias, pixels, whole)
        if whole is not found:
            found.copy_(whole[..., :width])
    return y


def _planes(x: Tensor, shape: list[int], stride: list[int], padding: list[int]) -> tuple[Tensor, int]:
    """The input with its padding, and with a plane of its own for every step of the stride; and the planes' width."""
    (down, right), (_, _, tall, wide) = stride, shape
    if tall == wide == 1:
        # One pixel of every few is read, so the others are left out first.
        x = functional.pad(x, (padding[1],) * 2 + (padding[0],) * 2)[..., ::down, ::right].contiguous()
        return x.unsqueeze(1), x.shape[-1]
    below, behind = (-(x.shape[-2] + 2 * padding[0]) % down, -(x.shape[-1] + 2 * padding[1]) % right)
    x = functional.pad(x, (padding[1], padding[1] + behind, padding[0], padding[0] + below))
    images, channels, rows, columns = x.shape
    parts = x.reshape(images, channels, rows // down, down, columns // right, right)
    parts = parts.permute(0, 3, 5, 1, 2, 4).contiguous()
    return parts.flatten(1, 2), parts.shape[-1]


@lru_cache(maxsize=256)
def _table(inputs: int, tall: int, wide: int, down: int, right: int, rows: int, across: int) -> Tensor:
    """Where in an image of planes every place of the kernel starts to read."""
    if tall == wide == 1:
        return torch.arange(inputs) * (rows * across)
    channel, i, j = torch.meshgrid(torch.arange(inputs), torch.arange(tall), torch.arange(wide), indexing="ij")
    plane = ((i % down) * right + j % right) * inputs + channel
    return (plane * (rows * across) + (i // down) * across + j // right).flatten().contiguous()


def _output_size(x: Tensor, shape: list[int], stride: list[int], padding: list[int]) -> tuple[int, int]:
    height, width = ((x.shape[2 + d] + 2 * padding[d] - shape[2 + d]) // stride[d] + 1 for d in (0, 1))
    if height < 1 or width < 1:
        raise InputError(f"an image of {tuple(x.shape[2:])} is smaller than the kernel of {tuple(shape[2:])}")
    return height, width


def _dense(values: Tensor, columns: Tensor, starts: Tensor, shape: list[int]) -> Tensor:
    weight = values.new_zeros(shape[0], shape[1] * shape[2] * shape[3])
    weight[torch.repeat_interleave(torch.arange(shape[0]), starts.diff()), columns.long()] = values
    return weight.view(shape)


def _shape(
    x: Tensor, values: Tensor, columns: Tensor, starts: Tensor, bias: Tensor | None,
    shape: list[int], stride: list[int], padding: list[int],
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], shape[0], *_output_size(x, shape, stride, padding))


_LIBRARY.impl("packed_convolution", _convolution, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("secateur::packed_convolution", _shape, lib=_LIBRARY)
