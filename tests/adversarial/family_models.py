"""Whole small models of words, sets, graphs and signals, as they stand in real repositories."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cases import Family, Make, both, floats, ids
from .nets import Mlp
from .references import over

family = Family("models", kinds="channel structured head", right="channel")
TOKENS = ids(30, (2, 7), (1, 1), (3, 20))


def edges(nodes: int) -> Make:
    """How near any two nodes are."""
    return lambda: torch.rand(nodes, nodes, generator=torch.Generator().manual_seed(nodes))


EDGES = [edges(nodes) for nodes in (6, 1, 9, 6)]


@family.case(TOKENS, whole="wte.weight:0 wpe.weight:0 mask:2 mask:3")
class Gpt(nn.Module):
    """Tied logits, learned positions, stored triangle, split by the width of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.n_embd, self.n_head = 16, 4
        self.wte, self.wpe = nn.Embedding(30, 16), nn.Embedding(32, 16)
        self.c_attn, self.c_proj, self.mlp = nn.Linear(16, 48), nn.Linear(16, 16), Mlp(16, 32)
        self.ln1, self.ln2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.lm_head = nn.Linear(16, 30, bias=False)
        self.lm_head.weight = self.wte.weight
        self.register_buffer("mask", torch.tril(torch.ones(32, 32)).view(1, 1, 32, 32))

    def attend(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (m.view(b, t, self.n_head, c // self.n_head).transpose(1, 2) for m in (q, k, v))
        a = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        a = a.masked_fill(self.mask[:, :, :t, :t] == 0, float("-inf")).softmax(-1)
        return self.c_proj((a @ v).transpose(1, 2).contiguous().view(b, t, c))

    def forward(self, t: Tensor) -> Tensor:
        x = self.wte(t) + self.wpe(torch.arange(t.size(1)))
        x = x + self.attend(self.ln1(x))
        return self.lm_head(x + self.mlp(self.ln2(x)))


@family.case(TOKENS, whole="words.weight:0 places.weight:0 ids:1")
class Bert(nn.Module):
    """Three embeddings, position ids in a buffer, a pooler over the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.types = nn.Embedding(30, 16), nn.Embedding(32, 16), nn.Embedding(2, 16)
        self.register_buffer("ids", torch.arange(32).expand((1, -1)))
        self.heads, self.size = 4, 4
        self.query, self.key, self.value, self.dense = (nn.Linear(16, 16) for _ in range(4))
        self.norm0, self.norm1, self.norm2, self.mlp = *(nn.LayerNorm(16) for _ in range(3)), Mlp(16, 32)
        self.pooler, self.out = nn.Linear(16, 16), nn.Linear(16, 3)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, self.size).permute(0, 2, 1, 3)

    def forward(self, t: Tensor, kinds: Tensor | None = None) -> dict[str, Tensor]:
        kinds = torch.zeros_like(t) if kinds is None else kinds
        x = self.norm0(self.words(t) + self.places(self.ids[:, : t.shape[1]]) + self.types(kinds))
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        mask = (1.0 - (t > 0).float())[:, None, None] * torch.finfo(torch.float).min
        a = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(self.size) + mask
        c = torch.matmul(a.softmax(-1), v).permute(0, 2, 1, 3).contiguous()
        x = self.norm1(x + self.dense(c.view(*c.shape[:-2], -1)))
        x = self.norm2(x + self.mlp(x))
        return {"logits": self.out(torch.tanh(self.pooler(x[:, 0])))}


@family.case(TOKENS, truths=(over("rms", "norm", dim=(-1, 0)),))
class Llama(nn.Module):
    """Grouped queries, rotary tables made in the forward, RMS norm by hand, gated units."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.groups, self.size = 4, 2, 4
        self.embed, self.norm = nn.Embedding(30, 16), nn.Parameter(torch.ones(16))
        self.q, self.k, self.v = (
            nn.Linear(16, 16, bias=False),
            nn.Linear(16, 8, bias=False),
            nn.Linear(16, 8, bias=False),
        )
        self.o, self.gate = nn.Linear(16, 16, bias=False), nn.Linear(16, 24, bias=False)
        self.up, self.down = nn.Linear(16, 24, bias=False), nn.Linear(24, 16, bias=False)
        self.head = nn.Linear(16, 30, bias=False)
        self.register_buffer("rate", 1.0 / 100 ** (torch.arange(0, 4, 2) / 4))

    def rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    def turn(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[2])[:, None] * self.rate
        cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    def forward(self, t: Tensor) -> Tensor:
        x = self.embed(t)
        b, n, _ = x.shape
        h = self.rms(x, self.norm)
        q = self.turn(self.q(h).view(b, n, self.heads, self.size).transpose(1, 2))
        k = self.turn(self.k(h).view(b, n, self.groups, self.size).transpose(1, 2))
        v = self.v(h).view(b, n, self.groups, self.size).transpose(1, 2)
        k, v = (t.repeat_interleave(self.heads // self.groups, 1) for t in (k, v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5)
        x = x + self.o(a.transpose(1, 2).reshape(b, n, -1))
        return self.head(x + self.down(F.silu(self.gate(x)) * self.up(x)))


@family.case(floats((5, 10), (1, 10), (8, 10)))
class Vae(nn.Module):
    """Mean and variance by chunk; sampling in training alone; a sum over the code is a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.code, self.dec, self.out = (
            nn.Linear(10, 24),
            nn.Linear(24, 12),
            nn.Linear(6, 24),
            nn.Linear(24, 10),
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        mean, var = self.code(self.enc(x).relu()).chunk(2, -1)
        z = mean + torch.randn_like(mean) * (0.5 * var).exp() if self.training else mean
        kl = -0.5 * (1 + var - mean.pow(2) - var.exp()).sum(-1)
        return {"x": self.out(self.dec(z).relu()), "kl": kl}


@family.case(both(floats((6, 8), (1, 8), (9, 8)), EDGES), kinds="head channel", right="head")
class GraphAttention(nn.Module):
    """Attention over neighbours by two vectors, several heads, averaged at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.size = 3, 5
        self.w, self.src, self.dst = (
            nn.Linear(8, 15, bias=False),
            nn.Parameter(torch.randn(3, 5)),
            nn.Parameter(torch.randn(3, 5)),
        )
        self.out = nn.Linear(15, 4)

    def forward(self, x: Tensor, adjacent: Tensor) -> Tensor:
        h = self.w(x).view(-1, self.heads, self.size)
        e = F.leaky_relu((h * self.src).sum(-1)[:, None] + (h * self.dst).sum(-1)[None])
        a = e.masked_fill(((adjacent < 0.4) & ~torch.eye(len(x), dtype=torch.bool))[..., None], -1e4).softmax(1)
        return self.out(torch.einsum("ijh,jhd->ihd", a, h).flatten(1))


@family.case(floats((2, 20, 3), (1, 20, 3), (3, 33, 3)))
class PointNet(nn.Module):
    """Neighbours by distance in feature space, edge features, a maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.edge, self.out = nn.Linear(3, 10), nn.Linear(20, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        near = torch.cdist(h, h).topk(5, -1, largest=False).indices
        b, n, k = near.shape
        other = h.gather(1, near.view(b, -1, 1).expand(-1, -1, h.shape[-1])).view(b, n, k, -1)
        e = torch.cat([h[:, :, None].expand_as(other), other - h[:, :, None]], -1)
        return self.out(self.edge(e).relu().amax((1, 2)))


@family.case(floats((4, 3), (1, 3), (9, 3)))
class RadianceField(nn.Module):
    """Frequencies of the input, a skip in the middle, colours and density."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(27, 24), nn.Linear(24, 24), nn.Linear(24 + 27, 24)])
        self.sigma, self.rgb = nn.Linear(24, 1), nn.Linear(24, 3)
        self.register_buffer("bands", 2.0 ** torch.arange(4))

    def forward(self, p: Tensor) -> Tensor:
        angle = (p[..., None] * self.bands).flatten(1)
        e = torch.cat([p, angle.sin(), angle.cos()], -1)
        h = e
        for i, layer in enumerate(self.layers):
            if i == 2:
                h = torch.cat([h, e], -1)
            h = layer(h).relu()
        return torch.cat([self.rgb(h).sigmoid(), self.sigma(h)], -1)


@family.case(floats((2, 40), (1, 40), (2, 80)))
class WaveNet(nn.Module):
    """Dilated gated convolutions with skips that are summed."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.res, self.skip = nn.Conv1d(1, 12, 1), nn.ModuleList(), nn.ModuleList()
        self.gates = nn.ModuleList([nn.Conv1d(12, 24, 2, dilation=2**i) for i in range(3)])
        for _ in range(3):
            self.res.append(nn.Conv1d(12, 12, 1))
            self.skip.append(nn.Conv1d(12, 16, 1))
        self.out = nn.Conv1d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h, total = self.start(x[:, None]), 0
        for i, (gate, res, skip) in enumerate(zip(self.gates, self.res, self.skip, strict=True)):
            a, b = gate(F.pad(h, (2**i, 0))).chunk(2, 1)
            y = a.tanh() * b.sigmoid()
            total, h = total + skip(y), h + res(y)
        return self.out(total.relu())


@family.case(both(ids(20, (2, 6), (1, 2), (3, 9)), ids(20, (2, 5), (1, 1), (3, 8))))
class Translator(nn.Module):
    """Encoder and decoder out of torch's own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.net = nn.Transformer(16, 2, 1, 1, 24, dropout=0.0, batch_first=True)
        self.out = nn.Linear(16, 20)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.out(self.net(self.embed(source), self.embed(target), tgt_mask=mask))


@family.case(floats((2, 6, 16), (1, 1, 16), (3, 17, 16)))
class TorchEncoder(nn.Module):
    """nn.TransformerEncoder, which has a fast path in eval and another in train mode."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True, norm_first=True)
        self.net, self.out = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.net(x).mean(1))


@family.case(floats((3, 2, 10), (1, 2, 10), (4, 2, 10)))
class Siamese(nn.Module):
    """Two views through one network, their distance by coordinates, and a stopped gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(10, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 12))
        self.predict = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 12))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.body(x[:, 0]), self.body(x[:, 1])
        return -F.cosine_similarity(self.predict(a), b.detach(), dim=-1)


@family.case(floats((4, 12), (1, 12), (7, 12)))
class FactorisationMachine(nn.Module):
    """Pairs of fields by their inner products in the upper triangle."""

    def __init__(self) -> None:
        super().__init__()
        self.fields, self.deep, self.out = nn.Linear(3, 10), nn.Linear(40, 20), nn.Linear(26, 1)
        self.register_buffer("pairs", torch.triu_indices(4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        e = self.fields(x.view(len(x), 4, 3))
        inner = (e @ e.mT)[:, self.pairs[0], self.pairs[1]]
        return self.out(torch.cat([self.deep(e.flatten(1)).relu(), inner], 1))
