"""Truths beside the engine: the original with what was removed set to zero, on the side of producers and of consumers.

Where something mixes over a cut dimension (norms, softmax, means) zeros are not absence: there the author of the case
says which method or module mixes, and it runs on the kept coordinates alone. Nothing here knows an operator rule.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Kept:
    """Which indices of a tensor's dimension stay, by the plan."""

    def __init__(self, model: nn.Module, plan: Any) -> None:
        self.model = model
        self.cuts: Mapping[str, Mapping[int, Any]] = plan.cuts
        self.groups: Mapping[str, Any] = plan.groups
        self.layers: Mapping[str, Any] = getattr(plan, "layers", {}) or {}
        self.sizes = {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()}

    def __call__(self, tensor: str, dim: int = 0) -> Tensor:
        found = self.cuts.get(tensor, {}).get(dim)
        return torch.arange(self.sizes[tensor][dim]) if found is None else torch.as_tensor(found).long()

    def cut(self, tensor: str, dim: int = 0) -> bool:
        return dim in self.cuts.get(tensor, {})

    def name_before(self, name: str) -> str:
        """The name, in the original, of a parameter of the cut model: blocks behind a removed one have moved up."""
        for path, entry in self.layers.items():
            if name.startswith(f"{path}."):
                number, _, rest = name[len(path) + 1 :].partition(".")
                stays = [i for i in range(len(self.model.get_submodule(path))) if i not in set(entry["removed"])]
                return f"{path}.{stays[int(number)]}.{rest}"
        return name

    def gone(self, tensor: str, dim: int = 0) -> Tensor:
        mask = torch.ones(self.sizes[tensor][dim], dtype=torch.bool)
        mask[self(tensor, dim)] = False
        return mask.nonzero().flatten()

    def of_group(self, name: str) -> Tensor:
        """Kept units of a group; all, where it was not cut."""
        group = self.groups[name]
        return torch.tensor([i for i in range(group["size"]) if i not in set(group["removed"])])


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under all their names, and tensors in plain attributes."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                found[f"{path}.{name}" if path else name] = value
    found.update(model.named_parameters(remove_duplicate=False))
    found.update(model.named_buffers(remove_duplicate=False))
    return found


def copied(model: nn.Module) -> nn.Module:
    """A copy, also of models that keep a computed weight in an attribute (the old weight norm)."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                object.__setattr__(module, name, value.detach())
    return copy.deepcopy(model)


def zeroed(model: nn.Module, kept: Kept) -> nn.Module:
    """A copy in which everything that the plan removes is zero, wherever it lives."""
    result = copied(model)
    tensors = tensors_of(result)
    with torch.no_grad():
        for name, dims in kept.cuts.items():
            for dim in dims if name in tensors else ():
                if tensors[name].is_floating_point():
                    tensors[name].index_fill_(dim, kept.gone(name, dim), 0.0)
    for path, module in list(result.named_modules()):
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)) and kept.cut(f"{path}.weight"):
            _replace(result, path, NormOfKept(module, kept(f"{path}.weight")))
    for path, entry in kept.layers.items():
        blocks = result.get_submodule(path)
        for index in entry["removed"]:
            blocks[index] = Pass()
    return result


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner) if owner else model, name, module)


class Pass(nn.Module):
    """Identity in the place of a block."""

    def forward(self, x: Any, *_: Any, **__: Any) -> Any:
        return x


class NormOfKept(nn.Module):
    """A norm over the kept coordinates; zeros where the removed ones were."""

    def __init__(self, norm: nn.Module, index: Tensor) -> None:
        super().__init__()
        self.inner_of_kept, self.index = norm, index

    def forward(self, x: Tensor) -> Tensor:
        norm, index = self.inner_of_kept, self.index
        weight, bias = norm.weight[index], None if getattr(norm, "bias", None) is None else norm.bias[index]
        if isinstance(norm, nn.GroupNorm):
            return self._groups(x, weight, bias)
        part = x[..., index]
        if isinstance(norm, nn.RMSNorm):
            part = F.rms_norm(part, part.shape[-1:], weight, norm.eps)
        else:
            part = F.layer_norm(part, part.shape[-1:], weight, bias, norm.eps)
        return torch.zeros_like(x).index_copy(-1, index, part)

    def _groups(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        norm = self.inner_of_kept
        size, y = norm.num_channels // norm.num_groups, torch.zeros_like(x)
        for group in range(norm.num_groups):
            here = (self.index // size == group).nonzero().flatten()
            if here.numel():
                index = self.index[here]
                part = F.group_norm(x[:, index], 1, weight[here], bias[here], norm.eps)
                y = y.index_copy(1, index, part)
        return y


def over(
    method: str, tensor: str, of: int = 0, dim: int | Sequence[int] = -1, out: int | None = -1, fill: float = 0.0
) -> Callable[[nn.Module, Kept], None]:
    """The truth of a method that mixes over a cut dimension: it sees the kept coordinates only.

    Args:
        method: name of a method, function or module on the model, with a path ("block.norm").
        tensor: whose dimension `of` says what is kept.
        dim: the mixed dimension of the argument, or one for each argument.
        out: the same dimension of the result, None where it is gone.
        fill: what stands in the removed places of the result.
    """

    def change(model: nn.Module, kept: Kept) -> None:
        index = kept(tensor, of)
        owner, _, name = method.rpartition(".")
        owner = model.get_submodule(owner) if owner else model
        inner, size = getattr(owner, name), kept.sizes[tensor][of]

        def outer(*arguments: Any, **options: Any) -> Any:
            dims = dim if isinstance(dim, Sequence) else [dim] * len(arguments)
            parts = [
                a.index_select(d, index) if isinstance(a, Tensor) else a for a, d in zip(arguments, dims, strict=False)
            ]
            result = inner(*parts, *arguments[len(parts) :], **options)
            return result if out is None else scatter(result, out, index, size, fill)

        put(owner, name, outer)

    return change


def put(owner: nn.Module, name: str, function: Callable[..., Any]) -> None:
    """A function in the place of a method or of a submodule."""
    inner = owner._modules.pop(name, None)
    if inner is None:
        object.__setattr__(owner, name, function)
    else:
        owner._modules[name] = Stand(inner, function)


class Stand(nn.Module):
    """A function in the place of a module, whose parameters stay known."""

    def __init__(self, inner: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.inner_of_kept, self.function = inner, function

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.function(*arguments, **options)


def scatter(part: Tensor, dim: int, index: Tensor, size: int, fill: float = 0.0) -> Tensor:
    shape = list(part.shape)
    shape[dim] = size
    return torch.full(shape, fill, dtype=part.dtype).index_copy(dim, index, part)


def effective(method: str, dims: Mapping[int, str] | None = None) -> Callable[[nn.Module, Kept], None]:
    """The truth of a computed weight: what the original computes, without the removed slices, whatever was cut inside.

    Args:
        method: of the model, without arguments; or the path of a layer, whose `weight` is computed.
        dims: dimension of the weight -> a tensor whose first dimension says what is kept there.
    """

    def change(model: nn.Module, kept: Kept) -> None:
        owner, _, name = method.rpartition(".")
        origin = copied(kept.model)
        source = getattr(origin.get_submodule(owner) if owner else origin, name)
        layer = isinstance(source, nn.Module)
        with torch.no_grad():
            for hook in source._forward_pre_hooks.values() if layer else ():
                hook(source, None)  # the old weight and spectral norm write `weight` there
            value = (source.weight if layer else source()).clone()
            for dim, tensor in (dims or {}).items():
                value.index_fill_(dim, kept.gone(tensor), 0.0)
        if not layer:
            put(model.get_submodule(owner) if owner else model, name, lambda: value)
            return
        bias = model.get_submodule(method).bias
        call = F.linear if value.dim() == 2 else lambda x, w, b: source._conv_forward(x, w, b)
        put(model.get_submodule(owner) if owner else model, name, lambda x: call(x, value, bias))

    return change


def plain(model: nn.Module, kept: Kept) -> None:
    """The zeroed original as it is."""


def every(*changes: Callable[[nn.Module, Kept], None]) -> Callable[[nn.Module, Kept], None]:
    """Several changes, one after the other."""

    def change(model: nn.Module, kept: Kept) -> None:
        for one in changes:
            one(model, kept)

    return change
