"""What a tensor is, what an argument is given as, switches of modules: the lines that decide by them are told."""

from __future__ import annotations

import linecache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.structure.capture import capture
from secateur.structure.switches import MOST_LINES
from secateur.types import Condition

MARK = "# decides"
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """`turns` says whether the hidden units are turned round."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 32), nn.Linear(32, 4)
        self.make()

    def make(self) -> None:
        """More state."""

    def turns(self, x: Tensor) -> Any:
        return False

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.fc1(x))
        return self.fc2(h.flip(-1) if self.turns(x) else h)


# -- what a tensor is ----------------------------------------------------------------------------------------------


class Dtype(Net):
    def turns(self, x: Tensor) -> Any:
        return x.dtype == torch.float64  # decides


class DtypeByName(Net):
    def turns(self, x: Tensor) -> Any:
        kind = x.dtype
        if kind in (torch.float64, torch.int64):  # decides
            return True
        return None


class DtypeAsKey(Net):
    def turns(self, x: Tensor) -> Any:
        return {torch.float64: True}.get(x.dtype, False)  # decides


class Floating(Net):
    def turns(self, x: Tensor) -> Any:
        return not x.is_floating_point()  # decides


class FloatingByFunction(Net):
    def turns(self, x: Tensor) -> Any:
        return not torch.is_floating_point(x)  # decides


class Layout(Net):
    def turns(self, x: Tensor) -> Any:
        return not x.is_contiguous()  # decides


class Strides(Net):
    def turns(self, x: Tensor) -> Any:
        return x.stride(-1) != 1  # decides


class Gradient(Net):
    def turns(self, x: Tensor) -> Any:
        return x.requires_grad  # decides


class GradientOfWeight(Net):
    def turns(self, x: Tensor) -> Any:
        return True if not self.fc1.weight.requires_grad else None  # decides


class Device(Net):
    def turns(self, x: Tensor) -> Any:
        return x.device.type == "cuda"  # decides


class Rank(Net):
    """Of a single row, which is no number that is followed."""

    def turns(self, x: Tensor) -> Any:
        return x[0].dim() == 2  # decides


class RankAsAttribute(Net):
    def turns(self, x: Tensor) -> Any:
        return x[0].ndim > 1  # decides


class OfTheHidden(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.fc1(x))
        if h.is_cuda:  # decides
            h = h.flip(-1)
        return self.fc2(h)


FACTS = [
    Dtype, DtypeByName, DtypeAsKey, Floating, FloatingByFunction, Layout, Strides, Gradient, GradientOfWeight, Device,
    OfTheHidden, Rank, RankAsAttribute,
]  # fmt: skip


# -- what an argument is -------------------------------------------------------------------------------------------


class Instance(Net):
    def forward(self, x: Any) -> Tensor:
        array = not isinstance(x, Tensor)
        h = F.relu(self.fc1(torch.as_tensor(x)))
        return self.fc2(h.flip(-1) if array else h)  # decides


class Class(Net):
    def turns(self, x: Tensor) -> Any:
        return type(x) is not Tensor  # decides

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.fc1(x))
        return self.fc2(h.flip(-1) if self.turns(x) else h)


class Same(Net):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        query = x
        h = F.relu(self.fc1(x)) + self.fc1(y)
        return self.fc2(h.flip(-1) if query is y else h)  # decides


class GivenOrNot(Net):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h = F.relu(self.fc1(x))
        return self.fc2(h.flip(-1) if y is None else h + self.fc1(y))  # decides


class Keywords(Net):
    def forward(self, x: Tensor, **more: Any) -> Tensor:
        h = F.relu(self.fc1(x))
        return self.fc2(h.flip(-1) if more.get("back") else h)  # decides


class KeywordsTaken(Net):
    def forward(self, x: Tensor, **more: Any) -> Tensor:
        back = more.pop("back", False)
        h = F.relu(self.fc1(x))
        return self.fc2(h.flip(-1) if back else h)  # decides


class KeywordsHandedOn(Net):
    def hidden(self, x: Tensor, back: bool = False) -> Tensor:
        h = F.relu(self.fc1(x))
        return h.flip(-1) if back else h  # decides

    def forward(self, x: Tensor, **more: Any) -> Tensor:
        return self.fc2(self.hidden(x, **more))


class KeyOfTensors(Net):
    def forward(self, given: dict[str, Tensor]) -> Tensor:
        h = F.relu(self.fc1(given["x"]))
        return self.fc2(h.flip(-1) if "back" in given else h)  # decides


FORMS: list[tuple[type[Net], Any]] = [
    (Instance, X), (Class, X), (Same, (X, X.clone())), (GivenOrNot, (X, X)), (Keywords, X), (KeywordsTaken, X),
    (KeywordsHandedOn, X), (KeyOfTensors, ({"x": X},)),
]  # fmt: skip


# -- switches ------------------------------------------------------------------------------------------------------


class Flag(Net):
    def make(self) -> None:
        self.back = False

    def turns(self, x: Tensor) -> Any:
        return True if self.back else None  # decides


class FlagByName(Net):
    def make(self) -> None:
        self.back = False

    def turns(self, x: Tensor) -> Any:
        back = self.back
        if not back:  # decides
            return None
        return True


class FlagOfTheClass(Net):
    back = False

    def turns(self, x: Tensor) -> Any:
        return self.back and len(x)  # decides


class FlagByGetattr(Net):
    def make(self) -> None:
        self.back = False

    def turns(self, x: Tensor) -> Any:
        return getattr(self, "back", False) or None  # decides


class Word(Net):
    def make(self) -> None:
        self.back = "no"

    def turns(self, x: Tensor) -> Any:
        return self.back == "yes"  # decides


class Share(Net):
    def make(self) -> None:
        self.back = 0.0

    def turns(self, x: Tensor) -> Any:
        return self.back > 0.5  # decides


class NumberAsFlag(Net):
    def make(self) -> None:
        self.back = 0

    def turns(self, x: Tensor) -> Any:
        return True if self.back else None  # decides


class InAConfig(Net):
    def make(self) -> None:
        self.config = SimpleNamespace(back=False)

    def turns(self, x: Tensor) -> Any:
        return True if self.config.back else None  # decides


class OfAPart(Net):
    def make(self) -> None:
        self.part = Flag()

    def turns(self, x: Tensor) -> Any:
        self.part(x)
        return None


SWITCHES = [Flag, FlagByName, FlagOfTheClass, FlagByGetattr, Word, Share, NumberAsFlag, InAConfig, OfAPart]


def marked(condition: Condition) -> bool:
    name, _, line = condition.where.rpartition(":")
    return name.endswith("test_asked.py") and MARK in linecache.getline(__file__, int(line))


@pytest.mark.parametrize("kind", FACTS)
def test_a_line_that_decides_by_what_a_tensor_is(kind: type[Net]) -> None:
    conditions = capture(kind().eval(), X).conditions
    assert any(marked(c) and "of this tensor is" in c.text for c in conditions), [str(c) for c in conditions]


@pytest.mark.parametrize(("kind", "example"), FORMS, ids=[kind.__name__ for kind, _ in FORMS])
def test_a_line_that_decides_by_what_an_argument_is(kind: type[Net], example: Any) -> None:
    conditions = capture(kind().eval(), example).conditions
    assert any(marked(c) for c in conditions), [str(c) for c in conditions]


@pytest.mark.parametrize("kind", SWITCHES)
def test_a_line_that_decides_by_an_attribute(kind: type[Net]) -> None:
    plan = sc.plan(kind().eval(), X, target={"sparsity": 0.2}, granularity="channel")
    told = [c for c in plan.conditions if marked(c) and "back=" in c.text]
    assert told, [str(c) for c in plan.conditions]
    assert all(str(c) in plan.explain() for c in told)


def test_what_decides_nothing_is_not_said() -> None:
    class Quiet(Net):
        def make(self) -> None:
            self.p, self.how, self.keep = 0.1, "tanh", True

        def forward(self, x: Tensor) -> Tensor:
            places = torch.arange(len(x), dtype=x.dtype, device=x.device)
            h = F.dropout(self.fc1(x.to(self.fc1.weight.dtype)), self.p, self.keep and False)
            return self.fc2(h) + 0 * places[:, None]

    found = [str(c) for c in capture(Quiet().eval(), X).conditions]
    assert not any("dtype" in text or "device" in text or "how" in text for text in found), found


def test_many_switches_are_bounded_and_the_rest_is_counted() -> None:
    class Many(Net):
        def make(self) -> None:
            self.k = 0.5

        def turns(self, x: Tensor) -> Any:
            found = []
            found.append(self.k > 1)
            found.append(self.k > 2)
            found.append(self.k > 3)
            found.append(self.k > 4)
            found.append(self.k > 5)
            found.append(self.k > 6)
            found.append(self.k > 7)
            found.append(self.k > 8)
            found.append(self.k > 9)
            found.append(self.k > 10)
            found.append(self.k > 11)
            found.append(self.k > 12)
            found.append(self.k > 13)
            found.append(self.k > 14)
            return any(found)

    said = [c.text for c in capture(Many().eval(), X).conditions if "k=0.5" in c.text]
    assert len(said) == MOST_LINES
    assert said[-1].endswith("2 more such lines are left out")


def test_a_weight_of_which_only_its_dtype_is_asked_has_not_been_reached() -> None:
    class Beside(Net):
        def make(self) -> None:
            self.aux = nn.Linear(8, 4)

        def turns(self, x: Tensor) -> Any:
            return self.aux.weight.dtype == torch.float64 or self.aux.weight.ndim == 3 or not self.aux.weight.is_leaf

    found = [c.text for c in capture(Beside().eval(), X).conditions]
    assert "parameters that the forward never reached stay whole: aux.weight, aux.bias" in found


# -- integers that other methods read --------------------------------------------------------------------------------


class Grows(Net):
    """One integer is read by the forward, one by a method beside it, one names nothing that is cut."""

    def make(self) -> None:
        self.width, self.hidden, self.classes = 32, 32, 4

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)).reshape(len(x), self.width))

    def reset(self) -> None:
        self.fc2 = nn.Linear(self.hidden, self.classes)


def test_an_integer_that_another_method_reads_is_named_with_the_method() -> None:
    plan = sc.plan(Grows().eval(), X, target={"sparsity": 0.2}, granularity="channel")
    said = [str(c) for c in plan.conditions if "for the forward alone" in c.text]
    assert len(said) == 1
    assert "Grows.reset() reads hidden, which stays 32" in said[0]
    cut = plan.apply(Grows().eval(), example=X)
    assert cut.hidden == 32
    assert cut.width == cut.fc1.out_features < 32


class OtherWidth(Grows):
    """What the forward runs is not what the class behind it has under the name, which nobody can call."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)).flatten(self.reset()))

    def reset(self) -> int:
        return 1


def test_an_overridden_method_is_not_named() -> None:
    plan = sc.plan(OtherWidth().eval(), X, target={"sparsity": 0.2}, granularity="channel")
    assert not [c.text for c in plan.conditions if "for the forward alone" in c.text]


class Averages(Net):
    """Averages of the weights by their names, which another method moves; and tensors of which none is of a width."""

    def make(self) -> None:
        self.average = {name: p.detach().clone() for name, p in self.named_parameters()}
        self.weights = [self.fc1.weight, self.fc2.weight]
        self.steps = torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)))

    def move(self) -> None:
        self.steps += len(self.weights)
        for name, p in self.named_parameters():
            self.average[name].lerp_(p.detach(), 0.1)


def test_tensors_beside_the_weights_that_another_method_reads_are_named_with_it() -> None:
    plan = sc.plan(Averages().eval(), X, target={"sparsity": 0.2}, granularity="channel")
    said = [str(c) for c in plan.conditions if "for the forward alone" in c.text]
    assert len(said) == 1
    assert "Averages.move() reads average, which stays as it is and may have a width that is cut" in said[0]
    cut = plan.apply(Averages().eval(), example=X)
    with pytest.raises(RuntimeError, match="must match"):  # what the condition is there to say
        cut.move()
