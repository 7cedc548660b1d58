"""What every ATen operator does to dimensions: one file per family, one function per rule.

An operator without a rule is a barrier: all dimensions of its tensors are locked, and the report names it.
`register` adds a rule for a custom operator.
"""

from secateur.structure.rules import (
    attention,
    contraction,
    factory,
    layout,
    lookup,
    norm,
    pieces,
    reduce,
    spatial,
    vision,
)
from secateur.structure.rules.base import Call, apply, by_parts, follow_source, follow_weights, known, register

__all__ = [
    "Call",
    "apply",
    "attention",
    "by_parts",
    "contraction",
    "factory",
    "follow_source",
    "follow_weights",
    "known",
    "layout",
    "lookup",
    "norm",
    "pieces",
    "reduce",
    "register",
    "spatial",
    "vision",
]
