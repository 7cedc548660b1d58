"""What was measured on this machine before: ratios to the dense layer, kept in the user's cache folder."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from secateur.deployment import native, on_gpu
from secateur.errors import SecateurError
from secateur.files import atomic_write, canonical_json, load_json

FILE = "layers.json"
MAX_BYTES = 1 << 24


class Table:
    """Ratio to dense by key; a file that cannot be read counts as empty.

    Args:
        path: the file; None = nothing is read or kept.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._found: dict[str, float] = {}
        if path is not None and path.is_file():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            data = load_json(path, max_bytes=MAX_BYTES)
        except SecateurError:
            return
        if isinstance(data, Mapping):
            self._found = {key: value for key, value in data.items() if isinstance(value, float) and value > 0}

    def get(self, key: str) -> float | None:
        """The ratio, if it was measured."""
        return self._found.get(key)

    def put(self, key: str, ratio: float) -> None:
        """Remember a ratio."""
        self._found[key] = float(ratio)

    def save(self) -> None:
        """Write the file, whole or not at all."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(self.path, canonical_json(self._found))


def default_path() -> Path:
    """``$XDG_CACHE_HOME/secateur/layers.json``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "secateur" / FILE


def key(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    contender: str,
    *,
    zeros: float,
    blocks: float,
    rows: int | str,
    operation: str = "linear",
    device: torch.device | None = None,
) -> str:
    """Everything that a ratio depends on.

    Args:
        shape: of the weight.
        dtype: of the layer.
        contender: format and dtype.
        zeros: share of zeros, in steps of a twentieth.
        blocks: share of the blocks of 16 rows and one column that hold a number, in steps of a twentieth: it tells
            patterns apart.
        rows: inputs at once, or whatever else says what comes in.
        operation: "linear", "conv".
        device: where it was measured; None = the CPU.
    """
    here = (native.isa(), processor())
    if device is not None and on_gpu.is_gpu(device):
        here = ("gpu", on_gpu.described(device))
    shares = [f"{round(each * 20) / 20:.2f}" for each in (zeros, blocks)]
    parts = (
        operation, "x".join(map(str, shape)), str(dtype).removeprefix("torch."), contender, *shares, f"rows{rows}",
        f"threads{torch.get_num_threads()}", here[0], f"torch{torch.__version__}", here[1],
    )  # fmt: skip
    return "|".join(parts)


@cache
def processor() -> str:
    """Name of the processor, as well as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
