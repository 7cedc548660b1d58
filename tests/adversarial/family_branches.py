"""Control flow: what the example takes is not what other inputs, modes and sizes take."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .cases import ROWS, STEPS, Family, both, fixed, floats, quiet
from .nets import Mid

family = Family("branches", targets=(0.3, 0.5))
X, S = floats(*ROWS), floats(*STEPS)


def mid(name: str, inputs: Any, middle: Any, **options: Any) -> None:
    options.setdefault("must", "fc1.weight")
    family.add(name, lambda: Mid(middle), inputs, **options)


mid("one_sample_is_flipped", X, lambda m, h: h.flip(1) if h.shape[0] == 1 else h, condition="h.shape[0] == 1")
mid("long_sequences_are_rolled", S, lambda m, h: h.roll(3, -1) if h.shape[1] > 16 else h, condition="h.shape[1] > 16")
mid("rolled_in_training", X, lambda m, h: h.roll(1, 1) if m.training else h, condition="if m.training")
mid("loud_data_are_flipped", X, lambda m, h: h.flip(1) if h.norm() > 15 else h, condition="h.norm() > 15")
mid("item_decides", X, lambda m, h: h.cumsum(1) if h.max().item() > 3 else h, condition="h.max().item() > 3")
mid("any_decides", X, lambda m, h: h.cummax(1)[0] if bool((h > 3).any()) else h, condition="(h > 3).any()")
mid("gradients_decide", X, lambda m, h: h.flip(1) if torch.is_grad_enabled() else h, condition="torch.is_grad_enabled")
mid("width_is_a_multiple_of_eight", X, lambda m, h: 2 * h if h.shape[1] % 8 == 0 else h)
mid("width_equals_literal", X, lambda m, h: h.flip(1) if h.shape[-1] == 24 else h)
mid("out_features_decide", X, lambda m, h: 3 * h if m.fc1.out_features > 20 else h)
mid("weight_size_decides", X, lambda m, h: 3 * h if m.fc2.weight.numel() >= 90 else h)
mid("table_by_width", X, lambda m, h: h * {24: 2.0, 17: 0.5}.get(h.shape[1], 1.0))
mid("widest_side", X, lambda m, h: h + 1 if max(h.shape) > 20 else h)
mid("ranks_decide", floats((5, 8), (2, 6, 8)), lambda m, h: h.flip(-1) if h.dim() == 3 else h, condition="h.dim() == 3")
mid(
    "odd_batches_are_flipped",
    floats((4, 8), (5, 8)),
    lambda m, h: h.flip(1) if len(h) % 2 else h,
    condition="len(h) % 2",
)
mid("where_on_a_scalar", X, lambda m, h: torch.where(h.mean() > 0.6, h.flip(1), h))
mid("longer_than_wide", floats((2, 6, 8), (2, 20, 8)), lambda m, h: h if h.shape[1] < h.shape[2] else 2 * h)
mid("grad_of_input", X, lambda m, h: h.flip(1) if h.requires_grad and m.training else h, condition="h.requires_grad")
mid("two_rows_alike", floats((5, 8), (1, 8)), lambda m, h: h.roll(1, 1) if torch.equal(h[0], h[-1]) else h,
    condition="torch.equal")  # fmt: skip
mid("sum_of_sizes_in_a_set", X, lambda m, h: h.flip(1) if sum(h.shape) in {25, 33, 29} else h)


MANY = floats((5, 8), (1, 8), (12, 8))
mid(
    "reduced_as_often_as_the_batch_is_large",
    MANY,
    lambda m, h: functools.reduce(lambda t, _: t.flip(1), range(len(h) // 10), h),
    condition="range(len(h) // 10)",
)
mid(
    "functions_of_a_slice",
    MANY,
    lambda m, h: functools.reduce(lambda t, f: f(t), [torch.relu, torch.fliplr][: 1 + len(h) // 10], h),
    condition="torch.fliplr",
)
mid(
    "mapped_over_nothing",
    MANY,
    lambda m, h: sum(map(torch.fliplr, [h] * (len(h) // 10)), h),
    condition="map(torch.fliplr",
)
mid(
    "squeezed_batch_of_one",
    floats((5, 8), (9, 8), (1, 8)),
    lambda m, h: (h + h.squeeze().flip(0)).view(-1, h.shape[1]),
    condition="h.squeeze().flip(0)",
)


@family.case(X, right="channel", condition="self.training")
class AuxiliaryHead(nn.Module):
    """Deep supervision: a second head reads the hidden layer in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 24), nn.Linear(24, 20)
        self.out, self.side = nn.Linear(20, 3), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        y = self.out(self.b(h).relu())
        return y + 0.3 * self.side(h) if self.training else y


@family.case([*fixed((torch.randn(4, 8),)), *both(floats((4, 8)), fixed(True, False))], condition="if reverse")
class Keyword(Mid):
    """A flag of the call that the example leaves at its default."""

    def forward(self, x: Tensor, reverse: bool = False) -> Tensor:
        h = self.fc1(x).relu()
        return self.fc2(h.flip(1) if reverse else h)


@family.case([*fixed((torch.randn(2, 5, 8),)), *both(floats((2, 5, 8)), floats((2, 5)))], condition="if mask is None")
class OptionalMask(Mid):
    """A mask that is optional brings another way of pooling, over features as well."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.fc1(x).relu()
        if mask is None:
            return self.fc2(h.mean(1))
        return self.fc2((h * (mask > 0)[..., None]).sum(1).cumsum(-1))


@family.case(X)
class TriesTheFastWay(Mid):
    """The fast way needs the width that the layer was built with; the slow way is another function."""

    def __init__(self) -> None:
        super().__init__()
        self.shape = (4, 6)

    def mid(self, h: Tensor) -> Tensor:
        try:
            return h.view(-1, *self.shape).mul(2).flatten(1)
        except RuntimeError:
            return h


@family.case(X, condition="confidence > ")
class EarlyExit(nn.Module):
    """A confident first classifier ends the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 24), nn.Linear(24, 24)
        self.first, self.last = nn.Linear(24, 3), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        y = self.first(h)
        confidence = y.softmax(-1).max()
        if confidence > 0.75:
            return y
        return self.last(self.b(h).relu())


@family.case(X)
class ByCase(Mid):
    """Pattern matching on a shape."""

    def mid(self, h: Tensor) -> Tensor:
        match tuple(h.shape):
            case (_, 24):
                return h * 1.5
            case _:
                return h


@family.case(X)
class ChecksItsWidth(Mid):
    """A sanity check with the number that the author had in mind."""

    def mid(self, h: Tensor) -> Tensor:
        assert h.shape[1] == 24, h.shape
        return h * 2


@family.case(X, right="channel")
class ChecksItsLayer(Mid):
    """The same check, but against the layer, which follows a cut."""

    def mid(self, h: Tensor) -> Tensor:
        if h.shape[1] != self.fc2.in_features:
            raise ValueError("wrong width")
        return h * 2


@family.case(X)
class Halves(Mid):
    """Reduces until it is narrow enough: how often depends on the width."""

    def mid(self, h: Tensor) -> Tensor:
        rounds, width = 0, h.shape[1]
        while width > 8:
            rounds, width = rounds + 1, width // 2
        return h * rounds + 0.1 * rounds


@family.case(quiet(lambda: torch.zeros(4, 8), X), condition="if x.any()")
class SilentInput(Mid):
    """An example of zeros takes the way for padding."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x).relu()
        if x.any():
            h = h.flip(1)
        return self.fc2(h)
