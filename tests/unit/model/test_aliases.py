"""Whichever alias a forward writes through, all memory that can be reached is given back: aliases, writes, places."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils import dlpack

import secateur as sc
from secateur.measure import macs
from secateur.model import memory, written

SHAPE = (4, 8)
HELD = {"tensor": torch.zeros(SHAPE)}  # a variable of the module that the forwards use

ALIASES = {
    "itself": lambda t: t,
    "rows": lambda t: t[:2],
    "columns": lambda t: t[:, :3],
    "a row": lambda t: t[0],
    "a step": lambda t: t[::2],
    "view": lambda t: t.view(-1),
    "reshape": lambda t: t.reshape(8, 4),
    "transposed": lambda t: t.t(),
    "permuted": lambda t: t.permute(1, 0),
    "unbind": lambda t: t.unbind()[0],
    "split": lambda t: t.split(2)[1],
    "chunk": lambda t: t.chunk(2, 1)[0],
    "narrow": lambda t: t.narrow(1, 2, 3),
    "diagonal": lambda t: t.diagonal(),
    "unsqueeze": lambda t: t.unsqueeze(0),
    "unfold": lambda t: t.unfold(1, 2, 2),
    "strided": lambda t: t.as_strided((3,), (2,), 1),
    "bits": lambda t: t.view(torch.int32).view(torch.float32),
    "detached": lambda t: t.detach(),
    "data": lambda t: t.data,
    "view of a view": lambda t: t.detach()[1:].t()[2:],
    "row of data": lambda t: t.data[1],
    "a list of rows": lambda t: [*t][2],
    "array": lambda t: torch.from_numpy(t.detach().numpy()),
    "capsule": lambda t: torch.from_dlpack(t.detach()),
    "old capsule": lambda t: dlpack.from_dlpack(dlpack.to_dlpack(t.detach())),
    "same storage": lambda t: torch.empty(0).set_(t.untyped_storage(), 0, SHAPE),
}


def by_address(t):
    if t.numel():  # of one sample alone some aliases hold nothing, and nothing lies at address 0
        ctypes.memset(t.data_ptr(), 0x40, 4)


def by_item(t):
    t[...] = 5


WRITES = {
    "add": lambda t: t.add_(1),
    "fill": lambda t: t.fill_(3),
    "copy": lambda t: t.copy_(torch.full_like(t, 2)),
    "item": by_item,
    "mask": lambda t: t.masked_fill_(torch.ones_like(t, dtype=torch.bool), 4),
    "out": lambda t: torch.sub(t, 2, out=t),
    "many": lambda t: torch._foreach_add_([t], 2),
    "index": lambda t: t.index_fill_(0, torch.tensor([0]), 7),
    "relu": lambda t: functional.relu_(t.sub_(1)),
    "numpy": lambda t: np.copyto(t.detach().numpy(), 6),
    "asarray": lambda t: np.asarray(t.detach()).fill(6),
    "numpy by capsule": lambda t: torch.from_dlpack(t.detach()).numpy().fill(6),
    "storage": lambda t: t.untyped_storage().fill_(64),
    "address": by_address,
}


class Net(nn.Module):
    """Writes through an alias of what lies at a place, in its forward; `fails` raises after it."""

    fails = False

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)
        self.register_buffer("cache", torch.zeros(SHAPE))
        self.memo = {"deep": [torch.zeros(SHAPE)]}
        self.record = SimpleNamespace(seen=torch.zeros(SHAPE))

    def touch(self, x):
        pass

    def forward(self, x):
        with torch.no_grad():
            self.touch(x)
        if self.fails:
            raise RuntimeError("the forward fails")
        return self.b(functional.relu(self.a(x)))


PLACES = {
    "buffer": lambda self, x: self.cache,
    "mapping": lambda self, x: self.memo["deep"][0],
    "object": lambda self, x: self.record.seen,
    "class": lambda self, x: type(self).shared,
    "module": lambda self, x: HELD["tensor"],
    "example": lambda self, x: x,
    "weight": lambda self, x: self.head.weight,
}
ENTRIES = {
    "inspect": lambda model, x: sc.inspect(model, x),
    "plan": lambda model, x: sc.plan(model, x, granularity="neuron", target={"sparsity": 0.5}).apply(model),
    "estimate": lambda model, x: sc.estimate(model, x, granularity="neuron", target={"sparsity": 0.5}),
    "score": lambda model, x: sc.score(model, x, criterion="wanda", granularity="element", data=[x]),
    "macs": macs,
}


def writer(alias, write, place):
    """A model of a class of its own, and the example."""
    HELD["tensor"] = torch.zeros(SHAPE)

    def touch(self, x):
        WRITES[write](ALIASES[alias](PLACES[place](self, x)))

    model = type("Writes", (Net,), {"touch": touch, "shared": torch.zeros(SHAPE)})().eval()
    model.head = nn.Linear(8, 4, bias=False)
    return model, torch.ones(SHAPE)


def reached(model, x):
    """All memory that can be reached: which it is, how much, and its bits."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers()), "x": x, "module": HELD["tensor"]}
    tensors |= {"memo": model.memo["deep"][0], "record": model.record.seen, "class": type(model).shared}
    return {
        name: (id(t), t.data_ptr(), t.untyped_storage().nbytes(), tuple(t.shape), t.detach().numpy().tobytes())
        for name, t in tensors.items()
    }


def comes_back(alias, write, place, entry, *, fails):
    """Run an entry; a refusal is right where a weight is written to, and where the forward fails."""
    torch.manual_seed(0)
    model, x = writer(alias, write, place)
    model.fails = fails
    before = reached(model, x)
    try:
        ENTRIES[entry](model, x)
        refused = False
    except sc.SecateurError:
        refused = True
    assert reached(model, x) == before
    if fails or place == "weight":
        assert refused


def few():
    """Every alias with some write, every write with some alias, at places and entries that shift against both."""
    aliases, writes, places, entries = [*ALIASES], [*WRITES], [*PLACES], ["inspect", "inspect", "score", "macs", "plan"]
    for i, alias in enumerate(aliases):
        turn = i // len(places)
        yield alias, writes[i % len(writes)], places[(i + 3 * turn) % len(places)], entries[i % len(entries)]


@pytest.mark.parametrize(("alias", "write", "place", "entry"), [*few()])
def test_memory_comes_back(alias, write, place, entry):
    comes_back(alias, write, place, entry, fails=False)
    if entry != "plan":
        comes_back(alias, write, place, entry, fails=True)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("alias", ALIASES)
def test_memory_comes_back_whatever_is_combined(alias, place):
    for write, fails in itertools.product(WRITES, [False, True]):
        comes_back(alias, write, place, "inspect", fails=fails)
    for entry in ENTRIES:
        comes_back(alias, "add", place, entry, fails=False)
        comes_back(alias, "numpy", place, entry, fails=False)


def test_every_alias_and_every_write_of_the_table_really_writes():
    """Else the tests above would pass with nothing put back."""
    for alias, write in itertools.product(ALIASES, WRITES):
        tensor = torch.full(SHAPE, 0.25)
        WRITES[write](ALIASES[alias](tensor))
        assert not torch.equal(tensor, torch.full(SHAPE, 0.25)), (alias, write)


class Sparse(Net):
    def touch(self, x):
        for t in (self.coo, self.csr):
            t.values().mul_(3) if t is self.csr else t._values().mul_(3)
        self.coo.add_(torch.ones(3, 3).to_sparse())
        self.grown.resize_(9).fill_(2)
        self.given.data = self.given.data + 1
        self.statistics[0](x.t()[:, :4].reshape(-1, 4))


@pytest.mark.parametrize("entry", ["inspect", "score", "macs"])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_what_has_several_memories_or_is_given_others_comes_back(entry):
    model, x = Sparse().eval(), torch.ones(SHAPE)
    for name, tensor in {"coo": torch.eye(3).to_sparse(), "csr": torch.eye(3).to_sparse_csr()}.items():
        model.register_buffer(name, tensor)
    model.register_buffer("grown", torch.zeros(3))
    model.register_buffer("given", torch.zeros(3))
    model.statistics = [nn.BatchNorm1d(4).train()]
    address, size = model.given.data_ptr(), model.grown.untyped_storage().nbytes()
    with contextlib.suppress(sc.SecateurError):
        ENTRIES[entry](model, x)
    assert torch.equal(model.coo.to_dense(), torch.eye(3))
    assert torch.equal(model.csr.to_dense(), torch.eye(3))
    assert model.grown.tolist() == [0, 0, 0]
    assert model.grown.untyped_storage().nbytes() == size
    assert model.given.data_ptr() == address
    assert model.given.tolist() == [0, 0, 0]
    assert model.statistics[0].running_mean.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("fails", [False, True])
def test_switches_of_the_process_come_back(fails):
    def touch(self, x):
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(threads + 1)

    threads = torch.get_num_threads()
    model = type("Switches", (Net,), {"touch": touch, "fails": fails})().eval()
    try:
        with contextlib.suppress(sc.SecateurError):
            sc.inspect(model, torch.ones(SHAPE))
        assert (torch.get_default_dtype(), torch.get_num_threads()) == (torch.float32, threads)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)


def test_a_weight_that_is_only_read_by_numpy_is_no_reason_to_refuse():
    def touch(self, x):
        self.norm = float(np.abs(self.head.weight.detach().numpy()).sum())

    model = type("Reads", (Net,), {"touch": touch})().eval()
    model.head = nn.Linear(8, 4)
    with written.weights_kept(model):
        model(torch.ones(SHAPE))
    assert model.norm > 0


def test_only_what_is_written_to_is_copied():
    """Weights that lie side by side in one memory, as those of a mapped file do."""
    whole, kept = torch.zeros(100), memory.Saved()
    parts = whole.split(10)
    for part in parts:
        kept.add(part)
    assert kept.before(parts[3][2:4])[0] is parts[3]
    assert kept.before(parts[3]) == []
    assert len(kept.before(whole)) == 9


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("named", [True, False])
def test_a_norm_is_said_to_write_its_statistics_where_it_does(training, named):
    statistics = [torch.zeros(3), torch.ones(3)]
    given = (torch.randn(5, 3), None, None, *statistics, training, 0.1, 1e-5)
    norm = torch.ops.aten.native_batch_norm.default
    names = [argument.name for argument in norm._schema.arguments]
    args, kwargs = (given[:3], dict(zip(names[3:], given[3:], strict=True))) if named else (given, {})
    said = [id(tensor) for tensor in memory.written(norm, args, kwargs)]
    before = [tensor.clone() for tensor in statistics]
    norm(*args, **kwargs)
    changed = [id(now) for now, old in zip(statistics, before, strict=True) if not torch.equal(now, old)]
    assert said == changed


FAULTS = {
    "only the tensor itself is noticed": (memory, "memory_of", id, ("rows", "add", "buffer", "inspect")),
    "openings are not noticed": (memory, "_overlap", lambda a, b: False, ("itself", "numpy", "example", "inspect")),
    "openings are not watched": (written, "_METHODS", (), ("itself", "numpy", "weight", "macs")),
    "nothing is said to be written": (
        memory,
        "_written_names",
        lambda func: ((), None),
        ("rows", "fill", "weight", "score"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault, monkeypatch):
    module, name, wrong, case = FAULTS[fault]
    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(AssertionError):
        comes_back(*case, fails=False)
