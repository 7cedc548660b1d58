"""Rules for fused attention."""

from __future__ import annotations

from secateur.structure.axes import Axis, Conflict
from secateur.structure.rules.base import Call, broadcast, register
from secateur.structure.rules.norm import COMPETE
from secateur.structure.trace import Axes, Restrict


def _heads(call: Call, queries: Axis, keys: Axis) -> None:
    """As many query heads as key heads, or groups of them (the kernel repeats the keys)."""
    try:
        outer, _ = call.recorder.space.split_product(queries, keys.size)
        call.recorder.space.unify(outer, keys)
    except Conflict:
        for axis in (queries, keys):
            call.lock(axis, "query heads and key heads do not line up")


@register(
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip
def attention(call: Call) -> list[Axes]:
    """Q [b, h, l, e], k [b, h, s, e], v [b, h, s, ev] -> [b, h, l, ev]; the scale follows e unless it is given."""
    q, k, v = (call.operand(i) for i in range(3))
    axes_q, axes_k, axes_v = call.axes(q), call.axes(k), call.axes(v)
    call.unify(axes_q[0], axes_k[0])
    for d in (0, 1):
        call.unify(axes_k[d], axes_v[d])
    _heads(call, axes_q[1], axes_k[1])
    call.unify(axes_k[2], axes_v[2])
    call.unify(axes_q[3], axes_k[3])
    out = (axes_q[0], axes_q[1], axes_q[2], axes_v[3])
    mask = call.optional("attn_mask")
    mask = call.optional("attn_bias") if mask is None else mask
    if mask is not None:
        broadcast(call, [(axes_q[0], axes_q[1], axes_q[2], axes_k[2]), call.axes(mask)])
    call.recorder.trace.heads.append(axes_q[1])
    call.recorder.trace.inner += [axes_q[3], axes_v[3]]
    for axis in (axes_q[2], axes_k[2]):
        call.lock(axis, COMPETE)
    inputs = [(call.number(t), 3, call.axes(t)[3]) for t in (q, k, v)]
    call.restricted = Restrict(inputs, [(0, 3, axes_v[3])], aligned=[(0, 1)])
    call.cost += [(*axes_q, axes_k[2]), (*axes_q[:3], axes_k[2], axes_v[3])]
    others = [tuple(call.fresh(n, "bookkeeping of attention") for n in t.shape) for t in call.results[1:]]
    return [out, *others]
