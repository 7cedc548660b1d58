"""How much goes from where: exact selection for masks, ordered removals for cuts, and how an amount is spread."""

from secateur.amounts.allocate.base import round_half_up
from secateur.amounts.patterns import per_pattern
from secateur.amounts.select import select

__all__ = ["per_pattern", "round_half_up", "select"]
