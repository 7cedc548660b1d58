"""Numbers that a cut changes, and that something hides: each line is named, wherever the number comes from."""

from __future__ import annotations

import bisect
import copy
import fractions
import heapq
import itertools
import math
import random
import sys
from collections import deque
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import secateur as sc
from secateur.kinds.absorbed import Absorbed
from secateur.kinds.hidden import absorbed

Made = Callable[[Tensor, int], object]
SHORT, LONG = torch.randn(2, 8, 6), torch.randn(2, 100, 6)  # 64 or 40 steps bound the second alone
WINDOWS = {64: 50, 40: 30}

# What a number may bound, hidden on eight steps; `n` is 64 before the cut and 40 after it.
HIDDEN: dict[str, Made] = {
    "a slice of a tensor": lambda x, n: x[:, -n:].sum(1),
    "a slice that is written to": lambda x, n: x.clone().index_fill(1, torch.arange(x.shape[1])[n:], 0),
    "a slice of a list": lambda x, n: sum(list(x.unbind(1))[:n]),
    "a slice of text": lambda x, n: len(("x" * x.shape[1])[n:]),
    "an iterator": lambda x, n: sum(itertools.islice(x.unbind(1), n)),
    "a queue": lambda x, n: sum(deque(x.unbind(1), maxlen=n)),
    "a heap": lambda x, n: x[:, heapq.nsmallest(n, range(x.shape[1]))],
    "a search": lambda x, n: bisect.bisect_left(range(x.shape[1]), n),
    "pairs": lambda x, n: sum(v for _, v in zip("x" * n, x.unbind(1), strict=False)),
    "a filter": lambda x, n: list(filter(lambda i: i < n, range(x.shape[1]))),
    "a filter by a method": lambda x, n: list(filter(n.__gt__, range(x.shape[1]))),
    "steps of a range": lambda x, n: [i for i in range(0, x.shape[1], n)],
    "a whole part": lambda x, n: x * (x.shape[1] // n),
    "a rest": lambda x, n: x * (x.shape[1] % n),
    "a rest in a list": lambda x, n: [i % n for i in range(x.shape[1])],
    "a truth as a number": lambda x, n: [i * (i < n) for i in range(x.shape[1])],
    "a minimum": lambda x, n: [min(i, n) for i in range(x.shape[1])],
    "a maximum of fractions": lambda x, n: x * max(1.0, x.shape[1] / n),
    "a rounded fraction": lambda x, n: x * int(x.shape[1] / n),
    "a ceiling": lambda x, n: x * math.ceil(x.shape[1] / n),
    "an absolute value": lambda x, n: x * (abs(x.shape[1] / n - 1) + x.shape[1] / n),
    "NumPy": lambda x, n: x * float(np.maximum(x.shape[1] / n, 1.0)),
    "a fraction": lambda x, n: x * math.floor(fractions.Fraction(x.shape[1], n)),
    "padding of a list": lambda x, n: len([0] * (x.shape[1] - n)),
    "padding of text": lambda x, n: ("x" * 70).ljust(n)[: x.shape[1]],
    "a table": lambda x, n: sum(list(x.unbind(1))[: WINDOWS[n]]),
    "chance": lambda x, n: random.sample(range(200), n)[:0],
    "a band": lambda x, n: torch.ones(x.shape[1], x.shape[1]).tril(n).triu(-n) @ x,
    "pieces": lambda x, n: [p.amax(1) for p in x.split(n, 1)],
    "a window": lambda x, n: functional.avg_pool1d(x.mT, 2 * n + 1, 1, n, count_include_pad=False),
    # Other dimensions than the bounded one are as large as the number, or larger.
    "pieces as long as there are units": lambda x, n: x.new_zeros(2, 8, n).split(n, 1),
    "pieces of a large batch": lambda x, n: x.new_zeros(100, 8, 6).split(n, dim=1),
    "chunks of a large batch": lambda x, n: x.new_zeros(100, 8, 6).chunk(n, dim=-2),
    "parts of a large batch": lambda x, n: torch.tensor_split(x.new_zeros(100, 8, 6), (n, n + 1), 1),
    "a band in a large batch": lambda x, n: x.new_ones(100, 8, 8).triu(-n),
    "a band of functions": lambda x, n: torch.tril(input=x.new_ones(100, 8, 8), diagonal=n),
    "a window over units": lambda x, n: functional.max_pool1d(x.new_zeros(2, n, 8), 2 * n + 1, 1, n),
    "a window as long as there are units": lambda x, n: functional.avg_pool1d(
        functional.pad(x.new_zeros(2, n, 8), (n - 1, 0)), n, 1
    ),
    "steps of a window": lambda x, n: functional.pad(x.new_zeros(2, 8, n), (0, 0, n - 1, 0)).unfold(1, n, 1),
    "a table of which the start is used": lambda x, n: x * x.new_zeros(70)[n:].sum(),
    "a table that is written to": lambda x, n: x.new_zeros(70).__setitem__(slice(n, None), 1.0),
    "diagonals of a large batch": lambda x, n: x.new_ones(100, 8, 8).diagonal(n, -2, dim2=-1),
}
# What shows by itself, or is meant to follow.
OPEN: dict[str, Made] = {
    "a size": lambda x, n: x.new_zeros(n, 6)[: n // 2],
    "a bound that is reached": lambda x, n: x.new_zeros(n, 6)[: n - 3],
    "all there is": lambda x, n: list(range(n))[:n],
    "all units in one piece": lambda x, n: x.new_zeros(2, 8, n).split(n, -1),
    "a window over all units": lambda x, n: x.new_zeros(2, 8, n).unfold(-1, n, 1),
    "units in two pieces": lambda x, n: x.new_zeros(2 * n, 8).split(n),
    "a ratio": lambda x, n: x * ((2 * n) // n),
    "a scale": lambda x, n: x * n**-0.5 / math.sqrt(n),
    "a loop": lambda x, n: [x * i for i in range(n)],
    "a test": lambda x, n: x if x.shape[1] < n else -x,  # a decision: those are watched by other means
    "a number of something else": lambda x, n: sum(list(x.unbind(1))[:70]),
}


# fmt: off
def when_long(x: Tensor, n: int) -> Tensor:
    if x.shape[1] > 1000: x = x * (x.shape[1] // n)  # noqa: E701 - both sides in one line
    return x


def when_short(x: Tensor, n: int) -> Tensor:
    if x.shape[1] < 1000: x = x * (x.shape[1] // n)  # noqa: E701
    return x
# fmt: on


# What stands in a line that runs, on a side that is not taken; and the same on one that is.
UNTAKEN: dict[str, Made] = {
    "a choice": lambda x, n: x * (x.shape[1] // n) if x.shape[1] > 1000 else x,
    "the other choice": lambda x, n: x if x.shape[1] < 1000 else x * (x.shape[1] // n),
    "a choice in a choice": lambda x, n: (x * (x.shape[1] // n) if n > 1000 else x) if x.shape[1] < 1000 else x,
    "an end of and": lambda x, n: x.shape[1] > 1000 and x * (x.shape[1] // n),
    "an end of or": lambda x, n: x.shape[1] < 1000 or x * (x.shape[1] // n),
    "not": lambda x, n: x if not (x.shape[1] > 1000 and n > 1) else x * (x.shape[1] // n),
    "nothing there": lambda x, n: x * (x.shape[1] // n) if x is None else x,
    "an empty list": lambda x, n: x * (x.shape[1] // n) if [] else x,
    "a statement": when_long,
}
TAKEN: dict[str, Made] = {
    "a choice": lambda x, n: x * (x.shape[1] // n) if x.shape[1] < 1000 else x,
    "an end of and": lambda x, n: x.shape[1] < 1000 and x * (x.shape[1] // n),
    "a test of data": lambda x, n: x * (x.shape[1] // n) if bool((x == x).all()) else x,
    "a statement": when_short,
}


def said(made: Made) -> list[str]:
    runs = []
    for n in (64, 40):
        watch = Absorbed()
        with watch.watching():
            made(SHORT, n)
        runs.append(watch)
    return list(absorbed(*runs))


@pytest.mark.parametrize("name", HIDDEN)
def test_a_number_that_is_hidden_is_named_with_its_line(name: str) -> None:
    found = said(HIDDEN[name])
    assert found
    assert all("structure/test_absorbed.py:" in line for line in found)


@pytest.mark.parametrize("name", OPEN)
def test_a_number_that_shows_or_follows_is_not(name: str) -> None:
    assert not said(OPEN[name])


@pytest.mark.parametrize("name", UNTAKEN)
def test_a_side_that_is_not_taken_is_not_named(name: str) -> None:
    assert not said(UNTAKEN[name])


@pytest.mark.parametrize("name", TAKEN)
def test_one_that_is_taken_is(name: str) -> None:
    assert said(TAKEN[name])


def test_a_function_that_is_handed_the_number_is_looked_at() -> None:
    def inner(frames: list[Tensor], most: int) -> Tensor:
        return torch.stack(frames[:most])

    assert len(said(lambda x, n: inner(list(x.unbind(1)), most=n))) == 1


def test_nothing_of_the_watch_is_left() -> None:
    before, seen = sys.gettrace(), len(said(lambda x, n: x))
    assert (sys.gettrace(), seen) == (before, 0)


class Hidden(nn.Module):
    """A width that is cut, and a bound that is that very number: no arithmetic makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        width = h.shape[-1]
        return self.b(h) + sum(list(x.unbind(1))[:width]).unsqueeze(1)


class Pieces(Hidden):
    """Steps in pieces that are as long as there are units: the largest size of the tensor is the number itself."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return self.b(torch.cat([piece - piece.mean(1, keepdim=True) for piece in h.split(h.shape[-1], 1)], 1))


class Block(nn.Module):
    """Its input, and something of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


class Deep(nn.Module):
    """Blocks, and a bound made of how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for block in self.blocks:
            y = block(y)
        return y + sum(deque(x.unbind(1), maxlen=20 * len(self.blocks))).unsqueeze(1)


@pytest.mark.parametrize(("make", "asked", "bound"), [
    (Hidden, {"granularity": "channel", "remove": {"a": [1, 2, 3, 5, 7, 11]}}, "[:width]"),
    (Pieces, {"granularity": "channel", "remove": {"a": [1, 2, 3, 5, 7, 11]}}, "16 becomes 10, in `split`"),
    (Deep, {"granularity": "layer", "target": {"count": 2}}, "deque(x.unbind(1)"),
], ids=["channels", "pieces", "layers"])  # fmt: skip
def test_the_certificate_names_the_line(make: type[nn.Module], asked: dict[str, object], bound: str) -> None:
    torch.manual_seed(0)
    model = make().eval()
    plan = sc.plan(model, SHORT, **asked)
    cut = plan.apply(model)
    assert plan.certificate is not None
    assert any(bound in note and "test_absorbed.py" in note for note in plan.certificate.notes)
    absent = copy.deepcopy(model)
    with torch.no_grad():
        if isinstance(absent, Hidden):
            absent.b.weight[:, asked["remove"]["a"]] = 0  # type: ignore[index]
        else:
            there = [block.inner.weight for block in cut.blocks]
            for block in absent.blocks:
                if not any(torch.equal(block.inner.weight, weight) for weight in there):
                    for parameter in block.parameters():
                        parameter.zero_()
        differ = [float((absent(x) - cut(x)).abs().max()) for x in (SHORT, LONG)]
    assert differ[0] < 1e-5
    assert differ[1] > 1e-3, "else there would be nothing to name"
