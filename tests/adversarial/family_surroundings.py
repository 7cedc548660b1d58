"""Another path is taken for a reason that lies outside of the model and its inputs: modes of torch, the process, globals."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch import Tensor, nn

from .cases import Family, floats

family = Family("surroundings")
ROWS = floats((5, 8), (1, 8), (9, 8))
FAST = False
SETTINGS = {"fast": False, "how": "plain"}


class Options:
    """Switches of a whole program."""

    turned = False


class Net(nn.Module):
    """Where `other` says so, the hidden units are turned round."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(8, 24), nn.Linear(24, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x).relu()
        if self.other(x):
            h = h.flip(-1)
        return self.fc3(self.fc2(h).relu())

    def other(self, x: Tensor) -> Any:
        raise NotImplementedError


def asks(name: str) -> Any:
    """Registers a network that stays on its first path here; the line says what it asks."""
    return family.case(ROWS, name=name, condition="the other path")


@asks("environment")
class Environment(Net):
    def other(self, x: Tensor) -> Any:
        return "SECATEUR_TURNED" in os.environ  # the other path


@asks("environment_get")
class EnvironmentGet(Net):
    def other(self, x: Tensor) -> Any:
        return os.environ.get("SECATEUR_TURNED")  # the other path


@asks("environment_through_a_name")
class EnvironmentNamed(Net):
    def other(self, x: Tensor) -> Any:
        level = int(os.getenv("SECATEUR_TURNED", "0"))
        return level > 1  # the other path


@asks("autocast")
class Autocast(Net):
    def other(self, x: Tensor) -> Any:
        return torch.is_autocast_enabled("cpu")  # the other path


@asks("compiling")
class Compiling(Net):
    def other(self, x: Tensor) -> Any:
        return torch.compiler.is_compiling()  # the other path


@asks("deterministic")
class Deterministic(Net):
    def other(self, x: Tensor) -> Any:
        if torch.are_deterministic_algorithms_enabled():  # the other path
            return True
        return False


@asks("threads")
class Threads(Net):
    def other(self, x: Tensor) -> Any:
        many = torch.get_num_threads()
        return many > 999  # the other path


@asks("global_flag")
class GlobalFlag(Net):
    def other(self, x: Tensor) -> Any:
        return FAST  # the other path


@asks("global_table")
class GlobalTable(Net):
    def other(self, x: Tensor) -> Any:
        return SETTINGS["fast"]  # the other path


@asks("global_word")
class GlobalWord(Net):
    def other(self, x: Tensor) -> Any:
        return SETTINGS["how"] == "turned"  # the other path


@asks("attribute_of_another_class")
class AnotherClass(Net):
    def other(self, x: Tensor) -> Any:
        return Options.turned and len(x) > 0  # the other path


@asks("platform")
class Platform(Net):
    def other(self, x: Tensor) -> Any:
        return sys.platform == "plan9"  # the other path


def turned() -> bool:
    """A helper that looks around."""
    return bool(os.environ.get("SECATEUR_TURNED"))


@asks("helper")
class Helper(Net):
    def other(self, x: Tensor) -> Any:
        return turned()  # the other path
