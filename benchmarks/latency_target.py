"""Is a latency in milliseconds met, and does `estimate` say before pruning what is measured afterwards?

    python benchmarks/latency_target.py [--models resnet vit encoder] [--shares 0.8 0.6] [--rounds 60] [--threads 2]
        [--small] [--processor-time] [--out FILE]

A ResNet-50, a ViT-B/16 and a BERT-base of 128 tokens with random weights from transformers' configurations (with
`--small` a ResNet-50 of half the widths at 128 pixels, a ViT of width 192 and an encoder of MiniLM's size). For each
share: the model as it came is timed, the target is that share of it in milliseconds, a plan is made for it, and the cut
model is timed again in turns with the model as it came, in rounds that no decision saw.

"again" = milliseconds measured again over the target; wanted is 0.97 to 1.03. Milliseconds of two moments also differ
by what else the machine does, so they are the ratio of the rounds times what the model as it came took while the plan
was made (median of all that the search timed); "drift" is that over what it took when the target was chosen, and
"clock" is what the clock alone gave. "estimate" = ratio measured again over the ratio that `estimate` said of the same
amount by another criterion, so of another model of the same cost; wanted is 0.85 to 1.15. With `--processor-time` the
clock is that of this process, for a machine that is not quiet: use one thread then.
Needs: pip install secateur[hf]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TypedDict
from unittest import mock

import torch
from torch import Tensor, nn

import secateur as sc
from deploy import machine
from secateur.errors import TargetError
from secateur.measure import latency
from secateur.planning import decide, timed
from structure import Logits, build

NAMES = {"resnet": "resnet50", "vit": "vit", "encoder": "bert"}
GRANULARITY = {"resnet": ["channel"], "vit": ["head", "neuron"], "encoder": ["head", "neuron"]}


class TargetRow(TypedDict):
    """One model and one target."""

    model: str
    small: bool
    dense_ms: float
    target_ms: float
    again: float | None
    drift: float | None
    clock: float | None
    estimate: float | None
    macs: float | None
    seconds: float
    load: float


def made(name: str, *, small: bool) -> tuple[nn.Module, Tensor]:
    """A model with random weights, and an example."""
    torch.manual_seed(0)
    if not small:
        return build(NAMES[name])
    import transformers as hf

    if name == "resnet":
        config = hf.ResNetConfig(embedding_size=32, hidden_sizes=[128, 256, 512, 1024], num_labels=100)
        return Logits(hf.ResNetForImageClassification(config)).eval(), torch.randn(1, 3, 128, 128)
    if name == "vit":
        vit = hf.ViTConfig(
            hidden_size=192, num_hidden_layers=6, num_attention_heads=6, intermediate_size=768, image_size=128,
            patch_size=8, num_labels=100,
        )  # fmt: skip
        return Logits(hf.ViTForImageClassification(vit)).eval(), torch.randn(1, 3, 128, 128)
    bert = hf.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=2
    )
    return Logits(hf.BertForSequenceClassification(bert)).eval(), torch.randint(30_000, (1, 128))


def one(name: str, share: float, asked: argparse.Namespace) -> TargetRow:
    """Plan for a share of the time, and time it again."""
    model, example = made(name, small=asked.small)
    clock = time.process_time if asked.processor_time else time.perf_counter
    before = latency({"dense": model}, example, rounds=asked.rounds, timer=clock)["dense"].median
    row: TargetRow = {
        "model": name, "small": asked.small, "dense_ms": before, "target_ms": share * before, "again": None,
        "drift": None, "clock": None, "estimate": None, "macs": None, "seconds": 0.0, "load": round(load(), 1),
    }  # fmt: skip
    started, how = time.perf_counter(), {"granularity": GRANULARITY[name], "criterion": "l1"}
    watches: list[timed.Stopwatch] = []
    try:
        with mock.patch.object(
            decide, "Stopwatch", lambda *given: watches.append(timed.Stopwatch(*given)) or watches[-1]
        ):
            plan = sc.plan(model, example, target={"latency_ms": share * before}, **how)
    except TargetError as error:
        print(f"{name}, {share:g}: {error}", flush=True)
        return {**row, "seconds": time.perf_counter() - started}
    spent = time.perf_counter() - started
    cut = plan.apply(model, proof="example").eval()
    found = latency({"dense": model, "cut": cut}, example, rounds=asked.rounds, timer=clock)["cut"]
    assert found.ratio is not None
    costs = plan.cost["macs"]
    said = told(model, example, costs[1] / costs[0], name, asked, clock)
    meant = watches[-1].whole
    return {
        **row, "again": found.ratio[0] * meant / row["target_ms"], "drift": meant / before,
        "clock": found.median / row["target_ms"], "estimate": found.ratio[0] / said, "macs": costs[1] / costs[0],
        "seconds": spent,
    }  # fmt: skip


def told(model: nn.Module, example: Tensor, macs: float, name: str, asked: argparse.Namespace, clock: object) -> float:
    """The ratio that `estimate` says, of another model with as many multiply-accumulates."""
    with mock.patch("secateur.measure.pair.latency", _with_clock(clock)):
        found = sc.estimate(
            model, example, criterion="random", granularity=GRANULARITY[name], target={"macs": macs},
            overrides=["measure.spread=0.05", f"measure.rounds={asked.rounds}"],
        )  # fmt: skip
    after = found.report.after.latency_ms
    assert after is not None
    assert after.ratio is not None
    return after.ratio[0]


def _with_clock(clock: object) -> object:
    """`latency` by another clock; the package itself always takes the time that passes."""
    return lambda *args, **more: latency(*args, timer=clock, **more)


def load() -> float:
    return float(Path("/proc/loadavg").read_text().split()[0]) if Path("/proc/loadavg").exists() else float("nan")


def table(rows: list[TargetRow]) -> str:
    lines = ["| model | dense, ms | target, ms | again | drift | clock | estimate | MACs left | plan, s | load |"]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        shown = [
            f"{row[key]:.3f}" if row[key] is not None else "-"
            for key in ("again", "drift", "clock", "estimate", "macs")
        ]
        lines.append(
            f"| {row['model']}{', small' * row['small']} | {row['dense_ms']:.1f} | {row['target_ms']:.1f} | "
            f"{' | '.join(shown)} | {row['seconds']:.0f} | {row['load']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--shares", nargs="+", type=float, default=[0.8, 0.6])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--out", type=Path, help="rows of finished targets are added to it, one a line")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    clock = time.process_time if asked.processor_time else time.perf_counter
    print(machine(asked.threads), "processor time" if asked.processor_time else "clock", flush=True)
    rows = []
    with mock.patch.object(timed, "latency", _with_clock(clock)):
        for name in asked.models:
            for share in asked.shares:
                rows.append(one(name, share, asked))
                print(json.dumps(rows[-1]), flush=True)
                if asked.out:
                    with asked.out.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
