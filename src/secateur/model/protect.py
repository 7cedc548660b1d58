"""Which tensors the user wants left whole: by name, by class, or by a tag on the module."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase

from torch import nn

from secateur.errors import RecipeError
from secateur.registry import suggestion

TAGS = "secateur_tags"
FORMS = "names as in model.named_modules(), with * and ?; type:ClassName; tag:WORD"


def protected(model: nn.Module, patterns: Collection[str]) -> dict[int, str]:
    """Tensors that patterns protect.

    Args:
        model: any module.
        patterns: names of modules or parameters as in ``model.named_modules()``, with ``*`` and ``?``;
            "type:ClassName" for all modules of a class and its subclasses; "tag:WORD" for modules whose attribute
            ``secateur_tags`` (a word or several) holds the word. A module stands for all that is in it.

    Returns:
        id of parameter or buffer -> the pattern that protects it; tied tensors are one.

    Raises:
        RecipeError: `patterns` is one string, or a pattern protects nothing; names the nearest known word.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> net[2].secateur_tags = {"keep"}
        >>> protected(net, ["tag:keep"]) == {id(p): "tag:keep" for p in net[2].parameters()}
        True
    """
    if isinstance(patterns, str):
        raise RecipeError(f"protect={patterns!r} is one word", hint=f"write a list: [{patterns!r}]")
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    found: dict[int, str] = {}
    for pattern in patterns:
        held = {id(t) for module in _modules(model, pattern) for t in (*module.parameters(), *module.buffers())}
        held |= {id(tensor) for name, tensor in named if fnmatchcase(name, pattern)}
        if not held:
            raise RecipeError(
                f"protect: {pattern!r} matches no module or parameter",
                hint=suggestion(pattern, _words(model), otherwise=f"patterns are {FORMS}"),
            )
        for key in held:
            found.setdefault(key, pattern)
    return found


def _modules(model: nn.Module, pattern: str) -> Iterator[nn.Module]:
    kind, _, word = pattern.partition(":")
    for name, module in model.named_modules(remove_duplicate=False):
        if kind == "type" and word:
            match = any(cls.__name__ == word for cls in type(module).__mro__)
        elif kind == "tag" and word:
            match = word in _tags(module)
        else:
            match = bool(name) and fnmatchcase(name, pattern)
        if match:
            yield module


def _tags(module: nn.Module) -> Collection[str]:
    tags = getattr(module, TAGS, ())
    return (tags,) if isinstance(tags, str) else tags if isinstance(tags, Collection) else ()


def _words(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        yield from ([name] if name else [])
        yield f"type:{type(module).__name__}"
        yield from (f"tag:{tag}" for tag in _tags(module))
    yield from (name for name, _ in model.named_parameters())
