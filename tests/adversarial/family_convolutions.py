"""Convolutions and images: groups, shuffles, space, attention over channels, windows over channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cases import IMAGES, Family, floats
from .nets import Image
from .references import over

family = Family("convolutions")
X = floats(*IMAGES)


def mid(name: str, middle: Any, *, width: int = 16, extra: Any = None, **options: Any) -> None:
    options.setdefault("must", "a.weight")
    family.add(name, lambda: Image(middle, width, **(extra() if extra else {})), X, **options)


def conv(a: int, b: int, k: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(a, b, k, padding=options.pop("padding", k // 2), **options)


def shuffle(h: Tensor, groups: int) -> Tensor:
    b, c, y, x = h.shape
    return h.view(b, groups, c // groups, y, x).transpose(1, 2).reshape(b, c, y, x)


mid("nothing", lambda m, h: h, right="channel")
mid("depthwise", lambda m, h: m.dw(h), extra=lambda: {"dw": conv(16, 16, groups=16)}, right="channel")
mid(
    "grouped",
    lambda m, h: m.g(h),
    extra=lambda: {"g": conv(16, 16, groups=4)},
    kinds="channel conv_group",
    right="channel",
)
mid("shuffled", lambda m, h: m.g(shuffle(m.g(h), 4)), extra=lambda: {"g": conv(16, 16, groups=4)})
mid("functional_depthwise", lambda m, h: F.conv2d(h, m.w, padding=1, groups=h.shape[1]),
    extra=lambda: {"w": nn.Parameter(torch.randn(16, 1, 3, 3))}, right="channel")  # fmt: skip
mid("blur_pool", lambda m, h: F.conv2d(h, m.k.expand(h.shape[1], 1, 3, 3), stride=2, groups=h.shape[1]),
    extra=lambda: {"k": torch.rand(1, 1, 3, 3)}, right="channel")  # fmt: skip
mid("one_kernel_for_all", lambda m, h: F.conv2d(h.flatten(0, 1)[:, None], m.k, padding=1).view_as(h),
    extra=lambda: {"k": torch.rand(1, 1, 3, 3)})  # fmt: skip
mid("eca_over_channels", lambda m, h: h * m.c(h.mean((2, 3))[:, None]).sigmoid()[:, 0, :, None, None],
    extra=lambda: {"c": nn.Conv1d(1, 1, 3, padding=1)})  # fmt: skip
mid("eca_with_one_tap", lambda m, h: h * m.c(h.mean((2, 3))[:, None]).sigmoid()[:, 0, :, None, None],
    extra=lambda: {"c": nn.Conv1d(1, 1, 1)}, right="channel")  # fmt: skip
mid("channels_as_depth", lambda m, h: m.c(h[:, None])[:, 0], extra=lambda: {"c": nn.Conv3d(1, 1, 3, padding=1)})
mid("channels_as_depth_one_tap", lambda m, h: m.c(h[:, None])[:, 0],
    extra=lambda: {"c": nn.Conv3d(1, 1, (1, 3, 3), padding=(0, 1, 1))})  # fmt: skip
mid("channels_pooled", lambda m, h: h + F.avg_pool3d(h[:, None], (3, 1, 1), 1, (1, 0, 0))[:, 0])
mid("maxout", lambda m, h: h.view(len(h), 8, 2, *h.shape[2:]).amax(2).repeat_interleave(2, 1))
mid(
    "max_pool_over_pairs",
    lambda m, h: F.max_pool1d(h.flatten(2).mT, 2).mT.view(len(h), -1, *h.shape[2:]).repeat(1, 2, 1, 1),
)
mid("local_response", lambda m, h: F.local_response_norm(h, 3, 1.0))
mid("pixel_shuffle", lambda m, h: F.pixel_unshuffle(F.pixel_shuffle(h, 2), 2), right="channel")
mid(
    "pixel_shuffle_then_conv",
    lambda m, h: m.c(F.pixel_shuffle(h, 2)),
    extra=lambda: {"c": conv(4, 16)},
    right="channel",
)
mid(
    "unshuffle_then_conv", lambda m, h: m.c(F.pixel_unshuffle(h, 2)), extra=lambda: {"c": conv(64, 16)}, right="channel"
)
mid("space_to_depth_by_hand", lambda m, h: m.c(torch.cat([h[..., ::2, ::2], h[..., 1::2, 1::2]], 1)),
    extra=lambda: {"c": conv(32, 16)}, right="channel")  # fmt: skip
mid("channel_shuffle_op", lambda m, h: F.channel_shuffle(h, 4))
mid("unfold_matmul", lambda m, h: (m.w @ F.unfold(h, 3, padding=1)).view_as(h),
    extra=lambda: {"w": nn.Parameter(torch.randn(16, 144) / 9)})  # fmt: skip
mid("fold_back", lambda m, h: F.fold(F.unfold(h, 2, stride=2), h.shape[-2:], 2, stride=2), right="channel")
mid("shift_some_channels", lambda m, h: torch.cat([h[:, :4].roll(1, -1), h[:, 4:8].roll(-1, -1), h[:, 8:]], 1))
mid("shift_a_fraction", lambda m, h: torch.cat([h[:, : h.shape[1] // 4].roll(1, -1), h[:, h.shape[1] // 4 :]], 1))
mid("coordinates_added", lambda m, h: h + torch.linspace(-1, 1, h.shape[-1]), right="channel")
mid("coordinates_over_channels", lambda m, h: h + torch.linspace(-1, 1, h.shape[1])[:, None, None])
mid("grid_sample_fixed", lambda m, h: F.grid_sample(h, m.grid.expand(len(h), -1, -1, -1), align_corners=False),
    extra=lambda: {"grid": torch.rand(1, 8, 8, 2) * 2 - 1}, right="channel")  # fmt: skip
mid("grid_from_channels", lambda m, h: F.grid_sample(h, h[:, :2].permute(0, 2, 3, 1).tanh(), align_corners=False))
mid("unpool", lambda m, h: F.max_unpool2d(*F.max_pool2d(h, 2, return_indices=True), 2), right="channel")
mid(
    "unpool_others",
    lambda m, h: F.max_unpool2d(F.avg_pool2d(h, 2), F.max_pool2d(h.flip(1), 2, return_indices=True)[1], 2),
)
mid("adaptive_pool_to_one", lambda m, h: h * F.adaptive_avg_pool2d(h, 1).sigmoid(), right="channel")
mid("global_max_over_channels", lambda m, h: h * h.amax(1, keepdim=True).sigmoid(), right="channel")
mid("channels_last_flatten", lambda m, h: m.f(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    extra=lambda: {"f": nn.Linear(16, 16)}, right="channel")  # fmt: skip
mid("transposed", lambda m, h: m.c(h), extra=lambda: {"c": nn.ConvTranspose2d(16, 16, 2, 2)}, right="channel")
mid("transposed_grouped", lambda m, h: m.c(h), extra=lambda: {"c": nn.ConvTranspose2d(16, 16, 2, 2, groups=4)})
mid("padded_channels", lambda m, h: m.c(F.pad(h, (0, 0, 0, 0, 0, 4))), extra=lambda: {"c": conv(20, 16)})
mid("padded_on_both_sides", lambda m, h: m.c(F.pad(h, (0, 0, 0, 0, 2, 2))), extra=lambda: {"c": conv(20, 16)})
mid("dropped_channels", lambda m, h: m.c(h[:, 2:14]), extra=lambda: {"c": conv(12, 16)})
mid("every_second_channel", lambda m, h: m.c(h[:, ::2]), extra=lambda: {"c": conv(8, 16)})
mid("rotated", lambda m, h: torch.rot90(h, 1, (1, 2)).mean((1, 2))[:, None, None] + h)
mid("ghost", lambda m, h: torch.cat([h[:, :8], m.c(h[:, :8])], 1), extra=lambda: {"c": conv(8, 8, groups=8)})
mid(
    "interpolated_channels",
    lambda m, h: (
        F.interpolate(h.permute(0, 2, 3, 1).flatten(1, 2), size=16).view_as(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        + h
    ),
)
mid("strided_view", lambda m, h: h.as_strided(h.shape, h.stride()) * 2)
mid(
    "strided_view_backwards",
    lambda m, h: (
        h + h.contiguous().as_strided((len(h), 15, *h.shape[2:]), h.stride(), h.stride(1)).mean(1, keepdim=True)
    ),
)
mid("inner_product_of_maps", lambda m, h: h * torch.einsum("bchw,bdhw->bcd", h, h).mean(2).tanh()[..., None, None],
    truths=(over("middle", "a.weight", dim=(0, 1), out=1),))  # fmt: skip


def equalised(layer: nn.Module) -> nn.Module:
    """The learning rate of every weight is alike: a hook makes the weight, which is not there before the first run."""
    scale = layer.weight[0].numel() ** -0.5 * 4
    layer.register_parameter("weight_orig", layer._parameters.pop("weight"))
    layer.register_forward_pre_hook(lambda module, _: setattr(module, "weight", module.weight_orig * scale))
    return layer


mid("equalised_rates", lambda m, h: m.c(h), extra=lambda: {"c": equalised(conv(16, 16))}, right="channel")


@family.case(X, right="channel")
class SqueezeExcite(nn.Module):
    """Channel gates by two 1x1 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.r, self.e, self.b = conv(3, 16), conv(16, 6, 1), conv(6, 16, 1), conv(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.b(h * self.e(self.r(F.adaptive_avg_pool2d(h, 1)).relu()).sigmoid()).mean((2, 3))


@family.case(X, truths=(over("pool", "a.weight", dim=1, out=None),), right="channel")
class SpatialGate(nn.Module):
    """The spatial half of CBAM: mean and maximum over channels make a map."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate, self.b = conv(3, 16), conv(2, 1, 7), conv(16, 4)

    def pool(self, h: Tensor) -> Tensor:
        return torch.stack([h.mean(1), h.amax(1)], 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h * self.gate(self.pool(h)).sigmoid()).mean((2, 3))


@family.case(X)
class Correlation(nn.Module):
    """RAFT: all-pairs correlation, scaled by the root of the width, pooled and looked up around each place."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.out = conv(3, 16), conv(3, 16), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.f(x), self.g(x.flip(-1))
        n, d, y, w = a.shape
        corr = (a.flatten(2).mT @ b.flatten(2)) / torch.sqrt(torch.tensor(d).float())
        corr = corr.view(n * y * w, 1, y, w)
        look = F.unfold(F.avg_pool2d(corr, 2), 3, padding=1)
        return self.out(look.mean(2)).view(n, -1, 3).mean(1)


@family.case(X, right="channel")
class DynamicKernel(nn.Module):
    """Kernels made from the image itself: one depthwise kernel per sample and channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.make, self.b = conv(3, 12), nn.Linear(3, 12 * 9), conv(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        n, c, y, w = h.shape
        kernel = self.make(x.mean((2, 3))).view(n * c, 1, 3, 3)
        h = F.conv2d(h.reshape(1, n * c, y, w), kernel, padding=1, groups=n * c).view(n, c, y, w)
        return self.b(h.relu()).mean((2, 3))


@family.case(X)
class FeaturesBecomeLength(nn.Module):
    """Channels after pooling are the length that a 1-d convolution slides over."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.slide, self.out = conv(3, 16), nn.Conv1d(1, 5, 3, padding=1), nn.Linear(80, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu().mean((2, 3))
        return self.out(self.slide(h[:, None]).relu().flatten(1))


@family.case(floats((2, 3, 8, 8), (1, 3, 8, 8), (3, 3, 8, 8)), right="channel")
class FlattenedImage(nn.Module):
    """Channels times space read by a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc, self.out = conv(3, 6, stride=2), nn.Linear(96, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(self.a(x).relu().flatten(1)).relu())


@family.case(X, right="channel")
class DenseBlock(nn.Module):
    """Every layer reads all that came before."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([conv(3, 6), conv(9, 6), conv(15, 6)])
        self.out = nn.Linear(21, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x).relu()], 1)
        return self.out(x.mean((2, 3)))


@family.case(X)
class Unet(nn.Module):
    """Down, up, and a skip that is cropped to fit."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.up, self.c = (
            conv(3, 8),
            conv(8, 12, stride=2),
            nn.ConvTranspose2d(12, 8, 2, 2),
            conv(16, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x).relu()
        u = self.up(self.b(a).relu())
        return self.c(torch.cat([a[..., : u.shape[-2], : u.shape[-1]], u], 1)).mean((2, 3))
