"""On which inputs a cut is proved: an option of every way in, which the certificate names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.cli.decisions import Decisions
from secateur.errors import CertificateError, RecipeError
from secateur.recipe import load_recipe
from secateur.report.terminal import proof_line
from secateur.request import Request, Target

EFFORTS = ("example", "default", "full")
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
    return nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), second, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def planned(proof: str) -> sc.Plan:
    return sc.plan(net(), X, target={"count": 3}, proof=proof)


@pytest.mark.parametrize("proof", EFFORTS)
def test_the_certificate_says_on_which_inputs(proof: str, tmp_path: Path) -> None:
    plan = planned(proof)
    plan.save(tmp_path / "plan.json")
    assert plan.certificate is not None
    assert plan.certificate.effort == proof
    assert f"proof: {proof}" in plan.explain()
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["certificate"]["effort"] == proof
    assert data["request"].get("proof", "default") == proof
    read = sc.Plan.load(tmp_path / "plan.json")
    assert read.request.proof == proof
    assert read.recorded is not None
    assert read.recorded.effort == proof


def test_more_effort_tries_more() -> None:
    tried = []
    for proof in EFFORTS:
        plan = planned(proof)
        plan.certify()
        assert plan.certificate is not None
        tried.append({trial.input for trial in plan.certificate.trials})
    example, default, full = tried
    assert example == {"the example"}
    assert example < default < full
    said = " ".join(full - default)
    assert all(word in said for word in ("batch 1 for 2", "size 32 for 16", "the example, in training mode"))


class WrongInOneMode(nn.Module):
    """A cut of it goes wrong where one thing alone differs from the example: `full` tries that, others do not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.broken = False  # as a mistake of a cut would be: it stands in the cut model only

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x).relu()
        return self.last(hidden) + float(self.broken and len(x) == 1)


@pytest.mark.parametrize("proof", EFFORTS)
def test_a_mistake_for_one_batch_is_seen_where_that_is_tried(proof: str) -> None:
    model, x = WrongInOneMode(), torch.randn(4, 6)
    plan = sc.plan(model, x, target={"count": 3}, proof=proof)
    assert plan.evidence is not None
    assert plan.evidence.certify is not None
    cut = plan.edit.copy(model)
    cut.broken = True
    if proof == "full":
        with pytest.raises(CertificateError, match="batch 1 for 4"):
            plan.evidence.certify(model, cut, None)
    else:
        assert plan.evidence.certify(model, cut, None).effort == proof


@pytest.mark.parametrize("proof", EFFORTS)
def test_one_proof_can_be_asked_for_otherwise(proof: str) -> None:
    plan, model = planned("default"), net()
    assert plan.evidence is not None
    plan.apply(plan.evidence.model, proof=proof)
    assert plan.certificate is not None
    assert plan.certificate.effort == proof
    assert plan.prove(model, X, proof=proof).effort == proof


@pytest.mark.parametrize(("said", "proved"), [("example", "default"), ("default", "default"), ("full", "full")])
def test_a_file_can_ask_for_more_and_not_for_less(said: str, proved: str, tmp_path: Path) -> None:
    planned(said).save(tmp_path / "plan.json")
    read = sc.Plan.load(tmp_path / "plan.json")
    assert read.prove(net(), X).effort == proved


class Block(nn.Module):
    """One that can go whole, and has units as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.last(self.first(x).relu())


@pytest.mark.parametrize("granularity", ["layer", "neuron"])
def test_every_kind_follows_it(granularity: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(4)))
    for proof in ("example", "full"):
        plan = sc.plan(model, torch.randn(3, 6), target={"count": 1}, granularity=granularity, proof=proof)
        plan.certify()
        assert plan.certificate is not None
        assert plan.certificate.effort == proof
        assert (len(plan.certificate.trials) == 1) == (proof == "example")


def test_steps_that_follow_each_other_are_proved_as_the_least_of_them() -> None:
    model = net()
    first = sc.plan(model, X, target={"count": 2}, proof="full")
    middle = first.apply(model)
    second = sc.plan(middle, X, target={"count": 2}, proof="example")
    second.apply(middle)
    whole = first.then(second, model)
    assert whole.certificate is not None
    assert whole.certificate.effort == "example"


def test_recipe_keyword_command_and_report() -> None:
    told = Decisions(proof="full").settings()
    assert [(one.keys, one.value) for one in told] == [(("verify", "proof"), "full")]
    assert Decisions(proof="full").words() == ["--proof", "full"]
    assert load_recipe("channel-half-macs", ["verify.proof=full"]).choices()["proof"] == "full"
    options = {"overrides": ["measure.latency=false"], "target": {"count": 3}, "recover": []}
    result = sc.prune(net(), X, recipe={"target": {"count": 3}, "verify": {"proof": "example"}}, **options)
    assert result.report.certificate.effort == "example"
    result = sc.prune(net(), X, proof="full", **options)
    assert result.report.certificate.effort == "full"
    assert result.plan.request.proof == "full"
    assert "proof: full" in proof_line(result.report)


@pytest.mark.parametrize("word", ["fast", "", 3, None])
def test_other_words_are_refused_everywhere(word: object) -> None:
    for ask in (
        lambda: Request(target=Target(count=1), proof=word),
        lambda: planned(word),
        lambda: planned("default").prove(net(), X, proof=word or "none"),
        lambda: load_recipe("channel-half-macs", [f"verify.proof={word}"]),
    ):
        with pytest.raises(RecipeError, match="example"):
            ask()
