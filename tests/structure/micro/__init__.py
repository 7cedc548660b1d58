"""Micro-models by family; importing this package registers all of them."""

from micro import chains, concats
from micro.base import CASES

__all__ = ["CASES", "chains", "concats"]
