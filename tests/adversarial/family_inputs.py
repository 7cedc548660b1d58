"""What comes in: numbers, indices, masks and tables beside the data; sizes that happen to be the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cases import Family, Make, both, fixed, floats, ids
from .nets import Mid

family = Family("inputs")
X = floats((5, 8), (1, 8), (9, 8))
ALIKE = floats((24, 8), (5, 8), (40, 8))  # a batch as large as the hidden layer is wide
SQUARE = floats((2, 24, 8), (1, 6, 8), (2, 30, 8))  # as many steps as units


def case(inputs: Any, **options: Any) -> Any:
    return family.case(inputs, **options)


def mid(name: str, middle: Any, inputs: Any = ALIKE, **options: Any) -> None:
    options.setdefault("must", "fc1.weight")
    family.add(name, lambda: Mid(middle), inputs, **options)


def vector(*seeds: int) -> list[Make]:
    return [lambda s=s: torch.rand(24, generator=torch.Generator().manual_seed(s)) for s in seeds]


@case(both(X, fixed(24, 10, 3, 24)))
class NumberOfUnits(Mid):
    """How many units are used is an argument."""

    def forward(self, x: Tensor, k: int) -> Tensor:
        h = self.fc1(x).relu()
        return F.linear(h[:, :k], self.fc2.weight[:, :k])


@case(both(X, fixed(0, 10, 3, 20)))
class NumberOfOneUnit(Mid):
    """One unit, by its number, is an output."""

    def forward(self, x: Tensor, k: int) -> Tensor:
        h = self.fc1(x).relu()
        return self.fc2(h) + h[:, k, None]


@case(both(X, fixed(*(torch.tensor(k) for k in (0, 10, 3, 20)))))
class NumberAsTensor(NumberOfOneUnit):
    """The same, as a tensor."""


@case(both(X, fixed(*(torch.tensor([k, k + 1]) for k in (0, 10, 3, 20)))))
class Picks(Mid):
    """A list of units to turn off."""

    def forward(self, x: Tensor, off: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu().index_fill(1, off, 0.0))


@case(both(X, vector(1, 2, 3, 4)))
class GivenScale(Mid):
    """A vector over hidden units comes from outside."""

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu() * scale)


@case(both(X, [lambda s=s: torch.randn(24, 24, generator=torch.Generator().manual_seed(s)) for s in range(4)]))
class GivenWeight(Mid):
    """A whole weight comes from outside."""

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu() @ w)


@case(both(X, fixed("tanh", "flip", "tanh", "flip")), condition='if how == "flip"')
class ByWord(Mid):
    """What is done is a word."""

    def forward(self, x: Tensor, how: str) -> Tensor:
        h = self.fc1(x).relu()
        if how == "flip":
            h = h.flip(1)
        return self.fc2(h.tanh())


@case(both(X, fixed(1.0, 2.0, 0.0, -1.0)), condition="if power < 0")
class ByNumber(Mid):
    """A temperature; negative ones turn the order round."""

    def forward(self, x: Tensor, power: float) -> Tensor:
        h = self.fc1(x).relu()
        if power < 0:
            h = h.roll(1, 1)
        return self.fc2(h * power)


@case(fixed({"x": torch.randn(4, 8), "deep": True}, {"x": torch.randn(3, 8), "deep": False}), condition="if not deep")
class ByFlag(nn.Module):
    """Named arguments; a flag leaves half of the network out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(8, 24), nn.Linear(24, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor, deep: bool = True) -> Tensor:
        h = self.a(x).relu()
        if not deep:
            return self.out(h.flip(1))
        return self.out(self.b(h).relu())


def lists(*sizes: int) -> list[Make]:
    return [
        lambda n=n: ([torch.randn(2, 8, generator=torch.Generator().manual_seed(i)) for i in range(n)],) for n in sizes
    ]


@case(lists(3, 1, 6))
class ListOfInputs(Mid):
    """Any number of inputs in a list, weighed by their place."""

    def forward(self, xs: list[Tensor]) -> Tensor:
        h = sum(self.fc1(x).relu() * (i + 1) for i, x in enumerate(xs))
        return self.fc2(h)


@case(lists(3, 1, 6), condition="if len(xs) > 4")
class ListThatTurns(Mid):
    def forward(self, xs: list[Tensor]) -> Tensor:
        h = torch.stack([self.fc1(x) for x in xs]).mean(0)
        if len(xs) > 4:
            h = h.roll(1, 1)
        return self.fc2(h)


@case([lambda: ({"a": {"b": torch.randn(4, 8)}, "k": [3]},), lambda: ({"a": {"b": torch.randn(2, 8)}, "k": [1]},)])
class NestedInputs(Mid):
    def forward(self, given: dict[str, Any]) -> Tensor:
        h = self.fc1(given["a"]["b"]).relu()
        return self.fc2(h) + h[:, given["k"][0], None]


@case(floats((5, 8), (5, 16), (5, 24)))
class AnyWidthOfInput(nn.Module):
    """The input may be wider: what is more is folded onto the front."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(8, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.a(x.unflatten(1, (-1, 8))).relu().sum(1))


@case(floats((2, 3, 8, 8), (2, 1, 8, 8)), condition="x.shape[1] == 1")
class GreyOrColour(nn.Module):
    """Grey images are repeated to three channels, and read the other way."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Conv2d(3, 16, 3), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1:
            return self.out(self.a(x.expand(-1, 3, -1, -1)).flip(1).mean((2, 3)))
        return self.out(self.a(x).mean((2, 3)))


mid("sliced_by_batch", lambda m, h: F.pad(h[:, : len(h)].tanh(), (0, max(0, h.shape[1] - len(h)))))
mid("square_transposed", lambda m, h: h + F.pad(h.T @ h, (0, 0))[:, : h.shape[1]].sum(0))
mid("gram_both_ways", lambda m, h: (h @ h.T).softmax(1) @ h, right="channel")
mid("gram_of_units", lambda m, h: h @ (h.T @ h).tanh(), right="channel")
mid("gram_of_units_softmax", lambda m, h: h + (h.T @ h).diagonal().tanh(), right="channel")
mid("arange_of_batch", lambda m, h: h * torch.arange(len(h))[:, None], right="channel")
mid("triangle_over_rows", lambda m, h: torch.ones(len(h), len(h)).tril() @ h, right="channel")
mid("triangle_over_units", lambda m, h: h @ torch.ones(h.shape[1], h.shape[1]).tril())
mid("shuffled_rows", lambda m, h: h[torch.arange(len(h)).flip(0)], right="channel")
mid("shuffled_units", lambda m, h: h[:, torch.arange(h.shape[1]).flip(0)])
mid("diagonal_of_square", lambda m, h: h * (1 + h.diagonal().sum().tanh()))
mid("transposed_if_square", lambda m, h: h + h.T if h.shape[0] == h.shape[1] else h)
mid("softmax_over_rows", lambda m, h: h.softmax(0), right="channel")
mid("cumulated_over_rows", lambda m, h: h.cumsum(0), right="channel")
mid("flattened_both", lambda m, h: h.flatten().view(h.shape[1], -1).T if len(h) == 24 else h)
mid("steps_and_units_swapped", lambda m, h: h.mT.softmax(-1).mT, SQUARE, right="channel")
mid(
    "attention_over_units",
    lambda m, h: (h.mT @ h).tanh() @ h.mT if False else h @ (h.mT @ h).tanh(),
    SQUARE,
    right="channel",
)
mid("triangle_over_steps", lambda m, h: torch.ones(h.shape[1], h.shape[1]).tril() @ h, SQUARE, right="channel")
mid("diagonal_over_both", lambda m, h: h * h.diagonal(0, 1, 2).sum(-1)[:, None, None].tanh(), SQUARE)
mid("tril_of_steps_and_units", lambda m, h: h.tril(), SQUARE)
mid("convolved_units", lambda m, h: F.avg_pool1d(h, 3, 1, 1), SQUARE)
mid("convolved_steps", lambda m, h: F.avg_pool1d(h.mT, 3, 1, 1).mT, SQUARE, right="channel")
mid("interpolated_units", lambda m, h: F.interpolate(F.interpolate(h, size=12), size=24), SQUARE)
mid("batch_matrix", lambda m, h: torch.bmm(h, h.mT).softmax(-1) @ h, SQUARE, right="channel")
mid("rolled_both", lambda m, h: h.roll((1, 1), (1, 2)), SQUARE)
mid("rolled_steps", lambda m, h: h.roll((1, 1), (0, 1)), SQUARE, right="channel")
mid("mean_of_the_wrong_axis", lambda m, h: h - h.mean(1, keepdim=True), SQUARE, right="channel")
mid("position_by_units", lambda m, h: h + torch.arange(h.shape[1])[:, None] * 0.1, SQUARE, right="channel")
mid("position_over_units", lambda m, h: h + torch.arange(h.shape[2]) * 0.1, SQUARE)
mid("position_over_units_by_steps", lambda m, h: h + torch.arange(24) * 0.1, SQUARE)


@dataclass(frozen=True)
class Sentences:
    tokens: Tensor
    mask: Tensor | None = None
    language: str = "en"


class Answer(NamedTuple):
    scores: Tensor
    states: Tensor | None
    counts: dict[str, Tensor]


def sentences(*shapes: tuple[int, ...]) -> list[Make]:
    return [lambda make=make: (Sentences(make()),) for make in ids(20, *shapes)]


@case(sentences((2, 6), (1, 1), (3, 17)), kinds="channel neuron", right="channel neuron")
class TokensInADataclass(nn.Module):
    """All that comes in lies in a dataclass, and a table of embeddings is read by it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.out = nn.Embedding(20, 12), nn.Linear(12, 18), nn.Linear(18, 3)

    def forward(self, given: Sentences) -> Answer:
        h = self.up(self.embed(given.tokens)).relu()
        there = given.tokens.ne(0) if given.mask is None else given.mask
        h = (h * there[..., None]).sum(1) / there.sum(1, keepdim=True).clamp(min=1)
        return Answer(self.out(h), None, {"words": there.sum(1)})


mid("a_size_to_the_power_of_a_flag", lambda m, h: h * (h.shape[-1] / 24) ** (len(h) > 30), condition="(len(h) > 30)")
mid("a_root_of_a_size_times_a_flag", lambda m, h: h * (1 + h.shape[-1] ** -0.5 * bool(h.dim() > 2)), right="channel")
