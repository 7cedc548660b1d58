"""Models that are unusual Python objects: the original stays, and the cut is right."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .harness import snapshot
from .references import Kept
from .usages import (
    Mlp,
    applied,
    data,
    equal,
    planned,
    thirds,
)

OBJECTS: dict[str, Callable[[], nn.Module]] = {}


def made(build: Any) -> Any:
    OBJECTS[build.__name__] = build
    return build


@made
class SharesWhenCopied(Mlp):
    """A copy keeps the very same first layer, as wrappers of frozen backbones do."""

    def __deepcopy__(self, memo: Any) -> SharesWhenCopied:
        new = type(self)()
        new.fc1 = self.fc1
        new.fc2.load_state_dict(self.fc2.state_dict())
        new.fc3.load_state_dict(self.fc3.state_dict())
        return new.train(self.training)


@made
class CopiesToItself(Mlp):
    """A copy is the model itself."""

    def __deepcopy__(self, memo: Any) -> CopiesToItself:
        return self


class Holder:
    """Copies by reference."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __deepcopy__(self, memo: Any) -> Holder:
        return self


@made
class HoldsALayerByReference(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.held = Holder(self.fc2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.held.module(self.fc1(x).relu()).relu())


@made
class LayerOfTheClass(Mlp):
    """A layer stands on the class: all instances and copies have the same."""

    shared = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.fc2(type(self).shared(self.fc1(x).relu()).relu()).relu())


class Child(nn.Module):
    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "parent", weakref.proxy(parent))

    def forward(self, h: Tensor) -> Tensor:
        return self.parent.fc2(h)


@made
class ParentByWeakReference(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.child = Child(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.child(self.fc1(x).relu()).relu())


class ChildOfParent(nn.Module):
    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        self.parents = [parent]

    def forward(self, h: Tensor) -> Tensor:
        return self.parents[0].fc2(h)


@made
class ParentInAList(ParentByWeakReference):
    def __init__(self) -> None:
        super().__init__()
        self.child = ChildOfParent(self)


@made
class Delegates(nn.Module):
    """Attributes come from the module inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Mlp()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.fc2(self.fc1(x).relu()).relu())


@made
class SlotsAndProperties(Mlp):
    @property
    def middle(self) -> nn.Module:
        return self.fc2

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.middle(self.fc1(x).relu()).relu())


@made
class WatchesItsAttributes(Mlp):
    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("fc") and name in self.__dict__.get("_modules", {}):
            raise AttributeError("frozen")
        super().__setattr__(name, value)


@made
class OwnStateDict(Mlp):
    """Saves its weights turned."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        return {k: v.t() if v.dim() == 2 else v for k, v in state.items()}

    def load_state_dict(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        return super().load_state_dict({k: v.t() if v.dim() == 2 else v for k, v in state.items()}, *args, **kwargs)


class TaggedParameter(nn.Parameter):
    """A parameter with a class of its own."""


@made
class TaggedParameters(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.fc2.weight = TaggedParameter(self.fc2.weight.data)
        self.fc1.weight.no_decay = True  # type: ignore[attr-defined]


@made
class LayersInADictionary(nn.Module):
    """Layers in a plain dictionary, registered under other names."""

    def __init__(self) -> None:
        super().__init__()
        self.table = {"a": nn.Linear(8, 24), "b": nn.Linear(24, 16), "c": nn.Linear(16, 4)}
        for name, layer in self.table.items():
            self.add_module(f"layer_{name}", layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.table["c"](self.table["b"](self.table["a"](x).relu()).relu())


@made
class DispatchTable(Mlp):
    """Bound methods in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = {"first": self.fc1.forward, "second": self.fc2.__call__}

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.steps["second"](self.steps["first"](x).relu()).relu())


@made
class LambdasInside(Mlp):
    """Closures over the layers, made once."""

    def __init__(self) -> None:
        super().__init__()
        second = self.fc2
        self.middle = lambda h: second(h)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.middle(self.fc1(x).relu()).relu())


@made
class HalfFrozenNoStatistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.bn, self.fc2 = nn.Linear(8, 24), nn.BatchNorm1d(24, track_running_stats=False), nn.Linear(24, 4)
        self.fc1.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.bn(self.fc1(x)).relu())


@made
class CumulativeStatistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.bn, self.fc2 = nn.Linear(8, 24), nn.BatchNorm1d(24, momentum=None), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.bn(self.fc1(x)).relu())


@made
class StrideZero(Mlp):
    """An expanded parameter: all rows are one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc2.weight = nn.Parameter(torch.randn(1, 24).expand(16, 24), requires_grad=False)


@made
class ReadOnlyArrays(Mlp):
    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            array = self.fc1.weight.detach().numpy().copy()
            array.setflags(write=False)
            self.fc1.weight = nn.Parameter(torch.from_numpy(array))


def plain(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


@pytest.mark.parametrize(
    ("name", "inplace"), thirds([(name, inplace) for name in OBJECTS for inplace in (False, True)], of=5)
)
def test_objects(name: str, inplace: bool) -> None:
    """The original stays as it was, and the cut model doesn't need it."""
    model, twin, x = plain(OBJECTS[name]), plain(OBJECTS[name]), data(5, 8)
    if name == "LayerOfTheClass":
        pytest.importorskip("torch")
    before, want_before = snapshot(model), model(x).detach()
    plan = planned(model, x)
    assert snapshot(model) == before, "plan changed the model"
    cut = applied(plan, model, inplace=inplace)
    if not inplace:
        assert snapshot(model) == before, "apply changed the model"
        equal(want_before, model(x))
        assert cut is not model
    kept = Kept(twin, plan)
    with torch.no_grad():  # zeros in the twin itself: some of these do not copy
        for tensor, dims in plan.cuts.items():
            for dim in dims:
                owner = (
                    twin.get_parameter(tensor) if tensor in dict(twin.named_parameters()) else twin.get_buffer(tensor)
                )
                owner.data = owner.data.clone().index_fill_(dim, kept.gone(tensor, dim), 0.0)
        want = twin(data(7, 8)).clone()
        if not inplace:
            for p in model.parameters():
                p.data = torch.full_like(p.data, 7.0)
        equal(want, cut(data(7, 8)))
