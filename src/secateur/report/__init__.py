"""The report of a run: as JSON (schema 1), in a terminal, and as one HTML file that opens offline."""

from secateur.report.build import build, environment
from secateur.report.histogram import histogram, near_zero
from secateur.report.html import render_html, render_structure_html
from secateur.report.progress import progress
from secateur.report.record import (
    Choice,
    Control,
    Environment,
    Fallback,
    Histogram,
    Layer,
    Locked,
    Proof,
    Record,
    State,
    Timing,
    TrainingPoint,
    Units,
    json_schema,
)
from secateur.report.terminal import plain_lines, render
from secateur.report.verdict import Verdict, verdict

__all__ = [
    "Choice",
    "Control",
    "Environment",
    "Fallback",
    "Histogram",
    "Layer",
    "Locked",
    "Proof",
    "Record",
    "State",
    "Timing",
    "TrainingPoint",
    "Units",
    "Verdict",
    "build",
    "environment",
    "histogram",
    "json_schema",
    "near_zero",
    "plain_lines",
    "progress",
    "render",
    "render_html",
    "render_structure_html",
    "verdict",
]
