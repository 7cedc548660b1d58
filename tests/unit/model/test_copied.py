"""What has a say in how a module is copied is asked, wherever in a model it stands."""

from __future__ import annotations

import copy
import threading
from typing import Any, Self

import pytest
import torch
from torch import nn

from secateur.errors import UnsupportedError
from secateur.model.admit import require_copyable


class Plain(nn.Module):
    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2) if inner is None else inner


class HoldsALock(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class RefusesDeepcopy(Plain):
    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        raise RuntimeError("not this one")


class RefusesState(Plain):
    def __getstate__(self) -> dict[str, Any]:
        raise RuntimeError("not this one")


class NeedsAnArgument(Plain):
    def __new__(cls, inner: nn.Module) -> Self:
        return super().__new__(cls)

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)


class LockInAList(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.aside = [HoldsALock()]


def _lock_deep_inside() -> nn.Module:
    lock = threading.Lock()
    module = Plain()
    module.held = {"deep": [(lock,)]}
    return module


FAILING = {
    "a lock": HoldsALock,
    "__deepcopy__": RefusesDeepcopy,
    "__getstate__": RefusesState,
    "__new__": lambda: NeedsAnArgument(nn.ReLU()),
    "a module that is not registered": LockInAList,
    "deep in a table": _lock_deep_inside,
}


@pytest.mark.parametrize("around", ["by itself", "in plain modules", "beside plain ones", "twice"])
@pytest.mark.parametrize("name", FAILING)
def test_what_cannot_be_copied_is_found_where_it_stands(name: str, around: str) -> None:
    inner = FAILING[name]()
    model = {
        "by itself": lambda: inner,
        "in plain modules": lambda: Plain(nn.Sequential(Plain(), Plain(Plain(inner)))),
        "beside plain ones": lambda: nn.Sequential(nn.Linear(2, 2), Plain(), inner, nn.ReLU()),
        "twice": lambda: nn.ModuleList([inner, Plain(inner)]),
    }[around]()
    with pytest.raises((TypeError, RuntimeError), match=r"pickle|not this one|missing") as truth:
        copy.deepcopy(model)
    with pytest.raises(UnsupportedError, match="cannot be copied") as found:
        require_copyable(model)
    assert str(truth.value) in str(found.value)


def test_what_can_be_copied_passes_and_stays_as_it_is() -> None:
    model = Plain(nn.Sequential(Plain(), nn.BatchNorm1d(2), Plain(nn.GRU(2, 2))))
    model.inner[0].settings = {"rate": 0.5}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    require_copyable(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
