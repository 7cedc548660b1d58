"""All criteria on a ResNet-20-like network and CIFAR-10, compared fairly; can be stopped and started again.

    python benchmarks/compare_cifar10.py --data PATH_TO_CIFAR10 --out runs/cifar10 [--threads 1] [--only base]

PATH_TO_CIFAR10 holds train.parquet and test.parquet as Hugging Face data sets write them. Base models go to
``OUT/base``, every single run to ``OUT/channel/cells`` and the like; whatever lies there is not done again, so
processes with different ``--seeds`` may share one OUT. At the end (and with ``--only report`` at any time) the page
docs/benchmarks/PAGE.md is written.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import pkgutil
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import secateur.criteria
from cifar10 import Images, Training, decode
from secateur.comparison.compare import compare
from secateur.comparison.markdown import markdown
from secateur.files import atomic_write, load_tensors, save_tensors
from secateur.measure import accuracy, accuracy_on, macs, num_params
from secateur.sources import DataSet, TensorData, resolve_data

# Name of a comparison -> granularity and scope: with scope local all layers shrink alike, and only the order of the
# units within a layer differs between criteria.
STUDIES = {"channel": ("channel", "global"), "channel-local": ("channel", "local"), "element": ("element", "global")}
# Low levels too: without recovery so small a network is at chance soon, and there all criteria look alike.
LEVELS = {"channel": (0.05, 0.1, 0.2, 0.35, 0.5, 0.75), "element": (0.2, 0.35, 0.5, 0.67, 0.8, 0.95)}
RECOVER_LEVELS = {"channel": (0.5, 0.75), "element": (0.8, 0.95)}
TRAIN = (
    {"method": "bn_refresh", "batches": 10},
    {
        "method": "finetune",
        "steps": 60,
        "optimizer": {"name": "sgd", "lr": 0.02, "momentum": 0.9, "weight_decay": 1e-4},
        "schedule": "cosine",
    },
)
REFRESH = ({"method": "bn_refresh", "batches": 10},)  # these two need no labels and no training
REFIT = ({"method": "refit"}, *REFRESH)
RECOVERIES = {
    "channel": {"trained": TRAIN, "refitted": REFIT},
    "element": {"trained": TRAIN, "refreshed": REFRESH},
}
BATCH = 128
SAID = {
    "trained": f"batch-norm refresh on {TRAIN[0]['batches']} batches, then {TRAIN[1]['steps']} steps of SGD on batches "
    f"of {BATCH} ('trained')",
    "refreshed": "the refresh alone ('refreshed')",
    "refitted": "a refit in closed form on the scoring images with the refresh ('refitted')",
}
# What is left out of "all": the control that is always there, and scores of layers and experts.
LEFT_OUT = {"random", "reap", "block-influence", "angular-distance", "loss-increase", "every"}
# Options that the criterion's own documentation asks for at this granularity and scope.
OPTIONS = {"element": {"fpgm": {"reduce": "mean"}}}
PAGE = "criteria-cifar10"
RATE = 0.1  # the top of the cycle that the dense networks are trained with


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        same = stride == 1 and inputs == outputs
        project = [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
        self.shortcut = nn.Identity() if same else nn.Sequential(*project)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.norm1(self.conv1(x)))
        return self.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class ResNet20(nn.Module):
    """The CIFAR ResNet with 20 layers, of any width (16 in the paper), with projections at the stage borders."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        blocks, inputs = [], width
        for stage in range(3):
            outputs = width * 2**stage
            for place in range(3):
                blocks.append(Block(inputs, outputs, 2 if stage and not place else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.classify = nn.Linear(inputs, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.blocks(self.stem(x)).mean((2, 3)))


class Augmented:
    """Random shifts of up to four pixels and mirror images; the same for the same seed and epoch."""

    def __init__(self, data: TensorData, seed: int) -> None:
        self.data, self.seed, self.epoch = data, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.data.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rng = np.random.default_rng([self.seed, self.epoch, 7])
        for x, y in self.data:
            top, left = (int(v) for v in rng.integers(0, 9, 2))
            x = nn.functional.pad(x, (4, 4, 4, 4))[:, :, top : top + 32, left : left + 32]
            mirrored = torch.from_numpy(rng.random(len(x)) < 0.5)
            yield fast(torch.where(mirrored[:, None, None, None], x.flip(3), x)), y


class Fast:
    """The same batches in the memory format that convolutions on a CPU like best."""

    def __init__(self, data: TensorData) -> None:
        self.data = data

    @property
    def epoch(self) -> int:
        return self.data.epoch

    def set_epoch(self, epoch: int) -> None:
        self.data.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self.data:
            yield fast(x), y


def fast(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def subset(data: TensorData, count: int, *, batch_size: int = BATCH, shuffle: bool = False) -> TensorData:
    order = torch.randperm(data.num_samples, generator=torch.Generator().manual_seed(0))[:count].sort().values
    return TensorData(
        data.inputs[order],
        data.targets[order],
        batch_size=batch_size,
        shuffle=shuffle,
        seed=0,
        normalize=data.normalize,
    )


def base_model(args: argparse.Namespace, data: DataSet, seed: int) -> nn.Module:
    """Train the dense network of a seed, go on with it, or read it; a note of what it cost lies beside it."""
    torch.manual_seed(seed)
    model = ResNet20(args.width).to(memory_format=torch.channels_last)
    name = f"w{args.width}-e{args.epochs}-n{args.images}-s{seed}"
    path = args.out / "base" / f"{name}.safetensors"
    if path.exists():
        model.load_state_dict(load_tensors(path))
        return model.to(memory_format=torch.channels_last).eval()
    print(f"training {name}", flush=True)
    stored = args.out / "base" / "images.safetensors"
    if not stored.exists():
        decode(args.data, stored)
    training = Training(Images(stored, torch.device("cpu"), args.images), seed, BATCH, bfloat16=True, every=1)
    _, seconds = training.run(model, path.with_suffix(".state"), args.epochs, RATE)
    found = {"accuracy": accuracy(model.eval(), Fast(data.test)), "seconds": seconds}
    print(f"  {found}", flush=True)
    save_tensors(path, {key: tensor.detach().contiguous() for key, tensor in model.state_dict().items()})
    atomic_write(path.with_suffix(".json"), json.dumps(found))
    return model


def recoveries(args: argparse.Namespace, granularity: str) -> dict[str, list[dict[str, Any]]]:
    """The recoveries that are asked for, in the precision that is asked for."""
    chosen = {name: list(copy.deepcopy(steps)) for name, steps in RECOVERIES[granularity].items()}
    if args.bfloat16:
        for step in chosen["trained"]:
            if step["method"] == "finetune":
                step["amp"] = "bf16"
    return {name: steps for name, steps in chosen.items() if not args.recoveries or name in args.recoveries.split(",")}


def evaluation(args: argparse.Namespace, data: DataSet) -> Callable[[nn.Module], Mapping[str, float]]:
    """Accuracy on the test images that are used, in the precision that is asked for."""
    evaluate = accuracy_on(Fast(subset(data.test, args.test, batch_size=250)))

    def in_bfloat16(model: nn.Module) -> Mapping[str, float]:
        with torch.autocast("cpu", torch.bfloat16):
            return evaluate(model)

    return in_bfloat16 if args.bfloat16 else evaluate


def run(args: argparse.Namespace, data: DataSet, study: str, command: str) -> None:
    """One comparison; every criterion that cannot score these units is named in the report with its reason."""
    granularity, scope = STUDIES[study]
    names = args.criteria.split(",") if args.criteria else [n for n in secateur.criteria.names() if n not in LEFT_OUT]
    criteria = [{"name": name, **OPTIONS.get(granularity, {}).get(name, {})} for name in names]
    started = time.perf_counter()

    def show(stage: str, done: int, total: int) -> None:
        if done % 10 == 0 or done == total:
            print(f"  {study}: {done}/{total} runs, {time.perf_counter() - started:.0f} s", flush=True)

    compare(
        lambda seed: base_model(args, data, seed),
        Fast(subset(data.train, args.images, shuffle=True)),
        criteria=criteria,
        evaluate=evaluation(args, data),
        out=args.out / study,
        granularity=granularity,
        scope=scope,
        levels=args.levels or LEVELS[granularity],
        seeds=args.seeds,
        calibration=Fast(subset(data.train, args.calibration, batch_size=64)),
        example=fast(data.example),
        recover=recoveries(args, granularity),
        recover_levels=args.recover_levels or RECOVER_LEVELS[granularity],
        scratch=TRAIN[1:] if granularity == "channel" else (),
        rounds=args.rounds,
        tag=f"cifar10 test={args.test}" + " bfloat16" * args.bfloat16,
        title=f"ResNet-20, width {args.width}, CIFAR-10, {study}",
        command=command,
        progress=show,
    )


def report(args: argparse.Namespace, command: str) -> None:
    """The page and the picture, from whatever comparisons are finished."""
    docs = args.docs
    done = [study for study in STUDIES if (args.out / study / "summary.json").exists()]
    if not done:
        print("no comparison is finished yet: nothing to report", file=sys.stderr)
        return
    docs.mkdir(parents=True, exist_ok=True)
    found = {s: (read(args.out / s / "summary.json"), read(args.out / s / "manifest.json")) for s in done}
    atomic_write(docs / f"{args.page}.md", page(args, found, command))
    for study, (summary, _) in found.items():
        atomic_write(docs / f"{args.page}-{study}.svg", picture(summary, STUDIES[study][0]))
    print(f"wrote {docs / args.page}.md")


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def page(args: argparse.Namespace, found: Mapping[str, tuple[dict[str, Any], dict[str, Any]]], command: str) -> str:
    pattern = f"w{args.width}-e{args.epochs}-n{args.images}-s*.json"
    bases = [read(path) for path in sorted((args.out / "base").glob(pattern))]
    accuracies = ", ".join(f"{base['accuracy']:.3f}" for base in bases)
    minutes = ", ".join(f"{base['seconds'] / 60:.0f}" for base in bases)
    model = ResNet20(args.width)
    shown = {recovery for summary, _ in found.values() for recovery in summary["curves"]}
    size, work = num_params(model), macs(model, torch.zeros(1, 3, 32, 32))
    lines = [
        f"# Criteria on CIFAR-10, width {args.width}",
        "",
        f"A ResNet-20 of width {args.width} ({size:,} parameters, {work:,} multiply-accumulates"
        + ("; the paper's network has width 16" if args.width != 16 else ", as in the paper")
        + f"), trained for {args.epochs} epochs in bfloat16 on {args.images:,} images with shifts and "
        f"mirror images, once per seed. Accuracy on all test images: {accuracies}; training took {minutes} minutes. "
        f"Compared are accuracies on {args.test:,} test images"
        + (
            ", taken in bfloat16, in which training recovers too; weights and scores are float32." * args.bfloat16
            or "."
        ),
        "",
        f"Scores come from {args.calibration:,} training images without augmentation, the same for all criteria. The "
        f"recovery is the same for all: {'; or '.join(SAID[name] for name in SAID if name in shown)}. "
        "'scratch' is magnitude's network with new weights and the same number of training steps: what the inherited "
        "weights are worth, not what full training would reach. What scoring costs is in the tables, and not taken "
        "off the recovery. "
        f"With {len(bases)} seeds small differences cannot be told apart; the intervals say which.",
        *(["", args.note] if args.note else []),
        "",
    ]
    for study, (summary, manifest) in found.items():
        title = f"{STUDIES[study][0].capitalize()}, scope {STUDIES[study][1]}"
        text = markdown(summary, {**manifest, "title": title, "command": ""})
        lines += [text.replace("\n## ", "\n### ").replace("# ", "## ", 1)]
        lines += [f"![accuracy over the fraction removed]({args.page}-{study}.svg)", ""]
    return "\n".join([*lines, f"Command: `{command}`", ""])


def picture(summary: Mapping[str, Any], granularity: str) -> str:
    """The mean curves as SVG, one panel per recovery; the grey line is the dense network with the same recovery."""
    import io

    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "secateur", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    single = {recovery for recovery, curves in summary["curves"].items() if all(len(c) == 1 for c in curves.values())}
    figure, axes = pyplot.subplots(1, len(summary["curves"]), figsize=(15, 5), sharey=not single, squeeze=False)
    labels = list(dict.fromkeys(label for curves in summary["curves"].values() for label in curves))
    styles = {
        label: {"color": pyplot.get_cmap("tab10")(place % 10), "ls": ("-", "--", "-.")[place // 10 % 3]}
        for place, label in enumerate(labels)
    } | {"random": {"color": "black", "ls": ":", "lw": 2.0}}
    for axis, (recovery, curves) in zip(axes[0], summary["curves"].items(), strict=True):
        if recovery in single:
            one_level(axis, curves, recovery, summary["dense"][recovery]["mean"])
            continue
        for label, points in curves.items():
            x, y = [p["level"] for p in points], [p["mean"] for p in points]
            axis.plot(x, y, label=label, marker="o", ms=2.5, **{"lw": 1.2, **styles[label]})
        if summary["dense"][recovery]["mean"] is not None:
            axis.axhline(summary["dense"][recovery]["mean"], color="grey", lw=0.8, ls=(0, (1, 3)))
        axis.set_title("without recovery" if recovery == "none" else recovery)
        axis.set_xlabel(f"fraction removed ({'MACs' if granularity == 'channel' else 'weights'})")
    axes[0][0].set_ylabel("accuracy")
    shown = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown, loc="center left", bbox_to_anchor=(0.91, 0.5), fontsize=8)
    stream = io.StringIO()
    figure.savefig(stream, format="svg", bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    return stream.getvalue()


def one_level(axis: Any, curves: Mapping[str, list[dict[str, float]]], recovery: str, dense: float | None) -> None:
    """Where there is one amount and no curve: a line of the panel for each criterion, the best one on top."""
    ranked = sorted(curves, key=lambda label: curves[label][0]["mean"])
    means, deviations = ([curves[label][0][what] or 0.0 for label in ranked] for what in ("mean", "sd"))
    axis.errorbar(means, range(len(ranked)), xerr=deviations, fmt="o", ms=3, lw=1, color="black")
    axis.set_yticks(range(len(ranked)), ranked, fontsize=7)
    if dense is not None:
        axis.axvline(dense, color="grey", lw=0.8, ls=(0, (1, 3)))
    level = curves[ranked[0]][0]["level"]
    axis.set_title(f"{recovery}, {level:.0%} removed")
    axis.set_xlabel("accuracy, mean and standard deviation")


def command_line(args: argparse.Namespace) -> str:
    """What repeats the run; where the data and results lie is the reader's own business."""
    words = ["python", "benchmarks/compare_cifar10.py", "--data", "PATH_TO_CIFAR10", "--out", "runs/cifar10"]
    for name in ("width", "epochs", "images", "test", "calibration", "threads"):
        words += [f"--{name}", str(getattr(args, name))]
    words += ["--seeds", ",".join(map(str, args.seeds))]
    for name in ("levels", "recover_levels"):
        if getattr(args, name):
            words += [f"--{name.replace('_', '-')}", ",".join(map(str, getattr(args, name)))]
    words += ["--bfloat16"] * args.bfloat16
    for name, usual in (("recoveries", ""), ("criteria", ""), ("only", "all"), ("page", PAGE)):
        if getattr(args, name) not in (usual, "report"):
            words += [f"--{name}", getattr(args, name)]
    return shlex.join(words)


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(","))


def seeds(text: str) -> tuple[int, ...]:
    """ "5" = the first five; "3,4" = these two."""
    return tuple(int(number) for number in text.split(",")) if "," in text else tuple(range(int(text)))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--data", required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"))
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--images", type=int, default=50_000, help="training images that are used")
    parser.add_argument("--test", type=int, default=5_000, help="test images that are used")
    parser.add_argument("--calibration", type=int, default=512, help="images to score with")
    parser.add_argument("--seeds", type=seeds, default=(0, 1, 2), help="how many, or which: 5 or 3,4")
    parser.add_argument("--levels", type=numbers, default=(), help="comma-separated; default as the page has them")
    parser.add_argument("--recover-levels", type=numbers, default=(), help="those at which recovery is run")
    parser.add_argument("--recoveries", default="", help="comma-separated; default all")
    parser.add_argument("--bfloat16", action="store_true", help="test, and train while recovering, in bfloat16")
    parser.add_argument("--criteria", default="", help="comma-separated; default all that apply")
    parser.add_argument("--note", default="", help="a sentence for the page, such as what else the machine did")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of the latency")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--docs", type=Path, default=Path(__file__).parent.parent / "docs" / "benchmarks")
    parser.add_argument("--page", default=PAGE, help="name of the page, and of its pictures")
    parser.add_argument("--only", choices=("all", "base", *STUDIES, "report"), default="all")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    for module in pkgutil.iter_modules(secateur.criteria.__path__):
        importlib.import_module(f"secateur.criteria.{module.name}")
    command = command_line(args)
    if args.only != "report":
        data = resolve_data(f"parquet:{args.data}", batch_size=BATCH)
        for seed in args.seeds:
            base_model(args, data, seed)
        for study in STUDIES:
            if args.only in ("all", study):
                run(args, data, study, command)
    report(args, command)


if __name__ == "__main__":
    main()
