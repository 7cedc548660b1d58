"""What zeros cost: time and memory of masking half of all weights, beside torch's own pruning.

    python benchmarks/masks.py [--sizes 25 101] [--threads 1] [--rounds 1]

Each case runs in a process of its own on a model of square linear layers, 1024 x 1024 (--sizes: millions of weights, as
many layers as reach that). Printed are processor seconds and the peak of the resident memory above that before the
case, in MiB and as a multiple of the weights. Cases: secateur's score, select and mask_model with and without keeping
what is hidden; each step alone, given the steps before; the same for groups of their own (local) and for n:m patterns;
torch.nn.utils.prune.global_unstructured; and the plain lines (one torch.kthvalue over all weights, mul_ by a mask).
The peak is read from /proc, so this runs on Linux.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import secateur as sc

MIB = 1 << 20
WIDTH = 1024


def build(millions: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = -(-millions * 1_000_000 // WIDTH**2)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))


def everything(model: nn.Module, *, keep_originals: bool = True, **options: object) -> object:
    return sc.mask_model(model, sc.select(sc.score(model), **options), keep_originals=keep_originals)


def plain(model: nn.Module) -> None:
    weights = [p.detach() for p in model.parameters()]
    every = torch.cat([w.flatten().abs() for w in weights])
    border = every.kthvalue(len(every) // 2).values
    for weight in weights:
        weight.mul_(weight.abs() > border)


def by_torch(model: nn.Module) -> None:
    layers = [(layer, "weight") for layer in model.children()]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=0.5)


def scored(model: nn.Module) -> dict[str, Tensor]:
    return sc.score(model)


def selected(model: nn.Module) -> dict[str, Tensor]:
    return sc.select(sc.score(model), sparsity=0.5)


# name -> (what is made before the measurement, what is measured)
CASES: dict[str, tuple[Callable[[nn.Module], object] | None, Callable[..., object]]] = {
    "secateur": (None, lambda model: everything(model, sparsity=0.5)),
    "secateur, originals not kept": (None, lambda model: everything(model, sparsity=0.5, keep_originals=False)),
    "  score": (None, scored),
    "  select": (scored, lambda model, scores: sc.select(scores, sparsity=0.5)),
    "  mask_model": (selected, lambda model, masks: sc.mask_model(model, masks)),
    "secateur, local": (None, lambda model: everything(model, sparsity=0.5, scope="local")),
    "secateur, 2:4": (None, lambda model: everything(model, granularity="2:4")),
    "torch.nn.utils.prune.global_unstructured": (None, by_torch),
    "kthvalue and mul_": (None, plain),
}


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status: VmRSS now, VmHWM the highest so far."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def measure(case: str, millions: int) -> dict[str, float]:
    model = build(millions)
    before, run = CASES[case]
    small = build(1)
    run(small, *([before(small)] if before else []))  # imports and first calls of kernels are not what is measured
    made = [before(model)] if before else []
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not there for the case to use again
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size starts again from now
    rest, start = resident("VmRSS"), time.process_time()
    result = run(model, *made)
    seconds, peak = time.process_time() - start, resident("VmHWM") - rest
    weights = sum(layer.weight.numel() for layer in model.children())
    if not case.startswith(" "):  # a case that masks: half of the weights are zeros, but that the plain lines cut ties
        zeros = sum(int((layer.weight == 0).sum()) for layer in model.children())
        assert abs(zeros - weights / 2) <= 1e-5 * weights, (zeros, weights)
    del result
    return {"seconds": seconds, "peak": peak, "weights": 4 * weights}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[25, 101], help="millions of weights")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1, help="processes per case; the least of each figure is shown")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        torch.set_num_threads(options.threads)
        print(json.dumps(measure(options.case, options.sizes[0])))
        return
    for millions in options.sizes:
        for case in CASES:
            command = [
                sys.executable,
                __file__,
                "--case",
                case,
                "--sizes",
                str(millions),
                "--threads",
                str(options.threads),
            ]
            runs = [
                json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                for _ in range(options.rounds)
            ]
            seconds, peak = (min(run[key] for run in runs) for key in ("seconds", "peak"))
            share = peak / runs[0]["weights"]
            print(f"{millions:4d} M  {case:42s} {seconds:7.2f} s  {peak / MIB:7.0f} MiB  {share:5.2f} x", flush=True)


if __name__ == "__main__":
    main()
