"""The observer hands out what consumers read, for every way in which units reach them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.errors import UnsupportedError
from secateur.statistics.activations.observe import (
    Observer,
    consumer_sites,
    distinct,
    result_sites,
    weight_sites,
)
from secateur.structure.capture import capture
from secateur.structure.groups import structure
from secateur.types import Group, Span


class Zoo(nn.Module):
    """Flatten, cat, grouped and depthwise convolutions, functional ReLU."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1)
        self.depthwise = nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.point = nn.Conv2d(10, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.head = nn.Linear(8 * 4, 5)

    def parts(self, x):
        cat = torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1)
        depthwise = self.depthwise(cat)
        point = F.relu(self.point(depthwise))
        flat = F.adaptive_avg_pool2d(self.grouped(point), 2).flatten(1)
        return {"cat": cat, "depthwise": depthwise, "point": point, "flat": flat}

    def forward(self, x):
        return self.head(self.parts(x)["flat"])


@pytest.fixture
def zoo():
    torch.manual_seed(0)
    model = Zoo().eval()
    example = torch.randn(2, 3, 6, 6)
    record = capture(model, example)
    groups = {g.name: g for g in structure(model, capture(model, example)).groups if not g.locks}
    return model, record, groups


def read(model, record, sites, batch):
    seen = []
    Observer(model, record, sites).run(batch, lambda site, value: seen.append((site, value.clone())))
    return seen


def test_a_record_knows_the_dimensions_of_every_tensor(zoo):
    record = zoo[1]
    assert all(number in record.axes for step in record.steps for number in step.outputs)


def test_the_operand_is_what_the_consumer_reads(zoo):
    model, record, groups = zoo
    batch = torch.randn(5, 3, 9, 7)  # another batch size and another space than the record
    [(site, value)] = read(model, record, consumer_sites(record, [groups["a"]]), batch)
    assert site.weight == "point.weight"
    with torch.no_grad():
        assert torch.equal(value, model.parts(batch)["depthwise"])


def test_units_of_a_concatenation_have_their_positions(zoo):
    _, record, groups = zoo
    [site] = consumer_sites(record, [groups["b"]])
    assert site.unit.tolist() == [-1] * 4 + list(range(6))


def test_a_flattened_channel_owns_all_its_positions(zoo):
    _, record, groups = zoo
    name = next(n for n in groups if n.startswith("grouped"))
    sites = consumer_sites(record, [groups[name]])
    assert {site.weight for site in sites} == {"head.weight"}
    units = sites[0].unit.view(8, 4)
    assert bool((units == units[:, :1]).all())


def test_results_are_seen_behind_the_call(zoo):
    model, record, groups = zoo
    sites = result_sites(record, [groups["a"]], lambda step: "relu" in str(step.func))
    batch = torch.randn(1, 3, 4, 4)
    [(site, value)] = read(model, record, sites, batch)
    with torch.no_grad():
        assert torch.equal(value, model.parts(batch)["cat"][:, :4])
    assert site.unit.tolist() == [0, 1, 2, 3]


def test_weights_are_found_with_their_input(zoo):
    model, record, _ = zoo
    sites = weight_sites(record, ["point.weight", "head.weight", "depthwise.weight"])
    batch = torch.randn(2, 3, 6, 6)
    seen = {site.weight: value for site, value in read(model, record, sites, batch)}
    with torch.no_grad():
        parts = model.parts(batch)
    assert torch.equal(seen["point.weight"], parts["depthwise"])
    assert torch.equal(seen["head.weight"], parts["flat"])
    assert torch.equal(seen["depthwise.weight"], parts["cat"])


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.q, self.k, self.v = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        h = self.first(x)
        return self.q(h) + self.k(h) * self.v(h + 1)


def test_a_tensor_that_several_consumers_read_is_listed_once():
    model = Shared().eval()
    record = capture(model, torch.randn(2, 4))
    group = next(g for g in structure(model, record).groups if g.name == "first")
    sites = consumer_sites(record, [group])
    assert [site.weight for site in sites] == ["q.weight", "k.weight", "v.weight"]
    assert [site.weight for site in distinct(record, sites)] == ["q.weight", "v.weight"]


def test_heads_own_their_features():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(12, 3, batch_first=True).eval()
    example = (torch.randn(2, 5, 12),) * 3
    record = capture(model, example)
    group = next(g for g in structure(model, record).groups if g.granularity == "head")
    sites = [s for s in consumer_sites(record, [group]) if s.weight == "out_proj.weight"]
    assert [s.unit.tolist() for s in sites] == [[0] * 4 + [1] * 4 + [2] * 4]


def test_a_group_that_nothing_sums_over_is_refused():
    model = nn.Sequential(nn.Linear(3, 4))
    record = capture(model, torch.randn(1, 3))
    out = Group("out", "neuron", (4,), (Span("0.weight", torch.arange(4).view(4, 1), "out"),))
    with pytest.raises(UnsupportedError, match="'out'"):
        consumer_sites(record, [out])


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = self.a(x)
        return self.c(self.b(h) if x.shape[0] > 3 else h)


@pytest.mark.parametrize(("first", "then"), [(2, 5), (5, 2)])
def test_a_forward_that_does_something_else_is_refused(first, then):
    model = Branches().eval()
    record = capture(model, torch.randn(first, 3))
    sites = weight_sites(record, ["a.weight"])
    with pytest.raises(UnsupportedError, match="other things with this batch"):
        read(model, record, sites, torch.randn(then, 3))


class Choice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.wide, self.flat = nn.Linear(3, 4), nn.Linear(4, 2), nn.Conv1d(1, 1, 4)

    def forward(self, x):
        h = self.a(x)
        return self.wide(h) if x.shape[0] < 3 else self.flat(h[:, None])[:, 0]


def test_the_operator_that_differs_is_named():
    model = Choice().eval()
    record = capture(model, torch.randn(4, 3))
    with pytest.raises(UnsupportedError, match=r"call 1 is aten.addmm.default, expected was aten.convolution"):
        read(model, record, weight_sites(record, ["a.weight", "flat.weight"]), torch.randn(2, 3))


class Twins(nn.Module):
    """One of two layers of one shape, by the data, or both of them in an order that the data give."""

    def __init__(self, both):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3, bias=False), nn.Linear(3, 2)
        self.b.bias = nn.Parameter(torch.zeros(3))  # the same operators as for the other one
        self.both = both

    def forward(self, x):
        first, then = (self.a, self.b) if bool(x.mean() > 0) else (self.b, self.a)
        return self.c(then(first(x)) if self.both else first(x))


@pytest.mark.parametrize("both", [False, True])
def test_the_same_calls_with_another_layer_are_refused(both):
    model, x = Twins(both).eval(), torch.rand(4, 3)
    record = capture(model, x)
    sites = weight_sites(record, ["a.weight"])
    [(_, value)] = read(model, record, sites, x)
    assert torch.equal(value, x)
    with pytest.raises(UnsupportedError, match=r"multiplies with another tensor than 'a\.(weight|bias)'"):
        read(model, record, sites, -x)


def test_tied_and_turned_weights_are_the_layers_own():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    record = capture(model, torch.randn(2, 3))
    assert len(read(model, record, weight_sites(record, ["0.weight"]), torch.randn(5, 3))) == 2


def test_the_forward_is_left_after_the_last_site(zoo):
    model, record, groups = zoo
    called = []
    handle = model.head.register_forward_hook(lambda *_: called.append(1))
    sites = consumer_sites(record, [groups["a"]])
    Observer(model, record, sites, last=True).run(torch.randn(1, 3, 6, 6), lambda *_: None)
    handle.remove()
    assert called == []


def test_modes_are_given_back_when_the_forward_is_left(zoo):
    model, record, groups = zoo
    model.train()
    model.point.eval()
    before = [m.training for m in model.modules()]
    Observer(model, record, consumer_sites(record, [groups["a"]]), last=True).run(
        torch.randn(1, 3, 6, 6), lambda *_: None
    )
    assert [m.training for m in model.modules()] == before
