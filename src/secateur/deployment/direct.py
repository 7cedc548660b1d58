"""The product as an operator without Python in between, where it can be built: small layers take less than such a call.

It is compiled against the headers that PyTorch brings, by its stable interface, which is there from PyTorch 2.10 on.
Everywhere else the operator that Python registers runs, with the same results.
"""

from __future__ import annotations

import ctypes
import hashlib
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from secateur.deployment import native
from secateur.deployment.formats import FORMATS, format_of

LEAST = (2, 10)  # PyTorch whose stable interface knows lists of tensors and words


@cache
def connect(many: int) -> str:
    """Build and load the operator, once.

    Args:
        many: inputs at once from which it hands a product on to the operator that Python registered.

    Returns:
        why it is not there, in words; "" where it is.
    """
    kernels, home = native.library(), native.home()
    if kernels is None or home is None:
        return native.why_not() or "the package secateur-native is not installed"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < LEAST:
        return f"PyTorch {torch.__version__} is older than {LEAST[0]}.{LEAST[1]}"
    try:
        library = ctypes.CDLL(str(_library(home)))
    except (home.BuildError, OSError) as error:
        return str(error)
    known = [name for name in FORMATS.names() if format_of(name).kernel is not None]
    numbers = (ctypes.c_int * len(known))(*(format_of(name).kernel or 0 for name in known))
    linear = ctypes.cast(kernels.secateur_linear, ctypes.c_void_p)
    # Loading has registered the operator; it is told where the kernels are before anything can call it.
    where = (linear, int(kernels.secateur_best_isa()), ctypes.c_int64(many))
    library.secateur_connect(*where, " ".join(known).encode(), numbers)
    return ""


def _library(home: ModuleType) -> Path:
    root = Path(torch.__file__).parent
    # The headers are those of this PyTorch, so another one gets a library of its own.
    mark = hashlib.sha256(f"{home.fingerprint()} {torch.__version__} {root}".encode()).hexdigest()[:16]
    target = Path(home.cache_folder()) / f"torch-op-{mark}.so"
    return target if target.is_file() else Path(home.build_operator(target, root / "include", root / "lib"))
