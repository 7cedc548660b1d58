"""Published parts in which features are compared, picked, repeated or nested."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cases import Family, both, fixed, floats
from .references import over
from .shared import IMAGES, ROWS, STEPS, TOKENS, mlp

family = Family("features")


def case(inputs: Any = STEPS, **options: Any) -> Any:
    return family.case(inputs, **options)


@case(floats((2, 3, 10), (1, 3, 6), (2, 3, 20)))
class NeighboursInFeatures(nn.Module):
    """Neighbours are found anew in the space of hidden features."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(6, 12, 1), nn.Conv2d(24, 16, 1), nn.Conv1d(28, 20, 1)
        self.head = nn.Linear(40, 3)

    def edges(self, x: Tensor) -> Tensor:
        b, c, n = x.shape
        square = x.square().sum(1, keepdim=True)
        near = (2 * x.transpose(1, 2) @ x - square - square.transpose(1, 2)).topk(4, -1)[1]
        near = (near + torch.arange(b)[:, None, None] * n).view(-1)
        f = x.transpose(1, 2).reshape(b * n, -1)[near].view(b, n, 4, c)
        x = x.transpose(1, 2)[:, :, None].expand(-1, -1, 4, -1)
        return torch.cat([f - x, x], 3).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = F.leaky_relu(self.a(self.edges(x)), 0.2).amax(-1)
        b = F.leaky_relu(self.b(self.edges(a)), 0.2).amax(-1)
        h = self.c(torch.cat([a, b], 1))
        return self.head(torch.cat([F.adaptive_max_pool1d(h, 1), F.adaptive_avg_pool1d(h, 1)], 1).flatten(1))


@case(floats((2, 10, 1), (1, 10, 1), (3, 10, 1)))
class BackcastAndForecast(nn.Module):
    """Blocks explain what others left; trend and season are fixed bases."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(mlp(10, 20, 20, 6) for _ in range(2))
        t = torch.arange(14.0) / 14
        self.register_buffer("trend", torch.stack([t**i for i in range(6)]))
        self.register_buffer("season", torch.stack([f(6.28 * i * t) for i in range(3) for f in (torch.sin, torch.cos)]))

    def forward(self, x: Tensor) -> Tensor:
        rest, total = x.squeeze(-1), 0
        for block, base in zip(self.blocks, (self.trend, self.season), strict=True):
            y = block(rest) @ base
            rest, total = rest - y[:, :10], total + y[:, 10:]
        return total


@case(both(floats((2, 5, 8), (1, 2, 8), (3, 9, 8)), floats((2, 4, 6), (1, 1, 6), (3, 3, 6))))
class LocationAttention(nn.Module):
    """Attention that also sees where it was."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.prenet = nn.Linear(8, 16), mlp(6, 12, 10)
        self.cell = nn.GRUCell(10 + 16, 14)
        self.query, self.memory, self.place = (
            nn.Linear(14, 12, bias=False),
            nn.Linear(16, 12, bias=False),
            nn.Linear(5, 12),
        )
        self.conv, self.v, self.out = nn.Conv1d(2, 5, 3, padding=1), nn.Linear(12, 1), nn.Linear(30, 6)

    def forward(self, x: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.encoder(x).tanh()
        keys, h = self.memory(memory), torch.zeros(len(x), 14)
        context, now, total = torch.zeros(len(x), 16), torch.zeros(x.shape[:2]), torch.zeros(x.shape[:2])
        outs, maps = [], []
        for t in range(frames.shape[1]):
            h = self.cell(torch.cat([self.prenet(frames[:, t]), context], 1), h)
            place = self.place(self.conv(torch.stack([now, total], 1)).transpose(1, 2))
            now = self.v((self.query(h)[:, None] + keys + place).tanh()).squeeze(-1).softmax(-1)
            total, context = total + now, (now[:, None] @ memory).squeeze(1)
            outs.append(self.out(torch.cat([h, context], 1)))
            maps.append(now)
        return torch.stack(outs, 1), torch.stack(maps, 1)


@case(IMAGES)
class NestedWidths(nn.Module):
    """Outputs at prefixes of the embedding, as nested representations have them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 16, 3), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> list[Tensor]:
        h = self.b(self.a(x).relu()).relu().mean((2, 3))
        return [F.linear(h[:, :n], self.fc.weight[:, :n], self.fc.bias) for n in (4, 8, 16)]


@case(IMAGES)
class ClassMaps(nn.Module):
    """The map of the class that wins is made with its row of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 16, 3), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        f = self.b(self.a(x).relu()).relu()
        logits = self.fc(f.mean((2, 3)))
        row = self.fc.weight[logits.argmax(1)]
        return logits, torch.einsum("bc,bchw->bhw", row, f)


@case(IMAGES)
class BlurAndFilter(nn.Module):
    """Fixed kernels per channel: a blur that is repeated for the width, and edges for each."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(24, 10, 1), nn.Linear(10, 3)
        k = torch.tensor([1.0, 2, 1])
        self.register_buffer("blur", (k[:, None] * k / 16).repeat(12, 1, 1, 1))
        self.register_buffer("edge", torch.tensor([[0.0, -1, 0], [-1, 4, -1], [0, -1, 0]])[None, None])

    def forward(self, x: Tensor) -> Tensor:
        h = F.conv2d(F.pad(self.a(x).relu(), [1] * 4, "reflect"), self.blur, stride=2, groups=self.blur.shape[0])
        edges = F.conv2d(h, self.edge.expand(h.shape[1], -1, -1, -1), padding=1, groups=h.shape[1])
        return self.head(self.b(torch.cat([h, edges], 1)).relu().mean((2, 3)))


@case(IMAGES)
class StatisticsMatched(nn.Module):
    """A loss compares the statistics of a batch with those that a norm remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.a(x)
        mean, var = h.mean((0, 2, 3)), h.var((0, 2, 3), unbiased=False)
        loss = self.apart(mean - self.bn.running_mean) + self.apart(var - self.bn.running_var)
        return self.b(self.bn(h).relu()), loss

    def apart(self, t: Tensor) -> Tensor:
        return t.norm()


@case(IMAGES)
class LearnedQueriesThroughAModule(nn.Module):
    """A view of a parameter goes into a module."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.q = nn.Embedding(5, 12), nn.Linear(12, 16)
        self.body, self.head = nn.Conv2d(3, 16, 3), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(self.query.weight.unsqueeze(0).expand(len(x), -1, -1))
        f = self.body(x).flatten(2)
        return self.head((q @ f * 0.1).softmax(-1) @ f.transpose(1, 2))


@case(both(TOKENS, fixed(*(torch.tensor(v) for v in (6, 1, 17, 6)))))
class LengthAsATensor(nn.Module):
    """The number of valid steps comes as a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(20, 12), nn.Linear(12, 20), nn.Linear(20, 3)

    def forward(self, t: Tensor, n: Tensor) -> Tensor:
        h = self.a(self.embed(t)).relu()
        return self.b(h[:, : int(n)].sum(1) / n)


@case(ROWS, truths=(over("pool", "a.weight", out=None),))
class TopOfFeatures(nn.Module):
    """The mean of the three largest hidden values gates the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 20), nn.Linear(20, 3)

    def pool(self, h: Tensor) -> Tensor:
        return h.topk(3, -1)[0].mean(-1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.b(h * self.pool(h).sigmoid())
