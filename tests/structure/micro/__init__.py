"""Micro-models by family; importing this package registers all of them."""

from micro import attention, chains, concats, families, living, movement, norms, recurrent
from micro.base import CASES

__all__ = ["CASES", "attention", "chains", "concats", "families", "living", "movement", "norms", "recurrent"]
