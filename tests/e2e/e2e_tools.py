"""What the end-to-end tests share: a model module, data, and how a folder is compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
QUICK = (
    "--threads", "1", "--set", "measure.rounds=2", "--set", "measure.warmup=0", "--set", "recover.1.epochs=1",
)  # fmt: skip
NETS = """
import torch
from torch import nn

from examples.lenet import LeNet

EXAMPLE = torch.zeros(1, 1, 28, 28)


def bare():
    return LeNet()


def poisoned(value):
    net = LeNet()
    net.conv1.weight.data[3, 0, 1, 2] = value
    return net, EXAMPLE


def nan_weights():
    return poisoned(float("nan"))


def inf_weights():
    return poisoned(float("inf"))


class NanActivation(LeNet):
    def forward(self, x):
        return super().forward(x) + torch.log(torch.tensor(-1.0))


def nan_activations():
    return NanActivation(), EXAMPLE


class Broken(LeNet):
    def forward(self, x):
        raise RuntimeError("kaput in my own forward")


def broken():
    return Broken(), EXAMPLE


def no_module():
    return 17


def raising():
    raise ValueError("no weights today")
"""


@dataclass(frozen=True)
class Done:
    """What a call of the command line left behind."""

    code: int
    out: str
    err: str


Cli = Callable[..., Done]


def images(path: Path, *, samples: int = 80, shape: tuple[int, ...] = (1, 28, 28)) -> None:
    """Noise around one bright line per class: small, and easy to learn."""
    rng = np.random.default_rng(0)
    y = np.arange(samples) % 10
    x = rng.integers(0, 60, (samples, *shape), dtype=np.uint8)
    for number, label in enumerate(y):
        x[number, :, label % shape[1]] = 255
    np.savez(path, x=x, y=y)


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder and its hash; what Python caches by itself is left out."""
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
        if "__pycache__" not in path.parts
    }
