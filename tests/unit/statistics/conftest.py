import copy

import pytest
import torch
from torch import nn
from torch.nn import functional


class Attention(nn.Module):
    """Self-attention through the fused kernel, layer norm, GELU."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(4, 12), nn.Linear(4, 4), nn.LayerNorm(4)
        self.up, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d)
        return self.head(functional.gelu(self.up(self.norm(x + self.out(y)))).mean(1))


def conv(activation):
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        activation(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 2, groups=1),
        activation(),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    net[1].running_mean.normal_(std=0.3)
    net[1].running_var.uniform_(0.5, 2.0)
    return net


def build(name):
    torch.manual_seed(0)
    x = torch.randn(6, 2, 4, 4)
    if name in ("relu", "gelu"):
        net = conv(nn.ReLU if name == "relu" else nn.GELU)
    elif name == "attention":
        net, x = Attention(), torch.randn(6, 3, 4)
    else:
        raise ValueError(name)
    y = torch.tensor([0, 1, 2, 0, 1, 1])
    return net.double().eval(), (x.double(), y)


@pytest.fixture
def network():
    """Name -> (model, batch of 6) in float64, eval mode; three classes."""
    return lambda name: copy.deepcopy(build(name))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
