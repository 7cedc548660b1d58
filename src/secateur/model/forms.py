"""Examples and batches of the same form with other contents: tensors exchanged, what holds them built anew."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from secateur.types import Example


def map_tensors(value: Example, change: Callable[[Tensor], Tensor], *, whole: type | None = None) -> Example:
    """An example or batch of the same form with every tensor changed, in the order in which `tensors_in` finds them.

    Mappings and dataclasses keep their class, for forwards read attributes of them; a mapping that cannot be written to
    comes back as a dict.

    Args:
        value: what `call` takes, or a batch.
        change: gives the new tensor.
        whole: objects of this class are handed on as they are.

    Example:
        >>> import torch
        >>> map_tensors({"x": torch.ones(2), "n": [torch.ones(1), 3]}, torch.neg)
        {'x': tensor([-1., -1.]), 'n': [tensor([-1.]), 3]}
    """
    if isinstance(value, Tensor):
        return change(value)
    if whole is not None and isinstance(value, whole):
        return value
    if isinstance(value, Mapping):
        return _mapping(value, {key: map_tensors(item, change, whole=whole) for key, item in value.items()})
    if isinstance(value, (tuple, list)):
        items = [map_tensors(item, change, whole=whole) for item in value]
        if isinstance(value, PackedSequence):  # torch wants these sizes on the CPU, wherever the data are
            items[1] = value.batch_sizes
        return rebuilt(value, items)
    if is_dataclass(value) and not isinstance(value, type):
        other = copy.copy(value)  # what its class makes of its fields when it is built was made once
        for field in fields(value):
            item = map_tensors(getattr(value, field.name), change, whole=whole)
            object.__setattr__(other, field.name, item)  # frozen ones as well
        return other
    return value


def _mapping(value: Mapping[str, object], items: dict[str, object]) -> Mapping[str, object]:
    """A mapping with other items, of the same class where it is more than a dict and can be written to."""
    if type(value) is dict:
        return items
    try:
        other = copy.copy(value)
        for key, item in items.items():
            other[key] = item  # type: ignore[index]
    except Exception:
        return items
    return other


def rebuilt(value: Sequence[object], items: Sequence[object]) -> object:
    """A list or tuple with other items: a named tuple stays one, as forwards ask for its class and its fields.

    Example:
        >>> rebuilt((1, 2), [3, 4])
        (3, 4)
    """
    if isinstance(value, list):
        return list(items)
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
