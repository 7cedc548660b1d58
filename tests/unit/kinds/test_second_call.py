"""A forward that leaves something behind may answer otherwise the next time: the proof asks it twice."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.kinds.answers import answer
from secateur.model.guard import guard


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 24), nn.Linear(24, 4)

    def mid(self, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.mid(self.fc1(x).relu()))


class ByAttribute(Net):
    calls = 0

    def mid(self, h: Tensor) -> Tensor:
        self.calls += 1
        return h if self.calls % 2 else h.flip(1)


class ByBuffer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def mid(self, h: Tensor) -> Tensor:
        self.calls += 1
        return torch.where(self.calls > 1, h * torch.linspace(0, 1, 24)[: h.shape[1]], h)


class ByList(Net):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def mid(self, h: Tensor) -> Tensor:
        self.seen.append(h.shape[0])
        return h if len(self.seen) == 1 else h.flip(1)


class ByQueue(ByList):
    def __init__(self) -> None:
        super().__init__()
        self.seen = deque(maxlen=3)  # type: ignore[assignment]


class ByMapping(Net):
    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Tensor] = {}

    def mid(self, h: Tensor) -> Tensor:
        last, self.kept["h"] = self.kept.get("h"), h
        return h if last is None else h + last.roll(1, 1)


class Remembers(Net):
    """Its last answer is part of the next: alike in a cut model, whose answers are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.last: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        before, self.last[:] = list(self.last), [y]
        return y + sum(before)


STATEFUL = [ByAttribute, ByBuffer, ByList, ByQueue, ByMapping]


@pytest.mark.parametrize("kind", STATEFUL)
def test_a_cut_that_is_right_in_the_first_call_only_is_not_made(kind: type[Net]) -> None:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(5, 8)
    with pytest.raises(sc.SecateurError):
        sc.plan(model, x, target={"sparsity": 0.3}, criterion="random").apply(model)


def test_state_that_carries_what_is_kept_is_proved_over_two_calls() -> None:
    torch.manual_seed(0)
    model, x = Remembers().eval(), torch.randn(5, 8)
    plan = sc.plan(model, x, target={"sparsity": 0.3}, criterion="random")
    cut = plan.apply(model)
    assert (model.last, cut.last) == ([], [])
    assert len(answer(model, x).tensors) == 2
    first, second = cut(x), cut(x)
    torch.testing.assert_close(second, 2 * first)


def test_one_call_is_enough_where_nothing_is_left_behind() -> None:
    assert len(answer(Net().eval(), torch.randn(5, 8)).tensors) == 1
    assert len(answer(nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6)), torch.randn(5, 8), "train").tensors) == 1


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).tanh()


class Numbered(nn.Module):
    """Every block adds what the block with its number gave in the last call."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(5))
        self.kept: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x) + 0.5 * self.kept.get(i, 0)
            self.kept[i] = x
        return x


def test_blocks_with_a_memory_by_number_are_asked_twice_too() -> None:
    torch.manual_seed(0)
    model, x = Numbered().eval(), torch.randn(3, 8)
    with pytest.raises(sc.SecateurError):
        sc.plan(model, x, granularity="layer", target={"sparsity": 0.4}).apply(model)
    assert model.kept == {}


@pytest.mark.parametrize("kind", [Net, *STATEFUL, Remembers])
def test_a_guard_knows_whether_something_was_left_behind(kind: type[Net]) -> None:
    model, x = kind().eval(), torch.randn(5, 8)
    with guard(model, mode="eval", gradients=False, example=x) as state:
        assert not state.moved()
        model(x)
        assert state.moved() == (kind is not Net)
    with guard(model, mode="eval", gradients=False, example=x) as state:
        assert not state.moved()


def test_a_written_example_is_no_state_of_the_model() -> None:
    model, x = Net().eval(), torch.randn(5, 8)
    with guard(model, mode="eval", gradients=False, example=x) as state:
        x.add_(1)
        assert not state.moved()
