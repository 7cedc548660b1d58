"""Small networks with their channel groups written by hand."""

import torch
from torch import nn
from torch.nn import functional

from secateur.types import Group, Span


def along(size, dim, dims, repeat=1):
    """Index of `size` units along one dimension of a tensor, each `repeat` positions wide."""
    shape = [1] * dims
    shape[dim] = size * repeat
    return torch.arange(size).repeat_interleave(repeat).view(shape)


class Conv(nn.Module):
    """conv - bn - relu (in place) - depthwise - relu - conv - pool - linear."""

    def __init__(self, width=6, wide=8, norm=True):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.depth = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.conv2 = nn.Conv2d(width, wide, 3, padding=1, bias=False)
        self.fc = nn.Linear(wide, 4)

    def forward(self, x):
        x = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        x = torch.relu(self.depth(x))
        x = torch.relu(self.conv2(x))
        return self.fc(x.mean((2, 3)))


def conv_groups(width=6, wide=8, norm=True):
    first = [
        Span("conv1.weight", along(width, 0, 4), "out"),
        Span("conv1.bias", along(width, 0, 1), "bias"),
        Span("depth.weight", along(width, 0, 4), "out"),
        Span("depth.bias", along(width, 0, 1), "bias"),
        Span("conv2.weight", along(width, 1, 4), "in"),
    ]
    if norm:
        first += [Span("bn1.weight", along(width, 0, 1), "scale"), Span("bn1.bias", along(width, 0, 1), "bias")]
        first += [Span("bn1.running_mean", along(width, 0, 1), "state")]
    second = (Span("conv2.weight", along(wide, 0, 4), "out"), Span("fc.weight", along(wide, 1, 2), "in"))
    return [
        Group("conv1", "channel", (width,), tuple(first)),
        Group("conv2", "channel", (wide,), second),
    ]


class Attention(nn.Module):
    """One pre-norm encoder block with a fused qkv projection and a mean pooled classifier."""

    def __init__(self, dim=8, heads=4, hidden=12, batch_first=True):
        super().__init__()
        self.heads, self.batch_first = heads, batch_first
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.fc = nn.Linear(dim, 3)

    def forward(self, x):
        if not self.batch_first:
            x = x.transpose(0, 1)
        h = self.qkv(self.norm(x))
        h = h if self.batch_first else h.transpose(0, 1)
        b, t, _ = h.shape
        q, k, v = h.view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        a = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1)
        x = x + self.out(a if self.batch_first else a.transpose(0, 1))
        x = x + self.down(functional.gelu(self.up(x)))
        return self.fc(x.mean(1 if self.batch_first else 0))


def attention_groups(dim=8, heads=4, hidden=12):
    each = dim // heads
    qkv = torch.arange(heads).repeat_interleave(each).repeat(3)
    return [
        Group(
            "attention",
            "head",
            (heads,),
            (
                Span("qkv.weight", qkv.view(-1, 1), "out"),
                Span("qkv.bias", qkv, "bias"),
                Span("out.weight", along(heads, 1, 2, each), "in"),
            ),
        ),
        Group(
            "mlp",
            "neuron",
            (hidden,),
            (
                Span("up.weight", along(hidden, 0, 2), "out"),
                Span("up.bias", along(hidden, 0, 1), "bias"),
                Span("down.weight", along(hidden, 1, 2), "in"),
            ),
        ),
    ]


def elements(model, *names):
    known = dict(model.named_parameters())
    return [Group(n, "element", tuple(known[n].shape), (Span(n, None, "self"),)) for n in names]


def images(samples=11, batch=4, classes=4, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 3, 6, 6, generator=generator).to(dtype)
    y = torch.randint(0, classes, (samples,), generator=generator)
    return list(zip(x.split(batch), y.split(batch), strict=True))


def tokens(samples=7, batch=3, length=5, dim=8, classes=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, length, dim, generator=generator).to(dtype)
    y = torch.randint(0, classes, (samples,), generator=generator)
    return list(zip(x.split(batch), y.split(batch), strict=True))


def set_statistics(model, seed=1):
    """Give batch norms statistics and affine weights that are not those of a fresh network."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.3)
                module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
                module.weight.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
                module.bias.copy_(torch.randn(module.num_features, generator=generator) * 0.3)
    return model
