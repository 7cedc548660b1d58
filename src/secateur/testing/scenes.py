"""Small models with groups, data and a loss, on which criteria are tested."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.criteria.base import Context
from secateur.kinds.weights import parse
from secateur.structure.trace import Trace
from secateur.types import Batch, Group, Loss, Span

KINDS: dict[str, str | dict[str, object]] = {
    "element": "element",
    "vector": "vector",
    "kernel": "kernel",
    "block": {"name": "block", "shape": [2, 4]},
    "n:m": "2:4",
}


@dataclass(frozen=True, eq=False)
class Scene:
    """Everything that a criterion may ask for, small enough to score in milliseconds.

    Args:
        model: the model.
        groups: units of one granularity.
        data: two batches of (inputs, labels).
        loss: cross-entropy of a batch.
        capture: the structure engine's trace, for criteria that need one.
    """

    model: nn.Module
    groups: list[Group]
    data: list[tuple[Tensor, Tensor]]
    loss: Loss
    capture: Trace | None = None

    def context(self, **changes: Any) -> Context:
        """The context of this scene, with fields replaced."""
        whole = Context(
            self.model,
            self.groups,
            data=self.data,
            loss=self.loss,
            example=self.data[0][0],
            capture=self.capture,
        )
        return replace(whole, **changes)


SceneMaker = Callable[[str], Scene]


class TinyNet(nn.Module):
    """Two convolutions with batch norm and ReLU, pooling, and two linear layers (300 weights)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.conv2, self.bn2, self.relu2 = nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.relu3, self.fc2 = nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 3) of images (N, 2, H, W)."""
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.pool(self.relu2(self.bn2(self.conv2(x)))).flatten(1)
        logits: Tensor = self.fc2(self.relu3(self.fc1(x)))
        return logits


class TinyMixture(nn.Module):
    """Four experts of which each token uses two, in a residual block, and a linear layer (141 weights)."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts, self.head = nn.Linear(6, 4, bias=False), TinyExperts(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 3) of tokens (N, 6)."""
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        logits: Tensor = self.head(x + self.experts(x, chosen, weights))
        return logits


class TinyExperts(nn.Module):
    """Fused weights of four experts, two layers each."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 2, 6) / 2)
        self.down = nn.Parameter(torch.randn(4, 6, 2) / 2)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum (N, 6) of the chosen experts of every token."""
        inner = torch.einsum("nh,nkwh->nkw", x, self.up[chosen]).relu()
        return torch.einsum("nkw,nkhw,nk->nh", inner, self.down[chosen], weights)


class TinyStack(nn.Module):
    """Three residual blocks between two linear layers (165 weights)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(TinyBlock() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 3) of tokens (N, 5)."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


class TinyBlock(nn.Module):
    """A linear layer with ReLU beside the path that changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden state (N, 6)."""
        hidden: Tensor = x + self.inner(x).relu()
        return hidden


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of (inputs, labels)."""
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels)


def tiny_scene(kind: str) -> Scene:
    """A `TinyNet` with units of one granularity, a `TinyMixture` with its experts, or a `TinyStack` with its layers.

    Args:
        kind: "element", "vector", "kernel", "block", "n:m", "channel", "neuron", "expert" or "layer".

    Raises:
        KeyError: another granularity; pass a scene maker of your own to the suite then.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "expert":
            tokens = [(torch.randn(8, 6), torch.arange(8) % 3) for _ in range(2)]
            return Scene(TinyMixture().eval(), [_experts()], tokens, cross_entropy)
        if kind == "layer":
            tokens = [(torch.randn(8, 5), torch.arange(8) % 3) for _ in range(2)]
            return Scene(TinyStack().eval(), [_layers()], tokens, cross_entropy)
        model = TinyNet()
        data = [(torch.randn(8, 2, 5, 5), torch.arange(8) % 3) for _ in range(2)]
        # Unequal scales and running statistics, as a trained network has them.
        for norm in (model.bn1, model.bn2):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.3, 0.3)
        with torch.no_grad():
            for inputs, _ in data:
                model(inputs)
    return Scene(model.eval(), groups_of(model, kind), data, cross_entropy)


def groups_of(model: nn.Module, kind: str) -> list[Group]:
    """Groups of a `TinyNet`; those of channels and neurons as the structure engine makes them."""
    if kind == "channel":
        return [
            _coupled("conv1", kind, 4, ("bn1",), ("conv2.weight", 4)),
            _coupled("conv2", kind, 5, ("bn2",), ("fc1.weight", 2)),
        ]
    if kind == "neuron":
        return [_coupled("fc1", kind, 6, (), ("fc2.weight", 2))]
    return parse(KINDS[kind]).groups(model)


def _experts() -> Group:
    number = torch.arange(4)
    names = ("experts.up", "experts.down", "router.weight")
    spans = (Span(name, number.view(-1, *[1] * (1 if name.startswith("router") else 2)), "out") for name in names)
    return Group("experts/expert", "expert", (4,), tuple(spans))


def _layers() -> Group:
    names = [f"blocks.{i}" for i in range(3)]
    spans = (Span(f"{name}.inner.weight", torch.full((1, 1), i), "self") for i, name in enumerate(names))
    known = {"blocks": tuple(names), "free": (True,) * 3, "channel_dim": (-1,) * 3}
    return Group("blocks", "layer", (3,), tuple(spans), attributes=known)


def _coupled(name: str, kind: str, units: int, norms: tuple[str, ...], reader: tuple[str, int]) -> Group:
    number = torch.arange(units)
    dims = 2 if kind == "neuron" else 4
    spans = [Span(f"{name}.weight", number.view(-1, *[1] * (dims - 1)), "out"), Span(f"{name}.bias", number, "bias")]
    for norm in norms:
        spans += [Span(f"{norm}.weight", number, "scale"), Span(f"{norm}.bias", number, "bias")]
        spans += [Span(f"{norm}.{state}", number, "state") for state in ("running_mean", "running_var")]
    spans.append(Span(reader[0], number.view(1, -1, *[1] * (reader[1] - 2)), "in"))
    return Group(name, kind, (units,), tuple(spans))
