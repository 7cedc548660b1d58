"""Sizes that leave the graph: arithmetic, numpy, strings, keys, tables; and widths that set a scale."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .cases import ROWS, STEPS, Family, floats, quiet
from .nets import Mid
from .references import over, plain

family = Family("sizes", targets=(0.3, 0.5))
X, S = floats(*ROWS), floats(*STEPS)
ZERO = quiet(lambda: torch.zeros(4, 8), X)


def mid(name: str, middle: Any, inputs: Any = X, **options: Any) -> None:
    options.setdefault("must", "fc1.weight")
    family.add(name, lambda: Mid(middle), inputs, **options)


def first_half(h: Tensor, k: Any) -> Tensor:
    return torch.cat([h[:, :k] * 2, h[:, k:]], 1)


mid("numpy_integer_as_bound", lambda m, h: first_half(h, np.int64(12)))
mid("numpy_integer_hidden_by_zeros", lambda m, h: first_half(h - 0.2, np.int64(12)), ZERO)
mid("tensor_as_bound", lambda m, h: first_half(h, torch.tensor(12)))
mid("half_of_shape", lambda m, h: first_half(h, h.shape[1] // 2))
mid("half_of_shape_by_numpy", lambda m, h: first_half(h, np.int64(h.shape[1]) // 2))
mid("half_through_string", lambda m, h: first_half(h, int(str(h.shape[1])) // 2))
mid("half_through_float", lambda m, h: first_half(h, round(h.shape[1] * 0.5)))
mid("half_of_numel", lambda m, h: first_half(h, h.numel() // len(h) // 2))
mid("half_of_stride", lambda m, h: first_half(h, h.stride(0) // 2))
mid("half_of_bytes", lambda m, h: first_half(h, h.nbytes // len(h) // 8))
mid("half_of_len", lambda m, h: first_half(h, len(h.T) // 2))
mid("half_of_a_tensor_of_shape", lambda m, h: first_half(h, int(torch.tensor(h.shape)[1] // 2)))
mid("bits_of_width", lambda m, h: h * h.shape[1].bit_length())
mid("divmod_of_width", lambda m, h: h * (1 + divmod(h.shape[1], 5)[1]))
mid("parsed_shape", lambda m, h: h * (1 + eval(repr(tuple(h.shape)))[1] / 10))
mid("sum_over_literal_width", lambda m, h: h + h.sum(1, keepdim=True) / 24)
mid("arange_of_width", lambda m, h: h * torch.arange(h.shape[1]))
mid("linspace_of_width", lambda m, h: h * torch.linspace(0, 1, h.shape[1]))
mid("arange_in_numpy", lambda m, h: h * torch.from_numpy(np.arange(h.shape[1], dtype=np.float32)))
mid("list_of_width", lambda m, h: h * torch.tensor([float(i) for i in range(h.shape[1])]))
mid("ones_cumsum", lambda m, h: h * torch.ones(h.shape[1]).cumsum(0))
mid("ones_like_cumsum", lambda m, h: h * torch.ones_like(h).cumsum(1).rsqrt())
mid("full_cumprod", lambda m, h: h * h.new_full((h.shape[1],), 0.9).cumprod(0))
mid("nonzero_of_ones", lambda m, h: h * torch.ones(h.shape[1]).nonzero()[:, 0])
mid("argsort_of_zeros", lambda m, h: h * torch.zeros(h.shape[1]).argsort(stable=True))
mid("eye_of_width", lambda m, h: h @ (torch.eye(h.shape[1]) + torch.ones(h.shape[1], h.shape[1]).triu(1) * 0.1))
mid("eye_alone", lambda m, h: h @ torch.eye(h.shape[1]))
mid("window_function", lambda m, h: h * torch.hann_window(h.shape[1]))
mid("meshgrid", lambda m, h: h * torch.meshgrid(torch.arange(len(h)), torch.arange(h.shape[1]), indexing="ij")[1])
mid("key_of_width", lambda m, h: m.heads[str(h.shape[1])](h) if hasattr(m, "heads") else h * len(f"{'x' * h.shape[1]}"))
mid("step_count_only", lambda m, h: h / h.shape[1] ** 0.5, S, right="channel")


@family.case(X)
class OneOverRootWidth(Mid):
    """A scale from the width of a tensor: cut = mask wants that of the original, or a lock."""

    def mid(self, h: Tensor) -> Tensor:
        return h * h.shape[1] ** -0.5


@family.case(X)
class RootWidthAttribute(Mid):
    """The same scale, from an attribute that follows the cut."""

    def mid(self, h: Tensor) -> Tensor:
        return torch.tanh(h * math.sqrt(self.fc1.out_features))


@family.case(X)
class RootWidthByNumpy(Mid):
    """The same scale, computed outside of torch."""

    def mid(self, h: Tensor) -> Tensor:
        return torch.tanh(h / float(np.sqrt(h.size(-1))))


@family.case(X, truths=(plain, over("average", "fc1.weight", out=None)))
class MeanByHand(Mid):
    """Sum over the width by itself: either it is the mean of what is kept, or that of the original."""

    def average(self, h: Tensor) -> Tensor:
        return h.sum(1, keepdim=True) / h.shape[1]

    def mid(self, h: Tensor) -> Tensor:
        return h + self.average(h)


@family.case(X, truths=(plain, over("spread", "fc1.weight", out=None)))
class VarianceByHand(Mid):
    """The same with squares: a norm, written down."""

    def spread(self, h: Tensor) -> Tensor:
        return (h.pow(2).sum(1, keepdim=True) / h.shape[1] + 1).sqrt()

    def mid(self, h: Tensor) -> Tensor:
        return h / self.spread(h)


@family.case(S)
class OnTheFlySinusoid(nn.Module):
    """Sinusoids made anew from the width: the kept channels must keep their own frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down, self.out = (
            nn.Linear(8, 16),
            nn.Linear(16, 24),
            nn.Linear(24, 16),
            nn.Linear(16, 3),
        )

    def table(self, steps: int, width: int) -> Tensor:
        rate = torch.exp(torch.arange(0, width, 2) * (-math.log(100.0) / width))
        angle = torch.arange(steps)[:, None] * rate
        return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :width]

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = h + self.table(h.shape[1], h.shape[2])
        return self.out(h + self.down(self.up(h).relu()))


@family.case(X)
class GetattrByWidth(nn.Module):
    """A layer found by the width in its name."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.scale24, self.scale17, self.out = nn.Linear(8, 24), 2.0, 5.0, nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.out(h * getattr(self, f"scale{h.shape[1]}", 1.0))


@family.case(X)
class ModuleByWidth(nn.Module):
    """A dictionary of modules whose key is the width."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.heads = nn.Linear(8, 24), nn.ModuleDict({"24": nn.Linear(24, 3)})

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.heads[str(h.shape[1])](h)


@family.case(X)
class WidthAsFloat(Mid):
    """Half of the width, kept as a float since the constructor."""

    def __init__(self) -> None:
        super().__init__()
        self.half = 24 / 2

    def mid(self, h: Tensor) -> Tensor:
        return first_half(h, int(self.half))


@family.case(X)
class SplitBySizes(Mid):
    """Pieces of unequal size, given as a list in the constructor."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [4, 8, 12]

    def mid(self, h: Tensor) -> Tensor:
        a, b, c = h.split(self.sizes, 1)
        return torch.cat([c.tanh(), a, b * 2], 1)


@family.case(X)
class SplitByRatio(Mid):
    """A part of the width by a ratio: a cut moves the border."""

    def mid(self, h: Tensor) -> Tensor:
        k = int(0.25 * h.shape[1])
        return torch.cat([h[:, :k].tanh(), h[:, k:]], 1)


@family.case(X, right="channel")
class Chunks(Mid):
    """Gated halves: what is cut in one half has to go in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.fc2 = nn.Linear(12, 4)

    def mid(self, h: Tensor) -> Tensor:
        a, b = h.chunk(2, 1)
        return a * torch.sigmoid(b)
