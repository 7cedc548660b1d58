"""A BERT classifier that loses 30 % of its attention heads, keeps its accuracy, and loads again.

python examples/bert_classifier.py
"""

import tempfile

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import secateur as sc
from secateur.recover import finetune


def batches(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Sentences of numbers, with padding: is one of the words below 7 among them?"""
    random = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        words = torch.randint(7, 32, (32, 10), generator=random)
        words[:16, torch.randint(0, 7, (1,), generator=random)] = torch.randint(4, 7, (16, 1), generator=random)
        words[:, 7:] = 0
        labels = ((words > 0) & (words < 7)).any(1).long()
        found.append({"input_ids": words, "attention_mask": (words > 0).long(), "labels": labels})
    return found


def build() -> BertForSequenceClassification:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}
    return BertForSequenceClassification(BertConfig(vocab_size=32, hidden_dropout_prob=0.0, **sizes))


def main(steps: int = 120) -> tuple[float, float, float]:
    """Return the accuracy before and after, and the share of the heads that is gone."""
    torch.manual_seed(0)
    train, test, model = batches(steps, 1), batches(8, 2), build()
    finetune(model, train, optimizer={"name": "adamw", "lr": 1e-3}, epochs=1)
    result = sc.prune(
        model.eval(),
        {name: test[0][name][:2] for name in ("input_ids", "attention_mask")},
        data=train,
        test=test,
        criterion="taylor",
        granularity="head",
        target={"sparsity": 0.3},
        recover={"method": "finetune", "steps": steps // 3, "optimizer": {"name": "adamw", "lr": 3e-4}},
    )
    # A BERT config has one number of heads for all layers, and none for their width: the class is the frame here.
    again = sc.load(result.save(tempfile.mkdtemp() + "/bert"), model=build).eval()
    inputs = {name: test[0][name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(again(**inputs).logits, result.model.eval()(**inputs).logits)
    print(repr(result))
    before, after = result.report.before.quality, result.report.after.quality
    return before["accuracy"], after["accuracy"], result.report.sparsity


if __name__ == "__main__":
    main()
