"""A model around a row of the table of rules, cuts of it, and what the cut model should give, reckoned by hand."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from harness import STRUCTURED
from rules_table import UNITS, Row
from torch import Tensor, nn

from secateur.kinds.reference import Tried
from secateur.kinds.slices.ablation import ablated, ablated_with_widths
from secateur.kinds.slices.certify import certify
from secateur.kinds.slices.cut import cut_copy
from secateur.kinds.trials import tried
from secateur.model.held import HeldRandomness
from secateur.structure.attributes import edits
from secateur.structure.axes import kept
from secateur.structure.capture import capture
from secateur.structure.groups import Structure, structure
from secateur.structure.provenance import Attribute
from secateur.structure.trace import Trace

FEATURES = 8
Cuts = dict[str, dict[int, Tensor]]


class Between(nn.Module):
    """Linear, then the row with its units along dimension `at`, then a linear layer for each result."""

    def __init__(self, row: Row, at: int) -> None:
        super().__init__()
        self.mid, self.at = row.mid, at
        self.fc1 = nn.Linear(FEATURES, UNITS)
        self.heads = nn.ModuleList()
        self.where: list[int] = []  # the dimension that each of them reads; -1 = none, the result is handed out
        self.chosen: Tensor | None = None  # only these units are there, when the truth is reckoned

    def p(self, name: str, *shape: int) -> Tensor:
        """A parameter, made by the first run."""
        if name not in self._parameters:
            self.register_parameter(name, nn.Parameter(torch.randn(*(int(n) for n in shape)) * 0.5 + 0.3))
        return self._parameters[name]

    def b(self, name: str, *shape: int) -> Tensor:
        """A buffer, made by the first run."""
        if name not in self._buffers:
            self.register_buffer(name, torch.randn(*(int(n) for n in shape)) * 2)
        return self._buffers[name]

    def results(self, x: Tensor) -> list[Tensor]:
        h = self.fc1(x)
        if self.chosen is not None:
            h = h[..., self.chosen]
        found = self.mid(h.movedim(-1, self.at), self)
        return [t if t.is_floating_point() else t.float() for t in (found if isinstance(found, tuple) else (found,))]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        pairs = zip(self.results(x), self.where, self.heads, strict=True)
        return tuple(t if d < 0 else head(t.movedim(d, -1)) for t, d, head in pairs)


def build(row: Row, at: int) -> Between:
    """The model, with a head for every result of a first run."""
    torch.manual_seed(0)
    model = Between(row, at).eval()
    with torch.no_grad():
        results = model.results(inputs(row)[0])
    for t in results:
        sizes = list(t.shape)
        d = sizes.index(UNITS) if UNITS in sizes else max(range(len(sizes)), key=sizes.__getitem__, default=-1)
        d = d if row.head is None else row.head
        model.where.append(d)
        model.heads.append(nn.Linear(sizes[d], 4) if d >= 0 else nn.Identity())
    return model.eval()


def inputs(row: Row) -> list[Tensor]:
    """Live ones, of the first the form of the example; others are larger, and louder."""
    generator = torch.Generator().manual_seed(1)
    larger = tuple(n + 1 for n in row.sizes[:1]), tuple(n + 2 for n in row.sizes[1:])
    shapes = [row.sizes, (*larger[0], *row.sizes[1:]), (*row.sizes[:1], *larger[1])]
    louder = (1.0, 3.0, 1.0)
    return [torch.randn(*s, FEATURES, generator=generator) * f for s, f in zip(shapes, louder, strict=True)]


def degenerate(row: Row) -> list[Tensor]:
    """Zeros, one step, one element."""
    ones = (row.sizes[0], *[1] * (len(row.sizes) - 1)) if row.sizes else ()
    live = inputs(row)[0]
    found = [torch.zeros_like(live)]
    found += [torch.randn(*shape, FEATURES) for shape in {ones, (1,) * len(row.sizes)} if shape != row.sizes]
    return found


@dataclass
class Cut:
    """A model and a cut of it."""

    model: Between
    example: Tensor
    trace: Trace
    found: Structure
    masks: dict[int, np.ndarray]
    cuts: Cuts
    attributes: dict[Attribute, int]

    def small(self) -> nn.Module:
        return cut_copy(self.model, self.cuts, self.attributes)

    @property
    def units(self) -> Tensor | None:
        """Kept units of the layer in front; None = all."""
        return self.cuts.get("fc1.weight", {}).get(0)

    def replayed(self) -> None:
        """The first proof."""
        certify(self.model, self.small(), self.example, self.trace, self.masks)

    def second(self, effort: str = "default") -> Tried:
        """The second proof."""
        ways = [
            partial(ablated, cuts=self.cuts),
            partial(ablated_with_widths, cuts=self.cuts, attributes=self.attributes),
        ]
        return tried(ways, self.model, self.small(), self.example, effort=effort)


def cut(model: Between, example: Tensor, seed: int = 3, share: float = 0.6) -> Cut:
    """Random units of every free group."""
    trace = capture(model, example)
    found, rng, masks = structure(model, trace), np.random.default_rng(seed), {}
    for group in (g for g in found.groups if not g.locks and g.granularity in STRUCTURED):
        step = int(group.attributes.get("multiple", 1))
        stays = np.zeros(group.size, bool)
        stays[rng.permutation(group.size)[: max(1, -(-int(group.size * share) // step)) * step]] = True
        if not stays.all():
            masks[found.atoms[group.name].id] = stays
    cuts: Cuts = {}
    for name, axes in found.tensors.items():
        for d, axis in enumerate(axes):
            if not kept(axis, masks).all():
                cuts.setdefault(name, {})[d] = torch.from_numpy(np.flatnonzero(kept(axis, masks)))
    counts = {i: int(m.sum()) for i, m in masks.items()}
    return Cut(model, example, trace, found, masks, cuts, edits(model, trace, counts))


def truth(row: Row, made: Cut) -> Between:
    """The original without what was cut: zeros, or the kept units where the row counts what is there."""
    model = copy.deepcopy(made.model)
    units = made.units
    if units is not None and str(made.model.at) in row.kept:
        return _on_kept(row, model, units)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, dims in made.cuts.items():
        for d, stays in dims.items():
            gone = torch.ones(tensors[name].shape[d], dtype=torch.bool)
            gone[stays] = False
            tensors[name].data.index_fill_(d, gone.nonzero().flatten(), 0)
    return model


def _on_kept(row: Row, model: Between, units: Tensor) -> Between:
    model.chosen = units
    for name, d in row.ties:
        if name in model._parameters:
            model._parameters[name] = nn.Parameter(model._parameters[name].detach().index_select(d, units))
    with torch.no_grad():
        sizes = [t.shape[d] if d >= 0 else 0 for t, d in zip(model.results(inputs(row)[0]), model.where, strict=True)]
    for head, size in zip(model.heads, sizes, strict=True):
        if isinstance(head, nn.Linear) and head.in_features != size:
            head.weight = nn.Parameter(head.weight.detach()[:, units])
    return model


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad(), HeldRandomness():
        return list(model(x.clone()))


def differs(made: Cut, row: Row, others: Sequence[Tensor]) -> str:
    """Where the cut model is not the truth; "" = nowhere."""
    small, right = made.small(), truth(row, made)
    seen = 0
    for i, x in enumerate(others):
        try:
            expected = run(made.model, x) and run(right, x)
        except (RuntimeError, IndexError, ValueError):
            continue  # the original does not take this size
        seen += 1
        try:
            got = run(small, x)
        except Exception as error:
            return f"the cut model fails on input {i}: {type(error).__name__}: {str(error)[:80]}"
        for a, b in zip(expected, got, strict=True):
            if a.shape != b.shape:
                return f"other shapes on input {i}: {tuple(a.shape)}, {tuple(b.shape)}"
            scale = float(a.abs().max()) if a.numel() else 0.0
            if not torch.allclose(a, b, rtol=1e-3, atol=3e-5 * max(1.0, scale), equal_nan=True):
                return f"other values on input {i}: {float((a - b).abs().max()):.2g} of {scale:.2g}"
    return "" if seen else "no input was compared"


def places(row: Row) -> list[int]:
    """Where the units of a row are put."""
    return [int(c) for c in row.dims] or list(range(len(row.sizes) + 1))


def operators(made: Cut) -> set[str]:
    from secateur.structure.rules.base import base_name

    return {base_name(step.func) for step in made.trace.steps}
