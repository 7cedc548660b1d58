"""Corners of torch itself: scripts, own operators, subclasses, modes, hooks, dtypes, functional state."""

from __future__ import annotations

import contextlib
import copy
import operator
import warnings
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cases import ROWS, STEPS, Family, floats
from .nets import Mid
from .references import over

family = Family("doors")
X, S = floats(*ROWS), floats(*STEPS)


def mid(name: str, middle: Any, extra: Any = None, inputs: Any = X, **options: Any) -> None:
    options.setdefault("must", "fc1.weight")
    family.add(name, lambda: Mid(middle, **(extra() if extra else {})), inputs, **options)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")

    @torch.jit.script
    def scripted(h: Tensor) -> Tensor:
        return torch.cumsum(h, 1)

    @torch.jit.script
    def scripted_loop(h: Tensor) -> Tensor:
        y = h.clone()
        for i in range(h.shape[1]):
            y[:, i] = y[:, i] * (i + 1)
        return y

    @torch.jit.script
    def scripted_activation(h: Tensor) -> Tensor:
        return h * torch.sigmoid(1.702 * h)


@torch.library.custom_op("adversarial_suite::mirror", mutates_args=())
def mirror(h: Tensor) -> Tensor:
    return h.flip(1).contiguous()


mirror.register_autograd(lambda ctx, g: g.flip(1))


class Tagged(Tensor):
    """A subclass that does nothing."""


class Mirrored(Tensor):
    """A subclass whose sum with anything is mirrored."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [a.as_subclass(Tensor) if isinstance(a, Mirrored) else a for a in args]
        result = func(*plain, **(kwargs or {}))
        return result.flip(-1) if func in (torch.add, Tensor.add, Tensor.__add__) else result


def inner_mode(h: Tensor) -> Tensor:
    with torch.inference_mode():
        return (h.detach() * torch.arange(h.shape[1])).clone()


def with_default(h: Tensor) -> Tensor:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return (h.double() * torch.linspace(1, 2, h.shape[1])).to(h.dtype)
    finally:
        torch.set_default_dtype(before)


def quiet_autocast(h: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return h.float().cumsum(1)


def by_hooks(h: Tensor) -> Tensor:
    h = h * 1
    if h.requires_grad:
        h.register_hook(lambda g: g.flip(1))
    return h


mid("script", lambda m, h: scripted(h))
mid("script_with_a_loop", lambda m, h: scripted_loop(h))
mid("script_pointwise", lambda m, h: scripted_activation(h), right="channel")
mid("own_operator", lambda m, h: mirror(h))
mid("subclass", lambda m, h: h.as_subclass(Tagged) * 2)
mid("subclass_that_mirrors", lambda m, h: (h.as_subclass(Mirrored) + 0).as_subclass(Tensor))
mid("inference_mode_inside", lambda m, h: inner_mode(h))
mid("default_dtype_inside", lambda m, h: with_default(h))
mid("autocast_off_inside", lambda m, h: quiet_autocast(h))
mid("gradient_hook", lambda m, h: by_hooks(h))
mid("no_grad_statistics", lambda m, h: h - _no_grad_mean(h))
mid("half_and_back", lambda m, h: h.bfloat16().float(), right="channel")
mid("double_and_back", lambda m, h: h.double().cumsum(1).float())
mid("integer_levels", lambda m, h: (h * 8).long().float() / 8, right="channel")
mid("modulo_of_flat_index", lambda m, h: h.flatten()[torch.arange(h.numel())].view_as(h) * 2)
mid("flat_ramp", lambda m, h: (h.flatten() * torch.arange(h.numel())).view_as(h) / h.numel())
mid("reshaped_through_flat_roll", lambda m, h: h.flatten().roll(5).view_as(h))
mid("view_as_other_shape", lambda m, h: h.reshape(-1, len(h)).T.reshape_as(h))
mid("memory_order", lambda m, h: torch.as_strided(h.T.contiguous(), h.shape, h.stride()))
mid("out_argument", lambda m, h: torch.cumsum(h.detach(), 1, out=torch.empty_like(h)))
mid("in_place_slices", lambda m, h: _in_place(h))
mid("in_place_on_view", lambda m, h: _in_place_view(h))
mid("copy_into_buffer", lambda m, h: _copy_in(m, h), lambda: {"scratch": torch.zeros(16, 24)})
mid("reduce_over_columns", lambda m, h: h + reduce(lambda a, b: 0.5 * a + b, h.unbind(1))[:, None])
mid("sum_builtin", lambda m, h: h + sum(h.unbind(1))[:, None], right="channel")
mid("max_builtin", lambda m, h: h * max(h.mean(0)))
mid("sorted_builtin", lambda m, h: torch.stack(sorted(h.unbind(1), key=lambda c: float(c.sum())), 1))
mid("itemgetter", lambda m, h: torch.stack(operator.itemgetter(*range(24))(h.T), 1))
mid("star_arguments", lambda m, h: torch.stack([*h.T][::-1], 1))
mid("partial", lambda m, h: partial(torch.roll, shifts=1, dims=1)(h))
mid("getattr_by_string", lambda m, h: getattr(torch, "fl" + "ip")(h, (1,)))
mid("tensor_method_from_aten", lambda m, h: torch.ops.aten.flip(h, [1]))
mid("aten_cumsum", lambda m, h: torch.ops.aten.cumsum.default(h, 1))
mid("prims", lambda m, h: torch.ops.prims.rev(h, [1]), train=False)
mid("linalg_lstsq", lambda m, h: h @ torch.linalg.pinv(m.w) @ m.w, lambda: {"w": torch.randn(30, 24)})
mid("triangular_solve", lambda m, h: torch.linalg.solve_triangular(m.w, h.T, upper=False).T,
    lambda: {"w": torch.eye(24) * 3 + torch.randn(24, 24).tril() / 9})  # fmt: skip
mid("cholesky_features", lambda m, h: h @ torch.linalg.cholesky(m.fc1.weight @ m.fc1.weight.T + 24 * torch.eye(24)))
mid(
    "nested_tensor",
    lambda m, h: torch.nested.to_padded_tensor(torch.nested.as_nested_tensor(list(h)), 0.0),
    train=False,
)
mid("sparse_product", lambda m, h: torch.sparse.mm(h.detach().to_sparse(), torch.eye(24).roll(1, 0)))
mid("stored_sparse", lambda m, h: torch.sparse.mm(m.s, h.T).T, lambda: {"s": torch.eye(24).roll(1, 0).to_sparse()})
mid("quantised_and_back", lambda m, h: torch.quantize_per_tensor(h.detach(), 0.05, 0, torch.qint8).dequantize())
mid("per_channel_quantised", lambda m, h: torch.fake_quantize_per_channel_affine(h, m.s, m.s.int() * 0, 1, -128, 127),
    lambda: {"s": torch.rand(24) / 9 + 0.01})  # fmt: skip
mid("per_tensor_quantised", lambda m, h: torch.fake_quantize_per_tensor_affine(h, float(h.max()) / 127, 0, -128, 127))
mid("deepcopied_layer", lambda m, h: F.linear(h, copy.deepcopy(m.fc2).weight.T.contiguous() @ m.fc2.weight))
mid("parameters_by_name", lambda m, h: h * dict(m.named_parameters())["fc1.bias"])
mid("parameters_flattened", lambda m, h: h * torch.cat([p.flatten() for p in m.parameters()])[100])
mid("state_dict_read", lambda m, h: h * m.state_dict()["fc1.weight"].sum(1), right="channel")
mid("functional_call_stack", lambda m, h: h * _called(m, h))
mid("vmap_over_stacked_weights", lambda m, h: h + torch.vmap(F.linear, in_dims=(None, 0))(h, m.w).mean(0),
    lambda: {"w": nn.Parameter(torch.randn(3, 24, 24) / 9)})  # fmt: skip
mid("hessian_trace", lambda m, h: h * torch.func.hessian(lambda v: v.pow(3).sum())(h.mean(0)).diagonal().sum().tanh())
mid("linearised", lambda m, h: torch.func.linearize(torch.sin, h)[1](h.flip(1)), train=False)
mid("assert_of_shape", lambda m, h: _checked(h))
mid("suppressed_error", lambda m, h: _suppressed(h))
mid("isinstance_of_size", lambda m, h: h * (1 + isinstance(h.shape[1], int)))
mid("torch_size_product", lambda m, h: h * (h.shape.numel() / len(h) / 24))
mid("broadcast_of_ones", lambda m, h: h * torch.ones(24))
mid("bincount", lambda m, h: h * torch.bincount(h.argmax(1), minlength=24))
mid("random_by_width", lambda m, h: h * torch.rand(h.shape[1], generator=torch.Generator().manual_seed(1)))
mid(
    "numpy_random_by_width",
    lambda m, h: h * torch.from_numpy(np.random.default_rng(0).random(h.shape[1]).astype(np.float32)),
)
mid("hash_of_width", lambda m, h: h * (1 + hash((3, h.shape[1])) % 11))
mid("id_cache", lambda m, h: h * _by_id(m))
mid("module_without_call", lambda m, h: F.relu(m.fc1.weight.new_tensor(1.0)) * h, right="channel")
mid("chained_views", lambda m, h: h.view(-1, 4, 6).permute(0, 2, 1).reshape(-1, 24))
mid("set_item_by_tensor", lambda m, h: _set_item(h))
mid("masked_cumulative_count", lambda m, h: h * (h > 0).long().cumsum(1))
mid("nan_to_num_of_ranked", lambda m, h: (h / h.argsort(1)).nan_to_num(0, 0, 0))
mid("trapezoid", lambda m, h: h + torch.trapezoid(h, dim=1)[:, None])
mid("gradient_along_units", lambda m, h: h + torch.gradient(h, dim=1)[0])
mid("vander", lambda m, h: h * torch.vander(h.mean(0)[:3], 24)[0])
mid("cartesian", lambda m, h: h * torch.cartesian_prod(h.mean(0)[:4], h.mean(0)[:6])[:, 0])
mid("block_diagonal", lambda m, h: h @ torch.block_diag(*[m.w] * 4), lambda: {"w": nn.Parameter(torch.randn(6, 6) / 3)})
mid(
    "tensordot",
    lambda m, h: torch.tensordot(h, m.w, dims=([1], [1])),
    lambda: {"w": nn.Parameter(torch.randn(24, 24) / 5)},
)
mid(
    "chain_matmul",
    lambda m, h: torch.linalg.multi_dot([h, m.w, m.w.T]),
    lambda: {"w": nn.Parameter(torch.randn(24, 9) / 5)},
)
mid("addcmul", lambda m, h: torch.addcmul(h, h, m.g), lambda: {"g": nn.Parameter(torch.rand(24))}, right="channel")
mid("lerp", lambda m, h: torch.lerp(h, h.tanh(), m.g), lambda: {"g": nn.Parameter(torch.rand(24))}, right="channel")
mid("prelu", lambda m, h: F.prelu(h - 0.3, m.g), lambda: {"g": nn.Parameter(torch.rand(24))}, right="channel")
mid(
    "embedding_bag",
    lambda m, h: h + F.embedding_bag(torch.zeros(len(h), 1).long(), m.t),
    lambda: {"t": nn.Parameter(torch.rand(5, 24))},
    right="channel",
)
mid(
    "ctc_like_alignment",
    lambda m, h: h + h.log_softmax(1).logcumsumexp(1),
    truths=(over("middle", "fc1.weight", dim=(0, -1)),),
)


def _no_grad_mean(h: Tensor) -> Tensor:
    with torch.no_grad():
        return h.mean(0)


def _in_place(h: Tensor) -> Tensor:
    h = h.clone()
    h[:, 1:] += h[:, :-1].clone()
    return h


def _in_place_view(h: Tensor) -> Tensor:
    h = h.clone()
    h.view(-1)[::3] *= 2
    return h


def _copy_in(m: nn.Module, h: Tensor) -> Tensor:
    scratch = m.scratch.clone()
    scratch[: len(h)] = h
    return scratch[: len(h)].flip(1)


def _called(m: nn.Module, h: Tensor) -> Tensor:
    weights = {"weight": m.fc2.weight.T.contiguous(), "bias": torch.zeros(h.shape[1])}
    return torch.func.functional_call(nn.Linear(4, h.shape[1]), weights, (h[:, :4],))


def _checked(h: Tensor) -> Tensor:
    torch._assert(h.shape[1] == 24, "width")
    return h * 2


def _suppressed(h: Tensor) -> Tensor:
    with contextlib.suppress(RuntimeError):
        h = h * torch.linspace(1, 2, 24)
    return h


def _by_id(m: nn.Module) -> float:
    return {id(m.fc1.weight): 2.0}.get(id(m.fc1.weight), 1.0) * (1 + m.fc1.weight.shape[0] / 24)


def _set_item(h: Tensor) -> Tensor:
    h = h.clone()
    h[torch.arange(len(h)), h.argmax(1)] = 0.0
    return h
