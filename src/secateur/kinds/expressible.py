"""Cuts that a Hugging Face config can express: groups that one field sizes shrink together, to one width."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from math import lcm

from torch import nn

from secateur.errors import CertificateError, RecipeError, UnsupportedError
from secateur.integrations.transformers import (
    Edits,
    Field,
    Shapes,
    build_shapes,
    edited,
    fields_of,
    is_native,
    is_transformers,
    scaled_value,
    shapes_of,
    solutions,
)
from secateur.kinds.base import Family
from secateur.request import Request
from secateur.structure.axes import leaves, size_after
from secateur.structure.groups import Structure
from secateur.structure.provenance import Attribute
from secateur.types import Example, Group

MOST = 130  # tried steps of a width


def require_transformers(model: nn.Module) -> None:
    """Refuse models without a config that rebuilds them.

    Raises:
        RecipeError: it is no Hugging Face model.
        UnsupportedError: its config does not give its shapes, as after an earlier cut.
    """
    if not is_transformers(model):
        raise RecipeError(
            f"expressible=True needs a Hugging Face model; {type(model).__name__} has no config.",
            hint="Leave it out: any model is loaded again with secateur.load().",
        )
    if build_shapes(model, model.config) != shapes_of(model):
        raise UnsupportedError(
            f"{type(model).__name__} built from its config has other shapes than this model.",
            hint="Start from a model as from_pretrained returns it.",
        )


def families(
    model: nn.Module, found: Structure, groups: Sequence[Group], same: Callable[[tuple[str, ...], int, Edits], bool]
) -> list[tuple[Family, tuple[Field, ...]]]:
    """Find which groups the fields of the config size, by building the model anew with one or two fields changed.

    Args:
        model: the original.
        found: its structure.
        groups: the groups that may belong to a family.
        same: whether the model with these groups cut to this count is the one that these edits build: shapes can agree
            by accident, and a scale or a table of angles can depend on a field too.

    Cost: one model on the meta device per integer of the config that has to do with the size of a group; one trial
    cut per family.
    """
    result: list[tuple[Family, tuple[Field, ...]]] = []
    places = {g.name: _places(found, g) for g in groups}
    for size in sorted({g.size for g in groups}):
        names = [g.name for g in groups if g.size == size]
        mine = set().union(*(places[n] for n in names))
        # Half first, which architectures accept more often: heads want to divide a width.
        for wanted in dict.fromkeys(n for n in (size // 2, size - 1) if n >= 1):
            for edits, shapes in _trials(model, size, wanted, mine):
                left = [n for n in names if not any(n in family.groups for family, _ in result)]
                members = tuple(_explained(model, found, left, places, shapes, wanted))
                if members and same(members, wanted, edits):
                    step = _step(model, found, members, edits, size)
                    result.append((Family(_words(tuple(edits)), members, size, step), tuple(edits)))
    return result


def _step(model: nn.Module, found: Structure, members: Sequence[str], edits: Edits, size: int) -> int:
    """The least number of units that may go: some sizes must be multiples of others."""
    values = dict(fields_of(model.config))
    for step in range(1, min(size, MOST)):
        counts = {found.atoms[n].id: size - step for n in members}
        new = {field: (values[field] or size) * (size - step) // size for field in edits}
        if build_shapes(model, edited(model.config, new)) == predicted(model, found, counts):
            return step
    return size // 2


def _places(found: Structure, group: Group) -> set[tuple[str, int]]:
    atom = found.atoms[group.name].id
    return {
        (name, d)
        for name, axes in found.tensors.items()
        for d, axis in enumerate(axes)
        if any(leaf.id == atom for leaf in leaves(axis))
    }


def _trials(
    model: nn.Module, size: int, wanted: int, mine: set[tuple[str, int]]
) -> Iterator[tuple[Edits, dict[str, tuple[int, ...]]]]:
    """Builds with one field, then with two fields, scaled as the size of the groups is."""
    whole = shapes_of(model)
    useful: list[Edits] = []
    for field, value in fields_of(model.config):
        if value is not None and value % size:
            continue
        scaled = scaled_value(field, value, size, wanted)
        if scaled is None or scaled == value:
            continue
        shapes = build_shapes(model, edited(model.config, {field: scaled}))
        if shapes is None:  # not by itself: together with another field it may build
            useful.append({field: scaled})
            continue
        changed = _changed(whole, shapes)
        if changed and changed <= mine | _elsewhere(mine, changed):
            useful.append({field: scaled})
            yield {field: scaled}, shapes
    for two in combinations(useful, 2):
        shapes = build_shapes(model, edited(model.config, {**two[0], **two[1]}))
        if shapes is not None:
            yield {**two[0], **two[1]}, shapes


def _elsewhere(mine: set[tuple[str, int]], changed: set[tuple[str, int]]) -> set[tuple[str, int]]:
    """Changed dimensions of names that the record does not list: second names of tied tensors, unused ones."""
    known = {name for name, _ in mine}
    return {place for place in changed if place[0] not in known} if changed & mine else set()


def _changed(before: Shapes, after: Shapes) -> set[tuple[str, int]]:
    if before.keys() != after.keys() or any(len(before[n]) != len(after[n]) for n in before):
        return set()
    return {(n, d) for n in before for d, (a, b) in enumerate(zip(before[n], after[n], strict=True)) if a != b}


def _explained(
    model: nn.Module,
    found: Structure,
    names: Sequence[str],
    places: Mapping[str, set[tuple[str, int]]],
    shapes: Shapes,
    wanted: int,
) -> list[str]:
    """The groups that, cut to `wanted` units each, give exactly these shapes; empty where none do."""
    changed = _changed(shapes_of(model), shapes)
    members = [n for n in names if places[n] and places[n] <= changed]
    counts = {found.atoms[n].id: wanted for n in members}
    return members if members and predicted(model, found, counts) == shapes else []


def predicted(model: nn.Module, found: Structure, counts: Mapping[int, int]) -> dict[str, tuple[int, ...]]:
    """State dict shapes after a cut that leaves `counts` of every atom."""
    result = {}
    for name, shape in shapes_of(model).items():
        axes = found.tensors.get(found.trace.aliases.get(name, name))
        result[name] = shape if axes is None else tuple(size_after(axis, counts) for axis in axes)
    return result


class FieldFamilies:
    """Which groups of a model the fields of its config size, and what the fields become.

    Args:
        model: the original.
        found: its structure.
        groups: the groups that compete.
        request: what was asked.
        builds: whether these groups, cut to a count, are the model that these integers of the config build.

    Raises:
        RecipeError: no Hugging Face model, or a threshold, which gives every group its own width.
        UnsupportedError: no field sizes any of the groups.
    """

    def __init__(
        self,
        model: nn.Module,
        found: Structure,
        groups: Sequence[Group],
        request: Request,
        builds: Callable[[tuple[str, ...], int, Mapping[Attribute, int]], bool],
    ) -> None:
        require_transformers(model)
        self.model, self.found = model, found
        sized = families(model, found, groups, lambda names, count, e: builds(names, count, attributes_of(model, e)))
        if not sized:
            raise UnsupportedError(
                f"No field of {type(model.config).__name__} sizes the groups of this granularity.",
                why="from_pretrained builds equal widths only, from its config",
                hint="Cut neurons (intermediate_size), or leave expressible out and load with secateur.load().",
            )
        kinds = {group.name: group.granularity for group in groups}
        self.fields = {family.name: fields for family, fields in sized}
        self.families = [
            replace(family, step=lcm(family.step, request.grid(family.size, kinds[family.groups[0]])))
            for family, _ in sized
        ]

    def attributes(self, counts: Mapping[int, int]) -> dict[Attribute, int]:
        """Integers of the config that follow a choice.

        Args:
            counts: atom id -> kept units; absent atoms are whole.

        Raises:
            UnsupportedError: the architecture refuses the sizes.
        """
        values = dict(fields_of(self.model.config))
        edits: Edits = {}
        for family in self.families:
            kept = counts.get(self.found.atoms[family.groups[0]].id, family.size)
            for name in self.fields[family.name]:
                old = edits.get(name, values[name])
                edits[name] = (family.size if old is None else old) * kept // family.size
        edits = {name: value for name, value in edits.items() if value != (values[name] or -1)}
        if build_shapes(self.model, edited(self.model.config, edits)) != predicted(self.model, self.found, counts):
            raise _unbuilt(self.model)
        return attributes_of(self.model, edits)


def _words(fields: Sequence[Field]) -> str:
    return "+".join(".".join(map(str, name)) for name in fields)


def attributes_of(model: nn.Module, edits: Mapping[Field, int]) -> dict[Attribute, int]:
    """Edits of the config as attributes of the model."""
    result = {}
    for field, value in edits.items():
        path = [str(part) for part in field if isinstance(part, str)]
        item = field[-1] if isinstance(field[-1], int) else None
        result[Attribute(".".join(["config", *path[:-1]]), path[-1], item)] = value
    return result


def searched(model: nn.Module, wanted: Shapes, start: object) -> dict[Attribute, int]:
    """Integers of the config `start` to set, so that `from_pretrained` builds these shapes.

    Raises:
        UnsupportedError: no edit of the config does.
    """
    edits = next(solutions(model, wanted, start=start), None)
    if edits is None:
        raise _unbuilt(model)
    return attributes_of(model, edits)


def _unbuilt(model: nn.Module) -> UnsupportedError:
    return UnsupportedError(
        f"No {type(model.config).__name__} builds the shapes of this cut.",
        why="the architecture wants some sizes to be multiples of others",
        hint="Use round_to (for example 8), or leave expressible out and load with secateur.load().",
    )


def require_native(cut: nn.Module, example: Example) -> None:
    """Refuse a cut model whose config rebuilds another function.

    Raises:
        CertificateError: it does, although all shapes agree.
    """
    if not is_native(cut, cut.config, example):
        raise CertificateError(
            f"{type(cut).__name__} built from the new config gives other outputs than the cut model.",
            why="something beside the shapes depends on what was cut, such as a table of angles made from head_dim",
            hint="Choose another granularity, or leave expressible out and load with secateur.load().",
        )
