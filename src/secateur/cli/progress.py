"""The progress of a run on standard error; see `secateur.report.stage_progress`."""

from __future__ import annotations

from secateur.report.stage_progress import Stages, StageStep

__all__ = ["StageStep", "Stages"]
