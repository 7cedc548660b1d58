"""Units beside what fills a place (padding, masks, zeros that are written into), and then something that mixes them.

A norm or a product of two activations behind it runs over what is kept, in padded rows as in others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cases import Family
from .shared import STEPS

family = Family("filled", right="channel", must="a.weight b.weight")
Fill = Callable[[Tensor, Tensor], Tensor]  # of units [batch, steps, units] and of what says which steps count


class Normed(nn.Module):
    """Layer, filling, norm, layer; steps whose first feature is negative do not count."""

    def __init__(self, fill: Fill) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.fill = nn.Linear(8, 20), nn.LayerNorm(20), nn.Linear(20, 3), fill

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.fill(self.a(x), x[..., 0] > 0)))


def row_by_row(h: Tensor, counts: Tensor) -> Tensor:
    """Of every sentence the steps up to its own length, as `pad_sequence` by hand."""
    out = torch.zeros(h.shape[0], h.shape[1] + 1, h.shape[2])
    for i in range(len(h)):
        out[i, : h.shape[1] - i % 2] = h[i, : h.shape[1] - i % 2]
    return out


def emptied(h: Tensor, counts: Tensor) -> Tensor:
    h = h.clone()
    h[~counts] = 0
    return h


def packed(h: Tensor, counts: Tensor) -> Tensor:
    """The steps that count alone, put back where they were."""
    where = counts.flatten().nonzero().flatten()
    flat = h.flatten(0, 1)
    return torch.zeros_like(flat).index_copy(0, where, flat[where]).view_as(h)


FILLS: dict[str, Fill] = {
    "to_whole_windows": lambda h, counts: F.pad(h, (0, 0, 0, -h.shape[1] % 4)),
    "mask": lambda h, counts: h.masked_fill(~counts[..., None], 0.0),
    "where": lambda h, counts: torch.where(counts[..., None], h, torch.zeros_like(h)),
    "shift": lambda h, counts: torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1),
    "into_zeros": row_by_row,
    "emptied": emptied,
    "packed": packed,
}
for name, fill in FILLS.items():
    family.add(name, lambda fill=fill: Normed(fill), STEPS)


@family.case(STEPS, right="head_dim", must="q.weight v.weight")
class LocalBlocks(nn.Module):
    """Attention in blocks of four steps and their neighbours before; the rest of the last block is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.size = 2, 6
        self.q, self.k, self.v, self.o = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 3)

    def blocks(self, t: Tensor) -> Tensor:
        t = t.view(*t.shape[:2], self.heads, self.size).transpose(1, 2)
        t = F.pad(t, (0, 0, 0, -t.shape[2] % 4))
        return t.reshape(*t.shape[:2], t.shape[2] // 4, 4, t.shape[3])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.blocks(self.q(x)), self.blocks(self.k(x)), self.blocks(self.v(x))
        k, v = (torch.cat([F.pad(t, (0, 0, 0, 0, 1, 0))[:, :, :-1], t], 3) for t in (k, v))
        y = (torch.einsum("bhwid,bhwjd->bhwij", q, k) * 0.4).softmax(-1) @ v
        y = y.flatten(2, 3)[:, :, : x.shape[1]].transpose(1, 2)
        return self.o(y.reshape(*x.shape[:2], self.heads * self.size))
