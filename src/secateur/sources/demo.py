"""Two networks for 28x28 grey images, and their training: small enough to train while one waits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.recover import History, finetune
from secateur.types import Advance, Data


class ConvBlock(nn.Sequential):
    """3x3 convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Residual(nn.Module):
    """``relu(x + f(x))``: the channels of x and of f(x) can only be cut together.

    Args:
        channels: of input and output.
        hidden: of the layer between; free to be cut on its own.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            ConvBlock(channels, hidden),
            nn.Conv2d(hidden, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, channels, height, width]`` -> the same."""
        return torch.relu(x + self.body(x))


class ConvNet(nn.Module):
    """Convolutions with batch norm and one residual block, for ``[batch, 1, 28, 28]``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBlock(1, 32)
        self.widen = ConvBlock(32, 64)
        self.residual = Residual(64, 64)
        self.top = ConvBlock(64, 128)
        self.pool = nn.MaxPool2d(2)
        self.classify = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, 1, 28, 28]`` -> ``[batch, 10]``."""
        x = self.pool(self.stem(x))
        x = self.pool(self.widen(x))
        x = self.top(self.residual(x))
        # A mean and not a flatten: the classifier then has one input per channel, which can be cut with it.
        logits: Tensor = self.classify(x.mean((2, 3)))
        return logits


class LeNet(nn.Module):
    """LeNet-5 with ReLU and max pooling, without norms, for ``[batch, 1, 28, 28]``."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.classify = nn.Sequential(nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, 1, 28, 28]`` -> ``[batch, 10]``."""
        logits: Tensor = self.classify(self.features(x))
        return logits


def build_convnet(seed: int = 0) -> ConvNet:
    """The demo's convolutional network, untrained; the seed decides the weights."""
    # Forked: building a network must not move the generator that the caller draws from.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ConvNet()


def build_lenet(seed: int = 0) -> LeNet:
    """The demo's LeNet-5 (Caffe widths 20, 50, 500), untrained; the seed decides the weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LeNet()


def train_demo(
    model: nn.Module, data: Data, epochs: int = 3, *, progress: Advance | None = None, seed: int = 0
) -> History:
    """Train a demo network in place: Adam, short warm-up, cosine.

    Args:
        model: `build_convnet` or `build_lenet`.
        data: the training batches of ``demo:mnist``.
        epochs: passes over the data.
        progress: called with (steps done, steps in all).
        seed: as in `secateur.recover.finetune`.
    """
    return finetune(
        model,
        data,
        optimizer={"name": "adam", "lr": 3e-3},
        schedule="cosine",
        warmup_steps=20,
        epochs=epochs,
        progress=progress,
        seed=seed,
    )
