"""Zeros in place: single weights, patterns, vectors, kernels, blocks. Shapes stay."""

from __future__ import annotations

from torch import nn

from secateur.errors import RecipeError, UnsupportedError
from secateur.kinds.base import Candidates, Keep, Left
from secateur.kinds.edit import Edit
from secateur.kinds.weights.granularity import Granularity, parse
from secateur.masks import expand
from secateur.request import PROOF, Efforts, Request
from secateur.types import Certificate, Example

COUNTED = ("sparsity", "count", "threshold")  # targets in units, which masks know


def not_of_masks(what: str, granularity: str) -> RecipeError:
    """What is said where a target asks masks for what zeros do not save."""
    return RecipeError(
        f"target {what!r} does not apply to masks.",
        why=f"granularity {granularity!r} writes zeros; it does not remove {what}",
        hint="Use sparsity, count or threshold, or a granularity that is cut: channel, neuron, head.",
    )


class Weights(Candidates):
    """Units of the prunable weights, by one granularity."""

    physical = False
    unread = ("min_keep_fraction", "round_to", "scales", "proof", "dtype", "tolerance")

    def __init__(self, model: nn.Module, example: Example, request: Request, unit: Granularity | None = None) -> None:
        super().__init__(model, example, request)
        self.unit = parse(request.granularity[0].spec()) if unit is None else unit
        if request.expressible:
            raise RecipeError("expressible=True belongs to cuts; masks leave every shape as it is.")
        self.groups, self.left_out = self.unit.found(model, request.protect, example)
        if not self.groups:
            first = self.left_out[:3]
            raise UnsupportedError(
                f"{type(model).__name__} has no weights to mask at granularity {self.unit.name!r}.",
                why="; ".join(f"{one.name}: {one.why}" for one in first),
                hint=next((one.hint for one in first if one.hint), "")
                or "Weights that take part in a product are masked; check `protect`.",
            )

    def price(self, what: str, left: Left) -> int:
        """Not asked: zeros are multiplied like other numbers.

        Raises:
            RecipeError: always; says which targets apply.
        """
        raise not_of_masks(what, self.unit.name)

    def write(self, keep: Keep) -> Edit:
        """Masks of the parameters."""
        return Edit(masks={name: mask.clone() for name, mask in expand(self.groups, keep, model=self.model).items()})

    def prove(
        self,
        whole: nn.Module,
        cut: nn.Module,
        keep: Keep,
        *,
        dtype: str,
        tolerance: float | None,
        effort: Efforts = PROOF,
        edit: Edit | None = None,
    ) -> Certificate:
        """Nothing to prove: no slice moves.

        Raises:
            TypeError: always; plans of masks hold no proof.
        """
        raise TypeError("masks need no certificate")
