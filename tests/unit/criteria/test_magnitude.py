"""Closed forms of the norms."""

import numpy as np
import pytest
import torch
from torch import nn

from secateur.amounts import select
from secateur.criteria import Context, Magnitude
from secateur.errors import RecipeError
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


def test_a_coupled_buffer_of_bools_counts_as_numbers():
    """Transformers keep masks of bools as buffers; some are sliced with the units that they belong to."""
    layer = torch.nn.Linear(2, 2, bias=False)
    layer.weight.data.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    layer.register_buffer("mask", torch.tensor([False, True]))
    index = torch.arange(2)
    spans = (Span("weight", index.view(2, 1), "out"), Span("mask", index, "out"))
    scores = Magnitude(norm="l2").score(Context(layer, [Group("rows", "channel", (2,), spans)]))
    torch.testing.assert_close(scores["rows"], torch.tensor([5.0, 1.0]))
