"""Recurrences: cells, gates, states, scans, by module and by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .cases import Family, floats
from .references import over, plain

family = Family("recurrent")
S = floats((2, 6, 8), (1, 1, 8), (3, 17, 8))


class Cellular(nn.Module):
    """A recurrent module between two layers."""

    def __init__(self, rnn: nn.Module, wide: int, last: bool = False) -> None:
        super().__init__()
        self.stem, self.rnn, self.out, self.last = nn.Linear(8, 12), rnn, nn.Linear(wide, 3), last

    def forward(self, x: Tensor) -> Tensor:
        y = self.rnn(self.stem(x).tanh())[0]
        return self.out(y[:, -1] if self.last else y)


for name, make, wide in (
    ("lstm", lambda: nn.LSTM(12, 10, batch_first=True), 10),
    ("lstm_two_layers", lambda: nn.LSTM(12, 10, 2, batch_first=True), 10),
    ("lstm_projected", lambda: nn.LSTM(12, 10, proj_size=6, batch_first=True), 6),
    ("lstm_both_ways", lambda: nn.LSTM(12, 10, batch_first=True, bidirectional=True), 20),
    ("gru", lambda: nn.GRU(12, 10, batch_first=True), 10),
    ("gru_without_bias", lambda: nn.GRU(12, 10, bias=False, batch_first=True), 10),
    ("rnn_tanh", lambda: nn.RNN(12, 10, batch_first=True), 10),
    ("gru_over_the_wrong_axis", lambda: nn.GRU(12, 10), 10),
):
    family.add(name, lambda make=make, wide=wide: Cellular(make(), wide), S)


class Loop(nn.Module):
    """A cell written down, run step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out, self.wide = nn.Linear(8, 12), nn.Linear(10, 3), 10
        self.make()

    def make(self) -> None:
        self.w, self.u = nn.Linear(12, 10), nn.Linear(10, 10, bias=False)

    def start(self, x: Tensor) -> Any:
        return torch.zeros(len(x), self.wide)

    def step(self, x: Tensor, h: Any) -> Any:
        return (self.w(x) + self.u(h)).tanh()

    def read(self, h: Any) -> Tensor:
        return h

    def forward(self, x: Tensor) -> Tensor:
        h, found = self.start(x), []
        for t in range(x.shape[1]):
            h = self.step(self.stem(x[:, t]).relu(), h)
            found.append(self.read(h))
        return self.out(torch.stack(found, 1))


def case(**options: Any) -> Any:
    return family.case(S, **options)


@case()
class Elman(Loop):
    """The width of the state as an attribute."""


@case(right="channel")
class LearnedStart(Loop):
    def make(self) -> None:
        super().make()
        self.h0 = nn.Parameter(torch.randn(10))

    def start(self, x: Tensor) -> Any:
        return self.h0.expand(len(x), -1)


@case()
class StartByWeight(Loop):
    """The width of the state from the weight."""

    def start(self, x: Tensor) -> Any:
        return x.new_zeros(len(x), self.u.weight.shape[0])


@case(right="channel", must="u.weight")
class StartOfOldCode(Loop):
    """`tensor.new(sizes)`, from before there was `new_zeros`."""

    def start(self, x: Tensor) -> Any:
        return next(self.parameters()).data.new(len(x), self.wide).zero_()


@case()
class StartByTypedTensor(Loop):
    def start(self, x: Tensor) -> Any:
        return torch.FloatTensor(len(x), self.wide).zero_()


@case()
class StartByLiteral(Loop):
    def start(self, x: Tensor) -> Any:
        return torch.zeros(len(x), 10)


@case()
class Gates(Loop):
    """LSTM by chunks of one layer."""

    def make(self) -> None:
        self.w, self.u = nn.Linear(12, 40), nn.Linear(10, 40)

    def start(self, x: Tensor) -> Any:
        return torch.zeros(len(x), self.wide), torch.zeros(len(x), self.wide)

    def step(self, x: Tensor, h: Any) -> Any:
        i, f, g, o = (self.w(x) + self.u(h[0])).chunk(4, 1)
        c = f.sigmoid() * h[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    def read(self, h: Any) -> Tensor:
        return h[0]


@case()
class Peephole(Gates):
    """Gates look at the cell through weights of their own."""

    def make(self) -> None:
        super().make()
        self.peep = nn.Parameter(torch.randn(3, 10))

    def step(self, x: Tensor, h: Any) -> Any:
        i, f, g, o = (self.w(x) + self.u(h[0])).chunk(4, 1)
        i, f = i + self.peep[0] * h[1], f + self.peep[1] * h[1]
        c = f.sigmoid() * h[1] + i.sigmoid() * g.tanh()
        return (o + self.peep[2] * c).sigmoid() * c.tanh(), c


@case(truths=(over("master", "out.weight", of=1),))
class OrderedNeurons(Gates):
    """ON-LSTM: master gates by a cumulated softmax over units."""

    def master(self, f: Tensor) -> Tensor:
        return f.softmax(-1).cumsum(-1)

    def step(self, x: Tensor, h: Any) -> Any:
        i, f, g, o = (self.w(x) + self.u(h[0])).chunk(4, 1)
        f = self.master(f)
        c = f * h[1] + (1 - f) * g.tanh() * i.sigmoid()
        return o.sigmoid() * c.tanh(), c


@case()
class Clockwork(Loop):
    """Units in groups that update at their own rate."""

    def make(self) -> None:
        super().make()
        self.time = 0

    def start(self, x: Tensor) -> Any:
        self.time = 0
        return super().start(x)

    def step(self, x: Tensor, h: Any) -> Any:
        self.time += 1
        new = super().step(x, h)
        return torch.cat([new[:, :5], new[:, 5:] if self.time % 2 else h[:, 5:]], 1)


@case()
class Independent(Loop):
    """IndRNN: every unit sees itself alone."""

    def make(self) -> None:
        self.w, self.u = nn.Linear(12, 10), nn.Parameter(torch.rand(10))

    def step(self, x: Tensor, h: Any) -> Any:
        return (self.w(x) + self.u * h).relu()


@case()
class Echo(Loop):
    """A fixed random reservoir in a buffer."""

    def make(self) -> None:
        self.w = nn.Linear(12, 10)
        self.register_buffer("u", torch.randn(10, 10) / 5)

    def step(self, x: Tensor, h: Any) -> Any:
        return (self.w(x) + h @ self.u).tanh()


@case()
class ReservoirRing(Loop):
    """Units in a ring: each hears the one before."""

    def make(self) -> None:
        self.w = nn.Linear(12, 10)

    def step(self, x: Tensor, h: Any) -> Any:
        return (self.w(x) + 0.9 * h.roll(1, 1)).tanh()


@case(right="channel")
class QuasiRecurrent(nn.Module):
    """QRNN: convolutions over time, then an elementwise scan."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv1d(8, 24, 2), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        z, f = self.conv(F.pad(x.mT, (1, 0))).chunk(2, 1)
        h, found = torch.zeros_like(z[..., 0]), []
        for t in range(z.shape[-1]):
            h = f[..., t].sigmoid() * h + (1 - f[..., t].sigmoid()) * z[..., t].tanh()
            found.append(h)
        return self.out(torch.stack(found, 1))


@case(right="channel")
class StateSpace(nn.Module):
    """A selective state space: depthwise convolution, steps by rank, A in logarithms, gate."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.state, self.rank = 12, 4, 2
        self.stem, self.into, self.out = nn.Linear(8, 10), nn.Linear(10, 24, bias=False), nn.Linear(12, 10)
        self.conv = nn.Conv1d(12, 12, 3, padding=2, groups=12)
        self.x, self.dt = nn.Linear(12, 2 + 8, bias=False), nn.Linear(2, 12)
        self.a_log, self.d = nn.Parameter(torch.rand(12, 4)), nn.Parameter(torch.ones(12))
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.into(self.stem(x)).chunk(2, -1)
        u = F.silu(self.conv(u.mT)[..., : x.shape[1]].mT)
        dt, b, c = self.x(u).split([self.rank, self.state, self.state], -1)
        dt, a = F.softplus(self.dt(dt)), -self.a_log.exp()
        h, found = torch.zeros(len(x), u.shape[2], self.state), []
        for t in range(x.shape[1]):
            h = (dt[:, t, :, None] * a).exp() * h + dt[:, t, :, None] * b[:, t, None] * u[:, t, :, None]
            found.append((h * c[:, t, None]).sum(-1))
        y = torch.stack(found, 1) + u * self.d
        return self.head(self.out(y * F.silu(z)))


@case()
class Retention(nn.Module):
    """A decay per head, computed from its number, by a matrix of distances."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = 3, nn.Linear(8, 36), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        decay = 1 - 2.0 ** (-2 - torch.arange(self.heads, dtype=torch.float))
        p = torch.arange(n)
        d = (decay[:, None, None] ** (p[:, None] - p).clamp(min=0)).tril()
        return self.out(((q @ k.mT * d) @ v).transpose(1, 2).reshape(b, n, -1))


family.add("retention_by_heads", Retention, S, kinds="head head_dim")


@case(right="channel")
class DeltaRule(nn.Module):
    """Fast weights: an outer-product memory with a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.beta = nn.Linear(8, 10), nn.Linear(8, 10), nn.Linear(8, 12), nn.Linear(8, 1)
        self.out = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, beta = self.q(x), F.normalize(self.k(x), dim=-1), self.v(x), self.beta(x).sigmoid()
        m = torch.zeros(len(x), k.shape[2], v.shape[2])
        found = []
        for t in range(x.shape[1]):
            old = torch.einsum("bk,bkv->bv", k[:, t], m)
            m = m + torch.einsum("bk,bv->bkv", k[:, t], beta[:, t] * (v[:, t] - old))
            found.append(torch.einsum("bk,bkv->bv", q[:, t], m))
        return self.out(torch.stack(found, 1))


@case()
class Packed(nn.Module):
    """Sequences of other lengths, packed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.rnn, self.out = nn.Linear(8, 12), nn.GRU(12, 10, batch_first=True), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.arange(x.shape[1], x.shape[1] - len(x), -1).clamp(min=1)
        packed = pack_padded_sequence(self.stem(x), lengths, batch_first=True)
        y, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.out(y)


@case(right="channel")
class CellModules(nn.Module):
    """A GRU cell fed with its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.cell, self.out = nn.Linear(8, 12), nn.GRUCell(12, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, found = None, []
        for t in range(x.shape[1]):
            h = self.cell(self.stem(x[:, t]).relu(), h)
            found.append(h)
        return self.out(torch.stack(found, 1))


@case()
class HiddenComesOut(nn.Module):
    """The last hidden state is an output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.rnn, self.out = nn.Linear(8, 12), nn.LSTM(12, 10, batch_first=True), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Any:
        y, state = self.rnn(self.stem(x).relu())
        return self.out(y), state


@case(right="channel")
class Integrator(nn.Module):
    """A neural differential equation by Euler steps; how many depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.f1, self.f2, self.out = nn.Linear(8, 12), nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for _ in range(1 + int(x.abs().max())):
            h = h + 0.2 * self.f2(self.f1(h).tanh())
        return self.out(h)


@case()
class FixedPoint(Integrator):
    """Iterates until the change is small: the change is measured over units."""

    def forward(self, x: Tensor) -> Tensor:
        u = self.stem(x)
        h = torch.zeros_like(u)
        for _ in range(30):
            new = (u + 0.3 * self.f2(self.f1(h).tanh())).tanh()
            if (new - h).abs().mean() < 0.05:
                break
            h = new
        return self.out(h)


@case(truths=(plain, over("route", "w", of=1, dim=-1)))
class Capsules(nn.Module):
    """Routing by agreement: a softmax over output capsules, a squash over coordinates."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.w, self.out = nn.Linear(8, 12), nn.Parameter(torch.randn(12, 3, 5) / 3), nn.Linear(15, 3)

    def route(self, b: Tensor) -> Tensor:
        return b.softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        u = torch.einsum("bni,ico->bnico", self.stem(x), self.w)
        b = torch.zeros(u.shape[:-1])
        for _ in range(2):
            s = (self.route(b)[..., None] * u).sum(2)
            v = s / (1 + s.norm(dim=-1, keepdim=True))
            b = b + (u * v[:, :, None]).sum(-1)
        return self.out(v.flatten(2))
