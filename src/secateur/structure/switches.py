"""Flags, words and shares that modules hold, and the lines of their code that decide by them: read from the source.

A plan is learned with the values as they are. Whoever turns a switch of the smaller model takes a path that was never
seen, so every switch stands among the conditions. Integers are followed while the model runs; those of 0 and 1 are
switches as well. Nothing tells which of these values are ever turned: those of torch's own classes are left out.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from types import FunctionType

from torch import Tensor, nn

from secateur.model.modules import named_modules
from secateur.model.place import short
from secateur.structure.asked import (
    TORCH,
    Function,
    callees,
    definition,
    handed_back,
    made_of,
    mentions,
    plain_function,
    receivers,
    targets,
    tests_in,
)
from secateur.structure.conditions import Branch, listed
from secateur.structure.read import lines_of_file, nodes_of
from secateur.types import Condition

MOST_LINES = 12  # that are said; how many more there are stands in the last of them
DEEPEST = 4  # methods that call each other
Chain = tuple[str, ...]  # names after `self`
Forwards = Mapping[str, tuple[nn.Module, Mapping[FunctionType, None]]]  # by qualified name


def switches(own: Forwards) -> Iterator[Branch]:
    """One condition for each line that decides by plain values which a module, or a config that it holds, has.

    Args:
        own: what `forwards` says of the model.
    """
    found: dict[str, tuple[str, str]] = {}
    for path, (module, functions) in own.items():
        for where, chains in _deciding(functions):
            held = {".".join(chain): value for chain in chains if _is_switch(value := held_at(module, chain))}
            if held:
                text = ", ".join(f"{name}={value!r}" for name, value in held.items())
                found.setdefault(where, (f"holds with {text} of {type(module).__name__}, by which it decides", path))
    yield from _unread(own)
    more = len(found) - MOST_LINES
    for number, (where, (text, path)) in enumerate(list(found.items())[:MOST_LINES]):
        last = f"; {more} more such lines are left out" if more > 0 and number == MOST_LINES - 1 else ""
        yield Branch("switch", Condition(text + last, where, path), text)


def _unread(own: Forwards) -> Iterator[Branch]:
    """Classes without source: nobody knows what they decide by."""
    names: dict[str, str] = {}
    for path, (module, functions) in own.items():
        forwards = [f for f in functions if f.__code__.co_name == "forward"]
        if any(definition(f.__code__) is None and not lines_of_file(f.__code__.co_filename) for f in forwards):
            names.setdefault(type(module).__name__, path)
    if names:
        text = f"the source of {listed(list(names))} cannot be read: holds for flags and words as they are here"
        yield Branch("switch", Condition(text, "", next(iter(names.values()))), text)


def _is_switch(value: object) -> bool:
    return type(value) in (bool, str, float) or (type(value) is int and value in (0, 1))


def held_at(owner: object, chain: Chain) -> object:
    """What stands at the end of a chain of names; None where a module, a tensor or a property is on the way."""
    for name in chain:
        if isinstance(owner, (Tensor, type)) or not hasattr(owner, "__dict__"):
            return None
        spaces = (vars(space) for space in (owner, *type(owner).__mro__))
        owner = next((space[name] for space in spaces if name in space), None)
    return owner


def _deciding(functions: Iterable[FunctionType]) -> Iterator[tuple[str, frozenset[Chain]]]:
    """Lines, as "file:line", and what is asked of `self` there: of the forward and the methods that it calls."""
    for function in functions:
        node = definition(function.__code__)
        yield from _lines(node, function.__code__.co_filename) if node is not None else ()


def forwards(model: nn.Module) -> Forwards:
    """Every module, with its forward and the methods that this calls on it, as `run_by_forward` finds them."""
    return {path: (module, run_by_forward(module)) for path, module in named_modules(model)}


def run_by_forward(module: nn.Module) -> dict[FunctionType, None]:
    """The forward of a module and the methods that it calls on the module, as far as their source says; in order."""
    seen: dict[FunctionType, None] = {}
    todo = [(plain_function(module.forward), DEEPEST)]
    while todo:
        function, depth = todo.pop()
        if function is None or function in seen or depth == 0 or function.__code__.co_filename.startswith(TORCH):
            continue
        seen[function] = None
        node = definition(function.__code__)
        for part in nodes_of(node) if node is not None else ():
            if isinstance(part, ast.Call):
                found = callees(part, function, module, node)  # type: ignore[arg-type]
                todo += [(callee, depth - 1) for callee, owner in found if owner is module]
            elif isinstance(part, ast.Attribute) and isinstance(
                asked := _of_class(module, part, receivers(function)), property
            ):
                todo.append((plain_function(asked.fget), depth - 1))
    return seen


def _of_class(module: nn.Module, node: ast.Attribute, this: tuple[str, ...]) -> object:
    """What the class has under the name that is asked of `self`."""
    if not isinstance(node.value, ast.Name) or node.value.id not in this:
        return None
    return next((vars(kind)[node.attr] for kind in type(module).__mro__ if node.attr in vars(kind)), None)


@cache
def _lines(node: Function, filename: str) -> tuple[tuple[str, frozenset[Chain]], ...]:
    if not node.args.args:
        return ()
    this = node.args.args[0].arg
    named: dict[str, set[Chain]] = {}
    for part in nodes_of(node):
        if isinstance(part, (ast.Assign, ast.AnnAssign, ast.NamedExpr)) and part.value is not None:
            chain = chain_of(part.value, this)
            for name in made_of(node, set(targets(part))) if chain else ():
                named.setdefault(name, set()).add(chain)
    lines: dict[int, set[Chain]] = {}
    # What a method or a property hands back as it is, its caller may decide by.
    for test in (*tests_in(node), *(value for value in handed_back(node) if chain_of(value, this))):
        chains = {chain for part in ast.walk(test) if (chain := chain_of(part, this))}
        chains |= {chain for name, known in named.items() if mentions(test, {name}) for chain in known}
        lines.setdefault(test.lineno, set()).update(chains)
    return tuple((f"{short(filename)}:{line}", frozenset(chains)) for line, chains in sorted(lines.items()) if chains)


def chain_of(node: ast.AST, this: str) -> Chain:
    """The names of `self.config.flag`, and of `getattr(self, "flag", ...)`; () for anything else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
        owner, name = (*node.args, None, None)[:2]
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            names.insert(0, name.value)
            node = owner  # type: ignore[assignment]
    known = isinstance(node, ast.Name) and node.id == this and "training" not in names
    return tuple(names) if known else ()
