"""Orders of axes: heads before coordinates or behind, pieces in turns or in a row, cubes, halves of halves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cases import Family, floats
from .references import Kept, plain, put

family = Family("layouts", kinds="head head_dim channel")
S = floats((2, 6, 16), (1, 1, 16), (3, 17, 16))


def case(inputs: Any = S, **options: Any) -> Any:
    return family.case(inputs, **options)


class Fused(nn.Module):
    """One projection for all; `pieces` makes queries, keys and values [batch, heads, steps, size]."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.size = 4, 6
        self.stem, self.qkv, self.proj, self.out = (
            nn.Linear(16, 20),
            nn.Linear(20, 72),
            nn.Linear(24, 20),
            nn.Linear(20, 3),
        )
        with torch.no_grad():
            self.qkv.weight.mul_(3)
            self.proj.weight.mul_(3)

    def pieces(self, t: Tensor) -> tuple[Tensor, ...]:
        b, n, _ = t.shape
        return t.view(b, n, 3, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)

    def join(self, t: Tensor) -> Tensor:
        return t.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        q, k, v = self.pieces(self.qkv(h))
        return self.out((h + self.proj(self.join((q @ k.mT * 0.3).softmax(-1) @ v))).tanh())


@case(right="head head_dim channel")
class PieceHeadSize(Fused):
    """Three, heads, size: timm."""


@case(right="head head_dim channel")
class HeadPieceSize(Fused):
    """Heads, three, size: GPT-NeoX."""

    def pieces(self, t: Tensor) -> tuple[Tensor, ...]:
        return t.view(*t.shape[:2], self.heads, 3 * self.size).transpose(1, 2).chunk(3, -1)


@case(right="head channel")
class HeadSizePiece(Fused):
    """Heads, size, three: the pieces are interleaved."""

    def pieces(self, t: Tensor) -> tuple[Tensor, ...]:
        return t.view(*t.shape[:2], self.heads, self.size, 3).transpose(1, 2).unbind(-1)


@case(right="head channel")
class SizeHeadPiece(Fused):
    """Size before heads."""

    def pieces(self, t: Tensor) -> tuple[Tensor, ...]:
        return t.view(*t.shape[:2], 3, self.size, self.heads).permute(2, 0, 4, 1, 3).unbind(0)

    def join(self, t: Tensor) -> Tensor:
        return t.permute(0, 2, 3, 1).flatten(2)


@case()
class JoinedTheOtherWay(Fused):
    """Heads are split before sizes and joined behind them."""

    def join(self, t: Tensor) -> Tensor:
        return t.permute(0, 2, 3, 1).flatten(2)


@case()
class JoinedWithoutTranspose(Fused):
    """The famous mistake: a view without the transpose mixes heads and steps."""

    def join(self, t: Tensor) -> Tensor:
        return t.contiguous().view(t.shape[0], t.shape[2], -1)


@case()
class SplitThenChunk(Fused):
    """Chunks of a chunk."""

    def pieces(self, t: Tensor) -> tuple[Tensor, ...]:
        q, kv = t.split([24, 48], -1)
        k, v = kv.chunk(2, -1)
        return tuple(p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (q, k, v))


@case()
class ValuesFirst(Fused):
    """Queries and values change places by a flip over the pieces."""

    def pieces(self, t: Tensor) -> tuple[Tensor, ...]:
        return t.view(*t.shape[:2], 3, self.heads, self.size).flip(2).permute(2, 0, 3, 1, 4).unbind(0)


@case()
class HeadsRolled(Fused):
    """Queries of a head meet keys of the next."""

    def pieces(self, t: Tensor) -> tuple[Tensor, ...]:
        q, k, v = super().pieces(t)
        return q, k.roll(1, 1), v


@case()
class HeadsPaired(Fused):
    """Neighbouring heads share their keys' mean."""

    def pieces(self, t: Tensor) -> tuple[Tensor, ...]:
        q, k, v = super().pieces(t)
        k = k.unflatten(1, (-1, 2)).mean(2).repeat_interleave(2, 1)
        return q, k, v


@case()
class HeadsInTwoKinds(Fused):
    """The first half of the heads is causal."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        q, k, v = self.pieces(self.qkv(h))
        scores, n = q @ k.mT * 0.3, x.shape[1]
        mask = torch.zeros(self.heads, n, n)
        mask[: self.heads // 2] = torch.full((n, n), -1e4).triu(1)
        return self.out((h + self.proj(self.join((scores + mask).softmax(-1) @ v))).tanh())


@case(right="head channel")
class EinsumWeights(nn.Module):
    """Projections as cubes: [width, heads, size]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Linear(16, 20), nn.Linear(20, 3)
        self.q, self.k, self.v = (nn.Parameter(torch.randn(20, 4, 6) / 3) for _ in range(3))
        self.o = nn.Parameter(torch.randn(4, 6, 20) / 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        q, k, v = (torch.einsum("bnc,chd->bhnd", h, w) for w in (self.q, self.k, self.v))
        a = torch.einsum("bhnd,bhmd->bhnm", q, k).mul(0.3).softmax(-1)
        return self.out((h + torch.einsum("bhnm,bhmd,hdc->bnc", a, v, self.o)).tanh())


@case(right="head")
class GroupedByExpand(nn.Module):
    """Six query heads over two key heads, by expand and reshape."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(16, 36), nn.Linear(16, 12), nn.Linear(16, 12), nn.Linear(36, 3)
        self.heads, self.groups, self.size = 6, 2, 6

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, self.size).transpose(1, 2)
        k, v = (f(x).view(b, n, self.groups, self.size).transpose(1, 2) for f in (self.k, self.v))
        many = self.heads // self.groups
        k, v = (t[:, :, None].expand(-1, -1, many, -1, -1).reshape(b, self.heads, n, self.size) for t in (k, v))
        return self.o(((q @ k.mT * 0.3).softmax(-1) @ v).transpose(1, 2).flatten(2))


@case(right="head")
class GroupedByRepeat(GroupedByExpand):
    """The same, tiled instead of interleaved: query head one meets key head one, two meets zero."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, self.size).transpose(1, 2)
        k, v = (f(x).view(b, n, self.groups, self.size).transpose(1, 2) for f in (self.k, self.v))
        k, v = (t.repeat(1, self.heads // self.groups, 1, 1) for t in (k, v))
        return self.o(((q @ k.mT * 0.3).softmax(-1) @ v).transpose(1, 2).flatten(2))


@case(right="head")
class OneKeyForAll(nn.Module):
    """Multi-query: all heads share one key and one value."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(16, 24), nn.Linear(16, 12), nn.Linear(24, 3)
        self.heads = 4

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(x)[:, None].chunk(2, -1)
        return self.o(((q @ k.mT * 0.3).softmax(-1) @ v).transpose(1, 2).flatten(2))


@case(right="head channel")
class SharedQueryKey(Fused):
    """Queries are keys."""

    def pieces(self, t: Tensor) -> tuple[Tensor, ...]:
        q, _, v = super().pieces(t)
        return q, F.normalize(q, dim=-1), v


@case(right="head")
class LatentKeys(nn.Module):
    """Keys and values through a narrow latent; a part of each head turns with the position."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.nope, self.rope = 3, 4, 2
        self.q, self.down = nn.Linear(16, 18), nn.Linear(16, 8 + 2)
        self.norm, self.up, self.o = nn.LayerNorm(8), nn.Linear(8, 3 * (4 + 5)), nn.Linear(15, 3)

    def turn(self, t: Tensor) -> Tensor:
        angle = torch.arange(t.shape[-2])[:, None] * torch.tensor([1.0])
        a, b = t.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, -1).transpose(1, 2)
        qn, qr = q.split([self.nope, self.rope], -1)
        c, kr = self.down(x).split([8, self.rope], -1)
        kn, v = self.up(self.norm(c)).view(b, n, self.heads, -1).transpose(1, 2).split([self.nope, 5], -1)
        scores = qn @ kn.mT + self.turn(qr) @ self.turn(kr[:, None]).mT
        return self.o((scores * 0.3).softmax(-1).matmul(v).transpose(1, 2).flatten(2))


@case(right="head channel")
class NormPerHead(Fused):
    """A group norm over what every head gives (retention, sub-layer norms)."""

    def __init__(self) -> None:
        super().__init__()
        self.sub = nn.GroupNorm(4, 24)

    def join(self, t: Tensor) -> Tensor:
        y = t.transpose(1, 2).flatten(2)
        return self.sub(y.flatten(0, 1)).view_as(y)


@case()
class ConvolutionOverHeads(Fused):
    """Heads are channels of a convolution over the score map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        q, k, v = self.pieces(self.qkv(h))
        return self.out((h + self.proj(self.join(self.conv(q @ k.mT * 0.3).softmax(-1) @ v))).tanh())


@case(right="head channel")
class DepthwiseOnValues(Fused):
    """A depthwise convolution over steps of the values, added (LePE)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(24, 24, 3, padding=1, groups=24)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        q, k, v = self.pieces(self.qkv(h))
        a = self.join((q @ k.mT * 0.3).softmax(-1) @ v) + self.conv(self.join(v).mT).mT
        return self.out((h + self.proj(a)).tanh())


@case()
class RelativeShift(Fused):
    """Transformer-XL: scores against distances, shifted by a padding and a view."""

    def __init__(self) -> None:
        super().__init__()
        self.r, self.u = nn.Parameter(torch.randn(24, 40)), nn.Parameter(torch.randn(4, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        h, n = self.stem(x), x.shape[1]
        q, k, v = self.pieces(self.qkv(h))
        far = q @ self.r.view(self.heads, self.size, 40)[..., :n]
        far = F.pad(far, (1, 0)).view(*far.shape[:2], n + 1, n)[:, :, 1:].reshape_as(far)
        return self.out((h + self.proj(self.join((((q + self.u) @ k.mT + far) * 0.3).softmax(-1) @ v))).tanh())


@case(right="head channel")
class CrossAttention(nn.Module):
    """Queries from one width, keys from another, values wider than keys."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 10), nn.Linear(16, 14)
        self.q, self.k, self.v, self.o = nn.Linear(10, 12), nn.Linear(14, 12), nn.Linear(14, 20), nn.Linear(20, 3)
        self.heads = 4

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(self.a(x)), self.k(self.b(x.flip(1))), self.v(self.b(x.flip(1)))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        return self.o(((q @ k.mT * 0.4).softmax(-1) @ v).transpose(1, 2).flatten(2))


@case(right="head")
class TorchAttention(nn.Module):
    """nn.MultiheadAttention with a bias on keys and a zero key."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Linear(16, 20), nn.Linear(20, 3)
        self.attention = nn.MultiheadAttention(20, 4, add_bias_kv=True, add_zero_attn=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.out(h + self.attention(h, h, h, need_weights=False)[0])


def weights_of_kept_heads(model: nn.Module, kept: Kept) -> None:
    """The mean of the weights runs over heads that are there."""
    inner, rows = model.attention, kept("attention.in_proj_weight")
    heads = (rows[rows < 20] // 5).unique()

    def attention(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        y, w = inner(*inputs, average_attn_weights=False)
        return y, w[:, heads].mean(1)

    put(model, "attention", attention)


@case(right="head", truths=(plain, weights_of_kept_heads))
class TorchAttentionWeights(TorchAttention):
    """The mean of the heads' weights comes out."""

    def forward(self, x: Tensor) -> Any:
        h = self.stem(x)
        y, w = self.attention(h, h, h)
        return self.out(h + y), w
