"""Data that only moves: views, permutations, slices, gathers, repetitions, shuffles between channels and space."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from micro.base import case, conv, conv_bn, floats, head, image


@case(image(), free="stem up out", share=0.3, double=True)
class PixelShuffle(nn.Module):
    """Super-resolution: one unit of the wide convolution is all the filters that fill one output channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.out, self.end = conv(3, 10), conv(10, 32), conv(8, 9), conv(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pixel_shuffle(F.relu(self.up(F.relu(self.stem(x)))), 2)
        return self.end(F.relu(self.out(x)))


@case(image(), free="stem mid", share=0.3)
class PixelUnshuffle(nn.Module):
    """Space moves into channels: one channel feeds a run of four."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.head = conv(3, 8), conv(32, 12), head(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.mid(F.pixel_unshuffle(F.relu(self.stem(x)), 2))))


@case(image(), free="stem mid", share=0.3)
class FocusSlices(nn.Module):
    """YOLOv5's Focus on features: four strided slices of space, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.head = conv(3, 8), conv(32, 12), head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        parts = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
        return self.head(F.relu(self.mid(torch.cat(parts, 1))))


@case(image(), free="stem mix", share=0.3)
class UnfoldedPatches(nn.Module):
    """im2col by F.unfold, a linear layer over the columns, and back by F.fold."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix, self.end = conv(3, 6), nn.Linear(24, 12), conv(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        columns = F.unfold(F.relu(self.stem(x)), 2, stride=2)
        y = self.mix(columns.transpose(1, 2)).transpose(1, 2)
        return self.end(F.fold(y, x.shape[-2:], 2, stride=2))


@case(floats(2, 3, 12), free="stem end", share=0.3)
class SlidingWindows(nn.Module):
    """Tensor.unfold over time; channels are untouched."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.end, self.head = nn.Conv1d(3, 10, 3, padding=1), nn.Conv1d(10, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        windows = F.relu(self.stem(x)).unfold(2, 4, 2)
        return self.head(F.relu(self.end(windows.amax(-1))).mean(-1))


@case(image(), free="stem mid", share=0.3)
class RolledSpace(nn.Module):
    """Rolling, flipping and rotating the image leaves the channels free."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.head = conv(3, 10), conv(10, 9), head(9)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.roll(F.relu(self.stem(x)), shifts=(1, -2), dims=(2, 3)).flip(3)
        return self.head(F.relu(self.mid(torch.rot90(x, 1, (2, 3)))))


@case(image(), free="mid", share=0.1, locked={"stem": "rolled or flipped"})
class RolledChannels(nn.Module):
    """Rolling the channels is addressing by number: a named refusal, the rest is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.head = conv(3, 10), conv(10, 9), head(9)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.mid(torch.roll(F.relu(self.stem(x)), 3, 1))))


@case(image(), free="mid", share=0.1, locked={"stem": "addressed by number"})
class IndexSelected(nn.Module):
    """Channels picked by a constant list of numbers stay where the list says."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.head = conv(3, 10), conv(5, 9), head(9)
        self.register_buffer("picked", torch.tensor([0, 2, 3, 7, 9]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.mid(F.relu(self.stem(x)).index_select(1, self.picked))))


@case(floats(2, 7, 8), free="a b", share=0.4, zeroing=True)
class GatheredRows(nn.Module):
    """Positions are gathered by a constant index; features are untouched."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 14), nn.Linear(14, 12), nn.Linear(12, 4)
        self.register_buffer("order", torch.tensor([3, 1, 0, 6]))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))[:, self.order]
        x = F.relu(self.b(x))
        index = torch.tensor([[2, 0], [1, 3]], device=x.device)[:, :, None].expand(-1, -1, x.shape[-1])
        return self.c(x.gather(1, index))


@case(floats(2, 5, 8), free="a b", share=0.3)
class Unbound(nn.Module):
    """Time is unbound and every step treated apart."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 14), nn.Linear(14, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        steps = [F.relu(self.b(step)) for step in F.relu(self.a(x)).unbind(1)]
        return self.c(torch.stack(steps, dim=1)[:, -1])


@case(floats(2, 12), free="a b end", share=0.3)
class LinearIntoImage(nn.Module):
    """A generator: linear, view as an image, transposed convolutions (TP's reshape test)."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = 8
        self.a, self.b = nn.Linear(12, 8 * 9), nn.ConvTranspose2d(8, 10, 2, stride=2)
        self.end, self.last = conv_bn(10, 6), conv(6, 3)
        self.end = self.end[0]

    def forward(self, z: Tensor) -> Tensor:
        x = F.relu(self.a(z)).view(z.size(0), self.channels, 3, 3)
        return self.last(F.relu(self.end(F.relu(self.b(x)))))


@case(floats(2, 12), free="b", share=0.1, locked={"a": "written in the code"})
class LiteralView(nn.Module):
    """The number of channels is written in the view: a refusal that names the line."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(12, 8 * 9), nn.ConvTranspose2d(8, 10, 2, stride=2), conv(10, 3)

    def forward(self, z: Tensor) -> Tensor:
        return self.last(F.relu(self.b(F.relu(self.a(z)).view(-1, 8, 3, 3))))


@case(image(), free="stem gate", share=0.3)
class BroadcastMask(nn.Module):
    """A mask of one channel and a scale of one number do not tie anything (TP#510)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.head = conv(3, 12), conv(12, 10), head(10)
        self.scale = nn.Parameter(torch.tensor([0.7]))
        self.register_buffer("mask", (torch.rand(1, 1, 8, 8) > 0.3).float())

    def forward(self, x: Tensor) -> Tensor:
        x = self.mask * F.relu(self.stem(x)) * self.scale
        return self.head(torch.where(x.mean(1, keepdim=True) > 0, self.gate(x), 0.0).relu())


@case(floats(2, 6, 8), free="embed mix", share=0.25, zeroing=False)
class Mixer(nn.Module):
    """MLP-Mixer: tokens are mixed by a linear layer over the transposed sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.mix, self.back = (
            nn.Linear(8, 16),
            nn.LayerNorm(16),
            nn.Linear(6, 14),
            nn.Linear(14, 6),
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.back(F.gelu(self.mix(self.norm(x).transpose(1, 2)))).transpose(1, 2)
        return self.head((x + y).mean(dim=1))


@case(floats(2, 8), free="a b", share=0.3, zeroing=True)
class Repeated(nn.Module):
    """expand, repeat, tile and repeat_interleave along new and old dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 10), nn.Linear(20, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = x.unsqueeze(1).expand(-1, 3, -1).repeat(1, 1, 2)
        x = F.relu(self.b(x)).repeat_interleave(2, dim=1).tile((1, 2, 1))
        return self.c(x.sum(1))


@case(image(), free="stem end", share=0.2)
class InterleavedChannels(nn.Module):
    """repeat_interleave of channels feeds a depthwise convolution with multiplier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth, self.end, self.head = conv(3, 6), conv(12, 12, groups=12), conv(12, 9), head(9)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x)).repeat_interleave(2, dim=1)
        return self.head(F.relu(self.end(F.relu(self.depth(x)))))


@case(image(), free="a b", share=0.2)
class HalfSlices(nn.Module):
    """Halves taken by slices whose bound is computed from the tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 16), conv(8, 9), head(9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        half = x.shape[1] // 2
        return self.head(F.relu(self.b(F.relu(x[:, :half] * x[:, half:]))))


@case(image(), free="a b", share=0.1, locked={"a#2": "written in the code"})
class LiteralSlice(nn.Module):
    """x[:, :6] of 16 channels: what lies before the bound stays, what lies after is free."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 16), conv(6, 9), conv(10, 9), head(9)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.head(F.relu(self.b(x[:, :6]) + self.c(x[:, 6:])))


@case(floats(2, 4, 8, 6), free="a b", share=0.3)
class MultiDimensionalLinear(nn.Module):
    """Linear layers over the last of four dimensions, flattened and unflattened on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 12), nn.Linear(12, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x)).flatten(0, 2)
        return self.c(F.relu(self.b(y)).unflatten(0, x.shape[:3]).movedim(1, 2))


@case(floats(2, 3, 10), free="a b", share=0.2)
class Einsums(nn.Module):
    """Raw parameters contracted by einsum, matmul and bmm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(10, 12) / 3), nn.Parameter(torch.randn(12, 14) / 3)
        self.c = nn.Parameter(torch.randn(14, 4) / 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("bnd,dh->bnh", x, self.a).relu()
        x = torch.matmul(x, self.b).relu()
        return torch.bmm(x, self.c.expand(x.shape[0], -1, -1))


@case(image(), free="patch fc", share=0.3, zeroing=False)
class PatchSequence(nn.Module):
    """Patches with a class token and learned positions, all raw parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 16, 4, stride=4), nn.LayerNorm(16)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 5, 16))
        self.fc, self.head = nn.Linear(16, 20), nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(F.gelu(self.fc(self.norm(x)))[:, 0])


@case(image(size=16), free="stem mid end", share=0.3)
class Resampled(nn.Module):
    """Pooling, interpolation and grid sampling of every kind keep the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.end, self.head = conv(3, 8), conv(8, 10), conv(10, 9), head(9)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2) + F.adaptive_max_pool2d(F.relu(self.stem(x)), 8)
        x = F.interpolate(F.relu(self.mid(x)), size=(10, 12), mode="bilinear", align_corners=False)
        grid = F.affine_grid(
            torch.eye(2, 3)[None].expand(x.shape[0], -1, -1), [x.shape[0], 1, 6, 6], align_corners=False
        )
        x = F.grid_sample(x, grid, align_corners=False)
        return self.head(F.relu(self.end(F.interpolate(x, scale_factor=2.0, mode="bicubic"))))


@case(image(), free="stem", share=0.25)
class SpatialAttention(nn.Module):
    """CBAM: mean and maximum over the channels, stacked, make a map that scales all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.map, self.head = conv(3, 12), conv(2, 1, 7), head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        both = torch.cat([x.sum(1, keepdim=True), x.max(dim=1, keepdim=True)[0]], 1)
        return self.head(x * torch.sigmoid(self.map(both)))
