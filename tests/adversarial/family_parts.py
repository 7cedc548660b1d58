"""Published parts in which a number, a name or a neighbour decides: twins, adapters, caches, codes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cases import Family, both, fixed, floats, ids
from .references import over

family = Family("parts")
IMAGES = floats((2, 3, 12, 12), (1, 3, 12, 12), (3, 3, 16, 12))
STEPS = floats((2, 6, 8), (1, 1, 8), (3, 17, 8))
ROWS = floats((5, 8), (1, 8), (9, 8))
TOKENS = ids(20, (2, 6), (1, 1), (3, 17))


def case(inputs: Any = STEPS, **options: Any) -> Any:
    return family.case(inputs, **options)


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@case(ROWS)
class MomentumTwins(nn.Module):
    """A slow copy of the encoder follows the fast one, parameter by parameter, inside forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fast, self.slow = mlp(8, 24, 16, 6), mlp(8, 24, 16, 6)
        for p in self.slow.parameters():
            p.requires_grad = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.training:
            with torch.no_grad():
                for q, k in zip(self.fast.parameters(), self.slow.parameters(), strict=True):
                    k.mul_(0.9).add_(q, alpha=0.1)
        with torch.no_grad():
            target = F.normalize(self.slow(x.flip(0)), dim=1)
        return F.normalize(self.fast(x), dim=1), target


@case(ROWS, train=False)
class MomentumTwinsByMethod(nn.Module):
    """The same by a method that the training loop calls; forward shows one of the two only."""

    def __init__(self) -> None:
        super().__init__()
        self.fast, self.slow = mlp(8, 24, 6), mlp(8, 24, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fast(x) - self.slow(x).detach()


@case(ROWS)
class PenaltyOfWeights(nn.Module):
    """The loss counts the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(8, 24, 16, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.body(x), sum(p.abs().sum() for p in self.parameters()) * 0.01


@case(ROWS)
class EnergyAndForces(nn.Module):
    """The gradient by the input is an output."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 24), nn.Softplus(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.body(x).sum(-1)
            forces = -torch.autograd.grad(energy.sum(), x, create_graph=self.training)[0]
        return energy, forces


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -0.3 * g


@case(ROWS)
class GradientReversal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.label, self.domain = mlp(8, 24, 16), mlp(16, 12, 3), mlp(16, 12, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x).relu()
        return self.label(h), self.domain(Reverse.apply(h))


class ScaledSwish(torch.autograd.Function):
    """Forward reads the number of features; backward a saved tensor per feature."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: Tensor) -> Tensor:
        ctx.save_for_backward(x, beta)
        return x * (beta * x).sigmoid()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, beta = ctx.saved_tensors
        s = (beta * x).sigmoid()
        return g * (s + beta * x * s * (1 - s)), (g * x * x * s * (1 - s)).sum(0)


@case(ROWS)
class OwnFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.beta = nn.Linear(8, 24), nn.Linear(24, 3), nn.Parameter(torch.rand(24))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(ScaledSwish.apply(self.a(x), self.beta))


@case(IMAGES)
class EfficientChannelAttention(nn.Module):
    """Neighbouring channels are convolved."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.eca = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 12, 3), nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        y = self.eca(h.mean((2, 3))[:, None]).transpose(1, 2).unsqueeze(-1).sigmoid()
        return self.head(self.b(h * y).relu().mean((2, 3)))


@case(IMAGES)
class MaskedPixels(nn.Module):
    """Colours see colours before them: masks are laid over groups of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Conv2d(3, 18, 3, padding=1), nn.Conv2d(18, 18, 3, padding=1), nn.Conv2d(18, 6, 1)
        for name, conv, first in (("a", self.a, True), ("b", self.b, False), ("out", self.out, False)):
            o, i, k, _ = conv.weight.shape
            mask = torch.ones(o, i, k, k)
            mask[:, :, k // 2, k // 2 + 1 :] = 0
            mask[:, :, k // 2 + 1 :] = 0
            to, of = torch.arange(o) * 3 // o, torch.arange(i) * 3 // i
            late = of[None] >= to[:, None] if first else of[None] > to[:, None]
            mask[:, :, k // 2, k // 2][late] = 0
            self.register_buffer(f"mask_{name}", mask)

    def forward(self, x: Tensor) -> Tensor:
        h = F.conv2d(x, self.a.weight * self.mask_a, self.a.bias, padding=1).relu()
        h = F.conv2d(h, self.b.weight * self.mask_b, self.b.bias, padding=1).relu()
        return F.conv2d(h, self.out.weight * self.mask_out, self.out.bias)


@case(IMAGES)
class TurnedKernels(nn.Module):
    """A kernel in four directions; the next layer reads them rolled."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(8, 3, 3, 3) / 4), nn.Parameter(torch.randn(6, 8, 4, 3, 3) / 8)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        w = torch.stack([self.w.rot90(r, (2, 3)) for r in range(4)], 1).flatten(0, 1)
        h = F.conv2d(x, w, padding=1).relu()
        v = torch.stack([self.v.rot90(r, (3, 4)).roll(r, 2) for r in range(4)], 1)
        h = F.conv2d(h, v.flatten(2, 3).flatten(0, 1), padding=1).relu()
        return self.head(h.unflatten(1, (6, 4)).amax(2).mean((2, 3)))


@case(ROWS)
class SplineLayer(nn.Module):
    """Splines on edges, as in networks after Kolmogorov and Arnold."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("grid1", torch.linspace(-2, 2, 6).expand(8, -1).contiguous())
        self.register_buffer("grid2", torch.linspace(-2, 2, 6).expand(16, -1).contiguous())
        self.base1, self.base2 = nn.Linear(8, 16), nn.Linear(16, 3)
        self.spline1, self.spline2 = nn.Parameter(torch.randn(16, 8, 6)), nn.Parameter(torch.randn(3, 16, 6))

    @staticmethod
    def basis(x: Tensor, grid: Tensor) -> Tensor:
        return torch.exp(-((x[..., None] - grid) ** 2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.base1(F.silu(x)) + F.linear(self.basis(x, self.grid1).flatten(-2), self.spline1.flatten(1))
        return self.base2(F.silu(h)) + F.linear(self.basis(h, self.grid2).flatten(-2), self.spline2.view(3, -1))


class Dora(nn.Module):
    """Magnitude and direction, with a low-rank change."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.base, self.magnitude = nn.Linear(into, out), nn.Parameter(torch.rand(out) + 0.5)
        self.a, self.b = nn.Parameter(torch.randn(3, into) / 3), nn.Parameter(torch.randn(out, 3) / 3)

    def forward(self, x: Tensor) -> Tensor:
        w = self.base.weight + self.b @ self.a
        return F.linear(x, w * (self.magnitude / (w.norm(dim=1).detach() + 1e-9))[:, None], self.base.bias)


@case(ROWS)
class DoraNet(nn.Module):
    """The norm of a row is over the inputs, of which some go."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = Dora(8, 24), Dora(24, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


class Loha(nn.Module):
    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.base, self.scaling = nn.Linear(into, out), 0.5
        self.w1a, self.w1b = nn.Parameter(torch.randn(out, 3)), nn.Parameter(torch.randn(3, into))
        self.w2a, self.w2b = nn.Parameter(torch.randn(out, 3)), nn.Parameter(torch.randn(3, into))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(
            x, self.base.weight + self.w1a @ self.w1b * (self.w2a @ self.w2b) * self.scaling, self.base.bias
        )


@case(ROWS)
class LohaNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = Loha(8, 24), Loha(24, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


@case(ROWS)
class KroneckerLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a1, self.a2 = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(6, 4))
        self.b1, self.b2 = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(2, 6))

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, torch.kron(self.a1, self.a2)).tanh()
        return F.linear(h, torch.kron(self.b1, self.b2))


@case(ROWS)
class BlockDiagonalMonarch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.l, self.r = (
            nn.Linear(8, 24),
            nn.Parameter(torch.randn(4, 6, 6)),
            nn.Parameter(torch.randn(6, 4, 4)),
        )
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).relu().view(-1, 4, 6)
        h = torch.einsum("bki,kij->bkj", h, self.l).transpose(1, 2)
        h = torch.einsum("bki,kij->bkj", h, self.r).transpose(1, 2).reshape(-1, 24)
        return self.head(h.relu())


@case(ROWS)
class HyperNetwork(nn.Module):
    """Weights of the main layer come from an embedding and a slice of one vector."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.make = nn.Parameter(torch.randn(5)), nn.Linear(5, 12 * 8 + 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        w = self.make(self.code)
        return self.head(F.linear(x, w[: 12 * 8].view(12, 8), w[12 * 8 :]).relu())


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


@case(floats((2, 3, 10), (1, 3, 6), (2, 3, 20)))
class NeighboursInFeatures(nn.Module):
    """Neighbours are found anew in the space of hidden features."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(6, 12, 1), nn.Conv2d(24, 16, 1), nn.Conv1d(28, 20, 1)
        self.head = nn.Linear(40, 3)

    def edges(self, x: Tensor) -> Tensor:
        b, c, n = x.shape
        square = x.square().sum(1, keepdim=True)
        near = (2 * x.transpose(1, 2) @ x - square - square.transpose(1, 2)).topk(4, -1)[1]
        near = (near + torch.arange(b)[:, None, None] * n).view(-1)
        f = x.transpose(1, 2).reshape(b * n, -1)[near].view(b, n, 4, c)
        x = x.transpose(1, 2)[:, :, None].expand(-1, -1, 4, -1)
        return torch.cat([f - x, x], 3).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = F.leaky_relu(self.a(self.edges(x)), 0.2).amax(-1)
        b = F.leaky_relu(self.b(self.edges(a)), 0.2).amax(-1)
        h = self.c(torch.cat([a, b], 1))
        return self.head(torch.cat([F.adaptive_max_pool1d(h, 1), F.adaptive_avg_pool1d(h, 1)], 1).flatten(1))


@case(floats((2, 10, 1), (1, 10, 1), (3, 10, 1)))
class BackcastAndForecast(nn.Module):
    """Blocks explain what others left; trend and season are fixed bases."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(mlp(10, 20, 20, 6) for _ in range(2))
        t = torch.arange(14.0) / 14
        self.register_buffer("trend", torch.stack([t**i for i in range(6)]))
        self.register_buffer("season", torch.stack([f(6.28 * i * t) for i in range(3) for f in (torch.sin, torch.cos)]))

    def forward(self, x: Tensor) -> Tensor:
        rest, total = x.squeeze(-1), 0
        for block, base in zip(self.blocks, (self.trend, self.season), strict=True):
            y = block(rest) @ base
            rest, total = rest - y[:, :10], total + y[:, 10:]
        return total


@case(both(floats((2, 5, 8), (1, 2, 8), (3, 9, 8)), floats((2, 4, 6), (1, 1, 6), (3, 3, 6))))
class LocationAttention(nn.Module):
    """Attention that also sees where it was."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.prenet = nn.Linear(8, 16), mlp(6, 12, 10)
        self.cell = nn.GRUCell(10 + 16, 14)
        self.query, self.memory, self.place = (
            nn.Linear(14, 12, bias=False),
            nn.Linear(16, 12, bias=False),
            nn.Linear(5, 12),
        )
        self.conv, self.v, self.out = nn.Conv1d(2, 5, 3, padding=1), nn.Linear(12, 1), nn.Linear(30, 6)

    def forward(self, x: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.encoder(x).tanh()
        keys, h = self.memory(memory), torch.zeros(len(x), 14)
        context, now, total = torch.zeros(len(x), 16), torch.zeros(x.shape[:2]), torch.zeros(x.shape[:2])
        outs, maps = [], []
        for t in range(frames.shape[1]):
            h = self.cell(torch.cat([self.prenet(frames[:, t]), context], 1), h)
            place = self.place(self.conv(torch.stack([now, total], 1)).transpose(1, 2))
            now = self.v((self.query(h)[:, None] + keys + place).tanh()).squeeze(-1).softmax(-1)
            total, context = total + now, (now[:, None] @ memory).squeeze(1)
            outs.append(self.out(torch.cat([h, context], 1)))
            maps.append(now)
        return torch.stack(outs, 1), torch.stack(maps, 1)


@case(IMAGES)
class NestedWidths(nn.Module):
    """Outputs at prefixes of the embedding, as nested representations have them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 16, 3), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> list[Tensor]:
        h = self.b(self.a(x).relu()).relu().mean((2, 3))
        return [F.linear(h[:, :n], self.fc.weight[:, :n], self.fc.bias) for n in (4, 8, 16)]


@case(IMAGES)
class ClassMaps(nn.Module):
    """The map of the class that wins is made with its row of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 16, 3), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        f = self.b(self.a(x).relu()).relu()
        logits = self.fc(f.mean((2, 3)))
        row = self.fc.weight[logits.argmax(1)]
        return logits, torch.einsum("bc,bchw->bhw", row, f)


@case(IMAGES)
class BlurAndFilter(nn.Module):
    """Fixed kernels per channel: a blur that is repeated for the width, and edges for each."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(24, 10, 1), nn.Linear(10, 3)
        k = torch.tensor([1.0, 2, 1])
        self.register_buffer("blur", (k[:, None] * k / 16).repeat(12, 1, 1, 1))
        self.register_buffer("edge", torch.tensor([[0.0, -1, 0], [-1, 4, -1], [0, -1, 0]])[None, None])

    def forward(self, x: Tensor) -> Tensor:
        h = F.conv2d(F.pad(self.a(x).relu(), [1] * 4, "reflect"), self.blur, stride=2, groups=self.blur.shape[0])
        edges = F.conv2d(h, self.edge.expand(h.shape[1], -1, -1, -1), padding=1, groups=h.shape[1])
        return self.head(self.b(torch.cat([h, edges], 1)).relu().mean((2, 3)))


@case(IMAGES)
class StatisticsMatched(nn.Module):
    """A loss compares the statistics of a batch with those that a norm remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.a(x)
        mean, var = h.mean((0, 2, 3)), h.var((0, 2, 3), unbiased=False)
        loss = self.apart(mean - self.bn.running_mean) + self.apart(var - self.bn.running_var)
        return self.b(self.bn(h).relu()), loss

    def apart(self, t: Tensor) -> Tensor:
        return t.norm()


@case(IMAGES)
class LearnedQueriesThroughAModule(nn.Module):
    """A view of a parameter goes into a module."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.q = nn.Embedding(5, 12), nn.Linear(12, 16)
        self.body, self.head = nn.Conv2d(3, 16, 3), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(self.query.weight.unsqueeze(0).expand(len(x), -1, -1))
        f = self.body(x).flatten(2)
        return self.head((q @ f * 0.1).softmax(-1) @ f.transpose(1, 2))


@case(both(TOKENS, fixed(*(torch.tensor(v) for v in (6, 1, 17, 6)))))
class LengthAsATensor(nn.Module):
    """The number of valid steps comes as a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(20, 12), nn.Linear(12, 20), nn.Linear(20, 3)

    def forward(self, t: Tensor, n: Tensor) -> Tensor:
        h = self.a(self.embed(t)).relu()
        return self.b(h[:, : int(n)].sum(1) / n)


@case(ROWS, truths=(over("pool", "a.weight", out=None),))
class TopOfFeatures(nn.Module):
    """The mean of the three largest hidden values gates the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 20), nn.Linear(20, 3)

    def pool(self, h: Tensor) -> Tensor:
        return h.topk(3, -1)[0].mean(-1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.b(h * self.pool(h).sigmoid())
