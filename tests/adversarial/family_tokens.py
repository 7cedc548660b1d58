"""Learned tokens, queries, memories and conditions: data, not units."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cases import Family, Make, floats, ids
from .nets import Body
from .references import over, plain

family = Family("tokens")
S = floats((2, 6, 8), (1, 1, 8), (3, 17, 8))
T = ids(20, (2, 6), (1, 1), (3, 17))
SHORT = floats((2, 1, 8), (2, 6, 8), (3, 17, 8))


def case(inputs: list[Make] = S, **options: Any) -> Any:
    options.setdefault("right", "channel")
    options.setdefault("must", "up.weight")
    return family.case(inputs, **options)


@case(whole="cls:1 pos:1")
class ClassToken(Body):
    """ViT: one learned token in front, and only it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.cls, self.pos = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 40, 16))

    def place(self, h: Tensor) -> Tensor:
        h = torch.cat([self.cls.expand(len(h), -1, -1), h], 1)
        return h + self.pos[:, : h.shape[1]]

    def pool(self, h: Tensor) -> Tensor:
        return h[:, 0]


@case(whole="cls:1 pos:1 registers:1")
class Registers(ClassToken):
    """Four registers between the class token and the patches, which get no position, and are thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.registers = nn.Parameter(torch.randn(1, 4, 16))

    def place(self, h: Tensor) -> Tensor:
        h = super().place(h)
        return torch.cat([h[:, :1], self.registers.expand(len(h), -1, -1), h[:, 1:]], 1)

    def pool(self, h: Tensor) -> Tensor:
        return torch.cat([h[:, 0], h[:, 5:].mean(1)], 1).unflatten(1, (2, -1)).mean(1)


@case(whole="prompts:0")
class Prompts(Body):
    """Learned prompts that stay in the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.randn(6, 16))

    def place(self, h: Tensor) -> Tensor:
        return torch.cat([self.prompts.expand(len(h), -1, -1), h], 1)


@case(whole="queries:0", right="channel", must="")
class LearnedQueries(nn.Module):
    """DETR, Perceiver: learned queries read the input; the outputs are pooled over them."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.k, self.v = nn.Parameter(torch.randn(5, 12)), nn.Linear(8, 12), nn.Linear(8, 16)
        self.up, self.out = nn.Linear(16, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = (self.queries @ self.k(x).mT * 0.3).softmax(-1) @ self.v(x)
        return self.out(self.up(a).relu().amax(1))


@case(whole="queries:1")
class PooledQueries(LearnedQueries):
    """The same queries, one per column."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(12, 5))

    def forward(self, x: Tensor) -> Tensor:
        a = (self.k(x) @ self.queries * 0.3).softmax(1).mT @ self.v(x)
        return self.out(self.up(a).relu().mean(1))


@case(whole="keys:0 values:0")
class PersistentMemory(Body):
    """Learned keys and values that every query may read."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values = nn.Parameter(torch.randn(5, 12)), nn.Parameter(torch.randn(5, 16))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        k = torch.cat([self.k(h), self.keys.expand(len(h), -1, -1)], 1)
        v = torch.cat([self.v(h), self.values.expand(len(h), -1, -1)], 1)
        h = h + (self.q(h) @ k.mT).softmax(-1) @ v
        return self.out(self.pool(h + self.down(self.up(h).relu())))


@case(truths=(plain, over("look", "memory", dim=(2, 0), out=None)))
class ProductMemory(Body):
    """A feed-forward layer written as a memory of key-value pairs under a softmax, taken over what is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Parameter(torch.randn(24, 16))

    def look(self, scores: Tensor, memory: Tensor) -> Tensor:
        return scores.softmax(-1) @ memory

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = h + self.look(h @ self.memory.T, self.memory)
        return self.out(self.pool(h + self.down(self.up(h).relu())))


@case()
class FourierTime(Body):
    """Fourier features of the step's number, by a stored row of frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(5))
        self.read = nn.Linear(10, 16)

    def place(self, h: Tensor) -> Tensor:
        angle = torch.arange(h.shape[1])[:, None] * self.codes
        return h + self.read(torch.cat([angle.sin(), angle.cos()], -1))


@case(whole="table.weight:0")
class Segments(Body):
    """Two kinds of steps: before and after the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2, 16)

    def place(self, h: Tensor) -> Tensor:
        return h + self.table((torch.arange(h.shape[1]) >= h.shape[1] / 2).long())


@case(T, whole="embed.weight:0")
class Tokens(Body):
    """Only token numbers: most rows of the table are never seen in the example."""

    def __init__(self) -> None:
        super().__init__(tokens=True)


@case(S, whole="stamp.weight:0", right="channel")
class DiffusionTime(Body):
    """A time step, sines of the width, and a small network that scales and shifts."""

    def __init__(self) -> None:
        super().__init__()
        self.t1, self.t2 = nn.Linear(12, 24), nn.Linear(24, 32)
        self.stamp = nn.Embedding(7, 12)

    def place(self, h: Tensor) -> Tensor:
        t = torch.full((len(h),), h.shape[1] % 7)
        scale, shift = self.t2(F.silu(self.t1(self.stamp(t))))[:, None].chunk(2, -1)
        return h * (1 + scale) + shift
