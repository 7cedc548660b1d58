"""Published parts in which a number, a name or a neighbour decides: twins, adapters, computed weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cases import Family
from .shared import IMAGES, ROWS, STEPS, mlp

family = Family("parts")


def case(inputs: Any = STEPS, **options: Any) -> Any:
    return family.case(inputs, **options)


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
