"""Linear layers whose weight PyTorch multiplies as 2:4: two numbers of four, by the sparse tensor cores of a GPU."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.sparse import SparseSemiStructuredTensor

from secateur.deployment.formats.base import padded
from secateur.deployment.packed import PackedLayer
from secateur.errors import InputError, UnsupportedError

SEMI = "2:4"  # the word for it in decisions
_MOST, _OF = 2, 4
_DTYPES = (torch.float16, torch.bfloat16)


def why_not(weight: Tensor) -> str:
    """Why a weight is none that PyTorch multiplies as 2:4, in words; "" where it may be: PyTorch has the last word.

    Weights of 8 bits are not among them: PyTorch would want inputs of 8 bits too, which would round them.
    """
    if weight.dtype not in _DTYPES:
        return f"{SEMI} products are of float16 or bfloat16, and the weight is of {_word(weight.dtype)}"
    groups = (padded(weight.detach(), 1, _OF) != 0).view(len(weight), -1, _OF).sum(-1)
    most = int(groups.amax()) if groups.numel() else 0
    return f"it is not {SEMI}: some four columns of a row hold {most} numbers" if most > _MOST else ""


class SemiStructuredLinear(PackedLayer):
    """``y = x W^T + bias`` with W as 2:4 tensor of PyTorch. Made by `SemiStructuredLinear.of`, on a GPU.

    Its buffers are those that PyTorch made, in a layout of the library that PyTorch was built with. That layout cannot
    be checked, so nothing is loaded into such a layer and it is not saved: deploy anew on the machine that runs it.

    Args:
        weight: what `torch.sparse.to_sparse_semi_structured` made.
        bias: (rows,), or None.
    """

    bias: Tensor | None

    def __init__(self, weight: SparseSemiStructuredTensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._kind = type(weight)
        self._names, self._context = weight.__tensor_flatten__()
        for name in self._names:
            self.register_buffer(name, getattr(weight, name))
        self.register_buffer("bias", bias)

    @classmethod
    def of(cls, layer: nn.Linear) -> SemiStructuredLinear:
        """The 2:4 form of a layer; nothing is rounded.

        Args:
            layer: on a GPU; left as it is.

        Raises:
            UnsupportedError: the weight is not 2:4, or PyTorch takes none of its dtype or shape on this GPU.
        """
        problem = why_not(layer.weight)
        weight = layer.weight.detach()
        try:
            made = None if problem else torch.sparse.to_sparse_semi_structured(weight.contiguous())
        except RuntimeError as error:
            problem = str(error)
        if problem or made is None:
            raise UnsupportedError(f"the layer has no {SEMI} form", why=problem)
        return cls(made, None if layer.bias is None else layer.bias.detach().clone()).train(layer.training)

    @property
    def _tensor(self) -> SparseSemiStructuredTensor:
        """The tensor around the buffers as they are now, wherever the model was moved."""
        parts = {name: self._buffers[name] for name in self._names}
        shape = torch.Size((self.out_features, self.in_features))
        made = self._kind.__tensor_unflatten__(parts, self._context, shape, (self.in_features, 1))
        assert isinstance(made, SparseSemiStructuredTensor)
        return made

    def forward(self, x: Tensor) -> Tensor:
        """The product; x has the dtype of the weight.

        Raises:
            InputError: x is not on a GPU.
        """
        if not x.is_cuda:
            raise InputError(
                f"a {SEMI} layer runs on a GPU, and its input is on {x.device}", hint="densify() it on the GPU first"
            )
        return functional.linear(x.contiguous(), self._tensor, self.bias)

    @property
    def weight(self) -> Tensor:
        """The matrix, put together anew each time."""
        dense: Tensor = self._tensor.to_dense()  # type: ignore[no-untyped-call]
        return dense

    @property
    def unpacked(self) -> Tensor:
        """The matrix: nothing is scaled."""
        return self.weight

    def densify(self) -> nn.Linear:
        """An ordinary layer with the same weights, where they are finite bit for bit."""
        dense = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        dense.weight = nn.Parameter(self.weight)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.clone())
        return dense.train(self.training)

    def record(self) -> NoReturn:
        """No file says anything of it.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            f"a layer in the {SEMI} form of PyTorch is not saved: its layout is of this GPU and its library",
            hint="save the pruned model and deploy it on the machine that runs it, or densify() this one first",
        )

    def check(self) -> NoReturn:
        """Refuse whatever was loaded.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            f"nothing can be loaded into a layer in the {SEMI} form of PyTorch: its layout cannot be checked",
            hint="load the weights into the dense model and deploy it anew",
        )

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {SEMI}"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
