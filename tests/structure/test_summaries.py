"""Outputs that sum units up: where the cut model differs from the masked one, a condition says so, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.planning.plan import Plan

Summary = Callable[[Tensor], Tensor]
SAID = "an output holds a "

OF_UNITS: dict[str, Summary] = {  # of [rows, units]: zeros of removed units bring something
    "mean": lambda h: h.mean(-1),
    "mean of squares": lambda h: h.pow(2).mean(),
    "mean by hand": lambda h: h.sum(-1) / h.shape[-1],
    "mean in two lines": lambda h: (total := h.sum(-1)) * 1 + total / h.size(-1),
    "smallest": lambda h: h.abs().amin(-1),
    "largest": lambda h: (-h.abs()).amax(-1),
    "median": lambda h: h.abs().median(-1).values,
    "spread": lambda h: h.std(-1),
    "product": lambda h: (h + 1.5).prod(-1),
    "sum of exponentials": lambda h: h.exp().sum(-1),
    "sum of shifted": lambda h: (h + 1).sum(-1),
    "log of a sum of exponentials": lambda h: h.logsumexp(-1),
    "sum of gates": lambda h: torch.sigmoid(h).sum(-1),
    "pooled as space": lambda h: F.adaptive_avg_pool1d(h[:, None], 1),
    "an error": lambda h: F.mse_loss(h, torch.ones_like(h)),
    "products of what is normalised": lambda h: (n := F.layer_norm(h, h.shape[-1:])) @ n.t(),
    "in a residual": lambda h: h @ h.t() + h.mean(),
}
ALIKE: dict[str, Summary] = {  # zeros of removed units bring nothing
    "sum": lambda h: h.sum(-1),
    "sum over a number of the code": lambda h: h.sum(-1) / 32,
    "sum over how many rows": lambda h: h.sum(-1) / h.shape[0],
    "norm": lambda h: h.norm(dim=-1),
    "sum of squares": lambda h: (h * h).sum(-1),
    "second order": lambda h: 0.5 * (h.sum(-1).square() - h.square().sum(-1)),
    "sum behind a function": lambda h: F.gelu(h).tanh().sum(-1),
    "products": lambda h: h @ h.t(),
    "angles": lambda h: F.normalize(h, dim=-1) @ F.normalize(h, dim=-1).t(),
    "mean over rows": lambda h: h.mean(0).sum(),
}


class Net(nn.Module):
    def __init__(self, of: Summary, *, behind: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 32), nn.Linear(32, 4), nn.Linear(5, 3)
        self.of, self.behind = of, behind

    def forward(self, x: Tensor) -> object:
        h = self.a(x)
        found = self.of(h)
        return self.c(found) if self.behind else (self.b(F.relu(h)), found)


class Heads(nn.Module):
    """Attention of torch, or by hand, whose weights are an output as well."""

    def __init__(self, of: Summary | None) -> None:
        super().__init__()
        self.i, self.o = nn.Linear(6, 32), nn.Linear(32, 4)
        self.a = nn.MultiheadAttention(32, 8, batch_first=True)
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.width, self.of = 4, of

    def forward(self, x: Tensor) -> object:
        h = self.i(x)
        if self.of is None:
            y, weights = self.a(h, h, h)
            return self.o(y), weights
        q, k, v = (f(h).unflatten(-1, (-1, self.width)).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = (q @ k.mT * 0.5).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2)), self.of(weights)


HEADS: dict[str, Summary | None] = {
    "of torch": None,
    "mean": lambda w: w.mean(1),
    "sum": lambda w: w.sum(1),
    "einsum": lambda w: torch.einsum("bhij->bij", w) / w.shape[1],
    "largest": lambda w: w.amax(1),
    "rolled out": lambda w: (w.mean(1) + torch.eye(w.shape[-1])).mean(1),
}


def plan_of(net: nn.Module, x: Tensor, granularity: str) -> Plan:
    """A random half of the units goes."""
    return sc.plan(net, x, granularity=granularity, target={"sparsity": 0.5}, criterion={"name": "random"}, seed=1)


def differs(net: nn.Module, plan: Plan, x: Tensor) -> bool:
    """Whether the cut model and the original with zeros in the place of what is removed give another last output."""
    cut = plan.apply(net)
    masked = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for name, dims in plan.cuts.items():
        for d, kept in dims.items():
            gone = torch.ones(masked[name].shape[d], dtype=torch.bool).index_fill(0, kept, False)
            masked[name].index_fill_(d, gone.nonzero().flatten(), 0)
    with torch.no_grad():
        one, other = cut(x), torch.func.functional_call(net, masked, (x,))
    return not torch.allclose(one[-1], other[-1], atol=1e-4)


def said(plan: Plan) -> list[str]:
    """Places of the conditions."""
    return [c.where for c in plan.conditions if c.text.startswith(SAID)]


@pytest.mark.parametrize("name", [*OF_UNITS, *ALIKE])
def test_a_condition_where_a_masked_model_differs(name: str) -> None:
    net, x = Net({**OF_UNITS, **ALIKE}[name]).eval(), torch.randn(5, 8)
    plan = plan_of(net, x, "channel")
    assert plan.cuts["a.weight"]
    assert differs(net, plan, x) == (name in OF_UNITS) == bool(said(plan))
    if name in OF_UNITS:
        assert all("test_summaries.py:" in where for where in said(plan))


@pytest.mark.parametrize("name", HEADS)
def test_heads(name: str) -> None:
    """Averages of attention as `nn.MultiheadAttention` hands them out, and by hand."""
    net, x = Heads(HEADS[name]).eval(), torch.randn(3, 5, 6)
    plan = plan_of(net, x, "head")
    assert plan.cuts
    assert said(plan)
    assert differs(net, plan, x)


@pytest.mark.parametrize("name", OF_UNITS)
def test_behind_a_layer_it_is_a_feature(name: str) -> None:
    """A layer stands between: nothing is said, as of a norm."""
    net = Net(lambda h: OF_UNITS[name](h).flatten()[:1].expand(5), behind=True).eval()
    assert not said(plan_of(net, torch.randn(5, 8), "channel"))


class Box:
    loss: object = None


SHELF: list[Tensor] = []
LEFT: dict[str, Callable[[Keeps, Tensor], object]] = {  # who holds a number after the forward
    "an attribute": lambda m, t: setattr(m, "loss", t),
    "an attribute of a layer, detached": lambda m, t: setattr(m.b, "loss", t.detach()),
    "a list": lambda m, t: m.log.append(t),
    "a dictionary in one": lambda m, t: m.log.append({"loss": [t * 2]}),
    "an object": lambda m, t: setattr(m.box, "loss", t),
    "a list of the file": lambda m, t: SHELF.append(t),
    "a buffer, written to": lambda m, t: m.seen.add_(t),
}


class Keeps(nn.Module):
    """A loss is put aside, as mixtures and regularisers do."""

    def __init__(self, of: Summary, put: Callable[[Keeps, Tensor], object] | None) -> None:
        super().__init__()
        self.a, self.b, self.of, self.put = nn.Linear(8, 32), nn.Linear(32, 4), of, put
        self.log: list[object] = []
        self.box = Box()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        found = self.of(h)
        if self.put is not None:
            self.put(self, found)
        return self.b(F.relu(h))


def kept(plan: Plan) -> list[str]:
    return [c.where for c in plan.conditions if c.text.startswith("what is kept after the forward holds a ")]


@pytest.mark.parametrize("place", LEFT)
def test_what_is_put_aside_is_said_as_an_output_is(place: str) -> None:
    for of, says in ((lambda h: h.pow(2).mean(), True), (lambda h: h.pow(2).sum(), False)):
        plan = plan_of(Keeps(of, LEFT[place]).eval(), torch.randn(5, 8), "channel")
        SHELF.clear()
        assert bool(kept(plan)) is says
        assert all("test_summaries.py:" in where for where in kept(plan))


def test_what_a_hook_puts_aside_is_said() -> None:
    net = Keeps(lambda h: h, None).eval()
    net.a.register_forward_hook(lambda _, __, h: SHELF.append(h.abs().mean()))
    assert kept(plan_of(net, torch.randn(5, 8), "channel"))
    SHELF.clear()


@pytest.mark.parametrize("name", OF_UNITS)
def test_what_nobody_holds_is_not_said(name: str) -> None:
    assert not kept(plan_of(Keeps(OF_UNITS[name], None).eval(), torch.randn(5, 8), "channel"))
