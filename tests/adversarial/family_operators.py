"""Operators and layers that few networks have: buffers filled by pieces, sketches, samples at offsets, made kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cases import Family, both, fixed
from .references import Kept, plain, put
from .shared import IMAGES, ROWS, STEPS

family = Family("operators")


def case(inputs: Any = ROWS, **options: Any) -> Any:
    return family.case(inputs, **{"right": "channel", **options})


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5)


@case()
class OneBufferForSeveral(nn.Module):
    """Several layers write their pieces into one buffer, whose width is the sum of theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.out = nn.ModuleList(nn.Linear(8, n) for n in (6, 10, 4)), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, start = x.new_zeros(len(x), sum(layer.out_features for layer in self.layers)), 0
        for layer in self.layers:
            h[:, start : start + layer.out_features] = layer(x).relu()
            start += layer.out_features
        return self.out(h)


@case()
class TwoSides(nn.Module):
    """A matrix of features between two weights, as in Kronecker layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.u, self.v, self.out = nn.Linear(8, 16), weight(4, 4), weight(4, 5), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu().view(len(x), self.u.shape[0], -1)
        return self.out((self.u.T @ h @ self.v).flatten(1).relu())


@case(both(ROWS, ROWS))
class NeuralTensor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.w, self.v, self.out = nn.Linear(8, 16), weight(12, 16, 16), nn.Linear(32, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = self.a(x).tanh(), self.a(y).tanh()
        return self.out((torch.einsum("bi,kij,bj->bk", a, self.w, b) + self.v(torch.cat([a, b], 1))).tanh())


@case(IMAGES)
class CompactBilinear(nn.Module):
    """Two count sketches of the channels, multiplied in the Fourier domain."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out, self.width = nn.Conv2d(3, 16, 3), nn.Linear(20, 10), nn.Linear(10, 3), 20
        for name in ("h1", "h2"):
            self.register_buffer(name, torch.randint(20, (16,)))
            self.register_buffer(f"{name}_sign", torch.randint(2, (16,)) * 2.0 - 1)

    def sketch(self, v: Tensor, to: Tensor, sign: Tensor) -> Tensor:
        return torch.fft.rfft(v.new_zeros(len(v), self.width).index_add_(1, to, v * sign))

    def forward(self, x: Tensor) -> Tensor:
        v = self.a(x).mean((2, 3))
        both = self.sketch(v, self.h1, self.h1_sign) * self.sketch(v, self.h2, self.h2_sign)
        return self.out(self.b(torch.fft.irfft(both, n=self.width)).relu())


@case(IMAGES)
class ConditionalKernels(nn.Module):
    """Every sample has its own mixture of kernels, applied as groups of one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.kernels, self.route = nn.Conv2d(3, 12, 3), weight(3, 10, 12, 3, 3), nn.Linear(12, 3)
        self.out = nn.Conv2d(10, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        b, c, y, w = h.shape
        rows = self.kernels.shape[1]
        kernel = (self.route(h.mean((2, 3))).sigmoid() @ self.kernels.view(3, -1)).view(b * rows, c, 3, 3)
        return self.out(F.conv2d(h.reshape(1, b * c, y, w), kernel, padding=1, groups=b).view(b, rows, y, w))


@case(IMAGES)
class DynamicRelu(nn.Module):
    """The larger of two lines for each channel, whose slopes come from the image."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.squeeze, self.lines = nn.Conv2d(3, 12, 3), nn.Linear(12, 6), nn.Linear(6, 48)
        self.out = nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        lines = self.lines(self.squeeze(h.mean((2, 3))).relu()).sigmoid().view(-1, h.shape[1], 4) * 2 - 1
        h = h.permute(2, 3, 0, 1).unsqueeze(-1) * (1 + lines[..., :2]) + lines[..., 2:]
        return self.out(h.amax(-1).permute(2, 3, 0, 1))


@case(IMAGES)
class SamplesAtOffsets(nn.Module):
    """A deformable convolution by hand: offsets, masks, samples, and one product over taps and channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.offset, self.mask = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 12), (12, 18), (12, 9)))
        self.weight, self.out = weight(10, 12, 9), nn.Conv2d(10, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        b, _, y, w = h.shape
        offset, taps = self.offset(h).view(b, 9, 2, y, w), []
        rows, columns = torch.meshgrid(torch.arange(y), torch.arange(w), indexing="ij")
        for k in range(9):
            py, px = rows + k // 3 - 1 + offset[:, k, 0], columns + k % 3 - 1 + offset[:, k, 1]
            grid = torch.stack([2 * px / (w - 1) - 1, 2 * py / (y - 1) - 1], -1)
            taps.append(F.grid_sample(h, grid, align_corners=True))
        sampled = torch.stack(taps, 2) * self.mask(h).sigmoid()[:, None]
        return self.out(torch.einsum("bckyx,ock->boyx", sampled, self.weight).relu())


@case(IMAGES)
class CoordinateAttention(nn.Module):
    """Rows and columns go through one layer behind each other, and gate the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.norm = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 6, 1), nn.BatchNorm2d(6)
        self.rows, self.columns, self.out = nn.Conv2d(6, 16, 1), nn.Conv2d(6, 16, 1), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        y, w = h.shape[2:]
        both = torch.cat([h.mean(3, keepdim=True), h.mean(2, keepdim=True).permute(0, 1, 3, 2)], 2)
        a, b = F.hardswish(self.norm(self.c(both))).split([y, w], 2)
        return self.out(h * self.rows(a).sigmoid() * self.columns(b.permute(0, 1, 3, 2)).sigmoid())


@case(IMAGES)
class SplitAttention(nn.Module):
    """A softmax over two groups of a grouped convolution, channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.g = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3, padding=1, groups=2)
        self.squeeze, self.excite, self.out = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 32, 1), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.g(self.a(x).relu()).relu()
        parts = h.split(h.shape[1] // 2, 1)
        w = self.excite(self.squeeze(sum(parts).mean((2, 3), keepdim=True)).relu())
        w = w.view(len(x), 2, -1).softmax(1).reshape(len(x), -1, 1, 1)
        return self.out(sum(u * v for u, v in zip(parts, w.split(w.shape[1] // 2, 1), strict=True)))


BAGS = [[1, 2, 3, 4, 4, 0, 7], [5, 5], [9, 1, 2], [0, 0, 3, 4, 4, 0, 7]]
STARTS = [[0, 3, 3], [0], [0, 1, 2], [0, 1, 6]]


@case(both(*(fixed(*map(torch.tensor, values)) for values in (BAGS, STARTS))))
class Bags(nn.Module):
    """Sums and maxima of rows of two tables, the first with a row for padding."""

    def __init__(self) -> None:
        super().__init__()
        self.sums = nn.EmbeddingBag(10, 16, mode="sum", padding_idx=0)
        self.most = nn.EmbeddingBag(10, 16, mode="max")
        self.a, self.out = nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, ids: Tensor, starts: Tensor) -> Tensor:
        return self.out(self.a(self.sums(ids, starts, per_sample_weights=1 + ids / 9) + self.most(ids, starts)).relu())


def most_of_kept_heads(model: nn.Module, kept: Kept) -> None:
    """The largest weight runs over heads that are there."""
    inner, rows = model.attention, kept("attention.in_proj_weight")
    heads = (rows[rows < 12] // 3).unique()

    def attention(*inputs: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        y, w = inner(*inputs, **options)
        return y, w[:, heads]

    put(model, "attention", attention)


@case(STEPS, right="channel head", truths=(plain, most_of_kept_heads))
class MaskAndWeights(nn.Module):
    """`nn.MultiheadAttention` with a causal mask, and its weights asked for: another path than the fused one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Linear(8, 12), nn.Linear(12, 3)
        self.attention = nn.MultiheadAttention(12, 4, add_bias_kv=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.stem(x).transpose(0, 1)
        mask = torch.full((len(h), len(h)), -math.inf).triu(1)
        y, w = self.attention(h, h, h, attn_mask=mask, average_attn_weights=False)
        return self.out(h + y).transpose(0, 1), w.amax(1)
