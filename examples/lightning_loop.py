"""Gradual pruning in a Lightning trainer: channels of a small network shrink while it trains.

python examples/lightning_loop.py
"""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.nn.functional import cross_entropy

from secateur.sources.bundled import load_mnist
from secateur.sources.demo import build_convnet
from secateur.training.adapters.lightning import LightningPruningCallback


class Digits(LightningModule):
    """The demo's network, as a LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        self.net = build_convnet()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of images."""
        return self.net(x)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
        """The loss of a batch."""
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One optimizer; its state follows every cut."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


def main(epochs: int = 4) -> float:
    """Train, shrink on the way, and return the share of the channels that is gone."""
    torch.manual_seed(0)
    data, module = load_mnist(), Digits()
    pruning = LightningPruningCallback(
        sparsity=0.5, granularity="channel", example=torch.zeros(2, 1, 28, 28), begin=0.2, end=0.7, every=0.1
    )
    runner = Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=[pruning], logger=False, enable_checkpointing=False
    )
    runner.fit(module, data.train)
    print(f"{pruning.pruner.sparsity:.3f} of the channels are gone")
    return pruning.pruner.sparsity


if __name__ == "__main__":
    main()
