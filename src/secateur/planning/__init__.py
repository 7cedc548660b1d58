"""The decision as data: which slices go, which attributes follow, and the proof that it is right."""

from secateur.planning.build import make_plan
from secateur.planning.plan import Plan

__all__ = ["Plan", "make_plan"]
