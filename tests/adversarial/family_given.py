"""Another path is taken by what an input is: its dtype, its class, its layout, how much there is of it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .cases import Family, fixed, floats
from .family_ambient import ROWS, Net, data

family = Family("given")


def case(more: Any = (), **options: Any) -> Any:
    options.setdefault("condition", "the other path")
    return family.case([*ROWS, *more], **options)  # the other path


@case([lambda: data(5, 8).double()], train=False)
class TakesDoubles(Net):
    """Casts to its own dtype, and takes another path before."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.dtype == torch.float64
        h = self.fc1(x.to(self.fc1.weight.dtype)).relu()
        if wide:  # the other path
            h = self.ramp(h)
        return self.fc3(self.fc2(h).relu())


@case([lambda: data(5, 8).half()], train=False)
class TakesHalves(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x.float()).relu()
        h = h.cumsum(-1) if x.dtype is torch.float16 else h  # the other path
        return self.fc3(self.fc2(h).relu())


@case([lambda: (255 * data(5, 8)).to(torch.uint8)], train=False)
class TakesBytes(Net):
    """Pictures as bytes are scaled first, and by a table of the hidden units after it."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x.float()).relu()
        if not x.is_floating_point():  # the other path
            h = self.ramp(h)
        return self.fc3(self.fc2(h).relu())


class Marked(torch.Tensor):
    """A tensor with a name."""


@case([lambda: data(5, 8).as_subclass(Marked)], train=False)
class SubclassOfTensor(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x.as_subclass(Tensor)).relu()
        if type(x) is Marked:  # the other path
            h = self.ramp(h)
        return self.fc3(self.fc2(h).relu())


@case(train=False)
class SparseInput(Net):
    """Sparse rows are densified."""

    def other(self, x: Tensor) -> bool:
        return x.layout != torch.strided  # the other path

    def forward(self, x: Tensor) -> Tensor:
        sparse = self.other(x)
        h = self.fc1(x.to_dense()).relu()
        if sparse:  # the other path
            h = self.ramp(h)
        return self.fc3(self.fc2(h).relu())


@case()
class TriesFirst(Net):
    """An exception decides."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x).relu()
        try:
            h = h * torch.ones(9)[: len(x), None].reshape(len(x), 1)
            h = h.view(5, 24)
        except RuntimeError:  # the other path
            h = self.ramp(h)
        return self.fc3(self.fc2(h).relu())


@case(train=False)
class Warns(Net):
    """Warnings made errors would stop it; it counts them."""

    def other(self, x: Tensor) -> bool:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            if len(x) == 9:  # the other path
                warnings.warn("nine", stacklevel=1)
        return bool(seen)


@case([lambda: data(40, 8)])
class LoopOverChunks(Net):
    """Rows go through in pieces of sixteen; later pieces are weighed."""

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for number, part in enumerate(x.split(16)):
            h = self.fc1(part).relu()
            found.append(self.fc2(h.roll(number, -1)).relu())
        return self.fc3(torch.cat(found))


@family.case(fixed(torch.randn(2, 6, 8), torch.randn(2, 40, 8), torch.randn(1, 70, 8)), condition="while")
class WhileLong(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x).relu()
        while h.shape[1] > 32:
            h = (h[:, 0::2][:, : h.shape[1] // 2] + h[:, 1::2]).flip(-1)
        return self.fc3(self.fc2(h).relu())


@family.case(floats((2, 6, 8), (1, 3, 8), (2, 40, 8)), condition="min(")
class PositionsClipped(Net):
    """Only long inputs reach the part of the table that differs per unit."""

    def make(self) -> None:
        table = torch.ones(64, 24)
        table[20:] = torch.linspace(0.5, 2, 24)
        self.register_buffer("table", table, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x).relu() * self.table[: min(x.shape[1], 64)]
        return self.fc3(self.fc2(h).relu())
