"""Criteria: weights and statistics in, scores out (higher = keep). One per file, each registered here."""

from secateur.criteria.base import (
    Context,
    Criterion,
    get,
    names,
    reduce_spans,
    register,
)
from secateur.criteria.magnitude import Magnitude

__all__ = ["Context", "Criterion", "Magnitude", "get", "names", "reduce_spans", "register"]
