"""``secateur doctor``: what is installed, what is not, and whether a tiny prune works here."""

from __future__ import annotations

import platform
import shutil
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from secateur.cli import options
from secateur.cli.console import emit, table, write

CORE = ("torch", "numpy", "safetensors", "pydantic", "ruamel.yaml", "typer", "rich", "jinja2")
EXTRAS = {
    "demo": ("mlxtend", "scikit-learn"),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "hf": ("transformers",),
    "gguf": ("transformers", "gguf", "accelerate"),
    "eval": ("lm-eval",),
    "search": ("scipy",),
    "tune": ("optuna",),
    "postgres": ("optuna", "psycopg"),
    "ray": ("optuna", "ray"),
    "train": ("accelerate", "lightning"),
    "track": ("accelerate", "tensorboard"),
    "data": ("pyarrow", "pillow"),
    "gpu": ("triton",),
    "docs": ("mkdocs-material", "mkdocstrings"),
    "notebooks": ("nbclient", "nbformat", "ipykernel"),
}
LITTLE_DISK = 500_000_000
EXAMPLES = ("doctor",)


def doctor(json: options.Json = False, verbose: options.Verbose = False) -> int:
    """Check versions, extras, threads and disk, and prune, save and load a tiny network."""
    found = {"schema": 1, **_versions(), **_machine()}
    started = time.perf_counter()
    self_check()
    found["self_check"] = {"ok": True, "seconds": round(time.perf_counter() - started, 2)}
    if json:
        emit(found)
    else:
        _print(found)
    return 0


def self_check() -> None:
    """Cut half the channels of a small generated network, save it, load it, and compare.

    Raises:
        CertificateError: the loaded network gives other outputs.
    """
    import torch
    from torch import nn

    import secateur as sc
    from secateur.errors import CertificateError

    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3))

    recipe = {"target": {"sparsity": 0.5}, "measure": {"latency": False}}
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory(prefix="secateur-doctor-") as folder:
        torch.manual_seed(0)
        example = torch.randn(2, 1, 8, 8)
        result = sc.prune(build().eval(), example, recipe=recipe)
        loaded = sc.load(result.save(Path(folder) / "out"), model=build).eval()
        with torch.no_grad():
            same = torch.equal(loaded(example), result.model(example))
    if not same or result.report.units.removed != 4:
        raise CertificateError(
            "The self-check failed: a small network is not the same after saving and loading.",
            hint="Please report it with the output of `secateur doctor --json`.",
        )


def _versions() -> dict[str, object]:
    import secateur

    return {
        "secateur": secateur.__version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in CORE},
        "extras": {extra: {name: _version(name) for name in names} for extra, names in EXTRAS.items()},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, object]:
    import torch

    from secateur.report import environment

    place = environment()
    return {
        "platform": place.platform,
        "cpu": place.cpu,
        "threads": place.threads,
        "cuda": torch.cuda.is_available(),
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "terminal": sys.stdout.isatty(),
    }


def _print(found: dict[str, Any]) -> None:
    from secateur.report.safe_text import size

    rows = [("secateur", found["secateur"]), ("python", found["python"])]
    rows += [(name, version or "missing") for name, version in found["packages"].items()]
    for extra, names in found["extras"].items():
        absent = [name for name, version in names.items() if version is None]
        there = ", ".join(f"{name} {version}" for name, version in names.items() if version)
        missing = f"absent: {', '.join(absent)}; pip install 'secateur[{extra}]'"
        rows.append((f"extra {extra}", "; ".join(filter(None, (there, missing if absent else "")))))
    rows += [("platform", found["platform"]), ("cpu", found["cpu"]), ("torch threads", str(found["threads"]))]
    rows.append(("cuda", "yes" if found["cuda"] else "no"))
    free = found["disk_free_bytes"]
    rows.append(("disk free here", size(free) + (", which is little" if free < LITTLE_DISK else "")))
    table(("what", "found"), rows)
    write(f"self-check: ok, pruned, saved and loaded a small network in {found['self_check']['seconds']} s\n")
