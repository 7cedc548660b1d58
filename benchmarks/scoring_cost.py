"""What first-order and activation criteria cost, in epochs over the scoring data.

    python benchmarks/scoring_cost.py [--rounds 5] [--threads 1] [--models resnet20 vit]

One epoch is a forward and backward pass over the same batches, with gradients of all weights. One round times the epoch
and every criterion once, in alternating order; printed are medians of processor time over the median of the epoch, so
other jobs on the machine count little. Models have random weights: ResNet-20 of width 16 on 512 images of 32x32, and a
ViT of width 192 with 6 layers on 256 images of 64x64 (patches of 8).
Needs: pip install secateur[hf]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compare_cifar10 import ResNet20
from secateur.criteria import Context, get
from secateur.errors import SecateurError
from secateur.model.call import default_loss
from secateur.planning.build import grouped

Batches = list[tuple[Tensor, Tensor]]
FIRST_ORDER: tuple[dict[str, Any], ...] = (
    {"name": "taylor"},
    {"name": "taylor", "reduce": "per-sample"},
    {"name": "gradient"},
    {"name": "snip"},
    {"name": "movement"},
    {"name": "gate"},
    {"name": "head-importance"},
    {"name": "synflow"},
)
ACTIVATION: tuple[dict[str, Any], ...] = tuple(
    {"name": name} for name in ("apoz", "mean-activation", "activation-variance", "wanda", "ria")
)
GRANULARITIES = {"resnet20": ("channel", "element"), "vit": ("neuron", "head", "element")}


class Logits(nn.Module):
    """A transformers model as a function from images to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


def build(name: str) -> tuple[nn.Module, Batches]:
    torch.manual_seed(0)
    if name == "resnet20":
        return ResNet20(16).eval(), [(torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,))) for _ in range(8)]
    import transformers

    config = transformers.ViTConfig(
        hidden_size=192, num_hidden_layers=6, num_attention_heads=4, intermediate_size=768, image_size=64, patch_size=8,
        num_labels=10,
    )  # fmt: skip
    model = Logits(transformers.ViTForImageClassification(config)).eval()
    return model, [(torch.randn(64, 3, 64, 64), torch.randint(0, 10, (64,))) for _ in range(4)]


def epoch(model: nn.Module, batches: Batches) -> None:
    for batch in batches:
        default_loss(model, batch).backward()
        model.zero_grad(set_to_none=True)


def label(choice: dict[str, Any]) -> str:
    return " ".join([choice["name"], *(f"{k}={v}" for k, v in choice.items() if k != "name")])


def works(model: nn.Module, batches: Batches, granularity: str) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """What is timed, by name; and what cannot score these units, with the reason."""
    groups, record = grouped(model, batches[0][0][:1], granularity)
    context = Context(model, groups, data=batches, example=batches[0][0][:1], capture=record)
    found: dict[str, Callable[[], Any]] = {"epoch": lambda: epoch(model, batches)}
    refused: dict[str, str] = {}
    for choice in (*FIRST_ORDER, *ACTIVATION):
        try:
            rule = get(choice["name"], {key: value for key, value in choice.items() if key != "name"})
            rule.score(context)  # also pays for what torch sets up once
        except SecateurError as error:
            refused[label(choice)] = error.what
            continue
        found[label(choice)] = lambda rule=rule: rule.score(context)  # type: ignore[misc]
    epoch(model, batches)
    return found, refused


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", nargs="+", choices=GRANULARITIES, default=list(GRANULARITIES))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.models:
        model, batches = build(name)
        for granularity in GRANULARITIES[name]:
            found, refused = works(model, batches, granularity)
            times: dict[str, list[float]] = {key: [] for key in found}
            for turn in range(args.rounds):
                for key in list(found)[:: -1 if turn % 2 else 1]:
                    started = time.process_time()
                    found[key]()
                    times[key].append(time.process_time() - started)
            unit = statistics.median(times["epoch"])
            print(f"\n{name}, {granularity} (epoch {unit:.2f} s)")
            for key, taken in times.items():
                if key != "epoch":
                    ratios = sorted(value / unit for value in taken)
                    print(f"  {key:28} {statistics.median(ratios):5.2f}  ({ratios[0]:.2f}-{ratios[-1]:.2f})")
            for key, why in refused.items():
                print(f"  {key:28} does not apply: {why}")


if __name__ == "__main__":
    main()
