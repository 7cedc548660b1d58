"""Weights computed from weights: whatever operators make them, the cut keeps their value or is refused.

The truth is the original whose hidden units are set to zero where they are given: its weights stay whole.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.kinds.slices.ablation import ablated

GONE = [1, 2, 5]
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
KEPT = torch.tensor([0, 3, 4, 6, 7])
Forward = Callable[["Parts", Tensor], Tensor]
Make = Callable[["Parts", Tensor, Tensor], Tensor]


class Parts(nn.Module):
    """Hidden units `a`, then whatever a case does with them and with weights."""

    def __init__(self, use: Forward, *, masked: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a, self.hyper = nn.Linear(4, 8), nn.Linear(3, 8)
        sizes = {"w": (6, 8), "u": (6, 6), "v": (8,), "z": (3,), "low": (6, 2), "rank": (2, 8), "g": (6,)}
        for name, size in sizes.items():
            setattr(self, name, nn.Parameter(torch.randn(size, generator=generator)))
        self.held = torch.zeros(())  # a constant that is no buffer
        for parameter in (*self.a.parameters(), *self.hyper.parameters()):
            nn.init.normal_(parameter, generator=generator)
        self.o, self.use, self.masked = nn.Linear(6, 2), use, masked

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.o(self.use(self, h.index_fill(1, torch.tensor(GONE), 0) if self.masked else h))


PRODUCTS: dict[str, Make] = {
    "itself": lambda m, h, w: w,
    "new zeros": lambda m, h, w: w + h.new_zeros(()),
    "ones like": lambda m, h, w: w * torch.ones_like(h.sum()),
    "a tensor of a number": lambda m, h, w: w + torch.tensor(0.0, dtype=w.dtype),
    "a constant of the module": lambda m, h, w: w + m.held,
    "matmul": lambda m, h, w: m.u @ w,
    "einsum": lambda m, h, w: torch.einsum("ij,jk->ik", m.u, w),
    "eye": lambda m, h, w: torch.eye(6, dtype=w.dtype) @ w,
    "diag": lambda m, h, w: torch.diag(m.g) @ w,
    "bmm": lambda m, h, w: torch.bmm(m.u[None], w[None])[0],
    "addmm": lambda m, h, w: torch.addmm(w, m.u, w),
    "low rank": lambda m, h, w: w + 2 * m.low @ m.rank,
    "convolution": lambda m, h, w: F.conv1d(w[:, None], torch.ones(1, 1, 1, dtype=w.dtype))[:, 0],
    "convolution over rows": lambda m, h, w: F.conv1d(w[None], m.u[:, :, None])[0],
    "twice": lambda m, h, w: m.u @ (torch.diag(m.g) @ w),
}
WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda w: w,
    "tanh": torch.tanh,
    "norm": lambda w: w / w.norm(dim=1, keepdim=True),
    "norm of all": lambda w: w / w.norm(),
    "mean": lambda w: w - w.mean(1, keepdim=True),
    "largest": lambda w: w / w.abs().amax(1, keepdim=True),
    "sum of sizes": lambda w: w / w.abs().sum(1, keepdim=True),
    "deviation": lambda w: w / w.std(1, keepdim=True),
    "layer norm": lambda w: F.layer_norm(w, (w.shape[1],)),
    "normalize": lambda w: F.normalize(w, dim=1),
    "orthogonal": lambda w: 1.5 * w - 0.5 * w @ w.t() @ w,
    "products of rows": lambda w: w * torch.einsum("oi,oi->o", w, w).rsqrt()[:, None],
    "power iteration": lambda w: w / (F.normalize(w @ F.normalize(w.t() @ w[:, 0], dim=0), dim=0) @ w).norm(),
    "its own softmax": lambda w: (w @ w.t()).softmax(-1) @ w,
    "sums by ones": lambda w: w / (w.square() @ w.new_ones(w.shape[1], 1)).sqrt(),
}
# Element by element or row by row: nothing is computed of several inputs.
SAME = {"nothing", "tanh"}


def _pairs() -> list[object]:
    """Every product in two ways and every way after one product at once; the others are slow."""
    pairs = [(product, way) for product in PRODUCTS for way in WAYS]
    quick = [product == "matmul" or way in ("nothing", "norm") for product, way in pairs]
    return [pytest.param(*p, marks=[] if q else pytest.mark.slow) for p, q in zip(pairs, quick, strict=True)]


@pytest.mark.parametrize(("product", "way"), _pairs())
def test_the_ablated_original_objects_to_every_weight_with_another_value(product: str, way: str) -> None:
    model = Parts(lambda m, h: F.linear(h, WAYS[way](PRODUCTS[product](m, h, m.w)))).double().eval()
    h = torch.rand(3, 8, dtype=torch.float64)
    value, rest = (WAYS[way](PRODUCTS[product](m, h, m.w)) for m in (model, _cut(model)))
    assert torch.allclose(value[:, KEPT], rest) == (way in SAME)
    reference = ablated(model, {"a.weight": {0: KEPT}, "a.bias": {0: KEPT}, "w": {1: KEPT}, "rank": {1: KEPT}})
    with torch.no_grad(), reference.around():
        reference.model(X)
    assert ("computed anew" in reference.objection()) == (way not in SAME)


def _cut(model: Parts) -> Parts:
    small = Parts(model.use).double()
    for name in ("w", "rank"):
        setattr(small, name, nn.Parameter(getattr(model, name)[:, KEPT]))
    return small


REFUSED: dict[str, Forward] = {
    "a norm of merged factors": lambda m, h: F.linear(h, F.normalize(m.w + m.low @ m.rank, dim=1)),
    "a sum as an offset": lambda m, h: F.linear(h, m.w) - m.w @ h.new_ones(8),
    "softmax of generated gates": lambda m, h: F.linear(h * m.hyper(m.z).softmax(0), m.w),
    "generated gates over their norm": lambda m, h: F.linear(h * F.normalize(m.hyper(m.z), dim=0), m.w),
    "gates of a constant": lambda m, h: F.linear(h * F.normalize(m.hyper(h.new_ones(3)), dim=0), m.w),
    "products of rows beside": lambda m, h: F.linear(h, m.w) * (m.w @ m.w.t()).diagonal().rsqrt(),
    "a scale of a product": lambda m, h: F.linear(h, m.w) / (m.w @ m.w.t()).trace().sqrt(),
    "products of rows added": lambda m, h: F.linear(h, m.w) + (m.w @ m.w.t()).sum(1),
    "gates of a token by the layer itself": lambda m, h: F.linear(h, m.w) * F.linear(m.v[None], m.w).sigmoid(),
}
RIGHT: dict[str, Forward] = {
    "merged factors": lambda m, h: F.linear(h, m.w + m.low @ m.rank),
    "products of weights": lambda m, h: F.linear(h, m.u @ m.w),
    "generated gates": lambda m, h: F.linear(h * m.hyper(m.z).sigmoid(), m.w),
    "gates through a hidden layer": lambda m, h: F.linear(h, m.w) * (m.hyper(m.z).relu() @ m.z.new_ones(8, 1)).tanh(),
    "a norm of other dimensions": lambda m, h: F.linear(h, F.normalize(m.u @ m.w, dim=0)),
    "softmax of another product": lambda m, h: F.linear(h, (m.u @ m.u.t()).softmax(-1) @ m.w),
}
QUICK = {"a norm of merged factors", "softmax of generated gates", "merged factors", "generated gates"}


def _tried(use: Forward) -> str:
    """What becomes of the cut: "refused", "right" or "wrong"."""
    model = Parts(use).double().eval()
    truth = Parts(use, masked=True).double().eval()
    truth.load_state_dict(model.state_dict())
    try:
        cut = sc.plan(model, X, remove={"a": GONE}).apply(model)
    except sc.SecateurError:
        return "refused"
    return "right" if torch.allclose(cut(X), truth(X), atol=1e-9) else "wrong"


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in REFUSED])
def test_values_of_weights_that_would_change_are_refused(name: str) -> None:
    assert _tried(REFUSED[name]) == "refused"


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in RIGHT])
def test_values_of_weights_that_stay_are_cut(name: str) -> None:
    assert _tried(RIGHT[name]) == "right"


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("product", PRODUCTS)
def test_no_weight_computed_anew_is_cut_wrongly(product: str, way: str) -> None:
    found = _tried(lambda m, h: F.linear(h, WAYS[way](PRODUCTS[product](m, h, m.w))))
    assert found != "wrong"
    assert found == "refused" or way in SAME


def test_a_weight_that_only_code_of_torch_uses_is_named_without_a_line() -> None:
    """A Sequential has no line of the user's: "used at  is" told nobody where to look."""
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 6))
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), layer, nn.ReLU(), nn.Linear(6, 2)).eval()
    with pytest.raises(sc.SecateurError, match="the weight used by a layer of torch is computed anew"):
        sc.plan(model, torch.randn(3, 5), remove={"0": [1, 4]})


class Branches(nn.Module):
    """A width that a normed weight sums over, beside one that it does not."""

    def __init__(self, norm: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(5, 8), norm(nn.Linear(8, 6)), nn.Linear(6, 6)
        self.wide, self.narrow = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.out(self.b(self.a(x).relu()).relu())
        return h + self.narrow(self.wide(h).relu())


@pytest.mark.parametrize(("norm", "stay"), [
    (nn.utils.parametrizations.weight_norm, {"a"}),
    (partial(nn.utils.parametrizations.weight_norm, dim=1), {"b"}),
    (nn.utils.parametrizations.spectral_norm, {"a", "b"}),
    (lambda layer: layer, set()),
])  # fmt: skip
def test_only_groups_that_a_computed_weight_is_made_of_stay_whole(
    norm: Callable[[nn.Module], nn.Module], stay: set[str]
) -> None:
    torch.manual_seed(0)
    model, x = Branches(norm).eval(), torch.randn(3, 5)
    reason = "is computed anew from what is left"
    seen = {group.name for group in sc.inspect(model, x).locked if reason in group.locks[0].reason}
    assert {name.removesuffix("/conv_group") for name in seen} == stay
    plan = sc.plan(model, x, target={"sparsity": 0.5}, scope="local")
    assert plan.groups.keys() == {"a", "b", "wide"} - stay
    said = [condition.text for condition in plan.conditions if reason in condition.text]
    assert len(said) == bool(stay)
    assert all(repr(name) in said[0] for name in stay)
    cut = plan.apply(model)
    masked = copy.deepcopy(model)
    for name, following in (("a", "b"), ("b", "out"), ("wide", "narrow")):
        gone = torch.tensor(plan.groups[name]["removed"] if name in plan.groups else [], dtype=torch.long)
        masked.get_submodule(following).register_forward_pre_hook(
            lambda _, given, gone=gone: (given[0].index_fill(-1, gone, 0),)
        )
    torch.testing.assert_close(cut(x), masked(x))


@pytest.mark.parametrize("name", [n for n in REFUSED if n != "a sum as an offset"])  # has a size of its own in the code
def test_every_weight_that_would_change_locks_its_group(name: str) -> None:
    model = Parts(REFUSED[name]).double().eval()
    reasons = {group.name: group.locks[0].reason for group in sc.inspect(model, X).locked}
    assert "is computed anew from what is left" in reasons["a"]
