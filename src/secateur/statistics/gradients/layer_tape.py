"""Per-sample gradients read off a batch: from what goes into a layer and the slope in what comes out.

One forward and one backward pass serve the whole batch, and nothing per-sample is computed before the last
product: for convolutions on a CPU this is several times faster than any other way. It holds for layers that
are called once, with the samples in the first dimension; whether that is so cannot be read off the modules
(a forward may flatten, permute or reuse), so callers compare a few samples with a backward pass of their own.

Legend: B samples, K slopes per sample, P positions, G groups of a convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm)
HANDLED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.LayerNorm, *NORMS)


class LayerTape:
    """Inputs and outputs of the layers that own some parameters, for one forward pass at a time.

    Args:
        model: any module.
        names: parameters of interest; those of other layers than the handled ones (Linear, Conv1d, Conv2d,
            LayerNorm, GroupNorm, batch norm in eval mode) or with several owners are not `covered`.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.model = model
        wanted = set(names)
        by_id = {id(p): name for name, p in model.named_parameters() if name in wanted}
        owners: dict[str, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for slot, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in by_id:
                    owners.setdefault(by_id[id(parameter)], []).append((module, slot))
        self.owner = {
            name: found[0]
            for name, found in owners.items()
            if len(found) == 1 and type(found[0][0]) in HANDLED and found[0][1] in ("weight", "bias")
        }
        self._modules = {id(module): module for module, _ in self.owner.values()}
        self._inputs: dict[int, tuple[Tensor, int]] = {}
        self._outputs: dict[int, Tensor] = {}
        self._repeated: set[int] = set()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the forward pass made inside; what was recorded before is forgotten."""
        self._inputs, self._outputs, self._repeated = {}, {}, set()
        handles = [module.register_forward_hook(self._record) for module in self._modules.values()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _record(self, module: nn.Module, args: tuple[Any, ...], output: object) -> Tensor | None:
        normalises_batch = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
        if id(module) in self._inputs or normalises_batch or not args or not isinstance(output, Tensor):
            self._repeated.add(id(module))
            return None
        self._inputs[id(module)] = (args[0].detach(), args[0]._version)
        self._outputs[id(module)] = output
        return output.clone()  # a later in-place activation must not change what the slope is taken in

    def covered(self, size: int) -> list[str]:
        """Parameters whose gradients can be read off the recorded pass of a batch of this size."""
        return [name for name, (module, _) in self.owner.items() if self._usable(module, size)]

    def _usable(self, module: nn.Module, size: int) -> bool:
        if id(module) in self._repeated or id(module) not in self._inputs:
            return False
        x, version = self._inputs[id(module)]
        output = self._outputs[id(module)]
        deep = 4 if isinstance(module, nn.Conv2d) else 3 if isinstance(module, nn.Conv1d) else 2
        return x._version == version and x.dim() >= deep and output.requires_grad and output.shape[0] == size

    def outputs(self, names: Iterable[str]) -> list[Tensor]:
        """Outputs of the layers that own some parameters, each once."""
        return [self._outputs[key] for key in self._keys(names)]

    def _keys(self, names: Iterable[str]) -> list[int]:
        return list(dict.fromkeys(id(self.owner[name][0]) for name in names))

    def input(self, name: str) -> Tensor:
        """What went into the layer that owns a parameter."""
        return self._inputs[id(self.owner[name][0])][0]

    def gradients(
        self, names: Iterable[str], slopes: Iterable[Tensor | None]
    ) -> Iterator[tuple[str, Callable[[slice], Tensor]]]:
        """Per-sample gradients, formed when they are asked for.

        Args:
            names: covered parameters.
            slopes: in the order of `outputs(names)`, [B, K, *output shape without the sample].

        Yields:
            Name, and a function from a slice of samples to their gradients [b, K, *shape].
        """
        names = list(names)
        by_key = dict(zip(self._keys(names), slopes, strict=True))
        for name in names:
            module, slot = self.owner[name]
            slope = by_key[id(module)]
            if slope is not None:
                yield name, _reader(module, slot, self._inputs[id(module)][0], slope)


def _reader(module: nn.Module, slot: str, x: Tensor, slope: Tensor) -> Callable[[slice], Tensor]:
    def read(some: slice) -> Tensor:
        return bias_gradient(module, slope[some]) if slot == "bias" else weight_gradient(module, x[some], slope[some])

    return read


def bias_gradient(module: nn.Module, slope: Tensor) -> Tensor:
    """[B, K, ...] -> [B, K, *bias]: the sum over positions."""
    if isinstance(module, nn.LayerNorm):
        return slope.flatten(2, -1 - len(module.normalized_shape)).sum(2) if _between(module, slope) else slope
    channel = slope.dim() - 1 if isinstance(module, nn.Linear) else 2
    return slope.sum([d for d in range(2, slope.dim()) if d != channel]) if slope.dim() > 3 else slope


def _between(module: nn.LayerNorm, slope: Tensor) -> bool:
    """Whether there are positions between the sample and the normalised dimensions."""
    return slope.dim() > 2 + len(module.normalized_shape)


def weight_gradient(module: nn.Module, x: Tensor, slope: Tensor) -> Tensor:
    """Input [B, ...] and slopes [B, K, ...] -> [B, K, *weight]."""
    if isinstance(module, nn.Linear):
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
        flat = slope.reshape(*slope.shape[:2], -1, slope.shape[-1])
        return torch.einsum("bkpo,bpi->bkoi", flat, rows)
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        patches = unfolded(module, x)
        groups = module.groups
        flat = slope.reshape(*slope.shape[:2], groups, module.out_channels // groups, -1)
        found = torch.einsum("bkgop,bgjp->bkgoj", flat, patches)
        return found.reshape(*slope.shape[:2], *module.weight.shape)
    return bias_gradient(module, slope * normalised(module, x).unsqueeze(1))


def unfolded(module: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """Patches that a convolution sees: [B, G, inputs per group x kernel, P]."""
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    if isinstance(module, nn.Conv1d):
        x, kernel, stride, dilation = x.unsqueeze(2), (1, *kernel), (1, *stride), (1, *dilation)
    patches = functional.unfold(x, kernel, dilation=dilation, stride=stride)
    return patches.reshape(x.shape[0], module.groups, -1, patches.shape[-1])


def normalised(module: nn.Module, x: Tensor) -> Tensor:
    """What a norm multiplies by its weight."""
    if isinstance(module, nn.LayerNorm):
        return functional.layer_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return functional.group_norm(x, module.num_groups, eps=module.eps)
    return functional.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)  # type: ignore[arg-type]
