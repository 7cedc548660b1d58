"""A convolution whose weight is mostly zeros: sums over shifted planes of the input, one for each number left.

A norm of stored statistics that follows is a factor and a summand per output, so it can go into the numbers and the
bias; a ReLU that follows is done before an output leaves the registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Final, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from secateur.deployment import native
from secateur.deployment.packed import PackedLayer, PackedRecord, place_of
from secateur.errors import InputError, PlanMismatchError, UnsupportedError

PLANES: Final = "planes"  # the word for this format in files and decisions
AT_ONCE = 1 << 20  # numbers of the images worked off together: what one step writes, the next finds in the cache
_ABOUT = "Tensor values, Tensor columns, Tensor starts, Tensor? bias, SymInt[] shape, SymInt[] stride, SymInt[] padding"
_LIBRARY = torch.library.Library("secateur", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(f"packed_convolution(Tensor x, {_ABOUT}, bool relu=False) -> Tensor")  # type: ignore[no-untyped-call]

Count = Annotated[int, Field(ge=0, lt=1 << 31)]
Pair = Annotated[list[Count], Field(min_length=2, max_length=2)]


class ConvolutionRecord(PackedRecord):
    """What a file says of a packed convolution.

    Args:
        shape: of the weight: outputs, inputs, height, width.
        stride: down and to the right.
        padding: at the top and the bottom, left and right.
        bias: whether it has one.
        norm: name of the norm that was folded into it; "" = none.
        relu: name of the ReLU that it computes; "" = none.
    """

    format: Literal["planes"]
    shape: Annotated[list[Count], Field(min_length=4, max_length=4)]
    stride: Pair
    padding: Pair
    bias: bool
    norm: str
    relu: str

    @property
    def parts(self) -> tuple[str, ...]:
        """The numbers, their places, and where each output's start."""
        return ("values", "columns", "starts")

    @property
    def beside(self) -> tuple[str, ...]:
        """The bias, where there is one."""
        return ("bias",) if self.bias else ()

    def require(self, model: nn.Module, name: str) -> None:
        """Refuse a place without a convolution of this kind, or without the norm and the ReLU that it has taken in."""
        place = model.get_submodule(name)
        if type(place) is not nn.Conv2d or list(place.weight.shape) != self.shape:
            raise PlanMismatchError(f"The layer {name!a} is no convolution of {'x'.join(map(str, self.shape))}.")
        same = (list(place.stride), _padding(place)) == (self.stride, self.padding)
        if not same or place.groups != 1 or _differs(place):
            raise PlanMismatchError(f"The convolution {name!a} has another stride, padding, dilation or groups.")
        # What a norm adds is a bias in the file, whatever the convolution in front of it had.
        if not self.norm and (place.bias is not None) != self.bias:
            raise PlanMismatchError(f"The layer {name!a} has {'no' if self.bias else 'a'} bias in the model.")
        norm, relu = (place_of(model, each) if each else None for each in (self.norm, self.relu))
        if self.norm and (type(norm) is not nn.BatchNorm2d or _width(norm) != self.shape[0]):
            raise PlanMismatchError(f"{self.norm!a}, a part of {name!a} now, is no norm of {self.shape[0]} channels.")
        if self.relu and type(relu) is not nn.ReLU:
            raise PlanMismatchError(f"{self.relu!a}, a part of {name!a} now, is no ReLU.")

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """The numbers that are not zero."""
        if list(weight.shape) != self.shape or not weight.is_floating_point():
            raise InputError(f"a convolution of {self.shape} has a weight of {list(weight.shape)}, {weight.dtype}")
        return dict(zip(self.parts, _pack(weight), strict=True))

    def build(self, tensors: Mapping[str, Tensor]) -> SparseConv2d:
        """The layer."""
        return SparseConv2d(self, tensors)


class SparseConv2d(PackedLayer):
    """``nn.Conv2d`` with the numbers of its weight that are not zero, output by output. Made by `SparseConv2d.of`.

    Args:
        record: what it is.
        tensors: what the record names.
    """

    values: Tensor
    columns: Tensor
    starts: Tensor
    bias: Tensor | None

    def __init__(self, record: ConvolutionRecord, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.shape, self.stride, self.padding = list(record.shape), list(record.stride), list(record.padding)
        self.norm, self.relu = record.norm, record.relu
        for part in record.parts:
            self.register_buffer(part, tensors[part])
        self.register_buffer("bias", tensors["bias"] if record.bias else None)

    @classmethod
    def of(
        cls, layer: nn.Conv2d, *, norm: nn.BatchNorm2d | None = None, names: tuple[str, str] = ("", "")
    ) -> SparseConv2d:
        """The packed form of a layer.

        Args:
            layer: as `why_not` takes it; left as it is.
            norm: what directly follows, and is folded into the numbers and the bias: worked out in float64, rounded
                once.
            names: of that norm and of the ReLU that follows and is computed here too; "" = there is none.

        Raises:
            UnsupportedError: the layer is of a kind that is not computed.
        """
        problem = why_not(layer)
        if problem:
            raise UnsupportedError("this convolution cannot be packed", why=problem)
        weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach().clone()
        if norm is not None:
            weight, bias = folded(layer, norm)
        record = ConvolutionRecord(
            format=PLANES, shape=list(weight.shape), stride=list(layer.stride), padding=_padding(layer),
            bias=bias is not None, norm=names[0], relu=names[1],
        )  # fmt: skip
        made = cls(record, record.pack(weight) | ({} if bias is None else {"bias": bias}))
        return made.train(layer.training)

    def record(self) -> ConvolutionRecord:
        """What a file says of it."""
        return ConvolutionRecord(
            format=PLANES, shape=self.shape, stride=self.stride, padding=self.padding, bias=self.bias is not None,
            norm=self.norm, relu=self.relu,
        )  # fmt: skip

    def absorbed(self) -> dict[str, nn.Module]:
        """The norm, whose numbers are gone, and the ReLU."""
        found = {self.norm: nn.Identity(), self.relu: nn.ReLU()}
        return {name: module for name, module in found.items() if name}

    def check(self) -> None:
        """Refuse tensors that packing cannot have written: the kernel follows them without looking.

        Raises:
            InputError: they are damaged.
        """
        values, columns, starts, bias = self.values, self.columns, self.starts, self.bias
        inputs = self.shape[1] * self.shape[2] * self.shape[3]
        whole = values.is_floating_point() and (columns.dtype, starts.dtype) == (torch.int32, torch.int64)
        whole = whole and all(part.dim() == 1 and part.is_contiguous() for part in (values, columns, starts))
        whole = whole and values.shape == columns.shape and len(starts) == self.shape[0] + 1
        whole = whole and int(starts[0]) == 0 and int(starts[-1]) == len(values) and bool((starts.diff() >= 0).all())
        whole = whole and not bool(((columns < 0) | (columns >= inputs)).any()) and bool((values != 0).all())
        if whole:  # each place once and in order: what is there twice would count twice here, and once in a dense layer
            places = torch.repeat_interleave(starts.diff()) * inputs + columns
            whole = bool((places.diff() > 0).all())
        if whole and bias is not None:
            whole = bias.is_floating_point() and bias.is_contiguous() and bias.shape == (self.shape[0],)
        if not whole:
            raise InputError("the tensors of a packed convolution are damaged", hint="get the file again")

    def forward(self, x: Tensor) -> Tensor:
        """The convolution, in float32."""
        own = self._buffers
        found: Tensor = torch.ops.secateur.packed_convolution(
            x, own["values"], own["columns"], own["starts"], own["bias"], self.shape, self.stride, self.padding,
            bool(self.relu),
        )  # fmt: skip
        return found

    @property
    def weight(self) -> Tensor:
        """The kernel, put together anew each time."""
        return _dense(self.values, self.columns, self.starts, self.shape)

    @property
    def unpacked(self) -> Tensor:
        """The kernel: nothing is scaled."""
        return self.weight

    def densify(self) -> nn.Conv2d:
        """An ordinary layer with the same weights, bit for bit; a ReLU is put back by `densify` of the model."""
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
        with_ = "".join(f", {word}={name!r}" for word, name in (("norm", self.norm), ("relu", self.relu)) if name)
        return f"shape={self.shape}, stride={self.stride}, padding={self.padding}, numbers={len(self.values)}{with_}"


def why_not(layer: nn.Conv2d) -> str:
    """Why a convolution cannot be packed, in words; "" where it can."""
    if layer.groups != 1:
        return "its channels are in groups"
    if _differs(layer):
        return "it is dilated, or padded by other than a number of zeros"
    if layer.weight.dtype != torch.float32 or layer.weight.device.type != "cpu":
        return "its weight is not of float32 on the CPU"
    return ""


def folded(layer: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that does what layer and norm do: (weight, bias), float32.

    The norm gives ``(y - mean) / sqrt(var + eps) * gamma + beta``, channel by channel. All of it is worked out in
    float64 and rounded once.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale, shift = (norm.running_var.detach().double() + norm.eps).rsqrt(), -norm.running_mean.detach().double()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    if layer.bias is not None:
        shift = shift + layer.bias.detach().double()
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    weight = layer.weight.detach()
    return (weight.double() * scale.view(-1, 1, 1, 1)).to(weight.dtype), shift.to(weight.dtype)


def _differs(layer: nn.Conv2d) -> bool:
    return tuple(layer.dilation) != (1, 1) or layer.padding_mode != "zeros" or layer.padding == "same"


def _padding(layer: nn.Conv2d) -> list[int]:
    return [0, 0] if isinstance(layer.padding, str) else [int(each) for each in layer.padding]


def _width(norm: nn.Module | None) -> int:
    """Channels that a norm has statistics of."""
    mean = getattr(norm, "running_mean", None)
    return len(mean) if isinstance(mean, Tensor) else -1


def _pack(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    flat = weight.flatten(1)
    there = flat != 0
    return flat[there].clone(), there.nonzero()[:, 1].int(), functional.pad(there.sum(1).cumsum(0), (1, 0))


def _convolution(
    x: Tensor, values: Tensor, columns: Tensor, starts: Tensor, bias: Tensor | None,
    shape: list[int], stride: list[int], padding: list[int], relu: bool = False,
) -> Tensor:  # fmt: skip
    if x.dim() != 4 or x.shape[1] != shape[1]:
        raise InputError(f"the convolution takes (images, {shape[1]}, height, width), not {tuple(x.shape)}")
    plain = all(each is None or each.dtype == torch.float32 for each in (x, values, bias))
    if not plain or native.isa() == native.WITHOUT:
        weight = _dense(values, columns, starts, shape).to(x.dtype)
        dense = functional.conv2d(x, weight, None if bias is None else bias.to(x.dtype), stride, padding)
        return functional.relu_(dense) if relu else dense
    height, width = _output_size(x, shape, stride, padding)
    y = x.new_empty(x.shape[0], shape[0], height, width)
    some = max(1, AT_ONCE // max(1, x[:1].numel()))
    for images, found in zip(torch.split(x, some), torch.split(y, some), strict=True):
        laid, across = _planes(images, shape, stride, padding)
        whole = found if across == width else x.new_empty(len(images), shape[0], height, across)
        # The last row of an output ends with its last pixel: nothing behind the planes is read.
        pixels = (height - 1) * across + width
        table = _table(shape[1], shape[2], shape[3], stride[0], stride[1], laid.shape[-2], laid.shape[-1])
        native.convolution(laid.flatten(1), values, columns, starts, table, bias, pixels, whole, relu=relu)
        if whole is not found:
            found.copy_(whole[..., :width])
    return y


def _planes(x: Tensor, shape: list[int], stride: list[int], padding: list[int]) -> tuple[Tensor, int]:
    """The input with its padding, and with a plane of its own for every step of the stride; and the planes' width."""
    (down, right), (_, _, tall, wide) = stride, shape
    if tall == wide == 1:
        # One pixel of every few is read, so the others are left out first.
        x = _pad(x, (padding[1],) * 2 + (padding[0],) * 2)[..., ::down, ::right].contiguous()
        return x.unsqueeze(1), x.shape[-1]
    below, behind = (-(x.shape[-2] + 2 * padding[0]) % down, -(x.shape[-1] + 2 * padding[1]) % right)
    x = _pad(x, (padding[1], padding[1] + behind, padding[0], padding[0] + below))
    images, channels, rows, columns = x.shape
    parts = x.reshape(images, channels, rows // down, down, columns // right, right)
    parts = parts.permute(0, 3, 5, 1, 2, 4).contiguous()
    return parts.flatten(1, 2), parts.shape[-1]


def _pad(x: Tensor, sides: tuple[int, ...]) -> Tensor:
    # PyTorch copies what it pads by nothing.
    return functional.pad(x, sides) if any(sides) else x


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
    weight[torch.repeat_interleave(starts.diff()), columns.long()] = values
    return weight.view(shape)


def _shape(
    x: Tensor, values: Tensor, columns: Tensor, starts: Tensor, bias: Tensor | None,
    shape: list[int], stride: list[int], padding: list[int], relu: bool = False,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], shape[0], *_output_size(x, shape, stride, padding))


_LIBRARY.impl("packed_convolution", _convolution, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("secateur::packed_convolution", _shape, lib=_LIBRARY)
