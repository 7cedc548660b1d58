"""Layouts of a weight matrix that may have zeros: one file each, one interface, one registry.

Saving, loading, the planner and the command line all read `FORMATS`. A further layout is a file here and a line below.
"""

from secateur.deployment.formats.base import FORMATS, Format, format_of
from secateur.deployment.formats.bitmask import Bitmask
from secateur.deployment.formats.block import BlockFormat
from secateur.deployment.formats.delta import Delta
from secateur.deployment.formats.dense import Dense
from secateur.deployment.formats.nm import NMFormat
from secateur.deployment.formats.slide import Slide16, Slide32

__all__ = [
    "FORMATS",
    "NMFormat",
    "Bitmask",
    "BlockFormat",
    "Delta",
    "Dense",
    "Format",
    "Slide16",
    "Slide32",
    "format_of",
]
