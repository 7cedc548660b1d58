"""Another path is taken for a reason outside of the model and its inputs: modes of torch, the process, globals."""

from __future__ import annotations

import contextvars
import logging
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


LEVEL = contextvars.ContextVar("LEVEL", default=0)


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
        return torch.are_deterministic_algorithms_enabled()  # the other path


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


def by_closure(test: Any) -> type[Net]:
    """A network whose question stands in a closure."""

    class Closed(Net):
        def other(self, x: Tensor) -> Any:
            return True if test(x) else None

    return Closed


asks("closure")(by_closure(lambda x: torch.is_autocast_enabled("cpu")))  # the other path


ASKS = (lambda x: len(x) > 0 and FAST, lambda x: x is None)  # the other path


asks("first_lambda_of_a_line")(by_closure(ASKS[0]))


asks("lambda_of_a_fact")(by_closure(lambda x: not x.is_contiguous()))  # the other path


@asks("level_of_a_logger")
class Logger(Net):
    def other(self, x: Tensor) -> Any:
        return logging.getLogger("secateur.turned").isEnabledFor(9)  # the other path


@asks("gradients_in_a_name")
class Gradients(Net):
    def other(self, x: Tensor) -> Any:
        inference = torch.is_inference_mode_enabled()
        if inference:  # the other path
            return True
        return None


@asks("variable_of_a_context")
class Context(Net):
    def other(self, x: Tensor) -> Any:
        return LEVEL.get() > 2  # the other path


@asks("backend")
class Backend(Net):
    def other(self, x: Tensor) -> Any:
        return not torch.backends.mkldnn.enabled and len(x) > 0  # the other path


class Switched(Net):
    """A switch, asked in a method of the class that others inherit from."""

    turned = False

    def other(self, x: Tensor) -> Any:
        return self.turned  # the other path


asks("handed_back")(Switched)


@asks("inherited")
class Inherited(Switched):
    def other(self, x: Tensor) -> Any:
        return super().other(x)


@asks("inherited_forward")
class InheritedForward(Switched):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


@asks("property")
class Property(Net):
    how = "plain"

    @property
    def is_turned(self) -> bool:
        return self.how == "turned"  # the other path

    def other(self, x: Tensor) -> Any:
        return self.is_turned


def unwrapped(method: Any) -> Any:
    """A decorator that hides what it decorates."""

    def call(self: Any, x: Tensor) -> Any:
        return method(self, x)

    return call


@asks("decorated")
class Decorated(Net):
    how = "plain"

    @unwrapped
    def other(self, x: Tensor) -> Any:
        return self.how == "turned"  # the other path


@asks("another_word_for_self")
class Another(Net):
    how = "plain"

    def forward(this, x: Tensor) -> Tensor:
        return this.fc3(this.fc2(this.fc1(x).relu()).relu()) * (-1 if this.turned() else 1)

    def turned(this) -> bool:
        return this.how == "turned"  # the other path
