"""Multiply-accumulates of one forward pass, counted on the operations that really run, for one sample.

Counted: matrix products, convolutions, attention, recurrent layers, bilinear forms. Not counted: biases,
norms, activations, pooling, embeddings. The number is FLOPs / 2 of ``torch.utils.flop_counter``.

A count belongs to its batch, and batches come as the user's loader makes them: the same network would have 64 times
the work with one loader and once with another. So every figure is divided by the samples of the example, wherever
its leading dimension holds samples (`samples_in` decides, and says how); ratios are as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from secateur.errors import SecateurError
from secateur.model.call import call, device_of, outputs, to_device
from secateur.model.guard import evaluating
from secateur.model.kernels import uncompiled, unfused_attention
from secateur.model.samples import batch_size_of, pick_sample
from secateur.model.written import weights_kept
from secateur.types import Example

Shape = Sequence[int]
# Kernels round differently for other batch sizes (TF32 and half precision most); a step of a recurrence, or a row
# of an attention, that lost its neighbours differs by far more.
ROUNDING = 5e-3
WHOLE = "Global"  # the counter's name for everything


@dataclass(frozen=True, eq=False)
class Operations:
    """The operations of one forward pass on a whole example.

    Args:
        total: multiply-accumulates (FLOPs / 2).
        modules: name as in ``named_modules()`` -> its multiply-accumulates, children included; "" is the whole model.
        output: what the forward returned.
    """

    total: int
    modules: Mapping[str, int]
    output: object


def macs(model: nn.Module, example: Example) -> int:
    """Multiply-accumulates of one forward pass for one sample.

    The forward runs in eval mode without gradients; modes, buffers and random state are as before. It
    counts operations, which is not time: use `latency` to know whether a model is faster.

    Args:
        model: any module.
        example: what `secateur.model.call.call` takes; moved to the model's device.

    Returns:
        Multiply-accumulates (FLOPs / 2) of the example divided by its samples; of the whole example where its leading
        dimension holds no samples (see `samples_in`); 0 where no counted operation runs.

    Raises:
        ForwardError: the forward fails on the example.

    Cost: one forward pass, and one on a single sample where the example holds several; slower than usual as
        attention and recurrent layers run unfused.

    Example:
        >>> macs(nn.Linear(3, 4), torch.zeros(2, 3))
        12
    """
    whole = count(model, example)
    return whole.total // samples_in(model, example, whole)


def macs_by_module(model: nn.Module, example: Example) -> dict[str, int]:
    """Multiply-accumulates per module name for one sample, children included; "" is the whole model.

    Args:
        model: any module.
        example: as for `macs`.

    Returns:
        Name as in ``named_modules()`` -> multiply-accumulates, for every module in which something counted
        ran; rounded down for a module that does not run for every sample (an expert of a mixture).

    Raises:
        ForwardError: the forward fails on the example.

    Cost: as `macs`.

    Example:
        >>> macs_by_module(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)), torch.zeros(1, 3))
        {'': 32, '0': 12, '1': 20}
    """
    whole = count(model, example)
    samples = samples_in(model, example, whole)
    return {name: number // samples for name, number in sorted(whole.modules.items())}


def samples_in(model: nn.Module, example: Example, whole: Operations | None = None) -> int:
    """How many samples an example holds; 1 where its leading dimension is none of samples.

    The leading dimension of the first tensor counts as samples where the model treats its entries one by one: the
    last entry alone takes exactly that share of the multiply-accumulates, and its output is that of the whole run up
    to rounding. Both are needed. Attention over the dimension costs more than its share; a recurrence over it costs
    its share and gives another output; work that does not depend on the input costs the same for one entry.

    Args:
        model: left as it is.
        example: what `secateur.model.call.call` takes.
        whole: the count on the whole example where it is there already.

    Returns:
        The size of the leading dimension, or 1: the example then counts as one sample.

    Raises:
        ForwardError: the forward fails on the example.

    Cost: none for a leading dimension of 1; else a forward pass on one sample, and one on the example where `whole`
        is left out.

    Example:
        >>> samples_in(nn.Linear(3, 4), torch.zeros(2, 3)), samples_in(nn.LSTM(3, 4), torch.zeros(5, 2, 3))
        (2, 1)
    """
    size = batch_size_of(example)
    if size <= 1:
        return 1
    whole = count(model, example) if whole is None else whole
    try:
        one = count(model, pick_sample(example, size - 1))
        same = _outputs_agree(outputs(whole.output), outputs(one.output), size)
    except SecateurError:
        # What cannot run on one entry alone (a vector, one image, a batch written into the code) has no samples.
        return 1
    return size if one.total * size == whole.total and same else 1


def _outputs_agree(whole: Sequence[Tensor], one: Sequence[Tensor], size: int) -> bool:
    """Whether the last of `size` equal parts of each output is what the last entry gives alone."""
    if len(whole) != len(one):
        return False
    parts = [(_last_part(long, short, size), short) for long, short in zip(whole, one, strict=True)]
    # What does not grow with the entries (an auxiliary loss, a table of positions) tells nothing of them.
    told = [(part, short) for part, short in parts if part is not None]
    return bool(told) and all(_close(part, short.reshape(part.shape)) for part, short in told)


def _last_part(whole: Tensor, one: Tensor, size: int) -> Tensor | None:
    """What the last entry gave within an output of all; None where the two shapes do not show it."""
    if whole.layout != torch.strided or one.layout != torch.strided:
        return None
    if whole.dim() == one.dim():
        # Found by its size and not by its place: the states of a recurrent layer have the samples second.
        grown = [d for d in range(whole.dim()) if whole.shape[d] != one.shape[d]]
        if len(grown) != 1 or whole.shape[grown[0]] != size * one.shape[grown[0]]:
            return None
        length = one.shape[grown[0]]
        return whole.narrow(grown[0], whole.shape[grown[0]] - length, length)
    # Many a forward squeezes a batch of one away.
    if whole.dim() and whole.shape[0] == size and one.numel() * size == whole.numel():
        return whole[-1]
    return None


def _close(a: Tensor, b: Tensor) -> bool:
    # A model without numbers (on the meta device) can be judged by its shapes and counts alone.
    if a.is_meta:
        return True
    if not a.is_floating_point():
        return torch.equal(a, b)
    share = max(ROUNDING, 4 * torch.finfo(a.dtype).eps)
    a, b = a.double(), b.double()
    # Relative to the largest output: a small one beside large ones carries their rounding.
    return torch.allclose(
        a, b, rtol=0, atol=share * float(a.nan_to_num(0, 0, 0).abs().max()) if a.numel() else 0, equal_nan=True
    )


def count(model: nn.Module, example: Example) -> Operations:
    """Operations one forward pass on the whole example.

    Raises:
        ForwardError: the forward fails on the example.
        UnsupportedError: the forward writes to its own weights.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    counter.mod_tracker = _Running(model)
    # The fused attention kernels have no formula in flop_counter on the CPU: they would count as zero.
    with (
        evaluating(model, example=example),
        weights_kept(model),
        unfused_attention(),
        uncompiled(),
        sdpa_kernel(SDPBackend.MATH),
        counter,
    ):
        output = call(model, to_device(example, device_of(model)))
    total = counter.get_total_flops() // 2  # the counter counts a multiplication and an addition as two
    modules = {"": total}
    for path, operations in counter.get_flop_counts().items():
        if path not in ("", WHOLE):
            modules[path] = sum(operations.values()) // 2
    return Operations(total, modules, output)


class _Running(ModuleTracker):
    """Names of the modules that run. Torch's own asks the history of what wants gradients, which a forward may not let.

    Args:
        model: whose modules are followed.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {id(module): name for name, module in model.named_modules()}
        self._inside: list[str] = []

    def _fw_pre_hook(self, mod: nn.Module, _: object) -> None:
        self._inside.append(self._names.get(id(mod), ""))
        self.parents = {WHOLE, *self._inside}

    def _fw_post_hook(self, mod: nn.Module, _: object, __: object) -> None:
        name = self._names.get(id(mod), "")
        if name in self._inside:  # what was entered since has been left by an exception that the forward caught
            del self._inside[len(self._inside) - 1 - self._inside[::-1].index(name) :]
        self.parents = {WHOLE, *self._inside}


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
    # Younger than the oldest torch that is supported.
    if hasattr(aten, "_grouped_mm"):
        formulas[aten._grouped_mm] = _grouped_mm_flops
    return formulas


def _trilinear_flops(a: Shape, b: Shape, c: Shape, ea: Shape, eb: Shape, ec: Shape, *_: object, **__: object) -> int:
    # ea, eb and ec say which dimensions of the common product each operand lacks.
    total = len(a) + len(ea)
    sizes = [1] * total
    # Each factor lacks the dimensions over which it is expanded: line its own up with the rest.
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
    # Biases have one dimension, and are not counted anywhere.
    matrices = sum(int(torch.Size(weight).numel()) for weight in weights if len(weight) == 2)
    return 2 * int(torch.Size(x[:-1]).numel()) * matrices


def _grouped_mm_flops(a: Shape, b: Shape, *_: object, **__: object) -> int:
    # Two matrices in three dimensions are one product per group; else the groups share the rows among them.
    batch = a[0] if len(a) == 3 and len(b) == 3 else 1
    return 2 * int(batch * a[-2] * a[-1] * b[-1])
