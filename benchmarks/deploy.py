"""What a layer with zeros costs: PyTorch's dense products, own dense kernels and every format, in one interleaved run.

    python benchmarks/deploy.py [--shape 4096 4096] [--batch 1] [--threads 2] [--rounds 15] [--zeros 0.5 0.7 0.9]
                                [--formats bitmask slide16 slide32 delta] [--processor-time] [--json FILE]

Every contender has several copies of its weights, together larger than the caches (--megabytes), so that they come from
memory. A round runs each contender through all of its copies, in a new random order, and takes the mean of a call: so
does a model with many layers of one size, whose code stays in the caches while its weights pass by. Ratios are medians
over the rounds of (contender / reference) within a round, so that a busy machine slows both. The second "torch float32"
is the same product once more: its ratio to the first is the null, and no difference smaller than its interval counts.
--processor-time (with one thread) counts the processor's time instead of the clock's: what is left to say on a machine
that others use, though caches and memory are still shared.
"limit" is the time that the contender's bytes would take at the rate at which this machine reads memory in the same
rounds.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.deployment import native
from secateur.deployment.linear import SparseLinear

INT8_ZEROS = 0.6
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


@dataclass
class Contender:
    calls: list[Callable[[], object]]
    megabytes: float


def copied(make: Callable[[], Callable[[], object]], size: float, megabytes: float) -> Contender:
    return Contender([make() for _ in range(max(2, math.ceil(megabytes / size)))], size)


def dense(weight: Tensor, x: Tensor) -> Callable[[], object]:
    own = weight.clone()
    return lambda: functional.linear(x, own)


def packed(layer: SparseLinear, x: Tensor) -> Callable[[], object]:
    own = copy.deepcopy(layer)  # called as a model calls it: what the way to the kernel costs belongs to its time
    return lambda: own(x)


def pruned(rows: int, columns: int, zeros: float) -> nn.Linear:
    layer = nn.Linear(columns, rows, bias=False)
    with torch.no_grad():
        layer.weight.normal_()
        border = layer.weight.abs().flatten().kthvalue(max(1, int(zeros * layer.weight.numel()))).values
        layer.weight.masked_fill_((layer.weight.abs() <= border) & (zeros > 0), 0)
    return layer


def contenders(options: argparse.Namespace) -> dict[str, Contender]:
    rows, columns = options.shape
    size, x = 4 * rows * columns / 1e6, torch.randn(options.batch, columns)
    half = x.bfloat16()
    whole = pruned(rows, columns, 0.0)
    found = {}

    def add(name: str, make: Callable[[], Callable[[], object]], megabytes: float) -> None:
        found[name] = copied(make, megabytes, options.megabytes)

    add("torch float32", lambda: dense(whole.weight.detach(), x), size)
    add("torch float32, again", lambda: dense(whole.weight.detach(), x), size)
    add("torch bfloat16", lambda: dense(whole.weight.detach().bfloat16(), half), size / 2)
    buffer = torch.ones(int(options.megabytes * 250_000))
    found["read memory"] = Contender([buffer.sum], options.megabytes)
    for word, dtype in DTYPES.items():
        own = SparseLinear.of(whole, "dense", dtype)
        inputs = half if word == "bfloat16" else x
        add(f"own dense {word}", lambda own=own, inputs=inputs: packed(own, inputs), own.size_bytes() / 1e6)
        for zeros in options.zeros:
            share = INT8_ZEROS if word == "int8" and zeros == 0.5 else zeros
            layer = pruned(rows, columns, share)
            for format in options.formats:
                own = SparseLinear.of(layer, format, dtype)
                name = f"{format} {word} {share:.0%}"
                add(name, lambda own=own, inputs=inputs: packed(own, inputs), own.size_bytes() / 1e6)
    return found


def measure(found: dict[str, Contender], rounds: int, clock: Callable[[], float]) -> dict[str, np.ndarray]:
    taken: dict[str, list[float]] = {name: [] for name in found}
    order, chance = list(found), random.Random(0)
    for number in range(rounds + 2):
        chance.shuffle(order)
        for name in order:
            start = clock()
            for call in found[name].calls:
                call()
            if number >= 2:
                taken[name].append((clock() - start) / len(found[name].calls))
    return {name: np.array(values) * 1e3 for name, values in taken.items()}


def row(name: str, one: Contender, taken: dict[str, np.ndarray]) -> dict[str, object]:
    mine, word = taken[name], next((word for word in DTYPES if word in name), "")
    limit = taken["read memory"] * (one.megabytes / row.buffer)  # type: ignore[attr-defined]

    def against(other: str) -> float | None:
        return float(np.median(taken[other] / mine)) if other in taken else None

    return {
        "name": name, "ms": float(np.median(mine)), "fastest_ms": float(mine.min()), "megabytes": one.megabytes,
        "times_torch_float32": against("torch float32"), "times_torch_bfloat16": against("torch bfloat16"),
        "times_own_dense": against(f"own dense {word}"), "times_limit": float(np.median(mine / limit)),
    }  # fmt: skip


def machine(threads: int) -> dict[str, object]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(), "isa": native.isa(),
        "threads": threads, "torch": torch.__version__, "load": os.getloadavg()[0],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 4096), metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--megabytes", type=float, default=160)
    parser.add_argument("--zeros", type=float, nargs="+", default=[0.5, 0.7, 0.9])
    parser.add_argument("--formats", nargs="+", default=["bitmask", "slide16", "slide32", "delta"])
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.processor_time and options.threads != 1:
        parser.error("--processor-time needs --threads 1: threads that wait for each other use the processor too")
    clock = time.thread_time if options.processor_time else time.perf_counter
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    row.buffer = options.megabytes  # type: ignore[attr-defined]
    with torch.inference_mode():
        found = contenders(options)
        taken = measure(found, options.rounds, clock)
    about = machine(options.threads)
    lines = [row(name, one, taken) for name, one in found.items()]
    null = np.percentile(taken["torch float32, again"] / taken["torch float32"], [10, 50, 90])
    print(f"{options.shape[0]} x {options.shape[1]}, batch {options.batch}, {options.rounds} rounds, {about}")
    print("processor time" if options.processor_time else "clock time")
    print(f"null (p10, median, p90): {null.round(3).tolist()}")
    print(f"{'':26}{'ms':>9}{'fastest':>9}{'MB':>7}{'x f32':>8}{'x bf16':>8}{'x own':>8}{'/limit':>8}")
    for line in lines:
        cells = [line[key] for key in ("times_torch_float32", "times_torch_bfloat16", "times_own_dense", "times_limit")]
        words = "".join(f"{'' if cell is None else format(cell, '.2f'):>8}" for cell in cells)
        print(f"{line['name']:26}{line['ms']:9.3f}{line['fastest_ms']:9.3f}{line['megabytes']:7.1f}{words}")
    if options.json:
        options.json.write_text(json.dumps({"machine": about, "null": null.tolist(), "rows": lines}, indent=1))


if __name__ == "__main__":
    main()
