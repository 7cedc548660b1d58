"""What a granularity is: it finds the prunable weights of a model and says which elements go together.

Here live the granularities that need nothing but the weights. Channels, heads, neurons, experts and layers
reach across modules: their groups come from the structure engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from secateur.errors import InputError, RecipeError
from secateur.model.carried import refuse_carried_masks
from secateur.model.protect import protected
from secateur.registry import Registry, option_names
from secateur.types import Group, Json, Span

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight that can be pruned.

    Args:
        name: qualified name of the parameter, the first one where it is tied.
        shape: its shape.
        transposed: False for [out, in, ...], True for [in, out, ...] (ConvTranspose, Conv1D of transformers).
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """The shape as [out, in, ...]."""
        return (self.shape[1], self.shape[0], *self.shape[2:]) if self.transposed else self.shape

    def oriented(self, index: Tensor) -> Tensor:
        """Turn an index over [out, in, ...] into one over the parameter's own layout (a view)."""
        return index.transpose(0, 1) if self.transposed else index

    def group(self, granularity: str, shape: tuple[int, ...], index: Tensor | None, **attributes: Any) -> Group:
        """The group of this weight; `index` is over [out, in, ...]."""
        own = None if index is None else self.oriented(index)
        axes = {"out_dim": int(self.transposed), "in_dim": int(not self.transposed)}
        return Group(self.name, granularity, shape, (Span(self.name, own, "self"),), attributes={**axes, **attributes})


class Granularity(ABC):
    """What is removed. Options are keyword-only constructor arguments (a frozen dataclass).

    A subclass states `name` and `summary` and implements `group`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]

    @abstractmethod
    def group(self, weight: Weight) -> Group | None:
        """The units of one weight, or None where it has none of this kind."""

    def options(self) -> dict[str, Json]:
        """The constructor's arguments."""
        return {name: getattr(self, name) for name in option_names(type(self))}

    def groups(self, model: nn.Module, protect: Collection[str] = ()) -> list[Group]:
        """Units of every prunable weight, in the order of the model's modules.

        Prunable are the weights of Linear, Conv1d to 3d, ConvTranspose1d to 3d, the projections of
        MultiheadAttention and Conv1D of transformers. Norms, biases and embeddings never are, nor is a Linear
        whose weight is tied to an embedding. Tied weights come once, under their first name, and protecting
        any of their names protects them.

        Args:
            model: the model.
            protect: names of parameters or modules, with shell wildcards, "type:ClassName" for all modules
                of a class, or "tag:WORD" for modules with that tag, that are left out.

        Raises:
            RecipeError: a pattern of `protect` matches nothing.
            InputError: a weight of a lazy module that has no shape yet.
            UnsupportedError: the model carries masks of torch; see `secateur.import_masks`.

        Cost:
            No weight is read. Index tensors are small, but 8 bytes per element for strips and blocks.
        """
        found = (self.group(weight) for weight in prunable_weights(model, protect))
        return [group for group in found if group is not None]


def prunable_weights(model: nn.Module, protect: Collection[str] = ()) -> list[Weight]:
    """Weights that granularities split into units; see `Granularity.groups` for the rules."""
    # A weight that torch masks is no parameter, and its layer would be left out without a word.
    refuse_carried_masks(model)
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    spared = embedded.union(protected(model, protect))
    weights: dict[str, Weight] = {}
    for parameter, transposed in _candidates(model):
        names = aliases[id(parameter)]
        name = names[0]
        if isinstance(parameter, UninitializedParameter):
            raise InputError(f"{name!r} has no shape yet", hint="run one forward pass before pruning")
        if id(parameter) not in spared:
            weights.setdefault(name, Weight(name, tuple(parameter.shape), transposed))
    return list(weights.values())


def is_within(name: str, patterns: Collection[str]) -> bool:
    """Whether a qualified name, or a module that holds it, matches one of the patterns.

    Example:
        >>> is_within("encoder.0.fc.weight", ["encoder.*.fc"])
        True
    """
    parts = name.split(".")
    prefixes = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return any(fnmatchcase(prefix, pattern) for prefix in prefixes for pattern in patterns)


def _candidates(model: nn.Module) -> Iterator[tuple[nn.Parameter, bool]]:
    for module in model.modules():
        # By class name: transformers need not be installed, and older versions keep the class elsewhere.
        conv1d = any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers") for c in type(module).__mro__)
        if isinstance(module, nn.MultiheadAttention):
            attributes: tuple[str, ...] = ATTENTION_WEIGHTS
        elif conv1d or isinstance(module, LAYERS):
            attributes = ("weight",)
        else:
            continue
        for attribute in attributes:
            parameter = module._parameters.get(attribute)
            if parameter is not None:
                yield parameter, conv1d or isinstance(module, TRANSPOSED)


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
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = str(options.pop("name", ""))
    n, colon, m = name.partition(":")
    if colon and n.strip().isdecimal() and m.strip().isdecimal():
        name, options = "n:m", {"n": int(n), "m": int(m), **options}
    if name in STRUCTURAL:
        raise RecipeError(
            f"units of granularity {name!r} come from the structure engine, not from the weights alone",
            hint="use inspect(model, example) or plan(model, example, ...)",
        )
    return GRANULARITIES.build(name, options, also=(*STRUCTURAL, "2:4"))


STRUCTURAL = ("channel", "neuron", "head", "head_dim", "conv_group", "expert", "layer")


def positive(option: str, value: object) -> int:
    """A whole number of at least one.

    Raises:
        RecipeError: anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise RecipeError(f"{option}={value!r} is not a whole number of at least 1")
    return value
