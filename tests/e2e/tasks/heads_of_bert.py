"""Task: "a BERT classifier with 30 % of heads gone and loadable". Written from docs/how-to/hugging-face.md alone."""

import json
import random
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

import secateur as sc
from secateur.cli.main import main

# What the user has: a trained classifier in a folder of transformers, and a folder with train.tsv and test.tsv.
words = ["good", "bad", "fine", "poor", "film", "book", "very", "a", "the", "is"]
numbers = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
tokenizer = BertTokenizerFast(vocab=numbers)
draw = random.Random(0)
rows = []
for number in range(400):
    said = draw.choice(["good", "fine"] if number % 2 else ["bad", "poor"])
    rows.append((f"the {draw.choice(['film', 'book'])} is {draw.choice(['very', 'a'])} {said}", number % 2))
Path("reviews").mkdir()
for part, some in (("train", rows[:320]), ("test", rows[320:])):
    lines = ["sentence\tlabel", *(f"{sentence}\t{label}" for sentence, label in some)]
    Path(f"reviews/{part}.tsv").write_text("\n".join(lines))
torch.manual_seed(0)
sizes = {"hidden_size": 40, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 10}
model = BertForSequenceClassification(BertConfig(vocab_size=15, num_labels=2, hidden_dropout_prob=0.0, **sizes))
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for start in range(0, 320 * 3, 16):
    sentences, labels = zip(*rows[start % 320 :][:16], strict=True)
    optimizer.zero_grad()
    model(**tokenizer(list(sentences), return_tensors="pt"), labels=torch.tensor(labels)).loss.backward()
    optimizer.step()
model.save_pretrained("bert")
tokenizer.save_pretrained("bert")

# what a user types
command = "prune hf:bert --data tsv:reviews --granularity head --sparsity 0.3 --criterion taylor"
assert main([*command.split(), "--recover", "finetune:epochs=1", "--out", "runs/bert"]) == 0


def build() -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig.from_pretrained("bert"))


small = sc.load("runs/bert", model=build).eval()

report = json.loads(Path("runs/bert/report.json").read_text())
heads = [layer.attention.self.query.out_features // 4 for layer in small.bert.encoder.layer]
assert sum(heads) == 14, heads  # of 20
assert report["sparsity"] == 0.3
assert report["after"]["quality"]["accuracy"] > 0.9
inputs = tokenizer(["the film is very good", "the book is a bad"], return_tensors="pt", padding=True)
assert small(**inputs).logits.argmax(1).tolist() == [1, 0]
