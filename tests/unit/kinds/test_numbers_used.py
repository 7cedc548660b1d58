"""Numbers that the code makes of how many blocks or experts there are, where no output shows them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.errors import CertificateError, UnsupportedError
from secateur.kinds.experts.numbers import same_numbers
from secateur.kinds.experts.values import FEW, values_of
from secateur.kinds.numbers_used import NumbersUsed, Used, require_same


def marked(cases: Iterable[str], *fast: str) -> list[Any]:
    """All cases, of which only some are fast."""
    return [pytest.param(name, marks=() if name in fast else (pytest.mark.slow,)) for name in cases]


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Stack(nn.Module):
    """Five blocks; what `after` does to the last state is past every bound."""

    def __init__(self, after: Callable[[Any, Tensor, list[Tensor]], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(5))
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        states = [x]
        for block in self.blocks:
            states.append(block(states[-1]))
        return self.after(self, states[-1], states)


OF_BLOCKS: dict[str, Callable[[Any, Tensor, list[Tensor]], Tensor]] = {
    "factor": lambda m, x, s: x + (x - 99).relu() * len(m.blocks),
    "share": lambda m, x, s: x + (x - 99).relu() / len(s),
    "bound": lambda m, x, s: x.clamp(max=99.0 * len(m.blocks)),
    "tensor": lambda m, x, s: x + (x - torch.tensor(99.0 * len(m.blocks))).relu(),
    "shift": lambda m, x, s: x + (x - 99).relu().roll(len(m.blocks), -1),
    "positions": lambda m, x, s: x + (x - 99).relu() * torch.arange(len(m.blocks)).sum(),
    "states": lambda m, x, s: x + (torch.stack(s).mean(0) - 99).relu(),
    "read": lambda m, x, s: x + (x - 99).relu() * sum(b.up.weight.norm().item() for b in m.blocks),
}


@pytest.mark.parametrize("name", marked(OF_BLOCKS, "factor", "states"))
def test_numbers_of_blocks_are_refused(name: str) -> None:
    model = Stack(OF_BLOCKS[name]).eval()
    with pytest.raises(CertificateError, match=r"test_numbers_used\.py:\d+"):
        sc.plan(model, X, granularity="layer", remove={"blocks": [2]}).apply(model)


def test_lines_that_run_less_often_are_said() -> None:
    model = Stack(lambda m, x, s: x + (x - 99).relu() * sum(b.up.weight.norm() for b in m.blocks)).eval()
    plan = sc.plan(model, X, granularity="layer", remove={"blocks": [2]})
    plan.apply(model)
    assert any("runs linalg_vector_norm less often" in note for note in plan.certificate.notes)


@pytest.mark.parametrize("after", [lambda m, x, s: x, lambda m, x, s: x.clamp(max=99.0)])
def test_what_does_not_count_blocks_is_certified(after: Callable[[Any, Tensor, list[Tensor]], Tensor]) -> None:
    model = Stack(after).eval()
    plan = sc.plan(model, X, granularity="layer", remove={"blocks": [2]})
    cut = plan.apply(model)
    assert not plan.certificate.notes
    wanted = X
    for i in (0, 1, 3, 4):
        wanted = model.blocks[i](wanted)
    assert torch.allclose(cut(X), wanted, atol=1e-5)


class Mixture(nn.Module):
    """The best two of six experts; `weigh` sees the shares."""

    def __init__(self, weigh: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.out, self.num_experts = nn.Linear(8, 6, bias=False), nn.Linear(8, 3), 6
        self.up, self.down = nn.Parameter(torch.randn(6, 8, 5) / 3), nn.Parameter(torch.randn(6, 5, 8) / 3)
        self.weigh = weigh

    def forward(self, x: Tensor) -> Tensor:
        p = self.gate(x).softmax(-1)
        best = p.topk(2, -1)
        g = self.weigh(self, torch.zeros_like(p).scatter(-1, best.indices, best.values))
        inner = torch.einsum("td,edf->tef", x, self.up).relu()
        return self.out(torch.einsum("te,tef,efd->td", g, inner, self.down))


def capped(capacity: Callable[[Any, Tensor], float]) -> Callable[[Any, Tensor], Tensor]:
    return lambda m, g: g * ((g > 0).long().cumsum(0) <= capacity(m, g))


OF_EXPERTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "fraction": capped(lambda m, g: 99.0 * len(g) / g.shape[1]),
    "attribute": capped(lambda m, g: int(99.0 * len(g) / m.num_experts)),
    "length": capped(lambda m, g: int(99.0 * len(g) / len(m.up))),
    "whole": capped(lambda m, g: (g.shape[0] // g.shape[1] + 63) // 64 * 64),
    "several": capped(lambda m, g: g.shape[1] * 9),
    "threshold": lambda m, g: g * (g >= 1e-9 / g.shape[1]),
    "factor": lambda m, g: g + (g - 9).relu() * g.shape[1],
    "logarithm": lambda m, g: g.clamp(max=9 * math.log(m.num_experts)),
    "chosen": lambda m, g: g + 0 * g.topk(g.shape[1] // 2, -1).values.sum(-1, keepdim=True),
}


@pytest.mark.parametrize("name", marked(OF_EXPERTS, "attribute", "whole", "threshold", "chosen"))
def test_numbers_of_experts_are_refused(name: str) -> None:
    model = Mixture(OF_EXPERTS[name]).eval()
    with pytest.raises(UnsupportedError, match=r"test_numbers_used\.py:\d+"):
        sc.plan(model, X, granularity="expert", target={"count": 2}).apply(model)


def load(g: Tensor) -> Tensor:
    return (g > 0).float().sum(0)


BY_TENSORS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "mean load": lambda m, g: g * (load(g) <= 2 * load(g).mean() + 30),
    "share of used ones": lambda m, g: g * torch.where((g.sum(0) > 0).float().mean() < 9, 1.0, 0.5),
    "mean weight": lambda m, g: g * (g.amax(-1, True) - g.mean(-1, True) < 9),
    "spread of weights": lambda m, g: g * (g.std(-1, keepdim=True) < 9),
    "sum of ones": capped(lambda m, g: (99.0 * len(g) / torch.ones_like(g[0]).sum()).clamp(min=3)),
    "uniform": capped(lambda m, g: (99.0 * len(g) * torch.zeros_like(g).softmax(-1)).clamp(min=3)),
    "length of ones": capped(lambda m, g: 99 * torch.linalg.vector_norm(torch.ones_like(g[0]))),
    "form as a tensor": capped(lambda m, g: (99.0 * len(g) / torch.tensor(g.shape)[-1]).clamp(min=3)),
    "trace": capped(lambda m, g: 99.0 * torch.eye(g.shape[-1]).trace()),
    "whole numbers": capped(lambda m, g: 99 * torch.ones_like(g[0], dtype=torch.long).sum()),
    "logarithm of a sum": capped(lambda m, g: 99 * (g[0] * 0).logsumexp(0)),
    "last in an order": capped(lambda m, g: 99.0 * (g.argsort(-1).amax() + 1.0)),
    "a product with ones": capped(lambda m, g: 99 * (torch.ones_like(g) @ g.new_ones(g.shape[1], 1))),
}


@pytest.mark.parametrize("name", marked(BY_TENSORS, "mean load", "uniform", "form as a tensor", "whole numbers"))
def test_tensors_that_count_experts_are_refused(name: str) -> None:
    model = Mixture(BY_TENSORS[name]).eval()
    with pytest.raises(CertificateError, match=r"test_numbers_used\.py:\d+ comes to another number"):
        sc.plan(model, X, granularity="expert", target={"count": 2}).apply(model)


KEEP_THEIR_VALUE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "sum of weights": lambda m, g: g / g.sum(-1, True),
    "largest load": lambda m, g: g * (load(g) <= load(g).amax()),
    "how many are used": lambda m, g: g * ((g > 0).sum(-1, True) < 9),
    "length": lambda m, g: g / g.norm(dim=-1, keepdim=True),
    "an order of tokens": lambda m, g: g * (g.argsort(0).argsort(0) >= 0),
    "positions of experts": lambda m, g: g * (g.argmax(-1, True).float() < 99),
}


@pytest.mark.parametrize(
    "name", marked(KEEP_THEIR_VALUE, "sum of weights", "how many are used", "positions of experts")
)
def test_tensors_that_count_nothing_are_certified(name: str) -> None:
    model = Mixture(KEEP_THEIR_VALUE[name]).eval()
    plan = sc.plan(model, X, granularity="expert", target={"count": 2})
    cut = plan.apply(model)
    (group,) = plan.groups.values()
    model.gate.register_forward_hook(lambda m, a, out: out.index_fill(-1, torch.tensor(group["removed"]), -1e9))
    other = torch.randn(9, 8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(cut(other), model(other), atol=1e-5)


@pytest.mark.parametrize(
    "capacity",
    [
        lambda m, g: max(512, int(2.0 * g.shape[0] / g.shape[1])),
        lambda m, g: 64 * math.ceil(2.0 * g.shape[0] / (64 * m.num_experts)),
        lambda m, g: sorted([512, 2.0 * g.shape[0] / g.shape[1]])[-1],
    ],
)
def test_capacities_that_small_inputs_do_not_show_are_conditions(capacity: Callable[[Any, Tensor], float]) -> None:
    model = Mixture(capped(capacity)).eval()
    plan = sc.plan(model, X, granularity="expert", target={"count": 2})
    plan.apply(model)
    assert any("what it was before the cut" in c.text and "test_numbers_used.py" in c.where for c in plan.conditions)


FOLLOW: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "sizes": lambda m, g: g.reshape(-1).view(-1, m.num_experts),
    "classes": lambda m, g: g * nn.functional.one_hot(g.topk(2, -1).indices, g.shape[1]).sum(1),
    "last": lambda m, g: g + 0 * g.argmax(-1, keepdim=True).clamp(max=g.shape[1] - 1),
    "capacity": capped(lambda m, g: 3),
}


@pytest.mark.parametrize("name", marked(FOLLOW, "classes", "capacity"))
def test_counts_of_experts_follow(name: str) -> None:
    model = Mixture(FOLLOW[name]).eval()
    plan = sc.plan(model, X, granularity="expert", target={"count": 2})
    cut = plan.apply(model)
    assert not any("what it was before the cut" in c.text for c in plan.conditions)
    (group,) = plan.groups.values()
    model.gate.register_forward_hook(lambda m, a, out: out.index_fill(-1, torch.tensor(group["removed"]), -1e9))
    other = torch.randn(9, 8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(cut(other), model(other), atol=1e-5)


def test_a_run_is_told_by_line_and_operator() -> None:
    used = NumbersUsed()
    with used:
        torch.ones(2, 3).mul(4).clamp(max=5.0)
    found = {name: calls[0].numbers for (_, name), calls in used.calls.items()}
    assert found["mul"] == (4,)
    assert found["clamp"] == (5.0,)
    assert found["ones"] == ()
    assert all("test_numbers_used.py" in where for where, _ in used.calls)


LINE = ("net.py:7", "mul")


def runs(before: Used, after: Used) -> tuple[NumbersUsed, NumbersUsed]:
    found = NumbersUsed(), NumbersUsed()
    for run, used in zip(found, (before, after), strict=True):
        run.calls[LINE].append(used)
    return found


def test_more_numbers_than_before_are_other_numbers() -> None:
    before, after = Used((2.0,)), Used((2.0, 2.0))
    with pytest.raises(CertificateError, match="would change") as error:
        require_same(LINE, *runs(before, after), before, after)
    assert "1 numbers become 2" in str(error.value)


def test_a_count_of_experts_follows_among_numbers_of_experts_and_not_as_a_factor_of_data() -> None:
    def found(*, whole: bool) -> list[str]:
        before, after = (Used((count,), pointwise=True, whole=whole) for count in (6, 4))
        return list(same_numbers(*runs(before, after), {6: 4}))

    (said,) = found(whole=True)
    assert "net.py:7" in said
    with pytest.raises(CertificateError, match="would change"):
        found(whole=False)


def results(*given: tuple[Tensor, float]) -> NumbersUsed:
    found = NumbersUsed()
    found.calls[LINE] = [Used((), result=result, size_in=size) for result, size in given]
    return found


INF, ONE, TWO = torch.tensor([1.0, math.inf]), torch.ones(3), torch.full((3,), 2.0)
STAY = torch.tensor([True, False, True])


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ([(ONE, 1.0)], [(ONE * 1.00001, 1.0)], True),
        ([(ONE, 1.0)], [(ONE * 1.1, 1.0)], False),
        ([(INF, 1.0)], [(INF, 1.0)], True),
        ([(INF, 1.0)], [(torch.tensor([1.0, 1.0]), 1.0)], False),
        ([(torch.tensor([1.0, 1.0]), 1.0)], [(INF, 1.0)], False),
        # What is left of a difference of two numbers that are alike is rounding beside these numbers.
        ([(ONE * 1e-7, 1.0)], [(ONE * 3e-7, 1.0)], True),
        ([(ONE * 1e-7, 1e-7)], [(ONE * 3e-7, 1e-7)], False),
        # As many calls as before are compared one by one; of a loop that runs less often any may be meant.
        ([(ONE, 1.0), (TWO, 1.0)], [(TWO, 1.0), (ONE, 1.0)], False),
        ([(ONE, 1.0), (TWO, 1.0)], [(TWO, 1.0)], True),
        ([(ONE, 1.0), (TWO, 1.0)], [(ONE * 3, 1.0)], False),
        # One position for each expert: those that stay.
        ([(torch.tensor([1.0, 2.0, 3.0]), 3.0)], [(torch.tensor([1.0, 3.0]), 3.0)], True),
        ([(torch.tensor([1.0, 2.0, 3.0]), 3.0)], [(torch.tensor([1.0, 2.0]), 3.0)], False),
    ],
)
def test_results_are_held_against_those_of_the_reference(
    before: list[tuple[Tensor, float]], after: list[tuple[Tensor, float]], same: bool
) -> None:
    values = values_of({3: [STAY]})
    if same:
        values.require_same(results(*before), results(*after))
        return
    with pytest.raises(CertificateError, match=r"net\.py:7 comes to another number"):
        values.require_same(results(*before), results(*after))


def test_of_large_results_some_positions_are_kept_and_all_of_experts() -> None:
    values = values_of({32: [torch.arange(32) % 2 == 0]})
    large = torch.rand(32, 1024)
    assert large.numel() > FEW
    kept = values.part("mul", large, [large])
    assert kept is not None
    assert torch.equal(kept, large[:, ::64])
    small = torch.rand(5, 7)
    assert torch.equal(values.part("mul", small, [small]), small)
    assert values.part("empty", small, []) is None
    assert values.part("argsort", torch.arange(3), [small]) is None, "positions are no results"
