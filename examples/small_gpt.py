"""A small GPT on the characters of a Python module: 70 % of the weights in its blocks go in one shot, by three rules.

python examples/small_gpt.py
"""

import argparse
import inspect
import math

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import secateur as sc
from secateur.recover import finetune


def batches(text: str, size: int = 64) -> list[dict[str, Tensor]]:
    """Rows of bytes, eight at a time; each token is asked to tell the next one."""
    rows = torch.tensor(list(text.encode()))[: len(text) // (8 * size) * 8 * size].view(-1, 8, size)
    return [{"input_ids": row, "labels": row} for row in rows]


def perplexity(model: GPT2LMHeadModel, data: list[dict[str, Tensor]]) -> float:
    with torch.no_grad():
        return math.exp(sum(float(model(**batch).loss) for batch in data) / len(data))


def main(epochs: int = 6, characters: int = 60_000) -> dict[str, float]:
    """Return the perplexity per byte on held-out text: dense, and with 70 % of the weights in its blocks gone."""
    torch.manual_seed(0)
    text = inspect.getsource(argparse)[:characters]
    data = batches(text)
    train, test = data[: -len(data) // 5], data[-len(data) // 5 :]
    config = GPT2Config(
        vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    finetune(model, train, optimizer={"name": "adamw", "lr": 2e-3}, epochs=epochs)

    model.eval()
    found = {"dense": perplexity(model, test)}
    example = {"input_ids": test[0]["input_ids"][:1]}
    for criterion in ("magnitude", "wanda", "sparsegpt"):
        options = {"granularity": "element", "scope": "row", "target": {"sparsity": 0.7}}
        needs = {} if criterion == "magnitude" else {"data": train[:8]}
        plan = sc.plan(model, example, criterion=criterion, **needs, **options)
        found[criterion] = perplexity(plan.apply(model), test)
    for name, value in found.items():
        print(f"{name:10} {value:6.2f} per byte")
    return found


if __name__ == "__main__":
    main()
