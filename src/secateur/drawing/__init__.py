"""Pictures and pages: SVG and HTML made here, which open offline and ask the network for nothing. Needs no torch."""

from secateur.drawing.charts import Bar, Curve, bars, curves, heat, histogram
from secateur.drawing.network import DrawnPart, picture
from secateur.drawing.page import environment_of_pages, page_parts

__all__ = [
    "Bar",
    "Curve",
    "DrawnPart",
    "bars",
    "curves",
    "environment_of_pages",
    "heat",
    "histogram",
    "page_parts",
    "picture",
]
