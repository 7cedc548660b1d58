"""What a run makes of how many experts there are, by tensors: a mean over them, a sum of ones, a uniform softmax.

No plain number of the code tells such a count, and where it is compared or bounded the outputs may not show it. So
results themselves are held against each other, call by call: those of the reference, whose router cannot choose what is
gone, and those of the cut model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import CertificateError
from secateur.kinds.numbers_used import HINT, NumbersUsed, Site, Used
from secateur.structure.rules.base import MOVED

FEW = 4096  # numbers of a result that are kept whole; of more, some positions of each dimension
SOME = 16  # positions
# Whole numbers are positions of experts, which follow; these make another thing of them.
SUMS = ("sum", "count_nonzero", "prod", "trace", "dot")
# Memory that nobody has written to holds anything, and parts of a tensor say no more than the whole.
NOTHING = (MOVED - {"_to_copy"}) | {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "slice",
                                    "select", "as_strided", "split", "split_with_sizes", "unbind"}  # fmt: skip
SAME = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
ROUNDING = 1e-5  # of what went in: what is left of a difference of two numbers that are alike


@dataclass(frozen=True, eq=False)
class EqualBlocks:
    """Blocks of one number of experts.

    Args:
        stay: of each block, which of its experts stay.
    """

    stay: Sequence[Tensor]

    @property
    def sizes(self) -> tuple[int, int]:
        """Experts before and after."""
        return len(self.stay[0]), int(self.stay[0].sum())


@dataclass(frozen=True, eq=False)
class Values:
    """Which results are held against each other, and how.

    Args:
        experts: one entry for each number of experts that shrinks.
    """

    experts: Sequence[EqualBlocks]

    def part(self, name: str, result: Tensor, operands: Sequence[Tensor]) -> Tensor | None:
        """What is kept of a result: nothing of what was moved or is a position."""
        made = result.is_floating_point() and not (name == "_to_copy" and not operands[0].is_floating_point())
        if name in NOTHING or not (made or name in SUMS) or result.layout is not torch.strided:
            return None
        whole = {size for experts in self.experts for size in experts.sizes}
        if result.numel() > FEW:
            steps = (1 if n in whole else max(1, n // SOME) for n in result.shape)
            result = result[tuple(slice(None, None, step) for step in steps)]
        return result.detach().clone() if result.numel() <= FEW * SOME else None

    def require_same(self, before: NumbersUsed, after: NumbersUsed) -> None:
        """Refuse a cut model that comes to other numbers somewhere.

        A loop over experts runs less often once some are gone: then each result has to be one of the reference's.

        Raises:
            CertificateError: names the line.
        """
        for site, left in after.calls.items():
            calls = before.calls.get(site, [])
            for n, call in enumerate(left):
                others = [calls[n]] if len(calls) == len(left) else calls
                if call.result is not None and others and not any(self._fits(one, call) for one in others):
                    raise _refused(site)

    def _fits(self, one: Used, other: Used) -> bool:
        if one.result is None or other.result is None:
            return True
        ways = list(self._at_kept(one.result, other.result))
        return not ways or any(_is_same(way, other.result, max(one.size_in, other.size_in)) for way in ways)

    def _at_kept(self, before: Tensor, after: Tensor) -> Iterator[Tensor]:
        """The reference's result at the experts that stay; nothing where nobody can tell which positions these are."""
        if before.shape == after.shape:
            yield before
        elif before.dim() == after.dim():
            pairs = list(zip(before.shape, after.shape, strict=True))
            differ = {pair for pair in pairs if pair[0] != pair[1]}
            for experts in self.experts:
                for stay in experts.stay if differ == {experts.sizes} else ():
                    part, positions = before, stay.to(before.device).nonzero().flatten()
                    for d, (a, b) in enumerate(pairs):
                        part = part.index_select(d, positions) if a != b else part
                    yield part


def values_of(stay: Mapping[int, Sequence[Tensor]]) -> Values:
    """Of blocks by their number of experts: which of them stay in each block."""
    return Values([EqualBlocks(each) for each in stay.values()])


def _is_same(a: Tensor, b: Tensor, size_in: float) -> bool:
    """Up to rounding; what is no number in the reference has to be none in the cut model."""
    if not a.is_floating_point():
        return torch.equal(a, b.to(a.dtype))
    finite = torch.isfinite(a)
    if not torch.equal(finite, torch.isfinite(b)):
        return False
    error = torch.where(finite, a - b, 0).abs().double()
    size = torch.where(finite, a, 0).abs().double()
    if not error.numel():
        return True
    return float(error.max()) <= SAME.get(a.dtype, 1e-3) * float(size.max()) + ROUNDING * size_in


def _refused(site: Site) -> CertificateError:
    return CertificateError(
        "The function of what is left would change with the cut, also where the example does not show it.",
        why=f"{site[0]} comes to another number once experts are gone (in {site[1]}): it counts them, or takes a mean "
        "over all of them",
        hint=HINT,
    )
