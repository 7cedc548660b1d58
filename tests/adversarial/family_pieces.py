"""Pieces of units: halves of halves, units twice, in turns, in groups of groups, in other memory orders."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cases import IMAGES, ROWS, Family, floats

family = Family("pieces")
X, PICTURES = floats(*ROWS), floats(*IMAGES)


@family.case(X, kinds="channel", right="channel")
class HalvesOfHalves(nn.Module):
    """Chunks of chunks, put together in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(8, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x).relu().chunk(2, 1)
        (c, d), (e, f) = a.chunk(2, 1), b.chunk(2, 1)
        return self.out(torch.cat([f, c * e, d, e], 1))


@family.case(X, kinds="channel", right="channel")
class ConcatenatedTwice(nn.Module):
    """The same units appear twice in what is read, once mirrored in sign."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(8, 24), nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.out(torch.cat([h, -h], 1).relu())


@family.case(X, kinds="channel")
class Interleaved(nn.Module):
    """Units and their negatives side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(8, 24), nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.out(torch.stack([h, -h], -1).flatten(1).relu())


@family.case(X, kinds="channel")
class ThreeWaysMixed(nn.Module):
    """Split by three, joined by a reshape that mixes what was split."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(8, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu().view(-1, 3, 8).permute(0, 2, 1).reshape(-1, 4, 6).permute(0, 2, 1).reshape(-1, 24)
        return self.out(h)


@family.case(PICTURES, kinds="channel conv_group", right="channel")
class GroupsInGroups(nn.Module):
    """Grouped, shuffled, grouped otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.g1 = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1, groups=4)
        self.g2, self.out = nn.Conv2d(24, 12, 1, groups=6), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.g1(self.a(x)).relu()
        h = h.unflatten(1, (4, 6)).transpose(1, 2).flatten(1, 2)
        return self.out(self.g2(h).relu()).mean((2, 3))


@family.case(PICTURES, kinds="channel", right="channel")
class ShuffledUpThenNormed(nn.Module):
    """Pixel shuffle, then a group norm, then a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.norm, self.out = nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(F.pixel_shuffle(self.a(x), 2))
        return self.out(h + F.interpolate(self.b(x), scale_factor=2)).mean((2, 3))


@family.case(PICTURES, kinds="channel", right="channel")
class ChannelsLast(nn.Module):
    """ConvNeXt in channels-last: permutes, linear layers, layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.dw = nn.Conv2d(3, 12, 2, 2), nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 24), nn.Linear(24, 12)
        self.gamma, self.out = nn.Parameter(torch.rand(12)), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        y = self.dw(h).permute(0, 2, 3, 1)
        y = self.gamma * self.down(F.gelu(self.up(self.norm(y))))
        return self.out((h + y.permute(0, 3, 1, 2)).mean((2, 3)))


@family.case(floats((2, 6, 16), (1, 1, 16), (3, 17, 16)), kinds="channel", right="channel")
class BothWaysHalves(nn.Module):
    """A bidirectional recurrence whose halves are read by different layers."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.f, self.b = (
            nn.LSTM(16, 10, 2, batch_first=True, bidirectional=True),
            nn.Linear(10, 3),
            nn.Linear(10, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        forth, back = self.rnn(x)[0].chunk(2, -1)
        return self.f(forth) + self.b(back.flip(1))
