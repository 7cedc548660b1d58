"""Published parts that mix positions or features their own way: pairs, spectra, states, depth."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cases import Family, both, floats, ids
from .references import over
from .shared import IMAGES, STEPS, TOKENS, mlp

family = Family("mixers")


def case(inputs: Any = STEPS, **options: Any) -> Any:
    return family.case(inputs, **options)


@case(floats((2, 5, 5, 6), (1, 1, 1, 6), (2, 7, 7, 6)))
class PairUpdates(nn.Module):
    """Triangle multiplication and an outer product mean."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(6), nn.Linear(6, 20), nn.Linear(6, 20)
        self.g, self.after, self.out = nn.Linear(6, 6), nn.LayerNorm(10), nn.Linear(10, 6)
        self.left, self.right, self.outer = nn.Linear(6, 5), nn.Linear(6, 4), nn.Linear(20, 6)

    def forward(self, z: Tensor) -> Tensor:
        n = self.norm(z)
        a, ga = self.a(n).chunk(2, -1)
        b, gb = self.b(n).chunk(2, -1)
        t = torch.einsum("bikc,bjkc->bijc", a * ga.sigmoid(), b * gb.sigmoid())
        z = z + self.out(self.after(t)) * self.g(n).sigmoid()
        left, right = self.left(z), self.right(z)
        outer = torch.einsum("bsic,bsjd->bijcd", left, right) / z.shape[1]
        return z + self.outer(outer.flatten(-2))


@case(floats((2, 1, 60), (1, 1, 40), (3, 1, 90)))
class QuantisedSpeech(nn.Module):
    """Groups of code words, each chosen by its slice of the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv1d(1, 12, 5, 2), nn.GroupNorm(12, 12), nn.Conv1d(12, 16, 3, 2)
        self.weight_proj, self.codevectors = nn.Linear(16, 2 * 6), nn.Parameter(torch.rand(1, 12, 5))
        self.project = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.conv2(F.gelu(self.norm(self.conv1(x)))).transpose(1, 2)
        b, t, _ = h.shape
        scores = self.weight_proj(h).view(b * t * 2, 6)
        hard = F.one_hot(scores.argmax(-1), 6).float()
        soft = scores.softmax(-1)
        probs = (hard - soft.detach() + soft).view(b * t, -1)
        perplexity = torch.exp(-(soft.view(b * t, 2, 6).mean(0) * soft.view(b * t, 2, 6).mean(0).log()).sum(-1)).sum()
        words = (probs.unsqueeze(-1) * self.codevectors).view(b * t, 2, 6, 5).sum(-2)
        return self.project(words.view(b, t, -1)), perplexity


@case(both(floats((4, 5), (1, 5), (3, 5)), ids(9, (4, 3), (1, 3), (3, 3))))
class PairsOfFeatures(nn.Module):
    """Dot products of all pairs of tables, taken from the lower triangle, beside a bottom network."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom, self.tables = mlp(5, 16, 8), nn.ModuleList(nn.Embedding(9, 8) for _ in range(3))
        self.top = mlp(8 + 6, 16, 1)

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        d = self.bottom(dense)
        rows = torch.stack([d, *(t(sparse[:, i]) for i, t in enumerate(self.tables))], 1)
        pairs = rows @ rows.mT
        i, j = torch.tril_indices(4, 4, -1)
        return self.top(torch.cat([d, pairs[:, i, j]], 1))


@case(both(ids(9, (4, 3), (1, 3), (3, 3))), truths=(over("total", "table.weight", of=1, out=None),))
class CompressedInteraction(nn.Module):
    """Products of all pairs of field maps, in one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 8)
        self.c1, self.c2 = nn.Conv1d(9, 12, 1), nn.Conv1d(36, 10, 1)
        self.head = nn.Linear(12 + 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        e = self.table(x)
        h1 = self.c1((e[:, :, None] * e[:, None]).flatten(1, 2)).relu()
        h2 = self.c2((h1[:, :, None] * e[:, None]).flatten(1, 2)).relu()
        return self.head(torch.cat([self.total(h1), self.total(h2)], 1))

    def total(self, h: Tensor) -> Tensor:
        return h.sum(-1)


@case()
class ImplicitLongConvolution(nn.Module):
    """A filter from positions, applied by the Fourier transform over time, with a window per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.short = nn.Linear(8, 36), nn.Conv1d(36, 36, 3, padding=2, groups=36)
        self.filter = mlp(3, 16, 12)
        self.register_buffer("deltas", torch.linspace(0.3, 1.5, 12))
        self.bias, self.out = nn.Parameter(torch.randn(12)), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        u = self.short(self.project(x).transpose(1, 2))[..., :n]
        a, b, v = u.split(12, 1)
        t = torch.linspace(0, 1, n)[:, None]
        k = (self.filter(torch.cat([t, (6 * t).sin(), (6 * t).cos()], -1)) * torch.exp(-t * self.deltas)).t()
        v = v * b
        y = torch.fft.irfft(torch.fft.rfft(k, 2 * n) * torch.fft.rfft(v, 2 * n), 2 * n)[..., :n]
        return self.out(((y + v * self.bias[:, None]) * a).transpose(1, 2))


@case()
class DiagonalStates(nn.Module):
    """A kernel of complex exponentials, as in diagonal state spaces."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.log_dt = nn.Linear(8, 12), nn.Parameter(torch.rand(12) - 3)
        self.a_real, self.a_imag = nn.Parameter(torch.rand(12, 4).log()), nn.Parameter(torch.arange(4.0).repeat(12, 1))
        self.c, self.d = nn.Parameter(torch.randn(12, 4, 2)), nn.Parameter(torch.randn(12))
        self.mix, self.out = nn.Conv1d(12, 24, 1), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        u, n = self.stem(x).transpose(1, 2), x.shape[1]
        dt, c = self.log_dt.exp(), torch.view_as_complex(self.c)
        a = -self.a_real.exp() + 1j * math.pi * self.a_imag
        da = a * dt[:, None]
        c = c * (torch.exp(da) - 1) / a
        k = 2 * torch.einsum("hn,hnl->hl", c, torch.exp(da[..., None] * torch.arange(n))).real
        y = torch.fft.irfft(torch.fft.rfft(u, 2 * n) * torch.fft.rfft(k, 2 * n), 2 * n)[..., :n] + u * self.d[:, None]
        return self.out(F.glu(self.mix(F.gelu(y)), 1).transpose(1, 2))


@case(TOKENS)
class FourierMixing(nn.Module):
    """A transform over tokens and over features."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.ff, self.out = (
            nn.Embedding(20, 16),
            nn.LayerNorm(16),
            mlp(16, 32, 16),
            nn.Linear(16, 3),
        )

    def forward(self, t: Tensor) -> Tensor:
        h = self.embed(t)
        h = self.norm(h + torch.fft.fft(torch.fft.fft(h, dim=-1), dim=-2).real)
        return self.out(h + self.ff(h))


@case(IMAGES)
class SelectiveKernels(nn.Module):
    """A softmax over branches, for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = (
            nn.Conv2d(3, 12, 3),
            nn.Conv2d(12, 16, 3, padding=1),
            nn.Conv2d(12, 16, 3, padding=2, dilation=2),
        )
        self.squeeze, self.excite = nn.Linear(16, 8), nn.Linear(8, 32)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).relu()
        u = torch.stack([self.a(h).relu(), self.b(h).relu()], 1)
        z = self.squeeze(u.sum(1).mean((2, 3))).relu()
        w = self.excite(z).view(len(x), 2, -1).softmax(1)
        return self.head((u * w[..., None, None]).sum(1).mean((2, 3)))


@case(IMAGES)
class ReversibleHalves(nn.Module):
    """Two streams of half the channels; their inverse is checked by the model."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.f, self.g = (
            nn.Conv2d(3, 16, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1),
        )
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.stem(x).chunk(2, 1)
        c = a + self.f(b.relu())
        d = b + self.g(c.relu())
        back = d - self.g(c.relu())
        return self.head(torch.cat([c, d], 1).mean((2, 3))), (back - b).abs().amax().round()


@case(IMAGES)
class PositiveAndNegative(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 10, 3), nn.Conv2d(20, 12, 3), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h = self.b(torch.cat([h, -h], 1).relu())
        return self.head(torch.stack([h, -h], 2).flatten(1, 2).relu().mean((2, 3)))


@case(IMAGES)
class LocalResponse(nn.Module):
    """Neighbours in the order of channels normalise each other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 12, 3), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(F.local_response_norm(self.a(x).relu(), 5, alpha=1.0)).relu().mean((2, 3)))


@case()
class MixtureOfDepths(nn.Module):
    """Half of the tokens go through the block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.router, self.block, self.head = (
            nn.Linear(8, 12),
            nn.Linear(12, 1),
            mlp(12, 24, 12),
            nn.Linear(12, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        score = self.router(h).squeeze(-1)
        weight, index = score.topk(max(1, x.shape[1] // 2), -1)
        index = index.sort(-1)[0]
        weight = score.gather(1, index)
        place = index[..., None].expand(-1, -1, h.shape[-1])
        return self.head(h.scatter_add(1, place, self.block(h.gather(1, place)) * weight.sigmoid()[..., None]))


@case()
class AdaptiveHalting(nn.Module):
    """Steps until all positions have halted."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.step, self.halt, self.head = (
            nn.Linear(8, 12),
            mlp(12, 24, 12),
            nn.Linear(12, 1),
            nn.Linear(12, 3),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.embed(x)
        total, out, n = torch.zeros(x.shape[:2]), torch.zeros_like(h), torch.zeros(x.shape[:2])
        for _ in range(6):
            if bool((total >= 0.99).all()):
                break
            p = self.halt(h).sigmoid().squeeze(-1)
            p = torch.where(total + p > 0.99, 1 - total, p) * (total < 0.99)
            total, n = total + p, n + (p > 0)
            h = h + self.step(h).tanh()
            out = out + p[..., None] * h
        return self.head(out), n


@case(train=False)
class NeuralTuringHead(nn.Module):
    """Content addressing by cosine, a shift by circular convolution, a sharpened weight, erase and add."""

    def __init__(self) -> None:
        super().__init__()
        self.controller, self.start = nn.LSTMCell(8 + 6, 14), nn.Parameter(torch.randn(5, 6))
        self.key, self.strength, self.gate = nn.Linear(14, 6), nn.Linear(14, 1), nn.Linear(14, 1)
        self.shift, self.sharp = nn.Linear(14, 3), nn.Linear(14, 1)
        self.erase, self.add, self.out = nn.Linear(14, 6), nn.Linear(14, 6), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        b = len(x)
        memory, w, read = self.start.repeat(b, 1, 1), torch.full((b, 5), 0.2), torch.zeros(b, 6)
        h, c, outs = torch.zeros(b, 14), torch.zeros(b, 14), []
        for t in range(x.shape[1]):
            h, c = self.controller(torch.cat([x[:, t], read], 1), (h, c))
            content = F.cosine_similarity(memory, self.key(h)[:, None], dim=-1)
            content = (F.softplus(self.strength(h)) * content).softmax(-1)
            g = self.gate(h).sigmoid()
            w = g * content + (1 - g) * w
            s = self.shift(h).softmax(-1)
            w = sum(w.roll(i - 1, 1) * s[:, i : i + 1] for i in range(3))
            w = w ** (1 + F.softplus(self.sharp(h)))
            w = w / w.sum(-1, keepdim=True)
            memory = (
                memory * (1 - w[..., None] * self.erase(h).sigmoid()[:, None]) + w[..., None] * self.add(h)[:, None]
            )
            read = (w[..., None] * memory).sum(1)
            outs.append(self.out(torch.cat([h, read], 1)))
        return torch.stack(outs, 1)
