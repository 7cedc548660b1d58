"""Small whole networks as papers publish them: diffusion, detection, scans, memories, graphs, codebooks, flows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cases import Family, both, fixed, floats, ids
from .references import Kept, over, put

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


@case(both(floats((5, 4, 3), (1, 1, 3), (2, 9, 3)), floats((5, 3), (1, 3), (2, 3))))
class VolumeRendering(nn.Module):
    """Encoded points, a skip in the middle, density beside colour, transmittance by a cumulative product."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bands", 2.0 ** torch.arange(4))
        self.layers = nn.ModuleList([nn.Linear(27, 20), nn.Linear(20, 20), nn.Linear(47, 20), nn.Linear(20, 20)])
        self.sigma, self.feature = nn.Linear(20, 1), nn.Linear(20, 16)
        self.view, self.colour = nn.Linear(16 + 27, 12), nn.Linear(12, 3)

    def encode(self, x: Tensor) -> Tensor:
        return torch.cat([x] + [f(x * b) for b in self.bands for f in (torch.sin, torch.cos)], -1)

    def forward(self, points: Tensor, rays: Tensor) -> tuple[Tensor, Tensor]:
        e = self.encode(points)
        h = e
        for number, layer in enumerate(self.layers):
            h = layer(torch.cat([e, h], -1) if number == 2 else h).relu()
        alpha = 1 - torch.exp(-self.sigma(h).relu().squeeze(-1) * 0.3)
        ones = torch.ones_like(alpha[:, :1])
        weight = alpha * torch.cumprod(torch.cat([ones, 1 - alpha + 1e-10], -1), -1)[:, :-1]
        d = self.encode(F.normalize(rays, dim=-1))[:, None].expand(-1, points.shape[1], -1)
        rgb = self.colour(self.view(torch.cat([self.feature(h), d], -1)).relu()).sigmoid()
        return (weight[..., None] * rgb).sum(1), weight


@case(both(WAVES, fixed(*(torch.tensor(v) for v in ([1, 0], [2], [0, 1, 2], [2, 2])))))
class ConditionedWaveNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.speaker = nn.Conv1d(2, 12, 1), nn.Embedding(3, 6)
        self.dilated = nn.ModuleList(nn.Conv1d(12, 24, 2, dilation=2**i, padding=2**i) for i in range(3))
        self.condition = nn.ModuleList(nn.Conv1d(6, 24, 1) for _ in range(3))
        self.both = nn.ModuleList(nn.Conv1d(12, 12 + 10, 1) for _ in range(3))
        self.end = nn.Sequential(nn.ReLU(), nn.Conv1d(10, 8, 1), nn.ReLU(), nn.Conv1d(8, 5, 1))

    def forward(self, x: Tensor, who: Tensor) -> Tensor:
        h, g, skips = self.first(x), self.speaker(who)[:, :, None], 0
        for dilated, condition, both_ in zip(self.dilated, self.condition, self.both, strict=True):
            a = dilated(h)[..., : h.shape[-1]] + condition(g)
            out = both_(a[:, : a.shape[1] // 2].tanh() * a[:, a.shape[1] // 2 :].sigmoid())
            h, skips = (h + out[:, :12]) * math.sqrt(0.5), skips + out[:, 12:]
        return self.end(skips)


@case(both(TOKENS, floats((2, 4, 12), (1, 2, 12), (3, 5, 12))), kinds="channel head")
class TransformerXl(nn.Module):
    """The memory of hidden states comes in and goes out: its width is the caller's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.qkv, self.r, self.o = nn.Linear(12, 36, bias=False), nn.Linear(12, 12, bias=False), nn.Linear(12, 12)
        self.u, self.v = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3, 4))
        self.ff, self.back, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 20)

    @staticmethod
    def shift(x: Tensor) -> Tensor:
        b, h, q, k = x.shape
        return F.pad(x, (1, 0)).view(b, h, k + 1, q)[:, :, 1:].view(b, h, q, k)

    def forward(self, tokens: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        h = self.embed(tokens)
        c = torch.cat([memory, h], 1)
        q, k, v = self.qkv(c).chunk(3, -1)
        q, k, v = q[:, -h.shape[1] :].unflatten(-1, (3, 4)), k.unflatten(-1, (3, 4)), v.unflatten(-1, (3, 4))
        r = self.r(sines(torch.arange(c.shape[1] - 1, -1, -1.0), 12)).unflatten(-1, (3, 4))
        ac = torch.einsum("bihd,bjhd->bhij", q + self.u, k)
        bd = self.shift(torch.einsum("bihd,jhd->bhij", q + self.v, r))
        mask = torch.ones(h.shape[1], c.shape[1], dtype=torch.bool).triu(1 + memory.shape[1])
        a = ((ac + bd) * 0.5).masked_fill(mask, -1e9).softmax(-1)
        h = h + self.o(torch.einsum("bhij,bjhd->bihd", a, v).flatten(2))
        h = h + self.back(self.ff(h).relu())
        return self.head(h), torch.cat([memory, h.detach()], 1)[:, -4:]


@case(kinds="channel head")
class RetNetLike(nn.Module):
    """Rotated keys, a decay per head by its number, group norm over heads, a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.g = (nn.Linear(8, 16) for _ in range(4))
        self.o, self.norm = nn.Linear(16, 3), nn.GroupNorm(4, 16)
        self.register_buffer("decay", torch.log(1 - 2.0 ** (-2 - torch.arange(4.0))))

    def rotate(self, t: Tensor) -> Tensor:
        return torch.stack([-t[..., 1::2], t[..., ::2]], -1).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        angle = torch.arange(n)[:, None] * torch.tensor([1.0, 0.1]).repeat_interleave(2)
        q, k, v = (p(x).view(b, n, 4, 4).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = (t * angle.cos() + self.rotate(t) * angle.sin() for t in (q, k))
        place = torch.arange(n)
        apart = place[:, None] - place
        mask = torch.where(apart >= 0, torch.exp(self.decay[:, None, None] * apart), 0.0)
        mask = mask / mask.sum(-1, keepdim=True).sqrt()
        y = (q @ k.transpose(-1, -2) * mask) @ v
        y = self.norm(y.transpose(1, 2).reshape(b * n, 16)).view(b, n, 16)
        return self.o(F.silu(self.g(x)) * y)


@case(both(IMAGES, floats((2, 5), (1, 5), (3, 5))))
class FilmLayers(nn.Module):
    """One projection makes scale and shift of all blocks; it is cut into pieces by number."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(12, 12, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(12, affine=False) for _ in range(3))
        self.film, self.head = nn.Linear(5, 3 * 2 * 12), nn.Linear(12, 3)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h, film = self.stem(x), self.film(condition).view(len(x), 3, 2, 12)
        for i, (conv, norm) in enumerate(zip(self.blocks, self.norms, strict=True)):
            gamma, beta = film[:, i, 0, :, None, None], film[:, i, 1, :, None, None]
            h = h + (norm(conv(h)) * (1 + gamma) + beta).relu()
        return self.head(h.amax((2, 3)))


@case()
class HyperConnections(nn.Module):
    """Four residual streams, mixed by learned and by dynamic weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 12), nn.Linear(12, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12)) for _ in range(2))
        self.alpha = nn.ParameterList(torch.randn(4, 5) for _ in range(2))
        self.beta = nn.ParameterList(torch.rand(4) for _ in range(2))
        self.dynamic = nn.ModuleList(nn.Linear(12, 5, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).unsqueeze(2).repeat(1, 1, 4, 1)
        for i, block in enumerate(self.blocks):
            alpha = self.alpha[i] + 0.1 * self.dynamic[i](h.tanh()).tanh()
            mixed = alpha.transpose(-1, -2) @ h
            h = mixed[..., 1:, :] + self.beta[i][:, None] * block(mixed[..., 0, :]).unsqueeze(2)
        return self.head(h.sum(2))


@case(IMAGES)
class TiedConvAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3, 2, 1), nn.Conv2d(12, 16, 3, 2, 1)
        self.da, self.db = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x).relu()).relu()
        h = F.conv_transpose2d(h, self.b.weight, self.db, 2, 1, output_padding=1).relu()
        return F.conv_transpose2d(h, self.a.weight, self.da, 2, 1, output_padding=1)


@case(both(IMAGES, [*IMAGES[3:], *IMAGES[1:3], *IMAGES[:1]]))
class SiameseWithHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 1))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        a, b = (self.body(t).mean((2, 3)) for t in (x, y))
        return self.head(torch.cat([a, b, (a - b).abs(), a * b], 1)), (a - b).square().sum(1)


@case(floats((4, 3, 16, 16), (2, 3, 16, 16), (6, 3, 16, 16)), truths=(over("spread", "b.weight", dim=2, out=None),))
class MinibatchSpread(nn.Module):
    """The spread over the batch, a mean over channels and space, as one more channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3, 2, 1), nn.Conv2d(12, 16, 3, 2, 1)
        self.c, self.head = nn.Conv2d(17, 12, 3, padding=1), nn.Linear(12 * 16, 1)

    def spread(self, y: Tensor) -> Tensor:
        return (y.var(0, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3), keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.b(F.leaky_relu(self.a(x), 0.2)), 0.2)
        g = min(2, len(h))
        y = self.spread(h.view(g, -1, *h.shape[1:]))
        h = torch.cat([h, y.repeat(g, 1, *h.shape[2:])], 1)
        return self.head(F.leaky_relu(self.c(h), 0.2).flatten(1))


def spread_of_kept(model: nn.Module, kept: Kept) -> None:
    index, inner = (kept("a.weight") % 4).unique(), model.spread
    put(model, "spread", lambda y: inner(y[:, :, :, index]))


@case(floats((4, 3, 16, 16), (2, 3, 16, 16)), truths=(spread_of_kept,))
class MinibatchSpreadOfFeatures(nn.Module):
    """The same with groups of features, each with its own channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(20, 12, 3, 2, 1), nn.Linear(12, 1)

    def spread(self, y: Tensor) -> Tensor:
        return (y - y.mean(0)).square().mean(0).add(1e-8).sqrt().mean((2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.a(x), 0.2)
        _n, c, height, width = h.shape
        y = self.spread(h.reshape(2, -1, 4, c // 4, height, width))
        y = y.reshape(-1, 4, 1, 1).repeat(2, 1, height, width)
        return self.head(self.b(torch.cat([h, y], 1)).relu().mean((2, 3)))


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
