"""One row or more for every operator that has a rule: what stands between two layers, and where units can be cut.

A row is written for a tensor `h` of some rank; the units of the layer in front of it (there are 12) lie along one of
its dimensions, and every dimension takes its turn. `free` lists the dimensions along which the units can be cut.
`m.p` gives a parameter, `m.b` a buffer, both made when the model is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

aten = torch.ops.aten
UNITS = 12
Mid = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Row:
    """Operators between two layers.

    Args:
        ops: names of the rules' registry that the trace has to show.
        mid: (h, model) -> a tensor or several.
        free: dimensions of `h` along which its units can be cut.
        sizes: of the other dimensions of `h`; the first is the batch.
        dims: dimensions that are tried; "" = all.
        kept: dimensions of `h` over which the operator counts what is there (a mean, a norm): the truth is then the
            operator on the kept units, not on zeros.
        ties: parameters that follow the units, and along which of their dimensions, where `kept` is not empty.
        head: dimension of the result that the next layer reads; None = the one that is as long as there are units,
            or else the longest.
        refused: where the units can be cut, but the second proof refuses what changes the function.
        note: what tells it from other rows of the same operators.
    """

    ops: str
    mid: Mid
    free: str
    sizes: tuple[int, ...] = (2, 5)
    dims: str = ""
    kept: str = ""
    ties: tuple[tuple[str, int], ...] = ()
    head: int | None = None
    refused: str = ""
    note: str = ""

    @property
    def name(self) -> str:
        return f"{self.ops.replace(' ', '+')}{' ' if self.note else ''}{self.note}"


def inferred(mid: Mid) -> Mid:
    """In inference mode operators that are made of others arrive whole."""

    def inside(h: Any, m: Any) -> Any:
        with torch.inference_mode():
            return mid(h, m)

    return inside


ROWS: list[Row] = []
# Kernels that only other devices have: the rule is that of the operator beside it.
ELSEWHERE = {
    "_fused_rms_norm": "native_layer_norm",
    "cudnn_batch_norm": "native_batch_norm",
    "cudnn_convolution": "convolution",
    "cudnn_grid_sampler": "grid_sampler_2d",
    "mkldnn_max_pool2d": "max_pool2d_with_indices",
    "_scaled_dot_product_flash_attention": "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention": "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_cudnn_attention": "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable": "_scaled_dot_product_flash_attention_for_cpu",
}
IMAGE, VOLUME, MATRIX, VECTOR = (2, 6, 6), (2, 4, 4, 4), (5,), ()


def row(ops: str, mid: Mid, free: str = "", sizes: tuple[int, ...] = (2, 5), **options: Any) -> None:
    ROWS.append(Row(ops, mid, free, sizes, **options))


def same(ops: str, mid: Mid, **options: Any) -> None:
    """Element by element: free wherever the units lie."""
    row(ops, mid, "012", **options)


# -- element by element -----------------------------------------------------------------------------------------------

same("copy empty_like", lambda h, m: torch.empty_like(h).copy_(h))
same("fill", lambda h, m: h * torch.empty_like(h).fill_(0.5))
same("zero clone", lambda h, m: h + h.clone().zero_())
same("_to_copy", lambda h, m: h.double().float())
same("detach", lambda h, m: h.detach())
same("alias", lambda h, m: aten.alias(h))
same("lift_fresh", lambda h, m: aten.lift_fresh(h))
same("lift_fresh_copy", lambda h, m: aten.lift_fresh_copy(h))
same("contiguous", inferred(lambda h, m: h.contiguous()))
same("native_dropout", lambda h, m: aten.native_dropout(h, 0.5, True)[0])
same("dropout", inferred(lambda h, m: torch.dropout(h, 0.5, False)))
same("bernoulli", lambda h, m: h * torch.bernoulli(h.sigmoid()))
same("uniform", lambda h, m: h + torch.empty_like(h).uniform_())
same("normal", lambda h, m: h + torch.empty_like(h).normal_())
same("exponential", lambda h, m: h + torch.empty_like(h).exponential_())
same("rand_like randn_like", lambda h, m: h + torch.rand_like(h) + torch.randn_like(h))
same(
    "zeros_like ones_like full_like", lambda h, m: torch.zeros_like(h) + h * torch.ones_like(h) * torch.full_like(h, 2)
)
same("masked_fill", lambda h, m: h.masked_fill(h > 0.1, 0.5))
same("_prelu_kernel", lambda h, m: F.prelu(h, m.p("w", 1)))
row("_prelu_kernel", lambda h, m: F.prelu(h, m.p("w", UNITS)), "1", dims="1", note="a slope per channel")
same("rrelu_with_noise", lambda h, m: F.rrelu(h, training=True))
same("rrelu", inferred(lambda h, m: torch.rrelu(h)))
same("complex", lambda h, m: torch.complex(h, h * 2).real + torch.complex(h, h * 2).imag)
same("real imag", inferred(lambda h, m: aten.real(torch.complex(h, h * 2)) + aten.imag(torch.complex(h, h * 2))))
same("_conj _neg_view", lambda h, m: torch.complex(h, h * 2).conj().imag)
same("polar", lambda h, m: torch.polar(h.abs() + 1, h).real)
same("clamp", lambda h, m: h.clamp(-0.5, 0.5))
same("where", lambda h, m: torch.where(h > 0, h, h * 0.5))
same("nan_to_num", lambda h, m: torch.nan_to_num(h))
same("isnan", lambda h, m: torch.where(torch.isnan(h), 0.0, h))
same("isinf", lambda h, m: torch.where(aten.isinf(h), 0.0, h))
same("hardswish", lambda h, m: F.hardswish(h))
same("log_sigmoid_forward", lambda h, m: F.logsigmoid(h))
same("floor_divide", lambda h, m: torch.floor_divide(h, 0.3))
same("lerp", lambda h, m: torch.lerp(h, h * 0.2, 0.3))
same("addcmul", lambda h, m: torch.addcmul(h, h, h.sin()))
same("addcdiv", lambda h, m: torch.addcdiv(h, h, h.abs() + 1))
same("relu", lambda h, m: F.relu(h))
same("relu6", inferred(lambda h, m: aten.relu6(h)))
same("hardtanh", lambda h, m: F.hardtanh(h))
same("atan2", lambda h, m: torch.atan2(h, h + 1), note="by its tag")
same("mul add", lambda h, m: h * m.p("w", *h.shape[1:]) + m.p("v", h.shape[-1]), dims="12", note="with weights")
same("mul", lambda h, m: h * h.exp(), note="with itself")
for name, moved in (("tril", lambda h, m: h.tril()), ("triu", lambda h, m: h.triu(1))):
    row(name, moved, "0")  # along the last two dimensions, places decide
row("triu", lambda h, m: h.new_ones(h.shape[1], h.shape[1]).triu() @ h, "02", note="a mask of its own")

# -- made, not computed -----------------------------------------------------------------------------------------------

LAST = "01"
row("arange", lambda h, m: h + torch.arange(h.shape[-1]), LAST)
row("arange", lambda h, m: h[:, torch.arange(h.shape[1])], "02", note="as an index")
same("zeros ones full", lambda h, m: h * torch.ones(h.shape) + torch.zeros(h.shape) + torch.full(h.shape, 0.5))
same("empty", lambda h, m: torch.empty(h.shape).copy_(h))
same("rand randn", lambda h, m: h + torch.rand(h.shape) + torch.randn(h.shape))
row("randint", lambda h, m: h + torch.randint(0, 3, h.shape))
row("eye", lambda h, m: h @ torch.eye(h.shape[-1]), LAST)
row("linspace", lambda h, m: h * torch.linspace(0.1, 1, h.shape[-1]), LAST)
row("logspace", lambda h, m: h * torch.logspace(0.1, 1, h.shape[-1]), LAST)
row("randperm", lambda h, m: h[..., torch.randperm(h.shape[-1])], LAST)
row("range", lambda h, m: h * aten.range(1, h.shape[-1]), LAST)
row("hann_window", lambda h, m: h * torch.hann_window(h.shape[-1]), LAST)
same(
    "new_zeros new_ones new_full", lambda h, m: h * h.new_ones(h.shape) + h.new_zeros(h.shape) + h.new_full(h.shape, 2)
)
same("new_empty", lambda h, m: h.new_empty(h.shape).copy_(h))
row(
    "new_empty_strided", lambda h, m: h.new_empty_strided(h.shape, h.stride()).copy_(h), "2"
)  # strides before the last are read
row("empty_strided", lambda h, m: torch.empty_strided(h.shape, h.stride()).copy_(h), "")
same("tril_indices triu_indices", lambda h, m: h + torch.tril_indices(3, 3).sum() * torch.triu_indices(3, 3).sum())
same("scalar_tensor", lambda h, m: h * torch.scalar_tensor(0.5))
row("_efficientzerotensor", lambda h, m: h + aten._efficientzerotensor([1]), "")

# -- a dimension is mixed ---------------------------------------------------------------------------------------------

for d in range(3):
    others = "012".replace(str(d), "")
    # Between a layer that makes its units and one that sums them up, a softmax runs over what is kept.
    row("_softmax", lambda h, m, d=d: h.softmax(d), "012", kept=str(d), note=f"over {d}")
    row("cumsum", lambda h, m, d=d: h.cumsum(d), others, note=f"along {d}")
row("_log_softmax", lambda h, m: h.log_softmax(-1), "012", kept="2")
row("softmax log_softmax", inferred(lambda h, m: aten.softmax.int(h, 1) + aten.log_softmax.int(h, 1)), "012", kept="1")
row("_safe_softmax", lambda h, m: aten._safe_softmax(h, 1), "012", kept="1")
row("cumprod", lambda h, m: h.cumprod(1), "02")
row("logcumsumexp", lambda h, m: h.logcumsumexp(1), "02")
row("cummax cummin", lambda h, m: h.cummax(1).values + h.cummin(1).values, "02")
row("cummax", lambda h, m: tuple(h.cummax(1)), "02", note="with places")
row("slice", lambda h, m: h.diff(dim=1), "02", note="differences of neighbours")


def _batch(op: str) -> Mid:
    """Kernels by themselves do not check that their statistics fit."""

    def mid(h: Any, m: Any) -> Any:
        n = h.shape[1]
        w, v, mean, var = (t.view(n) for t in (m.p("w", n), m.p("v", n), m.b("mean", n), m.b("var", n).abs() + 0.5))
        if op == "layer":
            return F.batch_norm(h, mean, var, w, v)
        if op == "_native_batch_norm_legit":
            return aten._native_batch_norm_legit.no_stats(h, w, v, True, 0.1, 1e-5)[0]
        return getattr(aten, op)(h, w, v, mean * 1, var, 0.1, 1e-5)[0]

    return mid


row("native_batch_norm", lambda h, m: F.batch_norm(h, m.b("mean", h.shape[1]), m.b("var", h.shape[1]).abs() + 1), "012")
row("native_batch_norm", _batch("layer"), "012", note="with weights")


def _weight_normed(h: Any, m: Any) -> Any:
    return F.linear(h, torch._weight_norm(m.p("w", 6, h.shape[-1]), m.p("g", 6, 1), 0))


row("_weight_norm_interface", _weight_normed, "12", refused="2", head=1)
row("_weight_norm", inferred(_weight_normed), "12", refused="2", head=1)
BATCH = {"kept": "02", "note": "by its own statistics"}
row("_native_batch_norm_legit", _batch("_native_batch_norm_legit"), "012", **BATCH)
row("_native_batch_norm_legit_no_training", _batch("_native_batch_norm_legit_no_training"), "012")
row("_batch_norm_no_update", _batch("_batch_norm_no_update"), "012")
row("_batch_norm_with_update", _batch("_batch_norm_with_update"), "012", **BATCH)
row("batch_norm", inferred(_batch("layer")), "012")

LAYER = {"kept": "2", "ties": (("w", 0), ("v", 0))}
row("native_layer_norm", lambda h, m: F.layer_norm(
    h, h.shape[-1:], m.p("w", h.shape[-1]), m.p("v", h.shape[-1])), "012", **LAYER)  # fmt: skip
row("native_layer_norm", lambda h, m: F.layer_norm(h, h.shape[1:]), "012", kept="12", note="two dimensions")
row("rms_norm", inferred(lambda h, m: F.rms_norm(h, h.shape[-1:], m.p("w", h.shape[-1]))), "012", **LAYER)
row("native_group_norm", lambda h, m: F.group_norm(h, 1, m.p("w", UNITS), m.p("v", UNITS)), "1", dims="1",
    kept="1", ties=(("w", 0), ("v", 0)), note="one group")  # fmt: skip
row("native_group_norm", lambda h, m: F.group_norm(h, h.shape[1]), "01", dims="01", note="a group per channel")
row("native_group_norm", lambda h, m: F.group_norm(h, 1), "0", dims="02", note="over space")

# -- attention --------------------------------------------------------------------------------------------------------


def _attended(h: Any, m: Any) -> Any:
    q = h.unflatten(-1, (3, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q * 2, q.sin(), scale=0.5).transpose(1, 2).flatten(2)


FUSED = "_scaled_dot_product_flash_attention_for_cpu"
row(FUSED, _attended, "2", dims="2")
row(
    FUSED, lambda h, m: F.scaled_dot_product_attention(h[None], h[None], h[None], scale=0.5)[0], "02", note="dimensions"
)
row(FUSED, lambda h, m: F.scaled_dot_product_attention(h[None], h[None], h[None], is_causal=True, scale=0.5)[0],
    "02", note="causal")  # fmt: skip

# -- space ------------------------------------------------------------------------------------------------------------

row("max_pool1d", inferred(lambda h, m: F.max_pool1d(h, 2)), "01", (2, 6))
row("avg_pool1d", inferred(lambda h, m: F.avg_pool1d(h, 2)), "01", (2, 6))
row("avg_pool2d", lambda h, m: F.avg_pool2d(h, 2), "01", IMAGE)
row("avg_pool2d", lambda h, m: F.avg_pool2d(h, 3, 1, 1, count_include_pad=False), "01", IMAGE, note="padded")
row("avg_pool2d", lambda h, m: F.avg_pool2d(h, 1), "0123", IMAGE, note="of one position")
row("avg_pool2d", lambda h, m: F.avg_pool2d(h, 1, 2), "01", IMAGE, note="every second")
row("avg_pool2d", lambda h, m: F.avg_pool2d(h, (1, 2)), "012", IMAGE, note="along one dimension")
row("avg_pool3d", lambda h, m: F.local_response_norm(h, 3), "023", IMAGE, note="over channels")
row("avg_pool3d", lambda h, m: F.avg_pool3d(h, 2), "01", VOLUME)
row("max_pool2d", inferred(lambda h, m: F.max_pool2d(h, 2)), "01", IMAGE)
row("max_pool2d_with_indices", lambda h, m: F.max_pool2d(h, 2), "01", IMAGE)
row("max_pool2d_with_indices", lambda h, m: F.max_pool2d(h, 1), "0123", IMAGE, note="of one position")
row("max_pool2d_with_indices", lambda h, m: F.max_pool2d(h, 1, return_indices=True), "01", IMAGE, note="and its place")
row("max_pool3d_with_indices", lambda h, m: F.max_pool3d(h, 2), "01", VOLUME)
for mode, rank, op in (
    ("nearest", 1, "upsample_nearest1d"), ("nearest", 2, "upsample_nearest2d"), ("nearest", 3, "upsample_nearest3d"),
    ("nearest-exact", 1, "_upsample_nearest_exact1d"), ("nearest-exact", 2, "_upsample_nearest_exact2d"),
    ("nearest-exact", 3, "_upsample_nearest_exact3d"), ("linear", 1, "upsample_linear1d"),
    ("bilinear", 2, "upsample_bilinear2d"), ("bicubic", 2, "upsample_bicubic2d"),
    ("trilinear", 3, "upsample_trilinear3d"),
):  # fmt: skip
    corners = {} if "nearest" in mode else {"align_corners": True}
    size = {1: (2, 6), 2: IMAGE, 3: VOLUME}[rank]
    row(op, lambda h, m, mode=mode, c=corners: F.interpolate(h, scale_factor=2, mode=mode, **c), "01", size)
    row(op, lambda h, m, mode=mode, c=corners: F.interpolate(h, size=[*h.shape[2:-1], h.shape[-1] * 2], mode=mode, **c),
        "01" if mode == "bicubic" else "0123"[: rank + 1], size, note="one dimension")  # fmt: skip
row("upsample_nearest2d", lambda h, m: F.interpolate(h, scale_factor=1.01), "01", IMAGE, note="by almost nothing")
for mode in ("bilinear", "bicubic"):
    row(f"_upsample_{mode}2d_aa", lambda h, m, mode=mode: F.interpolate(h, scale_factor=2, mode=mode, antialias=True),
        "01", IMAGE)  # fmt: skip
row("adaptive_avg_pool1d", inferred(lambda h, m: F.adaptive_avg_pool1d(h, 2)), "01", (2, 6))
row("adaptive_avg_pool2d", inferred(lambda h, m: F.adaptive_avg_pool2d(h, 2)), "01", IMAGE)
row("_adaptive_avg_pool2d", lambda h, m: F.adaptive_avg_pool2d(h, 2), "01", IMAGE)
row("_adaptive_avg_pool2d", lambda h, m: F.adaptive_avg_pool2d(h, (2, None)), "013", IMAGE, note="one dimension")
row("_adaptive_avg_pool3d", lambda h, m: F.adaptive_avg_pool3d(h, 2), "01", VOLUME)
row("adaptive_max_pool2d", lambda h, m: F.adaptive_max_pool2d(h, 2), "01", IMAGE)
row("adaptive_max_pool3d", lambda h, m: F.adaptive_max_pool3d(h, 2), "01", VOLUME)
for mode, word in (("reflect", "reflection"), ("replicate", "replication")):
    for rank, size in ((1, (2, 6)), (2, IMAGE), (3, VOLUME)):
        amounts = [1, 1] * rank
        row(f"{word}_pad{rank}d", lambda h, m, a=amounts, mode=mode: F.pad(h, a, mode=mode), "01", size)
row("reflection_pad2d", lambda h, m: F.pad(h, (0, 0, 1, 1), mode="reflect"), "013", IMAGE, note="one dimension")
row("slice", lambda h, m: F.pad(h, (1, 1, 1, 1), mode="circular"), "0123", IMAGE, note="padded round")
row("fractional_max_pool2d", lambda h, m: F.fractional_max_pool2d(h, 2, output_size=3), "01", IMAGE)


row("fractional_max_pool3d", lambda h, m: F.fractional_max_pool3d(h, 2, output_size=2), "01", VOLUME)


def _unpooled(h: Any, m: Any) -> Any:
    values, places = F.max_pool2d(h, 2, return_indices=True)
    return F.max_unpool2d(F.conv2d(values, m.p("k", values.shape[1], values.shape[1], 1, 1)).relu(), places, 2)


def _unpooled_3d(h: Any, m: Any) -> Any:
    values, places = F.max_pool3d(h, 2, return_indices=True)
    return F.max_unpool3d(F.conv3d(values, m.p("k", values.shape[1], values.shape[1], 1, 1, 1)).relu(), places, 2)


row("max_unpool2d", _unpooled, "01", IMAGE)
row("max_unpool3d", _unpooled_3d, "01", VOLUME)
row("grid_sampler_2d", lambda h, m: F.grid_sample(h, m.p("g", len(h), 3, 3, 2), align_corners=True), "1", IMAGE)
row("grid_sampler_3d", lambda h, m: F.grid_sample(h, m.p("g", len(h), 3, 3, 3, 3), align_corners=True), "1", VOLUME)
row("im2col", lambda h, m: F.unfold(h, 2), "01", IMAGE)
row("im2col", lambda h, m: F.unfold(h, 1), "01", IMAGE, note="of one position")
row("col2im", lambda h, m: F.fold(h, (3, 3), 2), "1", (4, 4), dims="1", head=1)
row("col2im", lambda h, m: F.fold(torch.cat([h[:, :5] * 2, h[:, 5:]], 1), (3, 3), 2), "",
    (4, 4), dims="1", note="across a join", head=1)  # fmt: skip

# -- products ---------------------------------------------------------------------------------------------------------

row("mm", lambda h, m: h @ m.p("w", h.shape[1], 6), "01", MATRIX)
row("mm", lambda h, m: (h.t() @ h) @ m.p("w", h.shape[1], 3), "1", MATRIX, dims="1", note="with itself")
row("addmm", lambda h, m: torch.addmm(m.p("v", 6), h, m.p("w", h.shape[1], 6)), "01", MATRIX)
row("addmm", lambda h, m: torch.addmm(h, h, m.p("w", h.shape[1], h.shape[1])), "01", MATRIX, note="added to itself")
row("_addmm_activation", lambda h, m: aten._addmm_activation(m.p("v", 6), h, m.p("w", h.shape[1], 6)), "01", MATRIX)
row("mv", lambda h, m: h.mv(m.p("w", h.shape[1])), "01", MATRIX)
row("addmv", lambda h, m: torch.addmv(m.p("v", h.shape[0]), h, m.p("w", h.shape[1])), "01", MATRIX)
row("dot", lambda h, m: h.dot(m.p("w", h.shape[0])) * m.p("v", 3), "0", VECTOR)
row("vdot", lambda h, m: h.vdot(m.p("w", h.shape[0])) * m.p("v", 3), "0", VECTOR)
row("_int_mm", lambda h, m: torch._int_mm((h * 9).to(torch.int8), torch.ones(h.shape[1], 6, dtype=torch.int8)), "01",
    MATRIX)  # fmt: skip
row("bmm", lambda h, m: h @ m.p("w", h.shape[0], h.shape[2], 6), "12")
row("bmm", lambda h, m: h @ h.transpose(1, 2), "02", note="with itself")
row("bmm", lambda h, m: torch.einsum("btc,btd->bcd", h, h * 2), "1", dims="1", note="by einsum")
row("bmm", lambda h, m: torch.einsum("btc,dc->dbt", h, m.p("w", 6, h.shape[2])), "012", note="turned round")
row("baddbmm", lambda h, m: torch.baddbmm(m.p("v", 1, 6), h, m.p("w", h.shape[0], h.shape[2], 6)), "12")
row("mm", lambda h, m: torch.tensordot(h, m.p("w", h.shape[1], h.shape[2], 3), dims=2), "012", note="over two")
row("linear", inferred(lambda h, m: F.linear(h, m.p("w", 6, h.shape[-1]), m.p("v", 6))), "012")
row("_trilinear", lambda h, m: F.bilinear(h, h * 2, m.p("w", 6, h.shape[-1], h.shape[-1])), "012")
row("_cdist_forward", lambda h, m: torch.cdist(h, m.p("w", 1, 4, h.shape[-1]), p=1.0), "012")
row("_euclidean_dist", lambda h, m: aten._euclidean_dist(h, m.p("w", 1, 4, h.shape[-1])), "012")
row("mul", lambda h, m: F.cosine_similarity(h, h.sin(), dim=-1), "012", note="cosine")
row("linalg_vector_norm", lambda h, m: F.normalize(h, dim=-1), "012", note="of length one")
row("mul", lambda h, m: torch.outer(h, h) @ m.p("w", h.shape[0], 3), "0", VECTOR, note="outer")
row("mul", lambda h, m: torch.kron(h.contiguous(), h.new_ones(1, 2)), "01", MATRIX, note="kron")


def _grouped(h: Any, m: Any) -> Any:
    ends = torch.tensor([3, len(h)], dtype=torch.int32)
    return torch._grouped_mm(h.bfloat16(), m.p("w", 2, h.shape[1], 16).bfloat16(), offs=ends).float()


row("_grouped_mm", lambda h, m: _grouped(F.linear(h, m.p("u", 16, UNITS)), m), "1", MATRIX, dims="1")


def _conv(sizes: tuple[int, ...], free: str, note: str = "", dims: str = "", op: str = "convolution", **o: Any) -> None:
    rank, kernel, width = len(sizes) - 1, o.pop("kernel", 3), o.pop("width", 1)
    name = f"conv{'_transpose' if o.get('transposed') else ''}{rank}d"
    turned, groups = o.pop("transposed", False), o.get("groups", 1)

    def mid(h: Any, m: Any) -> Any:
        c = h.shape[1]
        more = {"groups": c} if groups == UNITS else {}
        shape = (c, 6 * width // groups) if turned else (6 * width, c // groups)
        return getattr(F, name)(h, m.p("k", *shape, *[kernel] * rank), m.p("v", 6 * width), **{**o, **more})

    row(op, mid, free, sizes, note=note or name, dims=dims)


_conv((2, 6), "01")
_conv(IMAGE, "01", padding=1)
_conv(VOLUME, "01")
_conv(IMAGE, "0123", "of one position", kernel=1)
_conv(IMAGE, "01", "every second", kernel=1, stride=2)
_conv(IMAGE, "1", "groups", dims="1", groups=3)
_conv(IMAGE, "1", "depthwise", dims="1", groups=12, width=2)
_conv(IMAGE, "01", "transposed", transposed=True, stride=2, padding=1, output_padding=1)
_conv(IMAGE, "1", "transposed, groups", dims="1", transposed=True, groups=3)
_conv(IMAGE, "0123", "transposed, one position", transposed=True, kernel=1)
row("_convolution", lambda h, m: torch._convolution(
    h, m.p("k", 6, h.shape[1], 1, 1), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, False, False, False, False),
    "0123", IMAGE)  # fmt: skip
row("mkldnn_convolution", lambda h, m: aten.mkldnn_convolution(
    h, m.p("k", 6, h.shape[1], 3, 3), None, [1, 1], [1, 1], [1, 1], 1), "01", IMAGE, refused="01")  # fmt: skip

# -- movement ---------------------------------------------------------------------------------------------------------

row("view", lambda h, m: h.clone(memory_format=torch.contiguous_format).view(h.shape[0], -1), "012")
row("_unsafe_view", lambda h, m: (h.transpose(1, 2) * 2).reshape(h.shape[0], -1), "012")
row("_reshape_alias", lambda h, m: aten._reshape_alias(h.contiguous(), h.shape, h.contiguous().stride()), "012")
row("view_copy", lambda h, m: aten.view_copy(h.contiguous(), h.shape), "012")
row("reshape", inferred(lambda h, m: h.reshape(h.shape[0], -1)), "012")
row("view", lambda h, m: h.contiguous().view(torch.int32).view(torch.float32), "012", note="the same bits")
row("view", lambda h, m: h.contiguous().view(torch.int16).view(torch.float32), "", note="other bits")
row("view", lambda h, m: h.flatten(1).unflatten(1, (h.shape[1] * 2, -1)).mean(1), "2", dims="2", note="across borders")
row("permute", lambda h, m: h.permute(2, 0, 1), "012")
row("permute_copy", lambda h, m: aten.permute_copy(h, [2, 0, 1]), "012")
row("transpose", lambda h, m: h.transpose(0, 2), "012")
row("transpose_copy", lambda h, m: aten.transpose_copy(h, 0, 2), "012")
row("transpose", inferred(lambda h, m: h.swapaxes(0, 2)), "012", note="swapaxes")
row("t", lambda h, m: h.t(), "01", MATRIX)
row("unsqueeze squeeze", lambda h, m: h.unsqueeze(1).squeeze(1), "012")
row("squeeze", lambda h, m: h.unsqueeze(-1).squeeze(), "012", note="all")
row("expand", lambda h, m: h[None].expand(3, -1, -1, -1), "012")
row("expand", lambda h, m: h + m.p("w", 1, 1, h.shape[2]).expand(*h.shape[:2], -1), "012", note="of a weight")
row("expand_copy", lambda h, m: aten.expand_copy(h[None], [3, -1, -1, -1]), "012")
row("broadcast_to", inferred(lambda h, m: h[None].broadcast_to(3, -1, -1, -1)), "012")
for d in range(3):
    times = [2 if i == d else 1 for i in range(3)]
    row("repeat", lambda h, m, t=times: h.repeat(*t), "012", note=f"along {d}")
    row("expand", lambda h, m, d=d: h.repeat_interleave(2, d), "012", note=f"each twice, {d}")
row("repeat", lambda h, m: h.tile(2), "012", note="tile")
for d in range(3):
    others = "012".replace(str(d), "")
    row("slice", lambda h, m, d=d: h.narrow(d, 1, 3), others, (4, 5), note=f"an interval of {d}", dims=others)
    row("unbind", lambda h, m, d=d: h.unbind(d)[1] if h.shape[d] > 1 else h.unbind(d)[0], others, note=f"{d}")
    row("select", lambda h, m, d=d: h.select(d, 0), others, note=f"{d}")
    row("roll", lambda h, m, d=d: h.roll(1, d), others, note=f"{d}")
    row("flip", lambda h, m, d=d: h.flip(d), others, note=f"{d}")
    row("stack", lambda h, m, d=d: torch.stack([h, h * 2], d), "012", note=f"{d}")
    row("cat", lambda h, m, d=d: torch.cat([h, h.sin() * 2], d), "012", note=f"{d}")
    row("constant_pad_nd", lambda h, m, d=d: F.pad(h, [0, 0] * (2 - d) + [1, 2]), "012", note=f"{d}")
    row("constant_pad_nd", lambda h, m, d=d: F.pad(h, [0, 0] * (2 - d) + [-1, 0]), "012", (4, 5), note=f"cropped, {d}")
    row("sort", lambda h, m, d=d: h.sort(d).values, others, note=f"{d}")
    row("argmax", lambda h, m, d=d: h.argmax(d), others, note=f"{d}")
row("slice", lambda h, m: h[..., 3:9] * 2, "2", dims="2", note="units in the middle")
row("slice", lambda h, m: h[..., ::2], "2", dims="2", note="every second unit")
row("slice", lambda h, m: h[..., : h.shape[-1] // 2], "2", dims="2", note="half of the units")
row("constant_pad_nd", lambda h, m: F.pad(h, (0, -6)), "2", dims="2", note="half of the units cropped")
row("split", lambda h, m: h.chunk(2, -1)[0] * h.chunk(2, -1)[1], "2", dims="2")
row("split_with_sizes", lambda h, m: tuple(h.split([5, 7], -1)), "", dims="2")
row("split", lambda h, m: h.split(1, 1)[0], "02", dims="02", note="of other dimensions")
row("unsafe_split", lambda h, m: torch.unsafe_split(h, h.shape[-1] // 2, -1)[0], "2", dims="2")
row("split_copy", lambda h, m: torch.split_copy(h, h.shape[-1] // 2, -1)[0], "2", dims="2")
row("split_with_sizes_copy", lambda h, m: tuple(torch.split_with_sizes_copy(h, [5, 7], -1)), "", dims="2")
row("glu", lambda h, m: F.glu(h, -1), "012", (2, 4))
row("glu", lambda h, m: F.glu(h, 1), "012", (2, 4), note="in the middle")
row("_fft_r2c _fft_c2r", lambda h, m: torch.fft.irfft(torch.fft.rfft(h, dim=1) * 2, dim=1), "02")
row("_fft_c2c", lambda h, m: torch.fft.fft2(h).real, "0")
row("concat", inferred(lambda h, m: aten.concat([h, h * 2], 1)), "012")
row("constant_pad_nd", inferred(lambda h, m: aten.pad(h, [1, 1])), "012", note="whole")
row("reflection_pad1d", inferred(lambda h, m: aten.pad(h, [1, 1], "reflect")), "01", note="whole")
row("rot90", lambda h, m: torch.rot90(h, 1, (1, 2)), "0")
row("rot90", lambda h, m: torch.rot90(h, 2, (0, 1)), "2", note="half a turn")
row("roll", lambda h, m: h.roll(3), "", note="as if flat")
row("unfold", lambda h, m: h.unfold(1, 2, 1), "02")
row("unfold", lambda h, m: h.unfold(1, 1, 1), "012", note="of one position")
row("pixel_shuffle", lambda h, m: F.pixel_shuffle(h, 2), "1", IMAGE, dims="1", head=1)
row("pixel_shuffle", inferred(lambda h, m: F.pixel_shuffle(h, 2)), "1", IMAGE, dims="1", head=1, note="whole")
row("pixel_unshuffle", inferred(lambda h, m: F.pixel_unshuffle(h, 2)), "01", IMAGE)
row("pixel_unshuffle", lambda h, m: F.pixel_unshuffle(h, 1), "0123", IMAGE, note="by one")
row("channel_shuffle", lambda h, m: F.channel_shuffle(h, 3), "1", IMAGE, dims="1")
row("channel_shuffle", lambda h, m: F.channel_shuffle(h, 3), "1", (2, 5), dims="1", note="a sequence")
row("channel_shuffle", lambda h, m: F.channel_shuffle(h, 3), "1", VOLUME, dims="1", note="a volume")
row("view_as_real", lambda h, m: torch.view_as_real(torch.complex(h, h * 2)).sum(-1), "012")
row("view_as_complex", lambda h, m: torch.view_as_complex(torch.stack([h, h * 2], -1)).imag, "012")
row("diagonal", lambda h, m: h.diagonal(dim1=1, dim2=2), "0")
row("diagonal", lambda h, m: h.diagonal(0, 0, 1), "2", note="of the first two")
row("as_strided", lambda h, m: h.contiguous().as_strided(h.shape, h.contiguous().stride()), "012")
row("as_strided", lambda h, m: h.contiguous().as_strided((3, 4), (4, 1)), "", note="part of it")
row("as_strided", lambda h, m: h.t().as_strided(h.t().shape, (len(h), 1)), "", (12,), note="turned round")

# -- places given by tensors ------------------------------------------------------------------------------------------


def _bins(h: Any) -> Any:
    return (h.detach().abs() * 2).long().clamp(max=3)


row("embedding", lambda h, m: F.embedding(_bins(h), m.p("w", 4, 3)), "012")
row("embedding", lambda h, m: h + F.embedding(m.b("ids", h.shape[1]).long().clamp(0, 3), m.p("w", 4, h.shape[2])),
    "02", dims="02", note="of stored numbers")  # fmt: skip
for d in range(3):
    others = "012".replace(str(d), "")
    row("index_select", lambda h, m, d=d: h.index_select(d, torch.tensor([0, 0])), others, note=f"{d}")
    row("gather", lambda h, m, d=d: h.gather(d, _bins(h).clamp(max=h.shape[d] - 1)), others, note=f"{d}")
    row("index_copy", lambda h, m, d=d: h.index_copy(d, torch.tensor([0]), h.narrow(d, 0, 1) * 3), others, note=f"{d}")
    row("index_fill", lambda h, m, d=d: h.index_fill(d, torch.tensor([0]), 0.5), others, note=f"{d}")
    row("index_add", lambda h, m, d=d: h.index_add(d, torch.tensor([0]), h.narrow(d, 0, 1) * 3), others, note=f"{d}")
    row("scatter", lambda h, m, d=d: h.scatter(d, _bins(h).clamp(max=h.shape[d] - 1), 0.5), others, note=f"{d}")
row(
    "gather",
    inferred(lambda h, m: torch.take_along_dim(h, _bins(h).clamp(max=h.shape[1] - 1), 1)),
    "02",
    note="take_along_dim",
)
row("gather", lambda h, m: h.gather(1, m.b("ids", *h.shape).long().clamp(0, 1)), "02", note="stored places")
row("index", lambda h, m: h[:, [0, 0]], "02")
row("index", lambda h, m: h[[1, 0], :, [2, 1]], "1", note="not side by side")
row("index", lambda h, m: h[0, [0, 1, 1]], "2", dims="12", note="a number and a list")
row("index", lambda h, m: h[m.b("mask", h.shape[0]) > -9], "12", dims="12", note="a mask of rows")
row("index", lambda h, m: h[..., m.b("mask", h.shape[-1]) > 0], LAST, note="a stored mask of the last")
row("index", lambda h, m: h[:, m.b("mask", h.shape[1], h.shape[2]) > 0], "0", note="a mask of two")
row("index", lambda h, m: m.p("w", 4)[_bins(h)], "012", note="a table by value")
row("_unsafe_index", lambda h, m: aten._unsafe_index(h, [None, torch.tensor([0, 0])]), "02")
row("index_put", lambda h, m: h.index_put((torch.tensor([0, 1]),), h[[0, 1]] * 2), "12")
row("index_put", lambda h, m: _put(h, m), "02", note="in the middle")
row("index_put", lambda h, m: _put_mask(h, m), "2", note="a mask of two")
row("index_put", lambda h, m: _put_row(h, m), "2", dims="2", note="values of the last")
row("_index_put_impl", lambda h, m: aten._index_put_impl(h, [torch.tensor([0])], h[:1] * 2), "12")
row("_unsafe_index_put", lambda h, m: aten._unsafe_index_put(h, [torch.tensor([0])], h[:1] * 2), "12")
row("bucketize", lambda h, m: torch.bucketize(h, torch.tensor([0.0, 0.5])) * h, "012")
row("searchsorted", lambda h, m: torch.searchsorted(torch.tensor([0.0, 0.5]), h) * h, "012")
row("searchsorted", lambda h, m: torch.searchsorted(m.p("w", *h.shape[:2], 3).sort(-1).values, h) * h, "012",
    note="borders per row")  # fmt: skip
row("searchsorted", lambda h, m: torch.searchsorted(h.cumsum(-1), h[..., :1].contiguous()), "01", note="among units")
for mode in ("sum", "mean", "max"):
    row("_embedding_bag", lambda h, m, mode=mode: F.embedding_bag(
        torch.tensor([[0, 1], [2, 3]]), m.p("w", 4, UNITS), mode=mode)
        + h.mean(1), "2", dims="2", note=mode)  # fmt: skip
row("_embedding_bag_forward_only", lambda h, m: h.mean(1) + aten._embedding_bag_forward_only(
    m.p("w", 4, UNITS), torch.tensor([0, 1, 2, 3]), torch.tensor([0, 2]))[0], "2", dims="2")  # fmt: skip
row("_pack_padded_sequence", lambda h, m: torch.nn.utils.rnn.pack_padded_sequence(
    h, torch.tensor([h.shape[1]] * len(h)), batch_first=True).data, "2")  # fmt: skip
row(
    "scatter", lambda h, m: torch.zeros_like(h).scatter(1, _bins(h).clamp(max=h.shape[1] - 1), h), "02", note="of units"
)
row("scatter", lambda h, m: F.one_hot(h.argmax(1), h.shape[1]).float().transpose(1, 2) * h, "02", dims="02",
    note="one hot")  # fmt: skip
row("scatter_add", lambda h, m: torch.zeros_like(h).scatter_add(1, _bins(h).clamp(max=h.shape[1] - 1), h), "02")
row("scatter_add", lambda h, m: h.new_zeros(h.shape[0], 4, h.shape[2]).scatter_add(
    1, m.b("ids", 1, h.shape[1], 1).long().clamp(0, 3).expand(h.shape), h), "02", note="in stored bins")  # fmt: skip
row("scatter_add", lambda h, m: h.new_zeros(h.shape[0], h.shape[1], 4).scatter_add(
    2, m.b("ids", *h.shape).long().clamp(0, 3), h), LAST, note="units in bins")  # fmt: skip
row("scatter_reduce", lambda h, m: h.scatter_reduce(1, _bins(h).clamp(max=h.shape[1] - 1), h * 2, "amax"), "02")
row("masked_scatter", lambda h, m: h.masked_scatter(h > 0, h * 2), "")
row("index_add", lambda h, m: h.new_zeros(4, *h.shape[1:]).index_add(
    0, m.b("ids", len(h)).long().clamp(0, 3), h), "12", note="in stored bins")  # fmt: skip


def _put(h: Any, m: Any) -> Any:
    out = h.clone()
    out[:, torch.tensor([0, 1])] = h[:, torch.tensor([1, 0])] * 2
    return out


def _put_mask(h: Any, m: Any) -> Any:
    out = h.clone()
    out[m.b("mask", h.shape[0], h.shape[1]) > 0] = m.p("w", h.shape[2])
    return out


def _put_row(h: Any, m: Any) -> Any:
    out = h.clone()
    out[:, torch.tensor([0, 1])] = m.p("w", h.shape[2])
    return out


# -- reductions -------------------------------------------------------------------------------------------------------

for op in ("mean", "var", "std", "amax", "amin", "logsumexp"):
    for d in range(3):
        row(op, lambda h, m, op=op, d=d: getattr(h, op)(d), "012", kept=str(d), note=f"over {d}")
for d in range(3):
    row("sum", lambda h, m, d=d: h.sum(d), "012", note=f"over {d}")
    row("max", lambda h, m, d=d: h.max(d).values, "012", kept=str(d), note=f"over {d}")
    row("max", lambda h, m, d=d: tuple(h.max(d)), "012".replace(str(d), ""), note=f"with places, {d}")
row("nansum", lambda h, m: h.nansum(1, keepdim=True), "012")
row("var_mean std_mean", lambda h, m: (*torch.var_mean(h, 1), *torch.std_mean(h, 1)), "012", kept="1")
row("count_nonzero", lambda h, m: torch.count_nonzero(h.relu(), 1), "012", kept="1")
row("linalg_vector_norm", lambda h, m: torch.linalg.vector_norm(h, dim=1), "012")
row("norm", lambda h, m: aten.norm.ScalarOpt_dim(h, 2, [1]), "012")
row("min median nanmedian", lambda h, m: h.min(1).values + h.median(1).values + h.nanmedian(1).values, "012", kept="1")
row("maximum", lambda h, m: torch.maximum(h, h * 2) + torch.max(h, h * 3), "012", note="of two")
row("max min", lambda h, m: h / (h.max() - h.min()), "012", kept="012", note="of all")
row("median", lambda h, m: h - h.median(), "012", kept="012", note="of all")
row("mean sum", lambda h, m: h / h.mean() + h.sum(), "012", kept="012", note="of all")
row("prod", lambda h, m: h.prod(1), "012", kept="1")
row("any all", lambda h, m: h * (h > 0).any(1, keepdim=True) + h * (h > -0.5).all(1, keepdim=True), "012", kept="1")
row("aminmax", lambda h, m: tuple(torch.aminmax(h, dim=1)), "012", kept="1")
row("argmin", lambda h, m: h.argmin(1), "02")
row("mode kthvalue", lambda h, m: h.mode().values + h.kthvalue(2).values, LAST)
row("mode kthvalue", lambda h, m: h.mode(1).values + h.kthvalue(2, 1).values, "02", note="in the middle")
row("topk", lambda h, m: h.topk(2, 1).values, "02")
row("topk", lambda h, m: h * (h >= h.topk(2, 1).values[:, 1:]), "02", note="as a threshold")
row("argsort", inferred(lambda h, m: h.argsort(1)), "02")
row("sort", lambda h, m: h.gather(1, h.argsort(1)), "02", note="by places")
row("unique_dim", lambda h, m: torch.unique(h, dim=0)[:1], "", dims="12")
row("unique_dim", lambda h, m: torch.unique(h, dim=1, return_inverse=True, return_counts=True)[1], "", dims="12",
    note="and places")  # fmt: skip
for op in ("mse_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss"):
    row(op, lambda h, m, op=op: (getattr(F, op)(h, h.sin().detach()), h), "012", kept="012")
    row(op, lambda h, m, op=op: getattr(F, op)(h, h.sin(), reduction="none"), "012", note="of each")
row("binary_cross_entropy", lambda h, m: (F.binary_cross_entropy(h.sigmoid(), (h > 0).float()), h), "012", kept="012")
row("binary_cross_entropy_with_logits", lambda h, m: (
    F.binary_cross_entropy_with_logits(h, (h > 0).float()), h), "012", kept="012")  # fmt: skip

# -- operators without a rule, and functions made of several: right or locked -----------------------------------------

ANY: list[Row] = []


def any_of(note: str, mid: Mid, sizes: tuple[int, ...] = (2, 5), **options: Any) -> None:
    ANY.append(Row("", mid, "", sizes, note=note, **options))


any_of("addbmm", lambda h, m: torch.addbmm(m.p("v", h.shape[1], 3), h, m.p("w", h.shape[0], h.shape[2], 3)))
any_of("addr", lambda h, m: torch.addr(h, m.p("v", h.shape[0]), m.p("w", h.shape[1])), MATRIX)
any_of("diag_embed", lambda h, m: torch.diag_embed(h))
any_of("diag", lambda h, m: torch.diag(h), VECTOR)
any_of("trace", lambda h, m: torch.trace(h) + h, MATRIX)
any_of("linalg.cross", lambda h, m: torch.linalg.cross(h[:, :3], h[:, :3] * 2 + 1, dim=1), dims="12")
any_of("take", lambda h, m: torch.take(h, torch.tensor([0, 3, 5])))
any_of("masked_select", lambda h, m: (h * 2, torch.masked_select(h, h > 0).sum()))
any_of("nonzero", lambda h, m: (h * 2, (h > 0).nonzero().sum()))
any_of("argwhere", lambda h, m: (h * 2, torch.argwhere(h > 0).sum()))
any_of("unique", lambda h, m: (h * 2, h.unique().sum()))
any_of("histc", lambda h, m: (h * 2, torch.histc(h, 5)))
any_of("bincount", lambda h, m: (h * 2, torch.bincount(_bins(h).flatten(), minlength=6)))
any_of("slice_scatter", lambda h, m: torch.slice_scatter(h, h[:, :2] * 3, 1, 1, 3), dims="2")
any_of("select_scatter", lambda h, m: torch.select_scatter(h, h.select(1, 0) * 3, 1, 1))
any_of("diagonal_scatter", lambda h, m: torch.diagonal_scatter(h, h.diagonal(0, 1, 2) * 3, 0, 1, 2))
any_of("index_reduce", lambda h, m: h.index_reduce(1, torch.tensor([0]), h[:, :1] * 3, "amax"))
any_of("renorm", lambda h, m: torch.renorm(h, 2, 1, 1.0))
any_of("pdist", lambda h, m: torch.pdist(h), MATRIX)
any_of("block_diag", lambda h, m: torch.block_diag(h, h * 2), MATRIX)
any_of("cartesian_prod", lambda h, m: torch.cartesian_prod(h, h), VECTOR)
any_of("combinations", lambda h, m: torch.combinations(h), VECTOR)
any_of("meshgrid", lambda h, m: torch.meshgrid(h, h * 2, indexing="ij")[0], VECTOR)
any_of("expand_as", lambda h, m: m.p("w", 1, 1, 1).expand_as(h))
any_of("view_as", lambda h, m: h.flatten().view_as(h) * 2)
any_of("broadcast_tensors", lambda h, m: torch.broadcast_tensors(m.p("w", 1, 1, 1), h)[0])
any_of("trapezoid", lambda h, m: torch.trapezoid(h, dim=1))
any_of("cumulative_trapezoid", lambda h, m: torch.cumulative_trapezoid(h, dim=1))
any_of("gradient", lambda h, m: torch.gradient(h, dim=1)[0])
any_of("vander", lambda h, m: torch.vander(h, 3), VECTOR)
any_of("flip twice", lambda h, m: h.flip(1).flip(1))
any_of("fliplr", lambda h, m: h.fliplr())
any_of("msort", lambda h, m: torch.msort(h))
any_of("quantile", lambda h, m: torch.quantile(h, 0.3, dim=1))
any_of("nanmean", lambda h, m: torch.nanmean(h, 1), kept="1")
any_of("isin", lambda h, m: h * torch.isin(_bins(h), torch.tensor([1, 2])))
any_of("cov", lambda h, m: torch.cov(h), MATRIX, kept="1")
any_of("tensor_split", lambda h, m: h.tensor_split(2, 2)[0], dims="2")
any_of("unflatten", lambda h, m: h.unflatten(-1, (3, -1)).softmax(-2), dims="2")
any_of("hstack", lambda h, m: torch.hstack([h, h * 2]))
any_of("dstack", lambda h, m: torch.dstack([h, h * 2]))
any_of("column_stack", lambda h, m: torch.column_stack([h, h * 2]))
any_of("movedim", lambda h, m: h.movedim(0, 2))
any_of("repeat_interleave by a tensor", lambda h, m: h.repeat_interleave(torch.tensor([1, 2, 1, 1, 1]), 1), dims="2")
any_of("cross_entropy", lambda h, m: (F.cross_entropy(h, h.detach().argmax(1)), h * 2))
any_of("kl_div", lambda h, m: (F.kl_div(h.log_softmax(-1), h.softmax(-1), reduction="batchmean"), h * 2))
any_of("l1_loss", lambda h, m: (F.l1_loss(h, h.sin()), h * 2), kept="012")
any_of("nll_loss", lambda h, m: (F.nll_loss(h.log_softmax(1), h.detach().argmax(1)), h * 2))
any_of("triplet_margin_loss", lambda h, m: F.triplet_margin_loss(h, h * 2, h.sin(), reduction="none"))
any_of("pairwise_distance", lambda h, m: F.pairwise_distance(h, h.sin(), eps=0.0))
any_of("affine_grid", lambda h, m: F.grid_sample(
    h, F.affine_grid(m.p("w", 1, 2, 3).expand(h.shape[0], -1, -1), list(h.shape))), IMAGE)  # fmt: skip
any_of("stft", lambda h, m: torch.stft(h, 4, 2, window=torch.ones(4), return_complex=True).abs(), MATRIX)
any_of("lp_pool", lambda h, m: F.lp_pool2d(h, 2.0, 2), IMAGE)
any_of("max_pool with a place", lambda h, m: F.max_pool2d(h, 2, return_indices=True)[1], IMAGE)
any_of("adaptive_max with a place", lambda h, m: F.adaptive_max_pool2d(h, 2, return_indices=True)[1], IMAGE)
any_of(
    "fractional with a place", lambda h, m: F.fractional_max_pool2d(h, 2, output_size=3, return_indices=True)[1], IMAGE
)
any_of("instance_norm", lambda h, m: F.instance_norm(h), kept="2")
any_of("softmin", lambda h, m: F.softmin(h, 2), kept="2")
any_of("gumbel_softmax", lambda h, m: F.gumbel_softmax(h, dim=1, hard=True))
any_of("feature dropout", lambda h, m: F.dropout1d(h, 0.5, training=True))
any_of("alpha dropout", lambda h, m: F.alpha_dropout(h, 0.5, training=True))
any_of("multi_dot", lambda h, m: torch.linalg.multi_dot([h, m.p("w", h.shape[1], 4), m.p("v", 4, 3)]), MATRIX)
any_of("matrix_exp", lambda h, m: torch.linalg.matrix_exp(h @ h.transpose(1, 2)) @ h)
any_of("matmul, broadcast", lambda h, m: m.p("w", 3, 1, 4, h.shape[1]) @ h)
any_of("einsum, a diagonal", lambda h, m: torch.einsum("bii->bi", h @ h.transpose(1, 2)))
any_of("einsum, three", lambda h, m: torch.einsum("btc,cd,bsd->bts", h, m.p("w", h.shape[2], h.shape[2]), h))
any_of(
    "bilinear upsampling of units", lambda h, m: F.interpolate(h[:, None], scale_factor=(1, 2), mode="bilinear")[:, 0]
)
any_of("window of one unit", lambda h, m: F.avg_pool1d(h, 1, 1).unfold(2, 1, 1).squeeze(-1))
any_of("in place, a triangle", lambda h, m: h.clone().tril_())
any_of("in place, a transpose", lambda h, m: h.clone().transpose_(0, 2))
any_of("in place, a matrix transpose", lambda h, m: h.clone().t_(), MATRIX)
any_of("in place, swapped", lambda h, m: h.clone().swapaxes_(1, 2))
any_of("in place, a dimension more and less", lambda h, m: h.clone().unsqueeze_(0).squeeze_(0) * 2)
any_of("in place, a slice", lambda h, m: _doubled_first(h))
any_of("masked mean", lambda h, m: (h * (h > 0)).sum(1) / (h > 0).sum(1).clamp(min=1), kept="1")
any_of("ranks", lambda h, m: h.argsort(-1).argsort(-1) * 0.1 * h)
any_of("positions by a running sum", lambda h, m: h * torch.ones_like(h).cumsum(-1))
any_of("view as bytes", lambda h, m: h.contiguous().view(torch.uint8).view(torch.float32) * 2)
any_of("interpolated along one dimension, by a factor", lambda h, m: F.interpolate(h, scale_factor=(1, 2)), IMAGE)
any_of("lstm", lambda h, m: torch.lstm(
    h, [m.p(name, 1, 1, 3).expand(1, h.shape[0], 3).contiguous() for name in ("s", "c")],
    [m.p("wi", 12, h.shape[2]), m.p("wh", 12, 3)], False, 1, 0.0, False, False, True)[0])  # fmt: skip
any_of("gru", lambda h, m: torch.gru(
    h, m.p("s", 1, 1, 3).expand(1, h.shape[0], 3).contiguous(), [m.p("wi", 9, h.shape[2]), m.p("wh", 9, 3)],
    False, 1, 0.0, False, False, True)[0])  # fmt: skip


def _doubled_first(h: Any) -> Any:
    out = h.clone()
    out[..., :3] *= 2
    return out


# -- torchvision, played by operators of the same names and shapes ----------------------------------------------------

PLAYED = not hasattr(torch.ops.torchvision, "roi_align")
if PLAYED:
    _LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("roi_align", "roi_pool"):
        _LIBRARY.define(f"{_name}(Tensor input, Tensor rois, float scale, int height, int width) -> Tensor")
        _LIBRARY.impl(
            _name,
            lambda x, rois, scale, h, w: F.adaptive_avg_pool2d(x[rois[:, 0].long()], (h, w)),
            "CompositeExplicitAutograd",
        )
    _LIBRARY.define("nms(Tensor dets, Tensor scores, float threshold) -> Tensor")
    _LIBRARY.impl("nms", lambda boxes, scores, t: scores.argsort(descending=True)[:2], "CompositeExplicitAutograd")
    vision = torch.ops.torchvision
    BOXES = torch.tensor([[0.0, 0, 0, 4, 4], [1.0, 1, 1, 5, 5], [0.0, 2, 2, 6, 6]])
    for _name in ("roi_align", "roi_pool"):
        row(f"torchvision::{_name}", lambda h, m, n=_name: getattr(vision, n)(h, BOXES, 1.0, 2, 2), "1", IMAGE)
    row("torchvision::nms", lambda h, m: h * vision.nms(h[:, :4], h.sum(1), 0.5).float().mean(), "", MATRIX, dims="0",
        note="numbers of boxes")  # fmt: skip
    row("torchvision::nms", lambda h, m: h[vision.nms(h[:, :4], h.sum(1), 0.5)], "1", MATRIX)
