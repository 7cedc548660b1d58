"""Block influence against its definition on hidden states."""

import math

import pytest
import torch
from torch import nn

from secateur.criteria.block_influence import block_influence
from secateur.errors import InputError, NonFiniteError, RecipeError, UnsupportedError


class Block(nn.Module):
    def __init__(self, strength, inplace=False):
        super().__init__()
        self.layer, self.strength, self.inplace = nn.Linear(6, 6), strength, inplace

    def forward(self, x, mask=None):
        if self.inplace:
            x += self.strength * self.layer(x)
            return x
        return x + self.strength * self.layer(x), mask


class Stack(nn.Module):
    def __init__(self, strengths, inplace=False):
        super().__init__()
        self.inn = nn.Linear(4, 6)
        self.blocks = nn.ModuleList(Block(s, inplace) for s in strengths)

    def forward(self, x):
        h = self.inn(x)
        self.states = [h.detach().clone()]
        for block in self.blocks:
            out = block(h, mask=None)
            h = out if block.inplace else out[0]
            self.states.append(h.detach().clone())
        return h


@pytest.fixture
def stack():
    torch.manual_seed(0)
    return Stack([1.0, 0.0, 0.3, 3.0]).eval()


def expected(states, i, j, measure):
    cosine = torch.cosine_similarity(states[i].double(), states[j].double(), -1)
    return float((1 - cosine if measure == "cosine" else cosine.arccos() / math.pi).mean())


@pytest.mark.parametrize("measure", ["cosine", "angular"])
@pytest.mark.parametrize("span", [1, 2, 4])
@pytest.mark.parametrize("inplace", [False, True])
def test_it_is_the_mean_distance_of_hidden_states(measure, span, inplace):
    torch.manual_seed(0)
    stack, x = Stack([1.0, 0.2, 0.3, 3.0], inplace).eval(), torch.randn(5, 3, 4)
    found = block_influence(stack, "blocks", [x[:1], x[1:]], measure=measure, span=span)
    stack(x)
    wanted = [expected(stack.states, i, i + span, measure) for i in range(5 - span)]
    assert found.tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_a_block_that_does_nothing_is_lowest(stack):
    found = block_influence(stack, "blocks", [torch.randn(5, 3, 4)])
    assert int(found.argmin()) == 1
    assert float(found[1]) == pytest.approx(0.0, abs=1e-12)
    assert int(found.argmax()) == 3


def test_the_model_is_left_as_it_was(stack):
    stack.train()
    stack.blocks[0].eval()
    block_influence(stack, "blocks", [torch.randn(5, 3, 4)])
    assert [b.training for b in stack.blocks] == [False, True, True, True]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in stack.modules())


def test_images_have_their_features_in_the_second_dimension():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Identity()).eval(), torch.randn(2, 3, 4, 4)
    found = block_influence(model, ["0", "1"], [x])
    wanted = 1 - torch.cosine_similarity(x.double(), model[0](x).detach().double(), 1).mean()
    assert found.tolist() == pytest.approx([float(wanted), 0.0], abs=1e-6)


@pytest.mark.parametrize(
    ("blocks", "options"),
    [
        ("blocs", {}),
        (["blocks.9"], {}),
        ("blocks", {"span": 5}),
        ("blocks", {"span": 0}),
        ("blocks", {"measure": "l2"}),
    ],
)
def test_what_does_not_exist_is_refused(stack, blocks, options):
    with pytest.raises(RecipeError):
        block_influence(stack, blocks, [torch.randn(1, 4)], **options)


def test_blocks_that_are_no_stack_are_refused(stack):
    with pytest.raises(UnsupportedError, match="order"):
        block_influence(stack, ["blocks.1", "blocks.0"], [torch.randn(1, 4)])
    with pytest.raises(UnsupportedError, match="shape"):
        block_influence(stack, ["inn", "blocks.0"], [torch.randn(1, 4)])


def test_no_data_and_nan_are_refused(stack):
    with pytest.raises(InputError):
        block_influence(stack, "blocks", [])
    with pytest.raises(NonFiniteError, match=r"blocks\.0"):
        block_influence(stack, "blocks", [torch.full((1, 4), float("nan"))])
