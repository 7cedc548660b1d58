"""Second moments of a layer's inputs, damped, and their factorisations: computed once for all that share them."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from secateur.errors import NonFiniteError

WELL_CONDITIONED = 1e5  # ratio of eigenvalues up to which an inverse in single precision loses nothing that matters
RAISES = 6  # times that the damping is raised tenfold before a layer is given up


class SecondMoments:
    """H = X X^T / tokens of one input, and what solvers need of it.

    Inputs that were never anything but zero ("dead") get a one on the diagonal: their weights do not matter, and the
    matrix stays invertible.

    Args:
        gram: H, [d, d], undamped.
        damping: share of the mean diagonal that is added to the diagonal.
        tokens: rows that H is the mean of, for reports.

    Raises:
        NonFiniteError: H holds NaN or Inf.
    """

    def __init__(self, gram: Tensor, *, damping: float = 0.01, tokens: int = 0) -> None:
        if not bool(torch.isfinite(gram).all()):
            raise NonFiniteError("the inputs of a layer hold NaN or Inf", hint="calibrate in float32")
        self.gram, self.damping, self.tokens = gram, damping, tokens
        self._inverses: dict[float, Tensor] = {}

    @cached_property
    def dead(self) -> Tensor:
        """Bool [d]: inputs that were always zero."""
        return self.gram.diagonal() <= 0

    @cached_property
    def norms(self) -> Tensor:
        """Root mean square of every input, [d]; undamped."""
        return self.gram.diagonal().clamp(min=0).sqrt()

    @cached_property
    def scale(self) -> Tensor:
        """Root of the damped diagonal, [d]: coordinates in which the diagonal is one."""
        return self.damped.diagonal().sqrt()

    @cached_property
    def damped(self) -> Tensor:
        """H with damping that lets it be factorised; `damping` says afterwards how much that took."""
        for _ in range(RAISES):
            found = self._with(self.damping)
            if int(torch.linalg.cholesky_ex(found.double())[1]) == 0:
                return found
            # Another method in its place would be a silent change of what was asked for.
            self.damping = max(self.damping, 1e-6) * 10
        raise NonFiniteError(
            "the second moments of a layer's inputs cannot be factorised",
            why=f"the damping was raised to {self.damping:g}",
            hint="calibrate on other text, or protect the layer",
        )

    def _with(self, damping: float) -> Tensor:
        diagonal = self.gram.diagonal()
        found = self.gram.clone()
        found.diagonal().masked_fill_(self.dead, 1.0)
        live = diagonal[~self.dead]
        found.diagonal().add_(damping * (float(live.mean()) if len(live) else 1.0))
        return found

    @cached_property
    def normalised(self) -> Tensor:
        """The damped H in coordinates in which its diagonal is one."""
        return self.damped / self.scale[:, None] / self.scale[None, :]

    def inverse(self, penalty: float) -> Tensor:
        """(normalised H + penalty I)^-1; kept for the next layer that asks."""
        if penalty not in self._inverses:
            # No eigenvalue is above the size of the matrix, and none below the penalty.
            well = penalty > 0 and len(self.normalised) / penalty < WELL_CONDITIONED
            wide = self.normalised.to(self.gram.dtype if well else torch.float64, copy=True)
            wide.diagonal().add_(penalty)
            self._inverses[penalty] = torch.cholesky_inverse(torch.linalg.cholesky(wide)).to(self.gram)
        return self._inverses[penalty]

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors of the normalised H: with them any penalty costs two products."""
        values, vectors = torch.linalg.eigh(self.normalised.double())
        return values.to(self.gram), vectors.to(self.gram)

    @cached_property
    def upper(self) -> Tensor:
        """R, upper triangular, with R^T R = H^-1 (damped).

        Without an inverse: with rows and columns in reverse order H = L L^T, so H = U U^T with U upper triangular, and
        R = U^-1.
        """
        flipped = torch.linalg.cholesky(self.damped.double().flip(0, 1)).flip(0, 1)
        eye = torch.eye(len(flipped), dtype=flipped.dtype, device=flipped.device)
        solved: Tensor = torch.linalg.solve_triangular(flipped, eye, upper=True)
        return solved.to(self.gram)
