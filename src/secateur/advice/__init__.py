"""What to try first on a model, from what is cheap to know about it."""

from secateur.advice.advise import Advice, advise

__all__ = ["Advice", "advise"]
