"""Windows times weights give the layer's output; second moments per unit equal those of the contributions."""

import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur.errors import InputError, ResourceError, UnsupportedError
from secateur.statistics.activations import readings as gathering
from secateur.statistics.activations.gram import Geometry, Reading, Sampler, geometry, unit_gram
from secateur.statistics.activations.observe import Flow, weight_sites
from secateur.statistics.activations.readings import readings
from secateur.structure.capture import capture
from secateur.structure.groups import structure

LAYERS = {
    "linear": (nn.Linear(3, 4), (5, 3)),
    "sequence": (nn.Linear(3, 4), (2, 6, 3)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2), (2, 4, 11)),
    "conv2d": (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 3, 7, 6)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, dilation=2), (2, 4, 7, 7)),
    "conv3d": (nn.Conv3d(2, 3, 2, stride=2), (2, 2, 4, 5, 4)),
}


def geometry_of(layer, x):
    record = capture(layer, x)
    [site] = weight_sites(record, ["weight"])
    return geometry(Flow(record), record.steps[site.step])


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("positions", [None, 3])
def test_rows_times_weight_are_the_output(name, positions):
    torch.manual_seed(0)
    layer, size = LAYERS[name]
    layer = layer.double().eval()
    x = torch.randn(size).double()
    shape, y = geometry_of(layer, x), layer(x).detach()
    where = shape.places(x, Sampler(positions, 7))
    rows, matrix = shape.rows(x, where), shape.matrix(layer.weight)
    found = torch.cat([r @ w.T for r, w in zip(rows, matrix, strict=True)], 1) + layer.bias.detach()
    torch.testing.assert_close(found, shape.targets(y, where), rtol=1e-12, atol=1e-12)
    assert positions is None or len(size) <= 3 or len(found) == 3 * size[0]
    torch.testing.assert_close(shape.weight(matrix, layer.weight), layer.weight.detach())


def test_a_turned_weight_is_turned_back():
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.randn(3, 5).double())
    layer.forward = lambda x: x @ layer.weight
    x = torch.randn(2, 3).double()
    shape = geometry_of(layer, x)
    assert shape.turned
    torch.testing.assert_close(shape.rows(x)[0] @ shape.matrix(layer.weight)[0].T, x @ layer.weight.detach())
    torch.testing.assert_close(shape.weight(shape.matrix(layer.weight), layer.weight), layer.weight.detach())


@pytest.mark.parametrize("layer", [nn.ConvTranspose2d(3, 4, 2), nn.MultiheadAttention(4, 2)])
def test_other_layers_are_refused(layer):
    attention = isinstance(layer, nn.MultiheadAttention)
    record = capture(layer, (torch.randn(2, 3, 4),) * 3 if attention else torch.randn(2, 3, 4, 4))
    step = next(step for step in record.steps if step.contracted and (not attention or "bmm" in str(step.func)))
    with pytest.raises(UnsupportedError, match="cannot be reconstructed"):
        geometry(Flow(record), step)


def test_places_do_not_depend_on_the_batches_and_fill_the_space():
    whole = Sampler(5, 3).draw(40, 16, torch.device("cpu"))
    split = Sampler(5, 3)
    parts = [split.draw(n, 16, torch.device("cpu")) for n in (1, 30, 9)]
    assert torch.equal(whole, torch.cat(parts))
    counts = torch.bincount(whole.flatten(), minlength=16)
    assert counts.shape == (16,)
    assert int(counts.min()) >= 4  # 200 draws, 12.5 expected
    assert int(counts.max()) <= 26
    assert not torch.equal(whole, Sampler(5, 4).draw(40, 16, torch.device("cpu")))


class Two(nn.Module):
    """Two consumers of one group, one of them a grouped convolution behind a shuffle of the channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        self.h = F.relu(self.a(x))
        return self.b(self.h), self.c(self.h)


def test_unit_moments_are_those_of_the_contributions():
    torch.manual_seed(0)
    model, x = Two().eval(), torch.randn(3, 2, 5, 5)
    record = capture(model, x)
    groups = [g for g in structure(model, record).groups if g.name == "a"]
    [(_, found)] = readings(model, [x[:1], x[1:]], groups, positions=None)
    assert [r.weight for r in found] == ["b.weight", "c.weight"]
    model(x)
    h = model.h.detach().double()
    for reading, layer in zip(found, (model.b, model.c), strict=True):
        alone = [F.conv2d(h * (torch.arange(4) == u).view(1, 4, 1, 1), layer.weight.double(), padding=layer.padding)
                 for u in range(4)]  # fmt: skip
        z = torch.stack([a.detach().movedim(1, -1).flatten() for a in alone])
        gram, output = unit_gram(reading, 4)
        torch.testing.assert_close(gram, z @ z.T / 75, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(output, z @ z.sum(0) / 75, rtol=1e-6, atol=1e-9)


def test_columns_without_unit_are_left_out():
    gram = torch.eye(3, dtype=torch.float64)[None]
    reading = Reading("w", gram, torch.tensor([[[1.0, 2.0, 3.0]]]).double(), torch.tensor([[0, -1, 1]]))
    moments, output = unit_gram(reading, 2)
    assert moments.tolist() == [[1.0, 0.0], [0.0, 9.0]]
    assert output.tolist() == [1.0, 9.0]


def test_a_huge_gram_matrix_is_refused():
    model = nn.Sequential(nn.Linear(2, 9000), nn.Linear(9000, 1))
    x = torch.randn(2, 2)
    groups = [g for g in structure(model, capture(model, x)).groups if g.name == "0"]
    with pytest.raises(ResourceError, match="9000"):
        list(readings(model, [x], groups))


class Counted:
    """Batches that count how often they are read."""

    def __init__(self, *data):
        self.data, self.passes = data, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.data)


def chain():
    """Groups whose consumers have 4, 6 and 5 columns: 128, 288 and 200 bytes of moments."""
    torch.manual_seed(0)
    layers = [nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)]
    model, x = nn.Sequential(*layers).eval(), torch.randn(7, 2)
    trace = capture(model, x)
    return model, x, trace, [g for g in structure(model, trace).groups if g.name in ("0", "2", "4")]


@pytest.mark.parametrize(
    ("most", "passes"), [(None, 1), (616, 1), (615, 2), (488, 2), (487, 2), (416, 2), (415, 3), (1, 3)]
)
def test_groups_are_gathered_in_parts_that_fit_and_come_out_the_same(most, passes):
    model, x, trace, groups = chain()
    data = Counted(x[:3], x[3:])
    found = list(readings(model, data, groups, trace=trace, most=most))
    assert data.passes == passes
    assert [group.name for group, _ in found] == ["0", "2", "4"]
    inputs = dict(zip(("2.weight", "4.weight", "6.weight"), inner(model, x), strict=True))
    for _, (reading,) in found:
        rows = inputs[reading.weight]
        torch.testing.assert_close(reading.gram[0], rows.T @ rows / len(rows), rtol=1e-6, atol=1e-12)


def inner(model, x):
    """What the last three linear layers read, in float64."""
    with torch.no_grad():
        return [model[:upto](x).double() for upto in (2, 4, 6)]


def test_room_is_asked_for_one_part_before_the_data_are_read(monkeypatch):
    from secateur.model import room

    model, x, trace, groups = chain()
    data = Counted(x)
    monkeypatch.setattr(room, "free_bytes", lambda device: 288)
    assert len(list(readings(model, data, groups, trace=trace, most=1))) == 3
    monkeypatch.setattr(room, "free_bytes", lambda device: 287)
    data = Counted(x)
    with pytest.raises(ResourceError, match="memory"):
        list(readings(model, data, groups, trace=trace, most=1))
    assert data.passes == 0


def test_data_of_one_reading_serve_one_pass():
    model, x, trace, groups = chain()
    assert len(list(readings(model, iter([x]), groups, trace=trace))) == 3
    with pytest.raises(InputError, match="only once"):
        list(readings(model, iter([x]), groups, trace=trace, most=1))
    with pytest.raises(InputError, match="only once"):
        list(readings(model, iter([x]), groups))


def test_matrices_are_let_go_part_by_part(monkeypatch):
    """Of criteria that score group by group no more is held than one part and what is made of it."""
    model, x, _, _ = chain()
    monkeypatch.setattr(gathering, "LEAST", 1)
    monkeypatch.setattr(gathering, "TIMES", 0)
    made, most = [], 0

    def gram(*arguments):
        nonlocal most
        made.append(weakref.ref(one := Reading(*arguments)))
        most = max(most, sum(ref() is not None for ref in made))
        return one

    monkeypatch.setattr(gathering, "Reading", gram)
    for criterion in ("thinet", "lasso", "structured-obs"):
        made.clear()
        sc.score(model, x, criterion=criterion, granularity="channel", data=[x])
        assert len(made) == 3
    assert most == 1


def test_no_data_is_refused():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    groups = structure(model, capture(model, torch.randn(2, 2))).groups
    with pytest.raises(InputError):
        list(readings(model, [], groups[:1]))


def test_padding_of_windows_is_zero():
    shape = Geometry(kernel=(3,), stride=(1,), padding=(1,), dilation=(1,))
    rows = shape.rows(torch.ones(1, 1, 2))
    np.testing.assert_array_equal(rows[0], [[0, 1, 1], [1, 1, 0]])
