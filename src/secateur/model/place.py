"""Which line of the user's code is running."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

import torch

_HERE = Path(__file__).parent.parent
_NETWORKS = str(_HERE / "sources")  # bundled networks are models like a user's
_OURS = (str(Path(torch.__file__).parent), str(_HERE))


def users_line() -> str:
    """File:line of the innermost frame that belongs neither to torch nor to secateur; "" where there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if not path.startswith((*_OURS, "<")) or path.startswith(_NETWORKS):
            return f"{Path(path).name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
