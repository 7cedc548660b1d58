"""Advice is a recipe that runs, the same for the same facts, and every choice says why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pattern_problem import Net
from torch import Tensor, nn

from secateur import criteria, prune
from secateur.advice import Advice, advise
from secateur.advice.facts import Facts
from secateur.advice.recommend import recommend
from secateur.cli.main import main
from secateur.errors import InputError, RecipeError
from secateur.recipe import load_recipe
from secateur.sources import TensorData
from secateur.testing.scenes import TinyMixture


class Plain(nn.Module):
    """Convolutions with ReLU, and no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.classify = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        return self.classify(x.mean((2, 3)))


class Encoder(nn.Module):
    """One block of a transformer, heads written as a reshape."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.norm = 4, nn.LayerNorm(16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down, self.classify = nn.Linear(16, 64), nn.Linear(64, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (
            layer(self.norm(x)).view(batch, tokens, self.heads, -1).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        mixed = torch.softmax(q @ k.transpose(2, 3) / 2.0, -1) @ v
        x = x + self.o(mixed.transpose(1, 2).reshape(batch, tokens, -1))
        x = x + self.down(nn.functional.gelu(self.up(x)))
        return self.classify(x.mean(1))


IMAGE = torch.zeros(1, 1, 6, 6)
TOKENS = torch.randn(2, 5, 16)


def reasons(found: Advice) -> dict[str, tuple[str, str, str]]:
    return {r.topic: (r.choice, r.because, r.evidence) for r in found.reasons}


def test_convolutions_with_batch_norm_and_labels(train: TensorData) -> None:
    found = advise(Net(), data=train)
    assert (found.recipe.criterion, found.recipe.granularity, found.recipe.scope) == ("taylor", "channel", "local")
    assert [step.method for step in found.recipe.recover] == ["bn_refresh", "finetune"]
    assert found.recipe.target.given() == {"macs": 0.5}
    assert found.facts.norms == ("batch",)
    assert found.facts.piecewise_linear
    assert "PruningBench" in reasons(found)["criterion"][2]
    assert "Renda" in reasons(found)["schedule"][2]


def test_parts_of_data_are_taken_as_prune_takes_them(train: TensorData) -> None:
    whole = advise(Net(), data=train)
    assert advise(Net(), data={"train": train, "test": [torch.zeros(2, 1, 6, 6)]}).to_dict() == whole.to_dict()
    assert advise(Net(), data={"calibration": train}).recipe == whole.recipe


def test_convolutions_without_batch_norm_and_without_labels() -> None:
    found = advise(Plain(), data=[torch.randn(4, 1, 6, 6)])
    assert found.recipe.criterion == "apoz"
    assert found.recipe.scope == "local"
    assert [step.method for step in found.recipe.recover] == ["refit"]
    assert "He et al." in reasons(found)["schedule"][2]
    assert found.facts.data == "unlabelled"
    assert "Network Trimming" in reasons(found)["criterion"][2]


def test_labels_that_may_not_be_used_are_not(train: TensorData) -> None:
    found = advise(Net(), data=train, labels=False)
    assert found.recipe.criterion == {"name": "magnitude", "norm": "l2", "reduce": "mean"}
    assert [step.method for step in found.recipe.recover] == ["refit", "bn_refresh"]


def test_no_data() -> None:
    found = advise(Net(), IMAGE)
    assert found.recipe.criterion == {"name": "magnitude", "norm": "l2", "reduce": "mean"}
    assert (found.recipe.scope, found.recipe.recover) == ("local", ())
    assert found.recipe.target.given() == {"macs": 0.8}
    assert "no data" in reasons(found)["criterion"][1]
    assert "batch norm" in reasons(found)["criterion"][2]


def test_transformer() -> None:
    data = [(TOKENS, torch.zeros(2, dtype=torch.int64))]
    found = advise(Encoder(), data=data)
    assert found.facts.heads == 4
    assert found.facts.attention
    assert "gelu" in found.facts.activations
    assert not found.facts.piecewise_linear
    assert found.recipe.granularity in ("neuron", "head")
    assert found.recipe.recover[-1].optimizer.name == "adamw"
    assert any("ViT-S" in text for text in found.alternatives)
    alone = advise(Encoder(), TOKENS)
    assert alone.recipe.scope == "local"
    assert "T5" in reasons(alone)["scope"][2]


def test_mixtures_of_experts_are_told_of_reap() -> None:
    tokens = torch.randn(8, 6)
    told = advise(TinyMixture(), data=[(tokens, torch.zeros(8, dtype=torch.int64))])
    assert told.facts.units["expert"] == 4
    assert any("criterion reap" in text for text in told.alternatives)
    assert any("expert (4 units), criterion magnitude" in text for text in advise(TinyMixture(), tokens).alternatives)
    assert not any("expert" in text for text in advise(Plain(), IMAGE).alternatives)


def test_a_short_budget_buys_no_training_and_another_criterion(train: TensorData) -> None:
    found = advise(Net(), data=train, budget_seconds=1e-6)
    assert found.recipe.criterion == "gauss-newton"
    assert [step.method for step in found.recipe.recover] == ["refit", "bn_refresh"]
    assert "fewer than 20" in reasons(found)["schedule"][1]
    assert found.facts.seconds_per_batch > 0


def facts(**changes: Any) -> Facts:
    plain: dict[str, Any] = {
        "model": "M", "params": 1000, "macs": 1000, "norms": ("batch",), "activations": ("relu",),
        "piecewise_linear": True, "units": {"channel": 64}, "shares": {"channel": 0.9}, "widest": 64,
        "data": "labelled", "batches": 10, "seconds_per_batch": 1.0, "budget_seconds": None, "device": "cpu",
        "sparse_tensor_cores": False,
    }  # fmt: skip
    return Facts(**{**plain, **changes})


@pytest.mark.parametrize(
    ("budget", "wanted"),
    [(None, {"epochs": 3}), (1000.0, {"epochs": 10}), (43.0, {"epochs": 3}), (28.0, {})],
)
def test_the_budget_decides_how_long_to_train(budget: float | None, wanted: dict[str, int]) -> None:
    recover = recommend(facts(budget_seconds=budget), criteria.names()).recipe["recover"]
    tuned = [step for step in recover if step["method"] == "finetune"]
    assert [{key: step[key] for key in ("epochs", "steps") if key in step} for step in tuned] == (
        [wanted] if wanted else []
    )


def test_steps_where_an_epoch_is_too_long() -> None:
    recover = recommend(facts(budget_seconds=100.0, batches=5000), criteria.names()).recipe["recover"]
    assert recover[-1]["steps"] == 70
    assert "epochs" not in recover[-1]


def test_nothing_to_cut() -> None:
    locked = facts(units={}, shares={}, widest=512)
    assert recommend(locked, criteria.names()).recipe["granularity"] == "element"
    gpu = recommend(replace(locked, device="cuda", sparse_tensor_cores=True), criteria.names()).recipe
    assert (gpu["granularity"], gpu["target"]) == ("2:4", {"sparsity": 0.5})
    load_recipe(gpu)
    untrained = replace(locked, budget_seconds=1.0)
    assert recommend(untrained, criteria.names()).recipe["criterion"] == "fisher"
    assert recommend(replace(locked, data="unlabelled"), criteria.names()).recipe["criterion"] == "wanda"


@pytest.mark.parametrize("data", ["none", "unlabelled", "labelled"])
@pytest.mark.parametrize("norms", [(), ("batch",), ("layer",)])
@pytest.mark.parametrize("activations", [("relu",), ("gelu", "softmax")])
@pytest.mark.parametrize("shares", [{}, {"channel": 0.5}, {"head": 0.6, "neuron": 0.3}])
@pytest.mark.parametrize("budget", [None, 1.0, 500.0])
def test_every_case_gives_a_recipe_with_reasons(
    data: str, norms: tuple[str, ...], activations: tuple[str, ...], shares: dict[str, float], budget: float | None
) -> None:
    case = facts(
        data=data, norms=norms, activations=activations, piecewise_linear="relu" in activations, shares=shares,
        units=dict.fromkeys(shares, 8), budget_seconds=budget,
    )  # fmt: skip
    first, again = recommend(case, criteria.names()), recommend(case, criteria.names())
    assert (first.recipe, first.reasons, first.alternatives) == (again.recipe, again.reasons, again.alternatives)
    recipe = load_recipe(first.recipe)
    known = recipe.criterion if isinstance(recipe.criterion, str) else recipe.criterion["name"]
    assert known in criteria.names()
    assert {r.topic for r in first.reasons} >= {"criterion", "granularity", "target", "schedule"}
    assert all(r.because and r.evidence for r in first.reasons)
    # A criterion may ask for no more than there is.
    needs = criteria.get(known).needs
    assert not (data == "none" and needs & {"data", "labels"})
    assert not (data == "unlabelled" and "labels" in needs)
    assert not (data != "labelled" and any(step.method == "finetune" for step in recipe.recover))


def test_without_the_wanted_criterion_another_is_taken() -> None:
    assert recommend(facts(), ["magnitude"]).recipe["criterion"]["name"] == "magnitude"


@pytest.mark.parametrize("model", [Net, Plain])
def test_prune_takes_the_advice(model: type[nn.Module], train: TensorData) -> None:
    torch.manual_seed(0)
    net = model()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = advise(net, data=train, budget_seconds=600)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())
    assert load_recipe(found.to_yaml()) == found.recipe
    quick = ["recover.0.epochs=1"] if len(found.recipe.recover) == 1 else ["recover.1.epochs=1"]
    result = prune(net, data=train, recipe=load_recipe(found.to_yaml(), [*quick, "measure.latency=false"]))
    assert result.plan.cost["macs"][1] <= 0.5 * result.plan.cost["macs"][0]
    assert result.plan.certificate is not None


def test_prune_takes_the_advice_without_labels() -> None:
    data = [torch.randn(32, 1, 6, 6) for _ in range(3)]
    torch.manual_seed(0)
    net = Net()
    result = prune(net, data=data, recipe=load_recipe(advise(net, data=data).recipe, ["measure.latency=false"]))
    assert result.plan.cost["macs"][1] <= 0.8 * result.plan.cost["macs"][0]


def test_protected_layers_and_targets_out_of_reach() -> None:
    found = advise(Plain(), IMAGE, protect=["conv1"])
    assert found.recipe.protect == ("conv1",)
    share = found.recipe.target.given()["macs"]
    assert share >= 0.8
    whole = advise(Plain(), IMAGE, protect=["conv1", "conv2"])
    assert whole.recipe.granularity == "element"


def test_a_name_cannot_leave_its_comment() -> None:
    evil = type("A\n}\nseed: 7\x1b", (Plain,), {})
    text = advise(evil(), IMAGE).to_yaml()
    assert load_recipe(text).seed == 0
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({}, InputError),
        ({"data": []}, InputError),
        ({"example": IMAGE, "labels": True}, InputError),
        ({"data": [torch.zeros(2, 1, 6, 6)], "labels": True}, InputError),
        ({"example": IMAGE, "budget_seconds": 0}, RecipeError),
        ({"data": iter([IMAGE])}, InputError),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        advise(Plain(), **arguments)


def test_command_line_writes_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    assert main(["advise", "demo:lenet", "--out", str(path)]) == 0
    assert load_recipe(path).granularity in ("neuron", "channel")
    text = capsys.readouterr()
    assert "criterion: magnitude" in text.out
    assert f"--recipe {path}" in text.err.replace("\n", "")
    assert main(["advise", "demo:lenet", "--out", str(path)]) == 3
    assert main(["advise", "demo:lenet", "--json"]) == 0
    assert '"facts"' in capsys.readouterr().out
