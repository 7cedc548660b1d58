"""Systems as their authors publish them: matching, transducers, codebooks, speech, detection from a table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cases import Family, both, floats, ids

family = Family("systems")


class OuterWidthAttention(nn.Module):
    """Heads lie inside of the coordinates: `view(batch, width, heads, -1)`."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.dim, self.heads, self.merge = width // heads, heads, nn.Conv1d(width, width, 1)
        self.proj = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(3))

    def forward(self, *given: Tensor) -> Tensor:
        b = given[0].size(0)
        q, k, v = (f(x).view(b, self.dim, self.heads, -1) for f, x in zip(self.proj, given, strict=True))
        weight = (torch.einsum("bdhn,bdhm->bhnm", q, k) / self.dim**0.5).softmax(-1)
        mixed = torch.einsum("bhnm,bdhm->bdhn", weight, v)
        return self.merge(mixed.contiguous().view(b, self.dim * self.heads, -1))


PAIRS = both(floats((2, 8, 5), (1, 8, 3), (2, 8, 9)), floats((2, 8, 4), (1, 8, 6), (2, 8, 7)))


@family.case(PAIRS, right="channel head")
class MatchesWithDustbin(nn.Module):
    """Points of two pictures look at themselves and at each other; what matches nothing goes to a bin."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Sequential(nn.Conv1d(8, 12, 1), nn.BatchNorm1d(12), nn.ReLU(), nn.Conv1d(12, 12, 1))
        self.at = nn.ModuleList(OuterWidthAttention(3, 12) for _ in "ab")
        self.mlp = nn.ModuleList(nn.Sequential(nn.Conv1d(24, 24, 1), nn.ReLU(), nn.Conv1d(24, 12, 1)) for _ in "ab")
        self.final, self.bin, self.names = nn.Conv1d(12, 12, 1), nn.Parameter(torch.tensor(1.0)), ["self", "cross"]

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self.enc(a), self.enc(b)
        for at, mlp, name in zip(self.at, self.mlp, self.names, strict=True):
            p, q = (b, a) if name == "cross" else (a, b)
            da, db = mlp(torch.cat([a, at(a, p, p)], 1)), mlp(torch.cat([b, at(b, q, q)], 1))
            a, b = a + da, b + db
        scores = torch.einsum("bdn,bdm->bnm", self.final(a), self.final(b))
        scores = torch.cat([scores, self.bin.expand(len(a), scores.shape[1], 1)], -1)
        scores = torch.cat([scores, self.bin.expand(len(a), 1, scores.shape[2])], 1)
        u, v = torch.zeros_like(scores[:, :, 0]), torch.zeros_like(scores[:, 0])
        for _ in range(3):
            u = -torch.logsumexp(scores + v.unsqueeze(1), 2)
            v = -torch.logsumexp(scores + u.unsqueeze(2), 1)
        return scores + u.unsqueeze(2) + v.unsqueeze(1)


@family.case(both(floats((2, 7, 8), (1, 3, 8), (3, 9, 8)), ids(6, (2, 3), (1, 1), (3, 5))), right="channel")
class Transducer(nn.Module):
    """Every frame meets every word; the states of the predictor start as old code starts them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.frames = nn.LSTM(8, 10, batch_first=True, bidirectional=True), nn.Linear(20, 12)
        self.table, self.cell, self.words = nn.Embedding(6, 7), nn.GRUCell(7, 9), nn.Linear(9, 12, bias=False)
        self.wide, self.out = 9, nn.Linear(12, 6)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.words.weight.data.new(len(y), self.wide).zero_()
        found = []
        for t in range(y.shape[1]):
            h = self.cell(self.table(y[:, t]), h)
            found.append(h)
        frames, words = self.frames(self.encoder(x)[0]), self.words(torch.stack(found, 1))
        return self.out(torch.tanh(frames.unsqueeze(2) + words.unsqueeze(1))).log_softmax(-1)


@family.case(floats((2, 12, 8), (1, 7, 8), (3, 20, 8)), right="channel")
class GroupsOfCodes(nn.Module):
    """Codes of two tables are chosen by their largest logit and lie side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.logits = nn.Sequential(nn.Linear(8, 12), nn.GELU()), nn.Linear(12, 10)
        self.codes, self.groups, self.count = nn.Parameter(torch.rand(1, 10, 4)), 2, 5
        self.project, self.final = nn.Linear(8, 10), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        z = self.encode(x)
        b, t, f = z.shape
        score = self.logits(z.reshape(-1, f)).view(b * t * self.groups, -1)
        hard = score.new_zeros(*score.shape).scatter_(-1, score.argmax(-1, keepdim=True), 1.0)
        codes = hard.view(b * t, -1).unsqueeze(-1) * self.codes
        codes = codes.view(b * t, self.groups, self.count, -1).sum(-2).view(b, t, -1)
        return F.cosine_similarity(self.final(z).unsqueeze(2), self.project(codes).unsqueeze(1), dim=-1)


@torch.jit.script
def gated(x: Tensor, width: Tensor) -> Tensor:
    n = width[0]
    return torch.tanh(x[:, :n, :]) * torch.sigmoid(x[:, n:, :])


@family.case(floats((2, 4, 12), (1, 4, 5), (3, 4, 30)), kinds="channel", targets=(0.3, 0.4, 0.5))
class GateInAScript(nn.Module):
    """Scripted code is told in a tensor where the gate begins."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.pre, self.post = 10, nn.Conv1d(4, 10, 1), nn.Conv1d(10, 8, 1)
        self.into = nn.ModuleList(nn.Conv1d(10, 20, 3, padding=1) for _ in "ab")
        self.back = nn.ModuleList([nn.Conv1d(10, 20, 1), nn.Conv1d(10, 10, 1)])

    def forward(self, x: Tensor) -> Any:
        x = self.pre(x)
        skip, begins = torch.zeros_like(x), torch.IntTensor([self.wide])
        for number, (into, back) in enumerate(zip(self.into, self.back, strict=True)):
            h = back(gated(into(x), begins))
            if number == 0:
                x, h = x + h[:, : self.wide], h[:, self.wide :]
            skip = skip + h
        return torch.split(self.post(skip), 4, 1)


ROWS = [
    (-1, "conv", 8), (-1, "conv", 12), (-1, "pool", 12), (-1, "conv", 12), (-1, "up", 12), ((-1, 1), "cat", 24),
    (-1, "conv", 10), ((1, 6), "heads", 0),
]  # fmt: skip


class Layer(nn.Module):
    """A row of the table: where its input comes from, and what it does."""

    def __init__(self, source: Any, kind: str, widths: list[int], out: int) -> None:
        super().__init__()
        self.source, self.kind = source, kind
        if kind == "conv":
            self.conv, self.norm = nn.Conv2d(widths[0], out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        if kind == "heads":
            self.heads = nn.ModuleList(nn.Conv2d(width, 10, 1) for width in widths)
            self.grids = [torch.empty(0) for _ in widths]
            self.register_buffer("anchors", torch.tensor([[[1.0, 2.0], [3.0, 1.0]], [[4.0, 4.0], [6.0, 3.0]]]))

    def forward(self, x: Any) -> Any:
        if self.kind == "conv":
            return F.silu(self.norm(self.conv(x)))
        if self.kind == "cat":
            return torch.cat(x, 1)
        if self.kind != "heads":
            return F.max_pool2d(x, 2) if self.kind == "pool" else F.interpolate(x, scale_factor=2.0)
        return self.boxes(list(x))

    def boxes(self, x: list[Tensor]) -> Any:
        found = []
        for i, head in enumerate(self.heads):
            x[i] = head(x[i])
            b, _, h, w = x[i].shape
            x[i] = x[i].view(b, 2, 5, h, w).permute(0, 1, 3, 4, 2).contiguous()
            if not self.training:
                if self.grids[i].shape[2:4] != x[i].shape[2:4]:
                    ys, xs = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
                    self.grids[i] = torch.stack((xs, ys), 2).expand(1, 2, h, w, 2) - 0.5
                at, size, sure = x[i].sigmoid().split((2, 2, 1), 4)
                at, size = at * 2 + self.grids[i], (size * 2) ** 2 * self.anchors[i].view(1, 2, 1, 1, 2)
                found.append(torch.cat((at, size, sure), 4).view(b, -1, 5))
        return x if self.training else (torch.cat(found, 1), x)


@family.case(floats((2, 3, 8, 8), (1, 3, 8, 12), (3, 3, 16, 8)), right="channel")
class DetectorFromATable(nn.Module):
    """Layers from rows that name their sources; grids are made when the size of the picture is new."""

    def __init__(self) -> None:
        super().__init__()
        layers, widths = [], [3]
        for source, kind, out in ROWS:
            sources = source if isinstance(source, tuple) else (source,)
            layers.append(Layer(source, kind, [widths[s if s < 0 else s + 1] for s in sources], out))
            widths.append(out)
        self.model, self.save = nn.Sequential(*layers), {1, 6}

    def forward(self, x: Tensor) -> Any:
        kept: list[Any] = []
        for number, layer in enumerate(self.model):
            if isinstance(layer.source, tuple):
                x = layer([x if s < 0 else kept[s] for s in layer.source])
            else:
                x = layer(x)
            kept.append(x if number in self.save else None)
        return x
