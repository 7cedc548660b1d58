"""How much goes from where: exact selection, one ordered list of removals, allocations."""

from secateur.amounts.select import select

__all__ = ["select"]
