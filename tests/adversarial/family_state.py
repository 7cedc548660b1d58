"""State that lives beside the parameters: counters, caches, lazily made buffers, codebooks, hooks, queues."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cases import ROWS, STEPS, Family, floats
from .nets import Mid

family = Family("state")
X, S = floats(*ROWS), floats(*STEPS)


@family.case(X)
class CountsCalls(Mid):
    """Every second call is mirrored."""

    calls = 0

    def mid(self, h: Tensor) -> Tensor:
        self.calls += 1
        return h if self.calls % 2 else h.flip(1)


@family.case(X)
class CountsInABuffer(Mid):
    """The same count in a buffer, which scales."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def mid(self, h: Tensor) -> Tensor:
        self.calls += 1
        return h * self.calls


@family.case(X)
class FirstBatchShift(Mid):
    """Normalises by the first batch that it ever sees."""

    shift: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.shift is None:
            self.shift = x.mean(0)
        return super().forward(x - self.shift)


@family.case(X)
class LazyHiddenBuffer(Mid):
    """A table over hidden channels, made in the first forward."""

    table: Tensor | None = None

    def mid(self, h: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.linspace(0.5, 2, h.shape[1])
        return h * self.table


@family.case(X)
class LazyTableMadeBefore(LazyHiddenBuffer):
    """The same, and the model has already run when it comes to be pruned."""

    def __init__(self) -> None:
        super().__init__()
        self(torch.randn(2, 8)).sum().detach()


@family.case(X)
class StoredTableAttribute(Mid):
    """A plain tensor attribute over hidden channels: no buffer, no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.linspace(0.5, 2, 24)

    def mid(self, h: Tensor) -> Tensor:
        return h * self.table


@family.case(X)
class TableInADict(Mid):
    """The same in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = {"scale": torch.linspace(0.5, 2, 24), "power": [1.0] * 24}

    def mid(self, h: Tensor) -> Tensor:
        return h * self.tables["scale"] * torch.tensor(self.tables["power"])


def closure() -> nn.Module:
    table = torch.linspace(0.5, 2, 24)
    return Mid(lambda m, h: h * table)


family.add("table_in_a_closure", closure, X)


@family.case(X)
class Memo(Mid):
    """Keeps all inputs in a list: the user's list must not grow."""

    def __init__(self) -> None:
        super().__init__()
        self.memo: dict[str, list[Tensor]] = {"seen": []}

    def mid(self, h: Tensor) -> Tensor:
        self.memo["seen"].append(h.detach())
        return h * len(self.memo["seen"])


@family.case(X)
class ChangesItsInput(Mid):
    """Doubles the input in place: the example must not change."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2))


@family.case(X)
class RunningSum(Mid):
    """A plain tensor that collects."""

    def __init__(self) -> None:
        super().__init__()
        self.total = torch.zeros(8)

    def forward(self, x: Tensor) -> Tensor:
        self.total += x.detach().sum(0)
        return super().forward(x + 0.1 * self.total)


@family.case(X)
class RunningHiddenMean(Mid):
    """Hand-made statistics of hidden channels in a buffer, updated while training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.rand(24))

    def mid(self, h: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
        return h - self.mean


@family.case(floats((4, 8), (4, 8)))
class Recurrent(nn.Module):
    """A cell whose hidden state stays between calls."""

    h: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRUCell(8, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.h = self.cell(x, self.h)
        return self.out(self.h)


@family.case(S)
class CodebookEma(nn.Module):
    """Vector quantisation: nearest code by distance, codes in a buffer, averaged in training."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.dec = nn.Linear(8, 12), nn.Linear(12, 4)
        self.register_buffer("codes", torch.randn(10, 12))

    def forward(self, x: Tensor) -> Tensor:
        z = self.enc(x)
        flat = z.flatten(0, 1)
        index = (flat.pow(2).sum(1, keepdim=True) - 2 * flat @ self.codes.T + self.codes.pow(2).sum(1)).argmin(1)
        q = F.embedding(index, self.codes).view_as(z)
        if self.training:
            hot = F.one_hot(index, 10).float()
            self.codes.lerp_(hot.T @ flat.detach() / hot.sum(0)[:, None].clamp(min=1), 0.1)
        return self.dec(z + (q - z).detach())


@family.case(floats((2, 4, 8), (2, 4, 8)))
class KeyValueCache(nn.Module):
    """Keys and values of earlier calls are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.past = nn.Linear(8, 36), nn.Linear(12, 4), None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.past is not None:
            k, v = torch.cat([self.past[0], k], 1), torch.cat([self.past[1], v], 1)
        self.past = (k, v)
        return self.out((q @ k.mT).softmax(-1) @ v)


@family.case(X)
class Queue(Mid):
    """A queue of hidden features (as in contrastive learning) that outputs depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.randn(6, 24))

    def mid(self, h: Tensor) -> Tensor:
        if self.training:
            self.queue.copy_(torch.cat([h.detach().mean(0, keepdim=True), self.queue[:-1]]))
        return h + (h @ self.queue.T).softmax(1) @ self.queue


@functools.cache
def ramp(width: int) -> Tensor:
    return torch.linspace(1, 3, width)


family.add("table_from_a_cached_function", lambda: Mid(lambda m, h: h * ramp(h.shape[1])), X)
LAST: dict[str, Tensor] = {}


def remembered(h: Tensor) -> Tensor:
    if h.shape[1] not in (key := {v.shape[1] for v in LAST.values()}) or not key:
        LAST["first"] = torch.arange(h.shape[1]) / h.shape[1]
    return h * LAST["first"]


family.add("table_in_a_global", lambda: Mid(lambda m, h: remembered(h)), X)


@family.case(X)
class HookChangesOutput(Mid):
    """A forward hook scales the hidden layer by place."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1.register_forward_hook(lambda m, i, o: o * torch.arange(o.shape[-1]))


@family.case(X)
class HookStoresFeatures(nn.Module):
    """A hook keeps hidden features, and a later layer reads them from there."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(8, 24), nn.Linear(24, 16), nn.Linear(40, 4)
        self.store: dict[str, Tensor] = {}
        self.a.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, given: Any, output: Tensor) -> None:
        self.store["a"] = output

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x).relu()).relu()
        return self.out(torch.cat([h, self.store.pop("a").flip(1)], 1))


@family.case(X)
class RescalesItsWeights(Mid):
    """Every forward renormalises a weight in place (max-norm constraint over hidden features)."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.fc2.weight.div_(self.fc2.weight.norm(dim=1, keepdim=True).clamp(min=0.5))
        return super().forward(x)


@family.case(X, condition="torch.randn_like(h)", chance="noise")
class NoiseOnHidden(Mid):
    """Noise of the hidden shape, also in eval."""

    def noise(self, h: Tensor) -> Tensor:
        return torch.randn_like(h)

    def mid(self, h: Tensor) -> Tensor:
        return h + 0.1 * self.noise(h)


family.add("noise_held_still", NoiseOnHidden, X, still="noise")
family.add(
    "dropout", lambda: nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Dropout(0.5), nn.Linear(24, 4)), X, right="channel"
)
family.add("rrelu", lambda: nn.Sequential(nn.Linear(8, 24), nn.RReLU(), nn.Linear(24, 4)), X, right="channel")
family.add(
    "batch_norm", lambda: nn.Sequential(nn.Linear(8, 24), nn.BatchNorm1d(24), nn.Linear(24, 4)), X, right="channel"
)
family.add("shuffled_channels", lambda: Mid(lambda m, h: h[:, torch.randperm(h.shape[1])]), X)


@family.case(X)
class OwnGenerator(Mid):
    """A generator of its own makes a fixed random projection in every forward."""

    def mid(self, h: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return h @ torch.randn(h.shape[1], h.shape[1], generator=generator) / 5


@family.case(X)
class SwapsModules(Mid):
    """The forward replaces a layer by one that shares its weight."""

    def forward(self, x: Tensor) -> Tensor:
        lazy = nn.Linear(24, 4)
        lazy.weight, lazy.bias = self.fc2.weight, self.fc2.bias
        self.fc2 = lazy
        return super().forward(x).flip(1)
