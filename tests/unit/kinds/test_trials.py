"""Trials: a wrong cut is refused by the second proof alone, wherever it shows; what cannot be shown is said."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.errors import CertificateError, SecateurError, UnsupportedError
from secateur.kinds.reference import Tried
from secateur.kinds.slices.ablation import ablated
from secateur.kinds.trials import tried


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 1.5)
        model[1].bias.uniform_(-1, 1)
    return model


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def second(model: nn.Module, cut: nn.Module, cuts: object, x: object = X, **options: object) -> Tried:
    return tried([lambda m: ablated(m, cuts)], model, cut, x, **options)


def test_a_right_cut_holds_on_other_inputs_and_in_training() -> None:
    model = net()
    plan = sc.plan(model, X, target={"sparsity": 0.4}, granularity="neuron")
    cut = plan.apply(model)
    found = second(model, cut, plan.cuts)
    assert [trial.input for trial in found.trials] == [
        "the example",
        "other values, batch 5 for 4",
        "other values, batch 5 for 4, in training mode",
    ]
    assert found.error < 1e-5
    assert plan.certificate.trials == tuple(found.trials)


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias", "5.weight"])
def test_any_changed_slice_is_seen(name: str) -> None:
    model = net()
    plan = sc.plan(model, X, target={"sparsity": 0.4}, granularity="neuron")
    cut = plan.apply(model)
    with torch.no_grad():
        tensor = cut.get_parameter(name)
        tensor.copy_(tensor.roll(1, 0))
    with pytest.raises(CertificateError, match="without what is removed"):
        second(model, cut, plan.cuts)


@pytest.mark.parametrize("name", ["1.weight", "3.weight"])
def test_units_that_do_not_belong_together_are_seen(name: str) -> None:
    """Other units of the same number go from one tensor: the sizes agree, so the cut model runs."""
    model = net()
    plan = sc.plan(model, X, target={"count": 4}, granularity="neuron", scope="local")
    cuts = {key: dict(dims) for key, dims in plan.cuts.items()}
    d = max(cuts[name])
    size = model.get_parameter(name).shape[d]
    cuts[name][d] = (cuts[name][d] + 1) % size
    cuts[name][d] = cuts[name][d].sort().values
    assert not torch.equal(cuts[name][d], plan.cuts[name][d])
    cut = copy.deepcopy(plan.apply(model))
    with torch.no_grad():
        whole = model.get_parameter(name)
        for dim, kept in cuts[name].items():
            whole = whole.index_select(dim, kept)
        cut.get_parameter(name).copy_(whole)
    with pytest.raises(CertificateError):
        second(model, cut, cuts)


class OnlyLong(nn.Module):
    """Beyond eight steps another weight is used."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.far = nn.Linear(6, 10), nn.Linear(10, 3), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        return self.down(h) if x.shape[1] <= 8 else self.far(h)


class OnlyTraining(OnlyLong):
    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        return self.down(h) + (self.far(h) if self.training else 0)


class OnlyBatch(OnlyLong):
    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        return self.down(h) if len(x) <= 2 else self.far(h)


class OnlyBelow(OnlyLong):
    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        return self.down(h) if x.shape[1] > 4 else self.far(h)


@pytest.mark.parametrize("kind", [OnlyLong, OnlyTraining, OnlyBatch, OnlyBelow])
def test_a_mistake_that_the_example_does_not_reach_is_seen(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.randn(2, 8, 6)
    kept = torch.tensor([0, 2, 3, 5, 8])
    cuts = {"up.weight": {0: kept}, "up.bias": {0: kept}, "down.weight": {1: kept}, "far.weight": {1: kept}}
    cut = copy.deepcopy(model)
    for name, dims in cuts.items():
        parameter = cut.get_parameter(name)
        for d, indices in dims.items():
            parameter.data = parameter.data.index_select(d, indices)
    assert second(model, cut, cuts, x).error < 1e-5
    with torch.no_grad():
        cut.far.weight.copy_(cut.far.weight.roll(1, 1))
    assert second(model, cut, cuts, x, effort="example").error < 1e-5
    with pytest.raises(CertificateError, match=r"other values|training"):
        second(model, cut, cuts, x)


def test_a_cut_that_breaks_elsewhere_is_refused() -> None:
    model, x = OnlyLong(), torch.randn(2, 8, 6)
    kept = torch.tensor([0, 2, 3])
    cuts = {"up.weight": {0: kept}, "up.bias": {0: kept}, "down.weight": {1: kept}}
    cut = copy.deepcopy(model)
    for name, dims in cuts.items():
        for d, indices in dims.items():
            cut.get_parameter(name).data = cut.get_parameter(name).data.index_select(d, indices)
    with pytest.raises(UnsupportedError, match="an input that the original takes"):
        second(model, cut, cuts, x)


@pytest.mark.parametrize("x", [torch.zeros(4, 6), torch.full((4, 6), 2.0)])
def test_a_blank_example_is_no_evidence_so_others_are_made(x: Tensor) -> None:
    """Without biases nothing comes out of zeros, and everything agrees with it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12, bias=False), nn.ReLU(), nn.Linear(12, 3, bias=False))
    plan = sc.plan(model, x, target={"sparsity": 0.5}, granularity="neuron")
    cut = plan.apply(model)
    with torch.no_grad():
        cut[2].weight.copy_(cut[2].weight.roll(1, 1))
    with pytest.raises(CertificateError):
        second(model, cut, plan.cuts, x)


@pytest.mark.parametrize("x", [torch.full((4, 6), float("nan")), torch.zeros(0, 6)])
def test_evidence_that_says_nothing_is_refused(x: Tensor) -> None:
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x * float("nan")).relu())

    model = Silent()
    with pytest.raises(SecateurError) as refused:
        sc.plan(model, x, target={"sparsity": 0.5}, granularity="neuron").apply(model)
    assert "say nothing" in str(refused.value) or "no number" in str(refused.value) or "empty" in str(refused.value)


def test_rounding_is_told_from_a_mistake() -> None:
    """What single precision loses, ten thousand times larger."""

    class Amplifies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(64, 96), nn.GroupNorm(4, 96), nn.Linear(96, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(3e4 * self.b(self.norm(self.a(x)).relu()))

    torch.manual_seed(0)
    model, x = Amplifies(), torch.randn(8, 64)
    plan = sc.plan(model, x, target={"sparsity": 0.5}, granularity="neuron")
    cut = plan.apply(model)
    assert any("rounds more than the tolerance" in note for note in plan.certificate.notes)
    with torch.no_grad():
        cut.b.weight.mul_(1 + 1e-3)
    with pytest.raises(CertificateError):
        second(model, cut, plan.cuts, x)


def test_numbers_drawn_at_random_are_held() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b((h + 0.1 * torch.randn_like(h)).relu())

    model = Noisy()
    before = torch.get_rng_state()
    plan = sc.plan(model, X, target={"sparsity": 0.5}, granularity="neuron")
    plan.apply(model)
    assert torch.equal(before, torch.get_rng_state())
    assert any("randn_like" in note and "test_trials.py" in note for note in plan.certificate.notes)


def test_what_comes_out_beside_tensors_is_compared() -> None:
    class Telling(nn.Sequential):
        def forward(self, x: Tensor) -> dict[str, object]:
            h = self[0](x)
            return {"y": self[2](h.relu()), "width": h.shape[1]}

    model = Telling(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    with pytest.raises(SecateurError):
        sc.plan(model, X, target={"sparsity": 0.5}, granularity="neuron").apply(model)


def test_the_model_the_example_and_the_generators_are_as_they_were() -> None:
    model = nn.Sequential(nn.Conv1d(2, 8, 3), nn.BatchNorm1d(8), nn.Dropout(), nn.ReLU(), nn.Conv1d(8, 3, 1)).train()
    x = torch.randn(2, 2, 9)
    before, given, drawn = copy.deepcopy(model.state_dict()), x.clone(), torch.get_rng_state()
    sc.plan(model, x, target={"sparsity": 0.5}).apply(model)
    assert model.training
    assert torch.equal(x, given)
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
