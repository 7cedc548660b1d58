"""What tests of usages share: three small networks, and plans that are skipped where they are refused in words."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.errors import SecateurError

from .cases import enliven
from .harness import differ, flat, same, snapshot
from .references import Kept, zeroed


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return enliven(build()).eval()


def data(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def equal(want: Any, have: Any) -> None:
    detached = ([o.detach() if isinstance(o, Tensor) else o for o in flat(x)] for x in (want, have))
    differ(*detached)


RANDOM: dict[str, Any] = {"criterion": {"name": "random"}, "target": {"sparsity": 0.3}, "scope": "local"}


def in_words(error: SecateurError) -> None:
    """A refusal says something, and does not ask for a report."""
    text = str(error)
    if len(text) <= 20 or "please report" in text.lower():
        raise AssertionError(f"an internal error: {text}") from error


def planned(model: nn.Module, example: Any, **options: Any) -> Any:
    """A plan; skipped where the library refuses in words."""
    try:
        if not {"keep", "remove", "masks", "scores"} & set(options):
            options = {**RANDOM, **options}
        return sc.plan(model, example, **options)
    except SecateurError as error:
        in_words(error)
        pytest.skip(f"refused: {error}")


def applied(plan: Any, model: nn.Module, **options: Any) -> nn.Module:
    try:
        return plan.apply(model, **options)
    except SecateurError as error:
        in_words(error)
        pytest.skip(f"refused: {error}")


def pair(model: nn.Module, example: Any, **options: Any) -> tuple[nn.Module, nn.Module, Any]:
    """The original with zeros, the cut model, the plan; the model of the user is as it was."""
    before, given = snapshot(model), copy.deepcopy(example)
    plan = planned(model, example, **options)
    cut = applied(plan, model)
    assert snapshot(model) == before, "the model was changed"
    assert same(example, given), "the example was changed"
    assert plan.cuts or plan.layers, "nothing was cut"
    return zeroed(model, Kept(model, plan)), cut, plan


class Convnet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, 12, 3, padding=1)
        self.c, self.out = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.bn(self.a(x)).relu()).relu()
        return self.out(self.c(h).mean((2, 3)))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(8, 24), nn.Linear(24, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.fc2(self.fc1(x).relu()).relu())


class Former(nn.Module):
    """Two blocks, a scale of one over the root of the width of heads."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(8, 24), nn.Linear(24, 3)
        self.blocks = nn.ModuleList(FormerBlock(24, heads) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.out(h)


class FormerBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return h + self.down(F.gelu(self.up(h)))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "conv": (Convnet, (2, 3, 8, 8), (3, 3, 12, 9)),
    "mlp": (Mlp, (5, 8), (7, 8)),
    "former": (Former, (2, 6, 8), (3, 9, 8)),
}


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, number: int = 3) -> None:
    for step in range(number):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = (model(x + 0.1 * step) - 0.3).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


def thirds(values: Iterable[Any], of: int = 3) -> list[Any]:
    """Cases for `pytest.mark.parametrize`, of which every third is fast; `make test-all` runs all."""
    cases = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*case, marks=() if i % of == 0 else (pytest.mark.slow,)) for i, case in enumerate(cases)]
