"""How small a pruned model gets: archives of weights pruned by size, beside what others would make of the same bytes.

    python benchmarks/archive.py [MODEL_FOLDER] [--zeros 0.5 0.7 0.8 0.9] [--dtype bfloat16] [--everything]
                                 [--threads 2] [--json FILE]

MODEL_FOLDER is a Hugging Face folder of a language model (default: one random Llama). At every share of zeros the
smallest numbers of each linear layer go (--everything: of each embedding as well). Two rows each: the linear layers by
themselves, and the whole model. Ratios are the bytes of the dense tensors over those of the file; "bound" is the
entropy of places, exponents and random rest of each matrix, "gzip" what zlib's level 6 makes of the dense bytes of
the first matrices. Times are of the process (packing, loading) and by the clock. Every archive is read back and
compared bit by bit.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from secateur.deployment import SparseLinear, load_archive, save_archive
from secateur.deployment.formats.base import same_bits
from secateur.deployment.linear import quantize
from secateur.files import load_tensors, save_tensors
from secateur.files.mapped import map_file
from secateur.measure.machine import machine


def weights(folder: Path | None) -> dict[str, Tensor]:
    if folder is not None:
        return load_tensors(folder / "model.safetensors")
    chance = torch.Generator().manual_seed(0)
    return {f"layers.{at}.weight": torch.randn(1024, 1024, generator=chance) * 0.02 for at in range(8)}


def pruned(tensors: Mapping[str, Tensor], zeros: float, dtype: torch.dtype, *, everything: bool) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        found[name] = tensor.to(dtype)
        if zeros and tensor.dim() == 2 and (everything or "embed" not in name):
            size = found[name].float().abs()
            border = size.flatten().kthvalue(int(zeros * size.numel())).values
            found[name] = found[name].masked_fill(size <= border, 0)
    return found


def bound(tensor: Tensor) -> float:
    """Bytes: entropy of places and of the exponents of what is there (whole numbers: of themselves), and the rest."""
    there = tensor[tensor != 0]
    share = there.numel() / tensor.numel()
    symbols = torch.frexp(there.float()).exponent if there.is_floating_point() else there
    counts = symbols.unique(return_counts=True)[1].double() / max(1, there.numel())
    places = sum(-p * np.log2(p) for p in (share, 1 - share) if p)
    rest = 8 * tensor.element_size() - 8
    return float(tensor.numel() / 8) * float(places + share * (rest - float((counts * counts.log2()).sum())))


def timed(work: Callable[[], object]) -> tuple[float, float, object]:
    cpu, clock = time.process_time(), time.perf_counter()
    made = work()
    return time.process_time() - cpu, time.perf_counter() - clock, made


def row(tensors: dict[str, Tensor], folder: Path) -> dict[str, float]:
    dense = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    path = folder / "archive.safetensors"
    pack_cpu, pack, digest = timed(lambda: save_archive(path, tensors))
    load_cpu, load, again = timed(lambda: load_archive(path, sha256=str(digest)))
    assert isinstance(again, dict)
    assert again.keys() == tensors.keys()
    assert all(same_bits(again[name], tensors[name]) for name in tensors)
    plain = save_tensors(folder / "plain.safetensors", tensors)
    mapped = timed(lambda: map_file(folder / "plain.safetensors", sha256=plain))[1]
    matrices = [tensor for tensor in tensors.values() if tensor.numel()]
    gzip = sum(len(zlib.compress(t.contiguous().view(-1).view(torch.uint8).numpy().data, 6)) for t in matrices[:20])
    sample = sum(tensor.numel() * tensor.element_size() for tensor in matrices[:20])
    return {
        "megabytes": path.stat().st_size / 1e6, "ratio": dense / path.stat().st_size,
        "bound": dense / sum(map(bound, matrices)), "gzip": sample / gzip, "pack_s": pack, "pack_cpu_s": pack_cpu,
        "load_s": load, "load_cpu_s": load_cpu, "dense_mapped_s": mapped,
    }  # fmt: skip


def formats(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """The same linear layers in the formats that run, for the column of what stays in memory."""
    found = {}
    for name in ("bitmask", "slide16"):
        size = dense = 0
        for key, tensor in list(tensors.items())[:10]:
            if tensor.dim() == 2 and "embed" not in key:
                layer = torch.nn.Linear(tensor.shape[1], tensor.shape[0], bias=False, device="meta")
                layer.weight = torch.nn.Parameter(tensor)
                size += SparseLinear.of(layer, name).size_bytes()
                dense += tensor.numel() * tensor.element_size()
        found[name] = dense / size
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--zeros", type=float, nargs="+", default=[0.5, 0.7, 0.8, 0.9])
    parser.add_argument("--dtype", choices=["bfloat16", "float32", "int8"], default="bfloat16")
    parser.add_argument("--everything", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for zeros in options.zeros:
            dtype = torch.float32 if options.dtype == "int8" else getattr(torch, options.dtype)
            tensors = pruned(weights(options.folder), zeros, dtype, everything=options.everything)
            if options.dtype == "int8":
                tensors = {name: quantize(t)[0] if t.dim() == 2 else t for name, t in tensors.items()}
            linear = {name: t for name, t in tensors.items() if t.dim() == 2 and "embed" not in name}
            for what, chosen in {"linear": linear, "whole": tensors}.items():
                line = {"zeros": zeros, "what": what, **row(chosen, Path(scratch))}
                found.append(line | (formats(chosen) if what == "linear" and dtype != torch.float32 else {}))
                print({key: round(v, 3) if isinstance(v, float) else v for key, v in found[-1].items()}, flush=True)
    report = {**machine(), "load": os.getloadavg()[0], "dtype": options.dtype, "rows": found}
    print({key: value for key, value in report.items() if key != "rows"})
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
