"""The fair comparison of criteria: many runs under one protocol."""

from secateur.comparison.compare import Comparison, compare
from secateur.comparison.protocol import Protocol

__all__ = ["Comparison", "Protocol", "compare"]
