"""Studies over many runs: the fair comparison of criteria, and advice on what to try first."""

from secateur.search.advise import Advice, advise
from secateur.search.compare import Comparison, compare

__all__ = ["Advice", "Comparison", "advise", "compare"]
