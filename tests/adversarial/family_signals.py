"""Small whole networks for rays, waves, long sequences and pairs of pictures."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cases import Family, both, fixed, floats, ids
from .family_whole import sines
from .references import Kept, over, put

family = Family("signals")
IMAGES = floats((2, 3, 16, 16), (1, 3, 16, 16), (3, 3, 24, 16))
STEPS = floats((2, 6, 8), (1, 1, 8), (3, 17, 8))
WAVES = floats((2, 2, 24), (1, 2, 9), (3, 2, 40))
TOKENS = ids(20, (2, 6), (1, 1), (3, 17))


def case(inputs: Any = STEPS, **options: Any) -> Any:
    return family.case(inputs, **options)


@case(both(floats((5, 4, 3), (1, 1, 3), (2, 9, 3)), floats((5, 3), (1, 3), (2, 3))))
class VolumeRendering(nn.Module):
    """Encoded points, a skip in the middle, density beside colour, transmittance by a cumulative product."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bands", 2.0 ** torch.arange(4))
        self.layers = nn.ModuleList([nn.Linear(27, 20), nn.Linear(20, 20), nn.Linear(47, 20), nn.Linear(20, 20)])
        self.sigma, self.feature = nn.Linear(20, 1), nn.Linear(20, 16)
        self.view, self.colour = nn.Linear(16 + 27, 12), nn.Linear(12, 3)

    def encode(self, x: Tensor) -> Tensor:
        return torch.cat([x] + [f(x * b) for b in self.bands for f in (torch.sin, torch.cos)], -1)

    def forward(self, points: Tensor, rays: Tensor) -> tuple[Tensor, Tensor]:
        e = self.encode(points)
        h = e
        for number, layer in enumerate(self.layers):
            h = layer(torch.cat([e, h], -1) if number == 2 else h).relu()
        alpha = 1 - torch.exp(-self.sigma(h).relu().squeeze(-1) * 0.3)
        ones = torch.ones_like(alpha[:, :1])
        weight = alpha * torch.cumprod(torch.cat([ones, 1 - alpha + 1e-10], -1), -1)[:, :-1]
        d = self.encode(F.normalize(rays, dim=-1))[:, None].expand(-1, points.shape[1], -1)
        rgb = self.colour(self.view(torch.cat([self.feature(h), d], -1)).relu()).sigmoid()
        return (weight[..., None] * rgb).sum(1), weight


@case(both(WAVES, fixed(*(torch.tensor(v) for v in ([1, 0], [2], [0, 1, 2], [2, 2])))))
class ConditionedWaveNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.speaker = nn.Conv1d(2, 12, 1), nn.Embedding(3, 6)
        self.dilated = nn.ModuleList(nn.Conv1d(12, 24, 2, dilation=2**i, padding=2**i) for i in range(3))
        self.condition = nn.ModuleList(nn.Conv1d(6, 24, 1) for _ in range(3))
        self.both = nn.ModuleList(nn.Conv1d(12, 12 + 10, 1) for _ in range(3))
        self.end = nn.Sequential(nn.ReLU(), nn.Conv1d(10, 8, 1), nn.ReLU(), nn.Conv1d(8, 5, 1))

    def forward(self, x: Tensor, who: Tensor) -> Tensor:
        h, g, skips = self.first(x), self.speaker(who)[:, :, None], 0
        for dilated, condition, both_ in zip(self.dilated, self.condition, self.both, strict=True):
            a = dilated(h)[..., : h.shape[-1]] + condition(g)
            out = both_(a[:, : a.shape[1] // 2].tanh() * a[:, a.shape[1] // 2 :].sigmoid())
            h, skips = (h + out[:, :12]) * math.sqrt(0.5), skips + out[:, 12:]
        return self.end(skips)


@case(both(TOKENS, floats((2, 4, 12), (1, 2, 12), (3, 5, 12))), kinds="channel head")
class TransformerXl(nn.Module):
    """The memory of hidden states comes in and goes out: its width is the caller's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.qkv, self.r, self.o = nn.Linear(12, 36, bias=False), nn.Linear(12, 12, bias=False), nn.Linear(12, 12)
        self.u, self.v = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3, 4))
        self.ff, self.back, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 20)

    @staticmethod
    def shift(x: Tensor) -> Tensor:
        b, h, q, k = x.shape
        return F.pad(x, (1, 0)).view(b, h, k + 1, q)[:, :, 1:].view(b, h, q, k)

    def forward(self, tokens: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        h = self.embed(tokens)
        c = torch.cat([memory, h], 1)
        q, k, v = self.qkv(c).chunk(3, -1)
        q, k, v = q[:, -h.shape[1] :].unflatten(-1, (3, 4)), k.unflatten(-1, (3, 4)), v.unflatten(-1, (3, 4))
        r = self.r(sines(torch.arange(c.shape[1] - 1, -1, -1.0), 12)).unflatten(-1, (3, 4))
        ac = torch.einsum("bihd,bjhd->bhij", q + self.u, k)
        bd = self.shift(torch.einsum("bihd,jhd->bhij", q + self.v, r))
        mask = torch.ones(h.shape[1], c.shape[1], dtype=torch.bool).triu(1 + memory.shape[1])
        a = ((ac + bd) * 0.5).masked_fill(mask, -1e9).softmax(-1)
        h = h + self.o(torch.einsum("bhij,bjhd->bihd", a, v).flatten(2))
        h = h + self.back(self.ff(h).relu())
        return self.head(h), torch.cat([memory, h.detach()], 1)[:, -4:]


@case(kinds="channel head")
class RetNetLike(nn.Module):
    """Rotated keys, a decay per head by its number, group norm over heads, a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.g = (nn.Linear(8, 16) for _ in range(4))
        self.o, self.norm = nn.Linear(16, 3), nn.GroupNorm(4, 16)
        self.register_buffer("decay", torch.log(1 - 2.0 ** (-2 - torch.arange(4.0))))

    def rotate(self, t: Tensor) -> Tensor:
        return torch.stack([-t[..., 1::2], t[..., ::2]], -1).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        angle = torch.arange(n)[:, None] * torch.tensor([1.0, 0.1]).repeat_interleave(2)
        q, k, v = (p(x).view(b, n, 4, 4).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = (t * angle.cos() + self.rotate(t) * angle.sin() for t in (q, k))
        place = torch.arange(n)
        apart = place[:, None] - place
        mask = torch.where(apart >= 0, torch.exp(self.decay[:, None, None] * apart), 0.0)
        mask = mask / mask.sum(-1, keepdim=True).sqrt()
        y = (q @ k.transpose(-1, -2) * mask) @ v
        y = self.norm(y.transpose(1, 2).reshape(b * n, 16)).view(b, n, 16)
        return self.o(F.silu(self.g(x)) * y)


@case(both(IMAGES, floats((2, 5), (1, 5), (3, 5))))
class FilmLayers(nn.Module):
    """One projection makes scale and shift of all blocks; it is cut into pieces by number."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(12, 12, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(12, affine=False) for _ in range(3))
        self.film, self.head = nn.Linear(5, 3 * 2 * 12), nn.Linear(12, 3)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h, film = self.stem(x), self.film(condition).view(len(x), 3, 2, 12)
        for i, (conv, norm) in enumerate(zip(self.blocks, self.norms, strict=True)):
            gamma, beta = film[:, i, 0, :, None, None], film[:, i, 1, :, None, None]
            h = h + (norm(conv(h)) * (1 + gamma) + beta).relu()
        return self.head(h.amax((2, 3)))


@case()
class HyperConnections(nn.Module):
    """Four residual streams, mixed by learned and by dynamic weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 12), nn.Linear(12, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12)) for _ in range(2))
        self.alpha = nn.ParameterList(torch.randn(4, 5) for _ in range(2))
        self.beta = nn.ParameterList(torch.rand(4) for _ in range(2))
        self.dynamic = nn.ModuleList(nn.Linear(12, 5, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).unsqueeze(2).repeat(1, 1, 4, 1)
        for i, block in enumerate(self.blocks):
            alpha = self.alpha[i] + 0.1 * self.dynamic[i](h.tanh()).tanh()
            mixed = alpha.transpose(-1, -2) @ h
            h = mixed[..., 1:, :] + self.beta[i][:, None] * block(mixed[..., 0, :]).unsqueeze(2)
        return self.head(h.sum(2))


@case(IMAGES)
class TiedConvAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3, 2, 1), nn.Conv2d(12, 16, 3, 2, 1)
        self.da, self.db = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x).relu()).relu()
        h = F.conv_transpose2d(h, self.b.weight, self.db, 2, 1, output_padding=1).relu()
        return F.conv_transpose2d(h, self.a.weight, self.da, 2, 1, output_padding=1)


@case(both(IMAGES, [*IMAGES[3:], *IMAGES[1:3], *IMAGES[:1]]))
class SiameseWithHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 1))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        a, b = (self.body(t).mean((2, 3)) for t in (x, y))
        return self.head(torch.cat([a, b, (a - b).abs(), a * b], 1)), (a - b).square().sum(1)


@case(floats((4, 3, 16, 16), (2, 3, 16, 16), (6, 3, 16, 16)), truths=(over("spread", "b.weight", dim=2, out=None),))
class MinibatchSpread(nn.Module):
    """The spread over the batch, a mean over channels and space, as one more channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3, 2, 1), nn.Conv2d(12, 16, 3, 2, 1)
        self.c, self.head = nn.Conv2d(17, 12, 3, padding=1), nn.Linear(12 * 16, 1)

    def spread(self, y: Tensor) -> Tensor:
        return (y.var(0, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3), keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.b(F.leaky_relu(self.a(x), 0.2)), 0.2)
        g = min(2, len(h))
        y = self.spread(h.view(g, -1, *h.shape[1:]))
        h = torch.cat([h, y.repeat(g, 1, *h.shape[2:])], 1)
        return self.head(F.leaky_relu(self.c(h), 0.2).flatten(1))


def spread_of_kept(model: nn.Module, kept: Kept) -> None:
    index, inner = (kept("a.weight") % 4).unique(), model.spread
    put(model, "spread", lambda y: inner(y[:, :, :, index]))


@case(floats((4, 3, 16, 16), (2, 3, 16, 16)), truths=(spread_of_kept,))
class MinibatchSpreadOfFeatures(nn.Module):
    """The same with groups of features, each with its own channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(20, 12, 3, 2, 1), nn.Linear(12, 1)

    def spread(self, y: Tensor) -> Tensor:
        return (y - y.mean(0)).square().mean(0).add(1e-8).sqrt().mean((2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.a(x), 0.2)
        _n, c, height, width = h.shape
        y = self.spread(h.reshape(2, -1, 4, c // 4, height, width))
        y = y.reshape(-1, 4, 1, 1).repeat(2, 1, height, width)
        return self.head(self.b(torch.cat([h, y], 1)).relu().mean((2, 3)))
