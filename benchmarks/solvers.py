"""What each solver takes for all weights of a block, and what it leaves: real weights under the inputs they really get.

    python benchmarks/solvers.py MODEL_FOLDER TEXT [--blocks 1 14 28] [--pattern 50|70|2:4] [--rounds 3] [--threads 1]
                                 [--reference SPARSEGPT_PY]

MODEL_FOLDER is a Hugging Face folder of a Llama-like model, TEXT calibrates: 12 sequences of 1,024 tokens to solve
with, the 8 next ones to measure with. SPARSEGPT_PY is `sparsegpt.py` of the authors' repository
(IST-DASLab/sparsegpt), whose class is then timed in the same rounds, with what it needs of its neighbours replaced.

One round times every solver once on every block, in alternating order: seconds of the processor for the factorisations
that a block's weights share and for the weights themselves; sums of second moments are not in it, and layers that read
the same input are factorised once by secateur, and once each by the reference, as its own script does. Printed: medians
per block, and the mean square error of the outputs on the other text over that of the first solver, geometric mean and
largest of all weights.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean, median
from types import ModuleType

import torch
from torch import Tensor, nn

from oneshot_lm import TWENTY, token_blocks
from secateur.solve import SOLVERS, Problem, SecondMoments, error_of
from secateur.solve.patterns import NofM, Pattern, PerLayer, PerRow

FIT, HELD = 12, 8  # sequences
Block = dict[str, Tensor]  # a weight's name -> weight
Grams = dict[str, Tensor]  # a weight's name -> second moments; the same object where the input is the same
Timed = Callable[[Block, Grams], tuple[Block, float]]


def main() -> None:
    asked = arguments()
    torch.set_num_threads(asked.threads)
    blocks = gathered(asked)
    solvers = {} if asked.reference is None else {"reference": reference(asked.reference, asked.pattern)}
    rows = {
        "sparsegpt": {},
        "admm": {},
        "admm, twenty steps": TWENTY,
        "wanda": {},
    }
    for row, options in rows.items():
        solvers[row] = ours(row.partition(",")[0], options, asked.pattern)
    seconds: dict[str, list[float]] = {name: [] for name in solvers}
    errors: dict[str, list[float]] = {}
    for turn in range(asked.rounds):
        for name in list(solvers)[:: 1 if turn % 2 else -1]:
            errors[name] = []
            for weights, fit, held in blocks:
                found, took = solvers[name](weights, fit)
                seconds[name].append(took)
                errors[name] += [error_of(found[one] - weights[one], held[one]) for one in weights]
    first = next(iter(solvers))
    print(f"| {asked.pattern} | processor s per block | over {first} | error over {first}, geometric mean | largest |")
    print("|---|---|---|---|---|")
    for name in solvers:
        over = [one / other for one, other in zip(errors[name], errors[first], strict=True)]
        took, base = median(seconds[name]), median(seconds[first])
        print(f"| {name} | {took:.2f} | {took / base:.2f} | {geometric_mean(over):.3f} | {max(over):.3f} |")


def gathered(asked: argparse.Namespace) -> list[tuple[Block, Grams, Grams]]:
    """Weights of each block, and second moments of their inputs in the original model on both parts of the text."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(asked.folder, dtype=torch.float32).eval()
    layers = {
        number: {name: part for name, part in model.model.layers[number].named_modules() if isinstance(part, nn.Linear)}
        for number in asked.blocks
    }
    seen: dict[tuple[int, str], Tensor] = {}
    last: dict[int, tuple[Tensor, Tensor]] = {}

    def watch(number: int, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            # Layers that read one tensor share its moments, as in a run.
            if number not in last or last[number][0] is not given[0]:
                rows = given[0].flatten(0, -2)
                last[number] = (given[0], rows.T @ rows / len(rows))
            moments = last[number][1]
            seen[number, name] = moments if (number, name) not in seen else seen[number, name] + moments

        return add

    for number, parts in layers.items():
        for name, part in parts.items():
            part.register_forward_pre_hook(watch(number, name))
    text = token_blocks(asked.folder, asked.text)
    sums: list[dict[tuple[int, str], Tensor]] = []
    with torch.no_grad():
        for rows in (text[:FIT], text[FIT : FIT + HELD]):
            seen = {}
            for row in rows:
                model(row[None])
            sums.append(shared(seen))
    fit, held = ({number: {name: one[number, name] for name in layers[number]} for number in layers} for one in sums)
    weights = {n: {name: part.weight.detach().clone() for name, part in layers[n].items()} for n in layers}
    return [(weights[number], fit[number], held[number]) for number in layers]


def shared(seen: dict[tuple[int, str], Tensor]) -> dict[tuple[int, str], Tensor]:
    """Equal moments as one tensor."""
    kept: list[Tensor] = []
    for key, value in seen.items():
        same = next((one for one in kept if one.shape == value.shape and torch.equal(one, value)), None)
        if same is None:
            kept.append(value)
        else:
            seen[key] = same
    return seen


def pattern_of(name: str, solver: str, weight: Tensor) -> Pattern:
    """SparseGPT takes the least of a whole layer, as published; the others as many of every row."""
    if name == "2:4":
        return NofM(2, 4)
    return (PerLayer if solver == "sparsegpt" else PerRow)(round(weight.numel() * int(name) / 100))


def ours(name: str, options: dict[str, object], pattern: str) -> Timed:
    solver = SOLVERS.build(name, options)

    def solve(weights: Block, grams: Grams) -> tuple[Block, float]:
        started = time.process_time()
        moments = {id(gram): SecondMoments(gram) for gram in grams.values()}
        found = {
            one: solver.solve(Problem(weight, moments[id(grams[one])], pattern_of(pattern, name, weight))).weight
            for one, weight in weights.items()
        }
        return found, time.process_time() - started

    return solve


def reference(path: Path, pattern: str) -> Timed:
    """The authors' class."""
    # What it imports of its neighbour is for quantisation, and it waits for a graphics processor at the end.
    sys.modules["quant"] = ModuleType("quant")
    spec = importlib.util.spec_from_file_location("sparsegpt", path)
    assert spec is not None
    assert spec.loader is not None
    authors = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(authors)
    if not torch.cuda.is_available():
        authors.torch.cuda.synchronize = lambda *_: None
    amounts = (0.5, 2, 4) if pattern == "2:4" else (int(pattern) / 100, 0, 0)

    def solve(weights: Block, grams: Grams) -> tuple[Block, float]:
        found, spent = {}, 0.0
        for name, weight in weights.items():
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight.data = weight.clone()
            one = authors.SparseGPT(layer)
            one.H = grams[name].clone()
            started = time.process_time()
            with contextlib.redirect_stdout(io.StringIO()):
                one.fasterprune(*amounts)
            spent += time.process_time() - started
            found[name] = layer.weight.data
        return found, spent

    return solve


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("text")
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 14, 28])
    parser.add_argument("--pattern", choices=["50", "70", "2:4"], default="50")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--reference", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
