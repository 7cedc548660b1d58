"""The whole LASSO path from second moments: every penalty and every number of survivors in one pass."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

RIDGE = 1e-12  # relative to the mean diagonal: exactly dependent columns must not stop the path
DEAD = 1e-14


def lasso_path(gram: Tensor, output: Tensor) -> list[tuple[float, Tensor]]:
    """All breakpoints of min_beta 1/2 ||y - Z beta||^2 + lam ||beta||_1, from large lam to 0.

    Between breakpoints beta is linear in lam, so this is the exact solution for every lam.

    Args:
        gram: Z^T Z, float64 [c, c].
        output: Z^T y, float64 [c].

    Returns:
        (lam, beta [c]) in descending lam; the first has beta = 0, the last lam = 0.

    Cost:
        About c solves of at most c x c; no data.

    Source:
        Osborne, Presnell, Turlach, "A New Approach to Variable Selection in Least Squares Problems", 2000;
        Efron, Hastie, Johnstone, Tibshirani, "Least Angle Regression", 2004, section 3.1.

    Example:
        >>> path = lasso_path(torch.diag(torch.tensor([4.0, 1.0])).double(), torch.tensor([4.0, 1.0]).double())
        >>> [(lam, [round(b, 3) for b in beta.tolist()]) for lam, beta in path]
        [(4.0, [0.0, 0.0]), (1.0, [0.75, 0.0]), (0.0, [1.0, 1.0])]
    """
    size = len(output)
    diagonal = gram.diagonal()
    scale = float(diagonal.mean()) if size else 0.0
    beta = torch.zeros(size, dtype=torch.float64)
    # Columns of zeros never join: their correlation with the rest stays zero, and a solve with them would fail.
    usable = diagonal > DEAD * max(float(diagonal.max()) if size else 0.0, 1e-300)
    if not bool(usable.any()) or not float(output[usable].abs().max()) > 0:
        return [(0.0, beta)]
    # Exactly equal columns would make the system singular as soon as both are active.
    gram = gram + RIDGE * scale * torch.eye(size, dtype=torch.float64)
    rest = output.clone()
    lam = float(rest[usable].abs().max())
    path = [(lam, beta.clone())]
    active = [int(torch.where(usable, rest.abs(), -1.0).argmax())]
    # The coefficient that has just left: rounding must not let it join again at the same place.
    fresh = -1
    # Joins and leaves alternate; in practice about `size` steps, and never without end.
    for _ in range(8 * size):
        index = torch.tensor(active)
        # A coefficient that has just joined is zero, and grows with the sign of its correlation.
        sign = torch.where(beta[index] != 0, beta[index].sign(), rest[index].sign())
        direction = torch.linalg.solve(gram[index][:, index], sign)
        slope = gram[:, index] @ direction
        step, event = _next_event(beta, rest, slope, lam, index, direction, usable, fresh)
        beta[index] += step * direction
        # Anew in each step: errors of thousands of small updates would add up.
        rest = output - gram @ beta
        lam -= step
        fresh = -1
        if event is None or lam <= 0:
            path.append((0.0, beta.clone()))
            break
        if event in active:
            active.remove(event)
            beta[event], fresh = 0.0, event
        else:
            active.append(event)
        path.append((max(lam, 0.0), beta.clone()))
        if not active:
            break
    return path


def _next_event(
    beta: Tensor,
    rest: Tensor,
    slope: Tensor,
    lam: float,
    index: Tensor,
    direction: Tensor,
    usable: Tensor,
    fresh: int,
) -> tuple[float, int | None]:
    """How far lam falls until a coefficient joins or leaves (None: until lam is 0), and which one."""
    outside = usable.clone()
    outside[index] = False
    best, event = lam, None
    # A correlation may catch up with lam from either side.
    for sign in (1.0, -1.0):
        gap, speed = lam - sign * rest, 1.0 - sign * slope
        # Parallel ones never meet.
        steps = torch.where(outside & (speed > 1e-12), gap.clamp(min=0) / speed.clamp(min=1e-12), torch.inf)
        if fresh >= 0:
            steps[fresh] = torch.where(gap[fresh] > 1e-9 * lam, steps[fresh], torch.inf)
        at = int(steps.argmin())
        if float(steps[at]) < best:
            best, event = float(steps[at]), at
    # Only those that move towards zero can leave.
    leaving = torch.where(beta[index] * direction < 0, -beta[index] / direction, torch.inf)
    at = int(leaving.argmin())
    if float(leaving[at]) < best:
        best, event = float(leaving[at]), int(index[at])
    return best, event


def drop_points(gram: Tensor, output: Tensor) -> Tensor:
    """The penalty above which each coefficient stays zero: float64 [c].

    Args:
        gram: Z^T Z.
        output: Z^T y.

    Example:
        >>> drop_points(torch.diag(torch.tensor([4.0, 1.0])).double(), torch.tensor([4.0, 1.0]).double())
        tensor([4., 1.], dtype=torch.float64)
    """
    path = lasso_path(gram, output)
    points = torch.zeros(len(output), dtype=torch.float64)
    for (lam, _), (_, beta) in pairwise(path):
        points = torch.where((points == 0) & (beta != 0), lam, points)
    return points


def ordered_scores(order: Tensor, levels: Tensor) -> Tensor:
    """Scores that a selection of any exact count removes in this order.

    Args:
        order: int64 [u], units from the first to go to the last.
        levels: float64 [u], cost at the removal of each, in that order; made strictly increasing.

    Returns:
        float32 [u] in the order of the units.

    Example:
        >>> ordered_scores(torch.tensor([2, 0, 1]), torch.tensor([0.5, 1.0, 1.0]))[[2, 0]]
        tensor([0.5000, 1.0000])
    """
    values = torch.cummax(levels.double(), 0).values if len(levels) else levels.double()
    rising, last = [], -1.0
    for value in values.tolist():
        # A selection breaks ties by index; equal levels would let it choose against the order.
        least = last + max(abs(last) * 2e-6, 1e-30)  # some steps of float32: survives being scaled
        last = value if value >= least else least
        rising.append(last)
    scores = torch.zeros(len(rising), dtype=torch.float64)
    scores[order] = torch.tensor(rising, dtype=torch.float64)
    return scores.float()
