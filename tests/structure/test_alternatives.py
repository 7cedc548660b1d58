"""What a softmax runs over, and what weights go along: units where layers make it and sum it up, else data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from independent import cut_or_refused, locked
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc


class Soft(nn.Module):
    def __init__(self, soft: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.soft = nn.Linear(8, 32), nn.Linear(32, 4), soft

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.soft(self.a(x)))


class SoftMap(nn.Module):
    def __init__(self, soft: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.soft = nn.Conv1d(8, 32, 3), nn.Conv1d(32, 4, 1), soft

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.soft(self.a(x)))


SOFT: dict[str, tuple[Callable[..., nn.Module], Callable[[Tensor, Any], Tensor], tuple[int, ...]]] = {
    "softmax": (Soft, lambda t, dim: t.softmax(dim), (5, 8)),
    "log softmax": (Soft, lambda t, dim: t.log_softmax(dim), (5, 8)),
    "softmin": (Soft, lambda t, dim: F.softmin(t, dim), (2, 5, 8)),
    "with a temperature": (Soft, lambda t, dim: (t / 3).softmax(dim), (5, 8)),
    "of a map": (SoftMap, lambda t, dim: t.softmax(1 if dim == -1 else dim), (2, 8, 9)),
}


@pytest.mark.parametrize("name", SOFT)
def test_a_softmax_between_two_layers_runs_over_what_is_kept(name: str) -> None:
    torch.manual_seed(0)
    net, soft, shape = SOFT[name]
    model, x = net(lambda t: soft(t, -1)).eval(), torch.randn(shape)
    plan, cut = cut_or_refused(model, x)  # type: ignore[misc]
    kept = plan.cuts["a.weight"][0]
    for one in (x, torch.randn(3, *shape[1:])):
        full = model.a(one)
        d = 1 if net is SoftMap else -1
        soft_kept = soft(full.index_select(d, kept), -1)
        weight = model.b.weight[:, kept]
        want = F.linear(soft_kept, weight, model.b.bias) if net is Soft else F.conv1d(soft_kept, weight, model.b.bias)
        torch.testing.assert_close(cut(one), want, rtol=1e-4, atol=1e-5)


class Gate(nn.Module):
    """Experts weighed by a router."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 6), nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.stack([e(x) for e in self.experts], -1) * self.gate(x).softmax(-1)[:, None]).sum(-1)


class Memory(nn.Module):
    """Keys and values that every input may read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.keys = nn.Linear(8, 12), nn.Parameter(torch.randn(6, 12))
        self.values = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return (self.a(x) @ self.keys.T).softmax(-1) @ self.values


class Kernels(nn.Module):
    """A kernel made of several, as many as the router weighs."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.kernels = nn.Linear(8, 6), nn.Parameter(torch.randn(6, 32))

    def forward(self, x: Tensor) -> Tensor:
        mixed = (self.gate(x).softmax(-1) @ self.kernels).view(-1, 8, 4)
        return (x[:, None] @ mixed)[:, 0]


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.score, self.a, self.b = nn.Linear(8, 6), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.score(x).softmax(-1) @ F.relu(self.a(x)))


class Attended(nn.Module):
    """A head's own width under a softmax, as linear attention has it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.q(x).softmax(-1) @ (self.k(x).softmax(-2).mT @ x))


ALTERNATIVES = [(Gate, "gate", (5, 8)), (Memory, "keys", (5, 8)), (Kernels, "gate", (5, 8)),
                (Steps, "score", (2, 6, 8)), (Attended, "q", (2, 7, 8))]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "shape"), ALTERNATIVES, ids=[kind.__name__ for kind, *_ in ALTERNATIVES])
def test_other_alternatives_stay(kind: type[nn.Module], name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    found = locked(kind().eval(), torch.randn(shape))
    assert any("softmax" in reason for reason in found[name]), found


# -- weights that are applied to each position -------------------------------------------------------------------------


class Queries(nn.Module):
    def __init__(self, pooled: Callable[[Tensor], Tensor], transposed: bool) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(12, 5) if transposed else torch.randn(5, 12))
        self.k, self.v, self.up, self.out = nn.Linear(8, 12), nn.Linear(8, 16), nn.Linear(16, 24), nn.Linear(24, 3)
        self.pooled, self.transposed = pooled, transposed

    def read(self, x: Tensor) -> Tensor:
        if self.transposed:
            return (self.k(x) @ self.queries * 0.3).softmax(1).mT @ self.v(x)
        return (self.queries @ self.k(x).mT * 0.3).softmax(-1) @ self.v(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.pooled(F.relu(self.up(self.read(x)))))


POOLED: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda t: t.mean(1), "maximum": lambda t: t.amax(1), "sum": lambda t: t.sum(1),
    "norm": lambda t: t.norm(dim=1), "logsumexp": lambda t: t.logsumexp(1),
}  # fmt: skip


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", POOLED)
def test_learned_queries_are_data_and_the_widths_beside_them_free(name: str, transposed: bool) -> None:
    torch.manual_seed(0)
    found = cut_or_refused(Queries(POOLED[name], transposed).eval(), torch.randn(2, 7, 8))
    assert not isinstance(found, sc.SecateurError), found
    plan, _ = found
    assert (1 if transposed else 0) not in plan.cuts.get("queries", {})
    assert 0 in plan.cuts["up.weight"]


class Mixer(nn.Module):
    """Weights mix the steps of every channel, and others sum the channels up."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.steps, self.b = nn.Linear(8, 24), nn.Linear(6, 6), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.b(h + self.steps(h.mT).mT)


class SharedByHeads(nn.Module):
    """One small layer works on every head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.each, self.b = nn.Linear(8, 24), nn.Linear(6, 6), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x)).unflatten(-1, (-1, 6))
        return self.b(self.each(h).flatten(-2))


@pytest.mark.parametrize(("kind", "shape"), [(Mixer, (2, 6, 8)), (SharedByHeads, (5, 8))])
def test_units_that_are_rows_here_and_summed_up_there_stay_free(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    view = sc.inspect(kind().eval(), torch.randn(shape))
    assert any(span.tensor == "a.weight" for group in view.groups for span in group.spans)
