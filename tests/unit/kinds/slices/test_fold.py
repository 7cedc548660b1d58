"""Scales by a width stay what they were: by a factor in the weights, or the cut is refused."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import secateur as sc
from secateur.errors import CertificateError, PlanMismatchError
from secateur.kinds.slices.fold import Scale, rescale, same_scales


class Attention(nn.Module):
    """Two heads; the subclasses spell the scale."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = 2
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def scaled(self, q: Tensor, k: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.out((self.scaled(q, k).softmax(-1) @ v).transpose(1, 2).flatten(2))


class RootAfter(Attention):
    def scaled(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT / math.sqrt(q.size(-1))


class RootBefore(Attention):
    def scaled(self, q: Tensor, k: Tensor) -> Tensor:
        return (q * q.shape[-1] ** -0.5) @ k.mT


class ByWidth(Attention):
    def scaled(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT / q.shape[-1]


class Fixed(Attention):
    def scaled(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT * 0.35


class Fused(Attention):
    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MaskOfItsOwn(Attention):
    """A mask of single precision is made in the forward: beside products in double it would not run."""

    def scaled(self, q: Tensor, k: Tensor) -> Tensor:
        n = q.shape[-2]
        mask = torch.full((n, n), -math.inf).triu(1)
        scores = torch.baddbmm(mask, q.flatten(0, 1) / math.sqrt(q.shape[-1]), k.flatten(0, 1).mT)
        return scores.view(*q.shape[:2], n, n)


class NormedQueries(Attention):
    """What stands before a norm has no say in what comes after it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        q = self.norm(q)
        return self.out(((q @ k.mT / math.sqrt(q.size(-1))).softmax(-1) @ v).transpose(1, 2).flatten(2))


X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))


def zeroed(model: nn.Module, cuts: dict[str, dict[int, Tensor]]) -> nn.Module:
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name, dims in cuts.items():
            for d, kept in dims.items():
                tensor = masked.get_parameter(name)
                gone = torch.tensor([i for i in range(tensor.shape[d]) if i not in kept.tolist()])
                tensor.index_fill_(d, gone, 0)
    return masked


@pytest.mark.parametrize("kind", [RootAfter, RootBefore, ByWidth, Fixed, Fused, MaskOfItsOwn])
def test_the_cut_model_is_the_masked_one_exactly(kind: type[nn.Module]) -> None:
    model = kind()
    plan = sc.plan(model, X, granularity="head_dim", target={"sparsity": 0.4}, criterion="random", scope="local")
    cut = plan.apply(model)
    assert cut.q.out_features < 16
    other = 3 * torch.randn(3, 9, 16)
    with torch.no_grad():
        for x in (X, other):
            torch.testing.assert_close(cut(x), zeroed(model, plan.cuts)(x), rtol=1e-4, atol=1e-6)
    assert bool(plan.scales) is (kind is not Fixed)


def test_a_norm_between_takes_the_factor_itself() -> None:
    model = NormedQueries()
    plan = sc.plan(model, X, granularity="head_dim", target={"sparsity": 0.4}, criterion="random", scope="local")
    plan.apply(model)
    assert {scale.tensor.split(".")[0] for scale in plan.scales} <= {"norm", "k"}


@pytest.mark.parametrize("kind", [RootAfter, Fused])
def test_factors_are_saved_replayed_and_composed(kind: type[nn.Module], tmp_path) -> None:
    model = kind()
    plan = sc.plan(model, X, granularity="head_dim", target={"count": 2}, criterion="random")
    cut = plan.apply(model)
    plan.save(tmp_path / "plan.json")
    again = sc.Plan.load(tmp_path / "plan.json")
    assert again.scales == plan.scales
    assert torch.equal(again.apply(copy.deepcopy(model))(X), cut(X))
    inplace = copy.deepcopy(model)
    plan.replay(inplace)
    assert torch.equal(inplace(X), cut(X))
    second = sc.plan(cut, X, granularity="head_dim", target={"count": 2}, criterion="random")
    twice = second.apply(cut)
    whole = plan.then(second, model)
    torch.testing.assert_close(whole.apply(model)(X), twice(X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_factors_of_two_steps_are_proved_anew(seed: int) -> None:
    """Two factors round twice and one rounds once: the slices are still those of the plan, bit for bit."""
    model, plan = RootAfter(), None
    cut: nn.Module = model
    for _ in range(2):
        step = sc.plan(cut, X, granularity="head_dim", target={"count": 2}, criterion="random")
        plan, cut = step if plan is None else plan.then(step, model), step.apply(cut)
    again = sc.Plan.from_data(json.loads(plan.to_json()))
    torch.manual_seed(seed)
    for parameter in model.parameters():  # of the weights of one seed few would do
        nn.init.normal_(parameter, std=0.3)
    whole = again.apply(model, example=X)
    assert again.certificate is not None
    torch.testing.assert_close(whole(2 * X), zeroed(model, plan.cuts)(2 * X), rtol=1e-4, atol=1e-6)


def test_a_factor_that_was_changed_in_the_file_is_refused() -> None:
    model = RootAfter()
    plan = sc.plan(model, X, granularity="head_dim", target={"count": 2}, criterion="random")
    data = json.loads(plan.to_json())
    data["scales"][0]["factor"] *= 1.5
    read = sc.Plan.from_data({**data, "certificate": None, "decision": None})
    with pytest.raises(PlanMismatchError, match="factor"):
        read.apply(model, example=X)


class ScaledFeatures(nn.Module):
    """No product of two activations stands behind the scale, so there is no place for a factor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.b(h / math.sqrt(h.shape[-1]))


def test_a_scale_that_cannot_be_kept_is_refused_or_said() -> None:
    model = ScaledFeatures()
    with pytest.raises(CertificateError, match=r"test_fold\.py:\d+ scales by the width") as refused:
        sc.plan(model, X, granularity="neuron", target={"sparsity": 0.5}).apply(model)
    assert 'scales="follow"' in str(refused.value)
    plan = sc.plan(model, X, granularity="neuron", target={"sparsity": 0.5}, scales="follow")
    plan.apply(model)
    assert any(
        "the function changes with the cut" in note and "test_fold.py" in note for note in plan.certificate.notes
    )
    assert "the function changes with the cut" in plan.explain()


def test_a_norm_by_hand_divides_by_what_it_sums() -> None:
    class Normed(ScaledFeatures):
        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            mean = h.sum(-1, keepdim=True) / h.shape[-1]
            return self.b((h - mean) / ((h - mean).pow(2).sum(-1, keepdim=True) / h.shape[-1] + 1e-5).sqrt())

    model = Normed()
    plan = sc.plan(model, X, granularity="neuron", target={"sparsity": 0.5})
    cut = plan.apply(model)
    kept = plan.cuts["a.weight"][0]
    with torch.no_grad():
        h = functional.linear(X, model.a.weight[kept], model.a.bias[kept])
        wanted = functional.linear(functional.layer_norm(h, (len(kept),)), model.b.weight[:, kept], model.b.bias)
        torch.testing.assert_close(cut(X), wanted, rtol=1e-4, atol=1e-5)
    assert any("divides by the number of what it sums" in note for note in plan.certificate.notes)


KEPT = torch.tensor([0, 1, 4, 6, 7])
ALIKE: list[tuple[list[Scale], list[Scale], bool]] = [
    ([], [], True),
    ([Scale("w", 0, 0, 8, 6.0)], [Scale("w", 0, 0, 8, 2.0), Scale("w", 0, 0, 8, 3.0)], True),
    ([Scale("w", 0, 0, 8, 2.0)], [Scale("w", 0, 0, 4, 2.0), Scale("w", 0, 4, 8, 2.0)], True),
    ([Scale("w", 0, 2, 5, 2.0)], [Scale("w", 0, 4, 6, 2.0)], True),  # the same positions are left of both
    ([Scale("w", 0, 2, 4, 2.0)], [], True),  # all of them are gone
    ([Scale("w", 0, 0, 8, 6.0)], [Scale("w", 0, 0, 8, 2.0)], False),
    ([Scale("w", 0, 0, 8, 2.0)], [Scale("w", 0, 0, 5, 2.0)], False),
    ([Scale("w", 0, 0, 8, 2.0)], [Scale("w", 1, 0, 8, 2.0)], False),
    ([Scale("w", 0, 0, 8, 2.0)], [Scale("v", 0, 0, 8, 2.0)], False),
]


@pytest.mark.parametrize(("mine", "theirs", "alike"), ALIKE)
def test_factors_are_alike_where_they_do_the_same_to_what_is_left(
    mine: list[Scale], theirs: list[Scale], alike: bool
) -> None:
    cuts = {"w": {0: KEPT}}
    assert same_scales(mine, theirs, cuts) is alike
    assert same_scales(theirs, mine, cuts) is alike
    tensors = [{"w": torch.ones(5, 9), "v": torch.ones(9)} for _ in range(2)]
    for tensor, scales in zip(tensors, (mine, theirs), strict=True):
        rescale(tensor, scales, cuts)
    assert all(torch.allclose(tensors[0][name], tensors[1][name]) for name in "wv") is alike
