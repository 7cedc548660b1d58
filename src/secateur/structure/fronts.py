"""Dimensions that the code counts from the front, where an input with one more or one less puts the units there.

`h.flip(1)` turns rows around, and of a sample without a batch its units; with a batch of one, so does
`pooled.squeeze().flip(0)`. Only operators to which positions matter count: a mean or a norm over the units that stay is
what it is. Where the original refuses such inputs nothing is said.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.model.call import call, tensors_in
from secateur.model.forms import map_tensors
from secateur.model.guard import evaluating
from secateur.structure.axes import is_data, leaves, same_axis
from secateur.structure.recorder import Recorder
from secateur.structure.trace import Args, Front, Kwargs
from secateur.types import Condition, Example

# Name -> place of the dimensions among the arguments.
ORDERED = {
    "flip": 1, "roll": 2, "rot90": 2, "cumsum": 1, "cumprod": 1, "cummax": 1, "cummin": 1, "logcumsumexp": 1, "sort": 1,
    "argsort": 1, "topk": 2, "argmax": 1, "argmin": 1, "select": 1, "narrow": 1, "index_select": 1, "gather": 1,
    "take_along_dim": 2, "split": 2, "chunk": 2, "tensor_split": 2, "unbind": 1, "unfold": 1, "diff": 2, "glu": 1,
    "repeat_interleave": 2, "softmax": 1, "log_softmax": 1, "kthvalue": 2, "cat": 1, "fft": 2, "rfft": 2,
}  # fmt: skip
SQUEEZES = ("squeeze", "squeeze_")
RANK = "holds for inputs of as many dimensions as the example has"
LEFT = "holds where squeeze drops what it drops on the example"
DIMS = ("dim", "dims", "axis")


def watch_fronts(recorder: Recorder, name: str, args: Args, kwargs: Kwargs, result: object) -> None:
    """Note the dimensions that a call of the user's code counts from the front, and those that a squeeze leaves."""
    tensor = args[0] if args else kwargs.get("input")
    if name in SQUEEZES:
        _note_squeeze(recorder, tensor, args[1] if len(args) > 1 else kwargs.get("dim"), result)
        return
    tensor = tensor[0] if isinstance(tensor, (tuple, list)) and tensor else tensor
    if not isinstance(tensor, Tensor) or recorder.numbers.get(tensor) not in recorder.data:
        return
    thin = recorder.thin.get(recorder.number(tensor), ())
    # Counted from the end, a dimension is another one only where one behind it vanishes.
    dims = [d for d in _dims(name, args, kwargs) if (-tensor.dim() if thin else 0) <= d < tensor.dim()]
    if dims:
        place = recorder.here.place()
        recorder.trace.fronts.append(Front(name.strip("_"), place, tuple(dims), recorder.axes(tensor), thin))


def _note_squeeze(recorder: Recorder, tensor: object, given: object, result: object) -> None:
    """Note the dimensions of data that a squeeze left, and would have dropped were they of size one."""
    if not isinstance(tensor, Tensor) or not isinstance(result, Tensor) or result.dim() < 2:
        return
    if recorder.number(result) not in recorder.data:
        return
    dims = given if isinstance(given, (tuple, list)) else (given,)
    # What the tensor of before lost in an in-place squeeze nobody knows; all that is left may have been meant.
    axes = recorder.axes(result if given is None or tensor is result else tensor)
    asked = axes if given is None or tensor is result else [axes[int(d)] for d in dims if isinstance(d, int)]
    thin = tuple(axis for axis in asked if axis.size != 1)
    if thin:
        recorder.thin[recorder.number(result)] = (*recorder.thin.get(recorder.number(result), ()), *thin)


def _dims(name: str, args: Args, kwargs: Kwargs) -> Iterator[int]:
    if name == "__getitem__":
        yield from _picked(args[1])
    elif name in ORDERED:
        given = next((kwargs[each] for each in DIMS if each in kwargs), None)
        rest = args[ORDERED[name] :] if given is None else (given,)
        for value in rest if name == "flip" else rest[:1]:
            items = value if isinstance(value, (tuple, list)) else (value,)
            yield from (int.__int__(item) for item in items if isinstance(item, int) and not isinstance(item, bool))


def _picked(key: object) -> Iterator[int]:
    """Dimensions of which an index takes a part, up to an ellipsis."""
    d = 0
    for item in key if isinstance(key, tuple) else (key,):
        if item is Ellipsis:
            return
        if item is not None:
            if not (isinstance(item, slice) and item == slice(None)):
                yield d
            d += item.dim() if isinstance(item, Tensor) and item.dtype == torch.bool else 1


def fronts(found: Sequence[Front], cut: Collection[int], model: nn.Module, example: Example) -> Iterator[Condition]:
    """Conditions of those that an input of another rank brings to units that are cut, each line once.

    Args:
        found: of all runs.
        cut: ids of atoms that lose units.
        model: the original, which is asked whether it takes such inputs.
        example: what one forward takes.
    """

    @cache
    def taken(more: int) -> bool:
        return takes(model, example, more)

    said: set[str] = set()
    for each in found:
        lost = {d for d, axis in enumerate(each.axes) if any(leaf.id in cut for leaf in leaves(axis))}
        if not lost or each.place.where in said:
            continue
        text = ""
        for more in (-1, 1):  # without a batch, the units lie where dimension d was the one before
            if any(d - more in lost for d in each.dims if d >= 0) and not lost & set(each.dims) and taken(more):
                text = f"{RANK}: {each.name} counts them from the front"
        for d in _vanishing(each, lost):
            if d > 0 or taken(0):
                text = text or f"{LEFT}: {each.name} counts dimensions behind it, where one may be of size one"
        if text:
            said.add(each.place.where)
            yield Condition(text, each.place.where, each.place.module)


def _vanishing(each: Front, lost: set[int]) -> Iterator[int]:
    """Dimensions that a squeeze would have dropped, and without which the call means units that are cut."""
    count = len(each.axes)
    for gone, axis in enumerate(each.axes):
        if gone in lost or not is_data(axis) or not any(same_axis(axis, thin) for thin in each.thin):
            continue
        left = [d for d in range(count) if d != gone]
        before = {d % count for d in each.dims}
        behind = {left[d] for d in each.dims if -len(left) <= d < len(left)}
        if behind & lost and not before & lost:
            yield gone


def takes(model: nn.Module, example: Example, more: int) -> bool:
    """Whether a model runs on an example with a dimension more in front, without its first one, or on its first row.

    Args:
        model: is left as it was.
        example: what one forward takes.
        more: 1, -1, or 0 for a batch of one.

    Cost: one forward pass of a single sample, or of the example, where it does.
    """
    known = list(tensors_in(example))
    if more <= 0 and (len({t.shape[:1] for t in known}) != 1 or any(t.dim() < 2 or t.shape[0] == 0 for t in known)):
        return False
    changed = map_tensors(example, lambda tensor: _reshaped(tensor, more))
    try:
        with evaluating(model, example=changed):
            call(model, changed)
    except (SecateurError, RuntimeError, ValueError, IndexError, TypeError, AssertionError):
        return False
    return True


def _reshaped(tensor: Tensor, more: int) -> Tensor:
    if more == 0:
        return tensor[:1]
    return tensor[0] if more < 0 else tensor[None]
