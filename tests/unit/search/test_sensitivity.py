"""Sensitivity: every point is what leaving these units out costs, and nothing is measured twice."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import InputError, RecipeError
from secateur.measure import accuracy
from secateur.search.sensitivity import Sensitivity, SensitivityPoint
from secateur.sources import TensorData


@pytest.mark.parametrize("granularity", ["channel", "vector"])
def test_points_are_those_of_plans_of_the_same_units(
    granularity: str, models: Sequence[nn.Module], train: TensorData
) -> None:
    before = {name: value.clone() for name, value in models[0].state_dict().items()}
    found = sc.sensitivity(models[0], data=train, granularity=granularity, levels=[0.5], batches=0)
    scores = sc.score(models[0], next(iter(train))[0], granularity=granularity)
    assert found.before == accuracy(models[0], train)
    for one in found.points:
        lowest = scores[one.group].flatten().argsort(stable=True)[: one.removed].tolist()
        plan = sc.plan(
            models[0], next(iter(train))[0], granularity=granularity, proof="example",
            keep={name: torch.ones_like(v, dtype=torch.bool) if name != one.group
                  else torch.ones(v.numel(), dtype=torch.bool).index_fill(0, torch.tensor(lowest), False).view_as(v)
                  for name, v in scores.items()},
        )  # fmt: skip
        assert one.figure == accuracy(plan.apply(models[0]), train)
        assert one.fall == pytest.approx(100 * (found.before - one.figure))
    assert all(torch.equal(value, before[name]) for name, value in models[0].state_dict().items())


def test_nothing_is_measured_twice(models: Sequence[nn.Module], train: TensorData, tmp_path, monkeypatch) -> None:
    first = sc.sensitivity(models[0], data=train, levels=[0.5], cache=tmp_path)
    more = sc.sensitivity(models[0], data=train, levels=[0.25, 0.5], cache=tmp_path)
    assert (first.measured, more.measured) == (2, 2)
    assert [one for one in more.points if one.ratio == 0.5] == list(first.points)
    other = sc.sensitivity(models[1], data=train, levels=[0.5], cache=tmp_path)
    assert other.measured == 2, "another model is another address"
    # A file that was copied under another name is not believed.
    files = sorted(tmp_path.iterdir())
    files[0].write_bytes(files[1].read_bytes())
    assert sc.sensitivity(models[0], data=train, levels=[0.25, 0.5], cache=tmp_path).points == more.points


def test_patterns_lose_alike_and_become_one_curve(models: Sequence[nn.Module], train: TensorData) -> None:
    found = sc.sensitivity(models[0], data=train, levels=[0.5], patterns=["conv*"])
    assert [(one.group, one.removed, one.total) for one in found.points] == [("conv*", 12, 24)]
    names = [one["group"] for one in found.allocation()["curves"]]
    assert names == ["conv1", "conv2"]


def test_members_of_a_pattern_share_its_loss_by_their_units_and_equal_counts_are_one_point() -> None:
    measured = [(0.1, 2, 1.0), (0.12, 2, 1.0), (0.5, 12, 6.0)]  # asked ratio, units that went, percent of the loss
    points = tuple(SensitivityPoint("c*", ratio, gone, 24, 0.9, 0.0, loss) for ratio, gone, loss in measured)
    found = Sensitivity("accuracy", "points", 0.9, points, {"c*": {"c1": 8, "c2": 16}})
    assert found.allocation()["curves"] == [
        {"group": "c1", "ratios": [2 / 24, 0.5], "falls": [pytest.approx(1 / 3), pytest.approx(2.0)]},
        {"group": "c2", "ratios": [2 / 24, 0.5], "falls": [pytest.approx(2 / 3), pytest.approx(4.0)]},
    ]


def test_blocks_that_are_protected_stay_whatever_their_scores() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.part(x).relu()

    torch.manual_seed(0)
    net = nn.Sequential(nn.Sequential(*(Block() for _ in range(4))), nn.Linear(4, 3)).eval()
    net[0][1].part.weight.data *= 1e-3  # the lowest by magnitude
    batches = [(torch.randn(64, 4), torch.randint(0, 3, (64,)))]
    (x, y), loss = batches[0], nn.functional.cross_entropy
    with torch.no_grad():
        whole = float(loss(net(x), y))
        left = [nn.Sequential(*(b for n, b in enumerate(net[0]) if n != gone), net[1]) for gone in range(4)]
        falls = [100 * (float(loss(one(x), y)) - whole) / whole for one in left]
    found = {}
    for protect in ((), ("0.1", "0.1.*")):
        (one,) = sc.sensitivity(
            net, data=batches, granularity="layer", criterion="magnitude", levels=[0.25], protect=protect
        ).points
        assert one.removed == 1
        found[protect] = min(range(4), key=lambda number: abs(falls[number] - one.loss))
        assert one.loss == pytest.approx(falls[found[protect]], abs=1e-3)
    first, second = found.values()
    assert first == 1
    assert second != 1


def test_it_is_data_text_picture_and_allocation(models: Sequence[nn.Module], train: TensorData) -> None:
    found = sc.sensitivity(models[0], data=train)
    assert found.to_dict()["points"][0]["ratio"] == 0.25
    assert all(name in str(found) for name in found.members)
    root = ElementTree.fromstring(found.to_svg())
    assert sum(node.tag.endswith("rect") for node in root.iter()) == 1 + len(found.points)
    example = next(iter(train))[0]
    plan = sc.plan(models[0], example, target={"macs": 0.6}, allocation=found)
    by_hand = sc.plan(models[0], example, target={"macs": 0.6}, allocation=found.allocation())
    assert plan.groups == by_hand.groups
    assert plan.cost["macs"][1] <= 0.6 * plan.cost["macs"][0]


@pytest.mark.parametrize(
    ("more", "kind", "words"),
    [
        ({"levels": [1.0]}, RecipeError, "between 0 and 1"),
        ({"levels": [30]}, RecipeError, "write 0.3"),
        ({"levels": []}, RecipeError, "no level"),
        ({"patterns": ["nothing*"]}, RecipeError, "matches no group"),
        ({"granularity": "2:4"}, RecipeError, "fixes how much goes"),
        ({"batches": -1}, RecipeError, "batches"),
        ({"data": [torch.zeros(2, 1, 6, 6)]}, InputError, "no figure of quality"),
        ({"data": []}, InputError, "no batch"),
    ],
)
def test_what_cannot_be_measured_is_refused(more, kind, words, models: Sequence[nn.Module], train: TensorData) -> None:
    with pytest.raises(kind) as caught:
        sc.sensitivity(models[0], torch.zeros(1, 1, 6, 6), **{"data": train, **more})
    assert words in str(caught.value)
