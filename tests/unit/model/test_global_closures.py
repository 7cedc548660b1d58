"""What a function of a module remembers, in its closure or in a default, is as before when a run is put back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.model.guard import guard


def remembering() -> tuple[Callable[[int, Callable[[], Tensor]], Tensor], dict[int, Tensor]]:
    entries: dict[int, Tensor] = {}

    def get(key: int, make: Callable[[], Tensor]) -> Tensor:
        if key not in entries:
            entries[key] = make()
        return entries[key]

    return get, entries


in_closure, IN_CLOSURE = remembering()
IN_DEFAULT: dict[int, Tensor] = {}


def in_default(key: int, make: Callable[[], Tensor], entries: dict[int, Tensor] = IN_DEFAULT) -> Tensor:
    if key not in entries:
        entries[key] = make()
    return entries[key]


class Closed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 3)

    def table(self, length: int) -> Tensor:
        return in_closure(length, lambda: self.up.weight.detach().abs().mean(0) * torch.arange(length)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x + self.table(x.shape[1]))))


class Default(Closed):
    def table(self, length: int) -> Tensor:
        return in_default(length, lambda: self.up.weight.detach().abs().mean(0) * torch.arange(length)[:, None])


@pytest.mark.parametrize(("kind", "entries"), [(Closed, IN_CLOSURE), (Default, IN_DEFAULT)])
def test_a_guard_takes_new_entries_away(kind: type[nn.Module], entries: dict[int, Tensor]) -> None:
    model = kind().eval()
    with guard(model, mode="eval"):
        model(torch.randn(2, 4, 6))
        assert list(entries) == [4]
    assert entries == {}


@pytest.mark.parametrize(("kind", "entries"), [(Closed, IN_CLOSURE), (Default, IN_DEFAULT)])
def test_planning_leaves_nothing_made_of_other_weights(kind: type[nn.Module], entries: dict[int, Tensor]) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    with suppress(sc.SecateurError):  # refused or cut: the original is as it was
        sc.plan(model, torch.randn(2, 5, 6), granularity="neuron", target={"sparsity": 0.4}).apply(model)
    assert entries == {}
