"""What to type next: lines that load, measure, export and deploy a result, with its own folder and model in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from secateur.report.record import Report
from secateur.report.safe_text import clean

MODEL = "MODEL"  # where nobody but the user knows what builds the original


@dataclass(frozen=True)
class NextStep:
    """One thing to do.

    Args:
        title: in a word.
        code: lines to type.
        python: whether these are Python, else a shell's.
        said: a sentence below, or "".
    """

    title: str
    code: str
    python: bool = False
    said: str = ""


def next_steps(report: Report, folder: str, *, kind: str = "", native: bool = False) -> list[NextStep]:
    """Lines to type for an output folder.

    Args:
        report: of the run; its command names model and data where it came from a command line.
        folder: where the result lies.
        kind: class of the model where it is one of transformers, else "".
        native: whether ``from_pretrained`` loads the folder.
    """
    model, data = _asked(report.command)
    said = "" if model else f"{MODEL} stands for what builds the original: mynet.py:build, hf:NAME, demo:NAME ..."
    where, what = shlex.quote(folder), shlex.quote(model or MODEL)
    more = f" --data {shlex.quote(data)}" if data else ""
    body, told = loading(folder, model, kind=kind, native=native)
    return [
        NextStep("Load it", body, python=True, said=told),
        NextStep("Measure it here", f"secateur measure {where} --model {what}{more}", said=said),
        NextStep("Export it", f"secateur export {where} --model {what}{more} --format onnx --out {where}.onnx"),
        NextStep("Make it fast here", f"secateur deploy {where} --model {what}{more} --out {where}-fast"),
    ]  # fmt: skip


def loading(folder: str, model: str = "", *, kind: str = "", native: bool = False) -> tuple[str, str]:
    """Lines of Python that load a folder, and a sentence about them.

    Args:
        folder: where it lies.
        model: the word that named the original on the command line, or "".
        kind: class of the model where it is one of transformers, else "".
        native: whether ``from_pretrained`` loads the folder.

    Example:
        >>> print(loading("runs/mine", "mynet.py:build")[0])
        import secateur as sc
        from mynet import build
        <BLANKLINE>
        model = sc.load("runs/mine", model=build)
    """
    quoted = '"' + clean(folder).replace("\\", "\\\\").replace('"', '\\"') + '"'
    if kind and native:
        return f"from transformers import {kind}\n\nmodel = {kind}.from_pretrained({quoted})", ""
    imported, made = _factory(model)
    lines = ["import secateur as sc", *imported, "", f"model = sc.load({quoted}, model={made})"]
    said = "Weights come from the folder, and no code."
    if made == "YourModel":
        said = f"{made} is the class or function that builds the original architecture. {said}"
    if kind:
        said += " from_pretrained cannot load this folder: no config describes widths that differ so."
    return "\n".join(lines), said


def _asked(command: str) -> tuple[str, str]:
    """MODEL and DATA of the command line of a run; "" where it was none."""
    try:
        words = shlex.split(command)
    except ValueError:  # a report may come from anywhere
        return "", ""
    if len(words) < 3 or words[:2] != ["secateur", "prune"]:
        return "", ""
    data = words[words.index("--data") + 1] if "--data" in words[:-1] else ""
    return words[2], data


def _factory(model: str) -> tuple[list[str], str]:
    """The import of a factory that a MODEL word names, and its name; else a word for the reader to replace."""
    found = re.fullmatch(r"(?:py:)?((?:[^:/]*/)*)([A-Za-z_][\w.]*?)(?:\.py)?:([A-Za-z_]\w*)", model)
    if found is None or not (model.startswith("py:") or ".py:" in model):
        return [], "YourModel"
    # A file in another folder is imported from there: said by the path, since only its own folder is on the way.
    place = found[1].rstrip("/")
    aside = ["import sys", f"sys.path.insert(0, {place!r})"] if place else []
    return [*aside, f"from {found[2]} import {found[3]}"], found[3]
