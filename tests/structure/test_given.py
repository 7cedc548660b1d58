"""What an example gives beside tensors, its ranks and lengths: named with the line that decides by them."""

from __future__ import annotations

import linecache
from collections.abc import Callable
from typing import Any

import pytest
import torch
from independent import holds, locked
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.structure.asked import deciding_lines
from secateur.structure.capture import capture
from secateur.structure.given import MOST_LINES
from secateur.types import Condition

MARK = "# decides"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 32), nn.Linear(32, 4)

    def first(self, x: Tensor) -> Tensor:
        return F.relu(self.fc1(x))

    def mid(self, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.mid(self.first(x)))


class Flag(Net):
    def forward(self, x: Tensor, back: bool) -> Tensor:
        h = self.first(x)
        if back:  # decides
            h = h.flip(1)
        return self.fc2(h)


class Word(Net):
    def forward(self, x: Tensor, how: str = "tanh") -> Tensor:
        h = self.first(x)
        return self.fc2(h.flip(1) if how.lower() == "flip" else h.tanh())  # decides


class WordAsKey(Net):
    def forward(self, x: Tensor, how: str) -> Tensor:
        ways: dict[str, Callable[[Tensor], Tensor]] = {"flip": lambda h: h.flip(1), "same": lambda h: h}
        return self.fc2(ways[how](self.first(x)))  # decides


class WordAsName(Net):
    def flip(self, h: Tensor) -> Tensor:
        return h.flip(1)

    def forward(self, x: Tensor, how: str) -> Tensor:
        return self.fc2(getattr(self, how)(self.first(x)))  # decides


class Fraction(Net):
    def forward(self, x: Tensor, power: float) -> Tensor:
        h = self.first(x)
        negative = power < 0  # decides
        return self.fc2(h.flip(1) if negative else h * power)


class Items(Net):
    def forward(self, xs: list[Tensor]) -> Tensor:
        h = torch.stack([self.first(x) for x in xs]).mean(0)
        return self.fc2(h.flip(1) if len(xs) > 4 else h)  # decides


class Key(Net):
    def forward(self, given: dict[str, Any]) -> Tensor:
        h = self.first(given["x"])
        if "back" in given:  # decides
            h = h.flip(1)
        return self.fc2(h)


class Absent(Net):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.first(x)
        if mask is not None:  # decides
            h = (h * mask).cumsum(1)
        return self.fc2(h)


class InAMethod(Net):
    def turned(self, h: Tensor, *, back: bool) -> Tensor:
        return h.flip(1) if back else h  # decides

    def forward(self, x: Tensor, flag: bool) -> Tensor:
        return self.fc2(self.turned(self.first(x), back=flag))


class Part(nn.Module):
    def forward(self, h: Tensor, how: str) -> Tensor:
        match how:  # decides
            case "flip":
                return h.flip(1)
        return h


class InAModule(Net):
    def __init__(self) -> None:
        super().__init__()
        self.part = Part()

    def forward(self, x: Tensor, how: str) -> Tensor:
        return self.fc2(self.part(self.first(x), how))


class InALoop(Net):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Part(), Part()])

    def forward(self, x: Tensor, how: str) -> Tensor:
        h = self.first(x)
        for _, part in enumerate(self.parts):
            h = part(h, how)
        return self.fc2(h)


class Rank(Net):
    def mid(self, h: Tensor) -> Tensor:
        return h.flip(-1) if h.dim() == 3 else h  # decides


class RankByName(Net):
    def mid(self, h: Tensor) -> Tensor:
        if h.ndim > 2:  # decides
            return h.flip(-1)
        return h


class RankOfShape(Net):
    def mid(self, h: Tensor) -> Tensor:
        rank = len(h.shape)
        return h.flip(-1) if rank == 3 else h  # decides


class Length(Net):
    def mid(self, h: Tensor) -> Tensor:
        return h.flip(1) if len(h) > 30 else h  # decides


class LengthByName(Net):
    def forward(self, x: Tensor) -> Tensor:
        many = len(x)
        h = self.first(x)
        while many > 30:  # decides
            h, many = h.flip(1), many - 30
        return self.fc2(h)


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
TOLD: list[tuple[type[Net], Any, str]] = [
    (Flag, (X, False), "back=False"), (Flag, {"x": X, "back": False}, "back=False"), (Word, (X, "tanh"), "how='tanh'"),
    (Word, X, "how='tanh', its default"), (WordAsKey, (X, "same"), "how='same'"), (WordAsName, (X, "mid"), "how='mid'"),
    (Fraction, (X, 1.5), "power=1.5"), (Items, ([X, X],), "2 items in xs"), (Key, ({"x": X, "n": 7},), "given['n']=7"),
    (Absent, X, "mask=None, its default"), (InAMethod, (X, False), "flag=False"), (InAModule, (X, "no"), "how='no'"),
    (InALoop, (X, "no"), "how='no'"), (Rank, X, "the number of dimensions != 3 (here 2)"),
    (RankByName, X, "the number of dimensions <= 2 (here 2)"), (RankOfShape, X, "2 dimensions"),
    (Length, X, "5 entries"), (LengthByName, X, "5 entries"),
]  # fmt: skip


def marked(condition: Condition) -> bool:
    name, _, line = condition.where.rpartition(":")
    return name.endswith("test_given.py") and MARK in linecache.getline(__file__, int(line))


@pytest.mark.parametrize(("kind", "example", "text"), TOLD, ids=[f"{kind.__name__}-{text}" for kind, _, text in TOLD])
def test_a_line_that_decides_by_what_is_given_stands_in_the_plan(kind: type[Net], example: Any, text: str) -> None:
    torch.manual_seed(0)
    plan = sc.plan(kind().eval(), example, target={"sparsity": 0.3}, granularity="channel")
    told = [c for c in plan.conditions if text in c.text]
    assert any(marked(c) for c in told), [str(c) for c in plan.conditions]
    assert all(str(c) in plan.explain() for c in told)


def test_a_value_that_nothing_is_known_to_decide_by_is_named_all_the_same() -> None:
    class Scaled(Net):
        def forward(self, x: Tensor, scale: float) -> Tensor:
            return self.fc2(self.first(x) * scale)

    (condition,) = capture(Scaled().eval(), (X, 0.5)).conditions
    assert condition.text == "holds for scale=0.5, which the example gives"
    assert condition.where.startswith("structure/test_given.py:")


def test_tensors_alone_bring_no_condition() -> None:
    class Nested(Net):
        def forward(self, pair: tuple[Tensor, dict[str, Tensor]]) -> Tensor:
            return self.fc2(self.first(pair[0]) + self.first(pair[1]["x"]))

    assert capture(Net().eval(), X).conditions == []
    found = [c.text for c in capture(Nested().eval(), ((X, {"x": X}),)).conditions]
    assert not any("=" in text for text in found)


def test_many_lines_are_bounded_and_the_rest_is_counted() -> None:
    class Many(Net):
        def forward(self, x: Tensor, k: float = 1.5) -> Tensor:
            a = [k > 0, k > 1, k > 2, k > 3, k > 4]
            b = [
                k > 5,
                k > 6,
                k > 7,
                k > 8,
                k > 9,
                k > 10,
                k > 11,
                k > 12,
                k > 13,
                k > 14,
                k > 15,
                k > 16,
                k > 17,
            ]
            return self.fc2(self.first(x) * sum(a + b))

    assert len(deciding_lines(Many(), "k")) == 14
    said = [c.text for c in capture(Many().eval(), X).conditions if "k=1.5" in c.text]
    assert len(said) == MOST_LINES
    assert said[-1].endswith("2 more such lines are left out")


def test_a_name_that_a_layer_made_is_no_plain_value() -> None:
    class Scaled(Net):
        def forward(self, x: Tensor, scale: float) -> Tensor:
            h = self.first(x * scale)
            return self.fc2(h.tanh() if h.shape[0] > 3 else h)

    assert deciding_lines(Scaled(), "scale") == []


# -- numbers of the example ------------------------------------------------------------------------------------------


class Compared(Net):
    def forward(self, x: Tensor, many: int) -> Tensor:
        h = self.first(x)
        return self.fc2(h.flip(1) if many > 9 else h)


def test_the_other_side_of_a_comparison_with_a_given_integer_is_seen() -> None:
    torch.manual_seed(0)
    model, example = Compared().eval(), (X, 3)
    assert any("many <= 9 (here 3)" in c.text and "was seen" in c.text for c in capture(model, example).conditions)
    assert any("flipped" in reason for reason in locked(model, example)["fc1"])
    assert type(example[1]) is int


class Bound(Net):
    """How many units count is said by the caller."""

    def __init__(self, used: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.used = used

    def forward(self, x: Tensor, many: int) -> Tensor:
        h = self.used(self.first(x), many)
        return self.fc2(F.pad(h, (0, max(0, 32 - h.shape[1]))))


BOUNDS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "slice": lambda h, k: h[:, :k],
    "sliced from the end": lambda h, k: h[:, -k:],
    "narrow": lambda h, k: h.narrow(1, 0, k),
    "split": lambda h, k: h.split(k, 1)[0],
    "numbered": lambda h, k: h[:, torch.arange(k)],
}


@pytest.mark.parametrize("many", [32, 20])
@pytest.mark.parametrize("name", BOUNDS)
def test_what_the_caller_says_how_much_is_used_of_stays(name: str, many: int) -> None:
    torch.manual_seed(0)
    assert holds(Bound(BOUNDS[name]).eval(), (X, many), [(X, 10), (X, 32)]) is None


class ByBatch(Net):
    def mid(self, h: Tensor) -> Tensor:
        kept = h[:, : h.shape[0]]
        return F.pad(kept, (0, h.shape[1] - kept.shape[1]))


class ByLength(Net):
    def mid(self, h: Tensor) -> Tensor:
        return F.pad(h[:, : len(h)], (0, max(0, h.shape[1] - len(h))))


@pytest.mark.parametrize("kind", [ByBatch, ByLength])
@pytest.mark.parametrize("rows", [32, 40, 7])
def test_as_many_units_as_there_are_rows_stay(kind: type[Net], rows: int) -> None:
    torch.manual_seed(0)
    others = [torch.randn(n, 8) for n in (3, 9, 32)]
    assert holds(kind().eval(), torch.randn(rows, 8), others) is None


def test_its_own_size_as_a_bound_leaves_a_dimension_free() -> None:
    class Whole(Net):
        def mid(self, h: Tensor) -> Tensor:
            return h[:, : h.shape[1]] + h.narrow(1, 0, h.shape[1])

    torch.manual_seed(0)
    assert holds(Whole().eval(), torch.randn(32, 8), [X]) is not None


class AgainstData(nn.Module):
    def __init__(self, asked: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.fc1, self.fc2, self.asked = nn.Linear(8, 32), nn.Linear(32, 4), asked

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.fc1(x))
        return self.fc2(2 * h if self.asked(h) else h)


ASKED: dict[str, Callable[[Tensor], bool]] = {
    "fewer steps than units": lambda h: h.shape[1] < h.shape[2],
    "as many": lambda h: h.shape[1] == h.shape[2],
    "the largest side": lambda h: max(h.shape) > 40,
    "a multiple": lambda h: 2 * h.size(1) >= h.size(-1),
    "against a quotient": lambda h: h.shape[1] > h.shape[2] // 2,
}


@pytest.mark.parametrize("name", ASKED)
def test_a_width_that_is_compared_with_a_size_of_the_data_stays(name: str) -> None:
    torch.manual_seed(0)
    others = [torch.randn(2, n, 8) for n in (1, 14, 15, 16, 20, 30, 32, 33, 41)]
    assert holds(AgainstData(ASKED[name]).eval(), torch.randn(2, 6, 8), others) is None


class Shortcut(nn.Module):
    """Widths of two layers are compared, one of them that of the input: no input changes it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.up, self.out = nn.Linear(8, 32), nn.Linear(32, 16), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(F.relu(self.a(x)))
        return self.out(h + (self.up(x) if h.shape[-1] != x.shape[-1] else x))


def test_widths_of_layers_may_be_compared() -> None:
    torch.manual_seed(0)
    assert holds(Shortcut().eval(), X, [torch.randn(2, 8)]) is not None
    assert not {"a", "b"} & locked(Shortcut().eval(), X).keys()


class Alike(Net):
    def __init__(self, alike: Callable[[Tensor, Tensor], bool]) -> None:
        super().__init__()
        self.alike = alike

    def mid(self, h: Tensor) -> Tensor:
        return h.flip(1) if self.alike(h[0], h[-1]) else h


@pytest.mark.parametrize("alike", [torch.equal, torch.allclose, Tensor.equal, Tensor.allclose])
def test_tensors_that_are_compared_as_a_whole_are_a_door(alike: Callable[[Tensor, Tensor], bool]) -> None:
    torch.manual_seed(0)
    model = Alike(alike).eval()
    assert any("this value of the data is False" in c.text for c in capture(model, X).conditions)
    assert holds(model, X, [torch.randn(1, 8)]) is None


# -- integers of a class ---------------------------------------------------------------------------------------------


class Heads(nn.Module):
    heads, size, scale_of = 4, 6, 3

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 72), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (t.view(*x.shape[:2], self.heads, self.size).transpose(1, 2) for t in (q, k, v))
        h = (q @ k.mT * 0.4).softmax(-1) @ v
        return self.out(h.transpose(1, 2).flatten(2))


class MoreHeads(Heads):
    """A class of its own may say otherwise."""

    heads, size = 6, 4


@pytest.mark.parametrize("granularity", ["head", "head_dim"])
@pytest.mark.parametrize("kind", [Heads, MoreHeads])
def test_integers_on_a_class_follow_in_the_model_alone(kind: type[Heads], granularity: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(2, 5, 16)
    before = (kind.heads, kind.size, dict(vars(model)))
    plan = holds(model, x, [torch.randn(1, 9, 16)], granularity=granularity)
    assert plan is not None
    cut = plan.apply(model)
    assert (kind.heads, kind.size, vars(model)) == before
    assert (cut.heads, cut.size) != (kind.heads, kind.size)
    assert cut.qkv.out_features == 3 * cut.heads * cut.size
    plan.save(tmp_path / "plan.json")
    again = sc.Plan.load(tmp_path / "plan.json").apply(model, example=x)
    torch.testing.assert_close(again(x), cut(x), rtol=0, atol=0)
