"""Functions that a copy shares with the original: those that hold a module or tensor of it get ones of the copy.

`copy.deepcopy` does not copy functions, so a hook or a lambda in an attribute would go on reading the original, be it
only a size. Cells, defaults and arguments of partials that lead to a module or tensor of the model lead to its copy
here, and a function that remembers its answers finds them anew; whatever else a function holds (a log, a count) is
shared as before.
"""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache, partial
from pathlib import Path
from types import CellType, FunctionType, MethodType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.errors import UnsupportedError
from secateur.model.place import users_line
from secateur.model.reach import ANSWERS, FUNCTIONS, inside, kind_of, slots_of
from secateur.model.tensors import named_tensors

REBOUND = (FunctionType, partial, MethodType, ANSWERS)
PLAIN = (list, dict, tuple, set, OrderedDict)
STILL = frozenset([bool, int, float, str, type(None)])
_Watch: TypeAlias = tuple[dict[int, str], dict[str, str]]  # paths by id of a module; what was asked -> where
WATCHES: list[_Watch] = []  # of copies that run now
PACKAGE = str(Path(__file__).parents[1])
DEEPEST = 8  # functions and containers that hold each other
HOLDS = "copies share what such functions hold, so that the smaller model would read the original's"
HINT = "Take the tensor from a module that is at hand when the code runs (self, or the module that a hook is given)."


def rebind(result: nn.Module, memo: dict[int, Any]) -> None:
    """Give a copy functions of its own, where those that it shares with the original lead back to that.

    Args:
        result: the copy; attributes and hooks of its modules are changed in place.
        memo: of the copying: id of an object of the original -> its copy.
    """
    work = _Rebinding(memo)
    for module in result.modules():
        work.fill(vars(module))


class _Rebinding:
    def __init__(self, memo: dict[int, Any]) -> None:
        self.memo = memo
        self.made: dict[int, Any] = {}  # id of a function -> the one that takes its place
        self.held: list[object] = []  # so that no id is given to another object meanwhile
        self.copies = self._made_by_copying()
        self.filled: set[int] = set()

    def _made_by_copying(self) -> set[int]:
        return {id(made) for before, made in list(self.memo.items()) if id(made) != before}

    def fill(self, store: dict[Any, Any]) -> None:
        """Replace functions among the values of a namespace that belongs to the copy."""
        if id(store) in self.filled:
            return
        self.filled.add(id(store))
        for key, value in list(store.items()):
            if type(value) in STILL or (type(value) is OrderedDict and not value):  # most are: a module has ten tables
                continue
            if key not in ("_modules", "_parameters", "_buffers"):
                own = self._filled(value)
                if own is not value:
                    dict.__setitem__(store, key, own)

    def _filled(self, value: Any) -> Any:
        """A value of the copy, whose functions are its own, too."""
        if isinstance(value, (*REBOUND, tuple)):
            return self.own(value)
        if type(value) in (dict, OrderedDict):
            self.fill(value)
        elif id(value) not in self.copies or isinstance(value, (nn.Module, Tensor)):
            return value  # shared with the original, as its class wants it
        elif isinstance(value, dict):
            self.fill(value)
            if isinstance(value, defaultdict):
                value.default_factory = self.own(value.default_factory)
        elif isinstance(value, (list, deque)) and id(value) not in self.filled:
            self.filled.add(id(value))
            for place, item in enumerate(value):
                value[place] = self._filled(item)
        if kind_of(value) in ("object", "container"):
            self.fill(getattr(value, "__dict__", {}))
        return value

    def own(self, value: Any) -> Any:
        """What stands for a value in the copy: itself, where it leads to nothing of the original."""
        if id(value) in self.made:
            return self.made[id(value)]
        if not self._leads_back(value, DEEPEST, set()):
            return value
        self.held.append(value)
        if isinstance(value, (nn.Module, Tensor)):
            return self.memo[id(value)]
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, MethodType):
            return MethodType(self.own(value.__func__), self.own(value.__self__))
        if isinstance(value, ANSWERS):  # it forgets those of the original
            return lru_cache(**value.cache_parameters())(self.own(value.__wrapped__))
        if isinstance(value, partial):
            return partial(self.own(value.func), *map(self.own, value.args), **self._named(value.keywords))
        if type(value) is dict:
            return self._named(value)
        if type(value) in (list, tuple):
            return type(value)(map(self.own, value))
        made = copy.deepcopy(value, self.memo)
        self.copies = self._made_by_copying()
        return self._filled(made)

    def _named(self, values: dict[Any, Any]) -> dict[Any, Any]:
        return {key: self.own(value) for key, value in values.items()}

    def _function(self, old: FunctionType) -> FunctionType:
        before = old.__closure__ or ()
        # A count in a cell is shared, as it was.
        cells = tuple(CellType() if self._leads_back(cell, DEEPEST, set()) else cell for cell in before)
        made = FunctionType(old.__code__, old.__globals__, old.__name__, None, cells or None)
        self.made[id(old)] = made  # first, as it may hold itself
        vars(made).update(self._named(vars(old)))
        made.__qualname__, made.__doc__, made.__module__ = old.__qualname__, old.__doc__, old.__module__
        made.__defaults__ = None if old.__defaults__ is None else tuple(map(self.own, old.__defaults__))
        made.__kwdefaults__ = None if old.__kwdefaults__ is None else self._named(old.__kwdefaults__)
        for cell, held in zip(cells, before, strict=True):
            if cell is not held:
                cell.cell_contents = self.own(held.cell_contents)
        return made

    def _leads_back(self, value: Any, depth: int, seen: set[int]) -> bool:
        """Whether a value is, or holds, a module or tensor of the original."""
        if isinstance(value, (nn.Module, Tensor)):
            return id(value) in self.memo and self.memo[id(value)] is not value
        if depth == 0 or id(value) in seen:
            return False
        seen.add(id(value))
        return any(self._leads_back(part, depth - 1, seen) for part in _parts(value))


def _parts(value: Any) -> Iterator[Any]:
    """What a function, a container or an object of the user's holds."""
    if isinstance(value, CellType):
        try:
            yield value.cell_contents
        except ValueError:  # a variable that is not bound yet
            return
    elif isinstance(value, MethodType):  # of a module, which may be torch's: a forward that was kept to be called
        yield from (value.__self__, value.__func__)
    elif isinstance(value, FUNCTIONS):
        yield from inside(value)
    elif isinstance(value, ANSWERS):
        yield value.__wrapped__
    elif isinstance(value, dict):
        yield from list(value.values())
    elif isinstance(value, PLAIN):
        yield from list(value)
    elif kind_of(value) == "object" and not isinstance(value, type):
        yield from list(getattr(value, "__dict__", {}).values())
        yield from (getattr(value, name) for name in slots_of(value))


class OwnReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, hears which memory operators read, to find a copy that still reads the original.

    Args:
        model: the original.
        result: its copy, which runs inside.
    """

    def __init__(self, model: nn.Module, result: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        own = {_memory(tensor) for tensor in named_tensors(result).values()}
        names = ((_memory(tensor), name) for name, tensor in named_tensors(model).items())
        self.names = {memory: name for memory, name in names if memory is not None and memory not in own}
        self.read: dict[str, str] = {}

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        for tensor in _flat((*args, *(kwargs or {}).values())):
            memory = _memory(tensor)
            name = None if memory is None else self.names.get(memory)
            if name is not None:
                self.read.setdefault(name, users_line())
        return func(*args, **(kwargs or {}))

    def require_none(self) -> None:
        """Refuse a copy that has read the original.

        Raises:
            UnsupportedError: names the tensor or attribute, and the line.
        """
        for name, where in self.read.items():
            raise UnsupportedError(
                f"A copy of this model still reads {name!r} of the original ({where}).", why=HOLDS, hint=HINT
            )


@contextmanager
def _asked(model: nn.Module, result: nn.Module) -> Iterator[dict[str, str]]:
    """Inside, hears which modules of the original are asked for anything, a size or a flag: no operator reads those.

    Yields:
        "attribute of module" -> the line; what this package asks is left out.
    """
    own = set(map(id, result.modules()))
    names = {id(module): path for path, module in model.named_modules() if id(module) not in own}
    watch: _Watch = (names, {})
    WATCHES.append(watch)
    nn.Module.__getattribute__ = _heard  # type: ignore[assignment]
    try:
        yield watch[1]
    finally:
        WATCHES.remove(watch)
        if not WATCHES:
            del nn.Module.__getattribute__


def _heard(self: nn.Module, name: str) -> Any:
    """What `object` gives; stands in the class of all modules while a copy runs."""
    for names, found in WATCHES:
        if id(self) in names and not sys._getframe(1).f_code.co_filename.startswith(PACKAGE):
            found.setdefault(f"{names[id(self)]}.{name}".lstrip("."), users_line())
    return object.__getattribute__(self, name)


@contextmanager
def reading_its_own(
    beside: Callable[[], AbstractContextManager[object]], model: nn.Module, cut: nn.Module
) -> Iterator[object]:
    """What stands beside a run of a cut model, which is not to read the original."""
    with OwnReads(model, cut) as reads, beside() as result, _asked(model, cut) as asked:
        yield reads if result is None else result
    reads.read = {**asked, **reads.read}
    reads.require_none()


def _flat(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif type(value) in (list, tuple):
            yield from _flat(value)


def _memory(tensor: Tensor) -> int | None:
    """What tells the memory of a tensor from any other, also by way of an array; None where it has none of its own."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.numel() == 0:
        return None
    try:
        return int(tensor.untyped_storage().data_ptr()) or None
    except (RuntimeError, NotImplementedError):  # a wrapper around other tensors
        return None
