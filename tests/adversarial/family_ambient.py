"""Another path is taken for a reason that is no value of a tensor: layout, identity, mode, size, a word."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

from .cases import Family, floats

family = Family("ambient")
ROWS = floats((5, 8), (1, 8), (9, 8))


class Net(nn.Module):
    """Where `other` says so, the hidden units are weighed by their place."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(8, 24), nn.Linear(24, 16), nn.Linear(16, 4)
        self.make()

    def make(self) -> None:
        """More state."""

    def ramp(self, h: Tensor) -> Tensor:
        return h * torch.linspace(0.5, 2.0, h.shape[-1], dtype=h.dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x).relu()
        if self.other(x):
            h = self.ramp(h)
        return self.fc3(self.fc2(h).relu())

    def other(self, x: Tensor) -> bool:
        raise NotImplementedError


def case(more: Any = (), **options: Any) -> Any:
    options.setdefault("condition", "the other path")
    return family.case([*ROWS, *more], **options)  # the other path


def data(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))  # the other path


@case([lambda: data(600, 8)])
class ManyRows(Net):
    def other(self, x: Tensor) -> bool:
        return len(x) > 512  # the other path


@case([lambda: data(600, 8)])
class ManyElements(Net):
    def other(self, x: Tensor) -> bool:
        return x.numel() >= 2**12  # the other path


@case([lambda: data(64, 8)])
class RowsInATable(Net):
    def other(self, x: Tensor) -> bool:
        return {16: False, 64: True}.get(len(x), False)  # the other path


@case([lambda: data(4, 8)])
class RowsEven(Net):
    def other(self, x: Tensor) -> bool:
        return not x.shape[0] % 4  # the other path


@case([lambda: data(8, 5).t()])
class LayoutTransposed(Net):
    def other(self, x: Tensor) -> bool:
        return not x.is_contiguous()  # the other path


@case([lambda: data(5, 16)[:, ::2]])
class Strides(Net):
    def other(self, x: Tensor) -> bool:
        return x.stride(-1) != 1  # the other path


@case([lambda: data(3, 5, 8)])
class Dimensions(Net):
    def other(self, x: Tensor) -> bool:
        return x.dim() == 3  # the other path


@case([lambda: data(5, 8).requires_grad_()])
class InputWithGradient(Net):
    def other(self, x: Tensor) -> bool:
        return x.requires_grad  # the other path


@case()
class GradientMode(Net):
    def other(self, x: Tensor) -> bool:
        return torch.is_grad_enabled()  # the other path


@case()
class InferenceMode(Net):
    def other(self, x: Tensor) -> bool:
        return not torch.is_inference_mode_enabled()  # the other path


@case()
class TrainingOfASubmodule(Net):
    def make(self) -> None:
        self.drop = nn.Dropout(0.0)

    def other(self, x: Tensor) -> bool:
        return self.drop.training  # the other path


@case()
class FrozenOrNot(Net):
    def other(self, x: Tensor) -> bool:
        return not self.fc1.weight.requires_grad or self.fc1.weight.grad_fn is not None  # the other path


@case([lambda: data(5, 8).abs()])
class AllPositive(Net):
    def other(self, x: Tensor) -> bool:
        return bool((x >= 0).all())  # the other path


@case([lambda: 1e4 * data(5, 8)])
class LargeValues(Net):
    def other(self, x: Tensor) -> bool:
        return x.abs().max().item() > 1e3  # the other path


@case([lambda: torch.zeros(5, 8)])
class SilentRows(Net):
    def other(self, x: Tensor) -> bool:
        return not torch.count_nonzero(x)  # the other path


@case([lambda: data(1, 8).repeat(5, 1)])
class EqualRows(Net):
    def other(self, x: Tensor) -> bool:
        return len(x) > 1 and torch.equal(x[0], x[1])  # the other path


@case([lambda: torch.full((5, 8), float("nan"))])
class BrokenValues(Net):
    def other(self, x: Tensor) -> bool:
        return bool(x.isnan().any())  # the other path


@case([lambda: data(5, 8).numpy()])
class ArrayInput(Net):
    """Takes arrays too."""

    def forward(self, x: Any) -> Tensor:
        array = not isinstance(x, Tensor)
        h = self.fc1(torch.as_tensor(x)).relu()
        if array:  # the other path
            h = self.ramp(h)
        return self.fc3(self.fc2(h).relu())


@case([lambda: (data(5, 8), data(5, 8))])
class OptionalSecondInput(Net):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:  # the other path
        h = self.fc1(x).relu()
        if y is not None:  # the other path
            h = self.ramp(h) + self.fc1(y)
        return self.fc3(self.fc2(h).relu())


def _twice() -> tuple[Tensor, Tensor]:
    x = data(5, 8)
    return x, x


@family.case([lambda: (data(5, 8), data(5, 8, seed=6)), _twice], condition="the other path")
class SameTensorTwice(Net):
    """Self-attention is told from cross attention by identity."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.fc1(x).relu() + self.fc1(y)
        if x is y:  # the other path
            h = self.ramp(h)
        return self.fc3(self.fc2(h).relu())


@family.case(
    [lambda: {"x": data(5, 8)}, lambda: {"x": data(5, 8), "mode": "ramp"}, lambda: {"x": data(3, 8), "power": 2}],
    condition="the other path",
)
class WordsAndPowers(Net):
    def forward(self, x: Tensor, mode: str = "plain", power: int = 1) -> Tensor:  # the other path
        h = self.fc1(x).relu()
        if mode == "ramp" or power > 1:  # the other path
            h = self.ramp(h) ** power
        return self.fc3(self.fc2(h).relu())


@family.case([lambda: {"x": data(5, 8)}, lambda: {"x": data(5, 8), "reverse": True}], condition="extra.get")
class AnyKeywords(Net):
    def forward(self, x: Tensor, **extra: Any) -> Tensor:
        h = self.fc1(x).relu()
        if extra.get("reverse"):
            h = h.flip(-1)
        return self.fc3(self.fc2(h).relu())


@family.case([lambda: (data(5, 8),), lambda: (data(5, 8), data(5, 8))], condition="for number")
class AnyArguments(Net):
    def forward(self, *xs: Tensor) -> Tensor:
        h = 0
        for number, x in enumerate(xs):
            h = h + self.fc1(x).relu().roll(number, -1)
        return self.fc3(self.fc2(h).relu())


@family.case([lambda: [data(5, 8)], lambda: [data(5, 8), data(5, 8)]], condition="len(xs)")
class NumberOfInputsInAList(Net):
    def forward(self, xs: Any) -> Tensor:
        xs = xs if isinstance(xs, list) else [xs]
        h = torch.stack([self.fc1(x).relu() for x in xs]).sum(0)
        if len(xs) > 1:
            h = h.cumsum(-1)
        return self.fc3(self.fc2(h).relu())


@family.case([lambda: (data(5, 8), 1.0), lambda: (data(5, 8), 0.5), lambda: (data(5, 8), 0)], condition="ratio")
class FloatArgument(Net):
    """A share of the hidden units, as in slimmable networks."""

    def forward(self, x: Tensor, ratio: float) -> Tensor:
        h = self.fc1(x).relu()
        active = int(ratio * h.shape[-1])
        if active < h.shape[-1]:
            h = torch.cat([h[..., :active], torch.zeros_like(h[..., active:])], -1)
        return self.fc3(self.fc2(h).relu())


@family.case([lambda: (data(5, 8), 24), lambda: (data(5, 8), 12), lambda: (data(5, 8), 6)], condition="width")
class Slimmable(Net):
    """Weights are sliced to the width that is asked for."""

    def forward(self, x: Tensor, width: int) -> Tensor:
        h = torch.nn.functional.linear(x, self.fc1.weight[:width], self.fc1.bias[:width]).relu()
        h = torch.nn.functional.linear(h, self.fc2.weight[:, :width], self.fc2.bias).relu()
        return self.fc3(h)


@family.case(
    [lambda: (data(5, 8), {"scale": 1.0}), lambda: (data(5, 8), {"scale": 1.0, "skip": True})], condition="in options"
)
class OptionsDictionary(Net):
    def forward(self, x: Tensor, options: dict[str, Any]) -> Tensor:
        h = self.fc1(x).relu() * options["scale"]
        if "skip" in options:
            h = h - h[..., :1]
        return self.fc3(self.fc2(h).relu())


class Counted(Net):
    """The second call differs from the first."""

    def make(self) -> None:
        self.calls = 0

    def other(self, x: Tensor) -> bool:
        self.calls += 1
        return self.calls > 1  # the other path


family.add("SecondCall", Counted, ROWS)


@case()
class CountedInABuffer(Net):
    def make(self) -> None:
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def other(self, x: Tensor) -> bool:
        self.calls += 1
        return self.calls.item() % 2 == 0  # the other path


@case()
class EveryHundredthCall(Net):
    """Hidden behind a remainder."""

    def make(self) -> None:
        self.step = 0

    def other(self, x: Tensor) -> bool:
        self.step += 1
        return self.step % 2 == 0  # the other path


@case(right="channel")
class LeavesItsWidth(Net):
    """What it leaves behind is a width, which the original has left there before."""

    def make(self) -> None:
        self.seen = {"width": 24}

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x).relu()
        self.seen["width"] = h.shape[-1]
        return self.fc3(self.fc2(h).relu())


@case()
class PythonChance(Net):
    """A coin of Python's own, fixed by its seed."""

    def other(self, x: Tensor) -> bool:
        return random.Random(len(x)).random() < 0.5  # the other path


@case(train=False)
class WarmupCache(Net):
    """The first call stores the hidden mean, later ones subtract it."""

    def make(self) -> None:
        self.mean = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x).relu()
        if self.mean is None:
            self.mean = h.mean(0, keepdim=True).detach()
        else:
            h = h - self.mean
        return self.fc3(self.fc2(h).relu())
