"""What a layer with zeros costs on a GPU: PyTorch's dense product, its 2:4 product and the Triton kernel, interleaved.

    python benchmarks/deploy_gpu.py [--shape 4096 4096] [--batch 1] [--rounds 30] [--zeros 0.5 0.7 0.9] [--graphs]
                                    [--megabytes 512] [--json FILE]

Every contender has several copies of its weights, together larger than the caches of the GPU (--megabytes). A round
runs each contender through all of its copies, in a new random order, between two CUDA events; a time is the mean of a
call. Without --graphs a call goes through Python, as in a model that is run eagerly; a small product then takes as long
as its call. With --graphs the calls of a round are one CUDA graph, and the time is the GPU's. Ratios are medians over
the rounds of (torch bfloat16 / contender) within a round. The second "torch bfloat16" is the same product once more:
its ratio to the first is the null, and no difference smaller than its interval counts.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from secateur.deployment import on_gpu
from secateur.deployment.linear import SparseLinear
from secateur.deployment.packed import PackedLayer
from secateur.deployment.semi_structured import SemiStructuredLinear
from secateur.errors import UnsupportedError

DEVICE = torch.device("cuda")
DENSE, AGAIN = "torch bfloat16", "torch bfloat16, again"
WARMUP = 3
Call = Callable[[], object]


def pruned(rows: int, columns: int, zeros: float) -> nn.Linear:
    layer = nn.Linear(columns, rows, bias=False, device=DEVICE, dtype=torch.bfloat16)
    layer.weight.data.normal_()
    layer.weight.data[torch.rand(rows, columns, device=DEVICE) < zeros] = 0
    return layer


def two_of_four(rows: int, columns: int) -> nn.Linear:
    layer = pruned(rows, columns, 0.0)
    rank = torch.rand(rows, columns // 4, 4, device=DEVICE).argsort(-1).argsort(-1)
    layer.weight.data.view(rows, -1, 4)[rank < 2] = 0
    return layer


def contenders(options: argparse.Namespace) -> dict[str, tuple[list[Call], float]]:
    """Calls and megabytes of the weights of each, by name."""
    rows, columns = options.shape
    x = torch.randn(options.batch, columns, device=DEVICE, dtype=torch.bfloat16)
    found: dict[str, tuple[list[Call], float]] = {}

    def add(name: str, layer: nn.Module) -> None:
        size = sum(each.numel() * each.element_size() for each in (*layer.parameters(), *layer.buffers())) / 1e6
        copies = [copy.deepcopy(layer) for _ in range(max(2, math.ceil(options.megabytes / size)))]
        found[name] = [lambda one=one: one(x) for one in copies], size

    for name in (DENSE, AGAIN):
        add(name, pruned(rows, columns, 0.0))
    try:
        add("torch 2:4 bfloat16", SemiStructuredLinear.of(two_of_four(rows, columns)))
    except UnsupportedError as error:
        print(f"no 2:4 here: {error.why}")
    if on_gpu.why_not():
        print(on_gpu.why_not())
        return found
    for zeros in options.zeros:
        for dtype in (torch.bfloat16, torch.int8):
            layer: PackedLayer = SparseLinear.of(pruned(rows, columns, zeros), "bitmask", dtype)
            add(f"bitmask {str(dtype).removeprefix('torch.')} {zeros:.0%}", layer)
    return found


def together(calls: list[Call], *, graph: bool) -> Call:
    """All calls of a contender, one after the other."""

    def run() -> None:
        for call in calls:
            call()

    for _ in range(WARMUP):  # compiles, chooses kernels
        run()
    if not graph:
        return run
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        run()
    return captured.replay


def measure(runs: dict[str, Call], rounds: int) -> dict[str, np.ndarray]:
    """Milliseconds of every round."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    order, chance = list(runs), random.Random(0)
    for number in range(WARMUP + rounds):
        chance.shuffle(order)
        for name in order:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            runs[name]()
            end.record()
            torch.cuda.synchronize()
            if number >= WARMUP:
                taken[name].append(start.elapsed_time(end))
    return {name: np.array(values) for name, values in taken.items()}


def largest_error(rows: int, columns: int) -> float:
    """Of the kernel, relative to the largest output in double precision: no time counts for a wrong product."""
    layer, x = pruned(rows, columns, 0.5), torch.randn(1, columns, device=DEVICE)
    wanted: Tensor = x.double() @ layer.weight.double().t()
    return float((SparseLinear.of(layer, "bitmask")(x).double() - wanted).abs().max() / wanted.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 4096), metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--zeros", type=float, nargs="+", default=[0.5, 0.7, 0.9])
    parser.add_argument("--megabytes", type=float, default=512)
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    torch.manual_seed(0)
    with torch.inference_mode():
        found = contenders(options)
        runs = {name: together(calls, graph=options.graphs) for name, (calls, _) in found.items()}
        taken = measure(runs, options.rounds)
        error = largest_error(*options.shape)
    each = {name: taken[name] / len(calls) * 1e3 for name, (calls, _) in found.items()}
    null = np.percentile(each[AGAIN] / each[DENSE], [10, 50, 90])
    about = f"{on_gpu.described(DEVICE)}, torch {torch.__version__}, {'graphs' if options.graphs else 'eager'}"
    print(f"{options.shape[0]} x {options.shape[1]}, batch {options.batch}, {options.rounds} rounds, {about}")
    print(f"null (p10, median, p90): {null.round(3).tolist()}; largest error of the kernel: {error:.1e}")
    print(f"{'':26}{'us':>9}{'MB':>8}{'x torch':>9}")
    for name, (_, size) in found.items():
        ratio = float(np.median(each[DENSE] / each[name]))
        print(f"{name:26}{float(np.median(each[name])):9.1f}{size:8.1f}{ratio:9.2f}")
    if options.json:
        rows = {name: {"us": values.tolist(), "megabytes": found[name][1]} for name, values in each.items()}
        options.json.write_text(json.dumps({"about": about, "null": null.tolist(), "error": error, "rows": rows}))


if __name__ == "__main__":
    main()
