"""A copy reads its own plain numbers, not those of the original, wherever the function that reads them hides."""

from __future__ import annotations

import functools
import weakref
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.errors import CertificateError, UnsupportedError

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
KEPT: dict[str, nn.Module] = {}
Read = Callable[[nn.Module], Any]


class Net(nn.Module):
    """Multiplies by a number that is read from the model by a function from elsewhere.

    Args:
        hide: takes the model, and what reads its number; gives a function that answers with the number.
        read: reads a number of a model.
    """

    latest: Any = None

    def __init__(self, hide: Callable[[Net, Read], Callable[[Net], Any]], read: Read) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.gain = nn.Linear(6, 9), nn.Linear(9, 4), 0.5
        self.scale = hide(self, read)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu() * self.scale(self))


class Settings:
    def __init__(self, ask: Callable[[], Any]) -> None:
        self.ask = ask


def answers(model: Net, read: Read) -> Callable[[Net], Any]:
    model.ask = functools.lru_cache(lambda: read(model))
    return lambda own: own.ask()


def factory(model: Net, read: Read) -> Callable[[Net], Any]:
    model.memo = defaultdict(lambda: read(model))
    return lambda own: own.memo["gain"]


def settings(model: Net, read: Read) -> Callable[[Net], Any]:
    model.settings = Settings(lambda: read(model))
    return lambda own: own.settings.ask()


def queue(model: Net, read: Read) -> Callable[[Net], Any]:
    model.queue = deque([lambda: read(model)])
    return lambda own: own.queue[0]()


def deep(model: Net, read: Read) -> Callable[[Net], Any]:
    model.settings = [Settings(functools.lru_cache(lambda: read(model)))]
    return lambda own: own.settings[0].ask()


def weak(model: Net, read: Read) -> Callable[[Net], Any]:
    model.parent = weakref.ref(model)
    return lambda own: read(own.parent())


def registry(model: Net, read: Read) -> Callable[[Net], Any]:
    KEPT["net"] = model
    return lambda own: read(KEPT["net"])


def single(model: Net, read: Read) -> Callable[[Net], Any]:
    Net.latest = model
    return lambda own: read(Net.latest)


def dispatched(model: Net, read: Read) -> Callable[[Net], Any]:
    model.ask = functools.singledispatch(lambda _: read(model))
    return lambda own: own.ask(1)


OWN = [answers, factory, settings, queue, deep]
OUTSIDE = [weak, registry, single, dispatched]


def gain(model: nn.Module) -> float:
    return float(model.gain)  # type: ignore[arg-type]


def width(model: nn.Module) -> float:
    return float(model.a.out_features**-0.5)  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("hide", OWN)
def test_functions_of_the_copy_read_its_own_numbers(hide: Any) -> None:
    model = Net(hide, gain).eval()
    cut = sc.plan(model, X, remove={"a": [1, 2]}, granularity="channel").apply(model)
    hidden = model.a(X).relu().index_fill(1, torch.tensor([1, 2]), 0)
    model.gain, cut.gain = 7.0, 2.0
    assert torch.allclose(cut(X), model.b(hidden * 2.0), atol=1e-5)


@pytest.mark.parametrize("hide", OUTSIDE)
@pytest.mark.parametrize("read", [gain, width])
def test_a_copy_that_asks_the_original_for_a_number_is_refused(hide: Any, read: Read) -> None:
    model = Net(hide, read).eval()
    plan = sc.plan(model, X, remove={"a": [1, 2]}, granularity="channel")
    with pytest.raises(UnsupportedError, match=r"still reads '(a|gain|ask)' of the original \(.*test_own_numbers.py"):
        plan.apply(model)
    assert model(X).shape == (3, 4)


@pytest.mark.parametrize("hide", [*OWN, *OUTSIDE])
@pytest.mark.parametrize("run_before", [False, True])
def test_in_place_no_width_changes_its_meaning(hide: Any, run_before: bool) -> None:
    """The proof is made on a copy: what the model itself then reads has to be the same."""
    model = Net(hide, width).eval()
    if run_before:
        model(X)
    hidden = model.a(X).relu().index_fill(1, torch.tensor([1, 2]), 0)
    wanted = model.b(hidden * 9**-0.5)
    plan = sc.plan(model, X, remove={"a": [1, 2]}, granularity="channel")
    try:
        plan.apply(model, inplace=True)
    except (CertificateError, UnsupportedError):
        assert model.a.out_features == 9
        return
    assert torch.allclose(model(X), wanted, atol=1e-5)


def test_the_watch_leaves_modules_as_they_were() -> None:
    before = nn.Module.__getattribute__
    model = Net(answers, gain).eval()
    sc.plan(model, X, remove={"a": [1, 2]}, granularity="channel").apply(model)
    assert nn.Module.__getattribute__ is before
    assert "__getattribute__" not in vars(nn.Module)
