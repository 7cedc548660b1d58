"""Contract checks that shipped criteria keep and that third parties can run on theirs."""

from secateur.testing.criteria import CHECKS, Check, NotApplicable, Stage, check_criterion
from secateur.testing.scenes import Scene, TinyNet, cross_entropy, groups_of, tiny_scene

__all__ = [
    "CHECKS",
    "Check",
    "NotApplicable",
    "Scene",
    "Stage",
    "TinyNet",
    "check_criterion",
    "cross_entropy",
    "groups_of",
    "tiny_scene",
]
