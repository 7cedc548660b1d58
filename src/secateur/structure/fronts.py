"""Dimensions that the code counts from the front, where an input with one more or one less puts the units there.

`h.flip(1)` turns rows around, and of a sample without a batch its units. Only operators to which positions matter
count: a mean or a norm over the units that stay is what it is. Where the original refuses such inputs nothing is said.
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
from secateur.structure.axes import leaves
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
RANK = "holds for inputs of as many dimensions as the example has"
DIMS = ("dim", "dims", "axis")


def watch_fronts(recorder: Recorder, name: str, args: Args, kwargs: Kwargs) -> None:
    """Note the dimensions that a call of the user's code counts from the front."""
    tensor = args[0] if args else kwargs.get("input")
    tensor = tensor[0] if isinstance(tensor, (tuple, list)) and tensor else tensor
    if not isinstance(tensor, Tensor) or recorder.numbers.get(tensor) not in recorder.data:
        return
    dims = [d for d in _dims(name, args, kwargs) if 0 <= d < tensor.dim()]
    if dims:
        place = recorder.here.place()
        recorder.trace.fronts.append(Front(name.strip("_"), place, tuple(dims), recorder.axes(tensor)))


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
        for more in (-1, 1):  # without a batch, the units lie where dimension d was the one before
            if any(d - more in lost for d in each.dims) and not lost & set(each.dims) and taken(more):
                said.add(each.place.where)
                text = f"{RANK}: {each.name} counts them from the front"
                yield Condition(text, each.place.where, each.place.module)
                break


def takes(model: nn.Module, example: Example, more: int) -> bool:
    """Whether a model runs on an example with a dimension more in front, or without its first one.

    Args:
        model: is left as it was.
        example: what one forward takes.
        more: 1 or -1.

    Cost: one forward pass of a single sample, or of the example, where it does.
    """
    known = list(tensors_in(example))
    if more < 0 and (len({t.shape[:1] for t in known}) != 1 or any(t.dim() < 2 or t.shape[0] == 0 for t in known)):
        return False
    changed = map_tensors(example, lambda tensor: tensor[0] if more < 0 else tensor[None])
    try:
        with evaluating(model, example=changed):
            call(model, changed)
    except (SecateurError, RuntimeError, ValueError, IndexError, TypeError, AssertionError):
        return False
    return True
