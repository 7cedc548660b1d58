"""Small networks with depth for the tests of layer removal."""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int, index: int) -> None:
        super().__init__()
        self.layer_idx = index
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x, cache=None):
        if cache is not None:
            cache[self.layer_idx] = x
        return x + self.inner(self.norm(x))


class Deep(nn.Module):
    """A stack driven by an integer and by a list with one item per layer."""

    def __init__(self, depth: int = 6, width: int = 8) -> None:
        super().__init__()
        self.num_layers = depth
        self.layer_scales = tuple(1.0 + 0.25 * i for i in range(depth))
        self.stem = nn.Linear(4, width)
        self.layers = nn.ModuleList(Block(width, i) for i in range(depth))
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.stem(x)
        for i in range(self.num_layers):
            x = self.layers[i](x * self.layer_scales[i]) / self.layer_scales[i]
        return self.head(x)


class TupleBlock(Block):
    def forward(self, hidden, *, bias):
        out = super().forward(hidden) + bias
        return {"hidden": out, "seen": None} if self.layer_idx % 2 else (out, None)


class Mixed(nn.Module):
    """Blocks that take keyword arguments and return tuples or dicts."""

    def __init__(self, depth: int = 4, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TupleBlock(width, i) for i in range(depth))

    def forward(self, x):
        for block in self.blocks:
            out = block(hidden=x, bias=x.mean())
            x = out["hidden"] if isinstance(out, dict) else out[0]
        return x


class ConvBlock(nn.Module):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(cout)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x):
        return torch.relu_(self.skip(x) + self.bn(self.conv(x)))


def resnet() -> nn.Sequential:
    """A Sequential of stages, the first block of each with another shape."""
    torch.manual_seed(0)
    stage1 = nn.Sequential(ConvBlock(3, 8), ConvBlock(8, 8), ConvBlock(8, 8))
    stage2 = nn.Sequential(ConvBlock(8, 12), ConvBlock(12, 12), ConvBlock(12, 12), ConvBlock(12, 12))
    return nn.Sequential(
        stage1, nn.MaxPool2d(2), stage2, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)
    ).eval()


def deep(depth: int = 6, seed: int = 0) -> Deep:
    torch.manual_seed(seed)
    return Deep(depth).eval()


def example(seed: int = 0) -> torch.Tensor:
    return torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(seed))
