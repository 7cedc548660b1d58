"""Iterators and streams that a model holds: where they stand before an entry they stand after it, or it is refused."""

from __future__ import annotations

import csv
import io
import itertools
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

import secateur as sc
from secateur.model.moving import _twin

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
NUMBERS = [0.5, 0.25, 2.0, 0.75, 1.5, 3.0, 0.1, 0.2, 0.3, 0.4]
SHARED = iter(NUMBERS)
READ = (lambda self: next(self.kept),)


class Net(nn.Module):
    """Multiplies by what the next of something says."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def read(self):
        return next(self.kept)

    def forward(self, x):
        return self.b(functional.relu(self.a(x))) * float(self.read())


ITERATORS = {
    "a list": lambda: iter(NUMBERS),
    "a tuple": lambda: iter(tuple(NUMBERS)),
    "a range": lambda: iter(range(1, 99)),
    "text": lambda: iter("123456789"),
    "a mapping": lambda: iter({1: 2, 3: 4, 5: 6, 7: 8}),
    "a set": lambda: iter({1, 3, 5, 7}),
    "backwards": lambda: reversed(NUMBERS),
    "a queue": lambda: iter(deque(NUMBERS)),
    "a cycle": lambda: itertools.cycle(NUMBERS[:3]),
    "a cycle of an iterator": lambda: itertools.cycle(iter(NUMBERS[:2])),
    "a count": lambda: itertools.count(1),
    "a chain": lambda: itertools.chain(NUMBERS[:1], iter(NUMBERS[1:])),
    "a slice": lambda: itertools.islice(itertools.count(1), 2, 90, 3),
    "sums": lambda: itertools.accumulate(NUMBERS),
    "a map": lambda: map(abs, iter(NUMBERS)),
    "a filter": lambda: filter(None, iter(NUMBERS)),
    "pairs": lambda: itertools.starmap(pow, zip(NUMBERS, iter(NUMBERS), strict=True)),
    "products": lambda: map(sum, itertools.product((1, 2), (3, 4))),
    "a function": lambda: iter(lambda: 0.5, None),
}


def held(make):
    model = Net().eval()
    model.kept = make()
    return model


@pytest.mark.parametrize("name", ITERATORS)
def test_an_iterator_stays_where_it_is(name):
    """What comes next is what would have come, and the object is the same."""
    model, twin = held(ITERATORS[name]), ITERATORS[name]()
    next(model.kept), next(twin)
    before = model.kept
    plan = sc.plan(model, X, granularity="neuron", target={"sparsity": 0.3})
    cut = plan.apply(model)
    assert plan.cuts
    assert model.kept is before
    assert cut.kept is not before
    ahead = list(itertools.islice(twin, 12))  # more than a cycle is long, which keeps what it has seen
    assert list(itertools.islice(cut.kept, 12)) == ahead
    assert list(itertools.islice(model.kept, 12)) == ahead


def deep(model):
    model.memo = {"deep": [0, iter(NUMBERS)]}
    type(model).read = lambda self: next(self.memo["deep"][1])
    return lambda: model.memo["deep"][1]


def in_an_object(model):
    model.memo = SimpleNamespace(kept=iter(NUMBERS))
    type(model).read = lambda self: next(self.memo.kept)
    return lambda: model.memo.kept


def on_the_class(model):
    type(model).kept = iter(NUMBERS)
    return lambda: type(model).kept


def in_a_closure(model):
    kept = iter(NUMBERS)
    type(model).read = lambda self: next(kept)
    return lambda: kept


def in_the_file(model):
    globals()["SHARED"] = iter(NUMBERS)
    type(model).read = lambda self: next(SHARED)
    return lambda: SHARED


def in_a_queue(model):
    model.memo = deque([iter(NUMBERS)])
    type(model).read = lambda self: next(self.memo[0])
    return lambda: model.memo[0]


@pytest.mark.parametrize("put", [deep, in_an_object, on_the_class, in_a_closure, in_the_file, in_a_queue])
def test_wherever_it_is_held(put):
    model = type("Held", (Net,), {})().eval()
    where = put(model)
    before = where()
    next(before)
    sc.plan(model, X, granularity="neuron", target={"sparsity": 0.3}).apply(model)
    sc.inspect(model, X)
    assert where() is before
    assert next(before) == NUMBERS[1]


def generator():
    yield from NUMBERS


ENDLESS = {"plain": generator, "behind": lambda: map(abs, generator()), "rows": lambda: csv.reader(io.StringIO("1\n2"))}


@pytest.mark.parametrize("make", ENDLESS.values(), ids=ENDLESS)
@pytest.mark.parametrize("entry", [sc.inspect, lambda model, x: sc.plan(model, x, target={"sparsity": 0.3})])
def test_what_cannot_be_moved_back_is_refused_before_it_moves(make, entry):
    model = held(make)
    with pytest.raises(sc.SecateurError, match="kept"):
        entry(model, X)
    first = next(model.kept)
    assert first in (NUMBERS[0], ["1"])


def test_where_nothing_can_be_put_in_its_place_it_is_refused():
    model = held(lambda: (iter(NUMBERS),))
    type(model).read, before = (lambda self: next(self.kept[0])), Net.read
    try:
        with pytest.raises(sc.SecateurError, match="every run moves on"):
            sc.inspect(model, X)
    finally:
        Net.read = before
    assert next(model.kept[0]) == NUMBERS[0]


class Loop:
    """A training loop that runs just now, and has opened a context."""

    def __init__(self, made):
        self.made = made


@pytest.mark.parametrize("place", [lambda made: Loop(made), lambda made: Loop((made,))], ids=["attribute", "tuple"])
def test_a_generator_of_the_loop_around_is_let_be(place):
    model = held(lambda: 0)
    model.loop = place(made := generator())
    first = next(made)
    before, Net.read = Net.read, lambda self: 1
    try:
        sc.inspect(model, X)
    finally:
        Net.read = before
    assert (first, next(made)) == (NUMBERS[0], NUMBERS[1])


@pytest.mark.parametrize("make", [generator, lambda: (n for n in NUMBERS)], ids=["handed on", "loop"])
def test_a_generator_elsewhere_that_a_run_has_moved_is_said(make):
    model = held(lambda: 0)
    model.loop = Loop(make())
    next(model.loop.made)
    before, Net.read = Net.read, lambda self: next(self.loop.made)
    try:
        with pytest.raises(sc.SecateurError, match=r"moved on a generator .*\(.*(generator|genexpr)"):
            sc.inspect(model, X)
    finally:
        Net.read = before


STREAMS = {
    "text": lambda path: io.StringIO("1\n2\n3\n4\n5\n6\n7\n8\n9\n"),
    "bytes": lambda path: io.BytesIO(b"1\n2\n3\n4\n5\n6\n7\n8\n9\n"),
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_is_set_back(name, tmp_path):
    class Reads(Net):
        def read(self):
            line = float(self.kept.readline() or 1)
            at = self.kept.tell()
            self.kept.seek(0, io.SEEK_END)
            self.kept.write("0" if name == "text" else b"0")
            self.kept.seek(at)
            return line

    model = Reads().eval()
    model.kept = STREAMS[name](tmp_path)
    model.kept.readline()
    before, whole = model.kept, model.kept.getvalue()
    sc.plan(model, X, granularity="neuron", target={"sparsity": 0.3}).apply(model)
    assert model.kept is before
    assert (model.kept.tell(), model.kept.getvalue()) == (2, whole)


def test_a_file_is_set_back(tmp_path):
    path = tmp_path / "numbers"
    path.write_text("1\n2\n3\n", "utf-8")
    with path.open(encoding="utf-8") as file:
        type("Reads", (Net,), {"read": lambda self: float(file.readline() or 1)})
        model = type("Reads", (Net,), {"read": lambda self: float(file.readline() or 1)})().eval()
        file.readline()
        sc.inspect(model, X)
        assert file.readline() == "2\n"


def test_twins_share_what_they_share():
    """Two iterators over one behind them stay so."""
    behind = iter(NUMBERS)
    known = {}
    one, other = _twin(map(abs, behind), known), _twin(behind, known)
    assert [next(one), next(other), next(one)] == NUMBERS[:3]
    assert next(behind) == NUMBERS[0]
