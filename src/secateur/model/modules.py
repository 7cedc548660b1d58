"""The modules and parameters of a model, as torch names them, in a fraction of the time.

A plan asks for them some forty times, and torch hands every module up through one generator per level of nesting.
"""

from __future__ import annotations

from torch import nn

Named = list[tuple[str, nn.Module]]


def named_modules(model: nn.Module) -> Named:
    """What `nn.Module.named_modules` gives: the same names and modules, in the same order, each once.

    Example:
        >>> [name for name, _ in named_modules(nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU())))]
        ['', '0', '1', '1.0']
    """
    found: Named = []
    _walk("", model, set(), found)
    if any(kind.named_modules is not nn.Module.named_modules for kind in {type(module) for _, module in found}):
        return list(model.named_modules())  # a class has its own idea of what is inside
    return found


def _walk(path: str, module: nn.Module, seen: set[nn.Module], found: Named) -> None:
    seen.add(module)
    found.append((path, module))
    inside = module._modules
    if inside:
        start = f"{path}." if path else ""
        for name, child in inside.items():
            if child is not None and child not in seen:
                _walk(start + name, child, seen, found)


def modules_of(model: nn.Module) -> list[nn.Module]:
    """What `nn.Module.modules` gives."""
    return [module for _, module in named_modules(model)]


def named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What `nn.Module.named_parameters` gives: tied ones once, under their first name.

    Example:
        >>> [name for name, _ in named_parameters(nn.Sequential(nn.ReLU(), nn.Linear(2, 1)))]
        ['1.weight', '1.bias']
    """
    if type(model).named_parameters is not nn.Module.named_parameters:
        return list(model.named_parameters())
    found = []
    seen: set[int] = set()
    for path, module in named_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                found.append((f"{path}.{name}" if path else name, parameter))
    return found
