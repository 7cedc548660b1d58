"""How much a fit is pulled towards the weights that were there: as asked, or as batches that it has not seen like best.

Closed forms fit the sample that they are given. With hardly more rows than columns they fit its noise: of a language
model with 2,048 tokens of calibration and 1,016 inner neurons the pull that serves convolutions doubled the perplexity.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HELD = 4  # every so many batches one is held out
LEAST = 1e-4  # of the ridges that are tried, and the one that is taken where there are too few batches to hold one out
NAMED = 3  # layers that are named where a fit left them
CHOOSERS = 32  # outputs at most that choose a ridge where each has weights of its own left
EVERY = slice(None)
LADDER = (LEAST, 1e-3, 1e-2, 0.1, 1.0)


class RefitWarning(UserWarning):
    """A refit left layers as they were cut."""


def warn_of_unfitted(names: Sequence[str], total: int) -> None:
    """Say which layers no fit made better on held-out batches; nothing where there are none.

    Args:
        names: of their weights.
        total: of the layers that were to be fitted.
    """
    if names:
        words = f"refit left {len(names)} of {total} layers as they were cut ({_some(names)})"
        warnings.warn(f"{words}: no fit made held-out batches better; more data may", RefitWarning, stacklevel=3)


def warn_of_left(reasons: Mapping[str, str]) -> None:
    """Say which weights lost inputs and were not fitted, since there is no closed form for them.

    Args:
        reasons: name of the weight -> why.
    """
    for reason in dict.fromkeys(reasons.values()):
        some = _some([name for name, own in reasons.items() if own == reason])
        warnings.warn(f"refit left {some} as it was cut: {reason}", RefitWarning, stacklevel=3)


def warn_of_outputs(before: float, after: float) -> None:
    """Say where layers that are nearer to the original's have left the outputs farther from them.

    Args:
        before: mean square by which outputs missed the original's after the cut, relative to these.
        after: the same after the fit.
    """
    if after > before:
        warnings.warn(
            f"refit left the outputs farther from the original's than the cut did: {after:.3g} of their mean square, "
            f"{before:.3g} before, on the first samples; leave it out, or train afterwards",
            RefitWarning,
            stacklevel=3,
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def is_held(place: int, ridge: float | None) -> bool:
    """Whether a batch is held out.

    Args:
        place: its number, from 1.
        ridge: None where it is to be chosen.
    """
    return ridge is None and place % HELD == 0


def gained(change: Tensor, gram: Tensor, missing: Tensor) -> float:
    """By how much a change of the weights lowers the sum of squares of what is missing; below 0 where it raises it.

    Args:
        change: B, [..., k, n].
        gram: X^T X, [..., k, k].
        missing: X^T (Y - now), [..., k, n].
    """
    return float((change * (2 * missing - gram @ change)).sum())


def best_ridge(gain: Callable[[float], float]) -> float | None:
    """The ridge of the ladder whose fit gains most on held-out batches; None where no fit gains anything.

    Args:
        gain: of the fit with a ridge.

    Example:
        >>> best_ridge(lambda ridge: -abs(ridge - 0.1) + 0.05)
        0.1
        >>> best_ridge(lambda ridge: -ridge) is None
        True
    """
    gains = {ridge: gain(ridge) for ridge in LADDER}
    best = max(gains, key=lambda ridge: gains[ridge])
    return best if gains[best] > 0 else None


def zeros() -> Tensor:
    """A sum of nothing, whatever its shape will be."""
    return torch.zeros(())


def least_squares(gram: Tensor, cross: Tensor, *, ridge: float = 0.0, columns: int | None = None) -> Tensor:
    """argmin_B ||Y - X B||^2 + lam ||B||^2 from second moments, lam = ridge times the mean diagonal.

    Args:
        gram: X^T X, float64 [..., k, k].
        cross: X^T Y, float64 [..., k, n].
        ridge: relative; 0 gives the solution of least norm.
        columns: the first columns are damped, the others (a bias) hardly, whatever the size of the first; default all.

    Returns:
        B, float64 [..., k, n].

    Example:
        >>> least_squares(torch.eye(2).double() * 4, torch.tensor([[8.0], [4.0]]).double()).flatten().tolist()
        [2.0, 1.0]
    """
    size = gram.shape[-1]
    columns = size if columns is None else columns
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    level = diagonal[..., :columns].mean(-1, keepdim=True)
    # A column of ones in the units of the others: beside inputs of a million it would count for nothing.
    scale = torch.ones_like(diagonal)
    own = diagonal[..., columns:]
    scale[..., columns:] = torch.where((level > 0) & (own > 0), (level / own.clamp(min=1e-300)).sqrt(), 1.0)
    gram, cross = scale[..., :, None] * gram * scale[..., None, :], scale[..., None] * cross
    damping = torch.full((size,), 1e-12, dtype=gram.dtype, device=gram.device)
    damping[:columns] = ridge
    if ridge > 0:
        factor, info = torch.linalg.cholesky_ex(gram + torch.diag_embed((level * damping).clamp(min=1e-300)))
        if not bool(info.any()):
            return scale[..., None] * torch.cholesky_solve(cross, factor)
    # Least norm: the null directions of the inputs keep what they have.
    values, vectors = torch.linalg.eigh(gram + torch.diag_embed(level * damping * (ridge > 0)))
    usable = values > values[..., -1:] * size * 1e-14
    inverse = torch.where(usable, 1 / torch.where(usable, values, 1.0), 0.0)
    solution: Tensor = vectors @ (inverse[..., None] * (vectors.transpose(-1, -2) @ cross))
    return scale[..., None] * solution


@dataclass(frozen=True, eq=False)
class RidgeSolver:
    """`least_squares` of one weight, some of whose entries may have to stay as they are.

    Args:
        columns: of the weight; moments have one more where there is a bias.
        keep: bool [g, n, columns], True = may change, or None = all. Each output is a system of its own then.
    """

    columns: int
    keep: Tensor | None = None

    @property
    def choosers(self) -> slice:
        """Outputs that choose the ridge: all, or at most `CHOOSERS` of many that have to be solved one by one."""
        return EVERY if self.keep is None else slice(None, None, max(self.keep.shape[1] // CHOOSERS, 1))

    def solve(self, gram: Tensor, cross: Tensor, ridge: float, rows: slice = EVERY) -> Tensor:
        """The change of the outputs in `rows`.

        Args:
            gram: X^T X, float64 [g, k, k].
            cross: X^T Y, float64 [g, k, n].
            ridge: as for `least_squares`.
            rows: outputs.

        Returns:
            float64 [g, k, outputs]; 0 where a column does not serve, and for outputs that have none.

        Cost: k^3, or k^3 for each output.
        """
        cross = cross[..., rows]
        if self.keep is None:
            return least_squares(gram, cross, ridge=ridge, columns=self.columns)
        change = torch.zeros_like(cross)
        bias = torch.arange(self.columns, gram.shape[-1], device=gram.device)
        for group, own in enumerate(self.keep[:, rows]):
            for row, entries in enumerate(own):
                kept = torch.nonzero(entries).flatten()
                at = torch.cat([kept, bias])
                if len(kept):
                    part, goal = gram[group][at][:, at], cross[group][at, row : row + 1]
                    change[group, at, row] = least_squares(part, goal, ridge=ridge, columns=len(kept))[:, 0]
        return change

    def best(self, learn: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor]) -> float | None:
        """The ridge with which a fit to some batches gains most on held-out ones; None where none gains.

        Args:
            learn: X^T X and X^T Y of the batches that are fitted.
            held: those of the others.
        """
        some = self.choosers
        return best_ridge(lambda ridge: gained(self.solve(*learn, ridge, some), held[0], held[1][..., some]))
