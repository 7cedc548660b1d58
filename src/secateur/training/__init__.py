"""Pruning while weights move: schedules, gradual pruning, regrowth, penalties, movement; for any training loop."""

from secateur.training.pruner import Pruner
from secateur.training.regrowth import Regrowth
from secateur.training.schedules import Schedule

__all__ = ["Pruner", "Regrowth", "Schedule"]
