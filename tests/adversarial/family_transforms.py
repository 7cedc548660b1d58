"""What is done to hidden features: spectra, orders, distances, decompositions, function transforms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .cases import ROWS, STEPS, Family, floats, quiet
from .nets import Mid
from .references import over, plain

family = Family("transforms")
X, S = floats(*ROWS), floats(*STEPS)
ONE_STEP = quiet(lambda: torch.randn(2, 1, 8), S)


def mid(name: str, middle: Any, inputs: Any = X, *, extra: Any = None, **options: Any) -> None:
    options.setdefault("must", "fc1.weight")
    family.add(name, lambda: Mid(middle, **(extra() if extra else {})), inputs, **options)


mean_of_kept = (plain, over("middle", "fc1.weight", dim=(0, -1)))
mid("triu_hidden_by_one_step", lambda m, h: h.triu(), ONE_STEP)
mid("tril", lambda m, h: h.tril(3))
mid("tril_of_gram", lambda m, h: h + (h.T @ h).tril().sum(0))
mid("flip", lambda m, h: h.flip(-1))
mid("flip_time", lambda m, h: h.flip(1), S, right="channel")
mid("roll_time", lambda m, h: h.roll(1, 1), S, right="channel")
mid("roll_flat", lambda m, h: h.roll(1))
mid("cumsum", lambda m, h: h.cumsum(-1))
mid("cumsum_time", lambda m, h: h.cumsum(1), S, right="channel")
mid("cumprod", lambda m, h: (1 + 0.1 * h).cumprod(-1))
mid("logcumsumexp", lambda m, h: h.logcumsumexp(-1), truths=mean_of_kept)
mid("cummax_indices", lambda m, h: h + h.cummax(-1).indices)
mid("diff", lambda m, h: h.diff(dim=-1, append=h[..., :1]))
mid("sort", lambda m, h: h.sort(-1).values)
mid("sort_time", lambda m, h: h.sort(1).values, S, right="channel")
mid("argsort_twice", lambda m, h: h * h.argsort(-1).argsort(-1))
mid("topk_mask", lambda m, h: h * (h >= h.topk(5, -1).values[..., -1:]))
mid("topk_scatter", lambda m, h: torch.zeros_like(h).scatter(-1, h.topk(5, -1).indices, h.topk(5, -1).values))
mid("kth_value", lambda m, h: h - h.kthvalue(3, -1, keepdim=True).values, truths=mean_of_kept)
mid("median", lambda m, h: h - h.median(-1, keepdim=True).values, truths=mean_of_kept)
mid("quantile", lambda m, h: h - h.quantile(0.3, -1, keepdim=True), truths=mean_of_kept)
mid("mode", lambda m, h: h - h.round().mode(-1, keepdim=True).values)
mid("argmax_one_hot", lambda m, h: h + F.one_hot(h.argmax(-1), h.shape[-1]))
mid("argmax_one_hot_literal", lambda m, h: h + F.one_hot(h.argmax(-1), 24))
mid("argmax_as_number", lambda m, h: h * h.argmax(-1, keepdim=True))
mid("gumbel_hard", lambda m, h: h * F.one_hot((h + 1).argmax(-1), h.shape[-1]).float(), truths=(plain,))
mid("gather_neighbours", lambda m, h: h.gather(-1, (torch.arange(h.shape[-1]) + 1).remainder(h.shape[-1]).expand_as(h)))
mid("take_along", lambda m, h: torch.take_along_dim(h, h.argsort(-1, descending=True), -1))
mid("index_by_buffer", lambda m, h: h[:, m.order], extra=lambda: {"order": torch.randperm(24)})
mid("index_select_every_second", lambda m, h: h + h.index_select(1, torch.arange(0, 24, 2)).repeat(1, 2))
mid(
    "index_add",
    lambda m, h: torch.zeros_like(h).index_add(1, m.order, h),
    extra=lambda: {"order": torch.randint(24, (24,))},
)
mid("scatter_add", lambda m, h: torch.zeros_like(h).scatter_add(1, m.order.expand_as(h), h),
    extra=lambda: {"order": torch.randint(24, (24,))})  # fmt: skip
mid("index_put", lambda m, h: _index_put(h))
mid("masked_scatter", lambda m, h: torch.zeros_like(h).masked_scatter(h > 0.5, h))
mid("masked_select_mean", lambda m, h: h + h.masked_select(h > 0.5).sum())
mid("nonzero_columns", lambda m, h: h * (1 + h.nonzero()[:, 1].sum() / 99))
mid("unique_values", lambda m, h: h * (1 + h.round(decimals=1).unique().numel()))
mid("histogram", lambda m, h: h * (1 + h.histc(4, 0, 2)[1]))
mid("bucketize", lambda m, h: h + torch.bucketize(h, torch.tensor([0.2, 0.6, 1.0])), right="channel")
mid("searchsorted", lambda m, h: h + torch.searchsorted(h.sort(-1).values, h))
mid("where_arange", lambda m, h: torch.where(torch.arange(h.shape[-1]) > 6, h, -h))
mid("fft", lambda m, h: torch.fft.fft(h, dim=-1).real)
mid("rfft_filter", lambda m, h: torch.fft.irfft(torch.fft.rfft(h, dim=-1) * 0.5, n=h.shape[-1], dim=-1))
mid("fft_over_time", lambda m, h: torch.fft.fft(h, dim=1).real, S, right="channel")
mid("fnet", lambda m, h: torch.fft.fft2(h).real, S)
mid("hadamard", lambda m, h: _hadamard(h))
mid("unfold_windows", lambda m, h: F.pad(h, (1, 1)).unfold(-1, 3, 1).mean(-1))
mid("pad_and_slice", lambda m, h: F.pad(h, (1, 0))[..., :-1])
mid("circular_pad", lambda m, h: F.pad(h[:, None], (2, 0), mode="circular")[:, 0, :-2])
mid("pad_nothing", lambda m, h: F.pad(h, (0, 0)), right="channel")
mid("repeat_and_fold", lambda m, h: h.repeat(1, 2)[:, ::2])
mid("repeat_interleave_mean", lambda m, h: h.repeat_interleave(2, -1).view(len(h), 2, -1).mean(1))
mid("cross", lambda m, h: torch.linalg.cross(h.view(len(h), -1, 3), h.roll(1, 0).view(len(h), -1, 3)).flatten(1))
mid("pairs_rotated", lambda m, h: torch.view_as_real(torch.view_as_complex(h.view(len(h), -1, 2)) * 1j).flatten(1))
mid("outer_product", lambda m, h: h + torch.einsum("bi,bj->bij", h, h).sum(2), right="channel")
mid("outer_flat", lambda m, h: h + torch.einsum("bi,bj->bij", h, h).flatten(1)[:, :24])
mid("diagonal", lambda m, h: h + torch.einsum("bi,bj->bij", h, h).diagonal(0, 1, 2))
mid("off_diagonal", lambda m, h: h + F.pad(torch.einsum("bi,bj->bij", h, h).diagonal(1, 1, 2), (0, 1)))
mid("trace", lambda m, h: h * (h.T @ h).trace().tanh(), right="channel")
mid("determinant", lambda m, h: h * torch.logdet(torch.eye(h.shape[1]) + h.T @ h).tanh())
mid("covariance", lambda m, h: h @ torch.cov(h.T).tanh(), floats((5, 8), (9, 8)))
mid(
    "correlation_matrix",
    lambda m, h: h @ torch.corrcoef(h.T + m.fc1.bias[:, None]).nan_to_num(),
    floats((5, 8), (9, 8)),
)
mid("singular_values", lambda m, h: h * torch.linalg.svdvals(h)[0].tanh(), right="channel")
mid("power_iteration", lambda m, h: h * torch.linalg.matrix_norm(h, 2).tanh(), right="channel")
mid("inverse_covariance", lambda m, h: h @ torch.linalg.inv(h.T @ h + torch.eye(h.shape[1])))
mid("distances", lambda m, h: h * torch.cdist(h, m.p).sum(1, keepdim=True).tanh(),
    extra=lambda: {"p": nn.Parameter(torch.randn(6, 24))}, right="channel")  # fmt: skip
mid("pairwise_distance", lambda m, h: h * F.pairwise_distance(h, h.flip(0)).tanh()[:, None], truths=(plain,))
mid("cosine_similarity", lambda m, h: h * F.cosine_similarity(h, h.flip(0), dim=1)[:, None])
mid("renorm", lambda m, h: h.renorm(2, 0, 1.0), right="channel")
mid("p_norm", lambda m, h: h / (1 + h.norm(p=3, dim=1, keepdim=True)), right="channel")
mid("normalize", lambda m, h: F.normalize(h, dim=-1), right="channel")
mid("softmax", lambda m, h: h.softmax(-1), truths=(over("middle", "fc1.weight", dim=(0, -1)),), right="channel")
mid(
    "logsumexp",
    lambda m, h: h - h.logsumexp(-1, keepdim=True),
    truths=(over("middle", "fc1.weight", dim=(0, -1)),),
    right="channel",
)
mid("softmax_time", lambda m, h: h.softmax(1), S, right="channel")
mid(
    "mean_and_max",
    lambda m, h: h * h.mean(-1, keepdim=True) + h.amax(-1, keepdim=True),
    truths=mean_of_kept,
    right="channel",
)
mid("standard_deviation", lambda m, h: h / (0.1 + h.std(-1, keepdim=True)), truths=mean_of_kept, right="channel")
mid("glu", lambda m, h: F.glu(torch.cat([h, h.tanh()], 1), 1), right="channel")
mid("interleaved_gate", lambda m, h: (h[:, ::2] * h[:, 1::2].sigmoid()).repeat(1, 2))
mid("bilinear", lambda m, h: h + m.bil(h, h), extra=lambda: {"bil": nn.Bilinear(24, 24, 24)}, right="channel")
mid("bilinear_times_roll", lambda m, h: h + m.bil(h, h.roll(1, 1)), extra=lambda: {"bil": nn.Bilinear(24, 24, 24)})
mid(
    "einsum_transposed",
    lambda m, h: torch.einsum("bi,ij->bj", h, m.w),
    extra=lambda: {"w": nn.Parameter(torch.randn(24, 24) / 5)},
    right="channel",
)
mid(
    "einsum_diagonal",
    lambda m, h: h * torch.einsum("ii->i", m.w),
    extra=lambda: {"w": nn.Parameter(torch.randn(24, 24))},
)
mid("einsum_tied", lambda m, h: torch.einsum("bi,ij,bj->b", h, m.w, h)[:, None].tanh() + h,
    extra=lambda: {"w": nn.Parameter(torch.randn(24, 24) / 9)}, right="channel")  # fmt: skip
mid("vmap", lambda m, h: torch.vmap(lambda v: v.cumsum(0))(h))
mid("vmap_pointwise", lambda m, h: torch.vmap(torch.tanh)(h), right="channel")
mid(
    "vmap_over_channels",
    lambda m, h: torch.vmap(lambda c, i: c * i, in_dims=(1, 0), out_dims=1)(h, torch.arange(h.shape[1])),
)
mid("gradient_inside", lambda m, h: torch.func.grad(lambda v: v.pow(3).sum())(h), right="channel")
mid("jacobian_product", lambda m, h: torch.func.jvp(torch.sin, (h,), (h.flip(1),))[1])
mid("functional_call", lambda m, h: torch.func.functional_call(m.lin, {"weight": m.lin.weight.flip(0)}, (h,)),
    extra=lambda: {"lin": nn.Linear(24, 24, bias=False)})  # fmt: skip
mid("checkpoint", lambda m, h: checkpoint(lambda v: v.tanh() * 2, h, use_reentrant=False), right="channel")
mid("checkpoint_flip", lambda m, h: checkpoint(lambda v: v.flip(1), h, use_reentrant=False))
mid("own_function", lambda m, h: Mirror.apply(h))
mid("own_function_pointwise", lambda m, h: Twice.apply(h), right="channel")
mid("straight_through_rank", lambda m, h: h + (h.argsort(1).float() - h).detach())
mid("product", lambda m, h: h * (1 + 0.1 * h).prod(1, keepdim=True))
mid("count_positive", lambda m, h: h * (h > 0).sum(1, keepdim=True), right="channel")
mid("all_positive", lambda m, h: h * (h > 0).all(1, keepdim=True))
mid("split_uneven", lambda m, h: torch.cat(h.split([4, 20], 1)[::-1], 1))
mid("tensor_split", lambda m, h: torch.cat(h.tensor_split(5, 1)[::-1], 1))
mid("unflatten_transpose", lambda m, h: h.unflatten(1, (4, -1)).mT.flatten(1))
mid(
    "matrix_of_features",
    lambda m, h: (h.view(len(h), 4, 6) @ m.w).flatten(1),
    extra=lambda: {"w": nn.Parameter(torch.randn(6, 6))},
)
mid("first_column_of_gram", lambda m, h: (h.T @ h)[:, :1].T + h)
mid("swapped_axes", lambda m, h: h.reshape(h.shape[1], h.shape[0]).T)
mid("bits", lambda m, h: (h.view(torch.int32) & -65536).view(torch.float32), train=False)
mid("random_features", lambda m, h: torch.cos(h @ m.w), extra=lambda: {"w": torch.randn(24, 24)})


class Mirror(torch.autograd.Function):
    """Mirrors, and hides it in a function of its own."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.flip(1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.flip(1)


class Twice(torch.autograd.Function):
    """A harmless function of its own."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


def _index_put(h: Tensor) -> Tensor:
    h = h.clone()
    h[:, 3] = h[:, 4] * 2
    return h


def _hadamard(h: Tensor) -> Tensor:
    a, b = h[:, :12], h[:, 12:]
    return torch.cat([a + b, a - b], 1)
