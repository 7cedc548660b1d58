"""Cut a model at random, prove it, train it for a step: what is asked of every transformers architecture."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.kinds.slices.certify import certify
from secateur.kinds.slices.cut import cut_copy
from secateur.model.call import outputs
from secateur.structure.attributes import edits
from secateur.structure.axes import kept
from secateur.structure.capture import capture
from secateur.structure.cost import CostModel
from secateur.structure.groups import Structure, structure

KINDS = ("channel", "neuron", "head")


@dataclass
class Outcome:
    """What happened to one architecture."""

    share: float = 0.0
    error: float = 0.0
    seconds: float = 0.0
    locks: dict[str, int] = field(default_factory=dict)


def cut_and_prove(model: nn.Module, inputs: Any, ratio: float = 0.3, seed: int = 0) -> Outcome:
    """Cut random units of every free group, certify, and train the result for one step.

    Returns:
        the share of parameters that went, the certificate's error, and how many parameters each reason locks.

    Raises:
        AssertionError: the predicted number of parameters is wrong, or a parameter that had a gradient has none.
        SecateurError: the engine refuses, or the proof fails.
    """
    generator = np.random.default_rng(seed)
    start = perf_counter()
    record = capture(model, inputs)
    found = structure(model, record)
    keep: dict[int, Any] = {}
    for group in found.groups:
        if group.locks or group.granularity not in KINDS:
            continue
        multiple = group.attributes.get("multiple", 1)
        stays = max(1, -(-(group.size - round(ratio * group.size)) // multiple)) * multiple
        mask = np.zeros(group.size, bool)
        mask[generator.permutation(group.size)[:stays]] = True
        keep[found.atoms[group.name].id] = mask
    counts = {i: int(mask.sum()) for i, mask in keep.items()}
    cuts: dict[str, dict[int, Tensor]] = {}
    for name, axes in found.tensors.items():
        for d, axis in enumerate(axes):
            stays_here = kept(axis, keep)
            if not stays_here.all():
                cuts.setdefault(name, {})[d] = torch.from_numpy(np.flatnonzero(stays_here))
    smaller = cut_copy(model, cuts, edits(model, record, counts))
    proof = certify(model, smaller, inputs, record, keep)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, smaller))
    assert after == CostModel(model, record).params(counts)
    train_step(smaller, inputs)
    return Outcome(1 - after / before, proof.max_abs_error, perf_counter() - start, locked(model, found))


def locked(model: nn.Module, found: Structure) -> dict[str, int]:
    """Reason with its place -> elements of the producers that it locks."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    out: dict[str, int] = {}
    for group in found.groups:
        if group.locks:
            lock = group.locks[0]
            key = f"{lock.reason} @{lock.where} [{lock.op}]"
            out[key] = out.get(key, 0) + sum(sizes.get(t, 0) for t in {s.tensor for s in group.spans})
    return dict(sorted(out.items(), key=lambda item: -item[1]))


def train_step(model: nn.Module, inputs: Any) -> None:
    """Forward, backward and one optimizer step; every gradient must be finite."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss = sum(t.float().pow(2).mean() for t in outputs(model(**inputs)) if t.is_floating_point() and t.requires_grad)
    assert isinstance(loss, Tensor)
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads
    assert all(bool(torch.isfinite(g).all()) for g in grads)
    optimizer.step()
    with torch.no_grad():
        outputs(model(**inputs))
