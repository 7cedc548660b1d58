"""Positions, tokens and tables: data, not units, also where the example reaches only a part of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cases import Family, Make, floats, ids
from .nets import Body

family = Family("positions")
S = floats((2, 6, 8), (1, 1, 8), (3, 17, 8))
T = ids(20, (2, 6), (1, 1), (3, 17))
SHORT = floats((2, 1, 8), (2, 6, 8), (3, 17, 8))


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
