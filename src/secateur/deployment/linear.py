"""A linear layer whose weight is packed: ordinary buffers, one operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from secateur.deployment.formats import format_of
from secateur.deployment.operators import packed_linear, unpacked
from secateur.deployment.packed import PackedLayer, PackedRecord
from secateur.errors import InputError, PlanMismatchError, RecipeError

MOST = 127  # the largest whole number of eight bits with a sign that has its negative


class LinearRecord(PackedRecord):
    """What a file says of a packed linear layer.

    Args:
        rows: outputs.
        columns: inputs.
        scale: whether its weights are whole numbers with a factor per row.
        bias: whether it has one.
    """

    rows: int
    columns: int
    scale: bool
    bias: bool

    @property
    def parts(self) -> tuple[str, ...]:
        """Those of the format."""
        return format_of(self.format).parts

    @property
    def beside(self) -> tuple[str, ...]:
        """Scale and bias, where there are some."""
        return tuple(word for word in ("scale", "bias") if getattr(self, word))

    def require(self, model: nn.Module, name: str) -> None:
        """Refuse a place without a linear layer of this shape."""
        place = model.get_submodule(name)
        if type(place) is not nn.Linear or (place.out_features, place.in_features) != (self.rows, self.columns):
            raise PlanMismatchError(f"The layer {name!a} is no linear layer of {self.rows} x {self.columns}.")
        if (place.bias is not None) != self.bias:
            raise PlanMismatchError(f"The layer {name!a} has {'no' if self.bias else 'a'} bias in the model.")

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """In the format that the layer runs in."""
        layout = format_of(self.format)
        return dict(zip(layout.parts, layout.pack(weight), strict=True))

    def build(self, tensors: Mapping[str, Tensor]) -> SparseLinear:
        """The layer."""
        parts = [tensors[part] for part in self.parts]
        return SparseLinear(self.format, self.rows, self.columns, parts, tensors.get("scale"), tensors.get("bias"))


class SparseLinear(PackedLayer):
    """``y = x W^T + bias`` with W in one of the formats. Made by `SparseLinear.of`, not trained.

    What is stored are ordinary buffers, named as the format names its parts, with ``scale`` and ``bias`` where there
    are some.

    Args:
        format: name of the format.
        rows: outputs.
        columns: inputs.
        parts: what the format packed.
        scale: one factor per row for weights of whole numbers.
        bias: (rows,).

    Raises:
        InputError: the parts are not what the format writes.
    """

    scale: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        format: str,
        rows: int,
        columns: int,
        parts: Sequence[Tensor],
        scale: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.format, self.out_features, self.in_features = format, rows, columns
        layout = format_of(format)
        self._names = layout.parts
        if len(parts) != len(self._names):
            raise InputError(f"the format {format!r} has the parts {', '.join(self._names)}, not {len(parts)}")
        for name, part in zip(self._names, parts, strict=True):
            self.register_buffer(name, part)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    @classmethod
    def of(cls, layer: nn.Linear, format: str, dtype: torch.dtype | None = None) -> SparseLinear:
        """The packed form of a layer.

        Args:
            layer: a linear layer on the CPU; left as it is.
            format: name of the format.
            dtype: of the packed weights; None = that of the layer, and then nothing is rounded (-0.0 becomes 0.0, so
                that products with a mask leave no numbers to store). `torch.int8` rounds to 8 bits, a scale per row.

        Raises:
            RecipeError: unknown format or dtype.
            InputError: the weights do not fit into the format.
        """
        weight = layer.weight.detach()
        weight = weight.masked_fill(weight == 0, 0)
        scale = None
        if dtype == torch.int8:
            weight, scale = quantize(weight)
        elif dtype is not None and not dtype.is_floating_point:
            raise RecipeError(f"weights cannot be packed as {dtype}", hint="float32, bfloat16 or int8")
        else:
            weight = weight.to(dtype or weight.dtype)
        bias = None if layer.bias is None else layer.bias.detach().clone()
        rows, columns = weight.shape
        return cls(format, rows, columns, format_of(format).pack(weight), scale, bias)

    @property
    def parts(self) -> list[Tensor]:
        """The tensors that hold the weight, in the order of the format."""
        own = self._buffers  # asked directly: the attribute of a module costs as much as a small product
        return [part for name in self._names if (part := own[name]) is not None]

    @property
    def weight(self) -> Tensor:
        """The matrix, unpacked anew each time: for code that looks at it."""
        return unpacked(self.parts, self.scale, self.format, self.out_features, self.in_features)

    @property
    def unpacked(self) -> Tensor:
        """The matrix without its scale."""
        return format_of(self.format).unpack(self.parts, self.out_features, self.in_features)

    def record(self) -> LinearRecord:
        """What a file says of it."""
        return LinearRecord(
            format=self.format, rows=self.out_features, columns=self.in_features, scale=self.scale is not None,
            bias=self.bias is not None,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """The product; sums are of float32, the output has the dtype of x."""
        own = self._buffers
        return packed_linear(x, self.parts, own["scale"], own["bias"], self.format, self.out_features, self.in_features)

    def densify(self) -> nn.Linear:
        """An ordinary layer with the same weights, bit for bit (in float32 where they have a scale)."""
        weight = self.weight
        dense = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        dense.weight = nn.Parameter(weight)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.to(weight.dtype, copy=True))
        return dense.train(self.training)

    def check(self) -> None:
        """Refuse parts that the format cannot have written.

        Raises:
            InputError: names what is damaged.
        """
        format_of(self.format).check(self.parts, self.out_features, self.in_features)
        for name in ("scale", "bias"):
            found = getattr(self, name)
            if found is not None and found.shape != (self.out_features,):
                raise InputError(f"the {name} has the shape {tuple(found.shape)}, not ({self.out_features},)")

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format}, " + (
            f"dtype={str(self.parts[0].dtype).removeprefix('torch.')}"
        )


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers from -127 to 127 and one factor per row, so that their product is near the weight.

    Example:
        >>> quantize(torch.tensor([[1.0, -2.0, 0.0]]))[0]
        tensor([[  64, -127,    0]], dtype=torch.int8)
    """
    scale = weight.float().abs().amax(1) / MOST if weight.shape[1] else weight.new_ones(len(weight)).float()
    scale = torch.where(scale > 0, scale, 1.0)
    return (weight.float() / scale.unsqueeze(1)).round().clamp(-MOST, MOST).to(torch.int8), scale
