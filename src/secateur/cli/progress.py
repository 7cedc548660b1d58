"""The progress of a run on standard error; see `secateur.report.stages`."""

from __future__ import annotations

from secateur.report.stages import Stages, StageStep

__all__ = ["StageStep", "Stages"]
