"""What an example gives beside tensors, or leaves out: a plan holds where it is given again."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from secateur.model.call import tensors_in
from secateur.model.forms import rebuilt
from secateur.model.place import short
from secateur.structure.asked import deciding_lines
from secateur.structure.axes import leaves
from secateur.structure.conditions import Branch, listed
from secateur.structure.provenance import Dim, TrackedInt
from secateur.structure.recorder import Recorder
from secateur.types import Condition, Example, Lock

NUMBER = "a number that the example gives"
MOST_LINES = 12  # of one kind that are said; how many more there are stands in the last of them
LONGEST = 40  # letters of a value
CONTAINERS = (list, tuple, dict)


def arguments(model: nn.Module, example: Example) -> Iterator[Branch]:
    """What the example leaves at its default (switches, one each, come first), and what it gives beside tensors."""
    bound = _bound(model, example)
    if bound is None:
        return
    signature, given = bound
    open_ = {n: p.default for n, p in signature.parameters.items() if n not in given and p.default is not p.empty}
    where = _where(model)
    for name, default in open_.items():
        if isinstance(default, bool):
            yield Branch("argument", Condition(f"holds for {name}={default}, its default", where), name)
    rest = {name: default for name, default in open_.items() if not isinstance(default, bool)}
    if rest:
        yield Branch("arguments", Condition(f"holds with defaults for {listed(list(rest))}", where))
    said = [(name, f"{name}={_words(default)}, its default") for name, default in rest.items()]
    more = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD and p.name not in given]
    said += [(name, f"nothing in **{name}") for name in more]
    yield from _decided(model, said, "default")
    said = [(name, text) for name, value in given.items() for text in _given(name, value)]
    yield from _decided(model, said, "given", where)
    held = {name: value for name, value in given.items() if _holds_tensors(value)}
    yield from _decided(model, [(name, f"{name} given as {_form(value)}") for name, value in held.items()], "form")


def _form(value: object) -> str:
    return "a tensor" if type(value) is Tensor else f"a {type(value).__name__}"


def _bound(model: nn.Module, example: Example) -> tuple[inspect.Signature, Mapping[str, object]] | None:
    try:
        signature = inspect.signature(model.forward)
        positional = example if isinstance(example, tuple) else () if isinstance(example, Mapping) else (example,)
        bound = signature.bind_partial(*positional, **(example if isinstance(example, Mapping) else {}))
    except (TypeError, ValueError):
        return None
    return signature, bound.arguments


def _where(model: nn.Module) -> str:
    code = getattr(inspect.unwrap(model.forward), "__code__", None)
    return "" if code is None else f"{short(code.co_filename)}:{code.co_firstlineno}"


def _given(name: str, value: object) -> Iterator[str]:
    """What is said of an argument: plain values in it, and how many items a list has."""
    if isinstance(value, Tensor):
        return
    if isinstance(value, CONTAINERS):
        if value and not isinstance(value, dict) and any(isinstance(item, (*CONTAINERS, Tensor)) for item in value):
            yield f"{len(value)} items in {name}"
        if value and isinstance(value, dict) and all(isinstance(item, Tensor) for item in value.values()):
            yield f"{len(value)} items in {name} ({listed([repr(key) for key in value])})"
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items if _holds_tensors(value) or isinstance(value, dict) else ():
            yield from _given(f"{name}[{key!r}]", item)
        if not isinstance(value, dict) and not _holds_tensors(value):
            yield f"{name}={_words(value)}"
    else:
        yield f"{name}={_words(value)}"


def _holds_tensors(value: object) -> bool:
    return any(True for _ in tensors_in(value))


def _words(value: object) -> str:
    text = repr(value) if isinstance(value, (bool, int, float, complex, str, bytes, *CONTAINERS)) else ""
    text = text or ("None" if value is None else f"a {type(value).__name__}")
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _decided(model: nn.Module, said: list[tuple[str, str]], kind: str, otherwise: str = "") -> Iterator[Branch]:
    """One condition for each line that decides by a value; `otherwise` is the place where no line is known."""
    found: list[tuple[str, str]] = []
    for name, text in said:
        lines = deciding_lines(model, name, form=kind == "form")
        found += [(f"holds for {text}, by which the code decides", line) for line in lines]
        if kind == "form":  # one line may ask whether two arguments are the same
            found = [each for i, each in enumerate(found) if each[1] not in {where for _, where in found[:i]}]
        if not lines and otherwise and " items in " not in text:
            found.append((f"holds for {text}, which the example gives", otherwise))
    more = len(found) - MOST_LINES
    for i, (text, where) in enumerate(found[:MOST_LINES]):
        last = f"; {more} more such lines are left out" if more > 0 and i == MOST_LINES - 1 else ""
        yield Branch(kind, Condition(text + last, where), text)


def followed(recorder: Recorder, model: nn.Module, example: Example) -> object:
    """The example, with integers in it that say what becomes of them."""
    if isinstance(example, Tensor):
        return example
    bound = _bound(model, example)
    names = list(bound[1]) if bound is not None and isinstance(example, tuple) else []

    def follow(value: Any, name: str) -> object:
        if type(value) is int and value >= 2:
            axis = recorder.space.fresh(value, Lock(NUMBER))
            recorder.input_names.update((atom.id, name) for atom in leaves(axis))
            return TrackedInt(value, Dim(axis), recorder.watch)
        if type(value) in (list, tuple):
            items = [follow(item, f"{name}[{i}]") for i, item in enumerate(value)]
            return value if all(a is b for a, b in zip(items, value, strict=True)) else rebuilt(value, items)
        if type(value) is dict:
            changed = {key: follow(item, f"{name}[{key!r}]" if name else str(key)) for key, item in value.items()}
            return value if all(changed[key] is item for key, item in value.items()) else changed
        return value

    if isinstance(example, tuple) and names:
        parts = [follow(item, names[min(i, len(names) - 1)]) for i, item in enumerate(example)]
        return example if all(a is b for a, b in zip(parts, example, strict=True)) else tuple(parts)
    return follow(example, "")
