"""Examples that are no plain tensors: they reach the model as what they are."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.errors import SecateurError

from .references import Kept, zeroed
from .usages import (
    Mlp,
    data,
    equal,
    in_words,
    pair,
    seeded,
    thirds,
)


class Point(NamedTuple):
    x: Tensor
    scale: float


@dataclasses.dataclass
class Batch:
    x: Tensor
    note: str = "n"


class TakesMany(Mlp):
    def forward(self, batch: Any) -> Tensor:
        x = batch
        if isinstance(batch, (Point, Batch)):
            x = batch.x
        elif isinstance(batch, dict):
            x = batch["x"]
        elif isinstance(batch, nn.utils.rnn.PackedSequence):
            x = batch.data
        elif isinstance(batch, list):
            x = torch.stack(batch)
        elif isinstance(batch, str):
            x = torch.tensor([[float(ord(c)) / 100 for c in batch[:8]]])
        return super().forward(x.float())


KINDS: dict[str, Callable[[int], Any]] = {
    "named tuple": lambda n: (Point(data(n, 8), 1.0),),
    "dataclass": lambda n: (Batch(data(n, 8)),),
    "mapping": lambda n: ({"x": data(n, 8), "names": ["a"] * n, "none": None},),
    "packed": lambda n: (nn.utils.rnn.pack_sequence([data(n, 8), data(1, 8)]),),
    "list": lambda n: ([*data(n, 8)],),
    "words": lambda n: ("abcdefgh" * n,),
    "integers": lambda n: (torch.arange(8 * n).view(n, 8),),
    "booleans": lambda n: (data(n, 8) > 0,),
    "expanded": lambda n: (data(1, 8).expand(n, 8),),
}


@pytest.mark.parametrize("kind", thirds(KINDS))
def test_inputs_of_other_kinds(kind: str) -> None:
    model = seeded(TakesMany)
    truth, cut, _ = pair(model, KINDS[kind](5))
    for n in (5, 3):
        equal(truth(*KINDS[kind](n)), cut(*KINDS[kind](n)))


def test_nested_tensor_of_rows() -> None:
    class Ragged(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.fc3(self.fc2(self.fc1(x).relu()).relu()))

    model = seeded(Ragged)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch.nested.nested_tensor([data(3, 8), data(5, 8)], layout=torch.jagged)
        try:
            plan = sc.plan(model, x, target={"sparsity": 0.3})
            cut = plan.apply(model)
        except SecateurError as error:
            in_words(error)
            return
        equal(zeroed(model, Kept(model, plan))(data(4, 8)), cut(data(4, 8)))
