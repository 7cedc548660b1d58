"""Which experts of a mixture can go: REAP beside other criteria on real digits.

    python benchmarks/experts.py [--out runs/experts] [--seeds 5] [--threads 1]

A network of three residual blocks with eight fused experts each, of which every image uses two, is trained on the
digits that come with secateur, once per seed. `compare` removes experts at six strengths, without recovery, and
writes OUT/compare.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.comparison import compare
from secateur.measure import accuracy_on
from secateur.recover import finetune
from secateur.sources import TensorData, resolve_data

WIDTH, EXPERTS, USED, INNER = 32, 8, 2, 24


class Experts(nn.Module):
    """Fused weights of two-layer experts, run one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) / INNER**0.5)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out, mask = torch.zeros_like(x), F.one_hot(chosen, self.up.shape[0]).permute(2, 1, 0)
        for number in range(self.up.shape[0]):
            slot, row = torch.where(mask[number])
            added = F.linear(F.linear(x[row], self.up[number]).relu(), self.down[number])
            out = out.index_add(0, row, added * weights[row, slot, None])
        return out


class Block(nn.Module):
    """Router and experts beside the path that changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router, self.experts = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, EXPERTS, bias=False), Experts()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        weights, chosen = self.router(h).softmax(-1).topk(USED, -1)
        return x + self.experts(h, chosen, weights / weights.sum(-1, keepdim=True))


class Net(nn.Module):
    """Images to ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(784, WIDTH), nn.Linear(WIDTH, 10)
        self.blocks = nn.Sequential(*(Block() for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x.flatten(1))))


def trained(seed: int, data: TensorData) -> nn.Module:
    torch.manual_seed(seed)
    model = Net()
    finetune(model, data, optimizer={"name": "adam", "lr": 3e-3}, schedule="cosine", epochs=15, seed=seed)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=Path("runs/experts"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = resolve_data("demo:mnist", batch_size=100)
    found = compare(
        lambda seed: trained(seed, data.train),
        data.train,
        criteria=["reap", {"name": "reap", "average": "all"}, {"name": "reap", "gated": False}, "taylor"],
        evaluate=accuracy_on(data.test),
        out=args.out,
        granularity="expert",
        match="units",
        levels=[0.125, 0.25, 0.375, 0.5, 0.625, 0.75],
        seeds=args.seeds,
        calibration_batches=4,
        rounds=0,
        title="Experts of a mixture on digits",
    )
    print((found.out / "compare.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
