"""Is a deployed model ever slower than the dense one? Twelve models, batches of 1 and 32, one interleaved run each.

    python benchmarks/planner.py [--models NAME...] [--batches 1 32] [--zeros 0.7] [--threads 2] [--rounds 9]
                                 [--processor-time] [--onnx] [--json FILE]

Every model has random weights of which magnitude pruning leaves a share in every layer. `deploy` plans it anew
(convolutions too), and then the original, the same original once more (the null) and the deployed model run in a new
random order in every round. "resnet50" has the layers of a ResNet-50 at 90 % zeros (85 % as "resnet50, 85") and images
of 224 pixels; --onnx puts onnxruntime in float32 beside it.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import secateur as sc
from deploy import machine


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        sizes = ((inputs, width, 1, 1, 0), (width, width, 3, stride, 1), (width, 4 * width, 1, 1, 0))
        parts = [
            nn.Sequential(nn.Conv2d(i, o, k, s, p, bias=False), nn.BatchNorm2d(o), nn.ReLU()) for i, o, k, s, p in sizes
        ]
        parts[2] = parts[2][:2]
        self.body = nn.Sequential(*parts)
        same = stride == 1 and inputs == 4 * width
        skip = nn.Sequential(nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))
        self.skip = nn.Identity() if same else skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def resnet(depths: tuple[int, ...], width: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    inputs = width
    for stage, depth in enumerate(depths):
        for block in range(depth):
            layers.append(Bottleneck(inputs, width << stage, 2 if stage and not block else 1))
            inputs = 4 * (width << stage)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


def plain_cnn(width: int) -> nn.Module:
    sizes = ((3, width), (width, 2 * width), (2 * width, 4 * width))
    layers = [nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)) for i, o in sizes]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * width, 10))


def mlp(*widths: int) -> nn.Module:
    layers = [part for i, o in pairwise(widths) for part in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def encoder(width: int, layers: int) -> nn.Module:
    from transformers import BertConfig, BertModel

    heads = max(1, width // 64)
    sizes = {"vocab_size": 1000, "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return BertModel(BertConfig(**sizes, num_attention_heads=heads))


def writer(width: int, layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(1, width // 64)
    sizes = {"vocab_size": 4000, "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=heads))


def tokens(length: int) -> Callable[[int], object]:
    return lambda batch: {"input_ids": torch.randint(0, 1000, (batch, length))}


def images(size: int) -> Callable[[int], object]:
    return lambda batch: torch.randn(batch, 3, size, size)


def numbers(width: int) -> Callable[[int], object]:
    return lambda batch: torch.randn(batch, width)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], object]]] = {
    "mlp, small": (lambda: mlp(64, 128, 10), numbers(64)),
    "mlp, wide": (lambda: mlp(1024, 2048, 2048, 10), numbers(1024)),
    "mlp, deep": (lambda: mlp(*[512] * 9, 10), numbers(512)),
    "cnn, small": (lambda: plain_cnn(16), images(16)),
    "cnn, wide": (lambda: plain_cnn(64), images(16)),
    "resnet, narrow": (lambda: resnet((1, 1, 1, 1), 16), images(64)),
    "encoder, small": (lambda: encoder(128, 2), tokens(32)),
    "encoder": (lambda: encoder(512, 2), tokens(32)),
    "encoder, short": (lambda: encoder(512, 2), tokens(4)),
    "lm, small": (lambda: writer(128, 2), tokens(1)),
    "lm": (lambda: writer(576, 4), tokens(1)),
    "lm, wide": (lambda: writer(1024, 2), tokens(1)),
    "resnet50": (lambda: resnet((3, 4, 6, 3), 64), images(224)),
    "resnet50, 85": (lambda: resnet((3, 4, 6, 3), 64), images(224)),
}
OWN_ZEROS = {"resnet50": 0.9, "resnet50, 85": 0.85}


@torch.no_grad()
def zeroed(model: nn.Module, zeros: float) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.shape[1] > 3:
            size = layer.weight.abs()
            layer.weight.masked_fill_(size <= size.flatten().kthvalue(max(1, int(zeros * size.numel()))).values, 0)
    return model.eval().requires_grad_(False)


def onnx(model: nn.Module, x: Tensor, threads: int) -> Callable[[], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # or its threads take others' time
    with tempfile.TemporaryDirectory() as folder:
        torch.onnx.export(model, (x,), f"{folder}/model.onnx", dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(f"{folder}/model.onnx", options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def caller(model: nn.Module, example: object) -> Callable[[], object]:
    return (lambda: model(**example)) if isinstance(example, dict) else (lambda: model(example))


def race(calls: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> dict[str, np.ndarray]:
    taken: dict[str, list[float]] = {name: [] for name in calls}
    order, chance = list(calls), random.Random(0)
    with torch.inference_mode():
        for number in range(rounds + 1):
            chance.shuffle(order)
            for name in order:
                start = clock()
                calls[name]()
                if number:
                    taken[name].append((clock() - start) * 1e3)
    return {name: np.array(values) for name, values in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=[name for name in MODELS if name not in OWN_ZEROS])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--zeros", type=float, default=0.7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--onnx", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    clock = time.thread_time if options.processor_time else time.perf_counter
    lines = []
    print(machine(options.threads), "processor time" if options.processor_time else "clock time", flush=True)
    for name in options.models:
        make, inputs = MODELS[name]
        model = zeroed(make(), OWN_ZEROS.get(name, options.zeros))
        for batch in options.batches:
            example = inputs(batch)
            done = sc.deploy(model, example, convolutions=True, table=False, rounds=5)
            calls = {"dense": caller(model, example), "again": caller(model, example)}
            if isinstance(example, Tensor) and example.dim() == 4:
                last = copy.deepcopy(model).to(memory_format=torch.channels_last)
                calls["channels last"] = caller(last, example.to(memory_format=torch.channels_last))
            calls["deployed"] = caller(done.model, example)
            if options.onnx:
                calls["onnxruntime"] = onnx(model, example, options.threads)
            taken = race(calls, options.rounds, clock)
            null = np.percentile(taken["again"] / taken["dense"], [10, 50, 90]).round(3).tolist()
            ratios = {key: float(np.median(values / taken["dense"])) for key, values in taken.items()}
            slower = ratios["deployed"] > max(1.0, null[2])
            line = {"model": name, "batch": batch, "ms": float(np.median(taken["dense"])), "null": null,
                    "swapped": len(done.swapped), "layers": len(done.decisions), "slower": slower, "note": done.note,
                    "ratios": {key: round(value, 3) for key, value in ratios.items()}}  # fmt: skip
            lines.append(line)
            print(line, flush=True)
    print(f"{sum(bool(line['slower']) for line in lines)} of {len(lines)} are slower than the null interval")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(options.threads), "rows": lines}, indent=1))


if __name__ == "__main__":
    main()
