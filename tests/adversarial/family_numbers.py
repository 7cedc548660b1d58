"""Numbers made of a width, of weights or of their sums, which something hides on the example: a far bound, a gate."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cases import ROWS, Family, floats
from .references import Kept, copied, over, put

family = Family("numbers")
X = floats(*ROWS, loud=1e4)  # the last input is past every bound that hides a number


class Numbers(nn.Module):
    """Two layers; `number` is made of the hidden features or of a weight, `hide` does something with it."""

    def __init__(self, number: Callable[[nn.Module, Tensor], Any], hide: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 24), nn.Linear(24, 4)
        self.made, self.hide = number, hide

    def number(self, h: Tensor) -> Any:
        return self.made(self, h)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x).relu()
        return self.hide(self.fc2(h), self.number(h))


class Anew(Numbers):
    """What is made of a weight goes to the hidden features."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x).relu()
        return self.fc2(self.hide(h, self.number(h)))


def as_before(model: nn.Module, kept: Kept) -> None:
    """The truth of a number: the one that the whole original makes, whatever was cut."""
    origin: Any = copied(kept.model)
    put(model, "number", lambda h: origin.number(h))


HIDE: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "gate": lambda y, n: y + (y - 99).relu() * n,
    "bound": lambda y, n: y.clamp(max=999.0 * n) if isinstance(n, (int, float)) else torch.minimum(y, 999 * n),
    "where": lambda y, n: torch.where(y > 99 * n, 2 * y, y),
    "maximum": lambda y, n: torch.maximum(y, y.abs() * 1e-3 * n - 99),
    "argmax": lambda y, n: F.one_hot((y - (y - 99).relu() * n).argmax(-1), 4) * y,
}
OF_WIDTH: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "shape": lambda m, h: h.shape[-1],
    "features": lambda m, h: m.fc1.out_features,
    "rows_of_the_weight": lambda m, h: m.fc1.weight.size(0) / 3,
    "parameters": lambda m, h: sum(p.numel() for p in m.parameters()),
    "root": lambda m, h: math.sqrt(h.shape[-1]),
    "text": lambda m, h: float(f"{1.0 * h.shape[-1]}"),
    "ones": lambda m, h: torch.ones_like(h).sum(-1, keepdim=True),
    "positions": lambda m, h: torch.arange(h.shape[-1]).max(),
    "diagonal": lambda m, h: torch.eye(h.shape[-1]).trace(),
    "interval": lambda m, h: torch.linspace(0, h.shape[-1], 2)[1],
    "expanded": lambda m, h: torch.ones(1).expand(h.shape[-1]).sum(),
    "product_of_ones": lambda m, h: torch.ones_like(h) @ torch.ones(h.shape[-1], 1),
}
OF_WEIGHTS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "float": lambda m, h: float(m.fc1.weight.detach().abs().sum()),
    "item": lambda m, h: m.fc1.weight.norm().item(),
    "list": lambda m, h: sum(map(abs, m.fc1.weight.sum(0).tolist())),
    "numpy": lambda m, h: float(np.abs(m.fc1.weight.detach().numpy()).sum()),
    "numpy_of_a_sum": lambda m, h: float(m.fc1.weight.detach().abs().sum().numpy()),
    "smallest": lambda m, h: 1e3 * m.fc1.bias.abs().min().item(),
    "count": lambda m, h: int(m.fc1.weight.count_nonzero()),
    "file": lambda m, h: json.loads(json.dumps(m.fc1.weight.abs().sum().item())),
    "buffered": lambda m, h: float(sum(v.abs().sum() for v in m.state_dict().values())),
    "alpha": lambda m, h: torch.add(torch.ones(1), 1.0, alpha=m.fc1.bias.abs().sum()),
    "tensor": lambda m, h: m.fc1.weight.abs().sum(),
    "norm": lambda m, h: m.fc1.weight.norm(),
}
ANEW: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "centred": lambda m, h: m.fc1.bias - m.fc1.bias.mean(),
    "normalised": lambda m, h: F.normalize(m.fc1.bias, dim=0),
    "standardised": lambda m, h: (m.fc1.bias - m.fc1.bias.min()) / m.fc1.bias.std(),
    "shares": lambda m, h: m.fc1.bias.softmax(0),
    "summed": lambda m, h: m.fc1.bias.sum(),
}
MEANS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "by_width": lambda m, h: h.sum(-1, keepdim=True) / h.shape[-1],
    "by_ones": lambda m, h: h.sum(-1, keepdim=True) / torch.ones_like(h).sum(-1, keepdim=True),
    "of_squares": lambda m, h: (h.square().sum(-1, keepdim=True) / h.shape[-1]).sqrt(),
}


def add(name: str, number: Any, hide: Any, kind: type[Numbers] = Numbers, **options: Any) -> None:
    family.add(name, lambda: kind(number, hide), X, **{"truths": (as_before,), **options})


for kinds, prefix in ((OF_WIDTH, "width"), (OF_WEIGHTS, "weights")):
    for place, (made, made_by) in enumerate(kinds.items()):
        hidden = list(HIDE)[place % len(HIDE)]
        add(f"{prefix}_{made}_{hidden}", made_by, HIDE[hidden])
for made, made_by in ANEW.items():
    add(f"anew_{made}", made_by, lambda h, n: h + n, Anew)
    add(f"anew_{made}_as_gate", made_by, lambda h, n: h * n, Anew)
    add(f"anew_{made}_hidden", made_by, lambda h, n: h + (h - 99).relu() * n, Anew)
for made, made_by in MEANS.items():
    add(f"mean_{made}", made_by, HIDE["gate"], truths=(over("number", "fc1.weight", out=None),), right="channel")


@family.case(X, right="channel")
class PenaltyBeside(Numbers):
    """A penalty of weights is an output of its own: that of the weights that are left."""

    def __init__(self) -> None:
        super().__init__(lambda m, h: 0, lambda y, n: y)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), 0.1 * self.fc1.weight.square().sum()
