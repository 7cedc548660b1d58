"""Chains, residual webs and convolution kinds, as in the NNCF, MMRazor and ModelOpt suites."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from micro.base import case, conv, conv_bn, floats, head, image


@case(image(), free="0.0 1.0", share=0.4, double=True)
def single_line() -> nn.Module:
    return nn.Sequential(conv_bn(3, 12), conv_bn(12, 16), head(16))


@case(image(), free="stem a", share=0.3, double=True)
class ResidualBlock(nn.Module):
    """The stem and the branch end share one index set."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.head = conv(3, 12), conv(12, 10), head(12)
        self.b = nn.Sequential(conv(10, 12), nn.BatchNorm2d(12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(x + self.b(F.relu(self.a(x)))))


@case(image(), free="stem left join", share=0.3)
class Branching(nn.Module):
    """One producer, two consumers, joined by addition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = conv(3, 10), conv(10, 12), conv(10, 12, 1)
        self.join, self.head = conv(12, 8), head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(self.join(F.relu(self.left(x) + self.right(x))))


@case(image(), free="a", share=0.2)
class EltwiseCombination(nn.Module):
    """Sums, products and maxima tie four producers together."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (conv(3, 10) for _ in range(4))
        self.head = head(10)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.maximum(self.a(x) * self.b(x), self.c(x))
        y += self.d(x)
        return self.head(y.relu_())


@case(image(), free="stem other", share=0.3)
class SharedConv(nn.Module):
    """One module called three times: its input and output widths are one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.other, self.head = conv(3, 12), conv(12, 12), conv(12, 9), head(9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = F.relu(self.shared(x))
        return self.head(self.other(x))


@case(image(), free="stem conv", share=0.3)
class MultipleForward(nn.Module):
    """A convolution used on two inputs of equal structure."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twin, self.conv, self.head = conv(3, 12), conv(3, 12), conv(12, 10), head(10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(self.stem(x)) + self.conv(F.relu(self.twin(x)))))


@case(image(), free="stem point", share=0.3, double=True)
class Depthwise(nn.Module):
    """The depthwise filter goes with its channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth, self.norm = conv(3, 12), conv(12, 12, groups=12), nn.BatchNorm2d(12)
        self.point, self.head = conv(12, 16, 1), head(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu6(self.point(F.relu6(self.norm(self.depth(F.relu(self.stem(x))))))))


@case(image(), free="stem depth", share=0.2)
class DepthwiseMultiplier(nn.Module):
    """Three filters per channel: the channel may go, or a filter number in every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth, self.norm, self.head = conv(3, 8), conv(8, 24, groups=8), nn.BatchNorm2d(24), head(24)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.depth(F.relu(self.stem(x))))))


@case(image(), free="stem/conv_group stem grouped point", share=0.4)
class GroupedConvolution(nn.Module):
    """Groups as wholes, or as many channels from every group."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped, self.point, self.head = conv(3, 12), conv(12, 20, groups=4), conv(20, 8, 1), head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.point(F.relu(self.grouped(F.relu(self.stem(x)))))))


@case(image(), free="expand stem", share=0.3)
class InvertedResidual(nn.Module):
    """MobileNetV2's block: expand, depthwise, project, add."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand, self.depth = conv(3, 8), conv(8, 24, 1), conv_bn(24, 24, groups=24)
        self.project, self.head = nn.Sequential(conv(24, 8, 1), nn.BatchNorm2d(8)), head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.project(self.depth(F.relu6(self.expand(x)))))


class Squeeze(nn.Module):
    """Squeeze-and-excitation with 1x1 convolutions."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1))))
        return x * F.hardsigmoid(gate)


@case(image(), free="stem.0 gate.down", share=0.3, double=True)
class SqueezeExcite(nn.Module):
    """The gate follows the channels it multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.head = conv_bn(3, 16), Squeeze(16, 6), head(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.hardswish(self.gate(self.stem(x))))


@case(image(), free="stem.0 down", share=0.3)
class SqueezeExciteLinear(nn.Module):
    """Squeeze-and-excitation with linear layers, a mean and a reshape read from the tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.up, self.head = conv_bn(3, 16), nn.Linear(16, 6), nn.Linear(6, 16), head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, c = x.shape[:2]
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3)))))).view(n, c, 1, 1)
        return self.head(x * gate.expand_as(x))


@case(image(), free="stem a.0.0 down", share=0.3)
class HighResolution(nn.Module):
    """HRNet's exchange between two resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = conv(3, 10), nn.Conv2d(10, 12, 3, stride=2, padding=1)
        self.a, self.b = nn.Sequential(conv_bn(10, 8)), nn.Sequential(conv_bn(12, 9))
        self.up, self.fine, self.head = conv(9, 8, 1), conv(8, 9, 1), head(8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.stem(x))
        a, b = self.a(x), self.b(F.relu(self.down(x)))
        high = a + F.interpolate(self.up(b), scale_factor=2.0, mode="nearest")
        low = b + self.fine(F.avg_pool2d(a, 2))
        return self.head(high), low


@case(floats(2, 3, 20), free="0 3", share=0.4)
def conv_one_dimension() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 12, 3), nn.BatchNorm1d(12), nn.ReLU(), nn.Conv1d(12, 16, 3), nn.ReLU(), nn.MaxPool1d(2),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


@case(floats(2, 2, 6, 6, 6), free="0 3", share=0.4)
def conv_three_dimensions() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 10, 3), nn.BatchNorm3d(10), nn.ReLU(), nn.Conv3d(10, 12, 2), nn.ReLU(), nn.AvgPool3d(2),
        nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip


@case(image(), free="0 3", share=0.4, double=True)
def transposed() -> nn.Module:
    return nn.Sequential(
        conv(3, 12), nn.BatchNorm2d(12), nn.ReLU(), nn.ConvTranspose2d(12, 10, 2, stride=2), nn.BatchNorm2d(10),
        nn.ReLU(), conv(10, 3),
    )  # fmt: skip


@case(image(), free="0/conv_group 0 2", share=0.3)
def transposed_grouped() -> nn.Module:
    return nn.Sequential(
        conv(3, 12), nn.ReLU(), nn.ConvTranspose2d(12, 8, 2, stride=2, groups=4), nn.ReLU(), conv(8, 3),
    )  # fmt: skip


@case(image(), free="0", share=0.3)
def transposed_depthwise() -> nn.Module:
    return nn.Sequential(
        conv(3, 12), nn.ReLU(), nn.ConvTranspose2d(12, 12, 2, stride=2, groups=12), nn.BatchNorm2d(12), conv(12, 3)
    )


@case(image(), free="a b", share=0.3)
class OneOutputChannel(nn.Module):
    """A map of one channel is neither depthwise nor in the way: it gates all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate, self.b, self.head = conv(3, 12), conv(12, 1), conv(12, 10), head(10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.head(F.relu(self.b(x * torch.sigmoid(self.gate(x)))))


@case(image(), free="stem fc1", share=0.3)
class FlattenIntoLinear(nn.Module):
    """Every channel is a run of columns."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc1, self.fc2 = conv(3, 12), nn.Linear(12 * 16, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))


@case(image(), free="stem prelu_conv", share=0.4)
class Parametric(nn.Module):
    """PReLU has a weight per channel, or one for all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.each, self.prelu_conv, self.one = conv(3, 12), nn.PReLU(12), conv(12, 10), nn.PReLU()
        self.head = head(10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.one(self.prelu_conv(self.each(self.stem(x)))))


@case(image(), free="stem b", share=0.3, zeroing=False)
class Padded(nn.Module):
    """Padding of the image in four modes leaves the channels alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.b, self.head = nn.Conv2d(3, 12, 3, padding=1, padding_mode="reflect"), conv(12, 10), head(10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(F.relu(self.stem(x)), (1, 1, 1, 1), mode="replicate")
        x = F.pad(x, (1, 0, 2, 1), value=0.5)
        return self.head(F.relu(self.b(F.pad(x, (1, 1, 0, 0), mode="circular"))))


@case(image(), free="stem mid", share=0.3)
class ChannelPadding(nn.Module):
    """The option-A shortcut: zero channels are added on both sides of the old ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.wide, self.head = conv(3, 8), conv(8, 10), conv(10, 12), head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        short = F.pad(x, (0, 0, 0, 0, 2, 2))
        return self.head(F.relu(short + self.wide(F.relu(self.mid(x)))))


@case(image(), free="conv.0 left", share=0.2)
class Disconnected(nn.Module):
    """A part that nobody reads and a module that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.left, self.head = conv_bn(3, 12), conv(12, 8), head(12)
        self.unused = nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        self.left(x)
        return self.head(x)
