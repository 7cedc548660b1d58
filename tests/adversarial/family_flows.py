"""Small whole networks that generate, route, sample, tag and invert."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cases import Family, both, floats, ids

family = Family("flows")
IMAGES = floats((2, 3, 16, 16), (1, 3, 16, 16), (3, 3, 24, 16))
STEPS = floats((2, 6, 8), (1, 1, 8), (3, 17, 8))
WAVES = floats((2, 2, 24), (1, 2, 9), (3, 2, 40))
TOKENS = ids(20, (2, 6), (1, 1), (3, 17))


def case(inputs: Any = STEPS, **options: Any) -> Any:
    return family.case(inputs, **options)


@case(both(floats((2, 6), (1, 6), (3, 6))))
class ModulatedConvolution(nn.Module):
    """Weights per sample in one grouped convolution, demodulated over the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Sequential(nn.Linear(6, 12), nn.LeakyReLU(0.2), nn.Linear(12, 12), nn.LeakyReLU(0.2))
        self.start, self.w1 = nn.Parameter(torch.randn(1, 12, 4, 4)), nn.Parameter(torch.randn(16, 12, 3, 3))
        self.w2, self.s1, self.s2 = nn.Parameter(torch.randn(3, 16, 1, 1)), nn.Linear(12, 12), nn.Linear(12, 16)

    def conv(self, x: Tensor, w: Tensor, s: Tensor, demodulate: bool) -> Tensor:
        b, c, height, width = x.shape
        w = w[None] * (s + 1)[:, None, :, None, None]
        if demodulate:
            w = w * torch.rsqrt(w.square().sum([2, 3, 4], keepdim=True) + 1e-8)
        x = F.conv2d(x.reshape(1, b * c, height, width), w.flatten(0, 1), padding=w.shape[-1] // 2, groups=b)
        return x.view(b, -1, height, width)

    def forward(self, z: Tensor) -> Tensor:
        w = self.map(z)
        h = self.conv(self.start.repeat(len(z), 1, 1, 1), self.w1, self.s1(w), True)
        return self.conv(F.leaky_relu(h, 0.2), self.w2, self.s2(w), False)


class StandardConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        v, m = torch.var_mean(w, dim=[1, 2, 3], keepdim=True, unbiased=False)
        return F.conv2d(x, (w - m) / torch.sqrt(v + 1e-10), self.bias, self.stride, self.padding)


@case(IMAGES)
class WeightStandardised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = StandardConv(3, 16, 3, padding=1), StandardConv(16, 16, 3, padding=1)
        self.n, self.c, self.head = nn.GroupNorm(4, 16), StandardConv(16, 8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h = h + self.b(self.n(h).relu())
        return self.head(self.c(h.relu()).mean((2, 3)))


@case(floats((2, 8), (1, 8), (5, 8)), kinds="channel")
class CapsulesWithRouting(nn.Module):
    """Three rounds of agreement; the squash is a norm over the pose."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.primary = nn.Linear(8, 20), nn.Linear(20, 6 * 4)
        self.w = nn.Parameter(torch.randn(1, 6, 3, 5, 4) * 0.3)

    @staticmethod
    def squash(t: Tensor) -> Tensor:
        n = t.square().sum(-1, keepdim=True)
        return n / (1 + n) * t / (n + 1e-8).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        u = self.squash(self.primary(self.stem(x).relu()).view(-1, 6, 4))
        votes = (self.w @ u[:, :, None, :, None]).squeeze(-1)
        b = torch.zeros(len(x), 6, 3, 1)
        for i in range(3):
            v = self.squash((b.softmax(2) * votes).sum(1, keepdim=True))
            if i < 2:
                b = b + (votes * v).sum(-1, keepdim=True)
        return v.squeeze(1).norm(dim=-1)


@case(IMAGES)
class DeformableSampling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.offset = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 4 * 2, 3, padding=1)
        self.weight, self.b, self.head = nn.Conv2d(12, 4, 1), nn.Conv2d(12, 10, 1), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        b, _c, height, width = h.shape
        grid = F.affine_grid(torch.eye(2, 3).expand(b, 2, 3), h.shape, align_corners=False)
        offset = self.offset(h).view(b, 4, 2, height, width).permute(1, 0, 3, 4, 2).tanh() * 0.3
        weight = self.weight(h).softmax(1).unbind(1)
        sampled = sum(
            F.grid_sample(h, grid + o, align_corners=False) * w[:, None] for o, w in zip(offset, weight, strict=True)
        )
        return self.head(self.b(sampled).relu().mean((2, 3)))


@case(both(TOKENS, TOKENS), kinds="channel neuron")
class CrfTagger(nn.Module):
    """Scores of all paths by logsumexp, and the best path by back pointers in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(20, 10), nn.LSTM(10, 8, bidirectional=True, batch_first=True)
        self.hidden, self.tags = nn.Linear(16, 12), nn.Linear(12, 5)
        self.transitions, self.start = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.randn(5))

    def forward(self, tokens: Tensor, labels: Tensor) -> Any:
        e = self.tags(self.hidden(self.lstm(self.embed(tokens))[0]).tanh())
        labels = labels % 5
        total = self.start + e[:, 0]
        for t in range(1, e.shape[1]):
            total = torch.logsumexp(total[:, :, None] + self.transitions + e[:, t, None], 1)
        gold = self.start[labels[:, 0]] + e.gather(2, labels[..., None]).squeeze(-1).sum(1)
        gold = gold + self.transitions[labels[:, :-1], labels[:, 1:]].sum(1)
        loss = (total.logsumexp(1) - gold).mean()
        if self.training:
            return loss
        score, back = self.start + e[:, 0], []
        for t in range(1, e.shape[1]):
            score, index = (score[:, :, None] + self.transitions + e[:, t, None]).max(1)
            back.append(index)
        best = [score.argmax(1)]
        for index in reversed(back):
            best.append(index.gather(1, best[-1][:, None]).squeeze(1))
        return loss, torch.stack(best[::-1], 1)


@case(WAVES)
class CtcHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(2, 12, 3, padding=1), nn.Conv1d(12, 16, 3, stride=2, padding=1)
        self.n, self.head = nn.BatchNorm1d(16), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Any:
        h = self.n(self.b(self.a(x).relu())).relu()
        logp = self.head(h.transpose(1, 2)).log_softmax(-1)
        if self.training:
            lengths = torch.full((len(x),), logp.shape[1])
            target = torch.ones(len(x), 1, dtype=torch.long)
            return F.ctc_loss(logp.transpose(0, 1), target, lengths, torch.ones_like(lengths))
        texts = []
        for row in logp.argmax(-1):
            row = torch.unique_consecutive(row)
            texts.append(row[row != 0].tolist())
        return logp, str(texts)


@case(TOKENS, train=False)
class BeamScores(nn.Module):
    """Three beams over five steps, from the last hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell, self.head = nn.Embedding(20, 10), nn.GRUCell(10, 14), nn.Linear(14, 20)
        self.bridge = nn.Linear(10, 14)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        b = len(tokens)
        h = self.bridge(self.embed(tokens).mean(1)).tanh().repeat_interleave(3, 0)
        token, score = tokens[:, -1].repeat_interleave(3), torch.tensor([0.0, -1e9, -1e9]).repeat(b)
        for _ in range(5):
            h = self.cell(self.embed(token), h)
            total = score[:, None] + self.head(h).log_softmax(-1)
            score, index = total.view(b, -1).topk(3, -1)
            beam = (index // 20 + torch.arange(b)[:, None] * 3).view(-1)
            h, token, score = h[beam], (index % 20).view(-1), score.view(-1)
        return score.view(b, 3), token.view(b, 3)


@case(both(floats((5, 8), (1, 8), (9, 8)), floats((5, 2), (1, 2), (9, 2))))
class MixtureDensity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 20), nn.Linear(20, 20)
        self.pi, self.mu, self.sigma = nn.Linear(20, 3), nn.Linear(20, 6), nn.Linear(20, 6)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.b(self.a(x).tanh()).tanh()
        mu, scale = self.mu(h).view(-1, 3, 2), F.softplus(self.sigma(h)).view(-1, 3, 2) + 1e-3
        normal = torch.distributions.Normal(mu, scale)
        logp = normal.log_prob(y[:, None]).sum(-1) + self.pi(h).log_softmax(-1)
        return -logp.logsumexp(-1).mean()


@case(floats((4, 4, 6, 6), (1, 4, 6, 6), (2, 4, 4, 8)))
class GlowStep(nn.Module):
    """A learned mixing of channels with its determinant, data-dependent scale, coupling by halves."""

    def __init__(self) -> None:
        super().__init__()
        self.s, self.t = nn.Parameter(torch.ones(1, 4, 1, 1)), nn.Parameter(torch.zeros(1, 4, 1, 1))
        self.w = nn.Parameter(torch.linalg.qr(torch.randn(4, 4))[0])
        self.net = nn.Sequential(nn.Conv2d(2, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU())
        self.last = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = (x + self.t) * self.s
        pixels = x.shape[2] * x.shape[3]
        logdet = pixels * (self.s.abs().log().sum() + torch.slogdet(self.w)[1])
        h = F.conv2d(h, self.w[:, :, None, None])
        a, b = h.chunk(2, 1)
        r = self.last(self.net(a))
        shift, scale = r[:, 0::2], (r[:, 1::2] + 2).sigmoid()
        return torch.cat([a, (b + shift) * scale], 1), logdet + scale.log().flatten(1).sum(1)


@case(floats((5, 6), (1, 6), (9, 6)))
class RealNvp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([[1.0, 0, 1, 0, 1, 0], [0.0, 1, 0, 1, 0, 1]]))
        self.s = nn.ModuleList(nn.Sequential(nn.Linear(6, 14), nn.Tanh(), nn.Linear(14, 6), nn.Tanh()) for _ in "ab")
        self.t = nn.ModuleList(nn.Sequential(nn.Linear(6, 14), nn.ReLU(), nn.Linear(14, 6)) for _ in "ab")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros(len(x))
        for i in reversed(range(2)):
            m = self.mask[i]
            s, t = self.s[i](x * m) * (1 - m), self.t[i](x * m) * (1 - m)
            x, total = (1 - m) * (x - t) * torch.exp(-s) + m * x, total - s.sum(1)
        return x, torch.distributions.MultivariateNormal(torch.zeros(6), torch.eye(6)).log_prob(x) + total
