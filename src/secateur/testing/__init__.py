"""Contract checks that shipped criteria keep and that third parties can run on theirs."""

from secateur.testing import surroundings  # its checks join CHECKS
from secateur.testing.criteria import check_criterion
from secateur.testing.scenes import Scene, TinyNet, cross_entropy, groups_of, tiny_scene
from secateur.testing.stage import CHECKS, Check, NotApplicable, Stage

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
    "surroundings",
    "tiny_scene",
]
