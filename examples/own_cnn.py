"""A CNN of your own at half of its multiply-accumulates: train, prune, recover, save, load.

python examples/own_cnn.py
"""

import tempfile
from pathlib import Path

import torch
from torch import nn

import secateur as sc


class Net(nn.Module):
    """Two convolutions with batch norm, a residual block and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2))
        self.block = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU())
        self.head = nn.Linear(24 * 8, 8)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """``[batch, 1, 16, 16]`` -> ``[batch, 8]``."""
        x = self.stem(image)
        return self.head((x + self.block(x)).mean(2).flatten(1))


def batches(count: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Noise with one bright column; its place is the class."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        images, labels = torch.rand(64, 1, 16, 16, generator=random), torch.randint(0, 8, (64,), generator=random)
        images[torch.arange(64), 0, :, 2 * labels] += 1
        found.append((images, labels))
    return found


def main(steps: int = 60) -> tuple[float, float, float]:
    """Return the accuracy before and after, and the share of the multiply-accumulates that is left."""
    torch.manual_seed(0)
    train, test, model = batches(steps, 1), batches(4, 2), Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for images, labels in train:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    recover = [{"method": "bn_refresh"}, {"method": "finetune", "epochs": 1, "optimizer": {"name": "adam", "lr": 0.01}}]
    result = sc.prune(model, data=train, test=test, target={"macs": 0.5}, recover=recover, seed=0)
    folder = result.save(Path(tempfile.mkdtemp()) / "small")
    again = sc.load(folder, model=Net).eval()  # an ordinary nn.Module
    assert torch.equal(again(test[0][0]), result.model.eval()(test[0][0]))

    before, after = result.report.before, result.report.after
    print(repr(result))
    return before.quality["accuracy"], after.quality["accuracy"], after.macs / before.macs


if __name__ == "__main__":
    main()
