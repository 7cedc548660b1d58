"""Build the kernels with the C++ compiler that is there. Needs neither torch nor secateur."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "src"
COMMON = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-Wall", "-Wextra")
# GCC takes the undefined operands of its own AVX-512 intrinsics for mistakes.
QUIET = ("-Wno-uninitialized", "-Wno-maybe-uninitialized")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512cd", "-mavx512dq", "-mavx512vl", "-mfma", "-mpopcnt", *QUIET)
UNITS: dict[str, tuple[str, ...]] = {
    "scalar": (),
    "avx2": ("-mavx2", "-mfma", "-mpopcnt"),
    "avx512": AVX512,
    "avx512vbmi2": (*AVX512, "-mavx512vbmi2"),
    "entry": ("-fopenmp",),
}
X86_ONLY = ("avx2", "avx512", "avx512vbmi2")
# The operator throws what PyTorch throws, and is written against the interface of PyTorch 2.10.
OPERATOR = ("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000")


class BuildError(Exception):
    """There is no compiler, or it failed."""


def build(target: Path, *, extra: tuple[str, ...] = (), link_openmp: bool = False) -> Path:
    """Compile the library.

    Args:
        target: the file to write; it appears whole or not at all.
        extra: further flags, for example of a sanitizer.
        link_openmp: name the compiler's own OpenMP as a library to load. Without it the library takes the OpenMP that
            is loaded already, which is PyTorch's: one pool of threads instead of two.

    Raises:
        BuildError: says what the compiler said.
    """
    compiler = find_compiler()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent) as folder:
        objects = []
        for unit, flags in _units().items():
            objects.append(str(Path(folder) / f"{unit}.o"))
            _run([compiler, *COMMON, *flags, *extra, "-c", str(SOURCES / f"{unit}.cpp"), "-o", objects[-1]])
        draft = Path(folder) / target.name
        openmp = ["-fopenmp"] if link_openmp else []
        _run([compiler, "-shared", *extra, *objects, *openmp, "-o", str(draft)])
        draft.replace(target)
    return target


def build_operator(target: Path, include: Path, libraries: Path) -> Path:
    """Compile the operator of PyTorch, which calls the kernels without Python in between.

    Args:
        target: the file to write; it appears whole or not at all.
        include: PyTorch's headers.
        libraries: PyTorch's libraries.

    Raises:
        BuildError: says what the compiler said.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent) as folder:
        draft = Path(folder) / target.name
        link = [f"-L{libraries}", "-ltorch_cpu", "-o", str(draft)]
        _run([find_compiler(), *OPERATOR, "-isystem", str(include), "-shared", str(SOURCES / "torch_op.cpp"), *link])
        draft.replace(target)
    return target


def library() -> Path:
    """The built library: that of the wheel, or one in the user's cache folder, built at the first call.

    Raises:
        BuildError: it must be built and cannot.
    """
    mine = Path(__file__).parent / "kernels.so"
    if mine.is_file():
        return mine
    target = cache_folder() / f"kernels-{fingerprint()}.so"
    return target if target.is_file() else build(target)


def cache_folder() -> Path:
    """Where this user's programs keep what can be made again: ``$XDG_CACHE_HOME/secateur``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "secateur"


def fingerprint() -> str:
    """Changes with the sources, the flags, the compiler and the machine's kind."""
    digest = hashlib.sha256(repr((COMMON, OPERATOR, _units(), platform.machine(), sys.platform)).encode())
    digest.update(_run([find_compiler(), "--version"]).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def find_compiler() -> str:
    """The C++ compiler: ``$CXX``, g++ or clang++.

    Raises:
        BuildError: there is none.
    """
    for name in (os.environ.get("CXX", ""), "g++", "clang++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise BuildError("there is no C++ compiler (g++ or clang++)")


def _units() -> dict[str, tuple[str, ...]]:
    x86 = platform.machine() in ("x86_64", "AMD64")
    return {unit: flags for unit, flags in UNITS.items() if x86 or unit not in X86_ONLY}


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} did not run: {error}") from error
    if done.returncode:
        raise BuildError(f"{command[0]} failed: {done.stderr.strip()[-800:]}")
    return done.stdout
