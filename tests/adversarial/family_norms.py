"""Norms, by module and by hand, over units, groups and space."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cases import IMAGES, ROWS, STEPS, Family, floats
from .references import Kept, over, plain, put, scatter

family = Family("norms")
X, S, PICTURES = floats(*ROWS), floats(*STEPS), floats(*IMAGES)


class Normed(nn.Module):
    """A layer, a norm over its 24 units (method or module `norm`), a classifier."""

    def __init__(self, norm: Any = None, **extra: Any) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 24), nn.Linear(24, 4)
        if norm is not None:
            self.norm = norm
        for key, value in extra.items():
            setattr(self, key, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(self.fc1(x)).tanh())


class NormedImage(nn.Module):
    """The same with 16 channels of an image."""

    def __init__(self, norm: Any = None, **extra: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
        if norm is not None:
            self.norm = norm
        for key, value in extra.items():
            setattr(self, key, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)).relu()).mean((2, 3))


def row(name: str, norm: Any, inputs: Any = X, extra: Any = None, **options: Any) -> None:
    family.add(
        name, lambda: Normed(norm() if _is_factory(norm) else norm, **(extra() if extra else {})), inputs, **options
    )


def image(name: str, norm: Any, extra: Any = None, **options: Any) -> None:
    family.add(
        name,
        lambda: NormedImage(norm() if _is_factory(norm) else norm, **(extra() if extra else {})),
        PICTURES,
        **options,
    )


def _is_factory(norm: Any) -> bool:
    return getattr(norm, "__name__", "") == "<lambda>" and not norm.__code__.co_argcount


def layer_norm_of_kept(model: nn.Module, kept: Kept) -> None:
    """The norm without weights over what is kept."""
    index = kept("fc1.weight")
    put(model, "norm", lambda h: scatter(F.layer_norm(h[..., index], index.shape), -1, index, h.shape[-1]))


def groups_of_kept(tensor: str, groups: int) -> Any:
    """A group norm without weights: every group over its own kept channels."""

    def change(model: nn.Module, kept: Kept) -> None:
        index, size = kept(tensor), kept.sizes[tensor][0] // groups

        def norm(h: Tensor) -> Tensor:
            y = torch.zeros_like(h)
            for group in range(groups):
                if (mine := index[index // size == group]).numel():
                    y = y.index_copy(1, mine, F.group_norm(h[:, mine], 1))
            return y

        put(model, "norm", norm)

    return change


KEPT = (over("norm", "fc1.weight"),)
KEPT_IMAGE = (over("norm", "a.weight", dim=1, out=1),)

row("layer_norm", lambda: nn.LayerNorm(24), right="channel")
row(
    "layer_norm_without_affine",
    lambda: nn.LayerNorm(24, elementwise_affine=False),
    truths=(layer_norm_of_kept,),
    right="channel",
)
row("layer_norm_without_bias", lambda: nn.LayerNorm(24, bias=False), right="channel")
row("rms_norm", lambda: nn.RMSNorm(24), right="channel")
row("functional_layer_norm", lambda h: F.layer_norm(h, h.shape[-1:]), truths=KEPT, right="channel")
row("functional_rms_norm", lambda h: F.rms_norm(h, h.shape[-1:]), truths=KEPT, right="channel")
row("literal_shape", lambda h: F.layer_norm(h, (24,)), truths=KEPT)
row(
    "by_hand",
    lambda h: (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt(),
    truths=KEPT,
    right="channel",
)
row(
    "by_hand_unbiased",
    lambda h: (h - h.mean(-1, keepdim=True)) / (h.std(-1, keepdim=True) + 1e-5),
    truths=KEPT,
    right="channel",
)
row("rms_by_hand", lambda h: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5), truths=KEPT, right="channel")
row("rms_by_norm", lambda h: h / h.norm(dim=-1, keepdim=True) * h.shape[-1] ** 0.5, truths=(plain, *KEPT))
row("rms_by_literal", lambda h: h / h.norm(dim=-1, keepdim=True) * 24**0.5, truths=(plain,), right="channel")
row("unit_length", lambda h: F.normalize(h, dim=-1), right="channel")
row("one_norm", lambda h: h / h.abs().sum(-1, keepdim=True), right="channel")
row("by_maximum", lambda h: h / h.abs().amax(-1, keepdim=True), right="channel")
row(
    "minimum_to_maximum",
    lambda h: (h - h.amin(-1, keepdim=True)) / (h.amax(-1, keepdim=True) - h.amin(-1, keepdim=True)),
    truths=KEPT,
)
row("softmax", lambda h: h.softmax(-1) * 9, truths=KEPT, right="channel")
row("log_softmax", lambda h: h.log_softmax(-1), truths=KEPT, right="channel")
row("over_batch", lambda h: h - h.mean(0), right="channel")
row("over_all", lambda h: (h - h.mean()) / (h.std() + 0.1), truths=KEPT)
row("over_steps_and_units", lambda h: F.layer_norm(h, h.shape[-2:]), floats((2, 6, 8), (1, 6, 8)), truths=KEPT)
row(
    "over_steps",
    lambda h: (h - h.mean(1, keepdim=True)) / (h.std(1, keepdim=True) + 0.1),
    floats((2, 6, 8), (3, 17, 8)),
    right="channel",
)
row("group_norm", lambda: nn.GroupNorm(4, 24), right="channel")
row("group_norm_one", lambda: nn.GroupNorm(1, 24), right="channel")
row("group_norm_each", lambda: nn.GroupNorm(24, 24), floats((2, 8), (1, 8)))
row(
    "groups_by_hand",
    lambda h: F.layer_norm(h.view(len(h), 4, 6), (6,)).flatten(1),
    truths=(groups_of_kept("fc1.weight", 4),),
)
row("groups_interleaved", lambda h: F.layer_norm(h.view(len(h), 6, 4).mT, (6,)).mT.flatten(1))
row("batch_norm", lambda: nn.BatchNorm1d(24), right="channel")
row("batch_norm_without_affine", lambda: nn.BatchNorm1d(24, affine=False), right="channel")
row(
    "batch_norm_without_statistics",
    lambda: nn.BatchNorm1d(24, track_running_stats=False),
    floats((5, 8), (9, 8)),
    right="channel",
)
row("local_response_by_hand", lambda h: h / (1 + F.avg_pool1d(h[:, None] ** 2, 3, 1, 1)[:, 0]))
row("decorrelated", lambda h: h @ torch.linalg.inv(torch.eye(h.shape[1]) + h.T @ h / len(h)))
row("ranked", lambda h: h.argsort(1).argsort(1) / h.shape[1])
row("root_of_count", lambda h: h / (h > 0).sum(1, keepdim=True).clamp(min=1).sqrt(), right="channel")
row(
    "mean_of_positive",
    lambda h: h / (1 + h.clamp(min=0).sum(1, keepdim=True) / (h > 0).sum(1, keepdim=True).clamp(min=1)),
    right="channel",
)
image("instance_norm", lambda: nn.InstanceNorm2d(16, affine=True), right="channel")
image("instance_norm_tracking", lambda: nn.InstanceNorm2d(16, affine=True, track_running_stats=True), right="channel")
image("group_norm_image", lambda: nn.GroupNorm(4, 16), right="channel")
image("local_response", lambda: nn.LocalResponseNorm(3, 1.0))
image("cross_map", lambda: nn.CrossMapLRN2d(3, 1.0))
image(
    "pixel_norm", lambda h: h * torch.rsqrt(h.pow(2).mean(1, keepdim=True) + 1e-5), truths=KEPT_IMAGE, right="channel"
)
image(
    "layer_norm_channels_first",
    lambda h: F.layer_norm(h.movedim(1, -1), h.shape[1:2]).movedim(-1, 1),
    truths=KEPT_IMAGE,
    right="channel",
)
image("group_norm_one_functional", lambda h: F.group_norm(h, 1), truths=KEPT_IMAGE, right="channel")
image("all_of_the_image", lambda h: F.layer_norm(h, h.shape[1:]), truths=KEPT_IMAGE, right="channel")
image(
    "instance_by_hand",
    lambda h: (h - h.mean((2, 3), keepdim=True)) / (h.std((2, 3), keepdim=True) + 0.1),
    right="channel",
)
image(
    "groups_by_view",
    lambda h: F.instance_norm(h.reshape(len(h), 4, -1)).view_as(h),
    truths=(groups_of_kept("a.weight", 4),),
)
image("filter_response", lambda h: h * torch.rsqrt(h.pow(2).mean((2, 3), keepdim=True) + 1e-3), right="channel")


@family.case(PICTURES, truths=(plain, over("divide", "a.weight", dim=1, out=1)), right="channel")
class GlobalResponse(nn.Module):
    """ConvNeXt v2: norms of channels, divided by their mean over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1)
        self.gamma, self.beta = nn.Parameter(torch.rand(1, 16, 1, 1)), nn.Parameter(torch.rand(1, 16, 1, 1))

    def divide(self, g: Tensor) -> Tensor:
        return g / (g.mean(1, keepdim=True) + 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        n = self.divide(h.norm(dim=(2, 3), keepdim=True))
        return self.b(self.gamma * (h * n) + self.beta + h).mean((2, 3))


@family.case(S, right="channel")
class AdaptiveNorm(nn.Module):
    """DiT: scale, shift and gate from a condition, six pieces in one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.mod = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(8, 48)
        self.up, self.down, self.out = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        scale, shift, gate = self.mod(x.mean(1)).unsqueeze(1).chunk(3, -1)
        n = self.norm(h) * (1 + scale) + shift
        return self.out(h + gate * self.down(self.up(n).relu()))


@family.case(PICTURES, right="channel")
class AdaIn(nn.Module):
    """Style transfer: statistics of one image for another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h, s = self.a(x), self.a(x.flip(0) * 2)
        n = (h - h.mean((2, 3), keepdim=True)) / (h.std((2, 3), keepdim=True) + 0.1)
        return self.b(n * s.std((2, 3), keepdim=True) + s.mean((2, 3), keepdim=True)).mean((2, 3))


@family.case(S, right="channel")
class ResidualScale(nn.Module):
    """Layer scale and a post-norm that shares its weight with another norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.gamma = nn.Linear(8, 16), nn.LayerNorm(16), nn.Parameter(torch.rand(16))
        self.up, self.down, self.out = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.stem(x))
        return self.out(self.norm(h + self.gamma * self.down(self.up(h).relu())))
