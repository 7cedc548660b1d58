"""A linear layer whose weight is packed: ordinary buffers, one operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from secateur.deployment.convolution import SparseConv2d
from secateur.deployment.formats import format_of
from secateur.deployment.operators import packed_linear, unpacked
from secateur.errors import InputError, RecipeError

MOST = 127  # the largest whole number of eight bits with a sign that has its negative


class SparseLinear(nn.Module):
    """``y = x W^T + bias`` with W in one of the formats. Made by `SparseLinear.of`, not trained.

    What is stored are ordinary buffers, named as the format names its parts, with ``scale`` and ``bias`` where there
    are some. So `state_dict`, `copy.deepcopy`, safetensors, `torch.compile` and `torch.export` treat it as any other.

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
        self.register_load_state_dict_post_hook(_check_loaded)  # type: ignore[no-untyped-call]

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

    def size_bytes(self) -> int:
        """Bytes of everything that is stored."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format}, " + (
            f"dtype={str(self.parts[0].dtype).removeprefix('torch.')}"
        )


def _check_loaded(module: nn.Module, keys: object) -> None:
    assert isinstance(module, SparseLinear)
    module.check()


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers from -127 to 127 and one factor per row, so that their product is near the weight.

    Example:
        >>> quantize(torch.tensor([[1.0, -2.0, 0.0]]))[0]
        tensor([[  64, -127,    0]], dtype=torch.int8)
    """
    scale = weight.float().abs().amax(1) / MOST if weight.shape[1] else weight.new_ones(len(weight)).float()
    scale = torch.where(scale > 0, scale, 1.0)
    return (weight.float() / scale.unsqueeze(1)).round().clamp(-MOST, MOST).to(torch.int8), scale


def densify(model: nn.Module) -> nn.Module:
    """Make every packed layer of a model an ordinary one again, in place.

    Returns:
        the model.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, SparseLinear | SparseConv2d):
                setattr(parent, name, child.densify())
    return model.densify() if isinstance(model, SparseLinear | SparseConv2d) else model
