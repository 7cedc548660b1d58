"""Weights that are not their own: tied, shared, computed from others, normalised, quantised, generated."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm

from .cases import ROWS, STEPS, Family, floats, ids
from .nets import Mid
from .references import effective, every, over, plain

family = Family("weights")
X, S = floats(*ROWS), floats(*STEPS)
OUT, INTO = {0: "fc1.bias"}, {1: "fc1.bias"}


def wrapped(first: Any = None, second: Any = None) -> Any:
    def build() -> nn.Module:
        model = Mid()
        for name, wrap in (("fc1", first), ("fc2", second)):
            if wrap:
                wrap(getattr(model, name))
        return model

    return build


class Symmetric(nn.Module):
    """W + W^T of a square."""

    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).mT


class Positive(nn.Module):
    """Element by element: free to cut."""

    def forward(self, w: Tensor) -> Tensor:
        return F.softplus(w)


class Centred(nn.Module):
    """Rows without their mean."""

    def forward(self, w: Tensor) -> Tensor:
        return w - w.mean(1, keepdim=True)


class PerTensorScale(nn.Module):
    """Fake quantisation with one scale for the whole tensor."""

    def forward(self, w: Tensor) -> Tensor:
        step = w.abs().max() / 3
        return w + ((w / step).round() * step - w).detach()


def register(module: nn.Module) -> Any:
    return lambda layer: parametrize.register_parametrization(layer, "weight", module, unsafe=True)


both_layers = every(effective("fc1", OUT), effective("fc2", INTO))
for name, first, second in (
    ("weight_norm_first", weight_norm, None),
    ("weight_norm_second", None, weight_norm),
    ("weight_norm_over_inputs", None, lambda m: weight_norm(m, dim=1)),
    ("weight_norm_whole", None, lambda m: weight_norm(m, dim=None)),
    ("new_weight_norm_first", parametrizations.weight_norm, None),
    ("new_weight_norm_second", None, parametrizations.weight_norm),
    ("spectral_norm_first", spectral_norm, None),
    ("spectral_norm_second", None, spectral_norm),
    ("new_spectral_norm", parametrizations.spectral_norm, parametrizations.spectral_norm),
    ("orthogonal", parametrizations.orthogonal, None),
    ("orthogonal_second", None, parametrizations.orthogonal),
    ("positive", register(Positive()), None),
    ("positive_second", None, register(Positive())),
    ("centred_first", register(Centred()), None),
    ("centred_second", None, register(Centred())),
    ("quantised_first", register(PerTensorScale()), None),
    ("quantised_second", None, register(PerTensorScale())),
):
    family.add(name, wrapped(first, second), X, truths=(both_layers,), train=False)


class Computed(nn.Module):
    """The second layer's weight is computed in the forward by `how`."""

    def __init__(self, how: Any, **extra: Any) -> None:
        super().__init__()
        self.fc1, self.w, self.how = nn.Linear(8, 24), nn.Parameter(torch.randn(4, 24) / 3), how
        for key, value in extra.items():
            setattr(self, key, value)

    def weight(self) -> Tensor:
        return self.how(self)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.fc1(x).relu(), self.weight())


def computed(name: str, how: Any, extra: Any = None, **options: Any) -> None:
    options.setdefault("truths", (effective("weight", INTO),))
    family.add(name, lambda: Computed(how, **(extra() if extra else {})), X, train=False, **options)


computed("standardised", lambda m: (m.w - m.w.mean(1, keepdim=True)) / (m.w.std(1, keepdim=True) + 0.1))
computed("unit_rows", lambda m: F.normalize(m.w, dim=1))
computed("unit_columns", lambda m: F.normalize(m.w, dim=0), right="channel")
computed("divided_by_its_norm", lambda m: m.w / m.w.norm())
computed("divided_by_its_maximum", lambda m: m.w / m.w.abs().max())
computed("binary_with_scale", lambda m: m.w.sign() * m.w.abs().mean(1, keepdim=True))
computed("ternary", lambda m: m.w.sign() * (m.w.abs() > 0.7 * m.w.abs().mean()))
computed("largest_half", lambda m: m.w * (m.w.abs() >= m.w.abs().median()))
computed("softmax_of_weights", lambda m: m.w.softmax(1))
computed("softmax_over_outputs", lambda m: m.w.softmax(0), right="channel")
computed("cumulated", lambda m: m.w.cumsum(1))
computed("exponential", lambda m: m.w.exp() / 9, right="channel")
computed(
    "low_rank",
    lambda m: m.a @ m.b,
    lambda: {"a": nn.Parameter(torch.randn(4, 3)), "b": nn.Parameter(torch.randn(3, 24))},
    right="channel",
    truths=(plain,),
)
computed(
    "lora",
    lambda m: m.w + 0.5 * m.a @ m.b,
    lambda: {"a": nn.Parameter(torch.randn(4, 3)), "b": nn.Parameter(torch.randn(3, 24))},
    right="channel",
    truths=(plain,),
)
computed(
    "kronecker",
    lambda m: torch.kron(m.a, m.b),
    lambda: {"a": nn.Parameter(torch.randn(2, 4)), "b": nn.Parameter(torch.randn(2, 6))},
)
computed(
    "circulant",
    lambda m: torch.stack([m.a.roll(i)[:24] for i in range(4)]),
    lambda: {"a": nn.Parameter(torch.randn(24))},
)
computed("toeplitz", lambda m: m.a.unfold(0, 24, 1)[:4], lambda: {"a": nn.Parameter(torch.randn(27))})
computed("weight_of_both_triangles", lambda m: m.w.tril(8) + m.w.triu(9) * 2)
computed(
    "outer_product",
    lambda m: torch.outer(m.a, m.b),
    lambda: {"a": nn.Parameter(torch.randn(4)), "b": nn.Parameter(torch.randn(24))},
    right="channel",
    truths=(plain,),
)
computed("repeated", lambda m: m.a.repeat(1, 2), lambda: {"a": nn.Parameter(torch.randn(4, 12))})
computed("repeat_interleaved", lambda m: m.a.repeat_interleave(2, 1), lambda: {"a": nn.Parameter(torch.randn(4, 12))})
computed("looked_up", lambda m: m.a[:, torch.arange(24) % 5], lambda: {"a": nn.Parameter(torch.randn(4, 5))})
computed("hashed", lambda m: m.a[(torch.arange(96) * 7 % 31).view(4, 24)], lambda: {"a": nn.Parameter(torch.randn(31))})
computed("from_first_layer", lambda m: m.fc1.weight[:, :4].T * 2, right="channel")
computed("from_first_layer_normalised", lambda m: (m.fc1.weight / m.fc1.weight.norm())[:, :4].T)
computed(
    "hypernetwork",
    lambda m: m.net(m.code).view(4, 24),
    lambda: {"net": nn.Linear(5, 96), "code": nn.Parameter(torch.randn(5))},
    truths=(plain,),
)
computed(
    "hypernetwork_by_rows",
    lambda m: m.net(m.code).T,
    lambda: {"net": nn.Linear(5, 4), "code": nn.Parameter(torch.randn(24, 5))},
    right="channel",
    truths=(plain,),
)
computed(
    "exponent_of_matrix",
    lambda m: torch.linalg.matrix_exp(m.a)[:4],
    lambda: {"a": nn.Parameter(torch.randn(24, 24) / 9)},
)
computed(
    "householder",
    lambda m: (torch.eye(24) - 2 * torch.outer(m.a, m.a) / m.a.dot(m.a))[:4],
    lambda: {"a": nn.Parameter(torch.randn(24))},
)
computed(
    "inverse", lambda m: torch.linalg.inv(m.a)[:4], lambda: {"a": nn.Parameter(torch.randn(24, 24) + 6 * torch.eye(24))}
)
computed("masked_by_position", lambda m: m.w * (torch.arange(24) % 3 > 0))
computed("sorted", lambda m: m.w.sort(1).values)
computed(
    "pruned_by_buffer",
    lambda m: m.w * m.mask,
    lambda: {"mask": nn.Buffer((torch.rand(4, 24) > 0.3).float())},
    right="channel",
)
computed("average_of_two", lambda m: (m.w + m.ema) / 2, lambda: {"ema": nn.Buffer(torch.randn(4, 24))}, right="channel")
computed(
    "complex_weight",
    lambda m: torch.view_as_complex(m.a).abs(),
    lambda: {"a": nn.Parameter(torch.randn(4, 24, 2))},
    right="channel",
)


@family.case(X, right="channel")
class TiedAutoencoder(nn.Module):
    """The decoder is the transposed encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.bias, self.out = nn.Linear(8, 24), nn.Parameter(torch.zeros(8)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.linear(self.enc(x).relu(), self.enc.weight.T, self.bias))


@family.case(X)
class TiedSquare(nn.Module):
    """One square weight, used straight and transposed: rows and columns are the same units."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.w, self.out = nn.Linear(8, 16), nn.Parameter(torch.randn(16, 16) / 4), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.out((h @ self.w).tanh() @ self.w.T)


@family.case(X)
class SharedTwice(nn.Module):
    """One layer used twice in a row: its inputs are its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        for _ in range(3):
            h = self.b(h).tanh()
        return self.out(h)


@family.case(X)
class SharedFlipped(SharedTwice):
    """Used twice, mirrored between."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.b(self.b(self.a(x)).flip(1)))


@family.case(ids(20, (2, 6), (1, 3), (3, 11)), right="channel")
class TiedEmbedding(nn.Module):
    """Output logits by the table of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(20, 16), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, t: Tensor) -> Tensor:
        h = self.table(t)
        return F.linear(h + self.down(self.up(h).relu()), self.table.weight)


@family.case(ids(20, (2, 6), (1, 3), (3, 11)))
class ScaledTiedEmbedding(TiedEmbedding):
    """Inputs times the root of the width, as in many translation models."""

    def forward(self, t: Tensor) -> Tensor:
        h = self.table(t) * math.sqrt(self.table.embedding_dim)
        return F.linear(h + self.down(self.up(h).relu()).tanh(), self.table.weight)


@family.case(X)
class SharedAcrossWidths(nn.Module):
    """A slice of one weight serves as another's (slimmable networks)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.big = nn.Linear(8, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.big(h) + F.linear(h[:, :12], self.big.weight[:, :12])


@family.case(X, truths=(plain, over("cosine", "a.weight", dim=(1, 1), out=None)), right="channel")
class Cosine(nn.Module):
    """Cosine classifier with normalised features and prototypes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.proto = nn.Linear(8, 24), nn.Parameter(torch.randn(4, 24))

    def cosine(self, h: Tensor, w: Tensor) -> Tensor:
        return F.normalize(h, dim=1) @ F.normalize(w, dim=1).T

    def forward(self, x: Tensor) -> Tensor:
        return 8 * self.cosine(self.a(x).relu(), self.proto)
