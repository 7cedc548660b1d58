"""Movement pruning in transformers.Trainer: half of the weights of a small encoder, while it is fine-tuned.

python examples/trainer.py
"""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import secateur as sc
from secateur.training.adapters.transformers import TrainerPruningCallback


def main(steps: int = 40) -> float:
    """Fine-tune on a toy task (does the first token come back?), prune on the way, return the sparsity."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    tokens = torch.randint(0, 32, (512, 8))
    rows = [{"input_ids": row, "labels": int((row[1:] == row[0]).any())} for row in tokens]
    pruning = TrainerPruningCallback(sc.MovementPruner, sparsity=0.5, begin=0.1, end=0.7, protect=["classifier"])
    arguments = TrainingArguments(tempfile.mkdtemp(), max_steps=steps, report_to=[], save_strategy="no", use_cpu=True)
    model = BertForSequenceClassification(config)
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[pruning]).train()
    print(f"sparsity {pruning.pruner.sparsity:.4f} after {pruning.pruner.done} steps")
    return pruning.pruner.sparsity


if __name__ == "__main__":
    main()
