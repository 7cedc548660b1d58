"""Regrowth: which weights come back while others go. One rule per file, each registered here."""

from secateur.training.regrowth.base import Regrowth, names, register, regrowth_of
from secateur.training.regrowth.rigl import RigL
from secateur.training.regrowth.set_ import SET

__all__ = ["Regrowth", "RigL", "SET", "names", "register", "regrowth_of"]
