"""Residual branches: which addition follows a layer, and what the cut changed on the other side of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.statistics.activations.observe import Flow, Site, argument
from secateur.structure.rules.base import base_name
from secateur.structure.trace import Ref, Step

_SAME = ("view", "_unsafe_view", "clone", "native_dropout", "alias", "detach", "contiguous")
_NORMS = ("native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit", "cudnn_batch_norm",
          "_batch_norm_no_update", "batch_norm")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Shortcut:
    """The other operand of the addition behind a layer.

    Args:
        original: where it is seen in the original.
        cut: where it is seen in the cut model.
        factor: what a change of it is worth at the layer's output: 1, or 1 / scale of the batch norm between;
            broadcasts to the outputs that are kept.
    """

    original: Site
    cut: Site
    factor: Tensor


def find_shortcut(
    flows: tuple[Flow, Flow], steps: tuple[int, int], outputs: Tensor | None, tensors: Mapping[str, Tensor]
) -> Shortcut | None:
    """The shortcut that the result of a layer is added to, if there is one.

    Args:
        flows: of the original and of the cut model.
        steps: the layer's call in both.
        outputs: kept outputs of the layer.
        tensors: parameters and buffers of the cut model.
    """
    before, after = _addition(flows[0], steps[0]), _addition(flows[1], steps[1])
    if before is None or after is None:
        return None
    ones = torch.ones((), dtype=torch.float64)
    scale = ones if after[2] is None else _scale(flows[1], after[2], tensors)
    usable = scale.abs() > 1e-6
    factor = torch.where(usable, 1 / torch.where(usable, scale, 1.0), 0.0)
    kept = "" if outputs is None else "kept"
    return Shortcut(Site(before[0], before[1], 0, weight=kept), Site(after[0], after[1], 0, weight=kept), factor)


def _addition(flow: Flow, start: int) -> tuple[int, int, Step | None] | None:
    """(step, number of the other operand, batch norm in between) of the addition that a layer's result goes to."""
    steps = flow.trace.steps
    number, norm = steps[start].outputs[0], None
    for i in range(start + 1, len(steps)):
        step = steps[i]
        if number not in flow.read(step):
            continue
        kind, first = base_name(step.func), step.args[0] if step.args else None
        if kind == "add":
            return _other(flow, i, number, norm)
        if not isinstance(first, Ref) or first.number != number or not step.outputs:
            return None
        if kind in _NORMS and norm is None:
            norm = step
        elif kind not in _SAME or _last_size(flow, step.outputs[0]) != _last_size(flow, number):
            return None
        number = step.outputs[0]
    return None


def _other(flow: Flow, i: int, number: int, norm: Step | None) -> tuple[int, int, Step | None] | None:
    step = flow.trace.steps[i]
    operands = [a.number for a in step.args[:2] if isinstance(a, Ref)]
    others = [n for n in operands if n != number]
    if len(operands) != 2 or len(others) != 1 or argument(step, "alpha", 1) != 1:
        return None
    same = [a.size for a in flow.trace.axes[others[0]]] == [a.size for a in flow.trace.axes[number]]
    return (i, others[0], norm) if others[0] in flow.activations and same else None


def _last_size(flow: Flow, number: int) -> int:
    axes = flow.trace.axes[number]
    return axes[-1].size if axes else 1


def _scale(flow: Flow, norm: Step, tensors: Mapping[str, Tensor]) -> Tensor:
    """Factor of a channel, gamma / sqrt(var + eps), of a batch norm in eval mode."""

    def tensor(name: str) -> Tensor | None:
        value = argument(norm, name)
        return tensors.get(flow.source(value.number)[0]) if isinstance(value, Ref) else None

    variance, gamma = tensor("running_var"), tensor("weight")
    eps = argument(norm, "eps", argument(norm, "epsilon", 1e-5))
    if variance is None:
        return torch.zeros((), dtype=torch.float64)
    scale: Tensor = 1 / (variance.detach().double() + eps).sqrt()
    return scale if gamma is None else scale * gamma.detach().double()
