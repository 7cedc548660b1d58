"""What a granularity is: it finds the prunable weights of a model and says which elements go together.

Here live the granularities that need nothing but the weights. Channels, heads, neurons, experts and layers
reach across modules: their groups come from the structure engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import ClassVar, TypeVar

from torch import nn

from secateur import words
from secateur.errors import RecipeError
from secateur.kinds.weights.found import find_weights
from secateur.kinds.weights.weight import Weight
from secateur.registry import Registry, option_names
from secateur.types import Example, Group, Json, LeftOut
from secateur.words import SLICES


@dataclass(frozen=True, kw_only=True)
class Granularity(ABC):
    """What is removed. Options are keyword-only constructor arguments (a frozen dataclass).

    A subclass states `name` and `summary` and implements `group`.

    Args:
        embeddings: whether tables of embeddings, and weights that are tied to one, are covered as well.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    single: ClassVar[bool] = False  # whether units are single weights, so that stacks of matrices have them too

    embeddings: bool = False

    @abstractmethod
    def group(self, weight: Weight) -> Group | None:
        """The units of one weight, or None where it has none of this kind."""

    def options(self) -> dict[str, Json]:
        """The constructor's arguments; `embeddings` only where it is asked for."""
        given = {name: getattr(self, name) for name in option_names(type(self))}
        return {name: value for name, value in given.items() if name != "embeddings" or value}

    def groups(self, model: nn.Module, protect: Collection[str] = (), example: Example = None) -> list[Group]:
        """Units of every prunable weight, in the order of the model's modules; see `found` for what is left out."""
        return self.found(model, protect, example)[0]

    def found(
        self, model: nn.Module, protect: Collection[str] = (), example: Example = None
    ) -> tuple[list[Group], tuple[LeftOut, ...]]:
        """Units of every prunable weight, and the weights that have none.

        Prunable is every floating-point parameter of two or more dimensions that takes part in a product: weights of
        Linear, Conv1d to 3d, ConvTranspose1d to 3d, Bilinear, recurrent layers and cells, the projections of
        MultiheadAttention, Conv1D of transformers, and what user code multiplies itself (fused experts, raw
        parameters), where an example shows it. Norms and biases never are; embeddings, and what is tied to one, where
        the option `embeddings` asks for them. Tied weights come once, under their first name, and protecting any of
        their names protects them.

        Args:
            model: the model.
            protect: names of parameters or modules, with shell wildcards, "type:ClassName" for all modules
                of a class, or "tag:WORD" for modules with that tag, that are left out.
            example: what one forward takes.

        Returns:
            The groups, and what is left out, each with its reason.

        Raises:
            RecipeError: a pattern of `protect` matches nothing.
            InputError: a weight of a lazy module that has no shape yet.
            UnsupportedError: the model carries masks of torch; see `secateur.import_masks`.

        Cost:
            No weight is read. Index tensors are small, but 8 bytes per element for strips and blocks. One capture of
            the forward where user code holds parameters itself.
        """
        known = find_weights(model, protect, example=example, embeddings=self.embeddings)
        units = [(weight, self._units(weight)) for weight in known.weights]
        without = [LeftOut(w.name, prod(w.shape), *self._why(w)) for w, group in units if group is None]
        return [group for _, group in units if group is not None], (*known.left_out, *without)

    def _units(self, weight: Weight) -> Group | None:
        return self.group(weight) if weight.matrix or self.single else None

    def _why(self, weight: Weight) -> tuple[str, str, bool]:
        """Reason, hint, and whether the weight was asked for."""
        if weight.matrix:
            return f"it has no units of granularity {self.name!r}", "", False
        return (
            f"granularity {self.name!r} splits matrices, and this is a stack of them or of unknown layout",
            "use granularity element, or protect it",
            True,
        )


def is_within(name: str, patterns: Collection[str]) -> bool:
    """Whether a qualified name, or a module that holds it, matches one of the patterns.

    Example:
        >>> is_within("encoder.0.fc.weight", ["encoder.*.fc"])
        True
    """
    parts = name.split(".")
    prefixes = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return any(fnmatchcase(prefix, pattern) for prefix in prefixes for pattern in patterns)


GRANULARITIES: Registry[type[Granularity]] = Registry("granularity", "granularities")
G = TypeVar("G", bound=Granularity)


def register(cls: type[G]) -> type[G]:
    """Class decorator: make a granularity known under its name."""
    return GRANULARITIES.register(cls.name)(cls)


names = GRANULARITIES.names


def parse(spec: str | Mapping[str, object] | Granularity) -> Granularity:
    """A granularity from its short form.

    Args:
        spec: a name ("element"), an n:m pattern ("2:4", 2 kept of each 4), a mapping with `name` and options,
            or a `Granularity`, which is returned as it is.

    Raises:
        RecipeError: unknown name or option; the hint names the nearest one.

    Example:
        >>> parse("2:4").options()
        {'n': 2, 'm': 4}
        >>> parse({"name": "block", "shape": [4, 4]}).options()
        {'shape': (4, 4)}
    """
    if isinstance(spec, Granularity):
        return spec
    meant = words.translated(spec, words.GRANULARITIES)
    options = dict(meant) if isinstance(meant, Mapping) else {"name": meant}
    name = str(options.pop("name", ""))
    n, colon, m = name.partition(":")
    if colon and n.strip().isdecimal() and m.strip().isdecimal():
        name, options = "n:m", {"n": int(n), "m": int(m), **options}
    if name in STRUCTURAL:
        raise RecipeError(
            f"units of granularity {name!r} come from the structure engine, not from the weights alone",
            hint="use inspect(model, example) or plan(model, example, ...)",
        )
    if name not in GRANULARITIES and name in words.ABOUT_GRANULARITIES:
        raise RecipeError(f"unknown granularity {name!r}", hint=words.ABOUT_GRANULARITIES[name])
    return GRANULARITIES.build(name, options, also=(*STRUCTURAL, "structured", "2:4"))


STRUCTURAL = (*SLICES, "expert", "layer", "sub_block")
