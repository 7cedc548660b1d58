"""What a cut leaves behind where no forward shows it: numbers and tensors that other methods read, shared memory."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from itertools import accumulate, combinations
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from secateur.model.call import tensors_in
from secateur.model.memory import memory_of
from secateur.model.modules import named_modules, named_parameters
from secateur.model.place import short
from secateur.model.tensors import named_tensors
from secateur.structure.asked import TORCH, definition
from secateur.structure.conditions import listed
from secateur.structure.provenance import Attribute, is_users
from secateur.structure.read import nodes_of
from secateur.structure.switches import run_by_forward
from secateur.types import Condition


def left_behind(
    model: nn.Module, cuts: Mapping[str, Mapping[int, Tensor]], attributes: Mapping[Attribute, int]
) -> Iterator[Condition]:
    """One condition for each method that reads an integer or a tensor of a size that is cut, and that does not follow.

    Such a tensor is no parameter and no buffer: it lies in an attribute, or in a list or a table there, as averages of
    the weights by their names do.

    Args:
        model: before the cut.
        cuts: tensor name -> dimension -> kept indices.
        attributes: integers that follow.
    """
    tensors = named_tensors(model)
    lost: dict[str, set[int]] = {"": set()}  # path of a module -> sizes that it or a module in it loses
    for name, dims in cuts.items():
        sizes = {tensors[name].shape[d] for d in dims}
        for owner in ("", *accumulate(name.split(".")[:-1], "{}.{}".format)):
            lost.setdefault(owner, set()).update(sizes)
    follow = {(attribute.owner, attribute.name) for attribute in attributes}
    beside: dict[str, set[int]] = {}
    for name, tensor in _beside(model):
        beside.setdefault(name, set()).update(tensor.shape)
    said: set[str] = set()
    for path, module in named_modules(model):
        here = lost.get(path, set())
        if not here or not is_users(module):
            continue
        stay = {n: v for n, v in vars(module).items() if (path, n) not in follow and not n.startswith("_")}
        held = {name: beside.get(f"{path}.{name}".lstrip("."), set()) for name in stay}
        widths = {name: "as it is and may have" for name in stay if not here.isdisjoint(held[name])}
        widths |= {
            name: f"{value} and may name" for name, value in stay.items() if not here.isdisjoint(_integers(value))
        }
        for method, name, where in _read(module, widths) if widths else ():
            if where not in said:
                said.add(where)
                text = (
                    f"{type(module).__name__}.{method}() reads {name}, which stays {widths[name]} a width that is cut"
                )
                yield Condition(f"holds for the forward alone: {text}", where, path)


def untied(model: nn.Module, cuts: Mapping[str, Mapping[int, Tensor]]) -> Iterator[Condition]:
    """One condition for each parameter in the memory of another tensor, where one is cut: both get their own.

    Others are parameters, buffers, and tensors in attributes, as a flat one that an optimizer holds.

    A weight that is used twice is no such pair: it is one parameter under two names, and stays one.
    """
    memories: dict[int, list[tuple[str, Tensor]]] = {}
    for name, tensor in (*named_tensors(model).items(), *_beside(model)):
        if tensor.layout == torch.strided:
            memories.setdefault(memory_of(tensor), []).append((name, tensor))
    for (name, one), (other, two) in (pair for held in memories.values() for pair in combinations(held, 2)):
        (a, b), (c, d) = _extent(one), _extent(two)
        if isinstance(one, nn.Parameter) and a < d and c < b and (name in cuts or other in cuts):
            shared = f"{name} and {other} share their memory"
            text = f"holds until it is trained: {shared}, and the cut gives each its own"
            yield Condition(text, "", name.rpartition(".")[0])


def _beside(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors in attributes, and in lists and tables there, that are neither parameters nor buffers of the model."""
    known = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            # One level, and of plain containers: others may do anything when asked, and data lie in some of them.
            inside = value.values() if type(value) is dict else value if type(value) in (list, tuple) else (value,)
            for tensor in inside:
                if isinstance(tensor, Tensor) and id(tensor) not in known:
                    yield f"{path}.{name}".lstrip("."), tensor


def unhooked(model: nn.Module) -> Iterator[Condition]:
    """One condition that names the parameters whose hooks or tensors of their own a copy does not have.

    Functions that run when a gradient is there mostly hold something of its form. In place they stay.
    """
    parameters = named_parameters(model)
    hooks = [name for name, p in parameters if p._backward_hooks or p._post_accumulate_grad_hooks]
    held = [name for name, p in parameters if any(True for _ in tensors_in(list(vars(p).values())))]
    for what, names in (("hooks on", hooks), ("tensors that are attributes of", held)):
        if names:
            yield Condition(f"{what} parameters are not in a copy that is cut: {listed(names)}; set them anew there")


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Where in its memory a tensor begins and ends."""
    first = tensor.storage_offset()
    return int(first), int(first) + 1 + sum(
        (n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _integers(value: Any) -> Iterator[int]:
    for item in value if type(value) in (list, tuple) else (value,):
        if type(item) is int and item > 1:
            yield item


def _read(module: nn.Module, names: Mapping[str, object]) -> Iterator[tuple[str, str, str]]:
    """Method, attribute and "file:line" of what methods beside the forward read of a module."""
    run = run_by_forward(module)
    ran: set[str] = set()  # what a class has under such a name is overridden in the classes behind it
    for kind in type(module).__mro__:
        for method, function in vars(kind).items():
            known = isinstance(function, FunctionType) and not function.__code__.co_filename.startswith(TORCH)
            if known and function in run:
                ran.add(method)
            if not known or method in ran or method.startswith("__") or not function.__code__.co_argcount:
                continue
            node = definition(function.__code__)
            for part in nodes_of(node) if node is not None else ():
                if isinstance(part, ast.Attribute) and part.attr in names and isinstance(part.ctx, ast.Load):
                    this = part.value.id if isinstance(part.value, ast.Name) else ""
                    if this == function.__code__.co_varnames[0]:
                        yield method, part.attr, f"{short(function.__code__.co_filename)}:{part.lineno}"
