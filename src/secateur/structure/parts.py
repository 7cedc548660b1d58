"""A model as a person draws it: its modules with weights, how wide each is, and which groups it makes and reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from secateur.model.tensors import named_tensors
from secateur.types import Group, Span

MAKES = ("out", "self")
# These hold their outputs in the second dimension; asked only where no group says which side is which.
_SECOND = ("Conv1D", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "Embedding", "EmbeddingBag")


@dataclass(frozen=True)
class ModulePart:
    """A module with weights of its own.

    Args:
        name: of the module; "" is the model itself.
        kind: its class.
        tensor: its largest weight.
        dim: the dimension of its outputs.
        width: how many there are.
        makes: groups whose units its outputs are.
        reads: groups whose units it reads.
        tensors: all tensors of its own.
    """

    name: str
    kind: str
    tensor: str
    dim: int
    width: int
    makes: tuple[Group, ...]
    reads: tuple[Group, ...]
    tensors: tuple[str, ...]

    @property
    def locked(self) -> str:
        """Why its outputs may not go: the first reason, where no group of them is free; "" where one is."""
        reasons = [group.locks[0].reason for group in self.makes if group.locks]
        return reasons[0] if reasons and len(reasons) == len(self.makes) else ""


def module_parts(model: nn.Module, groups: Sequence[Group]) -> list[ModulePart]:
    """Its modules with a weight of two dimensions or more, in the order in which the model defines them.

    Norms and biases have no width of their own: they go with what they follow, and are no parts.

    Args:
        model: as the groups were found in it.
        groups: free and locked ones; none where the kind of removal knows no slices.

    Cost: one walk over the modules and the spans.
    """
    tensors = named_tensors(model)
    spans: dict[str, list[tuple[Group, Span]]] = {}
    for group in groups:
        for span in group.spans:
            spans.setdefault(span.tensor, []).append((group, span))
    return [
        _part(name, module, own, tensors, spans)
        for name, module in model.named_modules()
        if (own := _own(name, module, tensors))
    ]


def _own(name: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Weights of a module itself that have a width; a tied one belongs to the module that is met first."""
    start = f"{name}." if name else ""
    held = [f"{start}{each}" for each, _ in module.named_parameters(recurse=False)]
    return [each for each in held if each in tensors and tensors[each].dim() > 1]


def _part(
    name: str,
    module: nn.Module,
    own: Sequence[str],
    tensors: Mapping[str, Tensor],
    spans: Mapping[str, Sequence[tuple[Group, Span]]],
) -> ModulePart:
    tensor = max(own, key=lambda each: tensors[each].numel())
    weight, found = tensors[tensor], spans.get(tensor, [])
    # Experts first: what a person counts in a tensor of experts is them, and not the width of each.
    experts = [(group, _dim(span, weight)) for group, span in found if group.granularity == "expert"]
    made = experts + [(group, _dim(span, weight)) for group, span in found if span.role in MAKES]
    usual = 1 if type(module).__name__ in _SECOND else 0
    dim = next((dim for _, dim in made if dim is not None), usual)
    reads = [group for group, span in found if span.role not in MAKES]
    start = f"{name}." if name else ""
    return ModulePart(
        name, type(module).__name__, tensor, dim, weight.shape[dim],
        tuple(dict.fromkeys(group for group, at in made if at == dim)),
        tuple(dict.fromkeys(reads)),
        tuple(each for each in tensors if each.startswith(start) and "." not in each.removeprefix(start)),
    )  # fmt: skip


def _dim(span: Span, weight: Tensor) -> int | None:
    """The one dimension along which a span numbers its units; None where there are several."""
    if span.index is None:
        return None
    along = [dim for dim, size in enumerate(span.index.shape) if size > 1]
    # A single unit numbers nothing that moves: its dimension is the one of that size.
    along = along or [dim for dim, size in enumerate(weight.shape) if size == 1][:1]
    return along[0] if len(along) == 1 else None


def together(groups: Iterable[Group], own: Iterable[str]) -> list[str]:
    """What goes with each group, in words: the tensors of others, norms and biases included."""
    mine, said = set(own), []
    for group in groups:
        others = [span.tensor for span in group.spans if span.tensor not in mine]
        names = list(dict.fromkeys(others))
        more = f" and {len(names) - 12} more" if len(names) > 12 else ""
        if names:
            said.append(
                f"{group.name} ({group.size:,} {group.granularity} units) goes together with "
                + ", ".join(names[:12])
                + more
            )
        else:
            said.append(f"{group.name} ({group.size:,} {group.granularity} units)")
    return said
