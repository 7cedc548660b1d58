"""Small editions of well-known networks, as OTO, NNCF and ModelOpt use them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from micro.base import case, conv, conv_bn, floats, head, image, several


@case(image(size=16), free="0 3 7 12 14", share=0.4)
def vgg() -> nn.Module:
    return nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 12), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2),
        conv(12, 10), nn.BatchNorm2d(10), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(160, 20), nn.ReLU(),
        nn.Linear(20, 16), nn.Dropout(), nn.Linear(16, 5),
    )  # fmt: skip


class Bottleneck(nn.Module):
    """ResNet-50's block, with a projection where the width changes."""

    def __init__(self, inputs: int, middle: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.a, self.b = conv_bn(inputs, middle, 1), conv_bn(middle, middle, 3, stride=stride)
        self.c = nn.Sequential(nn.Conv2d(middle, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.short = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.short = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.c(self.b(self.a(x))) + self.short(x))


@case(image(size=16), free="0.0 1.a.0 1.b.0 1.c.0 2.a.0 2.b.0 3.a.0 3.b.0 3.c.0", share=0.4, double=True)
def bottlenecks() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 8), Bottleneck(8, 6, 16, 1), Bottleneck(16, 6, 16, 1), Bottleneck(16, 8, 20, 2), head(20)
    )


class PartialStage(nn.Module):
    """YOLOv5's C3."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        hidden = outputs // 2
        self.a, self.b, self.c = conv_bn(inputs, hidden, 1), conv_bn(inputs, hidden, 1), conv_bn(2 * hidden, outputs, 1)
        self.m = nn.Sequential(conv_bn(hidden, hidden, 1), conv_bn(hidden, hidden))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.c(torch.cat((y + self.m(y), self.b(x)), 1))


@case(image(size=16), free="stem.0 stage.a.0 stage.b.0 stage.c.0 stage.m.0.0 low.0 side.0 merge.0", share=0.35)
class Detector(nn.Module):
    """A small YOLO: backbone, upsampled neck, two prediction layers with reshaped, permuted outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.classes, self.anchors = 3, 2
        self.stem, self.stage, self.low = conv_bn(3, 10), PartialStage(10, 12), conv_bn(12, 14, 3, stride=2)
        self.side, self.merge = conv_bn(14, 10, 1), conv_bn(22, 12)
        self.predict = nn.ModuleList([nn.Conv2d(12, 16, 1), nn.Conv2d(14, 16, 1)])

    def forward(self, x: Tensor) -> list[Tensor]:
        high = self.stage(self.stem(x))
        low = self.low(high)
        up = F.interpolate(self.side(low), scale_factor=2, mode="nearest")
        found = []
        for layer, y in zip(self.predict, (self.merge(torch.cat((up, high), 1)), low), strict=True):
            b, _, h, w = y.shape
            y = layer(y).view(b, self.anchors, self.classes + 5, h, w).permute(0, 1, 3, 4, 2).contiguous()
            found.append(y.sigmoid())
        return found


@case(image(), free="stem a.0.0 a.1.0 b.0.0 b.1.0 join.0 up", share=0.35)
class CascadingResidual(nn.Module):
    """CARN: local and global cascades of concatenations, pixel shuffle at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.a = nn.ModuleList([nn.Sequential(conv(8, 8), nn.ReLU()), nn.Sequential(conv(16, 10, 1), nn.ReLU())])
        self.b = nn.ModuleList([nn.Sequential(conv(10, 9), nn.ReLU()), nn.Sequential(conv(19, 7, 1), nn.ReLU())])
        self.join, self.up, self.end = conv_bn(15, 12), conv(12, 24), conv(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.a[1](torch.cat([x, self.a[0](x)], 1))
        z = self.b[1](torch.cat([y, self.b[0](y)], 1))
        return self.end(F.relu(F.pixel_shuffle(self.up(self.join(torch.cat([x, z], 1))), 2)))


@case(image(), free="stem stem#2 stem#3 point.0", share=0.2)
class MixedKernels(nn.Module):
    """MixNet: depthwise convolutions of several kernel sizes over the pieces of a split."""

    def __init__(self) -> None:
        super().__init__()
        self.widths = [4, 6, 2]
        self.stem = conv(3, 12)
        self.parts = nn.ModuleList(conv(w, w, k, groups=w) for w, k in zip(self.widths, (3, 5, 7), strict=True))
        self.point, self.head = conv_bn(12, 10, 1), head(10)

    def forward(self, x: Tensor) -> Tensor:
        pieces = F.relu(self.stem(x)).split(self.widths, dim=1)
        return self.head(self.point(torch.cat([m(p) for m, p in zip(self.parts, pieces, strict=True)], 1)))


@case(image(size=16), free="down.0.0 down.1.0 middle.0 up.0 up.1", share=0.4)
class Hourglass(nn.Module):
    """U-Net: skip connections are concatenated with what comes up."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = nn.ModuleList([conv_bn(3, 8), conv_bn(8, 12)]), conv_bn(12, 16)
        self.up = nn.ModuleList([nn.ConvTranspose2d(16, 10, 2, stride=2), nn.ConvTranspose2d(22, 9, 2, stride=2)])
        self.end = conv(17, 2)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for layer in self.down:
            skips.append(layer(x))
            x = F.max_pool2d(skips[-1], 2)
        x = self.middle(x)
        for layer, skip in zip(self.up, reversed(skips), strict=True):
            x = torch.cat([skip, F.relu(layer(x))], dim=1)
        return self.end(x)


@case(floats(2, 1, 40), free="convs.0 convs.1 mlp.0", share=0.3, zeroing=False)
class SpeechEncoder(nn.Module):
    """Whisper's stem: strided 1-D convolutions, sinusoidal positions in a buffer, feed-forward with residual."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv1d(1, 12, 3, padding=1), nn.Conv1d(12, 16, 3, stride=2, padding=1)])
        self.register_buffer("positions", torch.randn(20, 16))
        self.norm, self.out = nn.LayerNorm(16), nn.Linear(16, 6)
        self.mlp = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.convs:
            x = F.gelu(layer(x))
        x = x.permute(0, 2, 1) + self.positions
        return self.out(x + self.mlp(self.norm(x)))


@case(several(floats(4, 6), floats(4, 6)), free="tower.0 tower.2", share=0.4)
class TwinTowers(nn.Module):
    """One tower on two inputs; the outputs are compared by cosine and by distance."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.tower(a), self.tower(b)
        return F.cosine_similarity(a, b), torch.cdist(a, b)


@case(floats(2, 4, 8, 8), free="a b c", share=0.3, zeroing=False)
class Interactions(nn.Module):
    """Outer products and Gram matrices: channels meet themselves in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.out = conv(4, 9), conv(9, 7), nn.Linear(63, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        z = F.relu(self.b(y)).flatten(2)
        gram = torch.einsum("bcn,bdn->bcd", z, y.flatten(2)) / z.shape[-1]
        return self.out(F.relu(self.c(gram.flatten(1))))


@case(image(size=16), free="a.0 b.0", share=0.3)
class DepthSkips(nn.Module):
    """Stochastic depth and dropout in eval mode, identity blocks, a list of skipped layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv_bn(3, 10), conv_bn(10, 12), conv_bn(12, 12)
        self.skip, self.drop, self.head = nn.Identity(), nn.Dropout2d(0.5), head(12)
        self.survival = 0.8

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.b(self.skip(self.a(x))))
        if self.training and torch.rand(()) > self.survival:
            return self.head(x)
        return self.head(x + self.c(x) * self.survival)


@case(floats(3, 10), free="a b c", share=0.4)
class FunctionalWeights(nn.Module):
    """Layers written with raw parameters and F.linear, a bias added by hand, a scale from another parameter."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"a": (14, 10), "b": (12, 14), "c": (12, 9), "d": (4, 9)}
        for name, shape in sizes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape) / 3))
        self.shift, self.gain = nn.Parameter(torch.zeros(14)), nn.Parameter(torch.ones(1, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.linear(x, self.a) + self.shift)
        x = F.relu(x @ self.b.T) * self.gain
        return F.linear(torch.addmm(x.new_zeros(self.c.shape[1]), x, self.c).relu(), self.d)
