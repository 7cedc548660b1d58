"""Closed forms of the norms."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.amounts import select
from secateur.criteria import Context, Magnitude
from secateur.errors import NonFiniteError, RecipeError
from secateur.testing import tiny_scene
from secateur.types import Group, Span


def rows(values):
    layer = nn.Linear(len(values[0]), len(values), bias=False)
    layer.weight.data = torch.tensor(values)
    index = torch.arange(len(values)).view(-1, 1)
    return Context(layer, [Group("rows", "vector", (len(values),), (Span("weight", index, "self"),))])


@pytest.mark.parametrize(
    ("norm", "reduce", "expected"),
    [
        ("l1", "sum", [5.0, 6.0]),
        ("l2", "sum", [13**0.5, 26**0.5]),
        ("linf", "sum", [3.0, 5.0]),
        ("l1", "mean", [2.5, 3.0]),
        ("l2", "mean", [6.5**0.5, 13**0.5]),
        ("linf", "mean", [3.0, 5.0]),
    ],
)
def test_norms_of_two_rows(norm, reduce, expected):
    scores = Magnitude(norm=norm, reduce=reduce).score(rows([[3.0, -2.0], [1.0, -5.0]]))
    torch.testing.assert_close(scores["rows"], torch.tensor(expected))
    assert select(scores, sparsity=0.5)["rows"].tolist() == [False, True]


def test_half_of_four_weights():
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[3.0, -2.0, 1.0, -5.0]])
    element = Group("weight", "element", (1, 4), (Span("weight", None, "self"),))
    keep = select(Magnitude().score(Context(layer, [element])), sparsity=0.5)["weight"]
    assert (layer.weight * keep).tolist() == [[3, 0, 0, -5]]


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_elements_score_their_absolute_value(norm):
    scene = tiny_scene("element")
    scores = Magnitude(norm=norm).score(scene.context())
    for name, score in scores.items():
        assert torch.equal(score, scene.model.get_parameter(name).abs())


@pytest.mark.parametrize("coupled", ["all", "out"])
def test_channels_against_numpy(coupled):
    scene = tiny_scene("channel")
    score = Magnitude(norm="l2", coupled=coupled).score(scene.context())["conv1"]
    state = {name: value.numpy().astype(np.float64) for name, value in scene.model.state_dict().items()}
    for channel in range(4):
        parts = [state["conv1.weight"][channel]]
        if coupled == "all":
            vectors = [state[n][channel] for n in ("conv1.bias", "bn1.weight", "bn1.bias")]
            parts += [*vectors, state["conv2.weight"][:, channel]]
        expected = np.sqrt(sum((part**2).sum() for part in parts))
        assert score[channel].item() == pytest.approx(expected, rel=1e-6)


def test_extreme_values_do_not_overflow():
    scores = Magnitude(norm="l2").score(rows([[1e30, 1e30], [1e-30, 1e-30]]))["rows"]
    torch.testing.assert_close(scores, torch.tensor([2**0.5 * 1e30, 2**0.5 * 1e-30]), rtol=1e-6, atol=0)


def test_unknown_words_are_refused():
    with pytest.raises(RecipeError, match="did you mean 'l1'"):
        Magnitude(norm="L1")
    with pytest.raises(RecipeError, match="reduce='max'"):
        Magnitude(reduce="max")
    with pytest.raises(RecipeError, match="coupled"):
        Magnitude(coupled="in")


def test_a_coupled_buffer_of_bools_does_not_count():
    """Transformers keep masks of bools as buffers; some are sliced with the units that they belong to."""
    layer = torch.nn.Linear(2, 2, bias=False)
    layer.weight.data.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    layer.register_buffer("mask", torch.tensor([False, True]))
    index = torch.arange(2)
    spans = (Span("weight", index.view(2, 1), "out"), Span("mask", index, "out"))
    scores = Magnitude(norm="l2").score(Context(layer, [Group("rows", "channel", (2,), spans)]))
    torch.testing.assert_close(scores["rows"], torch.tensor([5.0, 0.0]))


VIEWS = (torch.ops.aten.detach.default, torch.ops.aten.view.default, torch.ops.aten.split.Tensor)  # these read nothing


class Reads(TorchDispatchMode):
    """Counts the calls that read a whole weight."""

    def __init__(self, *weights):
        super().__init__()
        self.memory = {weight.untyped_storage()._cdata: name for name, weight in weights}
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for value in args:
            name = self.memory.get(value.untyped_storage()._cdata) if isinstance(value, torch.Tensor) else None
            if name is not None and func not in VIEWS:
                self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_a_weight_is_read_once_for_every_dimension_that_is_cut(norm):
    """Heads and the features of heads are cut from the same rows: these are added up once for both."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 8, bias=False), torch.nn.Linear(8, 5, bias=False))
    heads = torch.arange(4).repeat_interleave(2)
    features = torch.arange(2).repeat(4)
    groups = [
        Group(name, "head", (units,), (Span("0.weight", index[:, None], "out"), Span("1.weight", index[None], "in")))
        for name, units, index in (("heads", 4, heads), ("features", 2, features))
    ]
    out = Group("out", "neuron", (5,), (Span("1.weight", torch.arange(5)[:, None], "out"),))
    weights = [("0.weight", net[0].weight), ("1.weight", net[1].weight)]
    criterion, context = Magnitude(norm=norm), Context(net, [*groups, out])
    with Reads(*weights) as reads:
        scores = criterion.score(context)
    # |w| is formed once, and read from then on; squares are never formed.
    assert reads.counts == ({"0.weight": 1, "1.weight": 2} if norm == "l2" else {"0.weight": 1, "1.weight": 1})
    for group in (*groups, out):
        alone = criterion.score(Context(net, [group]))[group.name]
        assert torch.equal(scores[group.name], alone)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("place", [(0, 1), (2, 0)])  # in a unit, and in a row that belongs to none
def test_what_is_not_finite_is_named_though_no_weight_is_searched(bad, norm, reduce, place):
    layer = torch.nn.Linear(2, 3, bias=False)
    group = Group("rows", "channel", (2,), (Span("weight", torch.tensor([[0], [1], [-1]]), "out"),))
    with torch.no_grad():
        layer.weight[place] = bad
    with pytest.raises(NonFiniteError, match=rf"'weight' holds .* at index \({place[0]}, {place[1]}\)"):
        Magnitude(norm=norm, reduce=reduce).score(Context(layer, [group]))
    elements = Group("weight", "element", (3, 2), (Span("weight", None, "self"),))
    with pytest.raises(NonFiniteError, match="'weight' holds"):
        Magnitude(norm=norm, reduce=reduce).score(Context(layer, [elements]))


def test_weights_that_do_not_count_are_looked_at_all_the_same():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    spans = (Span("0.weight", torch.arange(2)[:, None], "out"), Span("1.weight", torch.arange(2)[None], "in"))
    with torch.no_grad():
        net[1].weight[1, 1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"'1.weight' holds nan at index \(1, 1\)"):
        Magnitude(coupled="out").score(Context(net, [Group("g", "neuron", (2,), spans)]))
