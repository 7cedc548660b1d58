"""Normalisations: of the library and written by hand, with numbers computed from sizes."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from micro.base import case, conv, floats, head, image


@case(image(), free="0/conv_group 0 3/conv_group 3", share=0.4, zeroing=False, double=True)
def group_norms() -> nn.Module:
    """Normalisation groups go as wholes, or as many channels from every group."""
    return nn.Sequential(
        conv(3, 12), nn.GroupNorm(4, 12), nn.ReLU(), conv(12, 15), nn.GroupNorm(5, 15), nn.ReLU(), head(15)
    )


@case(image(), free="0 3", share=0.4, zeroing=False)
def group_norm_of_one_and_of_each() -> nn.Module:
    """One group is a layer norm over channels and space; as many groups as channels is an instance norm."""
    return nn.Sequential(
        conv(3, 12), nn.GroupNorm(1, 12), nn.ReLU(), conv(12, 10), nn.GroupNorm(10, 10), nn.ReLU(), head(10)
    )


@case(image(), free="0/conv_group 0/conv_group#2 0 3 3#2", share=0.3, zeroing=False)
def group_norm_over_grouped_convolution() -> nn.Module:
    return nn.Sequential(
        conv(3, 16), nn.GroupNorm(4, 16), nn.ReLU(), conv(16, 12, groups=2), nn.GroupNorm(4, 12), head(12)
    )


@case(image(), free="0 3", share=0.4)
def instance_norms() -> nn.Module:
    return nn.Sequential(
        conv(3, 12),
        nn.InstanceNorm2d(12, affine=True),
        nn.ReLU(),
        conv(12, 10),
        nn.InstanceNorm2d(10),
        nn.ReLU(),
        head(10),
    )


@case(image(), free="0 3", share=0.35, zeroing=False)
def transposed_instance_norm() -> nn.Module:
    """OTO's conv-transpose and instance norm chain."""
    return nn.Sequential(
        nn.ConvTranspose2d(3, 12, 3), nn.InstanceNorm2d(12, affine=True, track_running_stats=True), nn.ReLU(),
        nn.ConvTranspose2d(12, 8, 2, stride=2, bias=False), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), conv(8, 3),
    )  # fmt: skip


@case(floats(2, 5, 8), free="0 2", share=0.4, zeroing=False)
def layer_and_rms_norms() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 20), nn.LayerNorm(20), nn.Linear(20, 24), nn.RMSNorm(24), nn.GELU(), nn.Linear(24, 4)
    )


@case(image(), free="stem fc1", share=0.4, zeroing=False)
class ChannelsLast(nn.Module):
    """ConvNeXt: depthwise convolution, layer norm over channels last, scale by a raw parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth, self.norm = nn.Conv2d(3, 12, 2, stride=2), conv(12, 12, 7, groups=12), nn.LayerNorm(12)
        self.fc1, self.fc2, self.head = nn.Linear(12, 40), nn.Linear(40, 12), head(12)
        self.gamma = nn.Parameter(torch.rand(12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        y = self.gamma * self.fc2(F.gelu(self.fc1(y)))
        return self.head(x + y.permute(0, 3, 1, 2))


class HandNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.dim = nn.Parameter(torch.rand(dim) + 0.5), dim

    def forward(self, x: Tensor) -> Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + 1e-6))


class SumNorm(HandNorm):
    def forward(self, x: Tensor) -> Tensor:
        mean = x.sum(-1, keepdim=True) / x.shape[-1]
        variance = (x - mean).pow(2).sum(-1, keepdim=True) / (x.shape[-1] - 1)
        return (x - mean) / (variance + 1e-6).sqrt() * self.weight


class RootNorm(HandNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * math.sqrt(x.size(-1)) * self.weight


class DeviationNorm(HandNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)


@case(floats(2, 5, 8), free="0 2 4 6", share=0.45, zeroing=False, double=True)
def hand_written_norms() -> nn.Module:
    """RMS norm, a norm from sums and sizes, one from a root of the size, one from deviations."""
    return nn.Sequential(
        nn.Linear(8, 16), HandNorm(16), nn.Linear(16, 18), SumNorm(18), nn.Linear(18, 20), RootNorm(20),
        nn.Linear(20, 12), DeviationNorm(12), nn.Linear(12, 4),
    )  # fmt: skip


@case(image(), free="0 3", share=0.4)
def hand_written_batch_norm() -> nn.Module:
    """Statistics in buffers, reshaped for broadcasting."""

    class Frozen(nn.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, torch.rand(n) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            scale = self.weight * (self.running_var + 1e-5).rsqrt()
            shift = self.bias - self.running_mean * scale
            return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)

    return nn.Sequential(conv(3, 12), Frozen(12), nn.ReLU(), conv(12, 10), Frozen(10), nn.ReLU(), head(10))


@case(image(), free="stem/conv_group stem", share=0.3, zeroing=False)
class HandGroupNorm(nn.Module):
    """Group norm written with a view: the number of groups is an attribute of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.groups, self.stem, self.weight, self.head = 3, conv(3, 12), nn.Parameter(torch.rand(1, 12, 1, 1)), head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, c, h, w = x.shape
        y = x.view(n, self.groups, -1)
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True) + 1e-5).sqrt()
        return self.head(F.relu(y.view(n, c, h, w) * self.weight))


@case(floats(4, 8), free="0 3 6", share=0.4)
def batch_norm_of_features() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 16), nn.BatchNorm1d(16, affine=False), nn.ReLU(),
        nn.Linear(16, 12), nn.BatchNorm1d(12, track_running_stats=False), nn.Linear(12, 4),
    )  # fmt: skip


@case(image(), free="0 2", share=0.4, zeroing=False)
def weight_normed() -> nn.Module:
    """Direction and length are parameters of their own."""
    wrap = nn.utils.parametrizations.weight_norm
    return nn.Sequential(wrap(conv(3, 12)), nn.ReLU(), wrap(conv(12, 10)), nn.ReLU(), head(10))


@case(image(), free="0 2", share=0.4, zeroing=False)
def spectral_normed() -> nn.Module:
    """The estimate of the norm keeps one number per row and per column, which follow."""
    wrap = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(wrap(conv(3, 12)), nn.ReLU(), wrap(conv(12, 10)), nn.ReLU(), head(10))


@case(floats(2, 6), free="0.weight_v 2.weight_orig", share=0.4, zeroing=False)
def old_style_weight_and_spectral_norm() -> nn.Module:
    """Hooks compute the weight before every forward; the computed one is no parameter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(
            nn.utils.weight_norm(nn.Linear(6, 16)),
            nn.ReLU(),
            nn.utils.spectral_norm(nn.Linear(16, 12)),
            nn.ReLU(),
            nn.Linear(12, 3),
        )
