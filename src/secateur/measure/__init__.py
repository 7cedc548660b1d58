"""Parameters, multiply-accumulates, bytes, latency and quality: always before and after."""

from secateur.measure.counts import num_nonzero, num_params, size_bytes
from secateur.measure.latency import latency
from secateur.measure.macs import macs, macs_by_module
from secateur.measure.quality import Yardstick, accuracy, accuracy_on, quality, yardstick
from secateur.measure.snapshot import snapshot
from secateur.measure.staircase import width_grid

__all__ = [
    "Yardstick",
    "accuracy",
    "accuracy_on",
    "latency",
    "macs",
    "macs_by_module",
    "num_nonzero",
    "num_params",
    "quality",
    "size_bytes",
    "snapshot",
    "width_grid",
    "yardstick",
]
