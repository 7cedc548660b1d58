"""What there is to solve in a model: its stacks of blocks, the matrices inside them, and what stays whole and why."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from secateur.errors import UnsupportedError
from secateur.kinds.weights.found import find_weights
from secateur.kinds.weights.granularity import Granularity
from secateur.kinds.weights.weight import Weight
from secateur.request import Request
from secateur.solve.blocks.products import MatrixSite
from secateur.solve.blocks.sites import Matrix, matrices_of
from secateur.structure.stacks import find_stacks
from secateur.types import Example, LeftOut


class Inventory:
    """The matrices of a model that solvers can take.

    Args:
        model: left as it is.
        example: what one forward takes.
        granularity: element, n:m or block.
        request: what is protected.

    Attributes:
        parameters: of the model, by name.
        stacks: names of the blocks, stack by stack; one block that is the whole model where there is no stack.
        matrices: by site.
        left: what stays whole, by name.

    Raises:
        UnsupportedError: nothing can be solved, or blocks cannot be run by themselves.
    """

    def __init__(self, model: nn.Module, example: Example, granularity: Granularity, request: Request) -> None:
        self.model = model
        self.parameters = dict(model.named_parameters())
        found = find_weights(model, request.protect, example=example)
        self.left: dict[str, LeftOut] = {one.name: one for one in found.left_out}
        self.stacks = self._stacks(example)
        self.matrices = self._matrices(found.weights, granularity)

    def block_of(self, name: str) -> str:
        """The block that a parameter lies in."""
        return next(one for stack in self.stacks for one in stack if not one or name.startswith(f"{one}."))

    def solved_in(self, block: str) -> list[str]:
        """Parameters of a block that are solved."""
        before = f"{block}." if block else ""
        return list(dict.fromkeys(site[0] for site in self.matrices if site[0].startswith(before)))

    def leave(self, name: str, why: str, *, wanted: bool = True) -> None:
        """Say why a parameter stays whole."""
        self.left[name] = LeftOut(name, self.parameters[name].numel(), why, "", wanted)

    def _stacks(self, example: Example) -> list[list[str]]:
        found = []
        for stack in find_stacks(self.model, example).stacks:
            locked = next((block for block in stack.blocks if block.locks), None)
            if locked is not None:
                raise UnsupportedError(
                    f"{stack.path!r} cannot be pruned block by block: {locked.locks[0].reason} ({locked.name}).",
                    hint="use criterion wanda or magnitude, which need no blocks",
                )
            found.append([block.name for block in stack.blocks])
        return found or [[""]]

    def _matrices(self, weights: Sequence[Weight], granularity: Granularity) -> dict[MatrixSite, Matrix]:
        inside = tuple(f"{name}." if name else "" for stack in self.stacks for name in stack)
        found: dict[MatrixSite, Matrix] = {}
        for weight in weights:
            if not weight.name.startswith(inside):
                self.leave(weight.name, "it lies outside of the blocks", wanted=False)
                continue
            several = matrices_of(weight, groups=self._groups(weight))
            if not isinstance(several, str) and granularity.name == "n:m" and several[0].kernel > 1:
                m = int(granularity.options()["m"])  # type: ignore[arg-type]
                several = "its channels are no multiple of m" if weight.matrix_shape[1] % m else several
            if isinstance(several, str):
                self.leave(weight.name, several)
            else:
                found.update({matrix.site: matrix for matrix in several})
        if not found:
            raise UnsupportedError(
                "no weight can be solved.",
                why="; ".join(f"{one.name}: {one.why}" for one in list(self.left.values())[:3]),
            )
        return found

    def _groups(self, weight: Weight) -> int:
        return int(getattr(self.model.get_submodule(weight.name.rpartition(".")[0]), "groups", 1))
