"""A width that becomes a value is a mean over what is kept, or locked or refused: also where the example hides it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.errors import UnsupportedError

Mid = Callable[[Tensor, Tensor, nn.Module], Tensor]
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A hidden layer, the head behind it, and something done to both."""

    def __init__(self, mid: Mid) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.mid, self.dim = nn.Linear(8, 16), nn.Linear(16, 4), mid, 16

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.mid(h, self.b(h), self)


def total(h: Tensor) -> Tensor:
    return h.sum(-1, keepdim=True)


HIDDEN: dict[str, Mid] = {
    "clamp": lambda h, y, m: y * (total(h) - 1.5 * h.shape[-1]).clamp(min=1),
    "bound": lambda h, y, m: y + total(h).clamp(max=100.0 * h.size(-1)),
    "relu": lambda h, y, m: y + (total(h) - 9 * h.shape[-1] * math.log(3)).relu(),
    "greater": lambda h, y, m: torch.cat([y, (total(h) > 90.0 * h.shape[-1]).float()], 1),
    "reflected": lambda h, y, m: torch.cat([y, (90.0 * h.shape[-1] < total(h)).float()], 1),
    "where": lambda h, y, m: torch.where(total(h) > 90 * h.shape[-1], 2 * y, y),
    "argmax": lambda h, y, m: (y + (torch.arange(4.0) == 3) * (h.shape[-1] ** 0.5 - 90)).argmax(1),
    "logarithm": lambda h, y, m: y + (total(h) - 90 * math.log(h.shape[-1])).relu(),
    "tensor": lambda h, y, m: y + (total(h) - torch.tensor(9.0 * h.shape[-1])).relu(),
    "fill": lambda h, y, m: y + (total(h) - torch.full((1,), 9.0 * h.shape[-1])).relu(),
    "count": lambda h, y, m: y + (total(h) - 9.0 * h.numel() / len(h)).relu(),
    "weight": lambda h, y, m: y + (total(h) - 9.0 * m.a.weight.size(0)).relu(),
    "times": lambda h, y, m: y + (total(h) * h.shape[-1] - 9e9).relu(),
    "root": lambda h, y, m: y + (y / h.shape[-1] ** 0.5 - 90).relu(),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_what_the_example_hides_is_locked_or_refused(name: str) -> None:
    model = Net(HIDDEN[name]).eval()
    with pytest.raises(UnsupportedError, match=r"test_values\.py:\d+"):
        sc.plan(model, X, remove={"a": [1, 4, 9]}).apply(model)


MEANS: dict[str, Mid] = {
    "mean": lambda h, y, m: y + total(h) / h.shape[-1],
    "before": lambda h, y, m: y + total(h / h.shape[-1]),
    "reciprocal": lambda h, y, m: y + total(h) * (1 / h.shape[-1]),
    "root": lambda h, y, m: y + (total(h.square()) / h.shape[-1] + 1e-3).sqrt(),
    "norm": lambda h, y, m: y + h.norm(dim=-1, keepdim=True) / math.sqrt(h.shape[-1]),
    "variance": lambda h, y, m: y + (total(h.square()) - total(h) ** 2 / h.shape[-1]) / (h.shape[-1] - 1),
    "hidden": lambda h, y, m: y * (total(h) / h.shape[-1]).clamp(min=90),
}


@pytest.mark.parametrize("name", MEANS)
def test_means_over_what_is_kept_are_said(name: str) -> None:
    model = Net(MEANS[name]).eval()
    plan = sc.plan(model, X, remove={"a": [1, 4, 9]})
    cut = plan.apply(model)
    kept = [i for i in range(16) if i not in (1, 4, 9)]
    h = model.a(X).relu()
    wanted = MEANS[name](h[:, kept], model.b(h.index_fill(1, torch.tensor([1, 4, 9]), 0)), model)
    assert torch.allclose(cut(X), wanted, atol=1e-5)
    assert any("divides by the number of what it sums" in note for note in plan.certificate.notes)


ANEW: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda p: p - p.mean(),
    "norm": lambda p: p / p.norm(),
    "softmax": lambda p: p.softmax(0),
    "cumulated": lambda p: p.cumsum(0),
}


@pytest.mark.parametrize("place", ["bias", "added", "gate", "affine"])
@pytest.mark.parametrize("name", ANEW)
def test_parameters_computed_anew_are_refused(name: str, place: str) -> None:
    def forward(h: Tensor, y: Tensor, m: nn.Module) -> Tensor:
        p = ANEW[name](m.a.bias)
        if place == "bias":
            return m.b(nn.functional.linear(X[: len(h)], m.a.weight, p).relu())
        if place == "affine":
            return m.b(nn.functional.layer_norm(h, h.shape[-1:], p, p))
        return m.b(h + p if place == "added" else h * p)

    model = Net(forward).eval()
    with pytest.raises(UnsupportedError):
        sc.plan(model, X, remove={"a": [1, 4, 9]}).apply(model)


def marked(cases: Iterable[str], *fast: str) -> list[object]:
    """All cases, of which only some are fast."""
    return [pytest.param(name, marks=() if name in fast else (pytest.mark.slow,)) for name in cases]


NUMBERS: dict[str, Callable[[nn.Linear], float]] = {
    "float": lambda a: float(a.weight.detach().abs().sum()),
    "item": lambda a: a.weight.norm().item(),
    "list": lambda a: sum(a.weight.abs().sum(0).tolist()),
    "array": lambda a: float(a.weight.detach().abs().sum().numpy()),
    "text": lambda a: float(f"{a.weight.abs().sum():.3f}"),
    "index": lambda a: range(99)[a.weight.count_nonzero() // 9],
    "bool": lambda a: 1.0 + bool(a.weight.abs().sum() > 1),
    "equal": lambda a: 1.0 + torch.equal(a.weight.sum(0), a.weight.sum(0)),
    "argument": lambda a: float(torch.add(torch.ones(()), 1.0, alpha=a.bias.abs().sum())),
}


@pytest.mark.parametrize("name", marked(NUMBERS, "float", "array", "bool", "argument"))
def test_numbers_made_of_weights_lock_the_weights(name: str) -> None:
    model = Net(lambda h, y, m: y + (y - 90).relu() * NUMBERS[name](m.a)).eval()
    with pytest.raises(UnsupportedError, match=r"leave the graph here as .*test_values\.py:\d+"):
        sc.plan(model, X, target={"sparsity": 0.4})


def test_numbers_of_other_weights_lock_nothing_else() -> None:
    model = Net(lambda h, y, m: y * m.b.bias.exp().mean().item()).eval()
    assert sc.plan(model, X, remove={"a": [1, 4, 9]}).apply(model).a.out_features == 13


COUNTED: dict[str, Callable[[Tensor], Tensor]] = {
    "ones": lambda h: torch.ones_like(h).sum(-1, keepdim=True),
    "positions": lambda h: torch.arange(h.shape[-1]).max(),
    "diagonal": lambda h: torch.eye(h.shape[-1]).trace(),
    "interval": lambda h: torch.linspace(0, h.shape[-1], 2)[1],
    "expanded": lambda h: torch.ones(1).expand(h.shape[-1]).sum(),
    "product": lambda h: torch.ones_like(h) @ torch.ones(h.shape[-1], 1),
    "shares": lambda h: torch.zeros_like(h).softmax(-1).amax(-1, keepdim=True),
}


@pytest.mark.parametrize("name", marked(COUNTED, "ones", "positions", "shares"))
def test_widths_that_are_counted_are_widths(name: str) -> None:
    model = Net(lambda h, y, m: y + (y - 90).relu() * COUNTED[name](h)).eval()
    with pytest.raises(UnsupportedError, match=r"test_values\.py:\d+"):
        sc.plan(model, X, remove={"a": [1, 4, 9]}).apply(model)


def test_sums_of_weights_are_penalties_beside_data_and_offsets_in_them() -> None:
    beside = Net(lambda h, y, m: (y, y.square().mean() + 0.1 * m.a.weight.square().sum())).eval()  # type: ignore[arg-type,return-value]
    cut = sc.plan(beside, X, remove={"a": [1, 4, 9]}).apply(beside)
    kept = [i for i in range(16) if i not in (1, 4, 9)]
    y = beside.b(beside.a(X).relu().index_fill(1, torch.tensor([1, 4, 9]), 0))
    assert torch.allclose(cut(X)[1], y.square().mean() + 0.1 * beside.a.weight[kept].square().sum(), atol=1e-5)
    within = Net(lambda h, y, m: y + (y - 90 - m.a.bias.sum()).relu()).eval()
    with pytest.raises(UnsupportedError, match="computed anew"):
        sc.plan(within, X, remove={"a": [1, 4, 9]}).apply(within)
