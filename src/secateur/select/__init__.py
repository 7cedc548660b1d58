"""Which units are removed: granularities (one per file) and exact selection."""

from secateur.select.block import Block
from secateur.select.element import Element
from secateur.select.granularity import STRUCTURAL, Granularity, names, parse, register
from secateur.select.kernel import Kernel
from secateur.select.nm import NM, keep_pattern
from secateur.select.select import select
from secateur.select.vector import Vector

__all__ = [
    "NM",
    "STRUCTURAL",
    "Block",
    "Element",
    "Granularity",
    "Kernel",
    "Vector",
    "keep_pattern",
    "names",
    "parse",
    "register",
    "select",
]
