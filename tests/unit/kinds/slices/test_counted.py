"""Sums that tell how many units there are, whatever the data: said or refused, also where the example hides them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.kinds.slices.counted import Counted
from secateur.kinds.slices.missing import Missing

SIZE, GONE = 12, [0, 3, 4, 8, 9]
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Its outputs stay far below fifty, so what the factor is does not show."""

    def __init__(self, factor: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.factor = nn.Linear(6, SIZE), nn.Linear(SIZE, 3), factor

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        out: Tensor = self.down(h)
        return out + (out - 50).relu() * self.factor(h)


class Heads(nn.Module):
    """Four heads; each row of the attention of each adds up to one."""

    def __init__(self, factor: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.qkv, self.out, self.factor = 4, nn.Linear(6, 36), nn.Linear(12, 3), factor

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.view(*t.shape[:2], self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        out: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return out + (out - 50).relu() * self.factor(weights)


COUNTS: dict[str, Callable[[Tensor], Tensor]] = {
    "equal to itself": lambda h: (h == h).sum(-1, True),
    "as numbers": lambda h: (h == h).float().sum(-1, True),
    "not negative": lambda h: (h >= 0).long().sum(-1, True),
    "finite": lambda h: h.isfinite().sum(-1, True),
    "no NaN": lambda h: (~h.isnan()).sum(-1, True),
    "turned": lambda h: (h >= 0).t().sum(0)[:, None],
    "another form": lambda h: (h == h)[:, None].flatten(1).sum(-1, True),
    "times zero": lambda h: (h * 0 + 1).sum(-1, True),
    "to the power of zero": lambda h: (h**0).sum(-1, True),
    "length of ones": lambda h: (h * 0 + 1).norm(dim=-1, keepdim=True),
    "length of signs": lambda h: ((h * 0 + 1) * (2 * (h > 0).float() - 1)).norm(dim=-1, keepdim=True),
    "chosen by truth": lambda h: torch.where(h > 0, 1.0, -1.0).norm(dim=-1, keepdim=True),
    "chosen whole numbers": lambda h: torch.where(h >= 0, 2, 3).sum(-1, True),
    "filled by truth": lambda h: (h * 0 + 1).masked_fill(~(h > 0), -1.0).norm(dim=-1, keepdim=True),
    "signs": lambda h: (h + 1).sign().sum(-1, True),
    "steps": lambda h: torch.heaviside(h + 1, h.new_ones(())).sum(-1, True),
    "bits of signs": lambda h: (~(h + 1).signbit()).sum(-1, True),
    "not zero": lambda h: (h * 0 + 1).count_nonzero(-1)[:, None],
    "a product with ones": lambda h: (h * 0 + 1) @ h.new_ones(h.shape[-1], 1),
    "a product of two": lambda h: ((h * 0 + 1) @ (h * 0 + 1).t())[:, :1],
    "a product of numbers": lambda h: (h * 0 + 1.1).prod(-1, True),
    "logarithm of a sum": lambda h: (h * 0).logsumexp(-1, True),
    "shared out": lambda h: (h * 0).softmax(-1)[:, :1],
}


@pytest.mark.parametrize("name", COUNTS)
def test_a_count_of_units_is_refused_where_it_stands(name: str) -> None:
    model = Net(COUNTS[name])
    with pytest.raises(sc.SecateurError, match=r"test_counted\.py:\d+|locked"):
        sc.plan(model, X, granularity="neuron", remove={"up": GONE}).apply(model)


@pytest.mark.parametrize(
    "factor",
    [lambda a: a.sum((1, 3))[..., None], lambda a: a.sum((-1, 1))[..., None], lambda a: a.sum(-1).sum(1)[..., None]],
)
def test_heads_that_are_counted_by_their_attention_are_refused(factor: Callable[[Tensor], Tensor]) -> None:
    model = Heads(factor)
    with pytest.raises(sc.SecateurError, match="counts the units"):
        sc.plan(model, torch.randn(2, 5, 6), granularity="head", target={"sparsity": 0.5}).apply(model)


def test_a_mean_over_heads_counts_nothing() -> None:
    model = Heads(lambda a: a.mean(1).sum(-1, True))
    sc.plan(model, torch.randn(2, 5, 6), granularity="head", target={"sparsity": 0.5}).apply(model)


@pytest.mark.parametrize(
    ("factor", "said"),
    [
        (lambda h: h.sum(-1, True) / (h == h).sum(-1, True), "counts the units that are cut (12 become 7)"),
        (lambda h: (h > 0).sum(-1, True), "sums up what is true of units"),
        (lambda h: h.abs().sum(-1, True), ""),
        (lambda h: h @ h.t()[:, :1], ""),
        (lambda h: ((h * 0 + 1) @ h.t())[:, :1], ""),
        (lambda h: (h * 0 + 1).prod(-1, True), "sums up what is true of units"),
    ],
)
def test_a_mean_and_a_number_of_active_units_are_said_and_sums_are_sums(
    factor: Callable[[Tensor], Tensor], said: str
) -> None:
    model = Net(factor)
    plan = sc.plan(model, X, granularity="neuron", remove={"up": GONE})
    plan.apply(model)
    assert plan.certificate is not None
    notes = [note for note in plan.certificate.notes if "test_counted.py" in note]
    assert [said in note for note in notes] == [True] * len(notes)
    assert bool(notes) == bool(said)


def test_one_unit_that_is_left_is_like_itself_and_counts_nothing() -> None:
    model = Net(lambda h: h @ h.t()[:, :1] + h.sum(-1, True))
    plan = sc.plan(model, X, granularity="neuron", remove={"up": list(range(1, SIZE))})
    assert plan.apply(model).up.out_features == 1
    counted = Counted()
    counted.multiplied(torch.ones(3, 1), torch.ones(1, 3), 1, 0, SIZE)
    assert counted.found({}, excused=False) == []


def test_a_scale_that_follows_by_consent_says_what_is_counted() -> None:
    model = Net(COUNTS["equal to itself"])
    plan = sc.plan(model, X, granularity="neuron", remove={"up": GONE}, scales="follow")
    plan.apply(model)
    assert plan.certificate is not None
    assert any("the function changes" in n and "counts the units" in n for n in plan.certificate.notes)


def test_one_input_on_which_units_differ_says_that_nothing_is_counted() -> None:
    missing = Missing()
    for values in (torch.ones(2, 6), torch.randn(2, 6, generator=torch.Generator().manual_seed(0))):
        with missing:
            values.index_fill(1, torch.tensor([1, 4]), float("nan")).sum(1)
        counted = missing.counted.found({}, excused=False)
        assert bool(counted) == bool((values == 1).all())
