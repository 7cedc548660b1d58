"""Mixtures: soft and hard routing, experts as modules or as one weight, seen as channels and as experts."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cases import Family, floats
from .references import Kept, over, put

family = Family("experts")
X = floats((8, 10), (1, 10), (13, 10))


class Experts(nn.Module):
    """Four experts in fused weights; `share` says how much each counts: [batch, experts]."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.out = nn.Linear(10, 4), nn.Linear(10, 2)
        self.up, self.down = nn.Parameter(torch.randn(4, 10, 20) / 4), nn.Parameter(torch.randn(4, 20, 10) / 6)
        self.make()

    def make(self) -> None:
        """More parameters."""

    def route(self, x: Tensor) -> Tensor:
        return self.gate(x)

    def share(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        each = torch.matmul(torch.matmul(x, self.up).relu(), self.down)
        return self.out(torch.einsum("be,ebw->bw", self.share(self.route(x)), each))


WHOLE = "up:0 down:0 gate.weight:0"


def case(**options: Any) -> Any:
    options.setdefault("right", "channel")
    options.setdefault("whole", WHOLE)
    if options["whole"] == WHOLE:
        options.setdefault("truths", (over("share", "gate.weight"),))
        options["kinds"] = "channel expert"
    return family.case(X, **options)


@case()
class Soft(Experts):
    """Dense mixture: the softmax of the rest would be another one."""


@case()
class SoftTemperature(Experts):
    def share(self, logits: Tensor) -> Tensor:
        return (logits / logits.shape[-1] ** 0.5).softmax(-1)


@case()
class TopTwo(Experts):
    def share(self, logits: Tensor) -> Tensor:
        best = logits.topk(2, -1)
        return torch.zeros_like(logits).scatter(-1, best.indices, best.values.softmax(-1))


@case()
class Switch(Experts):
    """The best expert alone, times its probability."""

    def share(self, logits: Tensor) -> Tensor:
        p = logits.softmax(-1)
        return p * F.one_hot(p.argmax(-1), p.shape[-1])


@case()
class SigmoidGates(Experts):
    """Each expert has a gate of its own, then they are normalised."""

    def share(self, logits: Tensor) -> Tensor:
        s = logits.sigmoid()
        return s / s.sum(-1, keepdim=True)


@case()
class Cumulated(Experts):
    """Stick breaking: the share of an expert depends on those before it."""

    def share(self, logits: Tensor) -> Tensor:
        s = logits.sigmoid()
        return s * (1 - s + 1e-3).cumprod(-1) / (1 - s + 1e-3)


@case()
class Balanced(Experts):
    """A loss that counts experts comes out too."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        p = self.share(self.route(x))
        return {"y": super().forward(x), "balance": (p.mean(0) ** 2).sum() * p.shape[-1]}


@case()
class NoisyGate(Experts):
    """Noise on the logits, in training."""

    def route(self, x: Tensor) -> Tensor:
        logits = self.gate(x)
        return logits + torch.randn_like(logits) if self.training else logits


@case()
class Hashed(Experts):
    """Routing by a hash of the input instead of learning."""

    def route(self, x: Tensor) -> Tensor:
        return F.one_hot((x.sum(-1) * 100).long() % self.up.shape[0], self.up.shape[0]) * 30.0 + 0 * self.gate(x)


@case(truths=(over("pick", "gate.weight", dim=(-1, 0)),))
class BiasByNumber(Experts):
    """A stored bias per expert steers the choice."""

    def make(self) -> None:
        self.register_buffer("steer", torch.tensor([0.5, 0.0, -0.5, 1.0]))

    def share(self, logits: Tensor) -> Tensor:
        return self.pick(logits, self.steer)

    def pick(self, logits: Tensor, steer: Tensor) -> Tensor:
        best = (logits + steer).topk(2, -1).indices
        return torch.zeros_like(logits).scatter(-1, best, logits.sigmoid().gather(-1, best))


@case()
class PriorityByNumber(Experts):
    """Later experts count less, by their number."""

    def share(self, logits: Tensor) -> Tensor:
        return (logits - torch.arange(logits.shape[-1])).softmax(-1)


@case()
class Capacity(Experts):
    """An expert takes at most three samples, the first that come."""

    def share(self, logits: Tensor) -> Tensor:
        hot = F.one_hot(logits.argmax(-1), logits.shape[-1])
        return hot * (hot.cumsum(0) <= 3) * logits.softmax(-1)


@case()
class ExpertChoice(Experts):
    """Experts choose their samples."""

    def share(self, logits: Tensor) -> Tensor:
        p = logits.softmax(-1)
        best = p.topk(max(1, len(p) // 2), 0)
        return torch.zeros_like(p).scatter(0, best.indices, best.values)


@case(whole="up:0 down:0 slots:1")
class SoftMoe(Experts):
    """Soft mixture of experts: slots are mixtures of samples, samples mixtures of slots."""

    def make(self) -> None:
        self.slots = nn.Parameter(torch.randn(10, 4))

    def forward(self, x: Tensor) -> Tensor:
        logits = x @ self.slots
        mixed = logits.softmax(0).T[:, None] @ x
        each = ((mixed @ self.up).relu() @ self.down)[:, 0]
        return self.out(logits.softmax(1) @ each) + 0 * self.gate(x).sum()


@case(whole="")
class ModuleList(nn.Module):
    """Experts as modules, run for the samples that chose them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.out = nn.Linear(10, 4), nn.Linear(10, 2)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 10)) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        p = self.gate(x).softmax(-1)
        best, y = p.argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mine = best == i
            if mine.any():
                y[mine] = expert(x[mine]) * p[mine, i, None]
        return self.out(y)


@case(whole="gate.weight:0")
class ModulesDense(ModuleList):
    """All experts run, weighed by a softmax."""

    def forward(self, x: Tensor) -> Tensor:
        p = self.gate(x).softmax(-1)
        return self.out(sum(p[:, i, None] * expert(x) for i, expert in enumerate(self.experts)))


@case(whole="gate.weight:0")
class ModulesStacked(ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        each = torch.stack([expert(x) for expert in self.experts], 1)
        return self.out((self.gate(x).softmax(-1)[..., None] * each).sum(1))


@case(whole="")
class GateOfBranches(nn.Module):
    """Selective kernels: two branches weighed per channel by a softmax over branches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.gate, self.out = nn.Linear(10, 16), nn.Linear(10, 16), nn.Linear(16, 32), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x).relu(), self.b(x).tanh()
        w = self.gate(a + b).unflatten(1, (2, -1)).softmax(1)
        return self.out(w[:, 0] * a + w[:, 1] * b)


@case(whole="mix.weight:0")
class MixtureOfSoftmaxes(nn.Module):
    """Three softmaxes over the classes, mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.mix, self.out = nn.Linear(10, 20), nn.Linear(20, 3), nn.Linear(20, 15)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        p = self.out(h).unflatten(1, (3, 5)).softmax(-1)
        return (self.mix(h).softmax(-1)[..., None] * p).sum(1)


@case(whole="coefficients.weight:0 kernels:0")
class DynamicConvolution(nn.Module):
    """Kernels are mixtures of four candidates: candidates are experts."""

    def __init__(self) -> None:
        super().__init__()
        self.coefficients, self.kernels = nn.Linear(10, 4), nn.Parameter(torch.randn(4, 20, 10) / 3)
        self.out = nn.Linear(20, 2)

    def forward(self, x: Tensor) -> Tensor:
        w = torch.einsum("be,eoi->boi", self.coefficients(x).softmax(-1), self.kernels)
        return self.out((w @ x[..., None])[..., 0].relu())


@case(whole="options:0")
class ArchitectureWeights(nn.Module):
    """DARTS: a softmax of learned weights over operations."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.options, self.out = nn.Linear(10, 20), nn.Parameter(torch.randn(3)), nn.Linear(20, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.out((self.options.softmax(0) * torch.stack([h.relu(), h.tanh(), h], -1)).sum(-1))


@case(whole="slots:0")
class SlotReading(nn.Module):
    """Clusters by a softmax against learned centres (NetVLAD): residuals to every centre."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.slots, self.out = nn.Linear(10, 16), nn.Parameter(torch.randn(4, 16)), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        p = (h @ self.slots.T).softmax(-1)
        return self.out((p[..., None] * (h[:, None] - self.slots)).sum(1))


# -- the number of experts as a value ------------------------------------------------------------------------------

CROWD = [*X, lambda: torch.randn(1, 10, generator=torch.Generator().manual_seed(5)).expand(700, 10) * 1.0]


def masked(model: nn.Module, kept: Kept) -> None:
    """The truth of a removal: nothing reaches an expert that is gone, and all are counted as before."""
    inner: Any = model.route
    gone = kept.gone("gate.weight")
    put(model, "route", lambda x: inner(x).index_fill(-1, gone, -1e9))


class Counted(Experts):
    """The best two experts, up to a capacity."""

    def capacity(self, p: Tensor) -> float:
        raise NotImplementedError

    def share(self, logits: Tensor) -> Tensor:
        p = logits.softmax(-1)
        best = p.topk(2, -1)
        g = torch.zeros_like(p).scatter(-1, best.indices, best.values / best.values.sum(-1, keepdim=True))
        return g * ((g > 0).long().cumsum(0) <= self.capacity(p))


def counted(**options: Any) -> Any:
    return family.case(CROWD, **{"kinds": "expert", "truths": (masked,), **options})


@counted()
class CapacityOfFraction(Counted):
    def capacity(self, p: Tensor) -> float:
        return 1.3 * p.shape[0] / p.shape[1] + 9


@counted(condition="max(")
class CapacityAtLeast(Counted):
    """Large for few samples, whatever the number of experts."""

    def capacity(self, p: Tensor) -> float:
        return max(64, int(1.3 * p.shape[0] / p.shape[1]))


@counted(condition="math.ceil(")
class CapacityRoundedUp(Counted):
    def capacity(self, p: Tensor) -> float:
        return 64 * math.ceil(1.3 * p.shape[0] / p.shape[1] / 64)


@counted()
class CapacityOfWholeNumbers(Counted):
    def capacity(self, p: Tensor) -> float:
        return (p.shape[0] // p.shape[1] + 63) // 64 * 64


@counted(right="expert")
class CapacityAsGiven(Counted):
    """A capacity that nothing makes of the experts: the control."""

    def capacity(self, p: Tensor) -> float:
        return 90


class Scaled(Counted):
    def capacity(self, p: Tensor) -> float:
        return 10**6

    def factor(self, p: Tensor) -> Any:
        raise NotImplementedError

    def share(self, logits: Tensor) -> Tensor:
        return super().share(logits) + (logits - 1e3).relu() * self.factor(logits)


LOUD = [*X, lambda: 1e5 * torch.randn(9, 10, generator=torch.Generator().manual_seed(6))]


@family.case(LOUD, kinds="expert", truths=(masked,))
class FactorOfCount(Scaled):
    def factor(self, p: Tensor) -> Any:
        return p.shape[-1]


@family.case(LOUD, kinds="expert", truths=(masked,))
class FactorOfLogarithm(Scaled):
    def factor(self, p: Tensor) -> Any:
        return torch.tensor(math.log(p.shape[-1]))


@family.case(LOUD, kinds="expert", truths=(masked,))
class FactorOfLength(Scaled):
    def factor(self, p: Tensor) -> Any:
        return 1 / len(self.up)


@counted(right="expert")
class CountsThatFollow(Counted):
    """Flat places of chosen experts, a table of as many classes, and a sentinel behind the last."""

    def capacity(self, p: Tensor) -> float:
        return 10**6

    def share(self, logits: Tensor) -> Tensor:
        g = super().share(logits)
        chosen, size = g.topk(2, -1).indices, g.shape[-1]
        flat = (torch.arange(len(g))[:, None] * size + chosen).view(-1)
        hot = F.one_hot(chosen.clamp(max=size - 1), size).sum(1)
        return g * torch.zeros(g.numel()).scatter(0, flat, 1.0).view(-1, size) * hot
