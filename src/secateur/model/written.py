"""Weights that a forward writes to: put back, and the model refused, as every run of it would be of another model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils import dlpack
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.errors import UnsupportedError
from secateur.model.memory import Saved, written
from secateur.model.modules import named_parameters
from secateur.model.place import engine_writes, users_line

# The methods behind all of OPENINGS: the others are made of these.
_METHODS = ("numpy", "__dlpack__", "data_ptr", "untyped_storage", "_typed_storage")


@contextmanager
def weights_kept(model: nn.Module) -> Iterator[None]:
    """Put back weights that a forward writes to, by whatever alias, and refuse the model: a guard copies no weights.

    Raises:
        UnsupportedError: names the weight and the line. The weights are as before.

    Cost: a look at every operator that writes; a copy of what is written to, or handed to code that torch cannot see.
    """
    watch = _Writes(model)
    try:
        with _openings(watch.opened), watch:
            yield
    finally:
        watch.settle()
    for name, line in watch.lines.items():
        raise UnsupportedError(
            f"the forward of {type(model).__name__} writes to its own weight {name!r}{line}",
            why="every run changes the model, so none of them could be compared with another",
            hint="change weights outside of the forward, or run it once first where it only sets them up",
        )


class _Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Copies weights before they are written to."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        parameters = named_parameters(model)
        self.names = {id(p): name for name, p in parameters}
        self.kept = Saved()
        for _, parameter in parameters:
            self.kept.add(parameter)
        self.lines: dict[str, str] = {}  # of weights that were written to
        self._opened: dict[str, tuple[Tensor, str]] = {}

    def __torch_dispatch__(
        self,
        func: OpOverload[..., object],
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if func._schema.is_mutable and not engine_writes():
            for tensor in written(func, args, kwargs or {}):
                for weight in self.kept.before(tensor):
                    self.lines.setdefault(self.names[id(weight)], _at_line())
        return func(*args, **(kwargs or {}))

    def opened(self, tensor: Tensor) -> None:
        """Code of the user was given the memory of a tensor: that may have been to read it."""
        for weight in self.kept.before(tensor):
            self._opened[self.names[id(weight)]] = (weight, _at_line())

    def settle(self) -> None:
        """Put everything back, and find out which opened weights were written to."""
        for name, (weight, line) in self._opened.items():
            if self.kept.changed(weight):
                self.lines.setdefault(name, line)
        self.kept.put_back()


@contextmanager
def _openings(opened: Callable[[Tensor], None]) -> Iterator[None]:
    """Hear of the calls by which code of the user gets at the memory of a tensor."""

    def told(method: Callable[..., object]) -> Callable[..., object]:
        @wraps(method)  # modes are handed what stands on the class, and go by its name
        def call(tensor: Tensor, *args: object, **kwargs: object) -> object:
            if not engine_writes():
                opened(tensor)
            return method(tensor, *args, **kwargs)

        return call

    own = {name: vars(torch.Tensor).get(name) for name in _METHODS}
    exports = {owner: vars(owner)["to_dlpack"] for owner in (dlpack, torch)}
    for name in _METHODS:
        setattr(torch.Tensor, name, told(getattr(torch.Tensor, name)))
    for owner, export in exports.items():
        setattr(owner, "to_dlpack", told(export))  # noqa: B010 - torch exports it to nobody
    try:
        yield
    finally:
        for owner, export in exports.items():
            setattr(owner, "to_dlpack", export)  # noqa: B010
        for name, method in own.items():
            if method is None:  # that of the class above is found again
                delattr(torch.Tensor, name)
            else:
                setattr(torch.Tensor, name, method)


def _at_line() -> str:
    line = users_line(whole=True)
    return line and f" at {line}"
