"""Small networks with mixtures of experts, written in the ways that are found in the wild."""

import torch
from torch import nn
from torch.nn import functional as F

E, K, H, W = 6, 2, 12, 10


class Router(nn.Module):
    """Sigmoid scores, a bias that only the choice sees, weights of the chosen."""

    def __init__(self, size=E, top_k=K):
        super().__init__()
        self.num_experts, self.top_k = size, top_k
        self.weight = nn.Parameter(torch.randn(size, H))
        self.register_buffer("correction_bias", torch.rand(size) * 3)

    def forward(self, x):
        logits = F.linear(x.float(), self.weight.float())
        scores = logits.sigmoid()
        chosen = (scores + self.correction_bias).topk(self.top_k, -1).indices
        weights = scores.gather(1, chosen)
        return logits, weights / weights.sum(-1, keepdim=True), chosen


class Fused(nn.Module):
    """Loop over experts by number, as transformers does it."""

    def __init__(self, size=E):
        super().__init__()
        self.num_experts = size
        self.up = nn.Parameter(torch.randn(size, W, H) / 3)
        self.up_bias = nn.Parameter(torch.randn(size, W) / 3)
        self.down = nn.Parameter(torch.randn(size, H, W) / 3)

    def forward(self, x, weights, chosen):
        out = torch.zeros_like(x)
        mask = F.one_hot(chosen, num_classes=self.num_experts).permute(2, 1, 0)
        for number in range(self.num_experts):
            slot, rows = torch.where(mask[number])
            inner = F.linear(x[rows], self.up[number], self.up_bias[number]).relu()
            out.index_add_(0, rows, F.linear(inner, self.down[number]) * weights[rows, slot, None])
        return out


class Block(nn.Module):
    def __init__(self, size=E, top_k=K, experts=Fused):
        super().__init__()
        self.router, self.experts = Router(size, top_k), experts(size)

    def forward(self, x):
        logits, weights, chosen = self.router(x)
        return x + self.experts(x, weights, chosen), logits


class Net(nn.Module):
    def __init__(self, *sizes, experts=Fused, top_k=K):
        super().__init__()
        self.blocks = nn.ModuleList(Block(size, top_k, experts) for size in sizes or (E, E))
        self.head = nn.Linear(H, 5)

    def forward(self, x):
        for block in self.blocks:
            x, _ = block(x)
        return self.head(x)


class Telling(Net):
    """Returns the router's logits as well."""

    def forward(self, x):
        told = []
        for block in self.blocks:
            x, logits = block(x)
            told.append(logits)
        return self.head(x), *told


class Stubborn(Fused):
    """The number of experts is written in the code."""

    def forward(self, x, weights, chosen):
        self.num_experts = E
        return super().forward(x, weights, chosen)


class Grouped(Router):
    """Experts in two groups of fixed size; the better group is used."""

    def forward(self, x):
        logits = F.linear(x, self.weight)
        best = logits.view(-1, 2, E // 2).amax(-1).topk(1, -1).indices
        mine = torch.zeros(len(x), 2).scatter(1, best, 1.0)[:, :, None].expand(-1, 2, E // 2).reshape(-1, E)
        weights, chosen = logits.softmax(-1).masked_fill(mine == 0, 0.0).topk(self.top_k, -1)
        return logits, weights, chosen


class Cosine(Router):
    def forward(self, x):
        logits = (F.normalize(x, dim=-1)[:, None] * F.normalize(self.weight, dim=-1)).sum(-1)
        weights, chosen = logits.softmax(-1).topk(self.top_k, -1)
        return logits, weights, chosen


class Dense(nn.Module):
    """Router and experts in one module, the router's weight transposed, all experts computed and then weighted."""

    def __init__(self):
        super().__init__()
        self.count = E
        self.gate = nn.Parameter(torch.randn(H, E))
        self.up = nn.Parameter(torch.randn(E, H, W) / 3)
        self.down = nn.Parameter(torch.randn(E, W, H) / 3)

    def forward(self, x):
        values, chosen = (x @ self.gate).softmax(-1).topk(K, -1)
        weights = torch.zeros(len(x), self.count).scatter(1, chosen, values)
        inner = torch.einsum("nh,ehw->enw", x, self.up).relu()
        return x + torch.einsum("enw,ewh,ne->nh", inner, self.down, weights)


class Weights(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, a, b) / 3)


class Apart(nn.Module):
    """Two modules hold the experts' weights; the router's bias has two dimensions."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(H, E)
        self.bias = nn.Parameter(torch.rand(1, E) * 3)
        self.inner, self.outer = Weights(W, H), Weights(H, W)

    def forward(self, x):
        scores = self.router(x).sigmoid()
        chosen = (scores + self.bias).topk(K, -1).indices
        out = []
        for slot in range(K):
            number = chosen[:, slot]
            y = torch.bmm(self.inner.weight[number], x[:, :, None]).relu()
            out.append(torch.bmm(self.outer.weight[number], y)[..., 0] * scores.gather(1, number[:, None]))
        return x + sum(out)


class Stacked(Telling):
    """The logits of all blocks in one tensor."""

    def forward(self, x):
        y, *told = super().forward(x)
        return y, torch.cat(told)


def net(kind=Net, *args, **options):
    torch.manual_seed(0)
    return kind(*args, **options)
