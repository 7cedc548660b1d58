"""An error of the user's code becomes one that names the module and the file:line that it came from."""

from __future__ import annotations

import re
import traceback
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn

from secateur.errors import ForwardError, ResourceError, UnsupportedError
from secateur.model.modules import named_modules
from secateur.model.place import is_engines, is_torchs, is_users

# What runs beside the model while it is captured; capture.py itself calls the model's own operators.
RECORDING = ("rules", "recorder.py", "size_uses.py", "function_call.py", "axes.py", "groups.py")
TRANSFORMS = f"{Path(torch.__file__).parent}/_functorch"
CALLS = "functional_call.py"  # transforms nothing
HANDS_ON = str(Path(__file__).with_name("written.py"))

# What torch says where a mode meets a tensor of torch.nested.
NESTED = re.compile("sym_is_contiguous|NestedTensor|nested int|SymIntArrayRef expected|operand type.*'SymInt'")


def fail(error: Exception, model: nn.Module, what: str, hint: str = "") -> NoReturn:
    """Turn an error of the user's code into one that names the module and the file:line it came from.

    Args:
        error: what was raised.
        model: whose modules are looked for in the traceback.
        what: one sentence: what failed.
        hint: what to do about it, where that is known.

    Raises:
        ResourceError: memory ran out.
        UnsupportedError: the engine's own rules failed beside the model.
        ForwardError: anything else.
    """
    text = f"{type(error).__name__}: {error}"
    if _is_transformed(error):
        where, _ = _location(error, model)
        raise UnsupportedError(
            f"{type(model).__name__} transforms its own functions (torch.func, torch.vmap), so nobody can follow it",
            why="under a transform tensors stand for others that no operator shows"
            + (f", at {where}" if where else ""),
            hint="write that line without the transform (a loop or a batched call for vmap, torch.autograd.grad for "
            "grad); masks (secateur.mask_model) need no capture and take the model as it is",
        ) from error
    if NESTED.search(text):
        where, _ = _location(error, model)
        raise nested(
            f"{type(model).__name__} computes with nested tensors" + (f" at {where}" if where else "")
        ) from error
    if _is_ours(error):
        where, _ = _location(error, model)
        raise UnsupportedError(
            f"{type(model).__name__} runs, and secateur cannot follow it",
            why=text + (f" at {where}" if where else ""),
            hint="write that line with plainer operators (a product and a sum for a fused call, a loop for vmap); it "
            "would help others if you reported it",
        ) from error
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        raise ResourceError(what, why=text, hint="use a smaller batch") from error
    where, module = _location(error, model)
    if module:
        text += f" (in module {module!r})"
    if where:
        text += f" at {where}"
    hint = hint or "check that model(input) runs with this input on its own"
    raise ForwardError(what, why=text, hint=hint) from error


def nested(what: str) -> UnsupportedError:
    """The error for tensors of `torch.nested`, strided or jagged, which no watch of torch can follow."""
    return UnsupportedError(
        f"{what}: torch.nested is not supported, neither strided nor jagged",
        why="their rows have lengths of their own, so that they have no dimensions that could be followed",
        hint="pad them and give a mask (torch.nested.to_padded_tensor); masks (secateur.mask_model) by criteria that "
        "need no data take the model as it is",
    )


def _is_ours(error: BaseException) -> bool:
    """Whether the innermost Python frame of an error is in the rules of the engine, and not where it runs the model."""
    frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    # The watch on what opens a tensor's memory only hands such a call on.
    inner = next((path for path in reversed(frames) if not is_torchs(path) and path != HANDS_ON), "")
    return is_engines(inner, RECORDING)


def _is_transformed(error: BaseException) -> bool:
    """Whether the engine failed under a transform of torch.func, where a tensor has no memory of its own."""
    paths = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    return _is_ours(error) and any(path.startswith(TRANSFORMS) and not path.endswith(CALLS) for path in paths)


def _location(error: BaseException, model: nn.Module) -> tuple[str, str]:
    """File:line of the innermost frame of the user's code, and the innermost module's name."""
    names = {id(module): name for name, module in named_modules(model)}
    where, module = "", ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        path = frame.f_code.co_filename
        # While a model is captured, frames of this package stand below those of the forward.
        if is_users(path):
            where = f"{path}:{line}"
        module = names.get(id(frame.f_locals.get("self")), "") or module
    return where, module
