"""Structured pruning of a language model: what a quarter of the decoder costs, by depth, by width, and by both.

    python benchmarks/structured_lm.py MODEL_FOLDER VALID_TXT TEST_TXT --out FILE [--cases NAME...] [--share 0.25]
                                       [--sequences 8] [--tokens 256] [--test-sequences 12] [--threads 1]
                                       [--recover STEPS --recover-cases NAME... --recover-seeds 0 1 2
                                        --rate 3e-4 --amp]

A quarter of the parameters inside the blocks goes (--share); embeddings stay. Every case is one line of JSON:
perplexity on the test file, share of the decoder that really went (widths come in steps), parameters that are left, and
seconds of the processor. Lines are appended at once, and cases that stand in the file are skipped, so a run that was
interrupted goes on. Every result is saved, and loaded before it is measured: by from_pretrained, or by secateur.load
where sub-blocks went, which no config can say.

With --recover STEPS every case is then trained for that many steps of two sequences each, which the calibration did
not see, by the dense model and the labels alike: the same sequences, rate and steps for all cases, behind the lines
without; "dense" among --recover-cases is the dense model, trained alike. --recover-seeds other than 0 draw other
sequences. Cut models stay beside the file of results, and are trained from there. --amp multiplies in bfloat16
meanwhile, which is faster on processors with instructions for it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import secateur as sc
from secateur.measure.perplexity import perplexity
from secateur.recover import finetune
from secateur.recover.distil import Distil

DEPTH = {"granularity": "layer"}
APART = {"granularity": "sub_block"}  # attention and MLP of a layer, each by itself
GREEDY = {"name": "loss-increase", "greedy": True, "turns": 8}  # as many as the blocks that a quarter is, of thirty
WIDTH = {"granularity": ["head", "neuron"], "protect": ["type:Embedding"]}  # the hidden size stays
HIDDEN = {"granularity": ["head", "neuron"]}  # with the hidden size among what may go
# case -> (criterion and granularity, share of what goes by it, compensated) one after the other
CASES: dict[str, list[tuple[dict[str, object], float, bool]]] = {
    "depth: block influence": [({"criterion": "block-influence", **DEPTH}, 1.0, False)],
    "depth: block influence + refit": [({"criterion": "block-influence", **DEPTH}, 1.0, True)],
    "depth: angular distance": [({"criterion": "angular-distance", **DEPTH}, 1.0, False)],
    "depth: loss increase": [({"criterion": "loss-increase", **DEPTH}, 1.0, False)],
    "depth: greedy loss increase": [({"criterion": GREEDY, **DEPTH}, 1.0, False)],
    "depth: greedy loss increase + refit": [({"criterion": GREEDY, **DEPTH}, 1.0, True)],
    "sub-blocks: block influence": [({"criterion": "block-influence", **APART}, 1.0, False)],
    "sub-blocks: loss increase": [({"criterion": "loss-increase", **APART}, 1.0, False)],
    "sub-blocks: loss increase per parameter": [
        ({"criterion": {"name": "loss-increase", "per": "params"}, **APART}, 1.0, False)
    ],
    "sub-blocks: greedy loss increase per parameter": [
        ({"criterion": {**GREEDY, "per": "params", "turns": 12}, **APART}, 1.0, False)
    ],
    "width: magnitude": [({"criterion": {"name": "magnitude", "norm": "l2", "reduce": "mean"}, **WIDTH}, 1.0, False)],
    "width: taylor": [({"criterion": "taylor", **WIDTH}, 1.0, False)],
    "width: taylor + refit": [({"criterion": "taylor", **WIDTH}, 1.0, True)],
    "width and hidden size: taylor + refit": [({"criterion": "taylor", **HIDDEN}, 1.0, True)],
    "both: block influence + refit, taylor + refit": [
        ({"criterion": "block-influence", **DEPTH}, 0.5, True),
        ({"criterion": "taylor", **WIDTH}, 0.5, True),
    ],
}


def main() -> None:
    asked = arguments()
    torch.set_num_threads(asked.threads)
    text, test = (blocks_of(asked.folder, path, asked.tokens) for path in (asked.valid, asked.test))
    learn = [{"input_ids": part, "labels": part} for part in text[: asked.sequences].split(2)]
    judge = [{"input_ids": row[None]} for row in test[: asked.test_sequences]]
    kept = asked.out.parent / f"{asked.out.stem}-models"
    work = [(case, 0, 0) for case in ["dense", *asked.cases]]
    if asked.recover:
        trained = asked.recover_cases or asked.cases
        work += [(case, asked.recover, seed) for seed in asked.recover_seeds for case in trained]
    for case, steps, seed in work:
        setting = {"case": case, "share": asked.share, "tokens": asked.tokens, "sequences": asked.sequences,
                   "test_sequences": asked.test_sequences, "steps": steps,
                   "rate": asked.rate if steps else 0.0, "amp": asked.amp and steps > 0, "seed": seed}  # fmt: skip
        if json.dumps(setting, sort_keys=True) in finished(asked.out):
            continue
        model, started = load(asked.folder), time.process_time()
        folder, found = kept / slug(setting), {}
        whole = decoder = 0
        if case != "dense":
            whole, decoder = count(model), sum(p.numel() for n, p in model.named_parameters() if ".layers." in n)
            if not (steps and folder.exists()):
                pruned(model, CASES[case], asked.share, learn, folder)
            model = load_cut(folder, asked.folder)
            found["gone_of_decoder"] = round((whole - count(model)) / decoder, 4)
        if steps:
            rest = text[asked.sequences :]
            if seed:
                rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))]
            found["loss_of_training"] = recovered(model, load(asked.folder), rest, steps, asked.rate, asked.amp)
        seconds = time.process_time() - started
        line = {**setting, **found, "perplexity": round(perplexity(model, judge)["perplexity"], 2),
                "params": count(model), "cpu_seconds": round(seconds, 1)}  # fmt: skip
        print(json.dumps(line), flush=True)
        with asked.out.open("a", encoding="utf-8") as sink:
            sink.write(json.dumps(line) + "\n")


def slug(setting: dict[str, object]) -> str:
    """A folder name for the cut model of a case: it is trained from there, and not cut again."""
    found = "-".join(str(setting[name]) for name in ("case", "share", "tokens", "sequences"))
    return found.replace(":", "").replace(" ", "_")


def recovered(model: nn.Module, dense: nn.Module, text: Tensor, steps: int, rate: float, amp: bool) -> list[float]:
    """Train by the dense model and the labels; the mean loss of the first and of the last quarter of the steps."""
    data = [{"input_ids": part, "labels": part} for part in text[: 2 * steps].split(2)]
    history = finetune(
        model, data, steps=steps, optimizer={"name": "adamw", "lr": rate, "weight_decay": 0.0}, schedule="cosine",
        warmup_steps=min(4, steps // 4), teacher=dense, distil=Distil(temperature=1.0, weight=0.5),
        amp="bf16" if amp else None,
    )  # fmt: skip
    quarter = max(steps // 4, 1)
    return [round(sum(part) / len(part), 3) for part in (history.losses[:quarter], history.losses[-quarter:])]


def pruned(
    model: nn.Module,
    steps: list[tuple[dict[str, object], float, bool]],
    share: float,
    data: list[dict[str, Tensor]],
    folder: Path,
) -> None:
    """Write what the steps leave."""
    decoder = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n)
    example = {"input_ids": data[0]["input_ids"][:1, :16]}
    for decided, part, refit in steps:
        apart = decided["granularity"] == "sub_block"
        left = count(model) - share * part * decoder
        result = sc.prune(
            model, example, data={"train": data, "calibration": data}, recover="refit" if refit else [],
            overrides=["measure.latency=false", "measure.quality=false"], target={"params": left / count(model)},
            expressible=not apart, recipe={"target": {"params": 0.5}}, **decided,
        )  # fmt: skip
        if apart:
            result.save(folder)
            return
        with tempfile.TemporaryDirectory() as temporary:
            result.save(Path(temporary) / "out")
            model = load(str(Path(temporary) / "out"))
    model.save_pretrained(folder)


def load_cut(folder: Path, original: str) -> nn.Module:
    """By transformers alone, or onto the original where a plan says what is gone."""
    return sc.load(folder, load(original)) if (folder / "plan.json").exists() else load(str(folder))


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def load(folder: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def blocks_of(folder: str, path: str, tokens: int) -> Tensor:
    from transformers import AutoTokenizer

    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(Path(path).read_text("utf-8"))["input_ids"])
    return ids[: len(ids) // tokens * tokens].view(-1, tokens)


def finished(path: Path) -> set[str]:
    """The settings of the cases that a file holds; a last line that a kill cut short is none."""
    found = set()
    names = ("case", "share", "tokens", "sequences", "test_sequences", "steps", "rate", "amp", "seed")
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        found.add(json.dumps({name: row.get(name, 0) for name in names}, sort_keys=True))
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("valid")
    parser.add_argument("test")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--test-sequences", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--recover", type=int, default=0, metavar="STEPS")
    parser.add_argument("--recover-cases", nargs="+", default=None, choices=["dense", *CASES], metavar="CASE")
    parser.add_argument("--recover-seeds", nargs="+", type=int, default=[0], help="of the sequences; 0: the first ones")
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--amp", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
