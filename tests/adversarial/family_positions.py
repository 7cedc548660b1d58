"""Positions, tokens and tables: data, not units, also where the example reaches only a part of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cases import Family, Make, floats, ids
from .references import over, plain

family = Family("positions")
S = floats((2, 6, 8), (1, 1, 8), (3, 17, 8))
T = ids(20, (2, 6), (1, 1), (3, 17))
SHORT = floats((2, 1, 8), (2, 6, 8), (3, 17, 8))


class Body(nn.Module):
    """Embeds steps, adds what `place` says, attends with one head at a fixed scale, and classifies."""

    def __init__(self, width: int = 16, tokens: bool = False) -> None:
        super().__init__()
        self.width = width
        self.embed = nn.Embedding(20, width) if tokens else nn.Linear(8, width)
        self.q, self.k, self.v = nn.Linear(width, 12), nn.Linear(width, 12), nn.Linear(width, width)
        self.up, self.down, self.out = nn.Linear(width, 24), nn.Linear(24, width), nn.Linear(width, 3)

    def place(self, h: Tensor) -> Tensor:
        return h

    def bias(self, scores: Tensor) -> Tensor:
        return scores

    def pool(self, h: Tensor) -> Tensor:
        return h.mean(1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.place(self.embed(x))
        scores = self.bias(self.q(h) @ self.k(h).mT * 0.3)
        h = h + scores.softmax(-1) @ self.v(h)
        return self.out(self.pool(h + self.down(self.up(h).relu())))


def case(inputs: list[Make] = S, **options: Any) -> Any:
    options.setdefault("right", "channel")
    options.setdefault("must", "up.weight")
    return family.case(inputs, **options)


@case(whole="pos:0")
class LearnedPositions(Body):
    """A table of 32 positions, of which the example reaches six."""

    def __init__(self) -> None:
        super().__init__()
        self.pos = nn.Parameter(torch.randn(32, 16))

    def place(self, h: Tensor) -> Tensor:
        return h + self.pos[: h.shape[1]]


@case(whole="pos:1")
class LearnedPositionsWithBatch(Body):
    def __init__(self) -> None:
        super().__init__()
        self.pos = nn.Parameter(torch.randn(1, 32, 16))

    def place(self, h: Tensor) -> Tensor:
        return h + self.pos[:, : h.shape[1], :]


@case(SHORT, whole="pos.weight:0 ids:1", name="position_ids_as_buffer")
class PositionIds(Body):
    """BERT: stored numbers of positions, cut to the length of the input, look up a table."""

    def __init__(self) -> None:
        super().__init__()
        self.pos = nn.Embedding(32, 16)
        self.register_buffer("ids", torch.arange(32)[None])

    def place(self, h: Tensor) -> Tensor:
        return h + self.pos(self.ids[:, : h.shape[1]])


@case(T, whole="pos.weight:0")
class PositionsByArange(Body):
    def __init__(self) -> None:
        super().__init__(tokens=True)
        self.pos = nn.Embedding(32, 16)

    def place(self, h: Tensor) -> Tensor:
        return h + self.pos(torch.arange(h.shape[1]))


@case(whole="pos.weight:0")
class PositionsFromMask(Body):
    """fairseq, RoBERTa: positions counted by the cumulative sum of a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.pos = nn.Embedding(40, 16, padding_idx=1)

    def place(self, h: Tensor) -> Tensor:
        mask = (h.abs().sum(-1) > 0).long()
        return h + self.pos(mask.cumsum(1) * mask + 1)


@case(whole="table:0")
class SinusoidBuffer(Body):
    """The usual buffer of sines, [positions, 1, width] in the tutorials."""

    def __init__(self) -> None:
        super().__init__()
        rate = torch.exp(torch.arange(0, 16, 2) * (-math.log(100.0) / 16))
        angle = torch.arange(40)[:, None] * rate
        self.register_buffer("table", torch.stack([angle.sin(), angle.cos()], -1).flatten(1))

    def place(self, h: Tensor) -> Tensor:
        return h + self.table[: h.size(1)]


@case(whole="mask:0 mask:1")
class CausalBuffer(Body):
    """GPT-2: a stored triangle, cut to the length."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tril(torch.ones(32, 32, dtype=torch.bool)))

    def bias(self, scores: Tensor) -> Tensor:
        n = scores.shape[-1]
        return scores.masked_fill(~self.mask[:n, :n], torch.finfo(scores.dtype).min)


@case(SHORT)
class CausalMade(Body):
    def bias(self, scores: Tensor) -> Tensor:
        return scores + torch.full_like(scores[0], -1e4).triu(1)


@case()
class LocalWindow(Body):
    """Attends eight steps far: six steps don't show it."""

    def bias(self, scores: Tensor) -> Tensor:
        p = torch.arange(scores.shape[-1])
        return scores.masked_fill((p[:, None] - p).abs() > 7, -1e4)


@case()
class AlibiByHand(Body):
    def bias(self, scores: Tensor) -> Tensor:
        p = torch.arange(scores.shape[-1])
        return scores - 0.2 * (p[:, None] - p).abs()


@case(whole="table:0")
class RelativeTable(Body):
    """T5 and Swin: a learned bias by clipped distance."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(15))

    def bias(self, scores: Tensor) -> Tensor:
        p = torch.arange(scores.shape[-1])
        return scores + self.table[(p[:, None] - p).clamp(-7, 7) + 7]


@case(whole="table.weight:0")
class RelativeBuckets(Body):
    """Distances in logarithmic buckets, as in T5."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 1)

    def bias(self, scores: Tensor) -> Tensor:
        p = torch.arange(scores.shape[-1])
        far = (p[:, None] - p).abs().clamp(min=1).log2().long().clamp(max=7)
        return scores + self.table(far)[..., 0]


@case(whole="keys:0")
class RelativeKeys(Body):
    """Shaw: learned vectors per distance meet the queries, so the width of the heads goes along."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(15, 12))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        p = torch.arange(h.shape[1])
        near = self.keys[(p[:, None] - p).clamp(-7, 7) + 7]
        q = self.q(h)
        scores = q @ self.k(h).mT + torch.einsum("bid,ijd->bij", q, near)
        return self.out(self.pool(h + scores.softmax(-1) @ self.v(h) + self.down(self.up(h).relu())))


@case(whole="cls:1")
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


@case(whole="cls:1 registers:1")
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
class TokenShift(Body):
    """RWKV: a part of the width comes from the step before."""

    def place(self, h: Tensor) -> Tensor:
        before = F.pad(h, (0, 0, 1, -1))
        half = h.shape[-1] // 2
        return torch.cat([before[..., :half], h[..., half:]], -1)


@case()
class TimeMix(Body):
    """RWKV: a learned mix of now and before, per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.rand(16))

    def place(self, h: Tensor) -> Tensor:
        return h * self.mix + F.pad(h, (0, 0, 1, -1)) * (1 - self.mix)


@case(floats((2, 6, 8), (3, 6, 8)), whole="mix.weight:0 mix.weight:1")
class MlpMixer(Body):
    """Token mixing over six steps: its hidden width may go, its steps may not."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(6, 6)

    def place(self, h: Tensor) -> Tensor:
        return h + self.mix(h.mT).mT


@case(floats((2, 6, 8), (3, 6, 8)))
class MixerHidden(Body):
    def __init__(self) -> None:
        super().__init__()
        self.mix1, self.mix2 = nn.Linear(6, 20), nn.Linear(20, 6)

    def place(self, h: Tensor) -> Tensor:
        return h + self.mix2(self.mix1(h.mT).relu()).mT


@case()
class StepsByConvolution(Body):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(16, 16, 3, padding=1, groups=16)

    def place(self, h: Tensor) -> Tensor:
        return h + self.conv(h.mT).mT


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


@case(floats((2, 6, 8), (1, 2, 8), (3, 18, 8)))
class PatchMerging(Body):
    """Swin: neighbours side by side in the width, then halved."""

    def __init__(self) -> None:
        super().__init__()
        self.merge = nn.Linear(32, 16)

    def place(self, h: Tensor) -> Tensor:
        return self.merge(torch.cat([h[:, 0::2], h[:, 1::2]], -1))


@case(floats((2, 6, 8), (1, 2, 8), (3, 18, 8)))
class PatchMergingByReshape(PatchMerging):
    def place(self, h: Tensor) -> Tensor:
        return self.merge(h.reshape(len(h), h.shape[1] // 2, -1))


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


@case(S, whole="step:0")
class LastStep(Body):
    """Reads the last step, scaled by a table from the back."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.rand(40))

    def pool(self, h: Tensor) -> Tensor:
        return (h * self.step[-h.shape[1] :, None])[:, -1]


@case(floats((2, 6, 8), (1, 6, 8)), whole="pos:0")
class InterpolatedPositions(Body):
    """A position table that is resized to the length."""

    def __init__(self) -> None:
        super().__init__()
        self.pos = nn.Parameter(torch.randn(10, 16))

    def place(self, h: Tensor) -> Tensor:
        return h + F.interpolate(self.pos.T[None], size=h.shape[1], mode="linear")[0].T


