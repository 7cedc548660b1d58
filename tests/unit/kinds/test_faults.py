"""Faults that were once put in by hand and that no test saw: counts, names and certificates at their edges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import secateur as sc
from secateur.errors import InputError
from secateur.kinds.layers.drop import old_names
from secateur.model.agreement import agreement


class Aligned(nn.Module):
    """Two experts in one product, whose kernel wants rows of multiples of 16 bytes: four numbers, or eight halves."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(2, 8, width)), nn.Parameter(torch.randn(2, width, 8))

    def forward(self, x: Tensor) -> Tensor:
        ends = torch.tensor([2, len(x)], dtype=torch.int32)
        return functional.grouped_mm(functional.grouped_mm(x, self.up, offs=ends).relu(), self.down, offs=ends)


@pytest.mark.parametrize("groups", [1, 2])
def test_layers_say_the_sizes_of_their_weights(groups: int) -> None:
    """Convolutions forth and back, cut to unequal widths on both sides."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 12, 2, groups=groups),
        nn.ReLU(),
        nn.Conv2d(12, 16, 1, groups=groups),
        nn.ReLU(),
        nn.Conv2d(16, 2, 1),
    )
    cut = sc.plan(net, torch.randn(1, 3, 6, 6), target={"sparsity": 0.4}, scope="local").apply(net)
    for layer in cut:
        if isinstance(layer, nn.Conv2d):
            assert (layer.out_channels, layer.in_channels // layer.groups) == layer.weight.shape[:2]
        if isinstance(layer, nn.ConvTranspose2d):
            assert (layer.in_channels, layer.out_channels // layer.groups) == layer.weight.shape[:2]
            assert layer.in_channels != layer.out_channels


def test_a_threshold_removes_every_unit_below_it_and_no_other() -> None:
    net = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 2))
    scores = torch.tensor([5.0, 1.0, 4.0, 0.5, 9.0, 2.9, 3.1, 8.0, 7.0])
    plan = sc.plan(
        net, torch.randn(2, 4), granularity="neuron", scores={"0": scores}, target={"threshold": 3.0}, scope="local"
    )
    assert plan.groups["0"]["removed"] == [1, 3, 5]


@pytest.mark.parametrize("count", [1, 4, 5])
@pytest.mark.parametrize(("width", "step"), [(20, 4), (24, 8)])
def test_counts_stay_multiples_of_what_a_kernel_needs(width: int, step: int, count: int) -> None:
    net, x = Aligned(width), torch.randn(4, 8)
    (group,) = (g for g in sc.inspect(net, x).groups if not g.locks)
    assert group.attributes["multiple"] == step
    plan = sc.plan(net, x, granularity=group.granularity, target={"count": count})
    assert plan.apply(net).up.shape[2] == width - step * -(-count // step)
    with pytest.raises(InputError, match=f"no multiple of {step}"):
        sc.plan(net, x, granularity=group.granularity, remove={group.name: [0]})


@pytest.mark.parametrize("count", [1, 4, 12])
def test_what_can_be_cast_to_half_precision_can_be_after_the_cut(count: int) -> None:
    net, x = Aligned(24), torch.randn(4, 8)
    assert net.bfloat16()(x.bfloat16()).isfinite().all()
    net.float()
    (group,) = (g for g in sc.inspect(net, x).groups if not g.locks)
    cut = sc.plan(net, x, granularity=group.granularity, target={"count": count}).apply(net)
    assert cut.up.shape[2] < 24
    assert cut.bfloat16()(x.bfloat16()).isfinite().all()


def test_a_protected_block_cannot_be_given_away() -> None:
    class Residual(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    net, x = nn.Sequential(nn.Linear(4, 6), nn.Sequential(*(Residual(6, 6) for _ in range(4)))), torch.randn(2, 4)
    with pytest.raises(InputError, match="unit 2 of '1' is locked"):
        sc.plan(net, x, granularity="layer", protect=["1.2"], remove={"1": [2]})
    assert len(sc.plan(net, x, granularity="layer", protect=["1.2"], remove={"1": [1]}).apply(net)[1]) == 3


def test_names_before_stacks_inside_stacks_were_shortened() -> None:
    """Blocks 1 and 2 of three are left, and of the inner stack of block 1 what was number 1."""
    after = nn.Module()
    after.blocks = nn.ModuleList([nn.ModuleList([nn.Linear(1, 1)]), nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])])
    layers = {
        "blocks.1": {"size": 2, "removed": [0], "lists": []},
        "blocks": {"size": 3, "removed": [0], "lists": []},
    }
    named = old_names(after, layers)
    assert named("blocks.0.0.weight") == "blocks.1.1.weight"
    assert named("blocks.1.0.weight") == "blocks.2.0.weight"
    assert named("head.weight") == "head.weight"


def test_the_largest_error_of_all_outputs_is_told() -> None:
    ones = torch.ones(3)
    proof = agreement([ones, ones], [ones + 4e-6, ones], None, method="test", differs="differs", hint="")
    assert proof.max_abs_error == pytest.approx(4e-6, rel=0.1)
