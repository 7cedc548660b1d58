"""Imports every family, so that its cases stand in the table."""

from __future__ import annotations

import importlib
from pathlib import Path

from .cases import CASES, Case


def all_cases() -> dict[str, Case]:
    """Name -> case, of all files `family_*.py`."""
    for path in sorted(Path(__file__).parent.glob("family_*.py")):
        importlib.import_module(f".{path.stem}", __package__)
    return CASES
