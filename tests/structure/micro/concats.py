"""Concatenations and splits, aligned and not."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from micro.base import case, conv, conv_bn, head, image


@case(image(), free="a b c", share=0.4, double=True)
class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 8), conv(3, 10), conv(18, 12), head(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.c(torch.cat([self.a(x), self.b(x)], 1))))


@case(image(), free="a b c", share=0.3)
class ConcatNorm(nn.Module):
    """A batch norm over a concatenation, whose two inputs have a concatenation of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(3, 10), conv(18, 6)
        self.norm, self.head = nn.BatchNorm2d(24), head(24)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.a(x), self.b(x)], dim=1)
        return self.head(F.relu(self.norm(torch.cat([y, self.c(y)], dim=1))))


@case(image(), free="a b b#2", share=0.3)
class UnalignedConcats(nn.Module):
    """Sums of concatenations whose seams do not coincide: the finer cut of both is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.head = conv(3, 4), conv(3, 8), conv(3, 6), conv(3, 6), head(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(torch.cat([self.a(x), self.b(x)], 1) + torch.cat([self.c(x), self.d(x)], 1)))


@case(image(), free="a b", share=0.3)
class SameTensorTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(16, 10), head(10)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        return self.head(F.relu(self.b(torch.cat((y, y), 1))))


@case(image(), free="a b c", share=0.3)
class CatAdd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.wide, self.c, self.head = conv(3, 6), conv(3, 8), conv(3, 14), conv(14, 9), head(9)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.a(x), self.b(x)], 1)
        return self.head(F.relu(self.c(F.relu(y + self.wide(x)))))


@case(image(), free="convs.0 convs.1 convs.2 convs.3", share=0.3)
class Dense(nn.Module):
    """DenseNet: every layer sees all before it through a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, 9, 15, 21]
        self.norms = nn.ModuleList(nn.BatchNorm2d(w) for w in widths)
        self.convs = nn.ModuleList(conv(w, 6) for w in widths)
        self.head = head(27)

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for norm, layer in zip(self.norms, self.convs, strict=True):
            seen.append(layer(F.relu(norm(torch.cat(seen, 1)))))
        return self.head(F.relu(torch.cat(seen, 1)))


@case(image(), free="stem a b out", share=0.3)
class SplitConcat(nn.Module):
    """Split in two, worked on apart, joined in the other order."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.out, self.head = conv(3, 12), conv(6, 8), conv(6, 8), conv(16, 9), head(9)

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.relu(self.stem(x)).chunk(2, 1)
        return self.head(F.relu(self.out(torch.cat([self.b(right), self.a(left)], 1))))


@case(image(), free="stem a b out", share=0.3)
class TensorSplitEqual(nn.Module):
    """Three equal pieces by count: they stay equal only where they shrink alike."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.out, self.head = conv(3, 12), conv(4, 8), conv(4, 8), conv(20, 9), head(9)

    def forward(self, x: Tensor) -> Tensor:
        left, middle, right = F.relu(self.stem(x)).tensor_split(3, 1)
        return self.head(F.relu(self.out(torch.cat([self.b(right), middle, self.a(left)], 1))))


@case(image(), free="a", share=0.0, locked={"stem": "pieces of unequal size", "stem#2": "pieces of unequal size"})
class TensorSplitUnequal(nn.Module):
    """Five channels in two pieces: after a cut their borders would lie elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.head = conv(3, 5), conv(3, 8), head(10)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.tensor_split(F.relu(self.stem(x)), 2, dim=1)
        return self.head(F.relu(torch.cat([self.a(left), right], 1)))


@case(image(), free="a", share=0.0, locked={"stem": "cut at positions", "stem#2": "cut at positions"})
class HSplitAtPositions(nn.Module):
    """Pieces that begin at positions from the code."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.head = conv(3, 8), conv(6, 8), head(10)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.hsplit(F.relu(self.stem(x)), [2])
        return self.head(F.relu(torch.cat([self.a(right), left], 1)))


@case(image(), free="stem a b", share=0.2)
class SplitIdentity(nn.Module):
    """One half passes unchanged (ShuffleNet V2 without the shuffle)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = conv(3, 12), conv(6, 10), conv(10, 6), head(12)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, dim=1)
        return self.head(F.relu(torch.cat([left, self.b(F.relu(self.a(right)))], 1)))


@case(image(), free="stem a stem#2", share=0.3)
class UnequalSplit(nn.Module):
    """Sizes of the pieces come from attributes, which follow the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = (4, 8)
        self.stem, self.a, self.b, self.head = conv(3, 12), conv(4, 8), conv(8, 8), head(8)

    def forward(self, x: Tensor) -> Tensor:
        small, large = self.stem(x).split(self.sizes, 1)
        return self.head(F.relu(self.a(F.relu(small))) * F.relu(self.b(F.relu(large))))


@case(image(), free="a", share=0.0, locked={"stem": "written in the code", "stem#2": "written in the code"})
class LiteralSplit(nn.Module):
    """Sizes written into the code are a named refusal; the rest is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = conv(3, 12), conv(4, 6), conv(8, 6), head(6)

    def forward(self, x: Tensor) -> Tensor:
        small, large = torch.split(self.stem(x), [4, 8], dim=1)
        return self.head(F.relu(self.a(F.relu(small))) + F.relu(self.b(F.relu(large))))


class Shuffle(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)


@case(image(), free="stem a end", share=0.3, double=True)
class ShuffleUnit(nn.Module):
    """ShuffleNet V2: halves, a depthwise branch, concatenation, channel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.depth, self.b = conv(3, 12), conv(6, 8), conv(8, 8, groups=8), conv_bn(8, 6)
        self.shuffle, self.end, self.head = Shuffle(2), conv(12, 10), head(10)

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.relu(self.stem(x)).chunk(2, 1)
        y = self.shuffle(torch.cat([left, self.b(self.depth(F.relu(self.a(right))))], 1))
        return self.head(F.relu(self.end(y)))


@case(image(), free="first first/conv_group second last", share=0.3)
class GroupShuffle(nn.Module):
    """ShuffleNet V1: grouped convolution, shuffle, grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shuffle = conv(3, 18), nn.ChannelShuffle(3)
        self.second, self.last, self.head = conv(18, 18, groups=3), conv(18, 8), head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.last(F.relu(self.second(self.shuffle(F.relu(self.first(x))))))))


@case(image(), free="stem c end", share=0.2)
class MultiScale(nn.Module):
    """Res2Net: pieces feed each other in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c = conv(3, 16), conv(4, 4), conv(4, 4), conv(4, 4)
        self.end, self.head = conv(16, 9), head(9)

    def forward(self, x: Tensor) -> Tensor:
        p, q, r, s = torch.chunk(F.relu(self.stem(x)), 4, 1)
        q = F.relu(self.a(q))
        r = F.relu(self.b(r + q))
        s = F.relu(self.c(s + r))
        return self.head(F.relu(self.end(torch.cat([p, q, r, s], 1))))


@case(image(), free="stem.0 mix.0.0 mix.1.0 end", share=0.2)
class CrossStage(nn.Module):
    """YOLOv8's C2f: chunk in two, stack bottlenecks, concatenate everything."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix = conv_bn(3, 16), nn.ModuleList(self._mix() for _ in range(2))
        self.end, self.head = conv(32, 10), head(10)

    @staticmethod
    def _mix() -> nn.Module:
        return nn.Sequential(conv(8, 6), nn.ReLU(), conv(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.stem(x).chunk(2, 1))
        parts.extend(mix(parts[-1]) + parts[-1] for mix in self.mix)
        return self.head(F.relu(self.end(torch.cat(parts, 1))))


@case(image(), free="a.0 b.0", share=0.3)
class PyramidPooling(nn.Module):
    """SPPF: one tensor pooled again and again and concatenated with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv_bn(3, 8), conv_bn(32, 12), head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        p = F.max_pool2d(x, 5, 1, 2)
        q = F.max_pool2d(p, 5, 1, 2)
        return self.head(self.b(torch.cat((x, p, q, F.max_pool2d(q, 5, 1, 2)), 1)))


@case(image(batch=4), free="a c", share=0.4)
class BatchConcat(nn.Module):
    """Concatenation of the batch, and of space: the channels are equal, not joined."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 10), conv(3, 10), conv(10, 9), head(9)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.a(x), self.b(x)])
        return self.head(F.relu(self.c(F.relu(torch.cat([y, y], dim=3)))))


@case(image(), free="a b", share=0.3)
class LoopConcat(nn.Module):
    """The input itself is part of a concatenation: its share stays."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(11, 10), head(10)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        y = torch.cat([y, F.relu(self.a(y))], 1)
        return self.head(F.relu(self.b(y)))


@case(image(), free="a mix", share=0.2)
class GroupedConcat(nn.Module):
    """A grouped convolution over a concatenation: the groups balance the parts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.mix, self.head = conv(3, 8), conv(3, 8), conv(16, 12, groups=2), head(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.mix(F.relu(torch.cat([self.a(x), self.b(x)], 1)))))


@case(image(), free="stem a", share=0.2)
class Stacked(nn.Module):
    """Stacked along a new dimension, summed over it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = conv(3, 10), conv(10, 9), conv(10, 9), head(9)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(torch.stack([self.a(x), self.b(x)], 1).sum(1).relu())
