"""Which line of the user's code is running."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import CodeType, FrameType

import torch

_TORCH, _HERE = str(Path(torch.__file__).parent), Path(__file__).parent.parent
_NETWORKS = str(_HERE / "sources")  # bundled networks are models like a user's
_STRUCTURE = str(_HERE / "structure") + "/"
_CALL = str(_HERE / "model" / "call.py")  # runs the model: what stands above it has only called secateur
_CAPTURE = str(_HERE / "structure" / "capture.py")  # runs the model's own operators
_OURS = (_TORCH, str(_HERE), "<")
_BETWEEN = (_TORCH, copy.__file__)  # what works for whoever called it: a copy of a tensor asks for its storage
_KNOWN: dict[str, bool] = {}  # files: while a model is captured, a few hundred functions are asked about per operation


@cache
def short(filename: str) -> str:
    """The last two parts of a path, as conditions and locks quote it."""
    path = Path(filename)
    return f"{path.parent.name}/{path.name}"


def is_users(path: str) -> bool:
    """Whether a file of code belongs neither to torch nor to secateur."""
    return not path.startswith(_OURS) or path.startswith(_NETWORKS)


def is_engines(path: str, parts: Iterable[str]) -> bool:
    """Whether a file of code is one of these parts of `structure/`."""
    return path.startswith(tuple(_STRUCTURE + part for part in parts))


def is_torchs(path: str) -> bool:
    """Whether a file of code belongs to torch."""
    return path.startswith(_TORCH)


def users_line(*, whole: bool = False) -> str:
    """`file:line` of the innermost frame that belongs neither to torch nor to secateur; "" where there is none.

    Args:
        whole: the whole path, for errors that are read without the model at hand; else its last two parts.
    """
    frame = _users_frame(sys._getframe(1))
    if frame is None:
        return ""
    path = frame.f_code.co_filename
    return f"{path if whole else short(path)}:{frame.f_lineno}"


def users_step() -> tuple[str, int]:
    """`users_line`, and a number that tells several calls of one line apart."""
    frame = _users_frame(sys._getframe(1))
    return ("", 0) if frame is None else (f"{short(frame.f_code.co_filename)}:{frame.f_lineno}", frame.f_lasti)


def _users_frame(frame: FrameType | None) -> FrameType | None:
    while frame is not None and frame.f_code.co_filename != _CALL:
        path = frame.f_code.co_filename
        known = _KNOWN.get(path)
        if known is None:
            known = _KNOWN[path] = is_users(path)
        if known:
            return frame
        frame = frame.f_back
    return None


def engine_writes() -> bool:
    """Whether this package calls torch, and not the model: the engine puts back what a captured call has changed."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(_BETWEEN):
        frame = frame.f_back
    path = "" if frame is None else frame.f_code.co_filename
    return path.startswith(str(_HERE)) and not path.startswith((_NETWORKS, _CAPTURE))


def users_functions() -> list[CodeType]:
    """Functions of the user that are running, from the innermost on up to where torch called them."""
    frame: FrameType | None = sys._getframe(1)
    found: list[CodeType] = []
    while frame is not None:
        if is_users(frame.f_code.co_filename):
            found.append(frame.f_code)
        elif found:
            break
        frame = frame.f_back
    return found
