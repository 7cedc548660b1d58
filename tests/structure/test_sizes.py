"""Integers of the user's code: which attributes follow a cut, which dimensions shrink together, what stays."""

from __future__ import annotations

import enum
import operator
import statistics
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from micro import CASES
from torch import Tensor, nn
from torch.nn import functional
from transformers_cut import cut_and_prove

import secateur as sc
from secateur.errors import CertificateError, UnsupportedError
from secateur.structure.attributes import Sizes, edits
from secateur.structure.axes import leaves
from secateur.structure.capture import capture
from secateur.structure.groups import Structure, structure
from secateur.structure.numbers import TrackedInt
from secateur.structure.provenance import Attribute, attributes_in, dims_in
from secateur.structure.trace import SizeUse


def look(model: nn.Module, **inputs: Tensor) -> Structure:
    return structure(model.eval(), capture(model, inputs))


def followed(model: nn.Module, found: Structure, group: str, count: int) -> dict[str, int]:
    changed = edits(model, found.trace, {found.atoms[group].id: count})
    return {f"{a.owner}.{a.name}".strip("."): value for a, value in changed.items()}


class Quotient(nn.Module):
    """The head size is computed as width // heads; the width is used nowhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.heads = 24, 4
        self.q, self.k, self.v = (nn.Linear(10, 24) for _ in range(3))
        self.out = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).view(*x.shape[:2], self.heads, self.width // self.heads).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


def test_an_attribute_is_solved_for_where_only_its_quotient_is_used() -> None:
    model, x = Quotient(), torch.randn(2, 3, 10)
    found = look(model, x=x)
    (heads,) = (g for g in found.groups if g.granularity == "head")
    assert not heads.locks
    assert followed(model, found, heads.name, 3) == {"heads": 3, "width": 18}
    assert cut_and_prove(model, {"x": x}).share > 0.2


class Borrowed(nn.Module):
    """A width read before a layer sizes its result: both widths must shrink alike."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        n, c = y.shape
        return self.out(torch.relu(self.second(y)).reshape(n, c, 1).squeeze(-1))


def test_widths_that_one_number_sizes_shrink_together() -> None:
    model, x = Borrowed(), torch.randn(4, 6)
    found = look(model, x=x)
    free = [g for g in found.groups if not g.locks]
    assert [g.size for g in free] == [12]
    assert {s.tensor for s in free[0].spans} >= {"first.weight", "second.weight", "out.weight"}
    assert cut_and_prove(model, {"x": x}).share > 0.2


class Guarded(nn.Module):
    """Raises when a width is not the one it knows."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = 8
        self.first, self.out = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        if y.shape[-1] != self.channels:
            raise ValueError("another number of channels")
        return self.out(y)


def test_an_attribute_that_is_compared_with_a_width_follows_it() -> None:
    model, x = Guarded(), torch.randn(4, 5)
    found = look(model, x=x)
    assert followed(model, found, "first", 5) == {"channels": 5}
    assert cut_and_prove(model, {"x": x}).share > 0.2


class LiteralGuard(Guarded):
    """Raises when a width is not a number from the code."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        if y.shape[-1] != 8:
            raise ValueError("another number of channels")
        return self.out(y)


class Numbered(Guarded):
    """Weighs the channels by their position."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        return self.out(y * torch.arange(y.shape[-1]))


class Unequal(Guarded):
    """Chunks of eight into three pieces are 3, 3 and 2 wide."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat(torch.relu(self.first(x)).chunk(3, -1), -1))


class PaddedUp(Guarded):
    """Pads a width up to a number."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        return self.out(functional.pad(y, (0, self.channels - y.shape[-1])))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (LiteralGuard, "would not follow"),
        (Numbered, "depend on positions"),
        (Unequal, "unequal size"),
    ],
)
def test_what_could_not_follow_is_locked_with_its_line(kind: type[nn.Module], reason: str) -> None:
    (group,) = (g for g in look(kind(), x=torch.randn(4, 5)).groups if g.name == "first")
    assert any(reason in lock.reason for lock in group.locks)
    assert all("test_sizes.py" in lock.where for lock in group.locks)


def test_an_amount_of_padding_stays() -> None:
    model, x = PaddedUp(), torch.randn(4, 5)
    found = look(model, x=x)
    (group,) = (g for g in found.groups if g.name == "first")
    if not group.locks:  # the attribute may follow the width, so that nothing is padded
        assert followed(model, found, "first", 5) == {"channels": 5}
    cut_and_prove(model, {"x": x})


class Stateful(nn.Module):
    """A forward that fills a cache, stores sizes and adds a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(5, 8), nn.Linear(8, 3)
        self.cache: dict[str, Tensor] = {}
        self.last = 0

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.cache:
            self.cache["bias"] = self.first.bias * 1.5
            self.out.register_forward_hook(lambda *_: None)
        y = torch.relu(self.first(x) + self.cache["bias"])
        self.last, self.added = y.shape[-1], y
        return self.out(y)


def test_capture_leaves_no_trace_in_the_model() -> None:
    model, x = Stateful(), torch.randn(4, 5)
    capture(model.eval(), {"x": x})
    assert model.cache == {}
    assert model.last == 0
    assert type(model.last) is int
    assert not hasattr(model, "added")
    assert not model.out._forward_hooks
    assert cut_and_prove(model, {"x": x}).share > 0.2


class Shared(nn.Module):
    """Two layers read one number of heads from one config."""

    class Config:
        def __init__(self) -> None:
            self.heads, self.size = 3, 4

    class Layer(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.config = config
            self.qkv, self.out = nn.Linear(6, 36), nn.Linear(12, 6)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).view(*x.shape[:2], self.config.heads, -1).transpose(1, 2).chunk(3, -1)
            return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def __init__(self) -> None:
        super().__init__()
        config = self.Config()
        self.a, self.b = self.Layer(config), self.Layer(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def test_a_number_in_a_shared_config_makes_one_unit_of_all_its_uses() -> None:
    model, x = Shared(), torch.randn(2, 5, 6)
    found = look(model, x=x)
    (heads,) = (g for g in found.groups if g.granularity == "head")
    assert {s.tensor for s in heads.spans} >= {"a.qkv.weight", "b.qkv.weight"}
    assert edits(model, found.trace, {found.atoms[heads.name].id: 2}) == {Attribute("a.config", "heads"): 2}
    assert cut_and_prove(model, {"x": x}).share > 0.1


def tied(sizes: Sizes, first: SizeUse) -> set[int]:
    """Uses that hang together with one, by going over all pairs until nothing changes."""
    found = [first]
    while True:
        names = {a for use in found for a in attributes_in(use.expr)} & set(sizes.definitions)
        more = [use for use in sizes.trace.size_uses if names & set(attributes_in(use.expr)) and use not in found]
        if not more:
            return {id(use) for use in found}
        found += more


def test_every_atom_has_its_uses_and_all_that_hang_together_with_them() -> None:
    farther = 0
    for name in sorted(CASES)[::5]:
        torch.manual_seed(0)
        trace = capture(CASES[name].build().eval(), CASES[name].example())
        sizes, direct = Sizes(trace), {}
        for use in trace.size_uses:
            for axis in (*([] if isinstance(use.axis, int) else [use.axis]), *dims_in(use.expr)):
                for atom in leaves(axis):
                    direct.setdefault(atom.id, []).append(use)
        wanted = {atom: set().union(*(tied(sizes, use) for use in uses)) for atom, uses in direct.items()}
        assert {atom: set(uses) for atom, uses in sizes.by_atom.items()} == wanted, name
        farther += sum(len(uses) > len({id(use) for use in direct[atom]}) for atom, uses in wanted.items())
    assert farther, "no case in which anything hangs together"


class OfItsType(nn.Module):
    """Makes numbers of the type of a size, as `statistics` does, and a width of one of them."""

    def __init__(self, made: Callable[[int], int]) -> None:
        super().__init__()
        self.made, self.a, self.b = made, nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return self.b(h) * self.made(h.shape[-1])


@pytest.mark.parametrize(("made", "free"), [
    (lambda n: type(n)(3), True),
    (lambda n: type(n / 2)(3.0), True),
    (lambda n: type(n)(n), False),
    (lambda n: type(n / 2)(n / 2), False),
    (lambda n: statistics.mean([n, n]), False),
], ids=["another integer", "another fraction", "the size", "a half of it", "a mean"])  # fmt: skip
def test_a_number_of_the_type_of_a_size_is_plain_and_a_size_stays_one(made: Callable[[int], int], free: bool) -> None:
    model, x = OfItsType(made).eval(), torch.randn(4, 6)

    def cut() -> nn.Module:
        return sc.plan(model, x, granularity="neuron", remove={"a": [1, 5]}).apply(model)

    if free:
        assert cut().a.out_features == 14
    else:
        with pytest.raises((CertificateError, UnsupportedError)):  # of what is cut, and not of a forward that fails
            cut()


def test_numbers_of_the_type_of_a_size_keep_what_they_are_made_of() -> None:
    size = TrackedInt(16, Attribute("", "width"))
    half = size / 2
    assert type(size)(size).expr == size.expr
    assert type(half)(half).sizes == (size,)
    assert type(type(size)(5)) is int
    assert type(type(half)(2.5)) is float


class Level(enum.IntEnum):
    TWO = 2


OTHERS = (True, False, 2, 2.5, Level.TWO, np.float64(2.5), np.int64(2), np.bool_(True), Fraction(5, 2), 1 + 2j)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "truediv", "pow", "floordiv", "mod"])
def test_arithmetic_with_a_size_takes_what_plain_numbers_take(name: str) -> None:
    function = getattr(operator, name)
    size = TrackedInt(16, Attribute("", "width"))
    for tracked, plain in ((size, 16), (size / 3, 16 / 3)):
        for other in OTHERS:
            for swapped in (False, True):
                told = result(function, *((other, tracked) if swapped else (tracked, other)))
                assert told == result(function, *((other, plain) if swapped else (plain, other))), (plain, other)


def result(function: Callable[..., object], *numbers: object) -> object:
    try:
        return function(*numbers)
    except (TypeError, ZeroDivisionError, AttributeError) as error:
        return type(error)


def test_a_flag_hides_no_size() -> None:
    size = TrackedInt(16, Attribute("", "width"))
    assert list(attributes_in((size * True).expr)) == list(attributes_in(size.expr))
    assert ((size / 3) * True).sizes == (True * (size / 3)).sizes == ((size / 3) ** Level.TWO).sizes == (size,)


class Square(nn.Module):
    """Blocks that share one number of heads, which is also the size of a head."""

    def __init__(self, spelling: str, blocks: int) -> None:
        super().__init__()
        self.spelling, self.heads = spelling, 4
        self.embed, self.out = nn.Linear(8, 16), nn.Linear(16, 3)
        self.blocks = nn.ModuleList(nn.ModuleDict({c: nn.Linear(16, 16) for c in "qkvo"}) for _ in range(blocks))

    def split(self, x: Tensor) -> Tensor:
        width = -1 if self.spelling == "rest" else x.shape[-1] // self.heads
        return x.view(*x.shape[:-1], self.heads, width).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            q, k, v = (self.split(block[c](x)) for c in "qkv")
            mixed = (q @ k.mT * 0.5).softmax(-1) @ v
            x = x + block["o"](mixed.transpose(1, 2).flatten(2))
        return self.out(x)


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("spelling", ["rest", "quotient"])
def test_as_many_heads_as_coordinates_are_not_taken_for_each_other(spelling: str, blocks: int) -> None:
    model = Square(spelling, blocks).eval()
    plan = sc.plan(model, torch.randn(2, 5, 8), granularity="head", target={"sparsity": 0.5}, scope="local")
    cut = plan.apply(model)
    for block in range(blocks):
        kept = plan.cuts[f"blocks.{block}.q.weight"][0].view(2, 4)  # half of the heads, each whole
        assert torch.equal(kept, kept[:, :1] // 4 * 4 + torch.arange(4))
    assert cut(torch.randn(3, 7, 8)).shape == (3, 7, 3)


class Prealloc(nn.Module):
    """One buffer for what several layers make; its width is the sum of theirs."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(10, 6), nn.Linear(10, 9), nn.Linear(10, 4)])
        self.widths, self.own, self.out = [6, 9, 4], own, nn.Linear(19, 5)

    def forward(self, x: Tensor) -> Tensor:
        widths = self.widths if self.own else [layer.out_features for layer in self.layers]
        h, start = x.new_zeros(len(x), sum(widths)), 0
        for layer, width in zip(self.layers, widths, strict=True):
            h[:, start : start + width] = layer(x)
            start += width
        return self.out(h.relu())


@pytest.mark.parametrize("own", [True, False])
def test_every_term_of_a_sum_follows_its_own_piece(tmp_path: Any, own: bool) -> None:
    model, x = Prealloc(own).eval(), torch.randn(3, 10)
    gone = {"layers.0": [1, 2, 4, 5], "layers.1": [0, 3, 4, 5, 6, 7], "layers.2": [2, 3]}
    plan = sc.plan(model, x, granularity="channel", remove=gone)
    wanted = {("", "widths", i) if own else (f"layers.{i}", "out_features", None): n for i, n in enumerate((2, 3, 2))}
    found = {(a.owner, a.name, a.item): value for a, value in plan.attributes.items()}
    assert found == wanted
    plan.apply(model)
    plan.save(tmp_path / "plan.json")
    cut = sc.Plan.load(tmp_path / "plan.json").apply(model, example=x)
    assert [layer.out_features for layer in cut.layers] == [2, 3, 2]
    h = torch.cat([layer(x)[:, i] for layer, i in zip(model.layers, ([0, 3], [1, 2, 8], [0, 1]), strict=True)], 1)
    kept = torch.tensor([0, 3, 7, 8, 14, 15, 16])
    torch.testing.assert_close(cut(x), h.relu() @ model.out.weight[:, kept].T + model.out.bias)


class Begins(nn.Module):
    """A cell that begins with a constant, as code from before `new_zeros` makes one."""

    def __init__(self, start: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.width, self.start, self.cell, self.out = 6, start, nn.GRUCell(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(x, self.start(x, self.width)))


@pytest.mark.parametrize(("start", "locked"), [
    (lambda x, n: x.new(len(x), n).zero_(), ""),
    (lambda x, n: x.data.new(torch.Size([len(x), n])).fill_(0), ""),
    (lambda x, n: x.new(np.int64(len(x)), n).zero_(), ""),
    (lambda x, n: x.new(len(x), 6).zero_(), "the size 6 is written in the code"),
    (lambda x, n: x.new([[0.0] * n] * len(x)), "this size"),
    (lambda x, n: torch.Tensor(len(x), n).zero_(), "made here with a size from the code"),
    (lambda x, n: torch.FloatTensor(torch.Size([len(x), n])).zero_(), "made here with a size from the code"),
])  # fmt: skip
def test_sizes_of_old_constructors_follow_or_lock(start: Callable[[Tensor, int], Tensor], locked: str) -> None:
    torch.manual_seed(0)
    model, x = Begins(start).eval(), torch.randn(3, 4)
    if locked:
        with pytest.raises(UnsupportedError, match=locked):
            sc.plan(model, x, target={"sparsity": 0.5})
        return
    cut = sc.plan(model, x, target={"sparsity": 0.5}).apply(model)
    assert (cut.cell.hidden_size, cut.width, cut.out.in_features) == (3, 3, 3)
    assert cut(torch.randn(5, 4)).shape == (5, 2)
