"""What scores tell of the loss: against losses of models that were really changed, and scores that know the answer."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.comparison import compare
from secateur.comparison.fidelity import loss_changes, pick, score_fidelity
from secateur.criteria import Context, Criterion
from secateur.testing.scenes import Scene, tiny_scene
from secateur.types import Group, Span


def mean_loss(model: nn.Module, scene: Scene) -> float:
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(model(x), y, reduction="sum") for x, y in scene.data]
    return float(sum(losses)) / sum(len(y) for _, y in scene.data)


def silenced(scene: Scene, group: Group, unit: int) -> nn.Module:
    """A copy with the unit's weights written to zero, one element at a time."""
    model = copy.deepcopy(scene.model)
    with torch.no_grad():
        for span in group.spans:
            if span.role == "state":
                continue
            weight = model.get_parameter(span.tensor)
            number = torch.arange(weight.numel()).view(weight.shape) if span.index is None else span.index
            number = number.expand(weight.shape)
            for place in product(*(range(size) for size in weight.shape)):
                if int(number[place]) == unit:
                    weight[place] = 0.0
    return model


@pytest.mark.parametrize("kind", ["channel", "neuron", "element", "vector", "kernel", "block", "layer"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_changes_are_those_of_a_model_without_the_unit(kind: str, layout: torch.memory_format) -> None:
    scene = tiny_scene(kind)
    scene.model.to(memory_format=layout)  # type: ignore[call-overload]
    before = copy.deepcopy(scene.model.state_dict())
    picks = pick(scene.groups, 8, seed=3)
    found = loss_changes(scene.model, scene.groups, picks, scene.data, None)
    assert found is not None
    whole = mean_loss(scene.model, scene)
    for group in scene.groups:
        for place, unit in enumerate(picks.get(group.name, [])):
            wanted = mean_loss(silenced(scene, group, unit), scene) - whole
            assert float(found[group.name][place]) == pytest.approx(wanted, abs=2e-6)
    assert all(torch.equal(value, before[name]) for name, value in scene.model.state_dict().items())


def test_units_are_spread_over_the_groups() -> None:
    groups = tiny_scene("element").groups
    for count in (3, 20, 10_000):
        picks = pick(groups, count, seed=0)
        assert picks == pick(groups, count, seed=0)
        assert len(picks) == min(count, len(groups))
        for group in groups:
            units = picks.get(group.name, [])
            assert len(set(units)) == len(units) <= max(1, count // len(picks))
            assert all(0 <= unit < group.size for unit in units)
    assert pick(groups, 20, seed=0) != pick(groups, 20, seed=1)


def test_scores_that_know_the_changes_agree_fully() -> None:
    truth = {"a": torch.tensor([0.3, 0.1, 0.2, 0.4]), "b": torch.tensor([5.0, 6.0, 8.0, 7.0]), "c": torch.tensor([9.0])}
    picks = {"a": [0, 2, 4, 6], "b": [0, 1, 2, 3], "c": [5]}
    scores = {name: torch.zeros(7) for name in truth}
    for name, units in picks.items():
        scores[name][units] = truth[name]
    assert score_fidelity(scores, picks, truth) == {"all": 1.0, "within": 1.0}
    turned = {name: -score for name, score in scores.items()}
    assert score_fidelity(turned, picks, truth) == {"all": -1.0, "within": -1.0}
    # Three units of a layer are too few to say anything about its order.
    few = {**picks, "d": [0, 1, 2]}, {**truth, "d": torch.tensor([3.0, 2.0, 1.0])}
    assert score_fidelity({**scores, "d": torch.arange(7.0)}, *few)["within"] == 1.0
    # The order within the layers is right, the one between them is not.
    shifted = {"a": scores["a"] + 100, "b": scores["b"], "c": scores["c"]}
    assert score_fidelity(shifted, picks, truth)["within"] == 1.0
    assert score_fidelity(shifted, picks, truth)["all"] < 0


class Oracle(Criterion):
    """Knows what the loss does without a channel, by trying each of them."""

    name, summary, speed, best_for, comparable = "oracle", "tries every unit", "slow", "tests", True

    def __init__(self, *, sign: int = 1) -> None:
        self.sign = sign

    def _score(self, context: Context) -> dict[str, Tensor]:
        every = {group.name: list(range(group.size)) for group in context.groups}
        found = loss_changes(context.model, context.groups, every, list(context.data), None)  # type: ignore[arg-type]
        assert found is not None
        return {name: self.sign * value for name, value in found.items()}


def compared(scene: Scene, kind: str, out: Path, criteria: list[Any], **options: Any) -> list[dict[str, Any]]:
    found = compare(
        scene.model, options.pop("data", scene.data), criteria=criteria, evaluate=lambda m: mean_loss(m, scene),
        out=out, granularity=kind, levels=[0.3], seeds=2, rounds=0, **options,
    )  # fmt: skip
    text = (out / "compare.md").read_text() + (out / "compare.html").read_text()
    assert ("Does the score tell" in text) == bool(found.summary["fidelity"])
    return found.summary["fidelity"]


def test_a_comparison_says_who_knows_the_loss(tmp_path: Path) -> None:
    lines = {
        one["criterion"]: one
        for one in compared(tiny_scene("channel"), "channel", tmp_path, [Oracle(), Oracle(sign=-1)])
    }
    assert set(lines) == {"oracle", "oracle sign=-1", "magnitude", "random"}
    assert (lines["oracle"]["all"], lines["oracle"]["within"]) == (1.0, 1.0)
    assert (lines["oracle sign=-1"]["all"], lines["oracle sign=-1"]["within"]) == (-1.0, -1.0)
    assert lines["oracle"]["seeds"] == 2


@pytest.mark.slow
def test_leaving_a_block_out_is_what_loss_increase_measures(tmp_path: Path) -> None:
    lines = compared(tiny_scene("layer"), "layer", tmp_path, ["loss-increase"])
    assert next(one for one in lines if one["criterion"] == "loss-increase")["all"] == 1.0


class Block(nn.Module):
    """Ends in a norm: with zero weights it gives zeros, and not what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.inner(x).relu())  # type: ignore[no-any-return]


class PostNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(4)), nn.Linear(6, 3)

    def forward(self, x: Tensor, without: int = -1) -> Tensor:
        for place, block in enumerate(self.blocks):
            x = x if place == without else block(x)
        return self.head(x)  # type: ignore[no-any-return]


def test_layers_are_left_out_and_locked_ones_are_not_tried() -> None:
    torch.manual_seed(0)
    model, x, y = PostNorm().eval(), torch.randn(32, 6), torch.arange(32) % 3
    spans = tuple(
        Span(name, torch.full([1] * p.dim(), int(name.split(".")[1])), "self")
        for name, p in model.blocks.named_parameters(prefix="blocks")
    )
    known = {"blocks": tuple(f"blocks.{i}" for i in range(4)), "free": (True, False, True, True)}
    group = Group("blocks", "layer", (4,), spans, attributes=known)
    assert pick([group], 64, seed=0) == {"blocks": [0, 2, 3]}
    found = loss_changes(model, [group], {"blocks": [0, 2, 3]}, [(x, y)], None)
    assert found is not None
    with torch.no_grad():
        whole, *less = (float(nn.functional.cross_entropy(model(x, i), y)) for i in (-1, 0, 2, 3))
    assert found["blocks"].tolist() == pytest.approx([value - whole for value in less], abs=1e-6)


@pytest.mark.slow
def test_nothing_is_said_without_a_loss_or_about_experts(tmp_path: Path) -> None:
    scene = tiny_scene("channel")
    assert compared(scene, "channel", tmp_path / "a", ["magnitude"], data=[x for x, _ in scene.data]) == []
    assert compared(scene, "channel", tmp_path / "b", ["magnitude"], probes=0) == []
    assert compared(tiny_scene("expert"), "expert", tmp_path / "c", ["magnitude"]) == []
