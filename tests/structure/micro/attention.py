"""Attention in the forms in which people write it: fused, grouped, rotary, cross, windows."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from micro.base import case, floats, several, tokens


@case(floats(2, 5, 8), free="embed attention.qkv/head attention.qkv/head_dim fc1",
      share=0.4, zeroing=False, double=True)  # fmt: skip
class VisionBlock(nn.Module):
    """ViT: fused qkv as 3 x heads x size; whole heads, sizes of q and k, sizes of v, neurons and the width."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.attention = nn.Linear(8, 24), nn.LayerNorm(24), FusedAttention(24, 4)
        self.fc1, self.fc2, self.head = nn.Linear(24, 40), nn.Linear(40, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attention(self.norm(x))
        return self.head((x + self.fc2(F.gelu(self.fc1(x)))).mean(1))


class FusedAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = heads, dim // heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        weights = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, -1))


@case(floats(2, 5, 24), free="q/head q/head_dim v/head_dim", share=0.3, zeroing=False)
class SeparateAttention(nn.Module):
    """BERT's layout: three projections, sizes as attributes, the scale computed from the tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.size = 4, 6
        self.q, self.k, self.v = (nn.Linear(24, 24) for _ in range(3))
        self.out = nn.Linear(24, 24)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.size(-1))
        return self.out(torch.matmul(scores.softmax(-1), v).transpose(1, 2).flatten(2))


@case(floats(2, 5, 24), free="q/head q/head_dim v/head_dim", share=0.3, zeroing=False)
class FusedKernelAttention(nn.Module):
    """scaled_dot_product_attention; its scale follows the size of the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.q, self.k, self.v = (nn.Linear(24, 24) for _ in range(3))
        self.out = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (p(x).view(b, n, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, n, -1))


class Grouped(nn.Module):
    """Grouped queries: 6 query heads share 2 key-value heads."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_kv, self.head_dim = 6, 2, 4
        self.q, self.out = nn.Linear(16, 24, bias=False), nn.Linear(24, 16, bias=False)
        self.k, self.v = nn.Linear(16, 8, bias=False), nn.Linear(16, 8, bias=False)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k(x).view(b, n, self.num_kv, self.head_dim).transpose(1, 2)
        return q, k, self.v(x).view(b, n, self.num_kv, self.head_dim).transpose(1, 2)


@case(floats(2, 5, 16), free="q/head q/head#2 q/head_dim", share=0.3, zeroing=False)
class RepeatedKeys(Grouped):
    """Llama's repeat_kv with expand and reshape: KV groups, or as many queries from every group."""

    def __init__(self) -> None:
        super().__init__()
        self.num_kv_groups = 3

    def repeat(self, x: Tensor) -> Tensor:
        b, h, n, d = x.shape
        return x[:, :, None].expand(b, h, self.num_kv_groups, n, d).reshape(b, h * self.num_kv_groups, n, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        weights = (q @ self.repeat(k).transpose(2, 3) / 2.0).softmax(-1)
        return self.out((weights @ self.repeat(v)).transpose(1, 2).flatten(2))


@case(floats(2, 5, 16), free="q/head q/head#2 q/head_dim", share=0.3, zeroing=False)
class InterleavedKeys(Grouped):
    """repeat_interleave of keys and values by a factor held in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = 3

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        k, v = k.repeat_interleave(self.factor, dim=1), v.repeat_interleave(self.factor, dim=1)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@case(floats(2, 5, 16), free="q/head q/head#2 q/head_dim", share=0.3, zeroing=False)
class NativeGroupedQueries(Grouped):
    """The enable_gqa flag of scaled_dot_product_attention."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.out(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))


class Rotary(nn.Module):
    """One attention layer whose queries and keys are turned by position."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 3
        self.q, self.k, self.v, self.out = (nn.Linear(24, 24, bias=False) for _ in range(4))
        angle = torch.arange(6)[:, None] * 10.0 ** -torch.linspace(0, 1, 4)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def turn(self, x: Tensor) -> Tensor:
        raise AssertionError

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (p(x).view(b, n, self.num_heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        weights = (self.turn(q) @ self.turn(k).transpose(2, 3)).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, n, -1))


@case(floats(2, 6, 24), free="q/head q/head_dim v/head_dim", share=0.3, zeroing=False)
class RotaryHalves(Rotary):
    """Halves are partners (Llama): a pair goes together, with its column of the table."""

    def turn(self, x: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        cos, sin = torch.cat([self.cos, self.cos], -1), torch.cat([self.sin, self.sin], -1)
        return x * cos + torch.cat([-high, low], -1) * sin


@case(floats(2, 6, 24), free="q/head q/head_dim v/head_dim", share=0.3, zeroing=False)
class RotaryPairs(Rotary):
    """Neighbours are partners (GPT-J), taken by a stride and put back by stack and flatten."""

    def turn(self, x: Tensor) -> Tensor:
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack([even * self.cos - odd * self.sin, even * self.sin + odd * self.cos], -1).flatten(-2)


@case(floats(2, 6, 24), free="q/head q/head_dim v/head_dim", share=0.3, zeroing=False)
class RotaryComplex(Rotary):
    """Neighbours as complex numbers (the original Llama code)."""

    def turn(self, x: Tensor) -> Tensor:
        z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(z * torch.complex(self.cos, self.sin)).flatten(-2)


@case(several(floats(2, 4, 12), floats(2, 7, 10)), free="q/head q/head_dim v/head_dim", share=0.3, zeroing=False)
class CrossAttention(nn.Module):
    """Queries from one sequence, keys and values from another, contracted by einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.q, self.k, self.v, self.out = (nn.Linear(i, o) for i, o in [(12, 18), (10, 18), (10, 18), (18, 12)])

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (self.q(x), self.k(memory), self.v(memory)))
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        return self.out(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))


class SelfAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention over itself."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x)[0]


@case(floats(2, 5, 16), free="", share=0.0, zeroing=False, locked={"in_proj_weight/head": "model's input"})
def native_attention() -> nn.Module:
    """The width of the input is heads x head size: an input that stays holds both."""
    return SelfAttention(16, 4, batch_first=True)


@case(floats(2, 5, 8), free="0/head 0 1.out_proj", share=0.3, zeroing=False)
def native_attention_inside() -> nn.Module:
    """Where the width is free it follows the heads, and the sizes of the heads."""
    return nn.Sequential(nn.Linear(8, 24), SelfAttention(24, 4, batch_first=True), nn.LayerNorm(24), nn.Linear(24, 3))


@case(floats(2, 5, 8), free="0/head 0 1.linear1 2.linear1", share=0.4, zeroing=False, double=True)
def native_encoder_layers() -> nn.Module:
    """Two nn.TransformerEncoderLayer share one width, so they share heads and sizes of heads."""
    layers = [nn.TransformerEncoderLayer(24, 4, 40, batch_first=True, dropout=0.0, norm_first=n) for n in (True, False)]
    return nn.Sequential(nn.Linear(8, 24), *layers, nn.Linear(24, 3))


@case(
    several(floats(2, 4, 12), floats(2, 7, 10)),
    free="inner/head inner memory attention.out_proj",
    share=0.3,
    zeroing=False,
)
class NativeCrossAttention(nn.Module):
    """Keys and values of another width keep that width to themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.memory, self.out = nn.Linear(12, 18), nn.Linear(10, 14), nn.Linear(18, 4)
        self.attention = nn.MultiheadAttention(18, 3, kdim=14, vdim=14, batch_first=True, add_bias_kv=True)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        memory = self.memory(memory)
        return self.out(self.attention(self.inner(x), memory, memory, need_weights=False)[0])


@case(several(floats(2, 4, 12), floats(2, 7, 12)), free="inner/head inner feed.linear1", share=0.3,
      zeroing=False)  # fmt: skip
class NativeDecoder(nn.Module):
    """nn.TransformerDecoderLayer: one packed weight serves queries of one sequence and keys of another."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(12, 18), nn.Linear(18, 4)
        self.feed = nn.TransformerDecoderLayer(18, 3, 30, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.out(self.feed(self.inner(x), self.inner(memory)))


@case(tokens(2, 6), free="tokens blocks.0.attention.qkv/head blocks.0.attention.qkv/head_dim blocks.0.up"
      " blocks.1.attention.qkv/head blocks.1.attention.qkv/head_dim blocks.1.up",
      share=0.35, zeroing=False, double=True)  # fmt: skip
class TiedLanguageModel(nn.Module):
    """Token and position embeddings, two blocks, and a head tied to the embedding: the width is one unit set."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(20, 24), nn.Embedding(8, 24)
        self.blocks, self.norm = nn.ModuleList(Block(24, 4) for _ in range(2)), nn.LayerNorm(24)
        self.head = nn.Linear(24, 20, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.LayerNorm(dim), nn.LayerNorm(dim), FusedAttention(dim, heads)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.silu(self.up(self.norm2(x))))


@case(floats(2, 8, 8, 12), free="embed attention.qkv/head attention.qkv/head_dim", share=0.3, zeroing=False)
class ShiftedWindows(nn.Module):
    """Swin: roll, partition into windows, attention, reverse, roll back."""

    def __init__(self) -> None:
        super().__init__()
        self.window, self.embed, self.attention, self.head = (
            4,
            nn.Linear(12, 18),
            FusedAttention(18, 3),
            nn.Linear(18, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, h, w, c = x.shape
        y = torch.roll(x, (-2, -2), (1, 2))
        y = y.view(b, h // self.window, self.window, w // self.window, self.window, c)
        y = self.attention(y.permute(0, 1, 3, 2, 4, 5).reshape(-1, self.window * self.window, c))
        y = y.view(b, h // self.window, w // self.window, self.window, self.window, c)
        y = torch.roll(y.permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c), (2, 2), (1, 2))
        return self.head(x + y)


@case(floats(2, 6, 16), free="gate fused wide", share=0.2, zeroing=True)
class GatedLinearUnits(nn.Module):
    """SwiGLU with two layers, and GLU from one fused layer by chunk and by F.glu."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(16, 30), nn.Linear(16, 30), nn.Linear(30, 16)
        self.fused, self.back, self.wide, self.end = (
            nn.Linear(i, o) for i, o in [(16, 24), (12, 16), (16, 20), (10, 4)]
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        value, gate = self.fused(x).chunk(2, -1)
        x = x + self.back(value * F.gelu(gate))
        return self.end(F.glu(self.wide(x), -1))


@case(floats(2, 9, 16), free="q/head q/head_dim v/head_dim", share=0.2, zeroing=False)
class LinearAttention(nn.Module):
    """Kernel feature maps: keys and values are contracted first, and heads are folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def fold(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        return x.view(b, n, self.heads, -1).permute(0, 2, 1, 3).reshape(b * self.heads, n, -1)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = F.elu(self.fold(self.q(x))) + 1, F.elu(self.fold(self.k(x))) + 1, self.fold(self.v(x))
        y = torch.bmm(q, torch.bmm(k.transpose(1, 2), v)) / torch.bmm(q, k.sum(1).unsqueeze(-1))
        return self.out(y.view(b, self.heads, n, -1).transpose(1, 2).reshape(b, n, -1))
