"""Physical removal: new tensors are built first, then swapped in; on any error the model is what it was."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import PlanMismatchError, UnsupportedError
from secateur.kinds.slices.momenta import cut_states
from secateur.model.call import tensors_in
from secateur.model.copies import copied
from secateur.model.modules import modules_of, named_modules
from secateur.model.rebound import rebind
from secateur.model.tensors import computed_tensors, cut_tensor, named_tensors
from secateur.structure.provenance import Attribute, read, write
from secateur.types import Cuts

WEIGHTED = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.RMSNorm)
SIZES: dict[str, dict[str, tuple[str, int]]] = {
    "Linear": {"out_features": ("weight", 0), "in_features": ("weight", 1)},
    "Bilinear": {"out_features": ("weight", 0), "in1_features": ("weight", 1), "in2_features": ("weight", 2)},
    "Embedding": {"embedding_dim": ("weight", 1)},
    "Conv1D": {"nx": ("weight", 0), "nf": ("weight", 1)},
    "PReLU": {"num_parameters": ("weight", 0)},
    "GroupNorm": {"num_channels": ("weight", 0)},
}


def cut_copy(
    model: nn.Module, cuts: Cuts, attributes: Mapping[Attribute, int], stand_ins: Mapping[int, object] | None = None
) -> nn.Module:
    """A new model with the cuts made; the original is not touched and its cut weights are never copied whole.

    Args:
        model: any module.
        cuts: tensor name -> dimension -> kept indices.
        attributes: integers to set on modules and configs.
        stand_ins: id of a module -> what stands in its place in the copy; it is not copied.

    Raises:
        PlanMismatchError: a tensor or dimension of the plan does not exist in this model.
    """
    tensors = named_tensors(model)
    check(tensors, cuts)
    refuse_scripted(model, cuts)
    memo = {**computed_tensors(model), **(stand_ins or {})}
    for name, dims in cuts.items():
        old = tensors[name]
        new = cut_tensor(old, dims)
        memo[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
    result = copied(model, memo)
    rebind(result, memo)
    _carry_words(tensors, named_tensors(result), memo)
    finish(result, attributes)
    return result


def _carry_words(before: Mapping[str, Tensor], after: Mapping[str, Tensor], memo: dict[int, object]) -> None:
    """What a training loop has written on parameters (a tag, a group of an optimizer), which torch copies to none.

    Tensors among it have the form of the parameter that was, and stay behind: `secateur.structure.elsewhere.unhooked`.
    """
    for name, old in before.items():
        new = after.get(name)
        if isinstance(old, nn.Parameter) and new is not None and new is not old:
            words = {key: value for key, value in vars(old).items() if not any(True for _ in tensors_in(value))}
            vars(new).update({key: copy.deepcopy(value, memo) for key, value in words.items() if key not in vars(new)})


def refuse_scripted(model: nn.Module, cuts: Cuts) -> None:
    """Compiled TorchScript holds its own copy of every size.

    Raises:
        UnsupportedError: a cut tensor belongs to a scripted or traced module.
    """
    for name, module in named_modules(model):
        prefix = f"{name}." if name else ""
        if isinstance(module, torch.jit.ScriptModule) and any(tensor.startswith(prefix) for tensor in cuts):
            raise UnsupportedError(
                f"{name or type(model).__name__} is a TorchScript module, which cannot be cut.",
                why="its code is compiled and holds its sizes",
                hint="Cut the original nn.Module, then script or trace the result.",
            )


def cut_model(
    model: nn.Module, cuts: Cuts, attributes: Mapping[Attribute, int], optimizer: Optimizer | None = None
) -> None:
    """Cut a model in place: parameters keep their identity, so optimizers, ties and hooks stay attached.

    Args:
        model: changed in place.
        cuts: tensor name -> dimension -> kept indices.
        attributes: integers to set on modules and configs.
        optimizer: its per-parameter state (momentum and the like) is cut alike.

    Raises:
        PlanMismatchError: the plan does not fit; the model is unchanged.
    """
    tensors = named_tensors(model)
    check(tensors, cuts)
    refuse_scripted(model, cuts)
    new = {name: cut_tensor(tensors[name], dims) for name, dims in cuts.items()}
    grads = {name: cut_tensor(grad, cuts[name]) for name in cuts if (grad := tensors[name].grad) is not None}
    states = cut_states(tensors, cuts, optimizer)
    saved = {name: (tensors[name].data, tensors[name].grad) for name in cuts}
    old_attributes = {a: read(model, a) for a in attributes}
    try:
        for name in cuts:
            tensors[name].grad = None
            _replace(tensors[name], new[name])
            tensors[name].grad = grads.get(name)
        finish(model, attributes)
    except BaseException:
        for name, (data, grad) in saved.items():
            tensors[name].grad = None
            _replace(tensors[name], data)
            tensors[name].grad = grad
        for attribute, value in old_attributes.items():
            write(model, attribute, value)
        sync_sizes(model)
        raise
    for follow in states:
        follow()


def _replace(tensor: Tensor, data: Tensor) -> None:
    """Give a tensor other data, of another shape too, also while a graph of an earlier forward still lives.

    Such a graph (a loss that the loop still has in hand) keeps the node that adds up gradients, and the next forward
    would take it up again, with the old shape. Torch makes a new one where the dtype changes, so it changes in between.
    """
    tensor.data = data.new_empty(0, dtype=torch.float16 if data.dtype != torch.float16 else torch.float32)
    tensor.data = data


def check(tensors: Mapping[str, Tensor], cuts: Cuts) -> None:
    """Refuse cuts that do not fit the tensors.

    Raises:
        PlanMismatchError: names the tensor and what does not fit.
    """
    highest: dict[int, int] = {}  # id of indices -> the largest: the same ones cut many tensors
    for name, dims in cuts.items():
        if name not in tensors:
            raise PlanMismatchError(
                f"The plan cuts {name!r}, which this model does not have.",
                hint="Load the plan onto the model that it was made for.",
            )
        for d, indices in dims.items():
            if id(indices) not in highest:
                highest[id(indices)] = int(indices.max()) if len(indices) else -1
            most, shape = highest[id(indices)], tuple(tensors[name].shape)
            if not 0 <= d < len(shape) or most >= shape[d]:
                raise PlanMismatchError(
                    f"The plan does not fit {name!r} of shape {shape}.",
                    why=f"dimension {d} is cut to indices up to {most if len(indices) else '-'}",
                    hint="Load the plan onto the model that it was made for, before any other cut.",
                )


def finish(model: nn.Module, attributes: Mapping[Attribute, int]) -> None:
    """Set the attributes that follow a cut and the sizes that standard modules carry."""
    for attribute, value in attributes.items():
        write(model, attribute, value)
    sync_sizes(model)


def sync_sizes(model: nn.Module) -> None:
    """Make `in_features`, `num_features` and the like of standard modules agree with their tensors."""
    modules = modules_of(model)
    training = [module for module in modules if module.training]
    try:
        for module in training:
            module.training = False  # reading a parametrized weight in training may change its buffers
        with torch.no_grad():
            for module in modules:
                _sync(module)
    finally:
        for module in training:
            module.training = True


def _recompute(module: nn.Module) -> None:
    """Old-style weight_norm, spectral_norm and pruning hooks keep a computed weight that has the old shape."""
    for hook in module._forward_pre_hooks.values():
        if any(kind.__module__.startswith("torch.nn.utils.") for kind in type(hook).__mro__):
            hook(module, ())


def _sync(module: nn.Module) -> None:
    _recompute(module)
    if isinstance(module, WEIGHTED) and not hasattr(module, "weight"):
        return  # a hook of the user's makes it in every run, of what was cut
    if isinstance(module, nn.modules.conv._ConvNd):
        rows, columns = module.weight.shape[:2]
        a, b = rows, columns * module.groups
        module.out_channels, module.in_channels = (b, a) if module.transposed else (a, b)
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        known = module.weight if module.weight is not None else module.running_mean
        if known is not None:
            module.num_features = known.shape[0]
    elif isinstance(module, nn.RNNBase):
        _sync_recurrent(module)
    elif isinstance(module, nn.RNNCellBase):
        module.input_size, module.hidden_size = module.weight_ih.shape[1], module.weight_hh.shape[1]
    elif isinstance(module, nn.MultiheadAttention):
        packed: Tensor | None = module.in_proj_weight
        apart: list[Any] = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
        weights = apart if packed is None else [packed] * 3
        module.embed_dim, module.kdim, module.vdim = (weight.shape[1] for weight in weights)
        module.head_dim = module.embed_dim // module.num_heads
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        if module.weight is not None:
            module.normalized_shape = tuple(module.weight.shape)
    else:
        for kind in type(module).__mro__:
            for attribute, (tensor, d) in SIZES.get(kind.__name__, {}).items():
                value = getattr(module, tensor, None)
                if isinstance(value, Tensor) and attribute in vars(module) and d < value.dim():
                    setattr(module, attribute, value.shape[d])


def _sync_recurrent(module: nn.RNNBase) -> None:
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.named_parameters(recurse=False)}
    module.input_size = shapes["weight_ih_l0"][1]
    module.hidden_size = shapes["weight_hh_l0"][0] // gates
    if module.proj_size:
        module.proj_size = shapes["weight_hr_l0"][0]
