"""What a network costs after a cut, from the trace alone: no model is built to price a plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod

from torch import nn

from secateur.model.tensors import named_tensors
from secateur.structure.axes import size_after
from secateur.structure.trace import Trace


class CostModel:
    """Multiply-accumulates and parameters as functions of how many indices every atom keeps.

    Args:
        model: the captured model.
        trace: its trace.
    """

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self.products = Counter(axes for step in trace.steps for axes in step.cost)
        named = dict(model.named_parameters())
        tensors = trace.tensors()
        whole = named_tensors(model)
        self.fixed = sum(p.numel() for name, p in named.items() if name not in tensors)
        self.fixed_bytes = sum(t.numel() * t.element_size() for name, t in whole.items() if name not in tensors)
        self.parameters = [axes for name, axes in tensors.items() if name in named]
        self.stored = [(axes, whole[name].element_size()) for name, axes in tensors.items()]

    def macs(self, counts: Mapping[int, int]) -> int:
        """Multiply-accumulates of one forward pass on the example."""
        return sum(times * prod(size_after(a, counts) for a in axes) for axes, times in self.products.items())

    def params(self, counts: Mapping[int, int]) -> int:
        """Number of parameters, tied ones once."""
        return self.fixed + sum(prod(size_after(a, counts) for a in axes) for axes in self.parameters)

    def bytes(self, counts: Mapping[int, int]) -> int:
        """Bytes of all parameters and buffers."""
        return self.fixed_bytes + sum(prod(size_after(a, counts) for a in axes) * width for axes, width in self.stored)
