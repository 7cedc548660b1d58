"""npz files as data: numbers only, never pickle."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from secateur.errors import FileRefusedError, InputError, NonFiniteError, ResourceError
from secateur.files.safe import memory
from secateur.files.sniff import open_regular
from secateur.sources.in_memory import Array, Arrays, DataSet, build_dataset


def load_npz(path: str | Path, *, batch_size: int = 64, seed: int = 0) -> DataSet:
    """Read ``x`` and ``y`` (split 80 to 20), or ``x_train, y_train, x_test, y_test``, from an npz file.

    uint8 inputs are taken as images ``[samples, channels, height, width]`` and standardised; floats are taken
    as they are; other integers stay integers (token numbers). Nothing else is guessed.

    Args:
        path: the file.
        batch_size: samples per batch.
        seed: of split and shuffles.

    Raises:
        FileRefusedError: no npz file, truncated, or with objects (pickle) in it.
        InputError: missing arrays, or shapes that do not fit.
        NonFiniteError: NaN or Inf in an array.
    """
    path = Path(path)
    arrays = _read(path)
    if {"x", "y"} <= set(arrays):
        train, test = _pair(arrays, "x", "y", path), None
    elif {"x_train", "y_train"} <= set(arrays):
        train = _pair(arrays, "x_train", "y_train", path)
        test = _pair(arrays, "x_test", "y_test", path) if {"x_test", "y_test"} <= set(arrays) else None
    else:
        raise InputError(
            f"{path} holds the arrays {sorted(arrays)}",
            hint="it needs x and y, or x_train and y_train (and x_test, y_test)",
        )
    # Here and not in a forward pass an hour later: the training part fits the model, and only the test part does not.
    if test is not None and test[0].shape[1:] != train[0].shape[1:]:
        raise InputError(f"{path}: a sample of x_train is {train[0].shape[1:]}, of x_test {test[0].shape[1:]}")
    return build_dataset(f"npz:{path}", train, test, batch_size=batch_size, seed=seed)


def _read(path: Path) -> dict[str, Array]:
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    try:
        with open_regular(path) as handle:
            _require_room(handle, path)
            return _arrays(np.load(handle, allow_pickle=False), path)
    except MemoryError as error:
        raise ResourceError(f"{path} does not fit into memory", why=str(error)) from error
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, KeyError, AttributeError, TypeError) as error:
        raise FileRefusedError(
            f"{path} is refused",
            why=str(error),
            hint="write it with numpy.savez from arrays of numbers (objects need pickle, which runs code)",
        ) from error


def _require_room(handle: BinaryIO, path: Path) -> None:
    """The sizes that an archive claims, before anything is unpacked; numpy itself holds arrays to them."""
    if not zipfile.is_zipfile(handle):
        handle.seek(0)
        return
    with zipfile.ZipFile(handle) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > memory() // 2:
        raise ResourceError(f"{path} unpacks to {size} bytes, more than half of this machine's memory")
    handle.seek(0)


def _arrays(loaded: object, path: Path) -> dict[str, Array]:
    if not isinstance(loaded, np.lib.npyio.NpzFile):
        raise FileRefusedError(f"{path} is a single array, not an npz file")
    with loaded as file:
        arrays = {name: file[name] for name in file.files}
    for name, array in arrays.items():
        # numpy hands out what is no array as bytes.
        if not isinstance(array, np.ndarray):
            raise FileRefusedError(f"{path}: {name} is no array")
    return arrays


def _pair(arrays: dict[str, Array], x: str, y: str, path: Path) -> Arrays:
    inputs, targets = arrays[x], arrays[y]
    for name, array in ((x, inputs), (y, targets)):
        if array.dtype.kind not in "biuf" or array.ndim == 0:
            raise InputError(f"{path}: {name} is {array.dtype}{list(array.shape)}, no array of numbers")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
            raise NonFiniteError(f"{path}: {name} has NaN or Inf at {where}")
    if len(inputs) != len(targets) or len(inputs) == 0:
        raise InputError(f"{path}: {x} has {len(inputs)} samples and {y} has {len(targets)}")
    # A uint8 target is a class number, not an image.
    return inputs, targets.astype(np.int64) if targets.dtype.kind in "biu" else targets
