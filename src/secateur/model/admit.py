"""Which kind of model stands at the door: what can be pruned comes in, everything else is told what it is.

Asked once by every entry, before anything runs. A model that is refused here would otherwise fail much later, in words
about operators and attributes that its owner has never heard of.
"""

from __future__ import annotations

import copy
import gc
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from secateur.errors import InputError, SecateurError, UnsupportedError
from secateur.model.modules import modules_of, named_modules

# By the place of the class: none of these libraries need be installed, and torch.ao is slow to import.
QUANTISED = (
    "torch.ao.nn.quantized", "torch.ao.nn.quantizable", "torch.ao.nn.intrinsic.quantized",
    "torch.ao.nn.sparse.quantized", "torch.nn.quantized", "bitsandbytes", "auto_gptq", "gptqmodel", "awq", "hqq",
    "eetq", "quanto", "optimum.quanto", "aqlm", "compressed_tensors", "torchao.quantization", "torchao.dtypes",
)  # fmt: skip
PREPARED = (
    "torch.ao.nn.qat", "torch.ao.nn.intrinsic.qat", "torch.nn.qat", "torch.nn.intrinsic.qat",
    "torch.ao.quantization.fake_quantize", "torch.ao.quantization.observer", "torchao.quantization.qat",
)  # fmt: skip
SHARDED = ("torch.distributed.fsdp", "torch.distributed._composable", "torch.distributed.tensor", "deepspeed",
           "fairscale", "megatron", "torch.distributed._tensor")  # fmt: skip
FLOAT_AFTER_ALL = frozenset({"FloatFunctional", "FXFloatFunctional"})  # stand-ins for operators in float models
EIGHT_BITS = frozenset({torch.int8, torch.uint8, torch.int16, torch.int32})
PREPARE_AFTER = (
    "prune the float model first, then prepare the result for quantisation (prepare, prepare_qat); "
    "secateur.mask_model holds masks while it trains"
)
PLAIN = frozenset([bool, int, float, str, type(None)])  # values that no copy can fail at
SERIES = frozenset([tuple, list, set, dict, OrderedDict])  # nor at these, where such values are all that is in them
USUAL = PLAIN | SERIES  # no tensors, which are slow to ask about
COPIED_BY = ("__deepcopy__", "__reduce_ex__", "__reduce__", "__getstate__", "__setstate__", "__new__", "__getnewargs__",
             "__getnewargs_ex__", "__getattribute__")  # fmt: skip
PRUNE_FIRST = "prune the float model first, then quantise the result"


_PLACES: WeakKeyDictionary[type, dict[tuple[str, ...], bool]] = WeakKeyDictionary()


class WrapperWarning(UserWarning):
    """A model came in a wrapper, and what is inside was taken."""


def admit(model: object, *, copied: bool = False, prepared: bool = False) -> nn.Module:
    """The module to work on, or one sentence about why this model is not one.

    Wrappers that only run another module (`torch.compile`, `DataParallel`, `DistributedDataParallel`) are taken off,
    with a `WrapperWarning`: names and results are those of the module inside.

    Args:
        model: what the user gave.
        copied: it will be copied, so what cannot be copied is refused now, by name.
        prepared: models prepared for quantisation may come in: they are looked at, or zeros are written into them.

    Returns:
        The module itself, or the one inside a wrapper.

    Raises:
        InputError: no module at all (a class, a state dict, a path), or a lazy one without weights.
        UnsupportedError: quantised, prepared for quantisation, scripted, exported, sharded, or not to be copied.

    Cost: one walk over modules and tensors; no weight is read or copied.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> admit(layer) is layer
        True
    """
    _require_default_device()
    inner = unwrapped(_module(model))
    if inner is not model:
        warnings.warn(about_wrapper(model), WrapperWarning, stacklevel=3)
    for name, module in named_modules(inner):
        _look(name or type(module).__name__, module, prepared=prepared)
    if copied:
        require_copyable(inner)
    return inner


def _require_default_device() -> None:
    if torch.get_default_device().type == "meta":
        raise UnsupportedError(
            "the default device is 'meta'",
            why="whatever is made there has no values, so that nothing can be chosen or proved",
            hint="call this outside of torch.device('meta') and set_default_device('meta'); "
            "a model that stands on the meta device itself can be planned for",
        )


# -- no module -----------------------------------------------------------------------------------------------------


def _module(model: object) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    kind = type(model).__name__
    hint = "pass the model itself: an instance of torch.nn.Module"
    if isinstance(model, type):
        hint = f"make an instance: {model.__name__}(...)" if issubclass(model, nn.Module) else hint
        raise InputError(f"the model is the class {model.__name__}, not an instance of it", hint=hint)
    if _from(type(model), ("torch.export",)):
        raise UnsupportedError(
            f"the model is an {kind}: a graph that was exported",
            why="its sizes are fixed in the graph, so nothing can be cut out of it",
            hint="prune the module that it was exported from, then export the result",
        )
    if isinstance(model, Mapping):
        raise InputError(
            f"the model is a {kind} of {len(model)} entries, not a module",
            why="weights alone do not say how they are used" if _holds_tensors(model) else "",
            hint="build the model and load them into it: model.load_state_dict(weights)",
        )
    if isinstance(model, (str, Path)):
        raise InputError(
            f"the model is the text {str(model)[:60]!r}, not a module",
            hint="load it first: secateur.load for a folder of secateur, from_pretrained for one of transformers; "
            "the command line takes such words as MODEL",
        )
    inside = getattr(model, "model", None)
    if isinstance(inside, nn.Module):
        raise InputError(f"the model is a {kind}, which holds one", hint=f"pass its module: {kind.lower()}.model")
    if callable(model):
        raise InputError(
            f"the model is the function {getattr(model, '__name__', kind)!r}, not a module",
            hint="pass the module that it calls, or wrap it: a class of torch.nn.Module whose forward calls it",
        )
    raise InputError(f"the model is a {kind}, not a module", hint=hint)


def _holds_tensors(mapping: Mapping[object, object]) -> bool:
    return any(isinstance(value, Tensor) for value in mapping.values())


# -- wrappers ------------------------------------------------------------------------------------------------------


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside wrappers that only run it; the model itself where there is none."""
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def about_wrapper(model: object) -> str:
    """What is said where a wrapper was taken off."""
    kind = "torch.compile" if hasattr(model, "_orig_mod") else type(model).__name__
    place = "model._orig_mod" if hasattr(model, "_orig_mod") else "model.module"
    return (
        f"the model is wrapped by {kind}; the module inside ({place}) is taken, names are those that it uses, and the "
        "result is not wrapped: wrap it again"
    )


def _inside(model: nn.Module) -> nn.Module | None:
    inner = None
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inner = model.module
    elif type(model).__name__ == "OptimizedModule" and _from(type(model), ("torch._dynamo",)):
        inner = model._orig_mod
    return inner if isinstance(inner, nn.Module) else None


def require_unwatched(model: nn.Module) -> None:
    """Refuse a change of shapes under a living `DistributedDataParallel`.

    Args:
        model: about to be cut in place.

    Raises:
        UnsupportedError: a wrapper holds its parameters: the next backward pass would fail.

    Cost: nothing without `torch.distributed`; else one look at all objects of the process.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if _holder(model):
        gc.collect()  # a wrapper that was deleted stands in cycles, and goes when they are collected
        found = _holder(model)
        if found:
            raise UnsupportedError(
                f"{type(model).__name__} is wrapped by {found}, so it cannot be cut in place",
                why="the wrapper keeps buckets and hooks for gradients of the old shapes; the next backward would fail",
                hint="keep model.module, delete the wrapper (del model), cut, and wrap the result again; or leave out "
                "inplace=True",
            )


def _holder(model: nn.Module) -> str:
    """The class of a living distributed wrapper that holds parameters of a model; "" where there is none."""
    own = {id(parameter) for parameter in model.parameters()}
    # By type, as isinstance asks objects that stand for others, and may wake them; by a set, as there are a million.
    kinds = _with_subclasses(nn.parallel.DistributedDataParallel)
    wrappers = [one for one in gc.get_objects() if type(one) in kinds]
    return next((type(w).__name__ for w in wrappers if any(id(p) in own for p in w.parameters())), "")


def _with_subclasses(kind: type) -> set[type]:
    return {kind}.union(*map(_with_subclasses, kind.__subclasses__()))


# -- kinds of modules ----------------------------------------------------------------------------------------------


def _look(name: str, module: nn.Module, *, prepared: bool) -> None:
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedError(
            f"{name!r} is a TorchScript module",
            why="its code is compiled and holds its sizes, and nobody can watch it run",
            hint="prune the original nn.Module, then script or trace the result",
        )
    if _from(kind, ("torch.export",)) or hasattr(module, "_guards_fn"):
        raise UnsupportedError(
            f"{name!r} is the module of an exported program",
            why="its sizes are fixed in the graph, so nothing can be cut out of it",
            hint="prune the module that it was exported from, then export the result",
        )
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        raise InputError(
            f"{name!r} is a lazy module ({kind.__name__}) that has no weights yet",
            why="their shapes are made by the first forward pass",
            hint="run one forward pass first: model(example)",
        )
    if _from(kind, SHARDED):
        raise _sharded(name, kind.__name__)
    if not prepared and _from(kind, PREPARED):
        raise UnsupportedError(
            f"{name!r} ({kind.__name__}) prepares the model for quantisation: its values are rounded or watched",
            why="the rounding is learned for the layers as they are, and a cut would change what it has seen",
            hint=PREPARE_AFTER,
        )
    if _from(kind, QUANTISED) and kind.__name__ not in FLOAT_AFTER_ALL and not _from(kind, PREPARED):
        raise _quantised(name, f"{kind.__name__} stores its weights in whole numbers")
    for own, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            _look_at_tensor(f"{name}.{own}", own, tensor, module)


def _look_at_tensor(name: str, own: str, tensor: Tensor, module: nn.Module) -> None:
    # Every model has hundreds of plain ones, so what can be told by a type or a dtype comes first.
    if type(tensor) not in (Tensor, nn.Parameter) and is_traceable_wrapper_subclass(tensor):
        kind = type(tensor)
        if _from(kind, SHARDED):
            raise _sharded(name, kind.__name__)
        if _from(kind, ("torchao", *QUANTISED)) or "quant" in kind.__name__.lower():
            raise _quantised(name, f"it is a {kind.__name__}, which packs its numbers")
        raise UnsupportedError(
            f"{name!r} is a {kind.__name__}, a tensor that is made of other tensors",
            why="it has no memory of its own that could be read, cut or set to zero",
            hint="prune the model with plain weights, then convert it",
        )
    if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
        return
    if tensor.is_quantized:
        raise _quantised(name, f"it is stored as {_word(tensor.dtype)}")
    if not tensor.is_complex() and (tensor.dtype.is_floating_point or _is_packed(tensor.dtype)):
        raise UnsupportedError(
            f"{name!r} holds numbers of {_word(tensor.dtype)}, which torch can store but not calculate with",
            why="such weights are packed or scaled: a quantised format, without operators to cut, mask or score it",
            hint=f"prune the model in bfloat16 or wider (model.to(torch.bfloat16)); {PRUNE_FIRST}",
        )
    if tensor.dim() > 1 and tensor.dtype in EIGHT_BITS and "weight" in own and _has_scale(module, own):
        raise _quantised(name, f"it is stored as {_word(tensor.dtype)} beside its scale")


def _is_packed(dtype: torch.dtype) -> bool:
    """Whether several numbers share a byte, or torch only knows the bits: int4, uint2, bits8 and the like."""
    word = _word(dtype)
    return word.startswith("bits") or (word.lstrip("u").startswith("int") and word.lstrip("u")[3:] in "1234567")


def _has_scale(module: nn.Module, own: str) -> bool:
    names = {*module._parameters, *module._buffers, *vars(module)} - {own}
    return any(word in name.lower() for name in names for word in ("scale", "absmax", "quant_state", "zero_point"))


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _quantised(name: str, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"{name!r} is quantised, so it holds no float weights that could be pruned", why=why, hint=PRUNE_FIRST
    )


def _sharded(name: str, kind: str) -> UnsupportedError:
    return UnsupportedError(
        f"{name!r} is sharded over processes ({kind})",
        why="no process holds the whole of its weights, so none can rank, cut or prove them",
        hint="secateur.sharded.plan_sharded gathers weights and gradients onto one process and decides there; "
        "or load the full state dict into the plain model yourself, prune that, and shard it again",
    )


def is_rounding(op: str) -> bool:
    """Whether an operator is one of fake quantisation."""
    return "fake_quant" in op or "obs_fq" in op


def _from(kind: type, places: tuple[str, ...]) -> bool:
    """Whether a class or one of its bases is defined in one of these packages."""
    # Most classes of a model come many times, and nearly all are those of torch itself.
    known = _PLACES.setdefault(kind, {})
    if places not in known:
        homes = [f"{base.__module__}." for base in kind.__mro__]
        known[places] = any(home.startswith(f"{place}.") for home in homes for place in places)
    return known[places]


# -- copies --------------------------------------------------------------------------------------------------------


def require_copyable(model: nn.Module) -> None:
    """Refuse a model that holds something that cannot be copied.

    Raises:
        UnsupportedError: names the attribute and what it holds.

    Cost: a deep copy of everything but parameters and buffers.
    """
    modules = modules_of(model)
    memo = _shared(modules)
    try:
        for module in [m for m in modules if id(m) not in memo]:
            copy.deepcopy(module, memo)
    except SecateurError:
        raise
    except Exception as error:
        raise not_copyable(model, error) from error


def not_copyable(model: nn.Module, error: Exception) -> UnsupportedError:
    """The error for a model whose copy failed with another one; finds out what in it cannot be copied."""
    name, value = next(_culprits(model), ("", None))
    what = f"{name!r} cannot be copied" if name else f"{type(model).__name__} cannot be copied"
    held = f"it holds a {type(value).__name__}: " if name else ""
    return UnsupportedError(
        what,
        why=f"{held}{type(error).__name__}: {error}",
        hint="pruning works on a copy: take it off the model for the time being (set the attribute to None), or give "
        "its module a __deepcopy__ or __getstate__ that leaves it out",
    )


def _shared(modules: Sequence[nn.Module]) -> dict[int, object]:
    """A memo for deepcopy of what stays where it is: tensors, of which no second one is made, and what is plain.

    Modules that hold nothing but tensors, plain values and other modules are most of a model, and copying them (each
    has a dozen tables for hooks) takes longer than all else that is asked at the door.
    """
    every = (v for m in modules for v in (*vars(m).values(), *m._parameters.values(), *m._buffers.values()))
    held = (value for value in every if type(value) not in USUAL and isinstance(value, Tensor))
    usual = {kind for kind in {type(module) for module in modules} if _is_copied_as_usual(kind)}
    plain = (module for module in modules if type(module) in usual and _is_plain(module))
    return {id(value): value for value in (*held, *plain)}


def _is_copied_as_usual(kind: type[nn.Module]) -> bool:
    """Whether nothing but torch has a say in how the modules of a class are copied."""
    return kind.__module__.startswith("torch.nn.") or all(
        getattr(kind, name, None) is getattr(nn.Module, name, None) for name in COPIED_BY
    )


def _is_plain(module: nn.Module) -> bool:
    """Whether a module holds no hooks, and nothing but tensors, plain values and modules that are looked at too."""
    values = (value for name, value in vars(module).items() if name not in ("_parameters", "_buffers", "_modules"))
    return all(type(v) in PLAIN or (type(v) in SERIES and _is_plain_series(v)) or isinstance(v, Tensor) for v in values)


def _is_plain_series(values: Iterable[object]) -> bool:
    items = (*values, *values.values()) if isinstance(values, dict) else values
    return PLAIN.issuperset(map(type, items))


def _culprits(model: nn.Module) -> Iterator[tuple[str, object]]:
    memo = _shared(modules_of(model))
    for path, module in named_modules(model):
        for attribute, value in vars(module).items():
            if attribute in ("_parameters", "_buffers", "_modules"):
                continue
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:
                yield (f"{path}.{attribute}" if path else attribute), value
