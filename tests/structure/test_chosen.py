"""Plain numbers that choose what an operator does: each is a condition, wherever it comes from, or is settled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.planning.plan import Plan

Made = Callable[["Net", Tensor, Tensor], Tensor]
COUNTS, TURNS, AXIS = [0], 0, 1
X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
CHOSEN, FRONT = "holds where `", "holds for inputs of as many dimensions as the example has"
SQUEEZE = "holds where squeeze drops what it drops on the example"


class Net(nn.Module):
    def __init__(self, of: Made) -> None:
        super().__init__()
        self.a, self.b, self.of = nn.Linear(8, 16), nn.Linear(16, 4), of
        self.calls, self.seen, self.axis, self.times = 0, ["once"], 1, 2
        self.blocks = nn.ModuleList([nn.Identity()])
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.of(self, x, F.relu(self.a(x))))

    def told(self) -> None:
        """Counts, for whoever calls it."""
        self.calls += 1
        self.seen.append("again")


class Inner(nn.Module):
    def forward(self, h: Tensor, d: int) -> Tensor:
        return h.flip(d)


def turn(h: Tensor, d: int = 1) -> Tensor:
    return h.flip(d)


def turn_global() -> None:
    global TURNS
    TURNS += 1


def by_a_name(s: Net, x: Tensor, h: Tensor) -> Tensor:
    d = 2 - x.is_contiguous()
    return h.flip(d)


def by_a_list(s: Net, x: Tensor, h: Tensor) -> Tensor:
    parts: list[Tensor] = []
    for row in x[:1]:
        parts.append(row)
    return h.flip(len(parts))


def by_a_count(s: Net, x: Tensor, h: Tensor) -> Tensor:
    n = 0
    for _ in x[:1]:
        n += 1
    return h.flip(n)


def by_padding(s: Net, x: Tensor, h: Tensor) -> Tensor:
    n = int(not x.is_contiguous())
    return F.pad(h, (n, -n))


def by_a_bound(s: Net, x: Tensor, h: Tensor) -> Tensor:
    n = int(not x.is_contiguous())
    return F.pad(h[..., n:], (0, h.shape[-1] - h[..., n:].shape[-1]))


def by_a_gradient(s: Net, x: Tensor, h: Tensor) -> Tensor:
    return h.flip(1 + int(s.a.weight.grad is not None))


OPEN: dict[str, Made] = {
    "contiguity": lambda s, x, h: h.flip(1 + int(not x.is_contiguous())),
    "contiguity by a name": by_a_name,
    "a stride": lambda s, x, h: h.flip(x.stride(-1)),
    "bytes of an element": lambda s, x, h: h.flip(x.element_size() // 4),
    "bytes of a dtype": lambda s, x, h: h.flip(x.dtype.itemsize // 4),
    "itemsize": lambda s, x, h: h.flip(x.itemsize // 4),
    "all bytes": lambda s, x, h: h.flip(x.nbytes // x.numel() // 4),
    "an offset in memory": lambda s, x, h: h.flip(1 + x.storage_offset()),
    "whether there is a gradient": by_a_gradient,
    "whether one is asked for": lambda s, x, h: h.flip(2 - int(s.a.weight.requires_grad)),
    "a version": lambda s, x, h: h.flip(1 + min(1, x._version)),
    "how many in a list": by_a_list,
    "a count": by_a_count,
    "a count of the module": lambda s, x, h: h.flip(1 + s.calls),
    "a list of the module": lambda s, x, h: h.flip(len(s.seen)),
    "a list of the file": lambda s, x, h: h.flip(1 + COUNTS[0]),
    "a count of the file": lambda s, x, h: h.flip(1 + TURNS),
    "the rank": lambda s, x, h: h.flip(x.dim() - 2),
    "the rank by keyword": lambda s, x, h: h.roll(1, dims=x.ndim - 2),
    "padding": by_padding,
    "a bound": by_a_bound,
    "through a function": lambda s, x, h: turn(h, 1 + int(not x.is_contiguous())),
    "through a module": lambda s, x, h: s.inner(h, 1 + int(not x.is_contiguous())),
    "through a module by keyword": lambda s, x, h: s.inner(h, d=1 + int(not x.is_contiguous())),
    "through a list of arguments": lambda s, x, h: torch.flip(*[h, (1 + int(not x.is_contiguous()),)]),
}
INSIDE = {
    "through a function": turn, "through a module": Inner.forward, "through a module by keyword": Inner.forward,
}  # fmt: skip
SETTLED: dict[str, Made] = {
    "a literal": lambda s, x, h: h.flip(-2),
    "an attribute": lambda s, x, h: h.flip(s.axis - 3),
    "a constant": lambda s, x, h: h.flip(AXIS - 3),
    "a default": lambda s, x, h: turn(h),
    "an argument": lambda s, x, h: turn(h, -2),
    "an argument of a module": lambda s, x, h: s.inner(h, d=-2),
    "a list of modules": lambda s, x, h: h.flip(len(s.blocks)),
    "sizes": lambda s, x, h: h.reshape(x.shape[0] * x.size(1), -1).reshape(h.shape),
    "places in a loop": lambda s, x, h: torch.stack([h[:, t] for t in range(x.shape[1])], 1),
    "numbers of blocks": lambda s, x, h: sum((h.roll(i, 1) for i, _ in enumerate(s.blocks)), h),
    "an attribute of two": lambda s, x, h: h.repeat_interleave(s.times, 0)[::2],
    "a value": lambda s, x, h: h * x.element_size() + int(x.is_contiguous()),
}


def planned(of: Made, x: Tensor = X) -> Plan:
    model = Net(of).eval()
    plan = sc.plan(model, x, granularity="channel", target={"sparsity": 0.3}, criterion={"name": "random"})
    assert plan.cuts
    return plan


def line_of(of: Any) -> int:
    return int(of.__code__.co_firstlineno)


@pytest.mark.parametrize("name", OPEN)
def test_what_chooses_is_a_condition(name: str) -> None:
    said = [c for c in planned(OPEN[name]).conditions if c.text.startswith(CHOSEN)]
    assert len(said) == 1
    file, _, line = said[0].where.partition(":")
    assert file == "structure/test_chosen.py"
    first = line_of(INSIDE.get(name, OPEN[name]))
    assert 0 <= int(line) - first <= 5


@pytest.mark.parametrize("name", SETTLED)
def test_what_is_settled_is_not(name: str) -> None:
    assert not [c for c in planned(SETTLED[name]).conditions if c.text.startswith(CHOSEN)]


def test_a_tensor_of_which_nothing_is_cut() -> None:
    """What is done to the input concerns no units."""
    plan = planned(lambda s, x, h: h + 0 * x.flip(1 + int(not x.is_contiguous())).sum())
    assert not [c for c in plan.conditions if c.text.startswith(CHOSEN)]


# -- dimensions that are counted from the front ------------------------------------------------------------------------

FRONTS: dict[str, Callable[[Tensor], Tensor]] = {
    "flip": lambda h: h.flip(1),
    "roll": lambda h: torch.roll(h, 1, 1),
    "sort": lambda h: h.sort(1).values,
    "softmax": lambda h: F.softmax(h, dim=1),
    "softmax of a module": nn.Softmax(1),
    "a stride": lambda h: h[:, ::1].flip(1),
    "an index": lambda h: h[:, torch.arange(h.shape[1] - 1, -1, -1)],
    "picks": lambda h: h.index_select(1, torch.arange(h.shape[1] - 1, -1, -1)),
}


def masked(net: Net, plan: Plan) -> dict[str, Tensor]:
    """Weights of the original with zeros in the place of what goes."""
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for name, dims in plan.cuts.items():
        for d, kept in dims.items():
            gone = torch.ones(state[name].shape[d], dtype=torch.bool).index_fill(0, kept, False)
            state[name].index_fill_(d, gone.nonzero().flatten(), 0)
    return state


@pytest.mark.parametrize("name", FRONTS)
def test_a_sample_without_a_batch(name: str) -> None:
    """Where the cut model is another one on an input of another rank, a condition says so."""
    net = Net(lambda s, x, h: FRONTS[name](h)).eval()
    plan = sc.plan(net, X, granularity="channel", target={"sparsity": 0.5}, criterion={"name": "random"})
    cut = plan.apply(net)
    with torch.no_grad():
        for x, same in ((X, True), (X[0], False)):
            wanted = torch.func.functional_call(net, masked(net, plan), (x,))
            assert torch.allclose(wanted, cut(x), atol=1e-5) == same
    assert [c for c in plan.conditions if c.text.startswith(FRONT)]


@pytest.mark.parametrize(
    "of",
    [
        lambda s, x, h: h.flip(-2),  # from the end
        lambda s, x, h: h[:, 0],  # refused without a batch
        lambda s, x, h: h - h.mean(1, keepdim=True),  # over what stays
        lambda s, x, h: h[..., :2, :],
    ],
)
def test_nothing_is_said_where_nothing_differs(of: Made) -> None:
    assert not [c for c in planned(of).conditions if c.text.startswith(FRONT)]


# -- behind a squeeze ----------------------------------------------------------------------------------------------

SQUEEZED: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda h: h.mean(1).squeeze().flip(0),
    "of torch": lambda h: torch.squeeze(h.mean(1, keepdim=True)).flip(0),
    "the first": lambda h: h.mean(1).squeeze(0).flip(0),
    "by a name": lambda h: h.mean(1).squeeze(dim=0).roll(1, 0),
    "several": lambda h: h.mean(1, keepdim=True).squeeze((0, 1)).sort(0).values,
    "in place": lambda h: h.mean(1).squeeze_().flip(0),
    "further on": lambda h: torch.tanh(h.mean(1).squeeze() * 2).flip(0),
}


@pytest.mark.parametrize("name", SQUEEZED)
def test_a_squeeze_that_drops_more_of_another_batch(name: str) -> None:
    """Where the cut model is another one on a batch of one, a condition says so."""
    net = Net(lambda s, x, h: SQUEEZED[name](h)).eval()
    plan = sc.plan(net, X, granularity="channel", target={"sparsity": 0.5}, criterion={"name": "random"})
    cut = plan.apply(net)
    with torch.no_grad():
        x = X[:1]
        wanted = torch.func.functional_call(net, masked(net, plan), (x,))
        assert not torch.allclose(wanted, cut(x), atol=1e-5)
    assert [c for c in plan.conditions if c.text.startswith(SQUEEZE)]


def test_a_squeeze_before_what_is_counted_from_the_end() -> None:
    """A width of one makes the last dimension the one before."""
    plan = planned(lambda s, x, h: h + h.mT.squeeze().flip(-1).reshape(h.mT.shape).mT)
    assert [c for c in plan.conditions if c.text.startswith(SQUEEZE)]


@pytest.mark.parametrize(
    "of",
    [
        lambda s, x, h: h.mean(1, keepdim=True).squeeze(1).flip(0),  # of which nothing else can be one
        lambda s, x, h: h.mean(1).squeeze().view(-1, h.shape[-1]).flip(0),  # as many dimensions as before
        lambda s, x, h: h + h.mean(1).squeeze().unsqueeze(-2).expand_as(h).flip(0),
        lambda s, x, h: (h.mean(1).squeeze() + h[:, 0]).flip(0),  # added to what has a batch
        lambda s, x, h: h.mean(1).squeeze() * 2,
    ],
)
def test_a_squeeze_that_makes_no_difference(of: Made) -> None:
    assert not [c for c in planned(of).conditions if c.text.startswith(SQUEEZE)]
