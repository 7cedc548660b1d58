"""Images with labels: parquet files as Hugging Face data sets write them, and folders of classes."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from secateur.errors import FileRefusedError, InputError, ResourceError, UnsupportedError
from secateur.files.safe import memory
from secateur.files.sniff import open_regular
from secateur.sources.in_memory import Arrays, DataSet, build_dataset
from secateur.sources.tables import Table, dataset_of
from secateur.sources.text import Tokenizer

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})
LABEL_COLUMNS = ("label", "labels", "fine_label")
# The only formats that are opened: Pillow's own list has some that start other programs (EPS) or fetch plugins.
FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
MAX_IMAGE_BYTES = 1 << 26
MAX_PIXELS = 1 << 25  # of one image: 33 million
MAX_ROWS = 1 << 24
_TEST_NAMES = ("test", "validation", "valid", "val")


def load_parquet(
    path: str | Path,
    *,
    batch_size: int = 64,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    numbers: Mapping[str, int] | None = None,
) -> DataSet:
    """Read images (column ``image`` with ``bytes``) and integer labels (column ``label``) from parquet.

    All images are decoded into memory as uint8, at 3 kB for one of 32x32x3. Without a column ``image`` it is a table
    of numbers or text, as `secateur.sources.tables.load_table` reads them.

    Args:
        path: a file, then split 80 to 20, or a folder with ``train*.parquet`` and ``test*.parquet``.
        tokenizer: for columns of text.
        numbers: label -> class number, for labels that are words.
        batch_size: samples per batch.
        seed: of split and shuffles.

    Raises:
        UnsupportedError: pyarrow or pillow is not installed.
        FileRefusedError: a file is no parquet, or an image cannot be decoded.
        InputError: columns are missing, or the images differ in size.

    Cost: about 0.1 ms per 32x32 JPEG.
    """
    path = Path(path)
    tables = _tables(path)
    if tables is not None:
        return dataset_of(f"parquet:{path}", *tables, tokenizer=tokenizer, numbers=numbers, batch_size=batch_size,
                          seed=seed)  # fmt: skip
    if path.is_dir():
        train = _parquet_files(sorted(path.glob("train*.parquet")), path)
        # The first name that is there: a set with test and validation keeps the latter for choosing.
        tests = next((found for name in _TEST_NAMES if (found := sorted(path.glob(f"{name}*.parquet")))), [])
        test = _parquet_files(tests, path) if tests else None
    else:
        train, test = _parquet_files([path], path), None
    return build_dataset(f"parquet:{path}", train, test, batch_size=batch_size, seed=seed)


def _tables(path: Path) -> tuple[Table, Table | None] | None:
    """The parts of a data set as tables; None where the files hold images, or are for others to refuse."""
    try:
        import pyarrow.parquet as parquet
        from pyarrow import ArrowException
    except ImportError:
        return None
    train = sorted(path.glob("train*.parquet")) if path.is_dir() else [path]
    tests = next((found for name in _TEST_NAMES if (found := sorted(path.glob(f"{name}*.parquet")))), [])
    try:
        names = parquet.read_schema(train[0]).names if train else ["image"]
        if "image" in names or not {*LABEL_COLUMNS, "target"} & set(names):
            return None
        for file in (*train, *tests):
            rows = parquet.read_metadata(file).num_rows
            if rows > MAX_ROWS:
                raise FileRefusedError(f"{file} is refused: it claims {rows} rows, {MAX_ROWS} at most")
        held = parquet.read_table(tests).to_pydict() if tests else None
        return parquet.read_table(train).to_pydict(), held
    except (ArrowException, OSError):
        return None


def _parquet_files(files: Sequence[Path], asked: Path) -> Arrays:
    try:
        import pyarrow.parquet as parquet
        from pyarrow import ArrowException
    except ImportError as error:
        raise UnsupportedError("parquet: needs pyarrow", hint="pip install 'secateur[data]'") from error
    if not files or not all(file.is_file() for file in files):
        raise InputError(f"there is no parquet file at {asked}", hint="a folder needs train*.parquet")
    images: list[bytes] = []
    labels: list[int] = []
    for file in files:
        try:
            names = parquet.read_schema(file).names
            column = next((name for name in LABEL_COLUMNS if name in names), None)
            if "image" not in names or column is None:
                raise InputError(f"{file} has the columns {names}", hint="it needs image (bytes) and label")
            rows = parquet.read_metadata(file).num_rows
            if rows > MAX_ROWS:
                raise FileRefusedError(f"{file} is refused: it claims {rows} rows, {MAX_ROWS} at most")
            table = parquet.read_table(file, columns=["image", column])
        except (ArrowException, OSError) as error:
            raise FileRefusedError(f"{file} cannot be read as parquet", why=str(error)) from error
        images += map(image_bytes, table["image"].to_pylist())
        labels += table[column].to_pylist()
    return decode(images, str(asked)), _labels(labels, str(asked))


def load_folder(path: str | Path, *, batch_size: int = 64, seed: int = 0) -> DataSet:
    """Read images from one sub-folder per class, or from ``train`` and ``test`` folders of such.

    Args:
        path: the folder; classes are numbered in the order of their names.
        batch_size: samples per batch.
        seed: of split and shuffles.

    Raises:
        UnsupportedError: pillow is not installed.
        FileRefusedError: an image cannot be decoded.
        InputError: no class or image is found, or the images differ in size.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"there is no folder {path}")
    held = next((path / name for name in _TEST_NAMES if (path / name).is_dir()), None)
    if (path / "train").is_dir():
        classes = _class_names(path / "train")
        train = _class_folders(path / "train", classes)
        test = _class_folders(held, classes) if held is not None else None
    else:
        train, test = _class_folders(path, _class_names(path)), None
    return build_dataset(f"folder:{path}", train, test, batch_size=batch_size, seed=seed)


def _class_names(path: Path) -> list[str]:
    names = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    if len(names) < 2:
        raise InputError(f"{path} has {len(names)} class folders", hint="make one sub-folder per class")
    return names


def _class_folders(path: Path, classes: Sequence[str]) -> Arrays:
    # Numbered by the training part: a class of the test part alone would take the number of another.
    unknown = sorted(set(_class_names(path)) - set(classes))
    if unknown:
        raise InputError(f"{path} has the class {unknown[0]!r}, which the training part has not")
    files = [
        (file, number)
        for number, name in enumerate(classes)
        for file in sorted((path / name).glob("*"))
        if file.suffix.lower() in SUFFIXES
    ]
    images = decode((image_bytes({"path": str(file)}) for file, _ in files), str(path))
    return images, _labels([number for _, number in files], str(path))


def _labels(labels: Sequence[object], where: str) -> npt.NDArray[np.int64]:
    try:
        array = np.asarray(labels)
        if array.dtype.kind not in "iu":
            raise ValueError(f"the labels are {array.dtype}")
    except ValueError as error:
        raise InputError(f"the labels of {where} are no integers", why=str(error)) from error
    return array.astype(np.int64)


def image_bytes(row: object) -> bytes:
    """The bytes of an image: as they are, in a mapping with "bytes", or those of the file at its "path".

    Raises:
        FileRefusedError: none of these, no ordinary file, or larger than `MAX_IMAGE_BYTES`.
    """
    data = row.get("bytes") if isinstance(row, dict) else row
    if data is None and isinstance(row, dict) and isinstance(row.get("path"), str):
        with open_regular(Path(row["path"])) as stream:
            data = stream.read(MAX_IMAGE_BYTES + 1)
    if not isinstance(data, bytes):
        raise FileRefusedError(f"an image is a {type(data).__name__}, not bytes")
    if len(data) > MAX_IMAGE_BYTES:
        raise FileRefusedError(f"an image has more than {MAX_IMAGE_BYTES} bytes")
    return data


def decode(images: Iterable[bytes], where: str) -> npt.NDArray[np.uint8]:
    """Decode to uint8 ``[samples, channels, height, width]``; one channel for grey images, else three.

    Args:
        images: the bytes of one file each; PNG, JPEG, BMP or WebP, told by their content.
        where: they come from, for messages.

    Raises:
        UnsupportedError: pillow is not installed.
        FileRefusedError: another format, damaged, or more pixels than `MAX_PIXELS`.
        InputError: no image, or images of different sizes.
        ResourceError: together they are larger than memory.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise UnsupportedError("images need pillow", hint="pip install 'secateur[data]'") from error
    decoded: list[npt.NDArray[np.uint8]] = []
    size = 0
    for number, data in enumerate(images):
        try:
            with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
                # The header says how large it becomes; nothing was decoded yet.
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"it has {image.width} x {image.height} pixels, at most {MAX_PIXELS} are decoded")
                warnings.simplefilter("ignore")
                # Sixteen-bit grey is a grey image too; palettes and alpha become RGB, as the networks take it.
                grey = image.mode in {"1", "L", "I;16"}
                pixels = np.asarray(image.convert("L" if grey else "RGB"), dtype=np.uint8)
        except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
            raise FileRefusedError(
                f"image {number} of {where} cannot be decoded",
                why=str(error),
                hint=f"images are {', '.join(FORMATS)}, whatever their names end in",
            ) from error
        size += pixels.nbytes
        if size > memory() // 2:
            raise ResourceError(f"the images of {where} do not fit into half of this machine's memory")
        decoded.append(pixels[None] if grey else pixels.transpose(2, 0, 1))
        if decoded[-1].shape != decoded[0].shape:
            raise InputError(
                f"image {number} of {where} is {decoded[-1].shape}, image 0 is {decoded[0].shape}",
                hint="bring all images to one size and mode first",
            )
    if not decoded:
        raise InputError(f"there is no image in {where}", hint=f"known endings: {', '.join(sorted(SUFFIXES))}")
    return np.stack(decoded)
