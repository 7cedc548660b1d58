"""A small sparse network whose channels, single weights and whole layers can go, and data for it."""

import torch
from torch import nn

import secateur as sc


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    """Three blocks between linear layers: channels, single weights and whole layers can go."""

    def __init__(self):
        super().__init__()
        self.stem, self.layers = nn.Linear(8, 12), nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(24, 8, generator=generator), torch.randint(3, (24,), generator=generator)) for _ in range(5)]


def sparse(sparsity=0.6):
    torch.manual_seed(1)
    x = batches()[0][0][:2]
    return sc.prune(
        Stack().eval(), x, granularity="element", target={"sparsity": sparsity}, overrides=["measure.rounds=6"]
    )


def zeros(model):
    return {name: p.detach() == 0 for name, p in model.named_parameters() if p.dim() > 1}
