"""What an earlier run has left on a module is a condition: a fresh model, with weights loaded, makes it anew."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.memo = nn.Linear(6, 9), nn.Linear(9, 4), self.table()

    def table(self) -> dict[str, Any]:
        return {}

    def made(self) -> Tensor:
        return torch.tensor(self.a.out_features**-0.5)

    def scale(self) -> Any:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu() * self.scale())


class Cached(Base):
    @functools.cached_property
    def kept(self) -> Tensor:
        return self.made()

    def scale(self) -> Tensor:
        return self.kept.clone()


class Lazy:
    """As many have written it before there was `functools.cached_property`."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make

    def __get__(self, owner: Any, kind: type) -> Any:
        value = owner.__dict__["kept"] = self.make(owner)
        return value


class Own(Base):
    kept = Lazy(lambda model: (model.made(),))

    def scale(self) -> Tensor:
        return self.kept[0]


class Settings:
    def __init__(self, model: Base) -> None:
        self.model = model

    @functools.cached_property
    def kept(self) -> dict[str, Tensor]:
        return {"scale": self.model.made()}


class InSettings(Base):
    def __init__(self) -> None:
        super().__init__()
        self.settings = Settings(self)

    def scale(self) -> Tensor:
        return self.settings.kept["scale"]


class Attribute(Base):
    def scale(self) -> Tensor:
        return self.__dict__.setdefault("kept", self.made())


class Variable(Base):
    def scale(self) -> Tensor:
        return vars(self).setdefault("kept", self.made())


class Entry(Base):
    def scale(self) -> Tensor:
        return self.memo.setdefault("scale", self.made())


class Factory(Base):
    def table(self) -> dict[str, Any]:
        return defaultdict(self.made)

    def scale(self) -> Tensor:
        return self.memo["scale"]


class Missing(dict[str, Any]):
    def __init__(self, model: Base) -> None:
        super().__init__()
        self.model = model

    def __missing__(self, key: str) -> Tensor:
        self[key] = made = self.model.made()
        return made


class Table(Base):
    def table(self) -> dict[str, Any]:
        return Missing(self)

    def scale(self) -> Tensor:
        return self.memo["scale"]


ALL = [Cached, Own, InSettings, Attribute, Variable, Entry, Factory, Table]


@pytest.mark.parametrize("kind", ALL)
def test_what_was_made_before_is_said(kind: type[Base]) -> None:
    model = kind().eval()
    model(X)
    plan = sc.plan(model, X, remove={"a": [1, 2]}, granularity="channel")
    said = [str(c) for c in plan.conditions if "as an earlier run has left it" in str(c)]
    assert len(said) == 1
    assert kind.__name__ in said[0]
    assert f"{Path(__file__).name}:" in said[0]


@pytest.mark.parametrize("kind", ALL)
def test_nothing_is_said_where_nothing_was_made(kind: type[Base]) -> None:
    model = kind().eval()
    view = sc.inspect(model, X)
    assert "earlier run" not in str(view)
    with pytest.raises(sc.SecateurError):  # the copy makes it of its own width
        sc.plan(model, X, remove={"a": [1, 2]}, granularity="channel").apply(model)
    assert "kept" not in vars(model)
    assert not model.memo


def test_a_property_that_is_called_is_not_asked_by_reading_the_source() -> None:
    class Called(Base):
        @functools.cached_property
        def kept(self) -> Callable[[], float]:
            width = self.a.out_features
            return lambda: float(width**-0.5)

        def scale(self) -> float:
            return self.kept()

    model = Called().eval()
    sc.inspect(model, X)
    assert "kept" not in vars(model)
