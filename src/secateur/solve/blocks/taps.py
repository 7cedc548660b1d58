"""Where a block adds what it computed to what it was given: the sums that end its sub-blocks, attention and MLP.

No module is known by name. A sum of two tensors of the hidden state's shape ends a sub-block where one of them was
there before the first of its weights was multiplied: it was led past them, as only a residual connection does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.solve.blocks.products import Products
from secateur.structure.sums import HiddenSums

END = -1


@dataclass(frozen=True)
class SubBlock:
    """A sub-block.

    Args:
        sum: number of the sum that ends it, among those of the hidden state's shape; -1 = the output of the block.
        branch: which operand it computed, 0 or 1.
        names: parameters that it multiplies, of those that were asked for.
    """

    sum: int
    branch: int
    names: tuple[str, ...]


class _EnoughError(BaseException):
    """Ends a forward whose last wanted sum is there; no handler of a model's code catches it."""


class _Finder(HiddenSums):
    """Tells which sums end a sub-block, while `Products` reports the products."""

    def __init__(self, shape: torch.Size, given: Tensor) -> None:
        super().__init__(shape)
        self.parts: list[SubBlock] = []
        self.names: list[str] = []
        self.count, self._products, self._start = 0, 0, 0
        self._age: dict[int, int] = {}
        self._alive: list[Tensor] = []  # addresses of what is alive are not given out again
        self.made(given)

    def product(self, name: str) -> None:
        """A weight is about to be multiplied."""
        self._products += 1
        if name not in self.names:
            self.names.append(name)

    def made(self, found: object) -> None:
        """Note when a tensor came to be."""
        for value in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(value, Tensor) and value.layout == torch.strided:
                self._alive.append(value)
                self._age.setdefault(value.untyped_storage().data_ptr(), self._products)

    def before(self, operands: Sequence[Tensor], *, writes: bool) -> list[int]:
        """Their ages."""
        return [self._age.get(one.untyped_storage().data_ptr(), self._products) for one in operands]

    def met(self, known: list[int], total: Tensor) -> Tensor:
        """A sum ends a sub-block where one operand was there before its first product, and the other was not."""
        self._alive.append(total)
        self._age[total.untyped_storage().data_ptr()] = self._products
        # Branches side by side are summed first: none of the two operands is older than their products.
        if min(known) <= self._start < max(known):
            self.parts.append(SubBlock(self.count, int(known[1] > known[0]), tuple(self.names)))
            self.names, self._start = [], self._products
        self.count += 1
        return total


def find_parts(
    run: Callable[[Tensor], Tensor], hidden: Tensor, parameters: Mapping[str, nn.Parameter]
) -> tuple[SubBlock, ...]:
    """The sub-blocks of a block, in the order in which they run.

    Args:
        run: the block on a hidden state.
        hidden: one batch; not changed.
        parameters: those whose products count.

    Returns:
        one part per residual branch; the block as a whole where there is none.

    Cost: one forward pass, all of whose tensors are alive at once.
    """
    given = hidden.clone()
    finder = _Finder(hidden.shape, given)
    with torch.no_grad(), Products(parameters, lambda use: finder.product(use.site[0])), finder:
        run(given)
    rest = (SubBlock(END, 0, tuple(finder.names)),) if finder.names else ()
    return (*finder.parts, *rest)


class _Reader(HiddenSums):
    """Keeps both sides of some sums, and stops behind the last."""

    def __init__(self, shape: torch.Size, wanted: Mapping[int, int], *, stop: bool) -> None:
        super().__init__(shape)
        self.wanted, self.stop, self.count = wanted, stop, 0
        self.found: dict[int, tuple[Tensor, Tensor]] = {}

    def before(self, operands: Sequence[Tensor], *, writes: bool) -> Tensor | None:
        """The branch, where it is wanted."""
        place = self.wanted.get(self.count)
        if place is None:
            return None
        return operands[place].clone() if writes else operands[place]

    def met(self, known: Tensor | None, total: Tensor) -> Tensor:
        """Keep branch and total where they are wanted."""
        number, self.count = self.count, self.count + 1
        if known is not None:
            self.found[number] = (known, total)
            if self.stop and len(self.found) == len(self.wanted):
                raise _EnoughError
        return total


def read_parts(
    run: Callable[[Tensor], Tensor], hidden: Tensor, parts: Sequence[SubBlock]
) -> list[tuple[Tensor, Tensor]]:
    """What each part adds to the hidden state, and the hidden state behind it; for a whole block its output twice.

    Args:
        run: the block on a hidden state.
        hidden: one batch; a copy of which the block may write into.
        parts: of that block.
    """
    wanted = {part.sum: part.branch for part in parts if part.sum != END}
    reader = _Reader(hidden.shape, wanted, stop=len(wanted) == len(parts))
    output: Tensor | None = None
    try:
        with reader:
            output = run(hidden)
    except _EnoughError:
        pass
    found = []
    for part in parts:
        if part.sum != END:
            found.append(reader.found[part.sum])
        else:
            assert output is not None
            found.append((output, output))
    return found
