"""The fair comparison of criteria: many runs under one protocol."""

from secateur.comparison.compare import Comparison, compare

__all__ = ["Comparison", "compare"]
