"""Operators and small formulas between two layers that real code has and that nobody had tried."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cases import Family, floats
from .nets import Image, Mid
from .references import over, plain

family = Family("formulas")
ROWS = floats((5, 8), (1, 8), (9, 8))
IMAGES = floats((2, 3, 8, 8), (1, 3, 8, 8), (3, 3, 12, 16))
ROW_TRUTHS = (plain, over("mid", "fc1.weight"), over("mid", "fc1.weight", out=None))
IMAGE_TRUTHS = (plain, over("mid", "a.weight", dim=1, out=1), over("mid", "a.weight", dim=1, out=None))


def mid(name: str, between: Callable[[Any, Tensor], Tensor], /, **extra: Callable[[], Any]) -> None:
    """A case of rows; what `between` needs beside it is made anew for every model."""
    family.add(name, lambda: Mid(between, **{k: make() for k, make in extra.items()}), ROWS, truths=ROW_TRUTHS)


def img(name: str, between: Callable[[Any, Tensor], Tensor], /, **extra: Callable[[], Any]) -> None:
    """A case of images."""
    family.add(name, lambda: Image(between, **{k: make() for k, make in extra.items()}), IMAGES, truths=IMAGE_TRUTHS)


def louder(h: Tensor, by: Tensor) -> Tensor:
    return h * (1 + by)


def weight(*shape: int) -> Callable[[], Tensor]:
    return lambda: nn.Parameter(torch.randn(*shape) / 2)


def linear(inputs: int, outputs: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(inputs, outputs)


mid("aminmax", lambda m, h: (h - h.aminmax(dim=1, keepdim=True)[0]) / (1 + h.aminmax(dim=1, keepdim=True)[1]))
mid("std_mean_uncorrected", lambda m, h: h / (torch.std_mean(h, 1, correction=0, keepdim=True)[0] + 1))
mid("var_correction_3", lambda m, h: h / (h.var(1, correction=3, keepdim=True) + 1))
mid("nanmean", lambda m, h: louder(h, h.nanmean(1, keepdim=True)))
mid("count_nonzero", lambda m, h: louder(h, torch.count_nonzero(h, 1)[:, None]))
mid("huber_mean", lambda m, h: louder(h, F.huber_loss(h, h.flip(0), reduction="mean")))
mid("smooth_l1_mean", lambda m, h: louder(h, F.smooth_l1_loss(h, h.roll(1, 0))))
mid("kl_div_mean", lambda m, h: louder(h, F.kl_div(h.log_softmax(1), h.roll(1, 0).softmax(1), reduction="mean")))
mid("gaussian_nll", lambda m, h: louder(h, F.gaussian_nll_loss(h, h.roll(1, 0), h.exp())))
mid("poisson_nll", lambda m, h: louder(h, F.poisson_nll_loss(h, h.roll(1, 0))))
mid("soft_cross_entropy", lambda m, h: louder(h, F.cross_entropy(h, h.roll(1, 0).softmax(1))))
mid("cross_entropy_smoothed", lambda m, h: louder(h, F.cross_entropy(h, h.argmax(1), label_smoothing=0.3)))
mid("binary_cross_entropy", lambda m, h: louder(h, F.binary_cross_entropy_with_logits(h, h.sigmoid())))
mid("cosine_embedding", lambda m, h: louder(h, F.cosine_embedding_loss(h, h.roll(1, 0) + 1, torch.ones(len(h)))))
mid("triplet", lambda m, h: louder(h, F.triplet_margin_loss(h, h.roll(1, 0), h.flip(0), margin=3.0)))
mid("multi_margin", lambda m, h: louder(h, F.multi_margin_loss(h, h.argmin(1))))
mid("group_sort_pairs", lambda m, h: h.view(len(h), -1, 2).sort(-1)[0].flatten(1))
mid("max_min_halves", lambda m, h: torch.cat([torch.maximum(*h.chunk(2, 1)), torch.minimum(*h.chunk(2, 1))], 1))
mid("softmin", lambda m, h: h * F.softmin(h, 1))
mid("linalg_inf_norm", lambda m, h: h / (1 + torch.linalg.vector_norm(h, float("inf"), 1, True)))
mid("linalg_zero_norm", lambda m, h: h / (1 + torch.linalg.vector_norm(h, 0, 1, True)))
mid("linalg_minus_inf_norm", lambda m, h: h + torch.linalg.vector_norm(h + 1, -float("inf"), 1, True))
mid("slogdet", lambda m, h: louder(h, torch.linalg.slogdet(h.T @ h / len(h) + torch.eye(h.shape[1]))[1] / 10))
mid("pinv", lambda m, h: h + (torch.linalg.pinv(h.T @ h + torch.eye(h.shape[1])) @ h.T).T)
mid("eigvalsh", lambda m, h: louder(h, torch.linalg.eigvalsh(h.T @ h).amax() / 10))
mid("matrix_norm_nuclear", lambda m, h: louder(h, torch.linalg.matrix_norm(h, "nuc") / 10))
mid("kron", lambda m, h: torch.kron(h, torch.ones(1, 2)).view(len(h), -1, 2).mean(-1))
mid("combinations", lambda m, h: louder(h, torch.combinations(h[0]).prod(1).sum() / 10))
mid("cumulative_trapezoid", lambda m, h: F.pad(torch.cumulative_trapezoid(h, dim=1), (1, 0)))
mid("isin", lambda m, h: h * torch.isin(h.round(), torch.tensor([1.0, 2.0])))
mid("unique_consecutive", lambda m, h: louder(h, torch.unique_consecutive(h.round()).numel() / 10))
mid("histc", lambda m, h: louder(h, torch.histc(h, 4, 0, 2)[1] / 10))
mid("index_fill", lambda m, h: h.index_fill(1, torch.tensor([0, 3]), 1.0))
mid("index_copy", lambda m, h: h.index_copy(1, torch.tensor([0, 3]), h[:, :2]))
mid("index_reduce", lambda m, h: torch.zeros_like(h).index_reduce(1, torch.arange(h.shape[1]) // 2, h, "amax"))
mid("select_scatter", lambda m, h: torch.select_scatter(h, h.sum(1), 1, 2))
mid("slice_scatter", lambda m, h: torch.slice_scatter(h, h[:, :4] * 2, 1, 4, 8))
mid("diag_embed", lambda m, h: (torch.diag_embed(h) @ torch.ones(h.shape[1], 1)).squeeze(-1))
mid("fftshift", lambda m, h: torch.fft.fftshift(h, 1))
mid("irfft_of_literal", lambda m, h: torch.fft.irfft(torch.fft.rfft(h, n=24, dim=1), n=24, dim=1))
mid("irfft_of_width", lambda m, h: torch.fft.irfft(torch.fft.rfft(h, dim=1), n=h.shape[1], dim=1))
mid("ortho_dct_energy", lambda m, h: louder(h, torch.fft.rfft(h, dim=1, norm="ortho").abs().square().sum(1, True) / 10))
mid("padded_to_literal", lambda m, h: F.pad(h, (0, 24 - h.shape[1])))
mid("new_zeros_filled", lambda m, h: h.new_zeros(len(h), 24).index_copy(1, torch.arange(h.shape[1]), h))
mid("kwta", lambda m, h: h * (h >= h.topk(math.ceil(0.25 * h.shape[1]), 1)[0][:, -1:]))
mid("lfq_bits", lambda m, h: louder(h, ((h > 0.2).long() * 2 ** torch.arange(h.shape[1])).sum(1, True) % 7))
mid("bilinear_module", lambda m, h: torch.relu(m.bi(h, h)), bi=lambda: nn.Bilinear(24, 24, 24))
mid("pdist", lambda m, h: louder(h, F.pdist(h, 1).sum() / h.shape[0] / 50))
mid("cdist_over_units", lambda m, h: louder(h, torch.cdist(h.T, h.T).mean(1)))
mid("expm1_softplus_logaddexp", lambda m, h: torch.logaddexp(h, h.logsumexp(1, keepdim=True)))
mid("rank_embedding", lambda m, h: h + m.e[h.argsort(1).argsort(1)], e=weight(24))
mid("logit_clamp_by_quantile", lambda m, h: h.clamp(max=torch.quantile(h, 0.75, dim=1, keepdim=True)))
mid("winsor_by_kth", lambda m, h: h.minimum(h.kthvalue(h.shape[1] - 2, 1, True)[0]))
img("fold_unfold_overlap", lambda m, h: F.fold(F.unfold(h, 3, padding=1), h.shape[2:], 3, padding=1) / 9)
img("softmax2d", lambda m, h: h * nn.Softmax2d()(h))
img("layer_norm_chw", lambda m, h: F.layer_norm(h, h.shape[1:]))
img("group_norm_by_width", lambda m, h: F.group_norm(h, max(1, h.shape[1] // 4)))
img("group_norm_by_gcd", lambda m, h: F.group_norm(h, math.gcd(32, h.shape[1])))
img("deform_by_group", lambda m, h: torch.cat([p.roll(i, -1) for i, p in enumerate(h.chunk(4, 1))], 1))
img("total_variation", lambda m, h: louder(h, (h[..., 1:] - h[..., :-1]).abs().mean((1, 2, 3), True)))
mid("topk_pool_score", lambda m, h: h * torch.tanh(h @ m.p / m.p.norm())[:, None], p=weight(24))
mid("planar_flow", lambda m, h: h + m.u * torch.tanh(h @ m.w + m.b)[:, None], u=weight(24), w=weight(24), b=weight(1))
mid("radial_flow", lambda m, h: h + 0.5 * (h - m.z) / (1 + (h - m.z).norm(dim=1, keepdim=True)), z=weight(24))
mid("vicreg_std", lambda m, h: louder(h, (1 - (h.var(0, unbiased=False) + 1e-4).sqrt()).relu().mean()))
mid("kl_sum", lambda m, h: louder(h, (-0.5 * (1 + h - h.square() - h.exp()).sum(1, keepdim=True)) / 40))
mid("kl_mean", lambda m, h: louder(h, -0.5 * (1 + h - h.square() - h.exp()).mean(1, keepdim=True)))
mid("siren", lambda m, h: torch.sin(30 * m.l(h)), l=linear(24, 24))
mid("maxpool_over_experts_unflatten", lambda m, h: m.e(h).unflatten(1, (-1, 3)).amax(2), e=linear(24, 72))
mid("set_by_cumcount", lambda m, h: h.index_add(0, torch.arange(len(h)) // 2, h))
mid("groups_by_gcd", lambda m, h: h.unflatten(1, (math.gcd(h.shape[1], 6), -1)).softmax(1).flatten(1))
mid("dilated_pairs", lambda m, h: h * h.unflatten(1, (2, -1)).flip(1).flatten(1))
mid("scale_by_own_count_above_mean", lambda m, h: h / (h > h.mean(1, True)).sum(1, True).clamp(min=1))
mid("eps_by_width", lambda m, h: h / (h.norm(dim=1, keepdim=True) + 1e-3 * h.shape[1]))
mid("threshold_one_over_width", lambda m, h: h * (h.softmax(1) > 1 / h.shape[1]))
mid("threshold_far", lambda m, h: h * (h < 3 * h.shape[1]))
mid("temperature_of_gate", lambda m, h: h * (m.g(h) * h.shape[1] ** 0.5).sigmoid().round(), g=linear(24, 24))
img("filter_by_sorted_energy", lambda m, h: h.gather(1, h.mean((2, 3)).argsort(1)[..., None, None].expand_as(h)))
