"""Blocks left out while a model runs: their hidden state goes past them, everything else stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from typing import cast

from torch import Tensor, nn


def hidden_of(args: Sequence[object], kwargs: Mapping[str, object]) -> Tensor | None:
    """The hidden state among the arguments of a block: the first tensor."""
    for value in (*args, *kwargs.values()):
        found = first_tensor(value)
        if found is not None:
            return found
    return None


def first_tensor(value: object) -> Tensor | None:
    """The first tensor of what a block takes or returns; mappings, tuples, lists and dataclasses are walked."""
    if isinstance(value, Tensor):
        return value
    items: Sequence[object] = ()
    # Outputs of transformers are mappings and dataclasses at once: as mappings they hide the fields that are None.
    if isinstance(value, Mapping):
        items = list(value.values())
    elif isinstance(value, (tuple, list)):
        items = value
    elif is_dataclass(value) and not isinstance(value, type):
        items = [getattr(value, entry.name) for entry in fields(value)]
    return next((found for item in items if (found := first_tensor(item)) is not None), None)


@contextmanager
def bypassed(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Let modules hand on their hidden state unchanged, in the form in which they return it.

    What a block returns beside the hidden state (attention maps, biases for others) is computed as ever.

    Args:
        model: patched inside the context, then as before.
        names: qualified names of the modules.
    """
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(_as_identity(model.get_submodule(name)))
        yield


@contextmanager
def _as_identity(block: nn.Module) -> Iterator[None]:
    original, own = block.forward, vars(block).get("forward")

    def forward(*args: object, **kwargs: object) -> object:
        hidden = hidden_of(args, kwargs)
        assert hidden is not None
        before = hidden.clone()  # the block may write into its input (an in-place ReLU, a residual added with +=)
        return replaced(original(*args, **kwargs), before)

    block.forward = forward
    try:
        yield
    finally:
        del block.forward
        if own is not None:  # someone else's wrapper, which hid the class's method before
            block.forward = own


def replaced(output: object, hidden: Tensor) -> object:
    """`output` with its first tensor replaced; copied shallowly, as others may hold the original."""
    if isinstance(output, Tensor):
        return hidden
    if isinstance(output, Mapping):
        key = next(k for k, v in output.items() if first_tensor(v) is not None)
        changed = cast(dict[object, object], copy.copy(output))
        changed[key] = replaced(output[key], hidden)
        return changed
    if is_dataclass(output) and not isinstance(output, type):
        name = next(k for k, v in vars(output).items() if first_tensor(v) is not None)
        result = copy.copy(output)
        object.__setattr__(result, name, replaced(getattr(output, name), hidden))  # it may be frozen
        return result
    values = cast(Sequence[object], output)
    place = next(i for i, item in enumerate(values) if first_tensor(item) is not None)
    items = [replaced(item, hidden) if i == place else item for i, item in enumerate(values)]
    kind = cast(Callable[..., object], type(output))
    return kind(*items) if hasattr(output, "_fields") else kind(items)  # a named tuple takes its items one by one
