"""Samples that are padded to one length score units as the same samples do one by one, without any padding."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.api import score
from secateur.criteria import get, names

LENGTHS = [[5, 2, 3], [4, 4], [1, 6]]


class Experts(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, width, width) / width)

    def forward(self, x, chosen, weights):
        return torch.einsum("to,t->to", torch.einsum("ti,toi->to", x, self.weight[chosen[:, 0]]), weights[:, 0])


class Routed(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gate, self.experts = nn.Linear(width, 3), Experts(width)

    def forward(self, x):
        flat = x.flatten(0, 1)
        weights, chosen = self.gate(flat).softmax(-1).topk(1)
        return self.experts(flat, chosen, weights).view(x.shape)


class Block(nn.Module):
    def __init__(self, width, routed):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = Routed(width) if routed else nn.Sequential(nn.Linear(width, 9), nn.ReLU(), nn.Linear(9, width))

    def forward(self, x, attention):
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.out((q @ k.mT / 8).masked_fill(~attention, -1e4).softmax(-1) @ v)
        return x + self.mlp(x)


class Encoder(nn.Module):
    """Attends to real tokens alone and pools over them, so that padding never reaches the output."""

    def __init__(self, width=8, routed=False):
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.blocks = nn.ModuleList(Block(width, routed) for _ in range(3))
        self.head = nn.Linear(width, 2)

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x, attention_mask[:, None, :] != 0)
        real = attention_mask[..., None].to(x.dtype)
        return self.head((x * real).sum(1) / real.sum(1))


def batches(*, padded, left):
    """The same samples, batch by batch or one by one."""
    generator, found = torch.Generator().manual_seed(1), []
    for lengths in LENGTHS:
        longest, rows = max(lengths), []
        for number, length in enumerate(lengths):
            ids = torch.randint(1, 20, (length,), generator=generator)
            around = (longest - length, 0) if left else (0, longest - length)
            around = around if padded else (0, 0)
            row = {"input_ids": F.pad(ids, around), "attention_mask": F.pad(torch.ones_like(ids), around)}
            rows.append({**row, "labels": torch.tensor(number % 2)})
        parts = [rows] if padded else [[row] for row in rows]
        found += [{key: torch.stack([row[key] for row in part]) for key in part[0]} for part in parts]
    return found


def loss(model, batch):
    return F.cross_entropy(model(batch["input_ids"], batch["attention_mask"]), batch["labels"])


def asked(name):
    known = type(get(name)).granularities
    return "neuron" if "any" in known else next(kind for kind in ("neuron", "layer", "expert") if kind in known)


READ = [name for name in names() if "data" in type(get(name)).needs and "batch_split" in type(get(name)).promises]
# These have no sums of their own over positions: the loss that they differentiate leaves padding out.
SLOPES = [name for name in READ if "gradients" in type(get(name)).needs and name != "kfac"]


@pytest.mark.filterwarnings("ignore::secateur.criteria.forecast.CostWarning")
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOPES else []) for n in READ])
def test_padding_does_not_count(name, left):
    torch.manual_seed(0)
    granularity = asked(name)
    model, found = Encoder(routed=granularity == "expert").eval(), []
    for padded in (True, False):
        data = batches(padded=padded, left=left)
        example = {key: data[0][key] for key in ("input_ids", "attention_mask")}
        protect = ["embed", "head", "*qkv*"] if granularity == "neuron" else ["embed"]
        found.append(
            score(model, example, criterion=name, granularity=granularity, data=data, loss=loss, protect=protect)
        )
    assert found[0]
    assert found[0].keys() == found[1].keys()
    for key in found[0]:
        torch.testing.assert_close(found[0][key], found[1][key], rtol=2e-4, atol=1e-6, msg=f"{name} {key}")
