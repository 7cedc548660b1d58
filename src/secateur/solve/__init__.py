"""What the remaining weights become: solvers of single layers, refits behind a cut, the OBS update.

Solvers are known by name (`SOLVERS`); importing this package registers them.
"""

from secateur.solve import admm, least_squares, magnitude, ria, sparsegpt, swap, wanda  # noqa: F401
from secateur.solve.base import SOLVERS, Problem, Solved, Solver, error_of
from secateur.solve.moments import SecondMoments

__all__ = ["SOLVERS", "SecondMoments", "Problem", "Solved", "Solver", "error_of"]
