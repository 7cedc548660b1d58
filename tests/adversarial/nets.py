"""Small networks with a hole, into which the families put what is made to deceive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Mid(nn.Module):
    """The smallest network that can be cut: two layers, and something made to deceive between them."""

    def __init__(self, middle: Callable[[nn.Module, Tensor], Any] | None = None, width: int = 24, **extra: Any) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, width), nn.Linear(width, 4)
        self.middle = middle
        for name, value in extra.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def mid(self, h: Tensor) -> Tensor:
        return h if self.middle is None else self.middle(self, h)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.mid(torch.relu(self.fc1(x))))


class Image(nn.Module):
    """Two convolutions, something between them, and a classifier over the mean of space."""

    def __init__(self, middle: Callable[[nn.Module, Tensor], Any] | None = None, width: int = 16, **extra: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 12, 3, padding=1)
        self.out, self.middle = nn.Linear(12, 4), middle
        for name, value in extra.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def mid(self, h: Tensor) -> Tensor:
        return h if self.middle is None else self.middle(self, h)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.b(self.mid(torch.relu(self.a(x)))).relu().mean((2, 3)))


class Heads(nn.Module):
    """Four heads of width six over an input of width 16, behind a stem and before a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.size = 4, 6
        wide = self.heads * self.size
        self.stem = nn.Linear(16, 20)
        self.q, self.k, self.v = nn.Linear(20, wide), nn.Linear(20, wide), nn.Linear(20, wide)
        self.o, self.out = nn.Linear(wide, 20), nn.Linear(20, 3)
        with torch.no_grad():  # sharp attention, so that a wrong scale is seen
            self.q.weight.mul_(4)
            self.o.weight.mul_(3)
        self.make()

    def make(self) -> None:
        """More parameters."""

    def split(self, t: Tensor) -> Tensor:
        return t.view(t.shape[0], t.shape[1], self.heads, self.size).transpose(1, 2)

    def join(self, t: Tensor) -> Tensor:
        return t.transpose(1, 2).flatten(2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 0.3).softmax(-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        q, k, v = self.split(self.q(h)), self.split(self.k(h)), self.split(self.v(h))
        return self.out((h + self.o(self.join(self.attend(q, k, v)))).tanh())


class Body(nn.Module):
    """Embeds steps, adds what `place` says, attends with one head at a fixed scale, and classifies."""

    def __init__(self, width: int = 16, tokens: bool = False) -> None:
        super().__init__()
        self.width = width
        self.embed = nn.Embedding(20, width) if tokens else nn.Linear(8, width)
        self.q, self.k, self.v = nn.Linear(width, 12), nn.Linear(width, 12), nn.Linear(width, width)
        self.up, self.down, self.out = nn.Linear(width, 24), nn.Linear(24, width), nn.Linear(width, 3)

    def place(self, h: Tensor) -> Tensor:
        return h

    def bias(self, scores: Tensor) -> Tensor:
        return scores

    def pool(self, h: Tensor) -> Tensor:
        return h.mean(1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.place(self.embed(x))
        scores = self.bias(self.q(h) @ self.k(h).mT * 0.3)
        h = h + scores.softmax(-1) @ self.v(h)
        return self.out(self.pool(h + self.down(self.up(h).relu())))


class Mlp(nn.Module):
    """Feed-forward half of a block."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    """`B, N, C = x.shape`, as in most vision code."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.scale = (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        a = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.proj((a @ v).transpose(1, 2).reshape(b, n, c))


class Block(nn.Module):
    """Pre-norm block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width, heads), Mlp(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))
