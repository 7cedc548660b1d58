"""How long looking, planning, cutting and proving take: beside Torch-Pruning, in depth, and at seven billion weights.

    python benchmarks/structure.py [--rounds 5] [--models resnet50 vit bert convnext] [--depths 12 48 192] [--no-big]

Models are built from transformers configurations with random weights (ResNet-50, ViT-B/16, BERT-base with 128 tokens,
ConvNeXt-T). One round runs secateur (capture, groups, scores and plan; then the cut; then the proof) and Torch-Pruning
(graph, importance, step) on fresh copies of the same model, both in place, in alternating order and each on a
collected heap; the first round is not counted. Printed are medians of the processor time of this process, which a busy
machine changes less than the clock, and the ratios. The depth series are Llama-like models of a hidden width of 256;
each time is the least of three.
Unless --no-big is given, a Llama of 32 blocks and a hidden width of 4096 (6.7 billion weights) is planned on the meta
device.
Needs: pip install secateur[hf] torch-pruning==1.6.1
"""

from __future__ import annotations

import argparse
import copy
import gc
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import secateur as sc

MODELS = ("resnet50", "vit", "bert", "convnext")
RATIO = 0.3  # of the units go
clock = time.process_time


class Logits(nn.Module):
    """The plain tensor-to-tensor form that Torch-Pruning needs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x).logits


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A network with random weights, and an example."""
    import transformers as hf

    image = torch.randn(1, 3, 224, 224)
    if name == "resnet50":
        return Logits(hf.ResNetForImageClassification(hf.ResNetConfig(num_labels=1000))).eval(), image
    if name == "vit":
        return Logits(hf.ViTForImageClassification(hf.ViTConfig(num_labels=1000))).eval(), image
    if name == "convnext":
        return Logits(hf.ConvNextForImageClassification(hf.ConvNextConfig(num_labels=1000))).eval(), image
    model = hf.BertForSequenceClassification(hf.BertConfig(num_labels=2))
    return Logits(model).eval(), torch.randint(30_000, (1, 128))


def llama(blocks: int, width: int = 256, device: str = "cpu") -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A Llama-like model of so many blocks, and an example of 32 tokens."""
    import transformers as hf

    config = hf.LlamaConfig(num_hidden_layers=blocks, use_cache=False)
    if width < 4096:
        config = hf.LlamaConfig(
            num_hidden_layers=blocks, hidden_size=width, intermediate_size=2 * width, num_attention_heads=8,
            vocab_size=1000, use_cache=False,
        )  # fmt: skip
    with torch.device(device):
        example = {"input_ids": torch.zeros(1, 32, dtype=torch.long)}
        if device == "meta":  # else transformers asks the positions for their values, which meta tensors do not have
            example["attention_mask"] = torch.ones(1, 1, 32, 32, dtype=torch.bool)
        return hf.LlamaForCausalLM(config).eval(), example


def ours(model: nn.Module, x: Any, target: dict[str, float]) -> dict[str, float]:
    """Seconds of secateur, in place as Torch-Pruning works; the proof apart."""
    original = copy.deepcopy(model)
    started = clock()
    plan = sc.plan(model, x, target=target)
    planned = clock()
    assert plan.evidence is not None
    certify = plan.evidence.certify
    plan.evidence = None  # the cut alone
    plan.apply(model, inplace=True)
    cut = clock()
    certificate = certify(original, model)
    proved = clock()
    assert certificate.max_abs_error < 1e-2
    return {"plan": planned - started, "cut": cut - planned, "proof": proved - cut}


def theirs(model: nn.Module, x: torch.Tensor) -> dict[str, float]:
    """Seconds of Torch-Pruning, and whether the forward of its result runs."""
    import torch_pruning as tp

    started = clock()
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    pruner = tp.pruner.BasePruner(
        model,
        x,
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=RATIO,
        global_pruning=True,
        ignored_layers=[last],
    )
    pruner.step()
    seconds = clock() - started
    try:
        with torch.no_grad():
            model(x)
        runs = 1.0
    except Exception:
        runs = 0.0
    return {"Torch-Pruning": seconds, "runs": runs}


def seconds(work: Callable[[], object], times: int = 3) -> float:
    """The least processor time of a piece of work."""
    found = []
    for _ in range(times):
        started = clock()
        work()
        found.append(clock() - started)
    return min(found)


def forward(model: nn.Module, x: Any) -> Callable[[], object]:
    """A forward pass without gradients."""

    def run() -> object:
        with torch.no_grad():
            return model(**x) if isinstance(x, dict) else model(x)

    return run


def beside(names: list[str], rounds: int) -> None:
    """Both tools on every model."""
    print("seconds: forward, inspect, plan, cut, proof, Torch-Pruning; ratios: plan+cut, with proof; its result")
    for name in names:
        model, x = build(name)
        found: dict[str, list[float]] = {}
        for number in range(rounds + 1):  # the first round warms up and is not counted
            for tool in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
                fresh = copy.deepcopy(model)
                gc.collect()  # neither tool pays for the other's garbage
                timed = ours(fresh, x, {"sparsity": RATIO}) if tool == "ours" else theirs(fresh, x)
                for key, value in timed.items():
                    found.setdefault(key, []).append(value)
        m = {key: statistics.median(values[1:]) for key, values in found.items()}
        made, other = m["plan"] + m["cut"], m["Torch-Pruning"]
        look = seconds(lambda model=model, x=x: sc.inspect(model, x))
        print(
            f"{name:9} {seconds(forward(model, x), 5):.3f} {look:.3f} {m['plan']:.3f} {m['cut']:.3f} {m['proof']:.3f}"
            f" {other:.3f}  {made / other:.2f} {(made + m['proof']) / other:.2f}"
            f"  {'runs' if m['runs'] else 'its forward fails'}",
            flush=True,
        )


def deep(depths: list[int]) -> None:
    """The same model at several depths."""
    print("blocks: inspect, plan, cut, proof (each with its ratio to the first row)")
    first: list[float] = []
    for blocks in depths:
        model, x = llama(blocks)
        look = seconds(lambda model=model, x=x: sc.inspect(model, x))
        rounds = [ours(copy.deepcopy(model), x, {"macs": 0.7}) for _ in range(3)]
        row = [look, *(min(r[key] for r in rounds) for key in ("plan", "cut", "proof"))]
        first = first or row
        print(
            f"{blocks:4}  " + "  ".join(f"{s:.3f} ({s / f:.1f})" for s, f in zip(row, first, strict=True)), flush=True
        )


def big() -> None:
    """A plan for more weights than memory holds: the tensors are on the meta device, so the criterion is random."""
    model, x = llama(32, 4096, "meta")
    weights = sum(p.numel() for p in model.parameters())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sc.inspect(model, x)
    look = seconds(lambda: sc.inspect(model, x))
    plan = seconds(lambda: sc.plan(model, x, criterion="random", target={"macs": 0.7}))
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        f"{weights / 1e9:.1f}e9 weights on meta: inspect {look:.3f} s, plan {plan:.3f} s, at most {more:.0f} MiB more"
    )


def main() -> None:
    """Time what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="*", default=MODELS, choices=MODELS)
    parser.add_argument("--depths", nargs="*", type=int, default=[12, 48, 192])
    parser.add_argument("--big", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.threads} thread(s), {args.rounds} rounds")
    beside(args.models, args.rounds)
    deep(args.depths)
    if args.big:
        big()


if __name__ == "__main__":
    main()
