"""How people really write models: hooks, branches, dicts, ties, frozen parts, custom operators, experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from micro.base import case, conv, conv_bn, floats, head, image, several, tokens


@case(image(), free="a b", share=0.25)
class DataBranch(nn.Module):
    """The path depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 12), conv(12, 10), conv(12, 10), head(10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = self.b(x) if x.mean().item() > 0 else self.c(x)
        return self.head(F.relu(x))


@case(image(), free="a b", share=0.3)
def hooked() -> nn.Module:
    """Forward hooks change inputs and outputs; they stay on the cut model."""
    net = nn.Sequential()
    net.add_module("a", conv(3, 12))
    net.add_module("b", conv(12, 10))
    net.add_module("head", head(10))
    net.a.register_forward_hook(lambda module, inputs, output: F.relu(output) * 2)
    net.b.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 0.0,))
    return net


@case(image(), free="a b", share=0.3, zeroing=False)
class InPlace(nn.Module):
    """In-place arithmetic, slice assignment and out= arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 12), conv(12, 10), head(10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).clone()
        y[:, :, 0] = 0.5
        y.mul_(2).add_(y).clamp_(min=0)
        y[..., 1:, :] += 1.0
        z = self.b(y)
        return self.head(F.relu(torch.mul(z, 0.5, out=torch.empty_like(z)) if not z.requires_grad else z * 0.5))


@case(image(), free="a b", share=0.3)
def frozen_backbone() -> nn.Module:
    """Frozen parameters and a no_grad region are cut like all others, and stay frozen."""

    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = conv(3, 12), conv(12, 10), head(10)
            self.a.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = F.relu(self.a(x))
            return self.head(F.relu(self.b(x)))

    return Frozen()


@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor | None = None


@case(lambda: {"image": image()(), "scale": 2.0, "options": {"deep": True}}, free="a b", share=0.3, zeroing=False)
class KeywordsAndRecords(nn.Module):
    """Keyword inputs of all kinds; a dataclass with a tensor, None and a dict comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 12), conv(12, 10), head(10)

    def forward(self, image: Tensor, *, scale: float, options: dict[str, Any], missing: Tensor | None = None) -> Any:
        x = F.relu(self.a(image * scale))
        x = F.relu(self.b(x)) if options["deep"] and missing is None else x
        return {"answer": Answer(self.head(x)), "extra": [x.mean((1, 2, 3))]}


@case(several(image(), floats(2, 6)), free="image.0.0 fc join", share=0.2)
class TwoInputsTwoOutputs(nn.Module):
    """An image and a vector; a hidden state is an output, so it stays."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.fc = nn.Sequential(conv_bn(3, 10), nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(6, 12)
        self.join, self.middle, self.out = nn.Linear(22, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, picture: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(self.join(torch.cat([self.image(picture), F.relu(self.fc(vector))], 1)))
        y = self.middle(y)
        return self.out(F.relu(y)), y


@case(tokens(2, 6), free="encoder fc", share=0.2)
class TiedTwice(nn.Module):
    """One weight as embedding, as transposed matrix and as functional linear weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.fc, self.back = nn.Embedding(20, 12), nn.Linear(12, 18), nn.Linear(18, 12)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.encoder(ids)
        x = x + self.back(F.relu(self.fc(x)))
        return F.linear(x, self.encoder.weight), x @ self.encoder.weight.t()


@case(image(), free="a.0 b.0", share=0.3)
def tied_convolutions() -> nn.Module:
    """Two convolutions share a weight but not the norm after them."""
    shared = conv(12, 12, bias=False)
    twin = conv(12, 12, bias=False)
    twin.weight = shared.weight
    net = nn.Sequential()
    net.add_module("a", conv_bn(3, 12))
    net.add_module("s", nn.Sequential(shared, nn.BatchNorm2d(12), nn.ReLU(), twin, nn.BatchNorm2d(12), nn.ReLU()))
    net.add_module("b", conv_bn(12, 10))
    net.add_module("head", head(10))
    return net


@torch.library.custom_op("secateurtest::swirl", mutates_args=())
def swirl(x: Tensor) -> Tensor:
    """An operator that nobody knows."""
    return x.flip(1) * 0.5


swirl.register_autograd(lambda ctx, grad: grad.flip(1) * 0.5)


@case(image(), free="a d", share=0.2, locked={"b": "no rule for the operator secateurtest::swirl"})
class UnknownOperator(nn.Module):
    """A custom operator in the middle locks its own dimensions only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = conv(3, 12), conv(12, 8), conv(8, 8), conv(8, 14)
        self.head = head(14)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(F.relu(self.a(x)))
        x = swirl(F.relu(x))
        return self.head(F.relu(self.d(F.relu(x))))


@case(floats(6, 10), free="gate_up width", share=0.2, zeroing=False, locked={"router": "experts"})
class FusedExperts(nn.Module):
    """Three-dimensional expert weights, dense routing by bmm: whole experts are no channels."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.size = 3, 8
        self.width, self.router = nn.Linear(10, 14), nn.Linear(14, 3)
        self.gate_up = nn.Parameter(torch.randn(3, 14, 16) / 4)
        self.down = nn.Parameter(torch.randn(3, 8, 14) / 4)
        self.head = nn.Linear(14, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.width(x)
        weights = self.router(x).softmax(-1)
        y = x.repeat(self.experts, 1).view(self.experts, -1, x.shape[-1])
        gate, up = torch.bmm(y, self.gate_up).chunk(2, -1)
        y = torch.bmm(F.silu(gate) * up, self.down)
        return self.head(x + (y * weights.t().unsqueeze(-1)).sum(0))


@case(floats(6, 10), free="experts.0.up experts.1.up experts.2.up width", share=0.2, zeroing=False)
class RoutedExperts(nn.Module):
    """Mixtral's loop: top-k routing, every expert takes its rows and adds its result in place."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.router = nn.Linear(10, 12), nn.Linear(12, 3, bias=False)
        self.experts = nn.ModuleList(Expert(12, 9) for _ in range(3))
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.width(x)
        weights, picked = self.router(x).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, slot = torch.where(picked == number)
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, slot, None])
        return self.head(out)


class Expert(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


class Conv1D(nn.Module):
    """GPT-2's linear layer with a transposed weight."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) / 4), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        size = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


@case(floats(2, 5, 8), free="0 2", share=0.4)
def transposed_linear() -> nn.Module:
    return nn.Sequential(Conv1D(20, 8), nn.ReLU(), Conv1D(16, 20), nn.ReLU(), Conv1D(4, 16))


@case(floats(3, 8), free="a b down", share=0.3)
class LowRankAdapter(nn.Module):
    """LoRA: a frozen matrix plus a product of two thin ones, and a bilinear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.down, self.up = nn.Linear(8, 12), nn.Linear(8, 4, bias=False), nn.Linear(4, 12, bias=False)
        self.a.requires_grad_(False)
        self.b = nn.Bilinear(12, 12, 9)
        self.out = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x) + 0.5 * self.up(self.down(x)))
        return self.out(F.relu(self.b(y, y)))


@case(image(), free="stem stem/conv_group time block.0 block.0/conv_group", share=0.3, zeroing=False)
class DiffusionBlock(nn.Module):
    """DDPM: a sinusoidal time embedding is projected and added to every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.time, self.to_channels = conv(3, 12), nn.Linear(8, 16), nn.Linear(16, 12)
        self.block = nn.ModuleList([conv(12, 12), conv(12, 12)])
        self.norms, self.end = nn.ModuleList([nn.GroupNorm(3, 12), nn.GroupNorm(3, 12)]), conv(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[0], dtype=torch.float32)[:, None] * torch.exp(-torch.arange(4.0))
        embedding = F.silu(self.time(torch.cat([steps.sin(), steps.cos()], -1)))
        x = self.stem(x)
        y = self.block[0](F.silu(self.norms[0](x))) + self.to_channels(embedding)[:, :, None, None]
        y = x + self.block[1](F.silu(self.norms[1](y)))
        return self.end(torch.cat([y, x], 1))


@case(lambda: (torch.randn(2, 3, 8, 8), [1, 2]), free="blocks.0 blocks.1 blocks.2", share=0.3)
class Flags(nn.Module):
    """ModelOpt's flags in forward: which blocks run is an argument; one never runs and stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([conv(3, 10), conv(10, 12), conv(12, 9), conv(12, 12)])
        self.head = head(9)

    def forward(self, x: Tensor, which: list[int]) -> Tensor:
        x = F.relu(self.blocks[0](x))
        for number in which:
            x = F.relu(self.blocks[number](x))
        return self.head(x)


@case(tokens(3, 5), free="means maxima fc", share=0.3, zeroing=False)
class BagsOfWords(nn.Module):
    """nn.EmbeddingBag by mean and by maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.means, self.maxima = nn.EmbeddingBag(20, 12, mode="mean"), nn.EmbeddingBag(20, 10, mode="max")
        self.fc, self.out = nn.Linear(22, 14), nn.Linear(14, 3)

    def forward(self, ids: Tensor) -> Tensor:
        both = torch.cat([self.means(ids), self.maxima(ids)], 1)
        return self.out(F.relu(self.fc(both)))


@case(several(floats(4, 8), tokens(4, vocabulary=3)), free="a", share=0.2, zeroing=True)
class LossInside(nn.Module):
    """The forward returns a loss with the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 14), nn.Linear(14, 3)

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.b(F.relu(self.a(x)))
        return F.cross_entropy(logits, labels), logits


@case(floats(4, 8), free="encode code", share=0.3, zeroing=True)
class Reconstruction(nn.Module):
    """An autoencoder that returns its own errors: losses over a dimension that stays and one that goes."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.code, self.decode = nn.Linear(8, 14), nn.Linear(14, 10), nn.Linear(10, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code = self.code(F.relu(self.encode(x)))
        y = self.decode(code)
        return F.mse_loss(y, x) + F.smooth_l1_loss(y, x), y
