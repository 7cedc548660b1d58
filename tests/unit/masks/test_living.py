"""Masks that an optimizer's steps hold, and a cut in place of the same weights: refused in words, nothing changed."""

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import UnsupportedError

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


def held(model, name):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    parameter = model.get_parameter(name)
    handle = sc.mask_model(model, {name: torch.rand(parameter.shape) > 0.5})
    return handle, handle.hold(optimizer), optimizer


def step(model, optimizer):
    optimizer.zero_grad()
    model(X).pow(2).mean().backward()
    optimizer.step()


@pytest.mark.parametrize("name", ["0.weight", "2.weight"])
def test_a_cut_in_place_under_held_masks_is_refused(name):
    model = network()
    handle, _, optimizer = held(model, name)
    step(model, optimizer)
    before = model(X)
    plan = sc.plan(model, X, granularity="neuron", remove={"0": [1, 5]})
    with pytest.raises(UnsupportedError, match=rf"'{name}' is masked") as caught:
        plan.apply(model, inplace=True, optimizer=optimizer)
    assert "remove()" in caught.value.hint
    assert torch.equal(model(X), before)
    step(model, optimizer)
    assert bool((model.get_parameter(name)[~handle.masks[name]] == 0).all())


@pytest.mark.parametrize("end", ["hold", "handle", "handle is gone", "optimizer is gone"])
def test_once_nobody_holds_the_masks_the_cut_is_made(end):
    model = network()
    handle, hold, optimizer = held(model, "0.weight")
    plan = sc.plan(model, X, granularity="neuron", remove={"0": [1, 5]})
    if end == "hold":
        hold.remove()
    elif end == "handle":
        handle.remove()
    elif end == "handle is gone":
        optimizer = None
        del handle, hold
    else:
        hold.remove()
        del optimizer
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan.apply(model, inplace=True, optimizer=optimizer)
    assert model[0].weight.shape == (10, 6)
    step(model, optimizer or torch.optim.SGD(model.parameters(), lr=0.1))


def test_masks_of_weights_that_the_plan_leaves_whole_go_on():
    model = network()
    handle, _, optimizer = held(model, "4.weight")
    sc.plan(model, X, granularity="neuron", remove={"0": [1, 5]}).apply(model, inplace=True, optimizer=optimizer)
    step(model, optimizer)
    assert bool((model[4].weight[~handle.masks["4.weight"]] == 0).all())


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = nn.Linear(6, 6)

    def forward(self, x):
        return x + self.part(x).relu()


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.head = nn.ModuleList([Block() for _ in range(4)]), nn.Linear(6, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize(("name", "refused"), [("blocks.3.part.weight", True), ("head.weight", False)])
def test_blocks_that_change_their_places_under_held_masks_are_refused(name, refused):
    model = Deep()
    _handle, _hold, optimizer = held(model, name)
    plan = sc.plan(model, X, granularity="layer", criterion="random", target={"count": 1})
    if refused:
        with pytest.raises(UnsupportedError, match=rf"'{name}' is masked"):
            plan.apply(model, inplace=True, optimizer=optimizer)
        assert len(model.blocks) == 4
    else:
        plan.apply(model, inplace=True, optimizer=optimizer)
        assert len(model.blocks) == 3
    step(model, optimizer)


def test_a_copy_is_cut_whatever_is_held():
    model = network()
    _handle, _hold, optimizer = held(model, "0.weight")
    cut = sc.plan(model, X, granularity="neuron", remove={"0": [1, 5]}).apply(model)
    assert cut[0].weight.shape == (10, 6)
    step(model, optimizer)
