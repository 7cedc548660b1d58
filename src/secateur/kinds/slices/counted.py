"""Sums that tell how many units there are, whatever the data: of what always holds, of weights that add up.

A width that the code asks for (`x.shape[-1]`) is watched in `widths`. The same number comes of `(h == h).sum(-1)`, of
`(h * 0 + 1).sum(-1)` and of attention that is summed over its keys and heads. Both proofs sum over what is kept, so
they agree; what the function was before is another number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType

import torch
from torch import Tensor

from secateur.model.place import users_functions, users_step

SUMS = ("sum", "nansum", "count_nonzero", "linalg_vector_norm", "norm", "prod", "logsumexp")
SHARED_OUT = ("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax")  # alike units get one over them
ALIKE = 1e-4  # so far apart, relative to them, may the shares of units be that are one number: rows of a softmax
FEW = 8  # units of which the first look says whether they may be zeros and ones
Width = tuple[int, int]  # units before and after
Site = tuple[tuple[str, int], Width]


@dataclass
class Counted:
    """Calls that counted units, as far as the runs so far have shown.

    Args:
        sites: call of the user's code and width -> the innermost functions that it stands in.
        truths: calls that sum up zeros and ones that are not all alike.
        varied: calls of which another input has shown that units bring something of their own.
    """

    sites: dict[Site, set[CodeType]] = field(default_factory=dict)
    truths: set[Site] = field(default_factory=set)
    varied: set[Site] = field(default_factory=set)

    def summed(self, name: str, x: Tensor, whole: Tensor, dims: Sequence[int], kept: Mapping[int, Tensor]) -> bool:
        """Whether a sum is a count of units, as far as it can be seen here.

        Args:
            name: of the operator.
            x: what is summed, without what is missing.
            whole: the same at full size.
            dims: over which it is summed.
            kept: dimension -> what stays, of those that miss something.
        """
        if name not in SUMS and name not in SHARED_OUT:
            return False
        counts = False
        for d in kept:
            how = _how(name, x, [other for other in dims if other != d], d)
            self._note((whole.shape[d], x.shape[d]), how)
            counts = counts or how == "alike"
        return counts

    def multiplied(self, one: Tensor, other: Tensor, along: int, summed: int, size: int) -> None:
        """A sum of products of two factors, over what is left of one dimension of each.

        Args:
            one: a factor.
            other: likewise.
            along: dimension of the first.
            summed: dimension of the second.
            size: of both, before anything went.
        """
        factors = [(one.detach(), along), (other.detach(), summed)]
        alike = one.shape[along] > 1 and all(
            _are_alike(part, d, zero=False)
            for parts in ([(t.narrow(d, 0, 2), d) for t, d in factors], factors)
            for part, d in parts
        )
        self._note((size, one.shape[along]), "alike" if alike else "")

    def _note(self, width: Width, how: str) -> None:
        if not how and not self.sites:
            return  # to know the line is to walk the stack: only where there is something to say of it
        site = (users_step(), width)
        if how == "alike":
            self.sites.setdefault(site, set()).update(users_functions()[:1])
        else:
            self.varied.add(site)
        if how == "truths":
            self.truths.add(site)

    def found(self, summed: Mapping[Width, set[CodeType]], *, excused: bool) -> list[str]:
        """Lines that count units, with the two numbers.

        Args:
            summed: widths of other sums -> the functions that they stand in.
            excused: whether to give those beside another sum of the same width: they make a mean of it, over what is
                kept; else the others.
        """
        return sorted(set(self._found(summed, excused=excused)))

    def _found(self, summed: Mapping[Width, set[CodeType]], *, excused: bool) -> Iterator[str]:
        for ((where, step), width), inside in self.sites.items():
            beside = inside <= summed.get(width, set())
            if ((where, step), width) not in self.varied and beside == excused:
                yield f"{where} counts the units that are cut ({width[0]} become {width[1]})"

    def of_truths(self) -> list[str]:
        """Lines that sum up zeros and ones over units: of those that are kept."""
        return sorted({where for (where, _), _ in self.truths})


def _how(name: str, x: Tensor, others: Sequence[int], d: int) -> str:
    """How units come into a sum: "alike" (each as much as any other), "truths" (zeros and ones), or ""."""
    if x.shape[d] < 2 or x.numel() == 0:
        return ""  # one unit is like itself
    values = (x != 0).double() if name == "count_nonzero" else x.detach()
    values = values if values.is_floating_point() else values.double()
    values = values.abs() if "norm" in name else values
    zero = name == "logsumexp" or name in SHARED_OUT  # to these it is a number like any other
    for part in (values.narrow(d, 0, 2), values):  # two of them nearly always say that they differ
        if not _are_alike(_shares(part, others), d, zero=zero):
            break
    else:
        if name != "prod" or not bool((values == 1).all()):
            return "alike"
    row = values.narrow(d, 0, min(x.shape[d], FEW))
    are_truths = bool(((row == 0) | (row == 1)).all()) and bool(((values == 0) | (values == 1)).all())
    return "truths" if are_truths and name in SUMS and bool(values.any()) else ""


def _shares(values: Tensor, others: Sequence[int]) -> Tensor:
    return values.sum(list(others), keepdim=True) if others else values


def _are_alike(shares: Tensor, d: int, *, zero: bool) -> bool:
    """Whether all positions of a dimension hold the same number, of which `zero` may be everywhere."""
    if shares.numel() == 0 or shares.is_complex():
        return False
    low, high = torch.aminmax(shares, dim=d)
    size = torch.maximum(low.abs(), high.abs())
    return bool((high - low <= ALIKE * size).all()) and (zero or bool(size.any()))
