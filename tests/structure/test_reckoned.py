"""Whole numbers made of sizes that are cut, which bound what short inputs do not reach, are conditions of the plan."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from itertools import islice

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import secateur as sc

GONE = [1, 2, 3, 5, 7, 11]


class Bounded(nn.Module):
    """Something of the input alone, bounded by a number made of the width of a hidden layer."""

    def __init__(self, made: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.made = nn.Linear(6, 16), nn.Linear(16, 6), made

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return self.b(h) + self.made(x, h)


def banded(x: Tensor, h: Tensor) -> Tensor:
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril().triu(-4 * h.shape[-1])
    return functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)


BOUNDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "the end of a slice": lambda x, h: x[:, -4 * h.shape[-1] :].sum(1, keepdim=True),
    "a width from the end": lambda x, h: x[:, -h.shape[-1] :].sum(1, keepdim=True),
    "the end of a list": lambda x, h: sum(list(x.unbind(1))[: h.shape[-1] * 4]).unsqueeze(1),
    "an iterator": lambda x, h: sum(islice(x.unbind(1), 4 * h.shape[-1])).unsqueeze(1),
    "a queue": lambda x, h: sum(deque(x.unbind(1), h.shape[-1] * 4)).unsqueeze(1),
    "pieces": lambda x, h: x.split(4 * h.shape[-1], 1)[0].sum(1, keepdim=True),
    "a band": banded,
    "a whole part": lambda x, h: x * (x.shape[1] // (h.shape[-1] * 4)),
    "a rest": lambda x, h: x * (x.shape[1] - x.shape[1] % (h.shape[-1] * 4)),
    "places that are compared": lambda x, h: sum(
        v * (i < 4 * h.shape[-1]) for i, v in enumerate(x.unbind(1))
    ).unsqueeze(1),
}
PLAIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "the size of a result": lambda x, h: h.view(*h.shape[:-1], h.shape[-1] // 2, 2).sum((-1, -2))[..., None].mul(0),
    "an equality": lambda x, h: x if h.shape[-1] * 2 == 2 * h.shape[-1] else -x,
    "a fraction": lambda x, h: x * ((h.shape[-1] // 4) / (h.shape[-1] // 4)),
    "numbers of what stays": lambda x, h: x[:, : x.shape[-1] * 40],
}


def named(plan: sc.Plan) -> list[str]:
    return [c.where for c in plan.conditions if "bounds nothing" in c.text]


def plan_of(name: str) -> tuple[nn.Module, sc.Plan]:
    torch.manual_seed(0)
    model = Bounded({**BOUNDS, **PLAIN}[name]).eval()
    what = {"remove": {"a": GONE}} if name in BOUNDS else {"target": {"sparsity": 0.5}}
    return model, sc.plan(model, torch.randn(4, 8, 6), granularity="channel", **what)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", BOUNDS)
def test_a_bound_that_the_example_does_not_reach_is_named(name: str) -> None:
    model, plan = plan_of(name)
    cut = plan.apply(model)
    assert named(plan)
    assert all("test_reckoned.py" in where for where in named(plan))
    absent = copy.deepcopy(model)
    with torch.no_grad():
        absent.b.weight[:, GONE] = 0
        differ = [float((absent(x) - cut(x)).abs().max()) for x in (torch.randn(2, 8, 6), torch.randn(2, 100, 6))]
    assert differ[0] < 1e-5
    assert differ[1] > 1e-3, "else there would be nothing to name"


def test_an_attribute_that_follows_is_a_size_like_any_other() -> None:
    class Named(Bounded):
        def __init__(self) -> None:
            super().__init__(lambda x, h: x)
            self.width = 16

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.a(x)).view(*x.shape[:-1], self.width)
            return self.b(h) + x[:, -4 * self.width :].sum(1, keepdim=True)

    torch.manual_seed(0)
    plan = sc.plan(Named(), torch.randn(4, 8, 6), granularity="channel", remove={"a": GONE})
    assert len(named(plan)) == 1


def test_a_branch_that_only_training_takes_counts_as_well() -> None:
    class Trained(Bounded):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.a(x))
            if self.training:
                return self.b(h) + x[:, -4 * h.shape[-1] :].sum(1, keepdim=True)
            return self.b(h)

    torch.manual_seed(0)
    plan = sc.plan(Trained(lambda x, h: x), torch.randn(4, 8, 6), granularity="channel", remove={"a": GONE})
    assert len(named(plan)) == 1


@pytest.mark.parametrize("name", PLAIN)
def test_sizes_that_follow_and_numbers_of_what_stays_are_not(name: str) -> None:
    assert not named(plan_of(name)[1])


def test_the_numbers_of_attention_are_sizes_and_scales() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads, self.qkv, self.out = 4, nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            batch, length, _ = x.shape
            q, k, v = self.qkv(x).chunk(3, -1)
            each = q.shape[-1] // self.heads
            q, k, v = (z.view(batch, length, self.heads, each).transpose(1, 2) for z in (q, k, v))
            mixed = (q @ k.transpose(-1, -2) * each**-0.5).softmax(-1) @ v
            return self.out(mixed.transpose(1, 2).reshape(batch, length, self.heads * each))

    torch.manual_seed(0)
    plan = sc.plan(Attention(), torch.randn(2, 5, 16), granularity="head", target={"sparsity": 0.5})
    assert plan.units["removed"] == 2
    assert not named(plan)


class Mixture(nn.Module):
    """Fused experts, and tokens that are limited by how many there are."""

    def __init__(self, made: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.router, self.made = nn.Linear(6, 6, bias=False), made
        self.up, self.down = nn.Parameter(torch.randn(6, 6, 8) * 0.3), nn.Parameter(torch.randn(6, 8, 6) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        p = self.router(x).softmax(-1)
        weight, chosen = p.topk(2, -1)
        gates = torch.zeros_like(p).scatter(-1, chosen, weight)
        hidden = torch.einsum("td,edf->tef", x, self.up).relu()
        mixed = torch.einsum("te,ted->td", gates, torch.einsum("tef,efd->ted", hidden, self.down))
        return mixed + self.made(x, p.shape[-1])


@pytest.mark.parametrize(("made", "said"), [
    (lambda x, n: x[-4 * n :].sum(0, keepdim=True), True),
    (lambda x, n: x * (x.shape[0] // (20 * n)), True),
    (lambda x, n: x, False),
], ids=["a window", "a capacity", "nothing"])  # fmt: skip
def test_bounds_made_of_the_number_of_experts_are_named(made: Callable[[Tensor, int], Tensor], said: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), Mixture(made), nn.Linear(6, 3))
    plan = sc.plan(model, torch.randn(5, 6), granularity="expert", target={"count": 2})
    assert bool(named(plan)) == said
