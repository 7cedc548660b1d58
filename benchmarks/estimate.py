"""How far is what `estimate` says before pruning from what is measured afterwards?

    python benchmarks/estimate.py [--threads 2] [--rounds 30] [--models cnn encoder mlp] [--json FILE]

A CNN of channels and an encoder of neurons and heads are estimated and pruned with the same recipe, a wide MLP is
estimated with zeros and `deploy`. What is compared is the latency of the pruned model over that of the dense one, since
milliseconds of two moments also differ by what else the machine does; the model afterwards is pruned by another
criterion, so that it is another model of the same cost. "error" = measured over estimated, minus 1.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import nn

import secateur as sc
from deploy import machine
from planner import encoder, images, mlp, numbers, resnet, tokens
from secateur.measure.latency import latency

MODELS = {
    "cnn": (lambda: resnet((1, 2, 2, 1), 32), images(96), 4, {"granularity": "channel", "target": {"macs": 0.5}}),
    "encoder": (lambda: encoder(256, 4), tokens(64), 4, {"granularity": ["head", "neuron"], "target": {"macs": 0.6}}),
    "mlp": (
        lambda: mlp(1024, 2048, 2048, 10),
        numbers(1024),
        1,
        {"granularity": "element", "target": {"sparsity": 0.8}},
    ),
}


def structural(model: nn.Module, example: object, how: dict[str, object], rounds: int) -> tuple[float, float]:
    told = sc.estimate(model, example, criterion="random", overrides=["measure.spread=0.05"], **how)
    ratio = told.report.after.latency_ms.ratio
    cut = sc.plan(model, example, criterion="l1", **how).apply(model)
    return ratio[0], measured(model, cut, example, rounds)


def deployed(model: nn.Module, example: object, how: dict[str, object], rounds: int) -> tuple[float, float]:
    before = sc.deploy(sc.plan(model, example, criterion="random", **how).apply(model), example, table=False)
    batch = next(iter(before.latency))
    after = sc.deploy(sc.plan(model, example, criterion="magnitude", **how).apply(model), example, table=False)
    return before.latency[batch]["deployed"].ratio[0], measured(model, after.model, example, rounds)


def measured(model: nn.Module, cut: nn.Module, example: object, rounds: int) -> float:
    ratio = latency({"dense": model, "cut": cut.eval()}, example, rounds=rounds)["cut"].ratio
    assert ratio is not None
    return ratio[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(machine(options.threads), flush=True)
    lines = []
    for name in options.models:
        make, inputs, batch, how = MODELS[name]
        run = deployed if name == "mlp" else structural
        said, found = run(make().eval(), inputs(batch), how, options.rounds)
        lines.append({"model": name, "estimated": said, "measured": found, "error": found / said - 1})
        print(
            {key: round(value, 3) if isinstance(value, float) else value for key, value in lines[-1].items()},
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(options.threads), "rows": lines}, indent=1))


if __name__ == "__main__":
    main()
