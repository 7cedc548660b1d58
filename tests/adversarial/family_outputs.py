"""What comes out: numbers, words, dictionaries, hidden layers, losses, sizes, weights."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cases import IMAGES, ROWS, STEPS, Family, floats
from .references import over, plain

family = Family("outputs")
X, S, PICTURES = floats(*ROWS), floats(*STEPS), floats(*IMAGES)
Pair = namedtuple("Pair", "logits hidden")


@dataclass
class Output:
    """An output as a dataclass."""

    logits: Tensor
    norm: float = 0.0
    best: int = 0


class Two(nn.Module):
    """Two hidden layers; `pack` says what comes out."""

    def __init__(self, pack: Any) -> None:
        super().__init__()
        self.a, self.b, self.out, self.pack = nn.Linear(8, 24), nn.Linear(24, 20), nn.Linear(20, 4), pack

    def forward(self, x: Tensor) -> Any:
        a = self.a(x).relu()
        b = self.b(a).tanh()
        return self.pack(self, a, b, self.out(b))


def two(name: str, pack: Any, inputs: Any = X, **options: Any) -> None:
    family.add(name, lambda: Two(pack), inputs, **options)


mean_of_kept = over("pack", "a.weight", dim=(0, 1), out=None)
two("dictionary", lambda m, a, b, y: {"logits": y, "aux": y * 2}, right="channel")
two("hidden_too", lambda m, a, b, y: (y, a), right="channel")
two("all_hidden_in_a_list", lambda m, a, b, y: {"logits": y, "states": [a, b]})
two("named_tuple", lambda m, a, b, y: Pair(y, b), right="channel")
two("data_class", lambda m, a, b, y: Output(y), right="channel")
two("data_class_with_hidden", lambda m, a, b, y: Output(b))
two("number_of_the_best_channel", lambda m, a, b, y: (y, a.mean(0).argmax()))
two("number_as_int", lambda m, a, b, y: (y, int(a.mean(0).argmax())))
two("norm_as_float", lambda m, a, b, y: (y, float(a.norm())))
two("data_class_of_numbers", lambda m, a, b, y: Output(y, a.sum().item(), int(b[0].argmax())))
two("width_comes_out", lambda m, a, b, y: (y, a.shape[1]))
two("shape_comes_out", lambda m, a, b, y: (y, list(a.shape)))
two("shape_as_tensor", lambda m, a, b, y: (y, torch.tensor(a.shape)))
two("words_come_out", lambda m, a, b, y: (y, f"{a.shape[1]} channels, most in {int(a.mean(0).argmax())}"))
two("list_of_columns", lambda m, a, b, y: [y, *a.unbind(1)])
two("dictionary_by_channel", lambda m, a, b, y: {"y": y, **{f"c{i}": v for i, v in enumerate(a[0].tolist())}})
two("penalty_of_weights", lambda m, a, b, y: (y, m.a.weight.square().sum()))
two("weight_itself", lambda m, a, b, y: (y, m.b.weight))
two("number_of_parameters", lambda m, a, b, y: (y, sum(p.numel() for p in m.parameters())))
two("mean_of_hidden", lambda m, a, b, y: (y, a.mean()), truths=(plain, mean_of_kept))
two("sum_of_hidden", lambda m, a, b, y: (y, a.sum()))
two("sparsity_of_hidden", lambda m, a, b, y: (y, (a > 0).float().mean()), truths=(plain, mean_of_kept))
two("top_channels", lambda m, a, b, y: (y, a.topk(3, 1).indices))
two("top_values", lambda m, a, b, y: (y, a.topk(3, 1).values))
two("gram_matrix", lambda m, a, b, y: (y, a @ a.T), right="channel")
two("covariance", lambda m, a, b, y: (y, a.T @ a))
two("sparse", lambda m, a, b, y: (y, (a * (a > 0.5)).to_sparse()), train=False)
two("complex_output", lambda m, a, b, y: torch.complex(y, y * 2), right="channel")
two("nothing_else", lambda m, a, b, y: (y, None), right="channel")
two("bool_of_hidden", lambda m, a, b, y: (y, bool(a[:, 3].mean() > 0.2)))
two("detached_numpy", lambda m, a, b, y: (y, a.detach().numpy().tolist()))
two("padded_hidden", lambda m, a, b, y: (y, F.pad(a, (0, 4))))
two("normalised_hidden", lambda m, a, b, y: (y, F.normalize(b, dim=1)))
two("integers_of_hidden", lambda m, a, b, y: (y, (a > 0).long()))
two("hidden_pooled_over_rows", lambda m, a, b, y: (y, a.max(0).values))


@family.case(X)
class Generator(nn.Module):
    """Yields its outputs one by one, and is read by the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(8, 24), nn.Linear(24, 4)

    def steps(self, x: Tensor) -> Iterator[Tensor]:
        h = self.a(x).relu()
        yield self.out(h)
        yield h.flip(1)

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.steps(x))


@family.case(PICTURES)
class Pyramid(nn.Module):
    """A feature pyramid: laterals of one width, and all levels come out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3, 2, 1), nn.Conv2d(12, 16, 3, 2, 1)
        self.la, self.lb, self.smooth = nn.Conv2d(12, 10, 1), nn.Conv2d(16, 10, 1), nn.Conv2d(10, 6, 3, 1, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a = self.a(x).relu()
        b = self.b(a).relu()
        top = self.lb(b)
        low = self.la(a) + F.interpolate(top, size=a.shape[-2:])
        return {"high": self.smooth(top), "low": self.smooth(low)}


@family.case(X, right="channel")
class Autoencoder(nn.Module):
    """Returns a loss against its own input, and the code."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.mid, self.dec = nn.Linear(8, 24), nn.Linear(24, 3), nn.Linear(3, 24)
        self.out = nn.Linear(24, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        code = self.mid(self.enc(x).relu())
        return {"loss": F.mse_loss(self.out(self.dec(code).relu()), x), "code": code}


@family.case(X, truths=(plain, over("loss", "a.weight", out=None)))
class FeatureLoss(nn.Module):
    """A loss between two hidden layers: its mean runs over what is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 4)

    def loss(self, a: Tensor, b: Tensor) -> Tensor:
        return F.mse_loss(a, b)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a, b = self.a(x).relu(), self.b(x).relu()
        return {"y": self.out(a + b), "loss": self.loss(a, b)}
