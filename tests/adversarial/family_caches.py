"""Attention of grouped heads with sinks, slopes, windows and caches, and memories that are matrices."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cases import Family
from .shared import STEPS

family = Family("caches")


def case(inputs: Any = STEPS, **options: Any) -> Any:
    return family.case(inputs, **options)


class GroupedAttention(nn.Module):
    """Hooks for the attention families below: eight queries, two keys."""

    heads, kv, size = 4, 2, 6

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 16), nn.Linear(16, 3)
        self.q, self.k, self.v = (nn.Linear(16, n * self.size) for n in (self.heads, self.kv, self.kv))
        self.o = nn.Linear(self.heads * self.size, 16)
        self.make()

    def make(self) -> None:
        """More parameters."""

    def parts(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.q(h).unflatten(-1, (self.heads, self.size)).transpose(1, 2)
        k, v = (p(h).unflatten(-1, (self.kv, self.size)).transpose(1, 2) for p in (self.k, self.v))
        return q, k.repeat_interleave(self.heads // self.kv, 1), v.repeat_interleave(self.heads // self.kv, 1)

    def weigh(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        q, k, v = self.parts(h)
        a = self.weigh(q @ k.mT * self.size**-0.5)
        return self.head(h + self.o((a @ v).transpose(1, 2).flatten(2)))


KINDS = "head head_dim channel"


@case(kinds=KINDS)
class Sinks(GroupedAttention):
    """A learned logit per head, dropped after the softmax."""

    def make(self) -> None:
        self.sinks = nn.Parameter(torch.randn(self.heads))

    def weigh(self, scores: Tensor) -> Tensor:
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(len(scores), -1, scores.shape[-2], 1)
        both_ = torch.cat([scores, sinks], -1)
        both_ = both_ - both_.max(-1, keepdim=True).values
        return both_.softmax(-1)[..., :-1]


@case(kinds=KINDS)
class SlopesPerHead(GroupedAttention):
    """Slopes of a geometric series over all heads, computed from their number when made."""

    def make(self) -> None:
        slopes = 2.0 ** (-8 * torch.arange(1, self.heads + 1) / self.heads)
        self.register_buffer("slopes", slopes[:, None, None], persistent=False)

    def weigh(self, scores: Tensor) -> Tensor:
        n = scores.shape[-1]
        apart = torch.arange(n) - torch.arange(n)[:, None]
        return (scores + self.slopes * apart).masked_fill(apart > 0, float("-inf")).softmax(-1)


@case(kinds=KINDS)
class Buckets(GroupedAttention):
    """A logarithmic bucket of the distance chooses a bias per head."""

    def make(self) -> None:
        self.bias = nn.Embedding(8, self.heads)

    def weigh(self, scores: Tensor) -> Tensor:
        n = scores.shape[-1]
        apart = (torch.arange(n)[:, None] - torch.arange(n)).clamp(min=0)
        large = 4 + (apart.clamp(min=1).float() / 4).log().div(math.log(4.0)).mul(4).long()
        bucket = torch.where(apart < 4, apart, large.clamp(max=7))
        return (scores + self.bias(bucket).permute(2, 0, 1)).softmax(-1)


@case(kinds=KINDS)
class CappedWindow(GroupedAttention):
    """Scores bounded by a tangent, and a window that short inputs don't fill."""

    def weigh(self, scores: Tensor) -> Tensor:
        n = scores.shape[-1]
        apart = torch.arange(n)[:, None] - torch.arange(n)
        scores = (scores / 5).tanh() * 5
        return scores.masked_fill((apart < 0) | (apart >= 8), float("-inf")).softmax(-1)


@case(kinds=KINDS)
class WindowPerHead(GroupedAttention):
    """Every head sees as far as its number says."""

    def weigh(self, scores: Tensor) -> Tensor:
        n = scores.shape[-1]
        apart = torch.arange(n)[:, None] - torch.arange(n)
        far = torch.tensor([2.0**i for i in range(scores.shape[1])])[:, None, None]
        return scores.masked_fill((apart < 0) | (apart >= far), float("-inf")).softmax(-1)


@case(kinds=KINDS)
class FirstHeadIsLocal(GroupedAttention):
    """The last head sees neighbours only."""

    def weigh(self, scores: Tensor) -> Tensor:
        n = scores.shape[-1]
        near = (torch.arange(n)[:, None] - torch.arange(n)).abs() <= 1
        return torch.cat([scores[:, :-1], scores[:, -1:].masked_fill(~near, float("-inf"))], 1).softmax(-1)


def caches() -> list[Any]:
    def make(seed: int, length: int) -> Any:
        g = torch.Generator().manual_seed(seed)
        k, v = (torch.randn(2, 2, length, 6, generator=g) for _ in range(2))
        return lambda: (torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(seed)), (k, v))

    return [make(0, 4), make(1, 0), make(2, 9)]


@family.case(caches(), kinds=KINDS)
class CacheComesIn(GroupedAttention):
    """Keys and values of earlier steps have the width and the number of heads of this model."""

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None = None) -> Any:
        h = self.embed(x)
        q = self.q(h).unflatten(-1, (self.heads, self.size)).transpose(1, 2)
        k, v = (p(h).unflatten(-1, (self.kv, self.size)).transpose(1, 2) for p in (self.k, self.v))
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        a = q @ k.repeat_interleave(2, 1).mT * self.size**-0.5
        y = a.softmax(-1) @ v.repeat_interleave(2, 1)
        return self.head(h + self.o(y.transpose(1, 2).flatten(2))), (k, v)


def optional_caches() -> list[Any]:
    return [lambda: (torch.ones(2, 3, 8),), *caches()]


@family.case(optional_caches(), kinds=KINDS, condition="past: Any")
class CacheMayComeIn(CacheComesIn):
    """The example has none; its owner hands in one of the original's shape later."""

    def forward(self, x: Tensor, past: Any = None) -> Any:
        return super().forward(x, past)[0]


@case(kinds=KINDS)
class LatentAttention(nn.Module):
    """Compressed keys and values; a part of the width is turned, and shared by the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 16), nn.Linear(16, 3)
        self.q_a, self.q_norm, self.q_b = nn.Linear(16, 12), nn.LayerNorm(12), nn.Linear(12, 4 * (6 + 4))
        self.kv_a, self.kv_norm, self.kv_b = nn.Linear(16, 10 + 4), nn.LayerNorm(10), nn.Linear(10, 4 * (6 + 5))
        self.o = nn.Linear(4 * 5, 16)

    def turn(self, t: Tensor) -> Tensor:
        angle = torch.arange(t.shape[-2])[:, None] * torch.tensor([1.0, 0.1])
        a, b = t.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        q = self.q_b(self.q_norm(self.q_a(h))).unflatten(-1, (4, 10)).transpose(1, 2)
        q, qr = q.split([6, 4], -1)
        latent, kr = self.kv_a(h).split([10, 4], -1)
        k, v = self.kv_b(self.kv_norm(latent)).unflatten(-1, (4, 11)).transpose(1, 2).split([6, 5], -1)
        kr = self.turn(kr[:, None]).expand(-1, 4, -1, -1)
        a = torch.cat([q, self.turn(qr)], -1) @ torch.cat([k, kr], -1).mT * 10**-0.5
        return self.head(h + self.o((a.softmax(-1) @ v).transpose(1, 2).flatten(2)))


@case(kinds="channel head")
class MatrixMemory(nn.Module):
    """Exponential gates with a stabiliser, a matrix for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.z = (nn.Linear(8, 20) for _ in range(4))
        self.i, self.f, self.norm, self.o = nn.Linear(8, 4), nn.Linear(8, 4), nn.GroupNorm(4, 20), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (p(x).view(b, n, 4, 5) for p in (self.q, self.k, self.v))
        i, f = self.i(x), F.logsigmoid(self.f(x))
        c, s, m, outs = torch.zeros(b, 4, 5, 5), torch.zeros(b, 4, 5), torch.full((b, 4), -1e9), []
        for t in range(n):
            new = torch.maximum(f[:, t] + m, i[:, t])
            keep, add = torch.exp(f[:, t] + m - new), torch.exp(i[:, t] - new)
            kt = k[:, t] * 5**-0.5
            c = keep[..., None, None] * c + add[..., None, None] * v[:, t, ..., :, None] * kt[..., None, :]
            s, m = keep[..., None] * s + add[..., None] * kt, new
            y = torch.einsum("bhij,bhj->bhi", c, q[:, t])
            outs.append(y / torch.maximum((s * q[:, t]).sum(-1).abs(), torch.exp(-m))[..., None])
        y = self.norm(torch.stack(outs, 1).reshape(b * n, 20)).view(b, n, 20)
        return self.o(y * F.silu(self.z(x)))
