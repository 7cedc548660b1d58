"""Masks cover every floating-point matrix that takes part in a product; what they leave out has a name and a reason.

The truth is independent of the code under test: every parameter of the models below is written down by hand.
"""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

import secateur as sc
from secateur.cli import main
from secateur.errors import UnsupportedError
from secateur.kinds.weights import found as finding
from secateur.kinds.weights.found import find_weights

TOKENS = torch.randint(0, 20, (2, 5))
X = torch.randn(2, 5, 8)
EMBEDDINGS = {"name": "element", "embeddings": True}


class Language(nn.Module):
    def __init__(self, kind, *, tied=False, **options):
        super().__init__()
        self.embed, self.core = nn.Embedding(20, 8), kind(8, 8, batch_first=True, **options)
        self.out = nn.Linear(8, 20)
        if tied:
            self.out.weight = self.embed.weight

    def forward(self, tokens):
        return self.out(self.core(self.embed(tokens))[0])


class Cells(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.LSTMCell(8, 8), nn.GRUCell(8, 8), nn.RNNCell(8, 8)

    def forward(self, x):
        return self.c(self.b(self.a(x[:, 0])[0]))


class Raw(nn.Module):
    """Parameters that no layer of torch holds, each used in its own way."""

    def __init__(self):
        super().__init__()
        sizes = {"plain": (8, 8), "turned": (8, 8), "sliced": (16, 8), "experts": (3, 8, 8), "summed": (8, 4, 2),
                 "kernel": (8, 8, 3), "positions": (1, 5, 8), "scale": (1, 1, 8), "gate": (8, 8), "mask_token": (1, 8),
                 "table": (20, 8)}  # fmt: skip
        for name, shape in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, x):
        x = x + self.positions
        x = functional.linear(x @ self.plain, self.turned)
        x = x @ self.sliced[:8] + x @ self.sliced[8:]
        x = torch.stack([functional.linear(x, w) for w in self.experts]).mean(0) * self.scale
        x = torch.einsum("btd,dhk->bthk", x, self.summed).flatten(2) * self.gate.sigmoid().mean()
        x = x + self.table[torch.zeros(2, 5, dtype=torch.int64)]
        return functional.conv1d(x.transpose(1, 2), self.kernel)


def packed():
    return nn.MultiheadAttention(8, 2, batch_first=True)


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.norm = packed(), nn.LayerNorm((5, 8))

    def forward(self, x):
        return self.norm(self.mix(x, x, x)[0])


class Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.both = nn.Bilinear(8, 8, 4)

    def forward(self, x):
        return self.both(x, x)


def gates(layers, *, reverse=False):
    ends = ["", "_reverse"] if reverse else [""]
    return [f"core.weight_{w}_l{n}{end}" for n in range(layers) for end in ends for w in ("ih", "hh")]


# model -> (how to make it, example, names that are masked, names that are left out)
MODELS = {
    "lstm": (lambda: Language(nn.LSTM, num_layers=2), TOKENS, [*gates(2), "out.weight"], ["embed.weight"]),
    "gru": (lambda: Language(nn.GRU), TOKENS, [*gates(1), "out.weight"], ["embed.weight"]),
    "rnn": (lambda: Language(nn.RNN), TOKENS, [*gates(1), "out.weight"], ["embed.weight"]),
    "projected": (lambda: nn.LSTM(8, 8, proj_size=4), X, ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"], []),
    "both ways": (lambda: nn.GRU(8, 8, bidirectional=True), X,
                  ["weight_ih_l0", "weight_hh_l0", "weight_ih_l0_reverse", "weight_hh_l0_reverse"], []),
    "cells": (Cells, X, [f"{n}.weight_{w}" for n in "abc" for w in ("ih", "hh")], []),
    "tied": (lambda: Language(nn.GRU, tied=True), TOKENS, gates(1), ["embed.weight"]),
    "attention": (Attends, X, ["mix.in_proj_weight", "mix.out_proj.weight"], ["norm.weight", "norm.bias"]),
    "bilinear": (Pairs, X, ["both.weight"], []),
    "raw": (Raw, X, ["plain", "turned", "sliced", "experts", "summed", "kernel"],
            ["positions", "scale", "gate", "mask_token", "table"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_every_matrix_is_masked_or_named(kind):
    make, example, masked, left_out = MODELS[kind]
    model = make().eval()
    found = find_weights(model, example=example)
    assert sorted(weight.name for weight in found.weights) == sorted(masked)
    assert sorted(one.name for one in found.left_out) == sorted(left_out)
    assert all(one.why and one.params for one in found.left_out)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("kind", MODELS)
def test_zeros_stand_where_they_are_reported(kind):
    make, example, masked, left_out = MODELS[kind]
    model = make().eval()
    result = sc.prune(
        model, example, recipe={"target": {"sparsity": 0.5}, "granularity": "element", "measure": {"latency": False}}
    )
    mine = {name: p for name, p in result.model.named_parameters() if name in masked}
    zeros, asked = sum(int((p == 0).sum()) for p in mine.values()), sum(p.numel() for p in mine.values())
    every = [p for p in result.model.parameters()]
    report = result.report
    assert zeros == report.units.removed
    assert asked == report.units.total
    assert report.model_sparsity == pytest.approx(
        sum(int((p == 0).sum()) for p in every) / sum(p.numel() for p in every)
    )
    assert [one.name for one in report.left_out] == [one.name for one in result.plan.left_out]
    for name in left_out:
        assert name in result.plan.explain()
        assert torch.equal(result.model.get_parameter(name), model.get_parameter(name))
    again = type(result.plan).from_data(json.loads(result.plan.to_json()))
    assert tuple(again.left_out) == tuple(result.plan.left_out)
    assert json.loads(report.to_json())["model_sparsity"] == report.model_sparsity


@pytest.mark.parametrize("granularity", [EMBEDDINGS, {"name": "2:4", "embeddings": True},
                                         {"name": "vector", "embeddings": True}])  # fmt: skip
def test_embeddings_are_masked_where_they_are_asked_for(granularity):
    target = None if granularity["name"] == "2:4" else {"sparsity": 0.5}
    for tied in (False, True):
        plan = sc.plan(Language(nn.GRU, tied=tied), granularity=granularity, target=target or {"sparsity": 0.5})
        assert "embed.weight" in plan.masks
        assert plan.left_out == ()
        again = type(plan).from_data(json.loads(plan.to_json()))
        assert again.request.granularity[0].options["embeddings"] is True


def test_without_an_example_raw_parameters_are_named_as_unknown():
    plan = sc.plan(nn.ModuleDict({"a": nn.Linear(4, 4), "raw": Raw()}), granularity="element", target={"sparsity": 0.5})
    assert list(plan.masks) == ["a.weight"]
    told = {one.name: one for one in plan.left_out}
    assert "example" in told["raw.experts"].hint
    assert told["raw.experts"].wanted
    assert not told["raw.scale"].wanted  # a vector, whatever it is used for


COMPUTED = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight norm": weight_norm,
    "old spectral norm": spectral_norm,
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weights_are_left_out_by_name_and_degrade_the_run(kind):
    model = nn.Sequential(COMPUTED[kind](nn.Linear(8, 8)), nn.Linear(8, 4)).eval()
    result = sc.prune(
        model, X, recipe={"target": {"sparsity": 0.5}, "granularity": "element", "measure": {"latency": False}}
    )
    (one,) = result.plan.left_out
    assert one.name == "0.weight"
    assert one.wanted
    assert "remove_" in one.hint
    assert result.report.exit_code == 7
    assert any("0.weight" in degradation.what for degradation in result.degradations)
    alone = COMPUTED[kind](nn.Linear(8, 8)).eval()
    with pytest.raises(UnsupportedError, match="no weights to mask") as caught:
        sc.plan(alone, granularity="element", target={"sparsity": 0.5})
    assert "remove_" in caught.value.hint


def test_what_was_not_asked_for_does_not_degrade_a_run():
    recipe = {"target": {"sparsity": 0.5}, "granularity": "element", "measure": {"latency": False}}
    result = sc.prune(Language(nn.LSTM), TOKENS, recipe=recipe)
    assert result.report.exit_code == 0
    assert result.report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert result.report.model_sparsity < 0.5
    protected = sc.prune(Language(nn.LSTM), TOKENS, recipe={**recipe, "protect": ["core"]})
    assert protected.report.exit_code == 0
    assert all(one.name == "embed.weight" for one in protected.report.left_out)


def test_stacks_of_matrices_have_single_weights_and_patterns_only():
    plan = sc.plan(Raw(), X, granularity={"name": "vector", "axis": "row"}, target={"sparsity": 0.5})
    assert {"plain", "turned"} <= set(plan.masks)
    told = {one.name: one for one in plan.left_out}
    assert told["experts"].wanted
    assert "element" in told["experts"].hint


def test_patterns_follow_the_input_of_raw_weights():
    model = Raw()
    plan = sc.plan(model, X, granularity="2:4", target={"sparsity": 0.5})
    assert (plan.masks["plain"].view(2, 4, 8).sum(1) == 2).all()  # x @ w: the input is dimension 0
    assert (plan.masks["turned"].view(8, 2, 4).sum(2) == 2).all()  # linear: it is dimension 1
    assert (plan.masks["experts"].view(3, 8, 2, 4).sum(3) == 2).all()


def test_protected_weights_are_named_nowhere():
    found = find_weights(Raw(), ["positions", "table", "gate", "mask_token", "scale"], example=X)
    assert found.left_out == ()


FACTORY = """
import torch
from torch import nn
from torch.nn.utils import parametrizations
def make():
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 4)), torch.zeros(2, 8)
"""


def test_the_command_line_ends_with_7_where_a_part_was_left_out(tmp_path, monkeypatch, capsys):
    (tmp_path / "normed_model.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    sets = ["--set", "granularity=element", "--set", "target={sparsity: 0.5}", "--set", "recover=[]",
            "--set", "criterion=magnitude", "--set", "measure.latency=false"]  # fmt: skip
    code = main.main(["prune", "py:normed_model:make", "--out", str(tmp_path / "out"), *sets])
    told = capsys.readouterr()
    assert code == 7, told.err
    assert "left out: 0.weight" in told.out
    assert "of all weights of the model" in told.out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["left_out"][0]["name"] == "0.weight"
    assert "0.weight" in (tmp_path / "out" / "report.html").read_text()


def test_a_search_that_forgets_recurrent_layers_is_seen(monkeypatch):
    real = finding._weights_of
    monkeypatch.setattr(
        finding,
        "_weights_of",
        lambda module, *, conv1d: iter(()) if isinstance(module, nn.RNNBase) else real(module, conv1d=conv1d),
    )
    model = Language(nn.LSTM)
    # Not masked as a layer, they are still no silent loss: the run shows that they are multiplied.
    assert {w.name for w in find_weights(model, example=TOKENS).weights} >= {"core.weight_ih_l0", "core.weight_hh_l0"}
    assert all(one.wanted for one in find_weights(model).left_out if one.name.startswith("core"))
