"""One function that takes a model through all that a cut must survive; its truths do not come from the engine."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from secateur.kinds.slices.certify import certify
from secateur.kinds.slices.cut import cut_copy
from secateur.kinds.weights.granularity import STRUCTURAL
from secateur.model.call import call, outputs
from secateur.structure.attributes import edits
from secateur.structure.axes import kept
from secateur.structure.capture import capture, quiet
from secateur.structure.cost import CostModel
from secateur.structure.groups import Structure, structure
from secateur.types import Certificate, Group

STRUCTURED = tuple(kind for kind in STRUCTURAL if kind != "layer")
PRODUCERS = ("out", "bias", "scale", "state")


@dataclass(frozen=True)
class Expect:
    """What the author of a model would expect.

    Args:
        free: names of exactly the groups that can be cut; None = not stated.
        locked: group name -> part of the reason why it stays.
        share: least fraction of the parameters that goes.
        zeroing: whether zeroed producers give the same outputs as removed ones (ReLU yes, LayerNorm no).
        double: also certify in float64.
    """

    free: frozenset[str] | None = None
    locked: Mapping[str, str] | None = None
    share: float = 0.0
    zeroing: bool = False
    double: bool = False


@dataclass(frozen=True)
class Checked:
    """What a check found."""

    model: nn.Module
    cut: nn.Module
    found: Structure
    removed: dict[str, np.ndarray]
    certificate: Certificate
    share: float


NOTHING = Expect()


def check(
    model: nn.Module,
    example: Any,
    *,
    kinds: Sequence[str] = STRUCTURED,
    ratio: float = 0.3,
    seed: int = 0,
    expect: Expect = NOTHING,
) -> Checked:
    """Cut random units of every free group and hold the result against independent truths."""
    before = _state(model)
    random_state = torch.get_rng_state()
    record = capture(model, example)
    found = structure(model, record)
    assert torch.equal(random_state, torch.get_rng_state())
    _as_expected(found, expect)
    keep = _draw(found, kinds, ratio, seed)
    masks = {found.atoms[name].id: mask for name, mask in keep.items()}
    counts = {i: int(mask.sum()) for i, mask in masks.items()}
    cuts = {}
    for name, axes in found.tensors.items():
        stays = {d: kept(axis, masks) for d, axis in enumerate(axes)}
        dims = {d: torch.from_numpy(np.flatnonzero(s)) for d, s in stays.items() if not s.all()}
        if dims:
            cuts[name] = dims
    cut = cut_copy(model, cuts, edits(model, record, counts))
    certificate = certify(model, cut, example, record, masks)
    if expect.double:
        assert certify(model, cut, example, record, masks, dtype="float64").tolerance <= 1e-10
    if expect.zeroing:
        _zeroed_equals_cut(model, cut, example, found, keep)
    _costs(model, cut, example, CostModel(model, record), counts)
    _sizes_agree(cut)
    assert _state(model) == before, "the original was changed"
    share = 1 - _count(cut) / max(_count(model), 1)
    assert share >= expect.share, f"only {share:.1%} of the parameters went, expected {expect.share:.1%}"
    _train_one_step(cut, example)
    assert _state(model) == before, "the cut model shares memory with the original"
    return Checked(model, cut, found, {n: ~m for n, m in keep.items()}, certificate, share)


def enliven(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give norms, biases and statistics different values per channel, so that a wrong slice is seen."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.uniform_(low, high, generator=generator)

    with torch.no_grad():
        for module in model.modules():
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for name, tensor in own:
                if name == "running_var" or (name == "weight" and tensor.dim() == 1):
                    uniform(tensor, 0.5, 1.5)
                elif tensor.is_floating_point() and tensor.dim() == 1:
                    uniform(tensor, -0.3, 0.3)
    return model


def _draw(found: Structure, kinds: Sequence[str], ratio: float, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    keep = {}
    for group in found.groups:
        if group.locks or group.granularity not in kinds:
            continue
        mask = np.zeros(group.size, bool)
        step = int(group.attributes.get("multiple", 1))
        count = max(1, group.size - round(ratio * group.size))
        mask[rng.permutation(group.size)[: -(-count // step) * step]] = True
        keep[group.name] = mask
    return keep


def _as_expected(found: Structure, expect: Expect) -> None:
    groups = {g.name: g for g in found.groups}
    free = {name for name, g in groups.items() if not g.locks}
    if expect.free is not None:
        why = {n: [(r.reason, r.where) for r in groups[n].locks] for n in expect.free - free if n in groups}
        assert free == expect.free, f"not free: {why}; free but not expected: {free - expect.free}; all: {set(groups)}"
    for name, text in (expect.locked or {}).items():
        assert name in groups, f"no group {name}; there are {set(groups)}"
        reasons = [str(reason) for reason in groups[name].locks]
        assert any(text in reason for reason in reasons), f"{name}: {reasons}"


def _zeroed_equals_cut(
    model: nn.Module, cut: nn.Module, example: Any, found: Structure, keep: Mapping[str, np.ndarray]
) -> None:
    masked = copy.deepcopy(model).eval()
    tensors = {**dict(masked.named_parameters()), **dict(masked.named_buffers())}
    with torch.no_grad():
        for group in found.groups:
            if group.name in keep:
                for name, gone in _slices(group, torch.from_numpy(~keep[group.name])):
                    tensors[name].masked_fill_(gone, 0.0)
    for a, b in zip(_run(masked, example), _run(cut, example), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def _slices(group: Group, removed: Tensor) -> Iterator[tuple[str, Tensor]]:
    for span in group.spans:
        if span.role in PRODUCERS and span.index is not None:
            yield span.tensor, removed[span.index.clamp(min=0)] & (span.index >= 0)


def _run(model: nn.Module, example: Any) -> list[Tensor]:
    modes = {m: m.training for m in model.modules()}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        found = outputs(call(model.eval(), copy.deepcopy(example)))
    for module, mode in modes.items():
        module.training = mode
    return found


def _costs(model: nn.Module, cut: nn.Module, example: Any, cost: CostModel, counts: Mapping[int, int]) -> None:
    assert cost.params({}) == _count(model)
    assert cost.params(counts) == _count(cut)
    assert cost.macs({}) == _macs(model, example)
    assert cost.macs(counts) == _macs(cut, example)


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _macs(model: nn.Module, example: Any) -> int:
    attention = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        torch.ops.aten.mv: lambda a, b, **_: 2 * a[0] * a[1],
        torch.ops.aten.vdot: lambda a, b, **_: 2 * a[0],
        torch.ops.aten.dot: lambda a, b, **_: 2 * a[0],
    }
    with quiet(model), FlopCounterMode(display=False, custom_mapping=attention) as counter:
        _run(model, example)
    return counter.get_total_flops() // 2


def _attention_flops(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    b, heads, length, size = q
    return 2 * b * heads * length * k[2] * (size + v[3])


def _sizes_agree(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is nn.Linear:
            assert (module.out_features, module.in_features) == tuple(module.weight.shape)
        if type(module) is nn.Embedding:
            assert (module.num_embeddings, module.embedding_dim) == tuple(module.weight.shape)
        if type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
            assert (module.out_channels, module.in_channels // module.groups) == tuple(module.weight.shape[:2])
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.num_features == len(module.running_mean)


def _state(model: nn.Module) -> list[tuple[Any, ...]]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    tensors = [
        (n, id(t), t.requires_grad, t.stride(), t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for n, t in named
    ]
    plain = [
        (path, name, type(value).__name__, repr(value))
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, (int, float, tuple, str))
    ]
    return [*tensors, *plain]


def _train_one_step(cut: nn.Module, example: Any) -> None:
    trained = [p for p in cut.parameters() if p.requires_grad]
    floating = [t for t in outputs(call(cut.train(), example)) if t.is_floating_point() and t.requires_grad]
    if not trained or not floating:
        return
    torch.stack([t.pow(2).mean() for t in floating]).sum().backward()  # type: ignore[no-untyped-call]
    reached = [p for p in trained if p.grad is not None]
    assert reached
    before = [p.detach().clone() for p in reached]
    torch.optim.SGD(reached, lr=0.1).step()
    assert all(torch.isfinite(p).all() for p in reached)
    assert any(not torch.equal(a, b) for a, b in zip(before, reached, strict=True))
