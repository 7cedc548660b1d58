"""Multiply-accumulates of one forward pass, counted on the operations that really run.

Counted: matrix products, convolutions, attention, recurrent layers, bilinear forms. Not counted: biases,
norms, activations, pooling, embeddings. The number is FLOPs / 2 of ``torch.utils.flop_counter``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from secateur.model.call import call, device_of, evaluating, to_device
from secateur.types import Example

Shape = Sequence[int]


def macs(model: nn.Module, example: Example) -> int:
    """Multiply-accumulates of one forward pass on the example, the whole batch of it.

    The forward runs once in eval mode without gradients; modes, buffers and random state are as before. It
    counts operations, which is not time: use `latency` to know whether a model is faster.

    Args:
        model: any module.
        example: what `secateur.model.call.call` takes; moved to the model's device.

    Returns:
        Multiply-accumulates (FLOPs / 2); 0 where no counted operation runs.

    Raises:
        ForwardError: the forward fails on the example.

    Cost: one forward pass, slower than usual as attention and recurrent layers run unfused.

    Example:
        >>> macs(nn.Linear(3, 4), torch.zeros(2, 3))
        24
    """
    return count(model, example)[0]


def macs_by_module(model: nn.Module, example: Example) -> dict[str, int]:
    """Multiply-accumulates per module name, children included; "" is the whole model.

    Args:
        model: any module.
        example: as for `macs`.

    Returns:
        Name as in ``named_modules()`` -> multiply-accumulates, for every module in which something counted
        ran.

    Raises:
        ForwardError: the forward fails on the example.

    Cost: as `macs`.

    Example:
        >>> macs_by_module(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)), torch.zeros(1, 3))
        {'': 32, '0': 12, '1': 20}
    """
    total, counter, _ = count(model, example)
    result = {"": total}
    for path, operations in counter.get_flop_counts().items():
        # Paths begin with the class of the whole model, names in `named_modules` do not.
        _, dot, name = path.partition(".")
        if dot:
            result[name] = sum(operations.values()) // 2
    return dict(sorted(result.items()))


def count(model: nn.Module, example: Example) -> tuple[int, FlopCounterMode, object]:
    """Count one forward pass: multiply-accumulates, the counter, and what the forward returned."""
    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    with evaluating(model), _unfused(), counter:
        output = call(model, to_device(example, device_of(model)))
    # The counter counts a multiplication and an addition as two.
    return counter.get_total_flops() // 2, counter, output


@contextmanager
def _unfused() -> Iterator[None]:
    # The fused attention kernels have no formula in flop_counter on the CPU: they would count as zero.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _formulas() -> dict[object, Callable[..., int]]:
    """FLOPs of operations for which flop_counter has no formula; the arguments are shapes."""
    aten = torch.ops.aten
    formulas: dict[object, Callable[..., int]] = {
        # Without these two a model that calls them with vectors would cost less than with a batch of one.
        aten.mv: lambda matrix, vector, **_: 2 * matrix[0] * matrix[1],
        aten.dot: lambda left, right, **_: 2 * left[0],
        aten._trilinear: _trilinear_flops,
        aten.mkldnn_rnn_layer: _mkldnn_rnn_flops,
        aten._cudnn_rnn: _cudnn_rnn_flops,
    }
    # Grouped products of fused experts came with a later torch than the oldest that is supported.
    if hasattr(aten, "_grouped_mm"):
        formulas[aten._grouped_mm] = _grouped_mm_flops
    return formulas


def _trilinear_flops(a: Shape, b: Shape, c: Shape, ea: Shape, eb: Shape, ec: Shape, *_: object, **__: object) -> int:
    # ea, eb and ec say which dimensions of the common product each operand lacks.
    total = len(a) + len(ea)
    sizes = [1] * total
    for shape, expanded in ((a, ea), (b, eb), (c, ec)):
        kept = iter(shape)
        for dim in range(total):
            if dim not in expanded:
                sizes[dim] = max(sizes[dim], next(kept))
    return 2 * int(torch.Size(sizes).numel())


def _mkldnn_rnn_flops(x: Shape, w_input: Shape, w_hidden: Shape, *_: object, **__: object) -> int:
    # One layer and direction per call; both matrices are used once per step and sample.
    return 2 * int(x[0] * x[1] * (torch.Size(w_input).numel() + torch.Size(w_hidden).numel()))


def _cudnn_rnn_flops(x: Shape, weights: Sequence[Shape], *_: object, **__: object) -> int:
    # All layers and directions in one call; the biases among the weights have one dimension.
    matrices = sum(int(torch.Size(weight).numel()) for weight in weights if len(weight) == 2)
    return 2 * int(torch.Size(x[:-1]).numel()) * matrices


def _grouped_mm_flops(a: Shape, b: Shape, *_: object, **__: object) -> int:
    # Where one side is flat its rows are shared out among the groups, so every row meets one matrix only.
    batch = a[0] if len(a) == 3 and len(b) == 3 else 1
    return 2 * int(batch * a[-2] * a[-1] * b[-1])
