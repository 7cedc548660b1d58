"""Code of the user's own that runs in a backward pass: the proof compares what forwards give, and no gradients."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, ModuleType

from torch import nn
from torch.autograd.function import Function

from secateur.model.modules import named_modules
from secateur.model.place import is_users, short
from secateur.structure.provenance import PLAIN
from secateur.structure.switches import run_by_forward
from secateur.types import Condition

SAID = "holds until it is trained: {} is code of its own in the backward pass, of which gradients were not compared"
DEPTH = 2  # functions that call each other


def own_backwards(model: nn.Module) -> Iterator[Condition]:
    """One condition for each backward pass of the user's that the code of a model names: a width in it is not seen.

    Args:
        model: before the cut.

    Cost: one look at the functions of each of its classes; nothing is run.
    """
    said: set[CodeType] = set()
    looked: set[type] = set()
    for path, module in named_modules(model):
        hooks = [*module._backward_hooks.values(), *module._backward_pre_hooks.values()]
        functions = [("a hook", hook) for hook in hooks]
        if type(module) not in looked:
            looked.add(type(module))
            seen: set[int] = set()
            functions += [each for method in run_by_forward(module) for each in _of(method, seen, DEPTH)]
        held = [value for value in vars(module).values() if type(value) not in PLAIN]
        functions += [(name, each) for value in held for name, each in _of(value, set(), DEPTH)]
        for name, function in functions:
            code = getattr(inspect.unwrap(function), "__code__", None)
            if isinstance(code, CodeType) and code not in said and is_users(code.co_filename):
                said.add(code)
                yield Condition(SAID.format(name), f"{short(code.co_filename)}:{code.co_firstlineno}", path)


def _of(value: object, seen: set[int], depth: int) -> Iterator[tuple[str, FunctionType]]:
    """Backward passes that a function names, and those that it calls."""
    if isinstance(value, type) and issubclass(value, Function):
        backward = vars(value).get("backward") or vars(value).get("vjp")
        if isinstance(backward, staticmethod) and isinstance(backward.__func__, FunctionType):
            yield f"{value.__name__}.backward", backward.__func__
        return
    function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
    if not isinstance(function, FunctionType) or id(function) in seen or not is_users(function.__code__.co_filename):
        return
    seen.add(id(function))
    for code in _codes(function.__code__):
        if "register_hook" in code.co_names:
            yield f"a hook that {function.__qualname__} registers", function
    for each in _named(function) if depth else ():
        yield from _of(each, seen, depth - 1)


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of those inside of it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _named(function: FunctionType) -> Iterable[object]:
    """What a function's code may call: globals, what modules among them hold, and what its closure holds."""
    space = function.__globals__
    for code in _codes(function.__code__):
        for name in code.co_names:
            held = space.get(name)
            yield held
            if isinstance(held, ModuleType):
                yield from (vars(held).get(other) for other in code.co_names)
            owner = getattr(held, "__self__", None)
            if isinstance(owner, type):  # apply = Scale.apply
                yield owner
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a variable that is not bound yet
            continue
