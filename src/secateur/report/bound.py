"""At most this loss, as data: what was found, what was tried, and what the test part says."""

from __future__ import annotations

from typing import Literal

from secateur.report.part import ReportPart, Share
from secateur.types import Amount, Text


class Measured(ReportPart):
    """How much a model lost on some samples, with one-sided bounds where anything is known of chance."""

    drop: float
    low: float | None = None
    high: float | None = None
    method: Text = ""


class Attempt(ReportPart):
    """One amount that was tried; ``drop`` is null where it could not be reached, with the reason in ``why``."""

    amount: float
    removed: Share
    params: Amount | None
    macs: Amount | None
    nonzero: Amount | None
    drop: float | None
    low: float | None
    high: float | None
    method: Text
    kept: bool
    why: Text
    seconds: Amount


class Limit(ReportPart):
    """The amount that was found for "at most this loss", what was tried, and whether the test part confirms it.

    ``verdict`` is "sure" (the bound keeps the limit too), "held" (the figure keeps it, chance may have helped),
    "missed", or "unconfirmed" (there is no test part).
    """

    max_drop: Amount
    unit: Literal["points", "percent"]
    figure: Text
    smallest: Text
    confidence: Share
    amount: float
    chosen_by: Text
    chosen: Measured
    attempts: tuple[Attempt, ...]
    test: Measured | None = None
    verdict: Literal["sure", "held", "missed", "unconfirmed"] = "unconfirmed"
