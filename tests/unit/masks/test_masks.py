"""Masks are reversible bit for bit and refuse what does not fit."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.errors import InputError
from secateur.kinds.weights import parse
from secateur.masks import expand, mask_model, sparsity_of
from secateur.testing import tiny_scene
from secateur.types import Group, Span


def bits(tensor):
    return tensor.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_remove_restores_the_bits(dtype):
    layer = nn.Linear(6, 4).to(dtype)
    with torch.no_grad():
        layer.weight[0, :4] = torch.tensor([-0.0, float("nan"), float("inf"), 1e-40], dtype=dtype)
    before, parameter = bits(layer.weight).clone(), layer.weight
    mask = torch.rand(4, 6) > 0.5
    mask[0] = False
    handle = mask_model(layer, {"weight": mask})
    assert layer.weight is parameter
    assert (bits(layer.weight)[~mask] == 0).all()  # +0.0: no sign bit
    assert torch.equal(bits(layer.weight)[mask], before[mask])
    handle.remove()
    handle.remove()
    assert torch.equal(bits(layer.weight), before)


def test_context_manager_and_nesting():
    layer = nn.Linear(2, 2)
    before = bits(layer.weight).clone()
    with mask_model(layer, {"weight": torch.eye(2).bool()}):
        with mask_model(layer, {"weight": torch.tensor([[False, True], [True, True]])}):
            assert layer.weight[0].tolist() == [0, 0]
        assert layer.weight[0, 0] != 0
    assert torch.equal(bits(layer.weight), before)


def test_enforce_zeroes_after_a_step():
    layer = nn.Linear(3, 3)
    mask = torch.rand(3, 3) > 0.5
    mask[0, 0] = False
    handle = mask_model(layer, {"weight": mask})
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    layer(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert layer.weight[0, 0] != 0
    handle.enforce()
    assert (layer.weight[~mask] == 0).all()
    trained = layer.weight[mask].clone()
    handle.remove()
    assert torch.equal(layer.weight[mask], trained)


def test_tied_weights_are_masked_once_under_any_name():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    before = bits(model[0].weight).clone()
    handle = mask_model(model, {"1.weight": torch.eye(3).bool(), "0.weight": ~torch.eye(3).bool()})
    assert list(handle.masks) == ["0.weight"]
    assert model[1].weight is model[0].weight
    assert not model[0].weight.any()
    assert sparsity_of(model, {"1.weight": torch.eye(3).bool()}).masked == 6
    handle.remove()
    assert torch.equal(bits(model[0].weight), before)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"fc1.weigth": torch.ones(6, 5).bool()}, r"did you mean 'fc1\.weight'"),
        ({"fc1.weight": torch.ones(5, 6).bool()}, r"has shape \(5, 6\), not \(6, 5\)"),
        ({"fc1.weight": torch.ones(6).bool()}, "has shape"),
        ({"fc1.weight": torch.ones(6, 5)}, "not a bool tensor"),
        ({"fc1.weight": None}, "not a bool tensor"),
        ({"bn1.running_mean": torch.ones(4).bool()}, "no parameter"),
    ],
)
def test_wrong_masks_leave_the_model_unchanged(masks, message):
    model = tiny_scene("channel").model
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=message):
        mask_model(model, {"fc2.weight": torch.zeros(3, 6).bool(), **masks})
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(["element", "vector", "kernel", "2:4", "channel", "neuron"]), st.integers(0, 99))
def test_expand_keeps_what_all_owners_keep(kind, seed):
    scene = tiny_scene("n:m" if kind == "2:4" else kind)
    generator = torch.Generator().manual_seed(seed)
    keep = {g.name: torch.rand(g.shape, generator=generator) > 0.5 for g in scene.groups}
    masks = expand(scene.groups, keep, model=scene.model)
    tensors = dict(scene.model.named_parameters())
    expected = {
        s.tensor: torch.ones(tensors[s.tensor].shape).bool() for g in scene.groups for s in g.spans if s.role != "state"
    }
    for group in scene.groups:
        for unit in torch.nonzero(~keep[group.name].flatten()).flatten():
            for span in group.spans:
                if span.role != "state":
                    shape = tensors[span.tensor].shape
                    index = torch.arange(shape.numel()).view(shape) if span.index is None else span.index
                    expected[span.tensor] &= index != unit
    assert set(masks) == set(expected)
    assert all(torch.equal(masks[name], mask) for name, mask in expected.items())
    mask_model(scene.model, expand(scene.groups, keep))  # thin masks do as well
    for name, mask in expected.items():
        assert (tensors[name][~mask] == 0).all()
        assert (tensors[name][mask] != 0).all()


def test_unowned_elements_stay():
    group = Group("g", "channel", (2,), (Span("w", torch.tensor([0, -1, 1]), "out"),))
    assert expand([group], {"g": torch.tensor([False, False])})["w"].tolist() == [False, True, False]


def test_expand_refuses_what_does_not_fit():
    group = Group("g", "channel", (2,), (Span("w", torch.tensor([0, 1]), "out"),))
    with pytest.raises(InputError, match="did you mean 'g'"):
        expand([group], {"gg": torch.ones(2).bool()})
    with pytest.raises(InputError, match="has shape"):
        expand([group], {"g": torch.ones(1).bool()})
    with pytest.raises(InputError, match="no tensor 'w'"):
        expand([group], {"g": torch.ones(2).bool()}, model=nn.Linear(1, 1))


def test_sparsity_is_counted():
    layer = nn.Linear(4, 2, bias=False)
    mask = torch.tensor([[True, False, False, True], [True, True, True, True]])
    assert sparsity_of(layer, {"weight": mask}).zeros == 0
    mask_model(layer, {"weight": mask})
    counted = sparsity_of(layer, {"weight": mask})
    assert (counted.elements, counted.masked, counted.zeros, counted.fraction) == (8, 2, 2, 0.25)
    groups = parse("element").groups(layer)
    assert sparsity_of(layer, expand(groups, {"weight": mask})) == counted
