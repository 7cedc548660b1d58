"""Arguments as they are got wrong: they work, or they are refused in words."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.errors import SecateurError

from .harness import snapshot
from .usages import (
    Convnet,
    Mlp,
    data,
    in_words,
    seeded,
    thirds,
)

WRONG_ARGUMENTS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "all units": lambda m, x: sc.plan(m, x, remove={"fc1": list(range(24))}),
    "twice": lambda m, x: sc.plan(m, x, remove={"fc1": [1, 1, 2]}),
    "negative": lambda m, x: sc.plan(m, x, remove={"fc1": [-1]}),
    "out of range": lambda m, x: sc.plan(m, x, remove={"fc1": [24]}),
    "floats": lambda m, x: sc.plan(m, x, remove={"fc1": [1.5]}),
    "booleans": lambda m, x: sc.plan(m, x, remove={"fc1": [True, False]}),
    "tensor of numbers": lambda m, x: sc.plan(m, x, remove={"fc1": torch.tensor([1, 2])}),
    "boolean tensor": lambda m, x: sc.plan(m, x, remove={"fc1": torch.ones(24, dtype=torch.bool)}),
    "unknown group": lambda m, x: sc.plan(m, x, remove={"fc9": [1]}),
    "locked group": lambda m, x: sc.plan(m, x, remove={"fc3": [1]}),
    "keep of another size": lambda m, x: sc.plan(m, x, keep={"fc1": torch.ones(7, dtype=torch.bool)}),
    "keep of integers": lambda m, x: sc.plan(m, x, keep={"fc1": torch.arange(24)}),
    "keep nothing": lambda m, x: sc.plan(m, x, keep={"fc1": torch.zeros(24, dtype=torch.bool)}),
    "keep as a list": lambda m, x: sc.plan(m, x, keep={"fc1": [True] * 20 + [False] * 4}),
    "scores not finite": lambda m, x: sc.plan(
        m, x, scores={"fc1": torch.full((24,), float("nan"))}, target={"sparsity": 0.2}
    ),
    "scores of another size": lambda m, x: sc.plan(m, x, scores={"fc1": torch.rand(3)}, target={"sparsity": 0.2}),
    "scores complex": lambda m, x: sc.plan(m, x, scores={"fc1": torch.rand(24) + 1j}, target={"sparsity": 0.2}),
    "scores on meta": lambda m, x: sc.plan(
        m, x, scores={"fc1": torch.rand(24, device="meta")}, target={"sparsity": 0.2}
    ),
    "scores as a list": lambda m, x: sc.plan(m, x, scores={"fc1": [1.0] * 24}, target={"sparsity": 0.2}),
    "keep and target": lambda m, x: sc.plan(m, x, keep={"fc1": torch.arange(24) > 3}, target={"sparsity": 0.2}),
    "no examples": lambda m, x: sc.plan(m, examples=[], target={"sparsity": 0.2}),
    "example of another kind": lambda m, x: sc.plan(m, examples=[x, {"y": x}], target={"sparsity": 0.2}),
    "example empty": lambda m, x: sc.plan(m, x[:0], target={"sparsity": 0.2}).apply(m),
    "example on meta": lambda m, x: sc.plan(m, x.to("meta"), target={"sparsity": 0.2}).apply(m),
    "example not finite": lambda m, x: sc.plan(m, x * float("nan"), target={"sparsity": 0.2}).apply(m),
    "example of another dtype": lambda m, x: sc.plan(m, x.double(), target={"sparsity": 0.2}).apply(m),
    "example a shape": lambda m, x: sc.plan(m, tuple(x.shape), target={"sparsity": 0.2}),
    "example an array": lambda m, x: sc.plan(m, x.numpy(), target={"sparsity": 0.2}),
    "model on meta": lambda m, x: sc.plan(m.to("meta"), x.to("meta"), target={"sparsity": 0.2}).apply(m),
    "model scripted": lambda m, x: sc.plan(torch.jit.script(m), x, target={"sparsity": 0.2}),
    "model traced": lambda m, x: sc.plan(torch.jit.trace(m, x), x, target={"sparsity": 0.2}),
    "model compiled": lambda m, x: sc.plan(torch.compile(m, backend="eager"), x, target={"sparsity": 0.2}).apply(m),
    "model a function": lambda m, x: sc.plan(m.forward, x, target={"sparsity": 0.2}),
    "model a class": lambda m, x: sc.plan(type(m), x, target={"sparsity": 0.2}),
    "model exported": lambda m, x: sc.plan(torch.export.export(m, (x,)).module(), x, target={"sparsity": 0.2}),
    "applied to another": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}).apply(seeded(Convnet)),
    "applied to nothing": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}).apply(None),
    "applied to its result": lambda m, x: (lambda p: p.apply(p.apply(m)))(sc.plan(m, x, target={"sparsity": 0.2})),
    "optimizer not in place": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}).apply(
        m, optimizer=torch.optim.SGD(m.parameters(), 0.1)
    ),
    "optimizer of another": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}).apply(
        m, inplace=True, optimizer=torch.optim.SGD(seeded(Mlp).parameters(), 0.1)
    ),
    "then itself": lambda m, x: (lambda p: p.then(p, m))(sc.plan(m, x, target={"sparsity": 0.2})),
    "then of another": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}).then(
        sc.plan(seeded(Convnet), data(2, 3, 8, 8), target={"sparsity": 0.2}), m
    ),
    "sparsity of one": lambda m, x: sc.plan(m, x, target={"sparsity": 1.0}),
    "sparsity of nothing": lambda m, x: sc.plan(m, x, target={"sparsity": float("nan")}),
    "sparsity negative": lambda m, x: sc.plan(m, x, target={"sparsity": -0.1}),
    "sparsity a tensor": lambda m, x: sc.plan(m, x, target={"sparsity": torch.tensor(0.2)}),
    "round to nought": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}, round_to=0),
    "round to a word": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}, round_to="yes"),
    "protect modules": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}, protect=[m.fc1]),
    "protect one word": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}, protect="fc1"),
    "seed a float": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}, seed=1.5),
    "tolerance negative": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}, tolerance=-1.0).apply(m),
    "tolerance a word": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}, tolerance="small").apply(m),
    "dtype of torch": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}, dtype=torch.float64).apply(m),
    "granularity nothing": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}, granularity=[]),
    "granularity mixed": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}, granularity=["neuron", "element"]),
    "granularity twice": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}, granularity=["neuron", "neuron"]),
    "scales a word": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}, scales="drop"),
    "masks of a buffer": lambda m, x: sc.plan(m, masks={"fc9.weight": torch.ones(2, dtype=torch.bool)}),
    "masks of floats": lambda m, x: sc.plan(m, masks={"fc1.weight": torch.ones(24, 8)}),
    "mask model of floats": lambda m, x: sc.mask_model(m, {"fc1.weight": torch.ones(24, 8)}),
    "criterion a function": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}, criterion=lambda w: w.abs()),
    "data exhausted": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}, criterion="taylor", data=iter([(x, x)])),
    "data empty": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}, criterion="taylor", data=[]),
    "labels too large": lambda m, x: sc.plan(
        m, x, target={"sparsity": 0.2}, criterion="taylor", data=[(x, torch.full((5,), 9))]
    ),
}


@pytest.mark.parametrize("name", thirds(WRONG_ARGUMENTS))
def test_arguments(name: str) -> None:
    """It works, or it is an error of the library with words; the model is never changed."""
    model, x = seeded(Mlp), data(5, 8)
    before = snapshot(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            WRONG_ARGUMENTS[name](model, x)
    except SecateurError as error:
        in_words(error)
    if name not in ("model on meta", "optimizer of another", "model scripted", "model compiled"):
        assert snapshot(model) == before
