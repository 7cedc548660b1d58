"""Attention in the spellings of real code: heads, head widths, temperatures, tables per head, caches, pooling."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cases import Family, floats
from .nets import Heads
from .references import Kept, over, plain, put, scatter

family = Family("attention")
S = floats((2, 6, 16), (1, 1, 16), (3, 17, 16))
KINDS = "head head_dim channel"


def coordinates(kept: Kept, name: str) -> Tensor:
    """Which coordinates of a head are kept in a projection."""
    return (kept(f"{name}.weight") % 6).unique()


def by_coordinates(*names: str, out: str = "") -> Any:
    """Attention over kept coordinates: queries, keys and values, each by its own projection."""

    def change(model: nn.Module, kept: Kept) -> None:
        inner = model.attend

        def attend(*parts: Tensor) -> Tensor:
            parts = tuple(t[..., coordinates(kept, n)] if n else t for t, n in zip(parts, names, strict=True))
            result = inner(*parts)
            return scatter(result, -1, coordinates(kept, out), 6) if out else result

        put(model, "attend", attend)

    return change


def mean_of_kept_heads(model: nn.Module, kept: Kept) -> None:
    """The mean over heads that are there."""
    put(model, "join", lambda t: t[:, (kept("q.weight") // 6).unique()].mean(1))


def case(inputs: Any = S, **options: Any) -> Any:
    options.setdefault("kinds", KINDS)
    return family.case(inputs, **options)


@case(right=KINDS)
class FixedScale(Heads):
    """The plain form, with a number for a scale."""


@case(right=KINDS)
class ClassAttributes(Heads):
    """Sizes that stand on the class instead of the instance."""

    fixed, wide = 4, 6

    def split(self, t: Tensor) -> Tensor:
        return t.view(t.shape[0], t.shape[1], self.fixed, self.wide).transpose(1, 2)


@case(right="head channel")
class RootOfSize(Heads):
    """Over the root of the tensor's own width."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


@case(right="head channel")
class RootOfAttribute(Heads):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q * self.size**-0.5 @ k.mT).softmax(-1) @ v


@case(right="head channel")
class StoredScale(Heads):
    def make(self) -> None:
        self.scale = self.size**-0.5

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * self.scale).softmax(-1) @ v


@case(right="head channel")
class Fused(Heads):
    """The fused call takes its scale from the width in silence."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


@case(right=KINDS)
class FusedWithScale(Heads):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=0.3)


@case(right="head channel")
class FusedCausal(Heads):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@case(right="head channel")
class ScaledByTensor(Heads):
    """The root taken of a tensor that holds the width."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT / torch.sqrt(torch.tensor(q.size(-1), dtype=q.dtype))).softmax(-1) @ v


@case(right="head channel")
class BothSidesScaled(Heads):
    """A quarter power on either side, as in stable implementations."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q.shape[-1] ** -0.25
        return ((q * s) @ (k * s).mT).softmax(-1) @ v


@case(right="head channel")
class ScaleBelowHeads(Heads):
    """Scaled by the root of the whole width: heads times size."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT / math.sqrt(q.shape[1] * q.shape[3])).softmax(-1) @ v


@case(right="head channel")
class Baddbmm(Heads):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, n = q.shape[0], q.shape[2]
        scores = torch.baddbmm(torch.zeros(1), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0.0, alpha=0.3)
        return (scores.view(b, -1, n, n).softmax(-1)) @ v


@case(right="head channel")
class Einsum(Heads):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * 0.3
        return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)


@case(right="head channel")
class TemperaturePerHead(Heads):
    def make(self) -> None:
        self.temperature = nn.Parameter(torch.rand(4, 1, 1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * self.temperature).softmax(-1) @ v


@case(right="head channel", truths=(by_coordinates("q", "k", ""),))
class CosineAttention(Heads):
    """Swin v2: cosine of queries and keys, with a clamped scale per head."""

    def make(self) -> None:
        self.temperature = nn.Parameter(torch.rand(4, 1, 1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = self.temperature.clamp(max=math.log(100.0)).exp()
        return (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * scale).softmax(-1) @ v


@case(right="head channel")
class QueryNorm(Heads):
    """Norms of queries and keys over the width of a head."""

    def make(self) -> None:
        self.nq, self.nk = nn.LayerNorm(6), nn.LayerNorm(6)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (self.nq(q) @ self.nk(k).mT * 0.3).softmax(-1) @ v


@case()
class TalkingHeads(Heads):
    """Scores of heads are mixed by a square matrix before and after the softmax."""

    def make(self) -> None:
        self.before, self.after = nn.Linear(4, 4), nn.Linear(4, 4)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.before((q @ k.mT * 0.3).permute(0, 2, 3, 1)).softmax(2)
        return self.after(scores).permute(0, 3, 1, 2) @ v


@case(right="head channel", truths=(by_coordinates("q", "k", ""),))
class LinearAttention(Heads):
    """Kernel features instead of a softmax."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        return q @ (k.mT @ v) / (q @ k.sum(2, keepdim=True).mT)


@case(right="channel", truths=(plain, by_coordinates("q", "k", "v", out="q")))
class ChannelAttention(Heads):
    """XCiT: attention between coordinates, a softmax over the width of a head."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((F.normalize(q, dim=2).mT @ F.normalize(k, dim=2)).softmax(-1) @ v.mT).mT


@case(right="head channel")
class SoftmaxOne(Heads):
    """A softmax that may attend to nothing."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        e = (q @ k.mT * 0.3).exp()
        return e / (1 + e.sum(-1, keepdim=True)) @ v


@case(right="head channel")
class GatedHeads(Heads):
    """A gate per head from the input."""

    def make(self) -> None:
        self.gate = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        q, k, v = self.split(self.q(h)), self.split(self.k(h)), self.split(self.v(h))
        a = self.attend(q, k, v) * self.gate(h).sigmoid().mT[..., None]
        return self.out(h + self.o(self.join(a)))


@case(truths=(plain, mean_of_kept_heads))
class MeanOfHeads(Heads):
    """Heads are averaged, so a removed head changes the mean."""

    def make(self) -> None:
        self.o = nn.Linear(6, 20)

    def join(self, t: Tensor) -> Tensor:
        return t.mean(1)


@case(truths=(plain, over("weigh", "mix", dim=(0, 1), out=None)))
class WeightedHeads(Heads):
    """A softmax over heads weighs them: soft experts again."""

    def make(self) -> None:
        self.o, self.mix = nn.Linear(6, 20), nn.Parameter(torch.randn(4))

    def weigh(self, mix: Tensor, t: Tensor) -> Tensor:
        return torch.einsum("h,bhnd->bnd", mix.softmax(0), t)

    def join(self, t: Tensor) -> Tensor:
        return self.weigh(self.mix, t)


@case()
class Differential(Heads):
    """Pairs of heads are subtracted."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        a = (q @ k.mT * 0.3).softmax(-1)
        return (a[:, ::2] - 0.4 * a[:, 1::2]).repeat_interleave(2, 1) @ v
