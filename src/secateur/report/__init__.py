"""The report of a run: as JSON (schema 1), in a terminal, and as one HTML file that opens offline."""

from secateur.report.assembly import Effect, Events, Goal, Method, Origin, build, environment
from secateur.report.histogram import distribution, histogram, near_zero
from secateur.report.html import render_html
from secateur.report.own_loop import Live
from secateur.report.progress import progress
from secateur.report.record import (
    Choice,
    Control,
    Environment,
    Histogram,
    Layer,
    Locked,
    NetworkPart,
    Report,
    Sample,
    TrainingPoint,
    UnitCount,
    json_schema,
)
from secateur.report.terminal import plain_lines, render
from secateur.report.verdict import Verdict, verdict

__all__ = [
    "Choice",
    "Control",
    "Environment",
    "Events",
    "Goal",
    "Histogram",
    "Layer",
    "Live",
    "Locked",
    "NetworkPart",
    "Method",
    "Origin",
    "Effect",
    "Report",
    "Sample",
    "TrainingPoint",
    "UnitCount",
    "Verdict",
    "build",
    "distribution",
    "environment",
    "histogram",
    "json_schema",
    "near_zero",
    "plain_lines",
    "progress",
    "render",
    "render_html",
    "verdict",
]
