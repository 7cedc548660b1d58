"""Chance in a forward is found, told from other reasons, and never called a fault of the cut."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import secateur as sc
from secateur.errors import CertificateError, UnsupportedError
from secateur.model.behaviour import behaviour, unprovable

X = torch.randn(4, 8)


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 3)
        self.own, self.mine = torch.Generator().manual_seed(3), np.random.default_rng(3)
        self.dice = random.Random(3)

    def mid(self, h):
        return h

    def forward(self, x):
        return self.b(self.mid(functional.relu(self.a(x))))


def kind(mid):
    return type("Noisy", (Base,), {"mid": mid})


RANDOM = {
    "dropout": (lambda self, h: functional.dropout(h, 0.5, training=True), "bernoulli_ at"),
    "noise": (lambda self, h: h + 0.1 * torch.randn_like(h), "randn_like at"),
    "sampling": (lambda self, h: torch.bernoulli(torch.sigmoid(h)), "bernoulli at"),
    "permutation": (lambda self, h: h * torch.randperm(h.shape[0])[:, None], "randperm at"),
    "numpy": (lambda self, h: h * np.random.rand(), "generator of numpy"),  # noqa: NPY002
    "python": (lambda self, h: h * random.random(), "generator of random"),
    "held by torch": (lambda self, h: h * torch.rand((), generator=self.own), "rand at"),
    "held of numpy": (lambda self, h: h * self.mine.random(), "model itself (Generator"),
    "held of python": (lambda self, h: h * self.dice.random(), "model itself (Random"),
}
HARMLESS = {
    "nothing": lambda self, h: h,
    "drawn and not used": lambda self, h: h + 0 * torch.rand(()),
    "seeded in the forward": lambda self, h: h + torch.rand(16, generator=torch.Generator().manual_seed(1)),
}


def states(model):
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        str(np.random.get_state()),  # noqa: NPY002
        model.own.get_state().tolist(),
        str(model.mine.bit_generator.state),
        model.dice.getstate(),
    )


@pytest.mark.parametrize("name", RANDOM)
def test_chance_is_found_and_named_with_its_line(name):
    mid, words = RANDOM[name]
    model = kind(mid)().eval()
    before = states(model)
    found = behaviour(model, X)
    assert found.random
    assert not found.restless
    assert any(words in draw for draw in found.draws)
    assert states(model) == before


@pytest.mark.parametrize("name", HARMLESS)
def test_what_does_not_reach_the_output_is_no_chance(name):
    found = behaviour(kind(HARMLESS[name])().eval(), X)
    assert not found.random
    assert not found.restless


def test_a_model_that_never_rests_is_told_from_a_random_one():
    found = behaviour(kind(lambda self, h: h * (1 + time.perf_counter_ns() % 977))().eval(), X)
    assert found.restless
    assert not found.random


def test_dropout_in_eval_mode_draws_nothing():
    assert behaviour(nn.Sequential(nn.Linear(8, 2), nn.Dropout()).train(), X).draws == ()


def test_the_example_stays_as_it_is():
    x = torch.ones(4, 8)
    behaviour(kind(lambda self, h: h)().eval(), x)
    inplace = type("InPlace", (Base,), {"forward": lambda self, x: self.b(self.a(x.mul_(2)))})()
    assert not behaviour(inplace.eval(), x).restless
    assert x.unique().tolist() == [1]


def refusal(model):
    """How a cut is refused; None where it is made and proved. Any other error is none that a user should see."""
    try:
        sc.plan(model, X, target={"sparsity": 0.5}, granularity="neuron").apply(model)
    except UnsupportedError as error:
        return error
    return None


@pytest.mark.parametrize("name", ["dropout", "noise", "sampling", "numpy", "held by torch"])
def test_a_cut_of_a_random_model_is_proved_or_refused_in_words(name):
    model = kind(RANDOM[name][0])().eval()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    error = refusal(model)
    if error is not None:
        assert not isinstance(error, CertificateError)
        assert "random" in error.what
        assert "eval mode" in error.hint
        assert "report" not in error.hint
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_an_operator_that_cannot_take_the_proof_is_no_bug_of_the_model():
    class Codes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.e = nn.Linear(8, 32), nn.Embedding(16, 4)

        def forward(self, x):
            return self.e((torch.sigmoid(self.a(x)) * 15).long()).mean(1)

    error = refusal(Codes().eval())
    assert error is None or "protect" in error.hint.lower() or "locked" in error.why


def test_a_real_disagreement_stays_what_it_is():
    error = CertificateError("differs")
    assert unprovable(error, kind(HARMLESS["nothing"])().eval(), X) is error
    refused = UnsupportedError("else")
    assert unprovable(refused, kind(RANDOM["noise"][0])().eval(), X) is refused
