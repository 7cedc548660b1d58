"""Weights: zeros in place, shape unchanged. One granularity per file, each registered here."""

from secateur.kinds.weights.block import Block
from secateur.kinds.weights.element import Element
from secateur.kinds.weights.granularity import STRUCTURAL, Granularity, names, parse, register
from secateur.kinds.weights.kernel import Kernel
from secateur.kinds.weights.nm import NM, keep_pattern
from secateur.kinds.weights.vector import Vector
from secateur.kinds.weights.weight import Weight

__all__ = [
    "NM",
    "STRUCTURAL",
    "Block",
    "Element",
    "Granularity",
    "Kernel",
    "Vector",
    "Weight",
    "keep_pattern",
    "names",
    "parse",
    "register",
]
