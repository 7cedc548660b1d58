"""Whether a model is still set as it was when a plan was made for it: switches, hooks, modules; weights may move."""

from __future__ import annotations

from collections.abc import Hashable

from torch import nn

PLAIN = (bool, int, float, str, bytes, type(None))
# The fingerprint and the walk over the modules know the first three, and every proof runs in training mode as well.
NOT_ASKED = ("_parameters", "_buffers", "_modules", "training")


def settings_of(model: nn.Module) -> Hashable:
    """What the attributes of all modules say: plain values as they are, all else by which object it is.

    Lists and tables are opened one level, so that a hook that was added, or an entry that was changed, is seen.

    Cost: one walk over the modules; no tensor is read.
    """
    return tuple(
        (path, id(type(module)), name, _seen(value))
        for path, module in model.named_modules()
        for name, value in sorted(vars(module).items())
        if name not in NOT_ASKED
    )


def _seen(value: object) -> Hashable:
    if isinstance(value, dict):
        return tuple((_one(key), _one(entry)) for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_one(entry) for entry in value)
    return _one(value)


def _one(value: object) -> Hashable:
    return (type(value).__name__, repr(value)) if type(value) in PLAIN else id(value)
