"""Whatever a forward keeps, wherever it keeps it, every entry gives it back: a table of states and entries."""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import sys
import threading
from argparse import Namespace
from array import array
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from contextvars import ContextVar
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import secateur as sc
from secateur.measure import latency, macs
from secateur.model import containers, memory, state
from secateur.model.guard import evaluating, guard

TOTAL, LOG, SEEN = 0, [], torch.zeros(2)


class Net(nn.Module):
    """`touch` runs in the forward and changes what `make` has made; `fails` raises after it."""

    fails = False

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def touch(self, x):
        pass

    def forward(self, x):
        self.touch(x)
        if self.fails:
            raise RuntimeError("the forward fails")
        return self.b(functional.relu(self.a(x)))


@dataclass
class Record:
    calls: int = 0
    seen: list = field(default_factory=list)


class Slots:
    __slots__ = ("calls", "deep")

    def __init__(self):
        self.calls, self.deep = 0, {"n": [0]}


class Journal(list):
    def append(self, value):
        super().append(("entry", value))


def attribute(value, touch, read=None):
    """A state in `self.kept`."""

    def make():
        model = type("Kept", (Net,), {"touch": touch})()
        model.kept = value()
        return model, (lambda: (read or plain)(model.kept))

    return make


def plain(value):
    """A value as something that can be compared, bit for bit."""
    if isinstance(value, torch.Tensor):
        return value.detach().view(-1).view(torch.uint8).tolist() if value.numel() else []
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, (dict, UserDict)):
        return [(key, plain(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple, deque)):
        return [plain(item) for item in value]
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return str(value.get_state(legacy=False))
    if isinstance(value, Slots):
        return (value.calls, plain(value.deep))
    if isinstance(value, (bytearray, array)):
        return bytes(value)
    return sorted(value) if isinstance(value, set) else str(value) if hasattr(value, "__dict__") else value


def put(model, x):
    model.kept = model.kept + 1


def buffer():
    model = type("Buffered", (Net,), {"touch": lambda self, x: self.steps.add_(1)})()
    model.register_buffer("steps", torch.zeros(3))
    return model, lambda: plain(model.steps)


def replaced():
    model = type("Replaced", (Net,), {"touch": lambda self, x: setattr(self, "steps", self.steps + x.sum())})()
    model.register_buffer("steps", torch.zeros(()))
    first = model.steps
    return model, lambda: (model.steps is first, plain(model.steps))


def new_attribute():
    model = type("Grows", (Net,), {"touch": lambda self, x: setattr(self, "late", x)})()
    return model, lambda: hasattr(model, "late")


def new_buffer():
    def touch(self, x):
        self.register_buffer("late", x.sum())

    model = type("Registers", (Net,), {"touch": touch})()
    return model, lambda: sorted(model._buffers)


def closure():
    total, log, kept = 0, [], torch.zeros(2)

    def hook(module, args, out):
        nonlocal total
        total += 1
        log.append(out)
        kept.add_(1)

    model = Net()
    model.a.register_forward_hook(hook)
    return model, lambda: (total, len(log), plain(kept))


def bound():
    record = Record()

    class Watcher:
        def __init__(self):
            self.record, self.calls = record, 0

        def __call__(self, module, args):
            self.calls += 1
            record.seen.append(args[0].sum())

    watcher = Watcher()
    model = Net()
    model.register_forward_pre_hook(watcher)
    return model, lambda: (watcher.calls, len(record.seen))


def curried():
    log = []
    model = Net()
    model.a.register_forward_hook(functools.partial(lambda log, *_: log.append(1), log))
    return model, lambda: len(log)


def patched():
    calls = []
    model = Net()
    inner = model.b.forward
    model.b.forward = lambda x: calls.append(1) or inner(x)
    return model, lambda: len(calls)


def of_the_class():
    class Counted(Net):
        calls, log = 0, []

        def touch(self, x):
            type(self).calls += 1
            self.log.append(1)

    model = Counted()
    return model, lambda: (Counted.calls, len(Counted.log))


def of_the_module():
    def touch(self, x):
        global TOTAL
        TOTAL += 1
        remember(x)

    model = type("Global", (Net,), {"touch": touch})()
    return model, lambda: (TOTAL, len(LOG), plain(SEEN))


def remember(x):
    LOG.append(x)
    SEEN.add_(1)


@functools.cache
def remembered(number):
    return [number]


ANSWERED, LOCAL = ContextVar("answered"), threading.local()
LEVEL = ContextVar("level", default=0)


def answers():
    """Functions that remember what they were asked, whatever it was made of."""
    remembered.cache_clear()
    model = type("Asks", (Net,), {"touch": lambda self, x: remembered(len(x))})()
    return model, lambda: remembered.cache_info().currsize


def of_the_context():
    """A container that the forward puts there is emptied, as Python unsets nothing."""

    def touch(self, x):
        held = ANSWERED.get(None)
        if held is None:
            held = {}
            ANSWERED.set(held)
        held[len(x)] = x
        LEVEL.set(LEVEL.get() + 1)

    ANSWERED.set({})
    return type("Keeps", (Net,), {"touch": touch})(), lambda: (list(ANSWERED.get()), LEVEL.get())


def of_the_thread():
    def touch(self, x):
        LOCAL.__dict__.setdefault("seen", []).append(1)
        LOCAL.last = len(x)

    vars(LOCAL).clear()
    return type("Threads", (Net,), {"touch": touch})(), lambda: copy.deepcopy(vars(LOCAL))


def default():
    def touch(self, x, seen=[]):  # noqa: B006
        seen.append(1)

    model = type("Default", (Net,), {"touch": touch})()
    return model, lambda: len(touch.__defaults__[0])


def aside():
    norm = nn.BatchNorm1d(8)
    model = type("Aside", (Net,), {"touch": lambda self, x: self.held[0].running_mean.add_(1)})()
    model.held = [norm]
    return model, lambda: plain(norm.running_mean)


def gradient():
    def touch(self, x):
        self.a.weight.grad = torch.ones(16, 8)

    model = type("Grad", (Net,), {"touch": touch})()
    model.a.weight.grad = torch.full((16, 8), 3.0)
    first = model.a.weight.grad
    return model, lambda: (model.a.weight.grad is first, plain(first))


def generators():
    def touch(self, x):
        torch.rand(2), random.random(), np.random.rand()  # noqa: NPY002

    model = type("Draws", (Net,), {"touch": touch})()
    return model, lambda: (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()))  # noqa: NPY002


def frozen():
    def touch(self, x):
        self.training = True
        self.a.weight.requires_grad_(False)

    model = type("Frozen", (Net,), {"touch": touch})()
    return model, lambda: ([m.training for m in model.modules()], model.a.weight.requires_grad)


def call(name, *args):
    return lambda self, x: getattr(self.kept, name)(*args)


STATES = {
    "number": attribute(lambda: 0, put),
    "text": attribute(lambda: "", lambda self, x: setattr(self, "kept", self.kept + "x")),
    "list": attribute(list, call("append", 1)),
    "nested": attribute(lambda: {"seen": [], "deep": ({"n": [0]},)}, lambda self, x: self.kept["seen"].append(x)),
    "deque": attribute(lambda: deque([1, 2], 2), call("append", 3)),
    "set": attribute(set, lambda self, x: self.kept.add(len(self.kept))),
    "ordered": attribute(lambda: OrderedDict(a=1, b=2), call("move_to_end", "a")),
    "default dict": attribute(lambda: defaultdict(list), lambda self, x: self.kept["x"].append(1)),
    "counter": attribute(Counter, lambda self, x: self.kept.update("a")),
    "list of a class": attribute(Journal, call("append", 1)),
    "user dict": attribute(lambda: UserDict(a=[]), lambda self, x: self.kept["a"].append(1)),
    "bytes": attribute(bytearray, call("append", 1)),
    "array": attribute(lambda: array("d", [0.0]), lambda self, x: self.kept.__setitem__(0, self.kept[0] + 1)),
    "numpy": attribute(lambda: np.zeros(3), lambda self, x: self.kept.__iadd__(1)),
    "tensor": attribute(lambda: torch.zeros(3), lambda self, x: self.kept.add_(1)),
    "tensor resized": attribute(lambda: torch.zeros(3), lambda self, x: self.kept.resize_(7)),
    "tensors in a list": attribute(lambda: [torch.zeros(3)], lambda self, x: self.kept[0].add_(1)),
    "cache": attribute(lambda: None, lambda self, x: setattr(self, "kept", x.mean())),
    "object": attribute(Record, lambda self, x: (setattr(self.kept, "calls", self.kept.calls + 1),
                                                 self.kept.seen.append(1))),
    "options": attribute(lambda: Namespace(calls=0, seen=[]), lambda self, x: (setattr(self.kept, "calls", 1),
                                                                               self.kept.seen.append(1))),
    "slots": attribute(Slots, lambda self, x: (setattr(self.kept, "calls", 9), self.kept.deep["n"].append(1))),
    "generator of torch": attribute(torch.Generator, lambda self, x: torch.rand(2, generator=self.kept)),
    "generator of python": attribute(lambda: random.Random(1), call("random")),
    "generator of numpy": attribute(lambda: np.random.default_rng(1), call("random")),
    "old generator of numpy": attribute(lambda: np.random.RandomState(1), call("rand")),
    "buffer": buffer, "replaced buffer": replaced, "new attribute": new_attribute, "new buffer": new_buffer,
    "closure": closure, "hook object": bound, "partial": curried, "patched forward": patched,
    "class": of_the_class, "module": of_the_module, "default argument": default, "module in a list": aside,
    "gradient": gradient, "generators": generators, "flags": frozen,
    "remembered answers": answers, "context": of_the_context, "thread": of_the_thread,
}  # fmt: skip
CUT = {"granularity": "neuron", "target": {"sparsity": 0.5}}
RECIPE = {**CUT, "recover": [], "measure": {"rounds": 1}}
ENTRIES = {
    "guard": lambda model, x: _in_guard(model, x, 1),
    "guard, twice": lambda model, x: _in_guard(model, x, 2),
    "inspect": lambda model, x: sc.inspect(model, x),
    "score": lambda model, x: sc.score(model, x, criterion="wanda", granularity="element", data=[x]),
    "plan and apply": lambda model, x: sc.plan(model, x, **CUT).apply(model),
    "prune": lambda model, x: sc.prune(model, x, recipe=RECIPE),
    "estimate": lambda model, x: sc.estimate(model, x, recipe=RECIPE),
    "latency": lambda model, x: latency({"a": model}, x, rounds=2, warmup=1),
    "macs": macs,
}


def _in_guard(model, x, times):
    with evaluating(model, example=x):
        for _ in range(times):
            model(x)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("fails", [False, True], ids=["ends well", "fails"])
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("kind", STATES)
def test_state_comes_back(kind, entry, fails):
    torch.manual_seed(0)
    model, read = STATES[kind]()
    model.fails = fails
    x = torch.randn(4, 8)
    before, weights = read(), {name: plain(p) for name, p in model.named_parameters()}
    # Some of these states cannot be proved or fail on purpose: what was lent is given back in any case.
    with contextlib.suppress(sc.SecateurError, RuntimeError):
        ENTRIES[entry](model, x)
    assert read() == before
    assert {name: plain(p) for name, p in model.named_parameters()} == weights


@pytest.mark.parametrize("kind", STATES)
def test_every_state_of_the_table_really_changes(kind):
    """Else the test above would pass with nothing put back."""
    model, read = STATES[kind]()
    before = read()
    with guard(), torch.random.fork_rng(devices=[]):
        model(torch.randn(4, 8))
        after = read()
    if kind not in ("generators",):
        assert after != before


WRITES = {
    "in place": lambda self, x: self.a.weight.mul_(0.9),
    "by data": lambda self, x: self.a.weight.data.clamp_(-0.01, 0.01),
    "a row": lambda self, x: self.a.weight[0].zero_(),
    "out": lambda self, x: torch.add(self.a.bias, 1, out=self.a.bias.data),
}


@pytest.mark.parametrize("entry", ["inspect", "plan and apply", "prune", "estimate", "macs"])
@pytest.mark.parametrize("kind", WRITES)
def test_weights_that_a_forward_writes_to_come_back(kind, entry):
    model = type("Writes", (Net,), {"touch": WRITES[kind]})().eval()
    before = {name: plain(p) for name, p in model.named_parameters()}
    with pytest.raises(sc.SecateurError) as caught:
        ENTRIES[entry](model, torch.randn(4, 8))
    assert {name: plain(p) for name, p in model.named_parameters()} == before
    if "Nothing of Writes can be cut" not in caught.value.what:  # a row that is picked by number locks all else
        assert "writes to its own weight 'a." in caught.value.what
        assert "test_state.py" in caught.value.what
        assert "outside of the forward" in caught.value.hint


INPUTS = {
    "tensor": (lambda: torch.ones(4, 8), lambda self, x: x.mul_(2)),
    "list": (lambda: ([torch.ones(4, 8)],), lambda self, x: x[0].mul_(2)),
    "mapping": (lambda: ({"x": torch.ones(4, 8), "more": 1},), lambda self, x: (x.pop("more", 0), x["x"].add_(1))),
}


class Takes(Net):
    def forward(self, x):
        self.touch(x)
        x = x["x"] if isinstance(x, dict) else x[0] if isinstance(x, list) else x
        return self.b(functional.relu(self.a(x)))


@pytest.mark.parametrize("entry", [name for name in ENTRIES if name not in ("score", "guard", "guard, twice")])
@pytest.mark.parametrize("kind", INPUTS)
def test_the_example_comes_back_and_is_no_reason_to_refuse(kind, entry):
    make, touch = INPUTS[kind]
    model, example = type("Writes", (Takes,), {"touch": touch})().eval(), make()
    ENTRIES[entry](model, example)
    assert plain(example) == plain(make())


FAULTS = {
    "cells are not put back": ("_refill_cell", lambda cell, value: None, "closure"),
    "classes are not put back": ("_refill_class", lambda kind, before: None, "class"),
    "arrays are not put back": ("undo_array", lambda value: lambda: None, "numpy"),
    "held generators are not put back": ("undo_random", lambda value: lambda: None, "generator of torch"),
    "answers are not forgotten": ("undo_answers", lambda value: lambda: None, "remembered answers"),
    "the context is not put back": ("undo_variable", lambda value: lambda: None, "context"),
    "slots are not put back": ("_refill_slot", lambda owner, name, value: None, "slots"),
    "mappings are not put back": ("refill", lambda live, before: None, "number"),
    "values are not compared": ("_same_bits", lambda a, b: True, "buffer"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_guard_that_forgets_is_seen(fault, monkeypatch):
    name, wrong, kind = FAULTS[fault]
    for module in (state, containers, memory):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, wrong)
    with pytest.raises(AssertionError):
        test_state_comes_back(kind, "guard", fails=False)


def test_a_variable_of_the_context_that_was_unset_is_emptied_or_has_its_default():
    fresh, level = ContextVar("fresh"), ContextVar("level", default=3)

    def run(x):
        fresh.set({1: x})
        level.set(7)
        return x

    model = Net()
    model.run = run
    with guard(model):
        model.run(1)
    assert (fresh.get(), level.get()) == ({}, 3)


def test_what_hooks_of_this_package_collect_stays():
    from secateur.statistics.activations.input_norms import input_norms

    layer = nn.Linear(2, 1).eval()
    found = input_norms(layer, [torch.tensor([[3.0, 0.0]]), torch.tensor([[4.0, 1.0]])], ["weight"])
    assert found["weight"].norm.flatten().tolist() == [5.0, 1.0]


def test_modules_of_python_are_not_walked():
    model = Net()
    model.log, model.system, model.gate = sys.stdout, sys, functools
    before = dict(vars(sys))
    with guard(model):
        sys.secateur_probe = 1
    try:
        assert sys.secateur_probe == 1
    finally:
        del sys.secateur_probe
    assert dict(vars(sys)).keys() == before.keys()
