"""How much is removed from which group: one allocation per file, each registered here."""

from secateur.amounts.allocate.base import Allotment, Amounts, allocate, apportion, names, register, round_half_up
from secateur.amounts.allocate.erk import erk
from secateur.amounts.allocate.global_ import global_
from secateur.amounts.allocate.lamp import lamp, lamp_scores
from secateur.amounts.allocate.sensitivity import Curves, LossCurve, Spread, sensitivity, spread_of
from secateur.amounts.allocate.uniform import uniform

__all__ = [
    "Amounts",
    "Allotment",
    "LossCurve",
    "Curves",
    "Spread",
    "allocate",
    "apportion",
    "erk",
    "global_",
    "lamp",
    "lamp_scores",
    "names",
    "register",
    "round_half_up",
    "sensitivity",
    "spread_of",
    "uniform",
]
