"""Whatever decides: a way through the user's code that no run has gone stands among the conditions, with its line."""

from __future__ import annotations

import itertools
import math
import random
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.errors import CertificateError, ForwardError
from secateur.planning.build import make_plan
from secateur.structure.capture import capture
from secateur.structure.ran import Ways, is_watched
from secateur.structure.sides import one_way

MARKED = {n for n, line in enumerate(Path(__file__).read_text("utf-8").splitlines(), 1) if line.endswith("# here")}


class Net(nn.Module):
    """A model whose `mid` may mix its features."""

    def __init__(self, mid: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 16)
        self.mid = mid
        self.turns, self.history, self.table = itertools.cycle([False] * 9), [0], {"a": 1}
        self.key = 0
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.mid(self, x, F.relu(self.a(x))))


def in_a_set(s: Any, x: Tensor, h: Tensor) -> Tensor:
    return h.roll(1, -1) if x.shape[0] in {1, 2, 3} else h  # here


def by_logarithm(s: Any, x: Tensor, h: Tensor) -> Tensor:
    if math.log2(x.shape[0]) >= 3:  # here
        h = h.roll(1, -1)
    return h


def by_counting_rows(s: Any, x: Tensor, h: Tensor) -> Tensor:
    many = sum(1 for _ in x) > 6
    return h.roll(1, -1) if many else h  # here


def by_unbinding(s: Any, x: Tensor, h: Tensor) -> Tensor:
    if len(x.unbind(0)) <= 6:  # here
        return h
    return h.roll(1, -1)


def by_a_counter(s: Any, x: Tensor, h: Tensor) -> Tensor:
    s.steps += 1
    late = bool(s.steps > 12)
    return h.roll(1, -1) if late else h  # here


def by_chance(s: Any, x: Tensor, h: Tensor) -> Tensor:
    if random.random() < 1e-9:  # here
        return h.roll(1, -1)
    return h


def by_an_iterator(s: Any, x: Tensor, h: Tensor) -> Tensor:
    return h.roll(1, -1) if next(s.turns) else h  # here


def by_a_list(s: Any, x: Tensor, h: Tensor) -> Tensor:
    if not len(s.history) > 6:  # here
        pass
    else:
        h = h.roll(1, -1)
    return h


def by_text(s: Any, x: Tensor, h: Tensor) -> Tensor:
    return h.roll(1, -1) if "16" in str(x.shape) else h  # here


def by_match(s: Any, x: Tensor, h: Tensor) -> Tensor:
    match s.table:  # here
        case {"a": 1}:
            return h
        case _:
            return h.roll(1, -1)


def by_an_error(s: Any, x: Tensor, h: Tensor) -> Tensor:
    try:
        s.table["a"]
    except KeyError:  # here
        h = h.roll(1, -1)
    return h


def by_a_handled_error(s: Any, x: Tensor, h: Tensor) -> Tensor:
    try:
        h = h.roll(s.table["b"], -1)
    except KeyError:  # here
        h = h + 1
    return h


def by_or(s: Any, x: Tensor, h: Tensor) -> Tensor:
    steps = s.key or 1  # here
    return h * steps


def by_and_in_a_test(s: Any, x: Tensor, h: Tensor) -> Tensor:
    if s.history and (s.table and not s.turns):  # here
        h = h.roll(1, -1)
    return h


def by_a_loop_that_never_ran(s: Any, x: Tensor, h: Tensor) -> Tensor:
    for _ in s.history[1:]:  # here
        h = h.roll(1, -1)
    return h


def by_while(s: Any, x: Tensor, h: Tensor) -> Tensor:
    while len(s.history) > 3:  # here
        h = h.roll(s.history.pop(), -1)
    return h


def in_a_comprehension(s: Any, x: Tensor, h: Tensor) -> Tensor:
    return sum([h.roll(i, -1) for i in range(1, 4) if i > len(s.history) + 5], h)  # here


def in_several_filters(s: Any, x: Tensor, h: Tensor) -> Tensor:
    some = {i: h.roll(i, -1) for i in range(1, 4) if i < 9 if not (i > 2 and s.history[1:])}  # here
    return sum(some.values(), h) + sum(i < 3 < 9 for i in range(3) if s.history)  # here


def in_a_generator(s: Any, x: Tensor, h: Tensor) -> Tensor:
    def parts() -> Iterator[Tensor]:
        yield h
        if len(s.history) > 3:  # here
            yield h.roll(1, -1)

    return sum(parts(), h)


def in_a_lambda(s: Any, x: Tensor, h: Tensor) -> Tensor:
    turn = lambda z: z.roll(1, -1) if len(s.history) > 3 else z  # noqa: E731 # here
    return turn(h)


def by_continue(s: Any, x: Tensor, h: Tensor) -> Tensor:
    for _ in range(2):
        if len(s.history) < 3:  # here
            continue
        h = h.roll(1, -1)
    return h


def by_a_chain(s: Any, x: Tensor, h: Tensor) -> Tensor:
    if 3 < len(s.history) < 9:  # here
        h = h.roll(1, -1)
    return h


def by_elif(s: Any, x: Tensor, h: Tensor) -> Tensor:
    for i in range(2):
        if i == 1:
            h = h + 1
        elif len(s.history) > 3:  # here
            h = h.roll(1, -1)
    return h


def by_being_nothing(s: Any, x: Tensor, h: Tensor) -> Tensor:
    extra = s.table.get("b")
    if extra is not None:  # here
        h = h.roll(extra, -1)
    return h


def in_a_thread(s: Any, x: Tensor, h: Tensor) -> Tensor:
    found: list[int] = []

    def look() -> None:
        if len(s.history) > 3:  # here
            found.append(1)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return h * (1 + len(found) % 2)


def by_a_pick(s: Any, x: Tensor, h: Tensor) -> Tensor:
    return [lambda z: z, lambda z: z.roll(1, -1)][s.key](h)  # here


def by_a_picked_name(s: Any, x: Tensor, h: Tensor) -> Tensor:
    name = "c" if s.history else "a"  # here
    layer = getattr(s, name)  # here
    return layer(h)


WAYS = [
    in_a_set, by_logarithm, by_counting_rows, by_unbinding, by_a_counter, by_chance, by_an_iterator, by_a_list,
    by_text, by_match, by_an_error, by_a_handled_error, by_or, by_and_in_a_test, by_a_loop_that_never_ran, by_while,
    in_a_comprehension, in_several_filters, in_a_generator, in_a_lambda, by_continue, by_a_chain, by_elif,
    by_being_nothing, in_a_thread, by_a_pick, by_a_picked_name,
]  # fmt: skip


def lines(mid: Callable[[Any, Tensor, Tensor], Tensor]) -> tuple[set[int], set[int], set[int]]:
    """Lines of a function: those that conditions name, those of untaken ways among them, and those that are marked."""
    first = mid.__code__.co_firstlineno
    following = [each.__code__.co_firstlineno for each in (*WAYS, *QUIET) if each.__code__.co_firstlineno > first]
    inside = set(range(first, min(following, default=10**6)))
    found = capture(Net(mid).eval(), torch.randn(4, 8)).conditions
    here = [(int(c.where.rpartition(":")[2]), c.text) for c in found if "test_taken.py:" in c.where]
    untaken = {line for line, text in here if "not seen" in text and text.startswith("holds where")}
    return {line for line, _ in here} & inside, untaken & inside, MARKED & inside


@pytest.mark.parametrize("mid", WAYS, ids=lambda mid: mid.__name__)
def test_a_way_that_was_not_gone_is_named_with_its_line(mid: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
    named, untaken, marked = lines(mid)
    assert untaken <= marked <= named


def straight(s: Any, x: Tensor, h: Tensor) -> Tensor:
    return h * 2


def both_ways(s: Any, x: Tensor, h: Tensor) -> Tensor:
    for i in range(4):
        if i % 2 and i:
            h = h + 1
        h = h * (2 if i > 1 else 1)
    return h + sum([i for i in range(4) if i > 2])


def failing_sides(s: Any, x: Tensor, h: Tensor) -> Tensor:
    if s.key:
        message = "no"
        raise ValueError(message)
    assert not s.key, "no"
    if s.history:
        return h
    raise ValueError


def idle_sides(s: Any, x: Tensor, h: Tensor) -> Tensor:
    if s.key:
        warnings.warn("a number", stacklevel=2)
    if s.history:
        """Nothing."""
    for _ in range(3):
        pass
    return h


def rates(s: Any, x: Tensor, h: Tensor) -> Tensor:
    return h * (0.5 if s.key else 1.0)


QUIET = [straight, both_ways, failing_sides, idle_sides, rates]


@pytest.mark.parametrize("mid", QUIET, ids=lambda mid: mid.__name__)
def test_where_nothing_is_left_open_nothing_is_said(mid: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
    assert lines(mid)[1] == set()


def test_examples_that_go_both_ways_leave_nothing_open() -> None:
    model, few, many = Net(by_logarithm).eval(), torch.randn(4, 8), torch.randn(16, 8)
    assert [c for c in capture(model, few).conditions if "log2" in c.text]
    assert not [c for c in capture(model, few, examples=[many]).conditions if "log2" in c.text]


def many(s: Any, x: Tensor, h: Tensor) -> Tensor:
    n = len(s.history)
    h = h + 1 if n > 2 else h
    h = h + 2 if n > 3 else h
    h = h + 3 if n > 4 else h
    h = h + 4 if n > 5 else h
    h = h + 5 if n > 6 else h
    h = h + 6 if n > 7 else h
    return h + 7 if n > 8 else h


def test_many_decisions_of_a_file_are_shortened_and_none_is_left_out() -> None:
    found = [c for c in capture(Net(many).eval(), torch.randn(4, 8)).conditions if "go as on the example" in c.text]
    assert len(found) == 1
    assert re.search(r"3 more decisions .*: lines \d+, \d+, \d+;", found[0].text)


# -- what watches is gone afterwards -------------------------------------------------------------------------------


def failing(s: Any, x: Tensor, h: Tensor) -> Tensor:
    raise RuntimeError("no")


@pytest.mark.parametrize("mid", [in_a_set, failing])
def test_other_tools_that_watch_are_put_back(mid: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
    def debugger(frame: FrameType, event: str, arg: object) -> None:
        return None

    before, of_threads = sys.gettrace(), threading.gettrace()
    sys.settrace(debugger)
    threading.settrace(debugger)
    try:
        if mid is failing:
            with pytest.raises(ForwardError):
                capture(Net(mid).eval(), torch.randn(4, 8))
        else:
            capture(Net(mid).eval(), torch.randn(4, 8))
        after = sys.gettrace(), threading.gettrace()
    finally:
        sys.settrace(before)
        threading.settrace(of_threads)  # type: ignore[arg-type]
    assert after == (debugger, debugger)
    if hasattr(sys, "monitoring"):
        assert "secateur" not in [sys.monitoring.get_tool(number) for number in range(6)]


def test_threads_that_ran_before_say_nothing_of_a_run() -> None:
    go, end = threading.Event(), threading.Event()

    def decides(n: int) -> int:
        return 1 if n else 2

    def other() -> None:
        go.wait()
        decides(0)
        end.set()

    thread = threading.Thread(target=other)
    thread.start()
    ways = Ways()
    with ways.watching(str):
        decides(1)
        go.set()
        end.wait()
    thread.join()
    (piece,) = [piece for piece in ways.pieces if piece.code is decides.__code__]
    assert [decision.seen for decision in one_way(piece)] == [True]


def test_a_second_watch_sees_again_what_the_first_saw() -> None:
    for _ in range(2):
        found = capture(Net(in_a_set).eval(), torch.randn(4, 8)).conditions
        assert any("in {1, 2, 3}" in c.text for c in found)


def test_whose_code_is_watched() -> None:
    assert is_watched(__file__)
    assert is_watched("/x/lib/python3.12/site-packages/some_models/net.py")
    assert not is_watched(torch.nn.__file__)
    assert not is_watched(random.__file__)
    assert not is_watched(sys.modules["secateur.structure.ran"].__file__ or "")


# -- layers --------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x + torch.tanh(self.f(x)) * (1 if mask is None else mask)


class Stacked(nn.Module):
    def __init__(self, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks, self.out, self.run = nn.ModuleList(Block() for _ in range(6)), nn.Linear(8, 3), run

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.run(self, x))


def alternating(s: Any, x: Tensor) -> Tensor:
    a, b = torch.ones(8), torch.ones(8)
    for k, block in enumerate(s.blocks):
        x = block(x, a if k % 2 else b)  # place
    return x


def parity(s: Any, x: Tensor) -> Tensor:
    for k in range(len(s.blocks)):
        x = s.blocks[k](x)
        if k % 2 and x.shape[0] > 20:  # place
            x = x.flip(-1)
    return x


def counted(s: Any, x: Tensor) -> Tensor:
    k = 0
    for block in s.blocks:
        x = block(x)
        k = k + 1
        x = x * (1 if k < 9 else 2)  # place
    return x


def plain(s: Any, x: Tensor) -> Tensor:
    mask = torch.ones(8)
    for k, block in enumerate(s.blocks):
        past_key_values = [None] * 6
        x = block(x, mask) if past_key_values[k] is None else x
    return x


def by_place(plan: Any, run: Callable[[Any, Tensor], Tensor]) -> set[int]:
    return {int(c.where.rpartition(":")[2]) for c in plan.conditions if "old and new places" in c.text}


@pytest.mark.parametrize("run", [alternating, parity, counted, plain], ids=lambda run: run.__name__)
def test_what_a_loop_does_with_the_place_of_a_block_is_said(run: Callable[[Any, Tensor], Tensor]) -> None:
    text = Path(__file__).read_text("utf-8").splitlines()
    first = run.__code__.co_firstlineno
    last = next(n for n in range(first, len(text) + 1) if not text[n - 1].strip())
    marked = {n for n in range(first, last) if text[n - 1].endswith("# place")}
    plan = make_plan(Stacked(run).eval(), torch.randn(4, 8), granularity="layer", remove={"blocks": [2, 3]})
    assert by_place(plan, run) == marked
    plan.apply(Stacked(run).eval())


def test_blocks_that_would_be_handed_what_others_were_are_refused() -> None:
    model = Stacked(alternating).eval()
    plan = make_plan(model, torch.randn(4, 8), granularity="layer", remove={"blocks": [2]})
    with pytest.raises(CertificateError, match=r"blocks\.3 would be handed something else"):
        plan.apply(model)


def test_an_untaken_way_stands_in_a_plan_of_layers() -> None:
    plan = make_plan(Stacked(parity).eval(), torch.randn(4, 8), granularity="layer", remove={"blocks": [2, 3]})
    assert any("`k % 2 and x.shape[0] > 20` is False" in c.text for c in plan.conditions)
