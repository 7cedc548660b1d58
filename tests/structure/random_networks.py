"""Random networks over the supported operations, drawn by hypothesis: images first, then perhaps a sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from micro.attention import Block
from micro.concats import Shuffle
from torch import Tensor, nn
from torch.nn import functional as F

Shape = tuple[int, int]  # channels, side of the image


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, name: str, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.name, self.function = name, function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)

    def extra_repr(self) -> str:
        return self.name


class Gate(nn.Module):
    """Squeeze and excite."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(channels, hidden), nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))[:, :, None, None]


class Halves(nn.Module):
    """Chunk in two, work on one half, join in one order or the other."""

    def __init__(self, channels: int, *, turned: bool) -> None:
        super().__init__()
        self.conv, self.turned = nn.Conv2d(channels // 2, channels // 2, 3, padding=1), turned

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        left = F.relu(self.conv(left))
        return torch.cat([right, left] if self.turned else [left, right], 1)


class ChannelsLast(nn.Module):
    """A layer norm over channels and a feed-forward part, channels last."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(channels), nn.Linear(channels, hidden), nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.permute(0, 2, 3, 1))
        return x + self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)


@dataclass
class Program:
    """Layers with the numbers of their inputs, and the shape of every value."""

    layers: list[nn.Module] = field(default_factory=list)
    inputs: list[tuple[int, ...]] = field(default_factory=list)
    shapes: list[Shape] = field(default_factory=lambda: [(3, 8)])
    zeroing: bool = True

    def add(self, layer: nn.Module, inputs: tuple[int, ...], shape: Shape) -> None:
        self.layers.append(layer)
        self.inputs.append(inputs)
        self.shapes.append(shape)


class RandomNet(nn.Module):
    """Runs a program, then classifies the last value or reads it as a sequence."""

    def __init__(self, program: Program, tail: nn.Module) -> None:
        super().__init__()
        self.layers, self.tail = nn.ModuleList(program.layers), tail
        self.inputs = program.inputs

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for layer, inputs in zip(self.layers, self.inputs, strict=True):
            values.append(layer(*(values[i] for i in inputs)))
        return self.tail(values[-1])


def _convolution(draw: st.DrawFn, program: Program, i: int) -> None:
    c, side = program.shapes[i]
    groups = draw(st.sampled_from([1, 1, 1, *(g for g in (2, 3, 4) if c % g == 0), c]))
    out = c * draw(st.integers(1, 2)) if groups == c else groups * draw(st.integers(2, 5))
    layers: list[nn.Module] = [nn.Conv2d(c, out, draw(st.sampled_from([1, 3])), padding="same", groups=groups)]
    norm = draw(st.sampled_from(["none", "batch", "group", "instance"]))
    if norm == "batch":
        layers.append(nn.BatchNorm2d(out))
    elif norm != "none":
        program.zeroing = False
        divisors = [n for n in range(1, out + 1) if out % n == 0]
        layers.append(nn.GroupNorm(draw(st.sampled_from(divisors)), out) if norm == "group" else nn.InstanceNorm2d(out))
    layers.append(draw(st.sampled_from([nn.ReLU(), nn.Hardswish(), nn.PReLU(out), nn.Identity()])))
    program.add(nn.Sequential(*layers), (i,), (out, side))


def _join(draw: st.DrawFn, program: Program, i: int) -> None:
    side = program.shapes[i][1]
    mates = [j for j, shape in enumerate(program.shapes) if shape[1] == side and j > 0] or [i]
    chosen = (i, *draw(st.lists(st.sampled_from(mates), min_size=1, max_size=2)))
    width = sum(program.shapes[j][0] for j in chosen)
    program.add(Apply("cat", lambda *xs: torch.cat(xs, 1)), chosen, (width, side))


def _combine(draw: st.DrawFn, program: Program, i: int) -> None:
    mates = [j for j, shape in enumerate(program.shapes) if shape == program.shapes[i]]
    j = draw(st.sampled_from(mates))
    function = draw(st.sampled_from([torch.add, torch.mul, torch.maximum]))
    program.add(Apply(function.__name__, function), (i, j), program.shapes[i])


def _space(draw: st.DrawFn, program: Program, i: int) -> None:
    c, side = program.shapes[i]
    kinds = ["roll", *(["pool", "unshuffle"] if side > 2 and side % 2 == 0 else []), *(["up"] if side < 8 else [])]
    kind = draw(st.sampled_from([*kinds, *(["shuffle"] if c % 4 == 0 and side < 8 else [])]))
    if kind == "pool":
        program.add(nn.MaxPool2d(2), (i,), (c, side // 2))
    elif kind == "unshuffle":
        program.add(nn.PixelUnshuffle(2), (i,), (4 * c, side // 2))
    elif kind == "shuffle":
        program.add(nn.PixelShuffle(2), (i,), (c // 4, side * 2))
    elif kind == "up":
        out = draw(st.integers(2, 8))
        program.add(nn.ConvTranspose2d(c, out, 2, stride=2), (i,), (out, side * 2))
    else:
        program.add(Apply("roll", lambda x: torch.roll(x, (1, 2), (2, 3))), (i,), (c, side))


def _mix(draw: st.DrawFn, program: Program, i: int) -> None:
    c, side = program.shapes[i]
    kind = draw(st.sampled_from(["gate", "last", *(["halves", "shuffle"] if c % 2 == 0 else [])]))
    if kind == "gate":
        program.add(Gate(c, draw(st.integers(2, 6))), (i,), (c, side))
    elif kind == "halves":
        program.add(Halves(c, turned=draw(st.booleans())), (i,), (c, side))
    elif kind == "shuffle":
        program.add(Shuffle(draw(st.sampled_from([g for g in (2, 3, 4) if c % g == 0]))), (i,), (c, side))
    else:
        program.zeroing = False
        program.add(ChannelsLast(c, draw(st.integers(2, 12))), (i,), (c, side))


class Sequence(nn.Module):
    """Patches as tokens: projection, transformer block, mean."""

    def __init__(self, channels: int, dim: int, heads: int) -> None:
        super().__init__()
        self.project, self.block, self.out = nn.Linear(channels, dim), Block(dim, heads), nn.Linear(dim, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.block(self.project(x.flatten(2).transpose(1, 2))).mean(1))


@st.composite
def networks(draw: st.DrawFn, size: int = 7) -> tuple[nn.Module, bool]:
    """A network for images [2, 3, 8, 8], and whether zeroed producers are as good as removed ones."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    program = Program()
    _convolution(draw, program, 0)
    moves = [_convolution, _convolution, _convolution, _join, _combine, _space, _mix]
    for _ in range(draw(st.integers(1, size))):
        i = draw(st.integers(max(0, len(program.shapes) - 3), len(program.shapes) - 1))
        if program.shapes[i][0] <= 48:
            draw(st.sampled_from(moves))(draw, program, i)
    c, side = program.shapes[-1]
    tail = draw(st.sampled_from(["pool", "flatten", "sequence"]))
    if tail == "sequence":
        program.zeroing = False
        heads = draw(st.sampled_from([2, 3]))
        return RandomNet(program, Sequence(c, heads * draw(st.integers(2, 5)), heads)), False
    if tail == "flatten":
        return RandomNet(program, nn.Sequential(nn.Flatten(), nn.Linear(c * side * side, 5))), program.zeroing
    return RandomNet(program, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 5))), program.zeroing
