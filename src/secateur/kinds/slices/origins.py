"""Products of weights: whether what they leave out is a unit that was removed, or part of a weight computed anew.

A unit that is removed brings nothing, also where nothing but weights goes through it: the hidden units of a layer that
works on a learned token, the rank of two factors that are merged (`W + B @ A`). The original with that unit masked
leaves it out as well. But a weight that is multiplied with itself (`W @ W.t()`, a power iteration), with a constant
(`W @ ones`) or with another weight that data is multiplied with sums over inputs of a layer, and of those the masked
original has all: masks stand on what comes in, not on the weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from secateur.kinds.slices.gaps import Gaps
from secateur.model.memory import memory_of

# Sums of products: the places of the two factors, and the dimension of each that is summed over.
FACTORS = {
    "mm": ((0, 1), (1, 0)), "addmm": ((1, 1), (2, 0)), "bmm": ((0, 2), (1, 1)), "baddbmm": ((1, 2), (2, 1)),
    "linear": ((0, -1), (1, 1)), "addmv": ((1, 1), (2, 0)), "convolution": ((0, 1), (1, 1)),
}  # fmt: skip
PRODUCTS = frozenset(FACTORS)
SERVES = {  # where a weight or a bias stands among the arguments
    "mm": (1,), "addmm": (0, 2), "linear": (1, 2), "convolution": (1, 2), "embedding": (0,), "mul": (0, 1), "div": (1,),
    "_trilinear": (1,), "_grouped_mm": (1,), "addmv": (0, 1), "baddbmm": (0,), "native_layer_norm": (2, 3),
    "native_group_norm": (1, 2), "native_batch_norm": (1, 2), "_fused_rms_norm": (2,), "rms_norm": (2,),
    "_native_batch_norm_legit": (1, 2), "_native_batch_norm_legit_no_training": (1, 2), "batch_norm": (1, 2),
    "layer_norm": (2, 3), "group_norm": (2, 3),
}  # fmt: skip
ATTENDS = "_scaled_dot_product"
TRANSPOSED, GROUPS = 6, 8  # places of these arguments of a convolution
NOTHING: frozenset[int] = frozenset()


class Lineage(NamedTuple):
    """What a value is made of.

    Args:
        memory: of the weights whose missing slices may be missing in it.
        by_product: whether a product was among the steps.
    """

    memory: frozenset[int] = NOTHING
    by_product: bool = False


class Origins:
    """Of which weights values are made that depend on weights alone.

    Args:
        poisoned: memory of the weights that miss something; they may become more.

    Attributes:
        met: memory of weights that were multiplied with data in any run so far.
    """

    def __init__(self, poisoned: set[int]) -> None:
        self.poisoned = poisoned
        self.met: set[int] = set()
        self._made: dict[int, Lineage] = {}  # by id: whoever calls holds the values for as long as this is asked

    def of(self, tensor: Tensor) -> Lineage:
        """What a value is made of; a weight, or a view of it, of itself."""
        found = self._made.get(id(tensor))
        if found is None:
            memory = memory_of(tensor)
            found = Lineage(frozenset([memory]) if memory in self.poisoned else NOTHING)
        return found

    def made(self, result: Tensor, gaps: Gaps, name: str, args: Sequence[object], operands: Sequence[Tensor]) -> None:
        """Note what the result of an operator is made of."""
        factors = factors_of(name, args)
        # A factor of which only the summed positions were missing leaves nothing missing behind.
        spent = {id(t) for t, dim in factors if self.of(t).memory and not _misses_others(gaps, t, dim)}
        memory = frozenset[int]().union(*(self.of(t).memory for t in operands if id(t) not in spent))
        self._made[id(result)] = Lineage(memory, bool(factors) or any(self.of(t).by_product for t in operands))

    def left_out(self, gaps: Gaps, name: str, args: Sequence[object]) -> Mapping[int, tuple[int, Tensor]]:
        """Place of a factor -> (dimension, positions) that the masked original leaves out of a sum of products too."""
        factors = factors_of(name, args)
        missing = [(t, d, gaps.of(t, d)) for t, d in factors]
        if len(missing) != 2 or any(gone is None for _, _, gone in missing) or self.is_of_inputs(name, args):
            return {}
        places = FACTORS[name]
        return {places[i][0]: (d, gone) for i, (_, d, gone) in enumerate(missing) if gone is not None}

    def is_of_inputs(self, name: str, args: Sequence[object]) -> bool:
        """Whether two factors are summed over what comes into a layer, instead of over what a layer gives."""
        each = [self.of(t) for t, _ in factors_of(name, args)]
        if len(each) != 2:
            return False
        one, other = each
        return bool(one.memory & other.memory) or self.is_token(name, args)

    def is_token(self, name: str, args: Sequence[object]) -> bool:
        """Whether a weight that data is multiplied with meets a plain parameter: a learned token, say."""
        each = [self.of(t) for t, _ in factors_of(name, args)]
        if len(each) != 2 or any(o.by_product or not o.memory for o in each) or each[0].memory & each[1].memory:
            return False
        return bool((each[0].memory | each[1].memory) & self.met)

    def clear(self) -> None:
        """Forget the values of a run."""
        self._made.clear()


def factors_of(name: str, args: Sequence[object]) -> list[tuple[Tensor, int]]:
    """The two factors of a sum of products and the dimension of each that is summed over; none elsewhere."""
    if name not in FACTORS or (name == "convolution" and args[GROUPS] != 1):
        return []
    found = []
    for place, (at, dim) in enumerate(FACTORS[name]):
        factor = args[at]
        if not isinstance(factor, Tensor):
            return []
        if name == "convolution" and place == 1 and args[TRANSPOSED]:
            dim = 0
        found.append((factor, dim % factor.dim()))
    return found


def _misses_others(gaps: Gaps, tensor: Tensor, dim: int) -> bool:
    return any(gaps.of(tensor, d) is not None for d in range(tensor.dim()) if d != dim)
