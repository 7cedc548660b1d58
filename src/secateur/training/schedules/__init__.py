"""Schedules: optimizer step in, sparsity out. One per file, each registered here."""

from secateur.training.schedules.base import Schedule, names, register, schedule_of
from secateur.training.schedules.cubic import Cubic
from secateur.training.schedules.custom import Custom
from secateur.training.schedules.cycles import Cycles
from secateur.training.schedules.exponential import Exponential
from secateur.training.schedules.linear import Linear
from secateur.training.schedules.one_shot import OneShot
from secateur.training.schedules.steps import Steps

__all__ = [
    "Cubic",
    "Custom",
    "Cycles",
    "Exponential",
    "Linear",
    "OneShot",
    "Schedule",
    "Steps",
    "names",
    "register",
    "schedule_of",
]
