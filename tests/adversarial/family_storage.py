"""Where weights live: plain lists, dictionaries, closures, other objects, several names, views of one storage."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cases import ROWS, Family, floats
from .nets import Mid

family = Family("storage")
X = floats(*ROWS)


def case(**options: Any) -> Any:
    return family.case(X, **options)


@case()
class LayersInAPlainList(nn.Module):
    """A layer that torch does not know reads the hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.hidden = nn.Linear(8, 24), [nn.Linear(24, 4)]

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden[0](self.a(x).relu())


@case()
class ProducerInAPlainList(nn.Module):
    """The layer that makes the units is not known, the one that reads them is."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = [nn.Linear(8, 24)], nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden[0](x).relu())


@case()
class NormInADict(Mid):
    """A norm over hidden units in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.tools = {"norm": nn.LayerNorm(24)}

    def mid(self, h: Tensor) -> Tensor:
        return self.tools["norm"](h)


@case()
class WeightInAClosure(Mid):
    def __init__(self) -> None:
        super().__init__()
        w = torch.randn(24, 24) / 5
        self.middle = lambda m, h: h @ w


@case()
class ParameterInATuple(Mid):
    def __init__(self) -> None:
        super().__init__()
        self.pair = (nn.Parameter(torch.rand(24)), nn.Parameter(torch.rand(24)))

    def mid(self, h: Tensor) -> Tensor:
        return h * self.pair[0] + self.pair[1]


@dataclass
class Settings:
    """A configuration that holds tensors and sizes."""

    width: int = 24
    scale: Tensor = field(default_factory=lambda: torch.linspace(1, 2, 24))


@case()
class TensorInAConfiguration(Mid):
    def __init__(self) -> None:
        super().__init__()
        self.settings = Settings()

    def mid(self, h: Tensor) -> Tensor:
        return h * self.settings.scale


@case()
class WidthInAConfiguration(Mid):
    """The width is read from a configuration, which nobody rewrites."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = SimpleNamespace(width=24)

    def mid(self, h: Tensor) -> Tensor:
        return h.view(len(h), self.settings.width, 1).mul(2).flatten(1)


@case()
class HalfWidthInAConfiguration(Mid):
    def __init__(self) -> None:
        super().__init__()
        self.settings = {"sizes": {"hidden": 24}}

    def mid(self, h: Tensor) -> Tensor:
        k = self.settings["sizes"]["hidden"] // 2
        return torch.cat([h[:, :k].tanh(), h[:, k:]], 1)


@case()
class OtherModelReadsIt(Mid):
    """A frozen teacher, kept outside of the modules, reads the hidden units."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "teacher", nn.Linear(24, 24).requires_grad_(False))

    def mid(self, h: Tensor) -> Tensor:
        return h + self.teacher(h)


@case(right="channel")
class TwoNames(nn.Module):
    """One layer under two names, used by both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(8, 24), nn.Linear(24, 4)
        self.again = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.a(x).relu() + self.again(x.flip(0)))


@case(right="channel")
class TwoNamesForOneWeight(nn.Module):
    """Two layers that share a weight but not the bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(48, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([self.a(x).relu(), self.b(x.flip(1)).relu()], 1))


@case()
class SharedWithATransposedPlace(nn.Module):
    """The same square weight makes units here and reads other units there."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.c.weight, self.out = self.b.weight, nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.c(self.b(self.a(x).relu()).tanh()))


@case()
class ViewsOfOneStorage(nn.Module):
    """Both weights are views of one flat buffer of floats."""

    def __init__(self) -> None:
        super().__init__()
        flat = torch.randn(8 * 24 + 24 * 4) / 4
        self.w1, self.w2 = nn.Parameter(flat[:192].view(24, 8)), nn.Parameter(flat[192:].view(4, 24))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.w1).relu(), self.w2)


@case()
class OneFlatParameter(nn.Module):
    """All weights in one flat parameter, cut to pieces in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Parameter(torch.randn(8 * 24 + 24 * 4) / 4)

    def forward(self, x: Tensor) -> Tensor:
        w1, w2 = self.flat.split([192, 96])
        return F.linear(F.linear(x, w1.view(24, 8)).relu(), w2.view(4, 24))


@case()
class OneStackedParameter(nn.Module):
    """Weights of two layers stacked in one parameter, taken by number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.w, self.out = nn.Linear(8, 16), nn.Parameter(torch.randn(2, 16, 16) / 4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        for i in range(2):
            h = (h @ self.w[i]).tanh()
        return self.out(h)


@case(right="channel")
class NotContiguous(nn.Module):
    """Weights kept transposed in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(8, 24), nn.Linear(24, 4)
        self.a.weight = nn.Parameter(torch.randn(8, 24).T)
        self.out.weight = nn.Parameter(torch.randn(24, 4).T)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.a(x).relu())


@case(right="channel")
class ParameterDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.ParameterDict({"a": torch.randn(8, 24), "b": torch.randn(24, 4)})

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.w["a"]).relu() @ self.w["b"]


@case()
class ParameterPerUnit(nn.Module):
    """Every hidden unit is a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.out = nn.ParameterList([torch.randn(8) for _ in range(12)]), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.stack([x @ r for r in self.rows], 1).relu())


@case()
class LayerPerUnit(nn.Module):
    """A list of layers, each of which makes four of the units that the last one reads."""

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.out = nn.ModuleList([nn.Linear(8, 4) for _ in range(5)]), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([part(x) for part in self.parts], 1).relu())


@case()
class LayerPerUnitScaledByNumber(LayerPerUnit):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([part(x) * (i + 1) for i, part in enumerate(self.parts)], 1).relu())


@case()
class PropertyOfTwoWeights(Mid):
    """A weight that is a property, put together from two."""

    def __init__(self) -> None:
        super().__init__()
        self.top, self.low = nn.Parameter(torch.randn(12, 24)), nn.Parameter(torch.randn(12, 24))

    @property
    def both(self) -> Tensor:
        return torch.cat([self.top, self.low]) / 5

    def mid(self, h: Tensor) -> Tensor:
        return h @ self.both


@case(right="channel")
class NotSaved(Mid):
    """A buffer that is not saved with the model."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.linspace(1, 2, 24), persistent=False)

    def mid(self, h: Tensor) -> Tensor:
        return h * self.scale


@case()
class NeverUsed(Mid):
    """A layer that no forward reaches, of the same width."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(24, 24)


@case(condition="len(x) < 8")
class UsedByAnotherMethod(Mid):
    """Another head, which another method calls; the forward calls it on long batches alone."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(24, 4)

    def features(self, h: Tensor) -> Tensor:
        return self.other(h)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x).relu()
        return self.fc2(h) if len(x) < 8 else self.features(h)


@case(right="channel")
class Frozen(Mid):
    """The first layer is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1.requires_grad_(False)


@case(train=False)
class WrittenInEachForward(Mid):
    """The second weight is copied from the first before it is used."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.fc2.weight.copy_(self.fc1.weight[:, :4].T)
        return super().forward(x)


@case(train=False)
class SetInEachForward(Mid):
    """`weight.data` is replaced in the forward."""

    def forward(self, x: Tensor) -> Tensor:
        self.fc2.weight.data = self.fc2.weight.data.clone()
        return super().forward(x)


@case()
class CallableObject(Mid):
    """An object that is no module holds a table and is called."""

    class Scale:
        def __init__(self) -> None:
            self.table = torch.linspace(1, 2, 24)

        def __call__(self, h: Tensor) -> Tensor:
            return h * self.table[: h.shape[1]]

    def __init__(self) -> None:
        super().__init__()
        self.scale = self.Scale()

    def mid(self, h: Tensor) -> Tensor:
        return self.scale(h)
