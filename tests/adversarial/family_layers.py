"""Whole blocks removed: the code around them may know their number, their neighbours, or how many there are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cases import Family, floats

family = Family("layers")
S = floats((2, 6, 16), (1, 1, 16), (3, 40, 16))


class Block(nn.Module):
    """Pre-norm attention and feed-forward, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.o = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor, window: int = 10**6, scale: float = 1.0) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        p = torch.arange(x.shape[1])
        far = (p[:, None] - p).abs() >= window
        x = x + scale * self.o((q @ k.mT / 4).masked_fill(far, -1e4).softmax(-1) @ v)
        return x + scale * self.down(self.up(x).relu())


class Stack(nn.Module):
    """Six blocks and a classifier; `through` is what varies."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(6)])
        self.head = nn.Linear(16, 4)
        self.make()

    def make(self) -> None:
        """More parameters."""

    def through(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.through(x))


def case(**options: Any) -> Any:
    options.setdefault("kinds", "layer")
    options.setdefault("targets", (0.34, 0.5))
    return family.case(S, **options)


@case(right="layer")
class Straight(Stack):
    """Nothing to see: the control."""


@case(right="layer")
class Sequence(Stack):
    """The same in an nn.Sequential."""

    def make(self) -> None:
        self.blocks = nn.Sequential(*self.blocks)

    def through(self, x: Tensor) -> Tensor:
        return self.blocks(x)


@case()
class WindowsInTurns(Stack):
    """Local and global attention in turns, by number: six steps don't show it."""

    def through(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x, window=8 if i % 2 else 10**6)
        return x


@case()
class ScaleByNumber(Stack):
    def through(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x, scale=1 / (i + 1))
        return x


@case()
class ScaleByDepth(Stack):
    """All branches are scaled by the root of how many there are."""

    def through(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, scale=len(self.blocks) ** -0.5)
        return x


@case()
class StochasticDepth(Stack):
    """Skipped with a probability that grows with the number, in training."""

    def through(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            if self.training and torch.rand(()) < 0.3 * i / max(len(self.blocks) - 1, 1):
                continue
            x = block(x)
        return x


@case()
class LayerTable(Stack):
    """An embedding of the block's number is added before each."""

    def make(self) -> None:
        self.table = nn.Embedding(6, 16)

    def through(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x + self.table(torch.tensor(i)))
        return x


@case()
class ScalarMix(Stack):
    """ELMo: a softmax over all blocks weighs their outputs."""

    def make(self) -> None:
        self.mix = nn.Parameter(torch.randn(6))

    def through(self, x: Tensor) -> Tensor:
        found = []
        for block in self.blocks:
            x = block(x)
            found.append(x)
        return torch.einsum("l,lbnd->bnd", self.mix[: len(found)].softmax(0), torch.stack(found))


@case()
class MeanOfBlocks(Stack):
    def through(self, x: Tensor) -> Tensor:
        found = []
        for block in self.blocks:
            x = block(x)
            found.append(x)
        return torch.stack(found).mean(0)


@case()
class LongSkips(Stack):
    """A U-shaped transformer: the second half gets what the first half gave, last in first out."""

    def through(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        half = len(self.blocks) // 2
        for i, block in enumerate(self.blocks):
            if i >= half and kept:
                x = x + kept.pop()
            x = block(x)
            if i < half:
                kept.append(x)
        return x


@case()
class FeatureAtThree(Stack):
    """Reads what the fourth block gives."""

    def through(self, x: Tensor) -> Tensor:
        extra = torch.zeros_like(x)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == 3:
                extra = x
        return x + extra.flip(-1)


@case()
class EveryThird(Stack):
    """After every third block the steps are normalised."""

    def through(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i % 3 == 2:
                x = F.layer_norm(x, x.shape[-1:])
        return x


@case()
class TwoThreads(Stack):
    """The first half over the steps, the second half over the mean, split by slices."""

    def through(self, x: Tensor) -> Tensor:
        for block in self.blocks[:3]:
            x = block(x)
        y = x.flip(-1)
        for block in self.blocks[3:]:
            y = block(y)
        return x + y


@case()
class Backwards(Stack):
    """Runs the stack once more from behind, mirrored."""

    def through(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        for block in reversed(self.blocks):
            x = block(x.flip(-1))
        return x


@case(right="layer")
class Twice(Stack):
    """The stack is used twice (weight sharing over depth)."""

    def through(self, x: Tensor) -> Tensor:
        for _ in range(2):
            for block in self.blocks:
                x = block(x)
        return x


@case()
class SharedBlocks(Stack):
    """ALBERT in pairs: numbers 0 and 3 are the same module."""

    def make(self) -> None:
        self.blocks = nn.ModuleList([self.blocks[i % 3] for i in range(6)])


@case()
class ByList(Stack):
    """Windows from a list in the constructor, zipped with the blocks."""

    def make(self) -> None:
        self.windows = [2, 4, 8, 16, 32, 64]

    def through(self, x: Tensor) -> Tensor:
        for block, window in zip(self.blocks, self.windows, strict=False):
            x = block(x, window=window)
        return x


@case()
class ByRange(Stack):
    """A loop over the number of layers in the configuration."""

    def make(self) -> None:
        self.depth = 6

    def through(self, x: Tensor) -> Tensor:
        for i in range(self.depth):
            x = self.blocks[i](x)
        return x


@case()
class CacheByNumber(Stack):
    """Every block adds what it gave in the last call, found by its number."""

    def make(self) -> None:
        self.cache: dict[int, Tensor] = {}

    def through(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.cache and self.cache[i].shape == x.shape:
                x = x + 0.1 * self.cache[i]
            self.cache[i] = x.detach()
        return x


@case()
class AllStates(Stack):
    """All hidden states come out."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        states = [x]
        for block in self.blocks:
            x = block(x)
            states.append(x)
        return {"y": self.head(x), "states": states}


@case(right="layer")
class FinalNorm(Stack):
    def make(self) -> None:
        self.norm = nn.LayerNorm(16)

    def through(self, x: Tensor) -> Tensor:
        return self.norm(super().through(x))


@case()
class WhileLoop(Stack):
    """Stops when steps agree: depth by data."""

    def through(self, x: Tensor) -> Tensor:
        i = 0
        while i < len(self.blocks) and x.std() < 2.0:
            x = self.blocks[i](x)
            i += 1
        return x


@case()
class DenselyConnected(Stack):
    """Every block reads the sum of all before."""

    def through(self, x: Tensor) -> Tensor:
        all_before = [x]
        for block in self.blocks:
            all_before.append(block(sum(all_before) / len(all_before)))
        return all_before[-1]


@case()
class SharedTable(Stack):
    """One attention bias per block from one parameter, by number."""

    def make(self) -> None:
        self.gain = nn.Parameter(torch.rand(6) + 0.5)

    def through(self, x: Tensor) -> Tensor:
        for gain, block in zip(self.gain, self.blocks, strict=False):
            x = gain * block(x)
        return x


@case()
class LastIsDifferent(Stack):
    """The last block sees the mirrored input, whichever it is."""

    def through(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x.flip(-1) if i == len(self.blocks) - 1 else x)
        return x


@case()
class HooksOnBlocks(Stack):
    """A hook on the third block shifts what comes out."""

    def make(self) -> None:
        self.blocks[2].register_forward_hook(lambda m, i, o: o.flip(-1))


class NoResidual(nn.Module):
    """A block without a residual: removing it is still identity."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.lin(x)).relu()


@case()
class WithoutResiduals(Stack):
    def make(self) -> None:
        self.blocks = nn.ModuleList([NoResidual() for _ in range(6)])


# -- how many blocks there are, and their places, as values -----------------------------------------------------------

LOUD = floats((2, 6, 16), (1, 1, 16), loud=1e4)


def hidden(**options: Any) -> Any:
    return family.case(LOUD, kinds="layer", **options)


@hidden()
class GateOfDepth(Stack):
    def through(self, x: Tensor) -> Tensor:
        x = super().through(x)
        return x + (x - 1e3).relu() / len(self.blocks)


@hidden()
class BoundOfDepth(Stack):
    def make(self) -> None:
        self.num_layers = 6

    def through(self, x: Tensor) -> Tensor:
        return super().through(x).clamp(max=600.0 * self.num_layers)


@hidden()
class PowerOfPlace(Stack):
    def through(self, x: Tensor) -> Tensor:
        for k, block in enumerate(self.blocks):
            x = block(x) + (x - 1e3).relu() * 2**k
        return x


@hidden()
class BoundOfPlace(Stack):
    def through(self, x: Tensor) -> Tensor:
        for k, block in enumerate(self.blocks):
            x = block(x).clamp(max=1e3 * (k + 1))
        return x


@hidden()
class RowOfPlace(Stack):
    """A table with a row for each block, all alike until it was trained."""

    def make(self) -> None:
        self.rows = nn.Parameter(torch.ones(6, 16))

    def through(self, x: Tensor) -> Tensor:
        for k, block in enumerate(self.blocks):
            x = block(x) + (x - 1e3).relu() * self.rows[k] * (k + 1.0)
        return x


@hidden()
class MeanOfStates(Stack):
    def through(self, x: Tensor) -> Tensor:
        states = [x := block(x) for block in self.blocks]
        return x + (torch.stack(states).sum(0) - 1e3).relu()


@hidden()
class Parameters(Stack):
    def through(self, x: Tensor) -> Tensor:
        x = super().through(x)
        return x + (x - 1e3).relu() * sum(p.numel() for p in self.parameters()) / 1e3


@hidden(right="layer")
class SameBoundInTurns(Stack):
    """What the loop does beside the blocks does not matter once more or less: the control."""

    def through(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).clamp(max=1e3)
        return x
