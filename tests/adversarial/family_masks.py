"""Masks, gates and fixed patterns over hidden units, stored or made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from .cases import ROWS, STEPS, Family, floats, quiet
from .nets import Mid
from .references import effective

family = Family("masks")
X, S = floats(*ROWS), floats(*STEPS)


def mid(name: str, middle: Any, extra: Any = None, inputs: Any = X, **options: Any) -> None:
    options.setdefault("must", "fc1.weight")
    family.add(name, lambda: Mid(middle, **(extra() if extra else {})), inputs, **options)


class Gated(Mid):
    """Units times a gate that is computed from weights alone: what is kept has to keep its gate."""

    def __init__(self, how: Any, **extra: Any) -> None:
        super().__init__(**extra)
        self.how = how

    def value(self) -> Tensor:
        return self.how(self)

    def mid(self, h: Tensor) -> Tensor:
        return h * self.value()


def gate(name: str, how: Any, extra: Any) -> None:
    truth = effective("value", {0: "fc1.bias"})
    family.add(name, lambda: Gated(how, **extra()), X, truths=(truth,), train=False)


def keep_two_thirds() -> dict[str, Tensor]:
    return {"mask": torch.arange(24) % 3 > 0}


mid("stored_floats", lambda m, h: h * m.mask, lambda: {"mask": (torch.arange(24) % 3 > 0).float()}, right="channel")
mid("stored_bools", lambda m, h: h * m.mask, keep_two_thirds, right="channel")
mid("masked_fill", lambda m, h: h.masked_fill(m.mask, 0.5), keep_two_thirds, right="channel")
mid("stored_integers", lambda m, h: h * m.level, lambda: {"level": torch.randint(1, 5, (24,))}, right="channel")
mid("where_stored", lambda m, h: torch.where(m.mask, h, h.tanh()), keep_two_thirds, right="channel")
mid("index_by_bools", lambda m, h: F.pad(h[:, m.mask], (0, 8)), keep_two_thirds)
mid("assign_by_bools", lambda m, h: _assign(m, h), keep_two_thirds)
mid("masked_select", lambda m, h: F.pad(h.masked_select(m.mask).view(len(h), -1), (0, 8)), keep_two_thirds)
mid("masked_scatter", lambda m, h: h.masked_scatter(m.mask, h * 2), keep_two_thirds)
mid("nonzero_of_stored", lambda m, h: h.index_add(1, m.mask.nonzero()[:, 0], h[:, :16]), keep_two_thirds)
mid("stored_indices", lambda m, h: h.index_fill(1, m.order[:5], 0.0), lambda: {"order": torch.randperm(24)})
mid("stored_partner", lambda m, h: h - h[:, m.order], lambda: {"order": torch.randperm(24)})
mid(
    "stored_partner_by_gather",
    lambda m, h: h - h.gather(1, m.order.expand_as(h)),
    lambda: {"order": torch.randperm(24)},
)
mid("embedding_of_stored_classes", lambda m, h: h * m.e(m.kind)[:, 0],
    lambda: {"kind": torch.arange(24) % 3, "e": nn.Embedding(3, 1)})  # fmt: skip
mid(
    "segments_summed",
    lambda m, h: torch.zeros(len(h), 24).index_add(1, m.kind, h),
    lambda: {"kind": torch.arange(24) % 5},
)
mid("segment_mean_given_back", lambda m, h: h - (torch.zeros(len(h), 3).index_add(1, m.kind, h) / 8)[:, m.kind],
    lambda: {"kind": torch.arange(24) % 3})  # fmt: skip
mid("made_by_arange", lambda m, h: h * (torch.arange(h.shape[1]) % 2 == 0))
mid(
    "made_by_comparison_of_stored",
    lambda m, h: h * (m.rank < 12),
    lambda: {"rank": torch.randperm(24)},
    right="channel",
)
mid("first_units", lambda m, h: h * (torch.arange(24) < 10))
mid(
    "first_units_hidden_by_zeros",
    lambda m, h: h * torch.cat([torch.ones(10), torch.zeros(14)]),
    inputs=quiet(lambda: torch.zeros(4, 8), X),
)
mid(
    "checkerboard",
    lambda m, h: h * (torch.arange(h.shape[-1]) + torch.arange(h.shape[-2])[:, None]).remainder(2),
    inputs=S,
)
mid("learned_gate", lambda m, h: h * m.gate.sigmoid(), lambda: {"gate": nn.Parameter(torch.randn(24))}, right="channel")
mid(
    "hard_concrete",
    lambda m, h: h * (m.gate.sigmoid() * 1.2 - 0.1).clamp(0, 1),
    lambda: {"gate": nn.Parameter(torch.randn(24))},
    right="channel",
)
gate("gate_through_softmax", lambda m: m.gate.softmax(0) * 24, lambda: {"gate": nn.Parameter(torch.randn(24))})
gate("gate_normalised", lambda m: m.gate / m.gate.norm(), lambda: {"gate": nn.Parameter(torch.rand(24))})
gate("gate_over_its_maximum", lambda m: m.gate / m.gate.abs().max(), lambda: {"gate": nn.Parameter(torch.rand(24))})
gate("gate_by_rank", lambda m: m.gate.argsort().argsort() > 6, lambda: {"gate": nn.Parameter(torch.rand(24))})
gate("gate_cumulated", lambda m: m.gate.softmax(0).cumsum(0), lambda: {"gate": nn.Parameter(torch.rand(24))})
mid(
    "gate_of_half",
    lambda m, h: torch.cat([h[:, :12] * m.gate, h[:, 12:]], 1),
    lambda: {"gate": nn.Parameter(torch.rand(12))},
)
mid("gate_repeated", lambda m, h: h * m.gate.repeat(2), lambda: {"gate": nn.Parameter(torch.rand(12))})
mid("gate_interleaved", lambda m, h: h * m.gate.repeat_interleave(3), lambda: {"gate": nn.Parameter(torch.rand(8))})
mid(
    "gate_expanded",
    lambda m, h: (h.view(len(h), 4, 6) * m.gate[:, None]).flatten(1),
    lambda: {"gate": nn.Parameter(torch.rand(4))},
)
mid(
    "gate_tiled_over_groups",
    lambda m, h: (h.view(len(h), -1, 6) * m.gate).flatten(1),
    lambda: {"gate": nn.Parameter(torch.rand(6))},
)
mid("gate_from_a_list", lambda m, h: h * torch.tensor(m.gates), lambda: {"gates": [i / 24 for i in range(24)]})
mid("gate_from_numpy", lambda m, h: h * torch.as_tensor(m.gates.numpy() * 2), lambda: {"gates": torch.rand(24)})
mid("gates_in_a_list_of_parameters", lambda m, h: torch.stack([h[:, i] * g for i, g in enumerate(m.gates)], 1),
    lambda: {"gates": nn.ParameterList([torch.rand(()) for _ in range(24)])})  # fmt: skip
mid("dropout_pattern", lambda m, h: h * m.pattern[len(h) % 3], lambda: {"pattern": (torch.rand(3, 24) > 0.3).float()})
mid(
    "pattern_by_batch",
    lambda m, h: h * m.pattern[: len(h)],
    lambda: {"pattern": torch.rand(16, 24)},
    right="channel",
    whole="pattern:0",
)
mid("table_by_best_unit", lambda m, h: h * m.table[h.argmax(1)], lambda: {"table": torch.rand(24, 24)})
mid("row_of_square_by_batch", lambda m, h: h * m.table[len(h)], lambda: {"table": torch.rand(24, 24)})
mid("square_buffer_product", lambda m, h: h @ m.table, lambda: {"table": torch.rand(24, 24) / 9})
mid("triangle_buffer_product", lambda m, h: h @ m.table, lambda: {"table": torch.rand(24, 24).tril() / 9})
mid(
    "square_stored_and_masked",
    lambda m, h: h @ (m.w * m.table),
    lambda: {"w": nn.Parameter(torch.randn(24, 24) / 5), "table": torch.rand(24, 24).tril()},
)


def _assign(m: nn.Module, h: Tensor) -> Tensor:
    h = h.clone()
    h[:, m.mask] = h[:, m.mask].flip(1)
    return h


@family.case(X)
class Made(nn.Module):
    """Masked autoencoder for densities: masks from degrees of hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 24), nn.Linear(24, 8)
        degree, inputs = torch.arange(24) % 7, torch.arange(8)
        self.register_buffer("ma", (degree[:, None] >= inputs).float())
        self.register_buffer("mb", (inputs[:, None] > degree).float())

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.a.weight * self.ma, self.a.bias).relu()
        return F.linear(h, self.b.weight * self.mb, self.b.bias)


@family.case(X)
class Coupling(nn.Module):
    """RealNVP over hidden units: one half, by a stored mask, moves the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.s, self.t, self.out = nn.Linear(8, 24), nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 4)
        self.register_buffer("mask", torch.arange(24).remainder(2).float())

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        seen = h * self.mask
        return self.out(seen + (1 - self.mask) * (h * self.s(seen).tanh().exp() + self.t(seen)))


@family.case(X)
class CouplingByHalves(nn.Module):
    """RealNVP by chunks, swapped after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.steps, self.out = (
            nn.Linear(8, 24),
            nn.ModuleList([nn.Linear(12, 24) for _ in range(2)]),
            nn.Linear(24, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x).chunk(2, 1)
        for step in self.steps:
            s, t = step(a).chunk(2, 1)
            a, b = b * s.tanh().exp() + t, a
        return self.out(torch.cat([a, b], 1))


def masked_by_torch() -> nn.Module:
    model = Mid()
    prune.random_structured(model.fc1, "weight", amount=0.3, dim=0)
    prune.random_unstructured(model.fc2, "weight", amount=0.3)
    return model


family.add("masked_by_torch", masked_by_torch, X)


@family.case(S)
class PaddingMask(nn.Module):
    """Padding found by zeros in the input, and a mean over what is real."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(8, 24), nn.Linear(24, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        real = (x[..., :1] > 0).float()
        h = self.b(self.a(x).relu()) * real
        return self.out(h.sum(1) / real.sum(1).clamp(min=1))


@family.case(X, right="channel")
class TwoPaths(nn.Module):
    """A residual and its gate, written with `where` on the gate's sign."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.g, self.out = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, g = self.a(x), self.g(x)
        return self.out(torch.where(g > 0, a, a.tanh() * g))
