"""Warnings about statistics: what was done less well than asked, or what the numbers cannot tell."""

from __future__ import annotations

import warnings


class CurvatureWarning(UserWarning):
    """A curvature estimate is degraded (damping raised, large error bars) or says nothing (all zero)."""


def note(text: str) -> None:
    """Say it as a `CurvatureWarning`, so that a caller can record it or turn it into an error."""
    warnings.warn(text, CurvatureWarning, stacklevel=3)
