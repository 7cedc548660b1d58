"""Every granularity partitions every prunable weight, in the layer's own orientation."""

import itertools

import pytest
import torch
from torch import nn

from secateur.errors import InputError, RecipeError
from secateur.kinds.find import KINDS as KINDS_BY_WORD
from secateur.kinds.weights import NM, Block, Element, Kernel, Vector, names, parse
from secateur.kinds.weights.granularity import STRUCTURAL, is_within

LAYERS = {
    "linear": nn.Linear(6, 5),
    "conv1": nn.Conv1d(4, 6, 3),
    "conv2": nn.Conv2d(4, 6, (3, 2), groups=2),
    "conv3": nn.Conv3d(2, 3, 2),
    "up": nn.ConvTranspose2d(4, 6, 2),
}
KINDS = ["element", "vector", {"name": "vector", "axis": "column"}, {"name": "vector", "axis": "strip", "length": 4}]
KINDS += ["kernel", {"name": "block", "shape": [2, 3]}, "2:4"]


def full_index(group, shape):
    index = group.spans[0].index
    return torch.arange(shape.numel()).view(shape) if index is None else index.expand(shape)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_units_partition_the_weight(layer, kind):
    model = nn.ModuleDict({"a": LAYERS[layer]})
    groups = parse(kind).groups(model)
    if kind == "kernel" and layer == "linear":
        assert groups == []
        return
    (group,) = groups
    weight = model["a"].weight
    index = full_index(group, weight.shape)
    assert group.name == group.spans[0].tensor == "a.weight"
    assert sorted(set(index.flatten().tolist())) == list(range(group.size))


@pytest.mark.parametrize("layer", LAYERS)
def test_units_are_what_their_names_say(layer):
    model = nn.ModuleDict({"a": LAYERS[layer]})
    weight = model["a"].weight
    turned = layer == "up"
    out_dim, in_dim = (1, 0) if turned else (0, 1)
    units = {name: full_index(g.groups(model)[0], weight.shape) for name, g in _named(layer).items()}
    matrix = lambda t: t.transpose(0, 1).flatten(1) if turned else t.flatten(1)  # noqa: E731
    for place in itertools.product(*map(range, weight.shape)):
        out, into = place[out_dim], place[in_dim]
        assert units["row"][place] == out
        if "kernel" in units:
            assert units["kernel"][place] == out * weight.shape[in_dim] + into
    width = matrix(weight).shape[1]
    column = torch.arange(width)
    row = torch.arange(weight.shape[out_dim])[:, None]
    assert torch.equal(matrix(units["column"]), column.expand(len(row), width))
    assert torch.equal(matrix(units["strip"]), row * -(-width // 4) + column // 4)
    assert torch.equal(matrix(units["block"]), row // 2 * -(-width // 3) + column // 3)


def _named(layer):
    found = {"row": Vector(), "column": Vector(axis="column"), "strip": Vector(axis="strip", length=4)}
    found["block"] = Block(shape=(2, 3))
    return found if layer == "linear" else {**found, "kernel": Kernel()}


def test_rows_and_kernels_store_little():
    model = nn.ModuleDict({"a": nn.Conv2d(64, 64, 3)})
    assert Vector().groups(model)[0].spans[0].index.numel() == 64
    assert Kernel().groups(model)[0].spans[0].index.numel() == 64 * 64
    assert Element().groups(model)[0].spans[0].index is None


def test_only_weights_of_linear_and_convolution_are_prunable():
    model = nn.Sequential(nn.Embedding(4, 6), nn.Conv1d(6, 6, 1), nn.BatchNorm1d(6), nn.LayerNorm(6), nn.Linear(6, 4))
    assert [g.name for g in Element().groups(model)] == ["1.weight", "4.weight"]
    model[4].weight = model[0].weight
    assert [g.name for g in Element().groups(model)] == ["1.weight"]


def test_tied_weights_come_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert [g.name for g in Element().groups(model)] == ["0.weight"]
    assert Element().groups(model, protect=["1"]) == []


def test_attention_projections():
    shared = nn.MultiheadAttention(8, 2)
    assert [g.name for g in Element().groups(shared)] == ["in_proj_weight", "out_proj.weight"]
    split = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
    names = [g.name for g in Element().groups(split)]
    assert names == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]


def test_conv1d_of_transformers_is_in_out():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.ModuleDict({"c": conv1d(6, 4)})  # 4 in, 6 out
    (group,) = NM().groups(model)
    assert group.attributes["in_dim"] == 0
    assert group.attributes["tail"] == 0
    (rows,) = Vector().groups(model)
    assert rows.shape == (6,)
    assert torch.equal(full_index(rows, torch.Size((4, 6)))[0], torch.arange(6))


def test_protect_takes_modules_parameters_and_wildcards():
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "b": nn.Linear(2, 2)})
    assert [g.name for g in Element().groups(model, ["a"])] == ["b.weight"]
    assert [g.name for g in Element().groups(model, ["a.*.weight"])] == ["b.weight"]
    assert [g.name for g in Element().groups(model, ["b.weight", "a.0"])] == ["a.1.weight"]
    with pytest.raises(RecipeError, match=r"did you mean 'b\.weight'"):
        Element().groups(model, ["b.weigth"])
    with pytest.raises(RecipeError, match="write a list"):
        Element().groups(model, "b")
    assert not is_within("encoder.10.fc", ["encoder.1"])
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Conv1d(2, 2, 1))
    assert [g.name for g in Element().groups(mixed, ["type:Linear"])] == ["1.weight"]
    with pytest.raises(RecipeError, match="did you mean 'type:Linear'"):
        Element().groups(mixed, ["type:Liner"])


def test_lazy_and_parametrised_layers():
    with pytest.raises(InputError, match="no shape yet"):
        Element().groups(nn.LazyLinear(3))
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    assert Element().groups(normed) == []


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_options_rebuild_the_granularity(kind):
    granularity = parse(kind)
    assert parse({"name": granularity.name, **granularity.options()}) == granularity
    assert parse(granularity) is granularity


def test_parse_reads_patterns():
    assert parse("2:4") == NM(n=2, m=4)
    assert parse("1:16") == NM(n=1, m=16)
    assert set(names()) == {"element", "vector", "kernel", "n:m", "block"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("elemnt", "did you mean 'element'"),
        ("channel", "structure engine"),
        ("4:2", "no pattern"),
        ("4:4", "keeps everything"),
        ("0:4", "at least 1"),
        ({"name": "block", "shape": [4]}, r"\(rows, columns\)"),
        ({"name": "block", "shape": [4, 0]}, "at least 1"),
        ({"name": "block", "shpae": [4, 4]}, "did you mean 'shape'"),
        ({"name": "vector", "axis": "rows"}, "did you mean 'row'"),
        ({"name": "vector", "length": 2.5}, "whole number"),
        ({"name": "element", "n": 2}, "no option 'n'"),
        ({}, "unknown granularity"),
    ],
)
def test_wrong_specs_are_refused(spec, message):
    with pytest.raises(RecipeError, match=message):
        parse(spec)


def test_the_words_that_masks_refuse_are_those_of_the_physical_kinds():
    # The words stand below the kinds, so that a mask can be refused without any of them: two lists that must agree.
    assert set(STRUCTURAL) == set(KINDS_BY_WORD)
    assert all(kind.physical for kind in KINDS_BY_WORD.values())
