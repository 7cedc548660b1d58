"""Which units are removed: granularities (one per file) and exact selection."""

from secateur.selection.block import Block
from secateur.selection.element import Element
from secateur.selection.granularity import STRUCTURAL, Granularity, names, parse, register
from secateur.selection.kernel import Kernel
from secateur.selection.nm import NM, keep_pattern
from secateur.selection.select import select
from secateur.selection.vector import Vector

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
