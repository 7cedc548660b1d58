"""Which line of the user's code is running."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from types import CodeType, FrameType

import torch

_HERE = Path(__file__).parent.parent
_NETWORKS = str(_HERE / "sources")  # bundled networks are models like a user's
_OURS = (str(Path(torch.__file__).parent), str(_HERE), "<")
_KNOWN: dict[CodeType, bool] = {}  # while a model is captured, a few hundred functions are asked about per operation


@cache
def short(filename: str) -> str:
    """The last two parts of a path, as conditions and locks quote it."""
    path = Path(filename)
    return f"{path.parent.name}/{path.name}"


def is_users(path: str) -> bool:
    """Whether a file of code belongs neither to torch nor to secateur."""
    return not path.startswith(_OURS) or path.startswith(_NETWORKS)


def users_line() -> str:
    """`file:line` of the innermost frame that belongs neither to torch nor to secateur; "" where there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        known = _KNOWN.get(code)
        if known is None:
            known = _KNOWN[code] = is_users(code.co_filename)
        if known:
            return f"{short(code.co_filename)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


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
