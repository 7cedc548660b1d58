"""The same model has the same conditions, whatever ran before it in the process and whoever else listens."""

from __future__ import annotations

import functools
import gc
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.structure.capture import capture

NET = """
import torch
from torch import nn
{head}

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.history = nn.Linear(8, 16), nn.Linear(16, 4), [0]

    def forward(self, x):
        h = self.a(x).relu()
        {first}
            h = h.roll(1, -1)
        return self.b(h)


class Other(Net):
    def forward(self, x):
        h = self.a(x).relu() if self.history else self.a(x)
        return self.b(h)
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Writes a module and loads it, anew each time."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    name = f"net_of_{tmp_path.name}"

    def written(first: str = "if len(self.history) > 3:", head: str = "", *, loaded: bool = True) -> Any:
        (tmp_path / f"{name}.py").write_text(NET.format(first=first, head=head), "utf-8")
        if not loaded:
            return None
        importlib.invalidate_caches()
        sys.modules.pop(name, None)
        return importlib.import_module(name)

    yield written
    sys.modules.pop(name, None)


def said(model: nn.Module) -> list[str]:
    return [str(condition) for condition in capture(model.eval(), torch.randn(4, 8)).conditions]


def test_plans_of_other_models_between_change_nothing(write: Callable[..., Any]) -> None:
    module = write()
    first = said(module.Net())
    assert any("`len(self.history) > 3` is False" in text for text in first)
    said(module.Other())  # another class of the same file
    said(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
    assert said(module.Net()) == first == said(module.Net())
    model = module.Net()
    assert said(model) == first == said(model)


@pytest.mark.parametrize("head", ["", "# a line more\n# and another"])
def test_a_file_that_was_edited_and_loaded_anew_is_read_anew(write: Callable[..., Any], head: str) -> None:
    said(write().Net())
    for first in ("if [*self.history] == [1]:", "while max(self.history) + 1 > 9:"):
        found = said(write(first, head).Net())
        assert any(f"`{first.split(' ', 1)[1][:-1]}` is False" in text for text in found)
        assert not any("len" in text for text in found)


@pytest.mark.parametrize("head", ["", "# a line more\n# and another"])
def test_the_lines_that_ask_for_a_flag_are_those_of_the_file_as_it_is(write: Callable[..., Any], head: str) -> None:
    flag = "self.wide = True\n        if {}:"
    said(write(flag.format("self.wide")).Net())
    text = NET.format(first=flag.format("not self.wide"), head=head).splitlines()
    line = next(n for n, each in enumerate(text, 1) if "if not self.wide" in each)
    model = write(flag.format("not self.wide"), head).Net()
    model.wide = True
    assert any("wide=True" in each and f":{line})" in each for each in said(model))


def test_a_file_that_was_edited_and_not_loaded_is_not_quoted(write: Callable[..., Any]) -> None:
    module = write()
    write("h = h + (1 if self.history[5:] else 0); ok = True\n        if ok:", "# a line more", loaded=False)
    found = [text for text in said(module.Net()) if "go as on the example" in text or "goes as on the example" in text]
    assert found
    assert not any("[5:]" in text for text in found)


class Cyclic:
    """Something that is only found by a collection, and then decides something."""

    def __init__(self, log: list[int]) -> None:
        self.me, self.log = self, log

    def __del__(self) -> None:
        self.log.append(1 if len(self.log) < 100 else 2)


class Collects(nn.Module):
    """A model during which garbage is collected."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        gc.collect()
        return self.b(self.a(x))


def test_what_runs_while_garbage_is_collected_decides_nothing() -> None:
    log: list[int] = []

    def listens(phase: str, info: dict[str, int]) -> None:
        log.append(3 if phase == "start" and len(log) > 50 else 4)

    alone = said(Collects())
    gc.callbacks.append(listens)
    try:
        before = list(gc.callbacks)
        Cyclic(log)
        assert said(Collects()) == alone
        assert gc.callbacks == before
    finally:
        gc.callbacks.remove(listens)
    assert {1, 4} <= set(log)


class Imports(nn.Module):
    """A model that loads a module when it first runs."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.a, self.b, self.name = nn.Linear(8, 16), nn.Linear(16, 4), name

    def forward(self, x: Tensor) -> Tensor:
        module = importlib.import_module(self.name)
        return self.b(module.turned(self.a(x)))


def test_what_a_module_decides_while_it_is_loaded_is_said_by_no_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"late_of_{tmp_path.name}"
    text = "import sys\nN = [0]\n\ndef turned(h):\n    return h * 2 if not N[1:] else h.roll(1, -1)\n\n"
    text += "def chosen():\n    if sys.platform != 'nowhere':\n        return 1\n    return 2\n\nONE = chosen()\n"
    (tmp_path / f"{name}.py").write_text(text, "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    first, second = said(Imports(name)), said(Imports(name))
    sys.modules.pop(name)
    assert first == second
    assert any("`not N[1:]` is True" in line for line in first)
    assert not any("nowhere" in line for line in first)


def halves(n: int) -> int:
    return 1 if n < 1000 else 2


@functools.lru_cache
def remembered(n: int) -> int:
    return n * halves(n)


@functools.cache
def doubled(n: int) -> int:
    return 2 * n


class Table:
    @staticmethod
    @functools.cache
    def looked_up(n: int) -> int:
        return 3 if n > 1000 else 1


class Remembers(nn.Module):
    """A model that asks functions which remember their answers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * remembered(len(x)) * doubled(3))


@pytest.mark.parametrize("before", [False, True])
def test_what_a_function_remembers_is_said_whether_or_not_it_ran_before(*, before: bool) -> None:
    for each in (remembered, doubled):
        each.cache_clear()
    if before:
        Remembers()(torch.randn(4, 8))
    first, second = said(Remembers()), said(Remembers())
    assert first == second
    assert any(f"test_same_conditions.py:{remembered.__wrapped__.__code__.co_firstlineno})" in text for text in first)
    assert not any("doubled" in text or "n < 1000" in text for text in first)


class AsksClass(Remembers):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * Table.looked_up(len(x)))


class AsksItself(Remembers):
    @functools.cache  # noqa: B019
    def factor(self, n: int) -> int:
        return 3 if n > 1000 else 1

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * self.factor(len(x)))


@pytest.mark.parametrize("kind", [AsksClass, AsksItself])
def test_methods_that_remember_are_found_by_their_class(kind: type[nn.Module]) -> None:
    Table.looked_up.cache_clear()
    model = kind()
    first, second = said(model), said(model)
    assert first == second
    assert any("remembers its answers" in text for text in first)
