import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import RecipeError
from secateur.model.protect import protected


def net():
    body = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    body[2].secateur_tags = {"keep", "slow"}
    body[0].secateur_tags = "first"
    return body


@pytest.mark.parametrize(
    ("patterns", "whole"),
    [
        (["tag:keep"], {"2.weight", "2.bias"}),
        (["tag:first"], {"0.weight", "0.bias"}),
        (["type:Linear"], {"0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"}),
        (["type:Module"], {"0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"}),
        (["4", "0.bias"], {"0.bias", "4.weight", "4.bias"}),
        (["*.bias"], {"0.bias", "2.bias", "4.bias"}),
    ],
)
def test_names_classes_and_tags(patterns, whole):
    model = net()
    found = protected(model, patterns)
    assert {name for name, p in model.named_parameters() if id(p) in found} == whole


@pytest.mark.parametrize("pattern", ["9", "tag:kep", "type:Linea", "1", "type:ReLU"])
def test_a_pattern_that_protects_nothing_is_an_error(pattern):
    with pytest.raises(RecipeError, match="matches no module or parameter"):
        protected(net(), [pattern])
    with pytest.raises(RecipeError, match="write a list"):
        protected(net(), "0")


def test_tags_hold_for_cuts_and_masks():
    model, x = net(), torch.randn(3, 4)
    free = sc.plan(model, x, target={"sparsity": 0.3}, scope="local")
    kept = sc.plan(model, x, target={"sparsity": 0.3}, scope="local", protect=["tag:first"])
    assert set(free.groups) == {"0", "2"}
    assert set(kept.groups) == {"2"}
    assert torch.equal(kept.apply(model)[0].weight, model[0].weight)
    masks = sc.plan(model, x, granularity="element", target={"sparsity": 0.5}, protect=["tag:slow"]).masks
    assert set(masks) == {"0.weight", "4.weight"}
    result = sc.prune(
        model, x, recipe={"target": {"sparsity": 0.3}, "protect": ["tag:first"], "measure": {"rounds": 1}}
    )
    assert result.model[0].out_features == 6
