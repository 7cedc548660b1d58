"""A model with complex weights goes through whole runs; what cannot take such weights says so."""

import re

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.criteria.base import CRITERIA
from secateur.errors import SecateurError, UnsupportedError
from secateur.model.call import default_loss
from secateur.statistics.gradients.per_sample import per_sample_gradients

TARGET = {"sparsity": 0.4}


class Spectral(nn.Module):
    """Lifts to a few channels, multiplies their lowest frequencies with complex weights, and comes back."""

    def __init__(self):
        super().__init__()
        self.lift, self.out = nn.Linear(2, 6), nn.Linear(6, 1)
        self.weight = nn.Parameter(torch.randn(6, 6, 3, dtype=torch.complex64, generator=torch.manual_seed(0)) / 3)

    def forward(self, x):
        found = torch.fft.rfft(self.lift(x).transpose(1, 2))
        low = torch.einsum("bix,iox->box", found[..., :3], self.weight)
        whole = nn.functional.pad(low, (0, found.shape[-1] - 3))
        return self.out(torch.fft.irfft(whole, n=x.shape[1]).transpose(1, 2).relu())


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(3, 8, 2, generator=generator), torch.randn(3, 8, 1, generator=generator)) for _ in range(2)]


@pytest.mark.parametrize(
    ("granularity", "recover"), [("channel", None), ("element", {"method": "finetune", "epochs": 1})]
)
def test_a_run_is_reported_saved_and_read_back(granularity, recover, data, tmp_path):
    model = Spectral()
    done = sc.prune(model, data=data, granularity=granularity, target=TARGET, recover=recover)
    done.save(tmp_path / "out")
    again = sc.load(tmp_path / "out", model=Spectral).eval()
    x = data[0][0]
    assert torch.equal(again(x), done.model.eval()(x))
    row = next(layer for layer in done.report.layers if layer.name.startswith("weight"))
    magnitudes = model.weight.detach().abs()
    assert sum(row.weight_histogram.counts) == model.weight.numel()
    assert row.weight_histogram.edges[0] == pytest.approx(float(magnitudes.min()))
    assert row.weight_histogram.edges[-1] == pytest.approx(float(magnitudes.max()))


def _parts(scores, group):
    return scores[next(name for name in scores if name.startswith(group))].double()


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_magnitudes_count_both_parts(norm, data):
    model, x = Spectral(), data[0][0]
    model.weight.data = torch.complex(model.weight.real * 1e-3, model.weight.imag).detach()
    plan = sc.plan(
        model, x, granularity="channel", criterion={"name": "magnitude", "norm": norm}, target={"sparsity": 0.4}
    )
    # The two groups: features that the first layer makes, and channels that the complex weight makes.
    made = model.weight.detach().abs().double()
    read = {"weight": model.out.weight.detach().abs().double()}
    rows = torch.cat([made.movedim(1, 0).flatten(1), read["weight"].t()], 1)
    want = {"l1": rows.sum(1), "l2": rows.square().sum(1).sqrt(), "linf": rows.amax(1)}[norm]
    torch.testing.assert_close(_parts(plan.evidence.scores, "weight"), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_gradients_count_both_parts(norm, data):
    model = Spectral()
    nn.functional.mse_loss(model(data[0][0]), data[0][1]).backward()
    criterion = {"name": "gradient", "norm": norm}
    plan = sc.plan(
        Spectral(), data[0][0], data=data[:1], granularity="element", criterion=criterion, target={"sparsity": 0.4}
    )
    want = torch.view_as_real(model.weight.grad).square().sum(-1).sqrt().double()
    torch.testing.assert_close(_parts(plan.evidence.scores, "weight"), want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("granularity", ["channel", "element"])
@pytest.mark.parametrize("criterion", CRITERIA.names())
def test_no_criterion_drops_the_imaginary_parts(criterion, granularity, data, recwarn):
    torch.set_warn_always(True)  # torch says once in a process that it drops them
    refused = None
    try:
        sc.plan(Spectral(), data[0][0], data=data, criterion=criterion, granularity=granularity, target=TARGET)
    except SecateurError as error:
        refused = str(error)
    finally:
        torch.set_warn_always(False)
    assert not [w for w in recwarn if "imaginary" in str(w.message)]
    kinds = r"complex weights: 'weight'|cannot score '(channel|element|neuron)' units|no norm scales|no ReLU|layers"
    assert refused is None or re.search(kinds, refused), refused


def test_what_runs_beside_criteria_refuses_them(data):
    with pytest.raises(UnsupportedError, match="'weight' is complex"):
        per_sample_gradients(Spectral(), default_loss, data[0], ["weight"])
    around = {"granularity": "element", "protect": ["weight"], "target": TARGET}
    with pytest.raises(UnsupportedError, match=r"synflow(.|\n)*complex weights: 'weight'"):
        sc.plan(Spectral(), data[0][0], data=data, criterion="synflow", **around)
