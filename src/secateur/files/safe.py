"""Read and write tensors and JSON without ever running what a file holds.

Why there is a reader and a writer here although the safetensors library is installed: the library writes its
metadata in another order each time, so the same weights give different bytes, and it opens the file by name
again after it was checked. Here one descriptor serves check, hash and data. The tests hold both against the
library.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from secateur.errors import FileRefusedError, InputError, ResourceError
from secateur.files.atomic import atomic_file
from secateur.files.header import ITEM_SIZE, Entry, Header, build_header, corrupt, header_length, parse_header
from secateur.files.parse import parse_json
from secateur.files.seeds import canonical_json
from secateur.files.sniff import open_regular, refuse, sniff, sniff_stream

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["load_json", "load_metadata", "load_tensors", "save_tensors", "sniff"]

_ALIASES = "secateur.aliases"
_CHUNK = 1 << 24


def load_json(
    path: str | Path,
    *,
    max_bytes: int = 64 << 20,
    max_depth: int = 64,
    within: str | Path | None = None,
    sha256: str | None = None,
) -> Any:
    """Read a JSON file that may be hostile.

    Args:
        path: the file.
        max_bytes: largest size that is read.
        max_depth: how deep objects and lists may nest.
        within: where ``path`` is a name that was read from another file: the folder it must not leave.
        sha256: what was recorded of the file; the same bytes are checked and read.

    Returns:
        dicts, lists, str, int, finite float, bool and None.

    Raises:
        FileRefusedError: missing, too large, another kind of file (said by its content), not plain JSON, or another
            SHA-256.
    """
    path, folder = Path(path), None if within is None else Path(within)
    with open_regular(path, within=folder) as stream:
        kind = sniff_stream(stream)
        if kind not in {"json", "text", "unknown"}:
            raise refuse(path, kind, wanted="JSON")
        data = stream.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise FileRefusedError(f"{path} is refused: larger than {max_bytes} bytes")
    require_hash(str(path), hashlib.sha256(data).hexdigest() if sha256 is not None else None, sha256)
    return parse_json(data, origin=str(path), max_depth=max_depth)


def require_hash(origin: str, found: str | None, recorded: str | None) -> None:
    """Refuse a file whose SHA-256 is not the one that was recorded; None means that nothing was recorded.

    Raises:
        FileRefusedError: they differ.
    """
    if recorded is not None and (found is None or not hmac.compare_digest(found, recorded.lower())):
        raise FileRefusedError(
            f"{origin} is refused: its SHA-256 is not the one that was recorded",
            why=f"expected {recorded}, found {found}",
            hint="the file was damaged or exchanged; get it again",
        )


def load_metadata(path: str | Path) -> dict[str, str]:
    """Read the free text fields of a safetensors file, without the ones that secateur keeps for itself.

    Raises:
        FileRefusedError: as ``load_tensors``.
    """
    with open_regular(Path(path)) as stream:
        header, _ = _read_header(stream, Path(path))
    return {key: value for key, value in header.metadata.items() if not key.startswith("secateur.")}


def load_tensors(
    path: str | Path,
    *,
    sha256: str | None = None,
    within: str | Path | None = None,
    max_bytes: int | None = None,
) -> dict[str, Tensor]:
    """Read a safetensors file.

    Args:
        path: the file, known by its content and not by its name.
        sha256: what ``save_tensors`` returned. The format has no checksum, so this is the only way to notice
            a flipped bit inside a tensor.
        within: where ``path`` is a name that was read from another file: the folder it must not leave.
        max_bytes: most bytes of tensors that are taken; told by the header, before memory is asked for.

    Returns:
        name -> tensor on the CPU, sorted by name. Names that were tied when saved share one tensor again.

    Raises:
        FileRefusedError: missing, a pickle or an archive, truncated, a header that lies, larger than `max_bytes`, or
            another SHA-256.
        ResourceError: the tensors are larger than the memory of this machine.

    Cost: one pass over the file; memory for the tensors and nothing else.
    """
    path, folder = Path(path), None if within is None else Path(within)
    with open_regular(path, within=folder) as stream:
        header, raw = _read_header(stream, path)
        _require_room(header, max_bytes, path)
        digest = hashlib.sha256(raw)
        stored = {entry.name: _read_tensor(stream, entry, digest, path) for entry in header.entries}
        if stream.read(1):
            raise corrupt(str(path), "it grew while it was read")
    require_hash(str(path), digest.hexdigest(), sha256)
    for alias, name in _aliases(header, path).items():
        stored[alias] = stored[name]
    return dict(sorted(stored.items()))


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file, whole or not at all.

    Tied tensors (same memory, shape, strides and dtype) are stored once, under the first of their names in
    alphabetical order; the others are listed in the metadata and come back tied. Other readers of the format
    see the stored name only.

    Args:
        path: the file; one that exists is replaced in one step.
        tensors: name -> dense tensor of any device, shape and strides; read only.
        metadata: free text fields; ``format: pt`` is added for other readers.

    Returns:
        SHA-256 of the file in hex, for ``load_tensors``. The same tensors give the same bytes.

    Raises:
        InputError: a sparse, quantised or meta tensor, a dtype that the format lacks, or a reserved name.
        ResourceError: the disk or the quota is full.
        FileRefusedError: the folder is missing or may not be written.

    Cost: one pass; one tensor at a time is copied where it is not contiguous or not on the CPU.
    """
    header, stored = _layout(tensors, metadata or {})
    with atomic_file(path) as sink:
        sink.write(header)
        for tensor in stored:
            _write_tensor(sink.write, tensor)
    return sink.sha256


def size_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> int:
    """Bytes of the file that `save_tensors` would write, without writing it.

    Args:
        tensors: as for `save_tensors`.
        metadata: as for `save_tensors`.

    Returns:
        Bytes, exact: those of the header and of every tensor that is stored.

    Raises:
        InputError: as `save_tensors`.

    Cost: the header is built; no value is read.
    """
    header, stored = _layout(tensors, metadata or {})
    return len(header) + sum(tensor.numel() * tensor.element_size() for tensor in stored)


def _layout(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, list[Tensor]]:
    """The header of the file, and the tensors whose bytes follow it, in order."""
    names = _dtype_names()
    for name, tensor in tensors.items():
        _check_tensor(name, tensor, names)
    stored, aliases = _split_aliases(tensors)
    fields = {"format": "pt", **metadata}
    if any(key.startswith("secateur.") for key in fields):
        raise InputError("metadata keys that begin with 'secateur.' are reserved")
    if aliases:
        fields[_ALIASES] = canonical_json(aliases)
    # Widest items first keeps every tensor aligned to its own item size, as the library does.
    order = sorted(stored, key=lambda n: (-ITEM_SIZE[names[stored[n].dtype]], n))
    header = build_header([(n, names[stored[n].dtype], tuple(stored[n].shape)) for n in order], fields)
    return header, [stored[name] for name in order]


def _read_header(stream: BinaryIO, path: Path) -> tuple[Header, bytes]:
    kind = sniff_stream(stream)
    if kind not in {"safetensors", "unknown", "empty"}:
        raise refuse(path, kind, wanted="safetensors")
    size = stream.seek(0, 2)
    stream.seek(0)
    prefix = stream.read(8)
    length = header_length(prefix, size=size, origin=str(path))
    text = stream.read(length)
    return parse_header(text, payload=size - 8 - length, origin=str(path)), prefix + text


def _require_room(header: Header, max_bytes: int | None, path: Path) -> None:
    size = header.entries[-1].end if header.entries else 0
    if max_bytes is not None and size > max_bytes:
        raise FileRefusedError(
            f"{path} is refused: it holds {size} bytes of tensors", why=f"at most {max_bytes} can belong to this model"
        )
    if size > memory():
        raise ResourceError(f"{path} does not fit into memory: {size} bytes of tensors, {memory()} bytes of memory")


@cache
def memory() -> int:
    """Bytes of memory that this machine has; a very large number where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 1 << 62


def _read_tensor(stream: BinaryIO, entry: Entry, digest: hashlib._Hash, path: Path) -> Tensor:
    import torch

    dtype = dtypes()[entry.dtype]
    if entry.begin == entry.end:
        return torch.empty(entry.shape, dtype=dtype)
    buffer = bytearray(entry.end - entry.begin)
    if stream.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
        raise corrupt(str(path), "it shrank while it was read")
    digest.update(buffer)
    # A bool byte other than 0 and 1 is undefined behaviour in the kernels that read it.
    if dtype == torch.bool and int(torch.frombuffer(buffer, dtype=torch.uint8).max()) > 1:
        raise corrupt(str(path), f"tensor {entry.name[:80]!a} holds truth values other than 0 and 1")
    return torch.frombuffer(buffer, dtype=dtype).reshape(entry.shape)


def _write_tensor(write: Callable[[memoryview], None], tensor: Tensor) -> None:
    import torch

    dense = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if dense.numel() == 0:
        return
    # Bytes are taken by way of numpy, which has no bfloat16 and no float8: hence the view as bytes first.
    # A single element counts as contiguous whatever its stride, which the view as bytes does not accept.
    plain = dense.as_strided((dense.numel(),), (1,))
    real = torch.view_as_real(plain).reshape(-1) if plain.is_complex() else plain
    data = real.view(torch.uint8).numpy().data
    for start in range(0, len(data), _CHUNK):
        write(data[start : start + _CHUNK])


def _check_tensor(name: str, tensor: Tensor, names: Mapping[torch.dtype, str]) -> None:
    import torch

    why = ""
    if not isinstance(name, str) or name == "__metadata__":
        why = "the name is reserved or no text"
    elif tensor.layout != torch.strided or tensor.is_quantized:
        why = "only dense tensors can be stored"
    elif tensor.device.type == "meta":
        why = "it is on the meta device and has no values"
    elif tensor.dtype not in names:
        why = f"the safetensors format has no {tensor.dtype}"
    if why:
        raise InputError(f"tensor {str(name)[:80]!a} cannot be saved", why=why)


def _split_aliases(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in sorted(tensors.items()):
        # The address alone does not tell a square weight from its transpose, nor a tensor from its conjugate view.
        view = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.is_conj(), tensor.is_neg())
        key = (tensor.data_ptr(), *view)
        # Empty tensors all have the address 0 and are no ties.
        if tensor.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            stored[name] = tensor
    return stored, aliases


def _aliases(header: Header, path: Path) -> dict[str, str]:
    text = header.metadata.get(_ALIASES)
    if text is None:
        return {}
    table = parse_json(text.encode(), origin=f"the alias table of {path}", max_depth=1)
    names = {entry.name for entry in header.entries}
    if (
        not isinstance(table, dict)
        or any(not isinstance(v, str) or v not in names for v in table.values())
        or names & set(table)
    ):
        raise corrupt(str(path), "its table of tied tensors names what is not there, or is there twice")
    return table


@cache
def dtypes() -> dict[str, torch.dtype]:
    """Name of a dtype in a safetensors file -> dtype of torch."""
    return {name: dtype for dtype, name in _dtype_names().items()}


@cache
def _dtype_names() -> dict[torch.dtype, str]:
    import torch

    spelled = {
        "BOOL": "bool",
        "U8": "uint8",
        "I8": "int8",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "U16": "uint16",
        "I16": "int16",
        "F16": "float16",
        "BF16": "bfloat16",
        "U32": "uint32",
        "I32": "int32",
        "F32": "float32",
        "U64": "uint64",
        "I64": "int64",
        "F64": "float64",
        "C64": "complex64",
    }
    return {getattr(torch, theirs): name for name, theirs in spelled.items()}
