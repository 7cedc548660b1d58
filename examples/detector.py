"""A small detector without anchors: two scales joined by an upsampling, with a loss and a metric of its own.

python examples/detector.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.recover import finetune


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.SiLU())


class Detector(nn.Module):
    """Per cell of a grid of 8 x 8: is the object's centre here, where in the cell, how large."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(conv(3, 16, 2), conv(16, 32, 2))
        self.coarse = nn.Sequential(conv(32, 64, 2), conv(64, 32))
        self.head = nn.Sequential(conv(64, 32), nn.Conv2d(32, 4, 1))

    def forward(self, image: Tensor) -> Tensor:
        fine = self.fine(image)
        return self.head(torch.cat([fine, F.interpolate(self.coarse(fine), scale_factor=2.0)], 1))


def batches(count: int, random: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Noise with one bright square of its own size; targets are ``[batch, 4, 8, 8]``."""
    found = [(torch.rand(32, 3, 32, 32, generator=random), torch.zeros(32, 4, 8, 8)) for _ in range(count)]
    for images, target in found:
        for image, cells in zip(images, target, strict=True):
            side, x, y = torch.randint(4, 16, (3,), generator=random).tolist()
            image[:, y : y + side, x : x + side] += 1
            middle = torch.tensor([x + side / 2, y + side / 2]) / 4
            cells[:, int(middle[1]), int(middle[0])] = torch.cat([torch.ones(1), middle % 1, torch.tensor([side / 16])])
    return found


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    found, here = model(batch[0]), batch[1][:, :1]
    boxes = (here * (found[:, 1:] - batch[1][:, 1:]).abs()).sum() / here.sum()
    return F.binary_cross_entropy_with_logits(found[:, :1], here, pos_weight=torch.tensor(20.0)) + boxes


def main(steps: int = 100) -> tuple[float, float, float]:
    """Return how often the best cell is the right one, before and after, and the share of the MACs that is left."""
    torch.manual_seed(0)
    random, model = torch.Generator().manual_seed(1), Detector()
    train, test = batches(steps, random), batches(4, random)

    def cells(model: nn.Module) -> float:
        pairs = [(model(x)[:, 0].flatten(1).argmax(1), y[:, 0].flatten(1).argmax(1)) for x, y in test]
        return float(torch.cat([found == right for found, right in pairs]).float().mean())

    finetune(model, train, loss=loss, optimizer={"name": "adam", "lr": 0.003}, epochs=2)
    tuning = {"method": "finetune", "epochs": 1, "optimizer": {"name": "adam", "lr": 0.003}}
    options = {"target": {"macs": 0.5}, "recover": tuning, "evaluate": {"cells": cells}}
    done = sc.prune(model.eval(), test[0][0], data=train, loss=loss, **options)
    print(repr(done))
    before, after = done.report.before, done.report.after
    return before.quality["cells"], after.quality["cells"], after.macs / before.macs


if __name__ == "__main__":
    main()
