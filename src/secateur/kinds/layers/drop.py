"""Blocks out of a stack, and branches out of its blocks: removal, the way back, and how names change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn
from torch.optim import Optimizer

from secateur.errors import PlanMismatchError
from secateur.kinds.layers.stub import Stub
from secateur.kinds.slices.cut import finish
from secateur.structure.provenance import Attribute, owner_at, read
from secateur.types import LayerEntry, StubEntry

Layers = Mapping[str, LayerEntry]  # container path -> what goes from it


def check_layers(model: nn.Module, layers: Layers) -> None:
    """Refuse removals that do not fit the model.

    Raises:
        PlanMismatchError: names the container or list and what does not fit.
    """
    for path, entry in layers.items():
        container = _container(model, path)
        if container is None or len(container._modules) != entry["size"]:
            found = "is no stack of blocks" if container is None else f"holds {len(container._modules)} blocks"
            raise PlanMismatchError(
                f"The plan removes blocks of {path!r}, which {found} in this model.",
                why=f"it was made for {entry['size']} blocks",
                hint="Load the plan onto the model that it was made for, before any other cut.",
            )
        removed = entry["removed"]
        if len(set(removed)) == entry["size"] or any(not 0 <= i < entry["size"] for i in removed):
            raise PlanMismatchError(f"The plan removes blocks of {path!r} that do not exist, or all of them.")
        for name in entry.get("stubs", {}):
            if not name.startswith(f"{path}." if path else "") or _module_at(model, name) is None:
                raise PlanMismatchError(
                    f"The plan takes {name!r} out of a block of {path!r}, which this model does not have there."
                )
        for owner, name in entry["lists"]:
            value = _list_at(model, owner, name)
            if value is None or len(value) != entry["size"]:
                raise PlanMismatchError(f"The plan shortens {owner}.{name}, which is no list of {entry['size']} items.")


def _module_at(model: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = model
    for part in path.split(".") if path else []:
        module = None if module is None else module._modules.get(part)
    return module


def _container(model: nn.Module, path: str) -> nn.Module | None:
    module = _module_at(model, path)
    return module if isinstance(module, (nn.ModuleList, nn.Sequential)) else None


def with_stubs(size: int, removed: list[int], lists: list[list[str]], stubs: dict[str, StubEntry]) -> LayerEntry:
    """An entry of a plan; where no branch goes nothing is said of any."""
    entry = LayerEntry(size=size, removed=removed, lists=lists)
    if stubs:
        entry["stubs"] = stubs
    return entry


def stub_names(layers: Layers) -> list[str]:
    """Modules of branches that go, under their names before the removal."""
    return [name for entry in layers.values() for name in entry.get("stubs", {})]


def _put_stubs(model: nn.Module, layers: Layers) -> list[tuple[nn.Module, str, nn.Module]]:
    """Put something without weights in the place of branches; returns (owner, name, what was there)."""
    before = []
    for entry in layers.values():
        for path, stub in entry.get("stubs", {}).items():
            owner, _, name = path.rpartition(".")
            holder = model.get_submodule(owner)
            old = holder._modules[name]
            assert old is not None
            holder._modules[name] = Stub.of(stub).train(old.training)
            before.append((holder, name, old))
    return before


def _list_at(model: nn.Module, owner: str, name: str) -> list[object] | tuple[object, ...] | None:
    try:
        value = vars(owner_at(model, owner)).get(name)
    except (KeyError, TypeError):
        return None
    return value if type(value) in (list, tuple) else None


def drop_layers(
    model: nn.Module, layers: Layers, attributes: Mapping[Attribute, int], optimizer: Optimizer | None = None
) -> Callable[[], None]:
    """Remove blocks and branches in place: the following blocks move up, lists and integers follow.

    Args:
        model: changed in place; the blocks that stay keep their identity.
        layers: container path -> {"size", "removed", "lists", "stubs"}.
        attributes: integers to set, addressed by the names before the removal.
        optimizer: forgets the parameters that are gone.

    Returns:
        a function that takes the removal back (the optimizer's part excepted).

    Raises:
        PlanMismatchError: the removals do not fit; nothing was changed.
    """
    check_layers(model, layers)
    old_values = _values(model, attributes)
    containers = {path: container for path in layers if (container := _container(model, path)) is not None}
    lists = [(vars(owner_at(model, o)), n, path) for path, e in layers.items() for o, n in e["lists"]]
    old_lists = [(store, name, store[name]) for store, name, _ in lists]
    old_modules = [(container, dict(container._modules)) for container in containers.values()]
    finish(model, attributes)
    stubbed = _put_stubs(model, layers)
    for store, name, path in lists:
        gone = set(layers[path]["removed"])
        store[name] = type(store[name])(item for i, item in enumerate(store[name]) if i not in gone)
    for path, container in containers.items():
        _set_modules(container, _kept(container._modules, set(layers[path]["removed"])))
    if optimizer is not None:
        before = [m for _, modules in old_modules for m in modules.values() if m is not None]
        _forget(model, optimizer, [*before, *(old for _, _, old in stubbed)])

    def undo() -> None:
        for container, modules in old_modules:
            _set_modules(container, modules)
        for holder, name, old in stubbed:
            holder._modules[name] = old
        for store, name, value in old_lists:
            store[name] = value
        finish(model, old_values)

    return undo


def _values(model: nn.Module, attributes: Iterable[Attribute]) -> dict[Attribute, int]:
    try:
        return {attribute: read(model, attribute) for attribute in attributes}
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise PlanMismatchError("The plan sets an attribute of a block that it removes.", why=str(error)) from error


def _kept(modules: Mapping[str, nn.Module | None], removed: set[int]) -> dict[str, nn.Module | None]:
    numbered = list(modules) == [str(i) for i in range(len(modules))]
    stay = [(name, module) for i, (name, module) in enumerate(modules.items()) if i not in removed]
    return {str(i) if numbered else name: module for i, (name, module) in enumerate(stay)}


def _set_modules(container: nn.Module, modules: Mapping[str, nn.Module | None]) -> None:
    container._modules.clear()
    container._modules.update(modules)


def _forget(model: nn.Module, optimizer: Optimizer, blocks: Sequence[nn.Module]) -> None:
    here = {id(p) for p in model.parameters()}
    gone = {id(p): p for block in blocks for p in block.parameters() if id(p) not in here}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in gone]
    for parameter in gone.values():
        optimizer.state.pop(parameter, None)


@contextmanager
def dropped(model: nn.Module, layers: Layers, attributes: Mapping[Attribute, int]) -> Iterator[nn.Module]:
    """The model without some blocks and branches, for the time of a with statement; nothing is copied."""
    undo = drop_layers(model, layers, attributes)
    try:
        yield model
    finally:
        undo()


def stand_ins(model: nn.Module, layers: Layers) -> dict[int, object]:
    """What deepcopy puts in the place of what goes, which is then never copied: module id -> an empty module."""
    memo: dict[int, object] = {id(model.get_submodule(name)): nn.Identity() for name in stub_names(layers)}
    for path, entry in layers.items():
        container = _container(model, path)
        for i, block in enumerate(container._modules.values() if container is not None else ()):
            if i in entry["removed"]:
                memo[id(block)] = nn.Identity()
    return memo


# -- identity --------------------------------------------------------------------------------------------------


def block_names(model: nn.Module, layers: Layers) -> list[str]:
    """Qualified names of the blocks that are removed."""
    names = []
    for path, entry in layers.items():
        container = _container(model, path)
        for i, name in enumerate(container._modules if container is not None else ()):
            if i in entry["removed"]:
                names.append(f"{path}.{name}" if path else name)
    return names


def staying(model: nn.Module, layers: Layers) -> tuple[dict[str, str], dict[str, tuple[int, int]]]:
    """Blocks that stay: name before -> name after, and name before -> places before and after."""
    names: dict[str, str] = {}
    places: dict[str, tuple[int, int]] = {}
    renamed = new_names(model, layers)
    for path, entry in layers.items():
        container = _container(model, path)
        before = list(container._modules) if container is not None else []
        for new, old in enumerate(kept_places(entry)):
            name = f"{path}.{before[old]}" if path else before[old]
            after = renamed(f"{name}.")
            if after is not None:
                names[name], places[name] = after.removesuffix("."), (old, new)
    return names, places


def new_names(model: nn.Module, layers: Layers) -> Callable[[str], str | None]:
    """How names of parameters change: a function of the old name, None for what is gone."""
    # Branches first: a block that moves up takes what is left of it along.
    moves: dict[str, str | None] = {f"{name}.": None for name in stub_names(layers)}
    for path, entry in layers.items():
        container = _container(model, path)
        assert container is not None
        old = [name for i, name in enumerate(container._modules) if i not in entry["removed"]]
        fresh = dict(zip(old, _kept(container._modules, set(entry["removed"])), strict=True))
        for name in container._modules:
            start = f"{path}." if path else ""
            moves[f"{start}{name}."] = f"{start}{fresh[name]}." if name in fresh else None

    def renamed(name: str) -> str | None:
        for prefix, target in moves.items():
            if name.startswith(prefix):
                return None if target is None else target + name[len(prefix) :]
        return name

    return renamed


def kept_places(entry: LayerEntry) -> list[int]:
    """Places of the blocks that stay, as numbered before the removal."""
    return [i for i in range(entry["size"]) if i not in entry["removed"]]


def old_names(after: nn.Module, layers: Layers) -> Callable[[str], str]:
    """How names were before blocks went: a function of the name after.

    Args:
        after: the model without the blocks.
        layers: what went, under the names before.
    """
    # From the outside inwards: once the outer stack has its old numbers, the path of an inner one can be compared.
    stacks = sorted(layers.items(), key=lambda item: len(item[0]))

    def named(name: str) -> str:
        for path, entry in stacks:
            start = f"{path}." if path else ""
            head, dot, tail = name[len(start) :].partition(".")
            if name.startswith(start) and head.isdigit() and path not in own:
                name = f"{start}{kept_places(entry)[int(head)]}{dot}{tail}"
        return name

    # Blocks with names of their own keep them; whether they have shows in the container as it is now.
    own: set[str] = set()
    for path, _ in stacks:
        container = _container(after, _name_after(path, layers))
        if container is not None and list(container._modules) != [str(i) for i in range(len(container._modules))]:
            own.add(path)
    return named


def _name_after(path: str, layers: Layers) -> str:
    """The path of a stack once outer stacks have lost blocks."""
    for outer, entry in sorted(layers.items(), key=lambda item: -len(item[0])):
        start = f"{outer}." if outer else ""
        head, dot, tail = path[len(start) :].partition(".")
        if outer != path and path.startswith(start) and head.isdigit():
            path = f"{start}{kept_places(entry).index(int(head))}{dot}{tail}"
    return path
