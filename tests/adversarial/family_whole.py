"""Small whole networks as papers publish them: diffusion, detection, scans, memories, graphs, codebooks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cases import Family, both, fixed, floats, ids
from .references import over

family = Family("whole")
IMAGES = floats((2, 3, 16, 16), (1, 3, 16, 16), (3, 3, 24, 16))
STEPS = floats((2, 6, 8), (1, 1, 8), (3, 17, 8))
WAVES = floats((2, 2, 24), (1, 2, 9), (3, 2, 40))
TOKENS = ids(20, (2, 6), (1, 1), (3, 17))


def case(inputs: Any = STEPS, **options: Any) -> Any:
    return family.case(inputs, **options)


def sines(t: Tensor, width: int) -> Tensor:
    rates = torch.exp(-math.log(1000.0) * torch.arange(width // 2) / (width // 2))
    return torch.cat([(t[:, None] * rates).sin(), (t[:, None] * rates).cos()], -1)


class TimedBlock(nn.Module):
    def __init__(self, into: int, out: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, into), nn.Conv2d(into, out, 3, padding=1)
        self.time = nn.Linear(time, 2 * out)
        self.norm2, self.conv2 = nn.GroupNorm(4, out), nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(into, out, 1) if into != out else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(F.silu(t))[:, :, None, None].chunk(2, 1)
        return self.skip(x) + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))


class PixelAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(4, width)
        self.qkv, self.proj = nn.Conv1d(width, 3 * width, 1), nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, *spatial = x.shape
        flat = x.reshape(b, c, -1)
        qkv = self.qkv(self.norm(flat))
        q, k, v = qkv.reshape(b * self.heads, -1, flat.shape[-1]).split(c // self.heads, 1)
        scale = 1 / math.sqrt(math.sqrt(c // self.heads))
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale).softmax(-1)
        h = torch.einsum("bts,bcs->bct", weight, v).reshape(b, -1, flat.shape[-1])
        return (flat + self.proj(h)).reshape(b, c, *spatial)


@case(both(IMAGES, fixed(*(torch.rand(n) for n in (2, 1, 3, 2)))), kinds="channel head")
class DiffusionUnetWithAttention(nn.Module):
    """Legacy qkv order per head, time scale and shift, skips through concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, 24), nn.SiLU(), nn.Linear(24, 24))
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.down1, self.down2 = TimedBlock(16, 16, 24), TimedBlock(16, 32, 24)
        self.pool, self.mid = nn.Conv2d(16, 16, 3, stride=2, padding=1), PixelAttention(32, 4)
        self.up1, self.up2 = TimedBlock(48, 16, 24), TimedBlock(32, 16, 24)
        self.out = nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 3, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = self.time(sines(t, 16))
        a = self.stem(x)
        b = self.down1(a, t)
        c = self.mid(self.down2(self.pool(b), t))
        d = F.interpolate(c, scale_factor=2.0, mode="nearest")
        d = self.up1(torch.cat([d, b], 1), t)
        return self.out(self.up2(torch.cat([d, a], 1), t))


class Attend(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, y: Tensor, pos: Tensor | None = None, query: Tensor | None = None, mask=None):
        q = self.q(x if query is None else x + query).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = self.k(y if pos is None else y + pos).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        v = self.v(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.head_dim**-0.5)
        return self.o(out.transpose(1, 2).flatten(2))


@case(IMAGES, kinds="channel head")
class DetrLike(nn.Module):
    """Sine positions of two axes, learned queries, heads shared over decoder layers, auxiliary outputs in training."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, 2, 1), nn.ReLU()
        )
        self.project = nn.Conv2d(16, 16, 1)
        self.encoder, self.norm = Attend(16, 4), nn.LayerNorm(16)
        self.decoder = nn.ModuleList(nn.ModuleList([Attend(16, 4), Attend(16, 4), nn.Linear(16, 16)]) for _ in "ab")
        self.query = nn.Embedding(5, 16)
        self.classes, self.box = nn.Linear(16, 4), nn.Sequential(nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 4))

    def forward(self, x: Tensor) -> dict[str, Any]:
        f = self.project(self.body(x))
        h, w = f.shape[-2:]
        y = sines(torch.arange(1.0, h + 1), 8)[:, None].expand(h, w, 8)
        z = sines(torch.arange(1.0, w + 1), 8)[None].expand(h, w, 8)
        pos = torch.cat([y, z], -1).reshape(1, h * w, 16)
        memory = f.flatten(2).transpose(1, 2)
        memory = self.norm(memory + self.encoder(memory, memory, pos, pos))
        query = self.query.weight.unsqueeze(0).expand(len(x), -1, -1)
        t, found = torch.zeros_like(query), []
        for self_attention, cross, mlp in self.decoder:
            t = t + self_attention(t, t, query, query)
            t = t + cross(t, memory, pos, query)
            t = t + mlp(t).relu()
            found.append((self.classes(t), self.box(t).sigmoid()))
        out = {"logits": found[-1][0], "boxes": found[-1][1]}
        if self.training:
            out["aux"] = [{"logits": a, "boxes": b} for a, b in found[:-1]]
        return out


@case(kinds="channel neuron")
class MambaBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.in_proj = nn.Linear(8, 12), nn.Linear(12, 48, bias=False)
        self.conv1d = nn.Conv1d(24, 24, 4, groups=24, padding=3)
        self.x_proj, self.dt_proj = nn.Linear(24, 3 + 2 * 4, bias=False), nn.Linear(3, 24)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, 5.0).repeat(24, 1)))
        self.D, self.out_proj = nn.Parameter(torch.ones(24)), nn.Linear(24, 12, bias=False)
        self.norm_weight, self.head = nn.Parameter(torch.ones(12)), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        u, z = self.in_proj(h).chunk(2, -1)
        u = F.silu(self.conv1d(u.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
        dt, b, c = torch.split(self.x_proj(u), [3, 4, 4], -1)
        dt = F.softplus(self.dt_proj(dt))
        a = -torch.exp(self.A_log.float())
        da, db = torch.exp(dt[..., None] * a), dt[..., None] * b[:, :, None] * u[..., None]
        state, ys = torch.zeros(len(x), u.shape[-1], 4), []
        for t in range(x.shape[1]):
            state = da[:, t] * state + db[:, t]
            ys.append((state * c[:, t, None]).sum(-1))
        y = (torch.stack(ys, 1) + u * self.D) * F.silu(z)
        return self.head(h + self.out_proj(y))


@case(kinds="channel head neuron")
class MambaTwo(nn.Module):
    """One projection of z, x, B, C and dt; states per head; gated norm at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.p, self.n = 4, 6, 5
        self.inner = self.heads * self.p
        self.in_proj = nn.Linear(8, 2 * self.inner + 2 * self.n + self.heads)
        self.conv = nn.Conv1d(self.inner + 2 * self.n, self.inner + 2 * self.n, 3, groups=self.inner + 2 * self.n)
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.rand(self.heads)) for _ in range(3))
        self.norm, self.out = nn.LayerNorm(self.inner), nn.Linear(self.inner, 3)

    def forward(self, x: Tensor) -> Tensor:
        z, xbc, dt = torch.split(self.in_proj(x), [self.inner, self.inner + 2 * self.n, self.heads], dim=-1)
        xbc = F.silu(self.conv(F.pad(xbc.transpose(1, 2), (2, 0))).transpose(1, 2))
        u, b, c = torch.split(xbc, [self.inner, self.n, self.n], -1)
        dt = F.softplus(dt + self.dt_bias)
        u = u.view(*u.shape[:2], self.heads, self.p)
        state, ys = torch.zeros(len(x), self.heads, self.p, self.n), []
        for t in range(x.shape[1]):
            decay = torch.exp(-self.A_log.exp() * dt[:, t])[..., None, None]
            state = state * decay + torch.einsum("bh,bhp,bn->bhpn", dt[:, t], u[:, t], b[:, t])
            ys.append(torch.einsum("bhpn,bn->bhp", state, c[:, t]) + u[:, t] * self.D[:, None])
        y = torch.stack(ys, 1).flatten(2)
        return self.out(self.norm(y * F.silu(z)))


@case(TOKENS)
class RwkvLike(nn.Module):
    """Stable recurrence with a running maximum, receptance gates, squared relu."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.ln = nn.Embedding(20, 12), nn.LayerNorm(12)
        self.mix_k, self.mix_v, self.mix_r = (nn.Parameter(torch.rand(1, 1, 12)) for _ in range(3))
        self.decay, self.first = nn.Parameter(torch.rand(16)), nn.Parameter(torch.rand(16))
        self.key, self.value, self.receptance = (nn.Linear(12, 16, bias=False) for _ in range(3))
        self.output = nn.Linear(16, 12, bias=False)
        self.ffn_k, self.ffn_r, self.ffn_v = nn.Linear(12, 20), nn.Linear(12, 12), nn.Linear(20, 12)
        self.shift, self.head = nn.ZeroPad2d((0, 0, 1, -1)), nn.Linear(12, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        x = self.ln(h)
        past = self.shift(x)
        k = self.key(x * self.mix_k + past * (1 - self.mix_k))
        v = self.value(x * self.mix_v + past * (1 - self.mix_v))
        r = self.receptance(x * self.mix_r + past * (1 - self.mix_r)).sigmoid()
        w, u = -self.decay.exp(), self.first
        num, den = torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0])
        top, outs = torch.full_like(k[:, 0], -1e30), []
        for t in range(k.shape[1]):
            kt, vt = k[:, t], v[:, t]
            m = torch.maximum(top, u + kt)
            e1, e2 = torch.exp(top - m), torch.exp(u + kt - m)
            outs.append((e1 * num + e2 * vt) / (e1 * den + e2))
            m = torch.maximum(top + w, kt)
            e1, e2 = torch.exp(top + w - m), torch.exp(kt - m)
            num, den, top = e1 * num + e2 * vt, e1 * den + e2, m
        h = h + self.output(r * torch.stack(outs, 1))
        return self.head(h + self.ffn_r(h).sigmoid() * self.ffn_v(self.ffn_k(h).relu() ** 2))


@case(kinds="expert channel neuron")
class SharedAndRoutedExperts(nn.Module):
    """Sigmoid scores, a correction bias for the choice only, groups of experts, a shared expert, a scaling factor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gate = nn.Linear(8, 12), nn.Parameter(torch.randn(8, 12))
        self.correction = nn.Parameter(torch.randn(8) * 0.1, requires_grad=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(12, 16), nn.SiLU(), nn.Linear(16, 12)) for _ in range(8))
        self.shared, self.head = nn.Sequential(nn.Linear(12, 20), nn.SiLU(), nn.Linear(20, 12)), nn.Linear(12, 3)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = (x @ self.gate.t()).sigmoid()
        choice = scores + self.correction
        groups = choice.view(len(x), 4, 2).topk(2, -1)[0].sum(-1)
        best = groups.topk(2, -1)[1]
        mask = torch.zeros_like(groups).scatter_(1, best, 1).unsqueeze(-1).expand(-1, 4, 2).reshape(len(x), -1)
        index = choice.masked_fill(mask == 0, -1e9).topk(3, -1)[1]
        weight = scores.gather(1, index)
        return index, weight / (weight.sum(-1, keepdim=True) + 1e-20) * 2.5

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        flat = h.flatten(0, 1)
        index, weight = self.route(flat)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            row, place = torch.where(index == number)
            if row.numel():
                out.index_add_(0, row, expert(flat[row]) * weight[row, place, None])
        return self.head(h + (out + self.shared(flat)).view_as(h))


EDGES = [torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 2]]), torch.tensor([[0, 0], [0, 0]])]


GRAPHS = both(floats((5, 8), (1, 8))[:2], fixed(*EDGES))


@case(GRAPHS)
class MessagePassing(nn.Module):
    """Messages of both ends, a gated update, degrees, and the largest, the mean and the spread of messages."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 12)
        self.message = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 12))
        self.update, self.after = nn.GRUCell(12, 12), nn.Linear(36, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h = self.embed(x)
        for _ in range(2):
            source, target = edges
            m = self.message(torch.cat([h[source], h[target] - h[source]], -1))
            degree = torch.zeros(len(h)).index_add_(0, target, torch.ones(len(target))).clamp(min=1)[:, None]
            mean = torch.zeros_like(h).index_add_(0, target, m) / degree
            square = torch.zeros_like(h).index_add_(0, target, m * m) / degree
            top = torch.full_like(h, -9.0).scatter_reduce_(0, target[:, None].expand_as(m), m, "amax")
            spread = (square - mean**2).clamp(min=0).add(1e-5).sqrt()
            h = self.update(self.after(torch.cat([mean, spread, top], -1)), h)
        return self.head(h.mean(0))


@case(GRAPHS)
class EquivariantGraph(nn.Module):
    """Distances of hidden coordinates: a norm over the cut width."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.edge = nn.Linear(8, 12), nn.Sequential(nn.Linear(25, 16), nn.SiLU(), nn.Linear(16, 12))
        self.coordinate, self.node = nn.Linear(12, 1), nn.Linear(24, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        place, h = x[:, :3], self.embed(x)
        row, column = edges
        apart = place[row] - place[column]
        distance = apart.square().sum(-1, keepdim=True)
        m = self.edge(torch.cat([h[row], h[column], distance], -1))
        place = place.index_add(0, row, apart * self.coordinate(m))
        return self.head(h + self.node(torch.cat([h, torch.zeros_like(h).index_add(0, row, m)], -1))), place


@case(IMAGES, kinds="channel head")
class Perceiver(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(4, 16))
        self.byte, self.norm = nn.Linear(3 + 2 * 7, 16), nn.LayerNorm(16)
        self.cross, self.own, self.mlp = (
            Attend(16, 2),
            Attend(16, 4),
            nn.Sequential(nn.Linear(16, 40), nn.Linear(20, 16)),
        )
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        axes = torch.stack(torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij"), -1)
        bands = axes[..., None] * torch.tensor([1.0, 2.0, 4.0]) * math.pi
        fourier = torch.cat([bands.sin(), bands.cos(), axes[..., None]], -1).flatten(2)
        data = torch.cat([x.permute(0, 2, 3, 1), fourier.expand(b, -1, -1, -1)], -1).flatten(1, 2)
        data, z = self.norm(self.byte(data)), self.latents.repeat(b, 1, 1)
        for _ in range(2):
            z = z + self.cross(z, data)
            z = z + self.own(z, z)
            a, gate = self.mlp[0](z).chunk(2, -1)
            z = z + self.mlp[1](a * F.gelu(gate))
        return self.head(z.mean(1))


@case(IMAGES, truths=(over("apart", "codes.weight", of=1, dim=(-1, -1), out=None),))
class VqVae(nn.Module):
    """Nearest codes by squared distance over the width of codes; straight-through; a loss and a perplexity.

    The loss is a mean over the width of codes: of those that stay.
    """

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.pre = nn.Conv2d(3, 16, 4, 2, 1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 8, 1)
        self.codes = nn.Embedding(12, 8)
        self.post, self.up = nn.Conv2d(8, 16, 3, padding=1), nn.ConvTranspose2d(16, 3, 4, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.a(x).relu()
        z = self.pre(h + self.b(h).relu()).permute(0, 2, 3, 1)
        flat = z.reshape(-1, self.codes.embedding_dim)
        code = self.codes.weight
        distance = flat.pow(2).sum(1, keepdim=True) + code.pow(2).sum(1) - 2 * flat @ code.t()
        index = distance.argmin(1)
        q = self.codes(index).view_as(z)
        loss = self.apart(q.detach(), z) * 0.25 + self.apart(q, z.detach())
        q = z + (q - z).detach()
        share = F.one_hot(index, 12).float().mean(0)
        perplexity = torch.exp(-(share * (share + 1e-10).log()).sum())
        return self.up(self.post(q.permute(0, 3, 1, 2)).relu()), loss, perplexity

    def apart(self, a: Tensor, b: Tensor) -> Tensor:
        return F.mse_loss(a, b)
