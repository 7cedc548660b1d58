"""Attention with tables, turns and windows: what belongs to a head, what to a distance, what to a step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .cases import Family, floats
from .nets import Heads

family = Family("tables")
S = floats((2, 6, 16), (1, 1, 16), (3, 17, 16))
KINDS = "head head_dim channel"


def case(inputs: Any = S, **options: Any) -> Any:
    options.setdefault("kinds", KINDS)
    return family.case(inputs, **options)


@case(right="head channel")
class AlibiSlopes(Heads):
    """One slope per head in a buffer, which has to follow the heads."""

    def make(self) -> None:
        self.register_buffer("slopes", 2.0 ** -torch.arange(1.0, 5.0))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = torch.arange(q.shape[2])
        return (q @ k.mT * 0.3 - (p[:, None] - p).abs() * self.slopes[:, None, None]).softmax(-1) @ v


@case(right="channel")
class AlibiComputed(Heads):
    """Slopes computed from the number of heads: head three must keep the slope of head three."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        slopes = torch.tensor([2.0 ** -(8 * (i + 1) / q.shape[1]) for i in range(q.shape[1])])
        p = torch.arange(q.shape[2])
        return (q @ k.mT * 0.3 - (p[:, None] - p).abs() * slopes[:, None, None]).softmax(-1) @ v


@case(right="channel")
class AlibiByCumsum(Heads):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        slopes = 2.0 ** -torch.ones(q.shape[1]).cumsum(0)
        p = torch.arange(q.shape[2])
        return (q @ k.mT * 0.3 - (p[:, None] - p).abs() * slopes[:, None, None]).softmax(-1) @ v


@case(right="head channel")
class BiasTablePerHead(Heads):
    """Swin, T5: a table [distances, heads]; heads follow, distances stay."""

    def make(self) -> None:
        self.table = nn.Embedding(33, 4)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = torch.arange(q.shape[2])
        bias = self.table((p[:, None] - p) + 16).permute(2, 0, 1)
        return (q @ k.mT * 0.3 + bias).softmax(-1) @ v


def rotate_half(t: Tensor) -> Tensor:
    a, b = t.chunk(2, -1)
    return torch.cat([-b, a], -1)


@case(right="head channel")
class RotaryHalves(Heads):
    """Rotary tables as buffers, halves rotated: a pair lies half a head apart."""

    def make(self) -> None:
        rate = 1.0 / 100 ** (torch.arange(0, 6, 2) / 6)
        angle = torch.arange(32)[:, None] * rate
        self.register_buffer("cos", torch.cat([angle, angle], -1).cos())
        self.register_buffer("sin", torch.cat([angle, angle], -1).sin())

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cos, sin = self.cos[: q.shape[2]], self.sin[: q.shape[2]]
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        return (q @ k.mT * 0.3).softmax(-1) @ v


@case(right="head channel")
class RotaryOnTheFly(Heads):
    """Rates from the width of the head, made in the forward."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rate = 1.0 / 100 ** (torch.arange(0, q.shape[-1], 2) / q.shape[-1])
        angle = torch.arange(q.shape[2])[:, None] * rate
        cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        return (q @ k.mT * 0.3).softmax(-1) @ v


@case(right="head channel")
class RotaryComplex(Heads):
    """Llama's first form: neighbours are a complex number."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rate = 1.0 / 100 ** (torch.arange(0, 6, 2) / 6)
        turn = torch.polar(torch.ones(q.shape[2], 3), torch.arange(q.shape[2])[:, None] * rate)
        q, k = (
            torch.view_as_real(torch.view_as_complex(t.reshape(*t.shape[:-1], -1, 2)) * turn).flatten(3) for t in (q, k)
        )
        return (q @ k.mT * 0.3).softmax(-1) @ v


@case(right="head channel")
class RotaryPart(Heads):
    """Only the first four coordinates of a head turn."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        angle = torch.arange(q.shape[2])[:, None] * torch.tensor([1.0, 0.1])
        cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
        q, k = (torch.cat([t[..., :4] * cos + rotate_half(t[..., :4]) * sin, t[..., 4:]], -1) for t in (q, k))
        return (q @ k.mT * 0.3).softmax(-1) @ v


@case(right="channel")
class WindowsByHeads(Heads):
    """Every head has its own window: number zero looks nearest."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p, w = torch.arange(q.shape[2]), torch.arange(1, q.shape[1] + 1)[:, None, None] * 2
        return (q @ k.mT * 0.3).masked_fill((p[:, None] - p).abs() > w, -1e4).softmax(-1) @ v


@case(right="head channel")
class KeepsTheBest(Heads):
    """Top-k attention over keys."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT * 0.3
        best = scores.topk(min(4, scores.shape[-1]), -1).values[..., -1:]
        return scores.masked_fill(scores < best, -1e4).softmax(-1) @ v


@case(right="head channel")
class NullKey(Heads):
    """A learned key and value per head that every query may attend to."""

    def make(self) -> None:
        self.nk, self.nv = nn.Parameter(torch.randn(4, 1, 6)), nn.Parameter(torch.randn(4, 1, 6))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b = len(q)
        k, v = torch.cat([self.nk.expand(b, -1, -1, -1), k], 2), torch.cat([self.nv.expand(b, -1, -1, -1), v], 2)
        return (q @ k.mT * 0.3).softmax(-1) @ v


@case(floats((2, 6, 16), (1, 2, 16), (3, 18, 16)), right="head channel")
class PooledQueries(Heads):
    """Hiera: queries are pooled over pairs of steps by a maximum."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        q, k, v = self.split(self.q(h)), self.split(self.k(h)), self.split(self.v(h))
        q = q.unflatten(2, (-1, 2)).amax(3)
        return self.out(self.o(self.join(self.attend(q, k, v))).tanh())


@case(floats((2, 4, 16), (1, 4, 16), (3, 16, 16)), right="channel")
class ReducedKeys(Heads):
    """PVT: keys and values come from a strided convolution over the square of steps."""

    def make(self) -> None:
        self.reduce, self.norm = nn.Conv2d(20, 20, 2, 2), nn.LayerNorm(20)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        side = math.isqrt(h.shape[1])
        small = self.norm(self.reduce(h.mT.unflatten(2, (side, side))).flatten(2).mT)
        q, k, v = self.split(self.q(h)), self.split(self.k(small)), self.split(self.v(small))
        return self.out(h + self.o(self.join(self.attend(q, k, v))))


@case(floats((2, 4, 16), (1, 8, 16), (3, 16, 16)), right="head channel")
class SwinWindows(Heads):
    """Windows of four steps, shifted by two, with a relative table per head and its stored index."""

    def make(self) -> None:
        self.table = nn.Parameter(torch.randn(7, 4))
        self.register_buffer("index", torch.arange(4)[:, None] - torch.arange(4) + 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        b, n, _ = h.shape
        w = h.roll(-2, 1).reshape(b * n // 4, 4, -1)
        q, k, v = self.split(self.q(w)), self.split(self.k(w)), self.split(self.v(w))
        bias = self.table[self.index.view(-1)].view(4, 4, -1).permute(2, 0, 1)
        a = self.join((q @ k.mT * 0.3 + bias).softmax(-1) @ v)
        return self.out(h + self.o(a).reshape(b, n, -1).roll(2, 1))
