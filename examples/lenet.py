"""A model of your own, as secateur takes it from the command line.

    secateur prune py:examples.lenet:build --data demo:mnist --out runs/lenet

``build()`` returns the model and an example of what its forward takes. Nothing here knows of secateur.
"""

import torch
from torch import nn


class LeNet(nn.Module):
    """LeNet-5 (LeCun et al., 1998) with ReLU and max pooling: two convolutions, three linear layers."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[batch, 1, 28, 28]`` -> ``[batch, classes]``."""
        x = nn.functional.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = nn.functional.max_pool2d(torch.relu(self.conv2(x)), 2)
        x = torch.relu(self.fc1(x.flatten(1)))
        return self.fc3(torch.relu(self.fc2(x)))


def build() -> tuple[nn.Module, torch.Tensor]:
    """The model, untrained, and an example input."""
    return LeNet(), torch.randn(1, 1, 28, 28)
