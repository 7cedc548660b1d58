"""Which tensors the user wants left whole: by name, by class, or by a tag on the module."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatchcase
from glob import escape

from torch import Tensor, nn

from secateur.errors import RecipeError
from secateur.registry import suggestion
from secateur.request import require_patterns

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
    require_patterns(patterns)
    if not patterns:
        return {}
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


def patterns_of(model: nn.Module, protect: Collection[object]) -> tuple[str, ...]:
    """Names and patterns out of what users write: modules and parameters of the model, and classes, become words.

    Args:
        model: whose names are used.
        protect: names, patterns, modules or parameters of `model`, classes of modules.

    Raises:
        RecipeError: one word, something of another kind, or a module that is not in the model.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> patterns_of(net, [net[2], nn.ReLU, "0.*"])
        ('2', 'type:ReLU', '0.*')
    """
    if isinstance(protect, (nn.Module, Tensor, type)):
        protect = [protect]
    if isinstance(protect, str) or not isinstance(protect, Iterable):
        require_patterns(protect)
    return tuple(_pattern_of(model, one) for one in protect)


def _pattern_of(model: nn.Module, one: object) -> str:
    if isinstance(one, str):
        return one
    if isinstance(one, type) and issubclass(one, nn.Module):
        return f"type:{one.__name__}"
    if not isinstance(one, (nn.Module, Tensor)):
        require_patterns([one])
    named = model.named_modules() if isinstance(one, nn.Module) else model.named_parameters(remove_duplicate=False)
    name = next((name for name, held in named if held is one), None)
    if name:
        # A name may hold a bracket or an asterisk itself.
        return escape(name)
    if name is not None:
        raise RecipeError("protect holds the whole model", hint="then nothing is left to prune; name what should stay")
    raise RecipeError(
        f"protect holds a {type(one).__name__} that is not in the model",
        hint="pass a module of this very model and not of a copy, or its name as in model.named_modules()",
    )


def _modules(model: nn.Module, pattern: str) -> Iterator[nn.Module]:
    kind, _, word = pattern.partition(":")
    # A module that stands in two places is meant by either name.
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
