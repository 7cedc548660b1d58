"""Pruning while weights move: schedules, gradual pruning, regrowth, penalties, movement; for any training loop."""

from secateur.training.movement import MovementPruner
from secateur.training.penalties import Penalty, penalty
from secateur.training.pruner import Pruner
from secateur.training.regrowth import Regrowth
from secateur.training.schedules import Schedule

__all__ = ["MovementPruner", "Penalty", "Pruner", "Regrowth", "Schedule", "penalty"]
