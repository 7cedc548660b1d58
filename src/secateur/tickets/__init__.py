"""Lottery tickets: sparse networks that train from an early state as well as the dense network does."""

from secateur.tickets.lottery import lottery
from secateur.tickets.result import Tickets
from secateur.tickets.training import TrainingSpan

__all__ = ["TrainingSpan", "Tickets", "lottery"]
