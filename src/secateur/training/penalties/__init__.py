"""Penalties: what makes weights small while they are trained. One per file, each registered here."""

from secateur.training.penalties.base import Penalty, names, penalty, register
from secateur.training.penalties.gates import GatePenalty
from secateur.training.penalties.group_lasso import GroupLasso
from secateur.training.penalties.growing import Growing
from secateur.training.penalties.hard_concrete import HardConcrete
from secateur.training.penalties.l1 import L1
from secateur.training.penalties.l2 import L2
from secateur.training.penalties.slimming import Slimming

__all__ = [
    "L1",
    "L2",
    "GatePenalty",
    "GroupLasso",
    "Growing",
    "HardConcrete",
    "Penalty",
    "Slimming",
    "names",
    "penalty",
    "register",
]
