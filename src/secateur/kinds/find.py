"""From granularities to the kind that knows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from secateur.errors import RecipeError
from secateur.kinds.base import Candidates
from secateur.kinds.experts.kind import Experts
from secateur.kinds.layers.kind import LayerStacks
from secateur.kinds.layers.sub_blocks import SubBlocks
from secateur.kinds.slices.kind import Slices
from secateur.kinds.weights.kind import Weights
from secateur.request import Named, Request
from secateur.types import Example
from secateur.words import SLICES

STRUCTURED = "structured"  # one word for slices of every kind in one ranking
# Without head_dim: its cut changes the scale 1 / sqrt(head_dim), and kernels may want queries and values alike in it.
WORD = ("channel", "neuron", "head", "conv_group")
KINDS: Mapping[str, type[Candidates]] = {
    **dict.fromkeys(SLICES, Slices),
    "expert": Experts,
    "layer": LayerStacks,
    "sub_block": SubBlocks,
}


def is_physical(granularity: tuple[Named, ...]) -> bool:
    """Whether units of these granularities are removed for real, rather than set to zero."""
    return all(choice.name in KINDS or choice.name == STRUCTURED for choice in granularity)


def spelt_out(granularity: tuple[Named, ...]) -> tuple[Named, ...]:
    """The same granularities with the word for all slices replaced by their names."""
    slices = tuple(Named(name) for name in WORD)
    several = [slices if choice.name == STRUCTURED else (choice,) for choice in granularity]
    return tuple({str(choice.spec()): choice for choices in several for choice in choices}.values())


def kind_of(granularity: tuple[Named, ...]) -> type[Candidates]:
    """The kind that finds units of these granularities.

    Raises:
        RecipeError: they belong to several kinds, or masks of several granularities are asked for at once.
    """
    kinds = {KINDS.get(choice.name, Weights) for choice in spelt_out(granularity)}
    if len(kinds) > 1 or (kinds == {Weights} and len(granularity) > 1):
        words = ", ".join(choice.name for choice in granularity)
        raise RecipeError(
            f"granularity [{words}] cannot be ranked in one plan.",
            why=f"in one ranking stand {', '.join(SLICES)}; experts, layers and masks are decided by themselves",
            hint="Make one plan after the other and compose them: first.then(second, model).",
        )
    return kinds.pop()


def find(model: nn.Module, example: Example, request: Request, examples: Sequence[Example] = ()) -> Candidates:
    """What may go from a model at the granularities that are asked for.

    Raises:
        RecipeError: an unknown granularity, several kinds at once, or no example where one is needed.
        UnsupportedError: nothing of the kind may go; says what is locked and why.
    """
    kind = kind_of(request.granularity)
    if kind.physical and example is None:
        raise RecipeError(
            f"granularity {request.what!r} needs an example.", hint="Pass example=the inputs of one forward pass."
        )
    return kind(model, example, request, examples) if kind.physical else kind(model, example, request)
