"""What retraining brings on CIFAR-10: slimming, gradual pruning, 2:4, distillation; each beside its controls.

    python benchmarks/training_cifar10.py prepare --data PATH_TO_CIFAR10 --out runs/training
    python benchmarks/training_cifar10.py run --seed 0 --out runs/training --device cuda
    python benchmarks/training_cifar10.py table --out runs/training

PATH_TO_CIFAR10 holds train.parquet and test.parquet as Hugging Face data sets write them; ``prepare`` decodes them
once. ``run`` is one seed, and several may run side by side. It trains two dense networks, a ResNet-20 and a VGG-16, and
prunes and retrains copies of them. A cell that is finished is a line of ``OUT/results-SEED.jsonl`` and is not trained
again; ``--minutes`` stops in time, also within a cell, which goes on from there at the next call. After the dense
training all cells of a network have the same optimizer, rates and number of steps, and so has the dense network that is
trained on (dense-on). Accuracies are those of the last epoch on all test images: nothing was chosen by them.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import nn

import secateur as sc
from cifar10 import Attach, Images, Loss, OutOfTimeError, Training, decode, of_labels, vgg16
from compare_cifar10 import ResNet20
from secateur.comparison.significance import paired, require_scipy
from secateur.files import load_tensors, save_tensors
from secateur.measure import macs, num_nonzero, num_params
from secateur.recover import Distil, taught
from secateur.training import penalty

RATES = {"resnet": 0.4, "vgg": 0.2}  # highest of the dense training, at batches of 512; half of it afterwards
EXAMPLE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TEACHER = Distil(temperature=4.0, weight=0.7)
Found = dict[str, Any]


@dataclass
class Run:
    """All cells of one seed."""

    args: argparse.Namespace
    data: Images
    until: float

    def cell(self, name: str) -> Found:
        """Train it, or read it."""
        path = self.args.out / f"results-{self.args.seed}.jsonl"
        for line in path.read_text().splitlines() if path.exists() else ():
            known = json.loads(line)
            if any(known[what] != value for what, value in self.settings().items()):
                sys.exit(f"{path} holds cells of other settings: {known}; give another --out")
            if known["cell"] == name:
                return dict(known)
        made = CELLS[name].make(self, name)
        found = {"cell": name, "seed": self.args.seed, **made, **self.settings(), **self.where()}
        with path.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(json.dumps(found), flush=True)
        return found

    def settings(self) -> Found:
        """What the figures depend on."""
        args = self.args
        words = ("epochs", "retrain", "batch", "width", "divide_vgg", "strength")
        return {word: getattr(args, word) for word in words} | {"images": len(self.data.train)}

    def where(self) -> Found:
        """The machine, as far as the seconds depend on it."""
        device = self.data.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        return {"device": name, "torch": torch.__version__, "secateur": sc.__version__}

    # -- networks and trainings -------------------------------------------------------------------------------

    def fresh(self, net: str, seed: int | None = None) -> nn.Module:
        """A network with new weights."""
        torch.manual_seed(self.args.seed if seed is None else seed)
        made = ResNet20(self.args.width) if net == "resnet" else vgg16(self.args.divide_vgg)
        return made.to(self.data.device)

    def dense(self, net: str) -> nn.Module:
        """The trained network that everything of its kind starts from."""
        model = self.fresh(net)
        self.cell(f"{net}/dense")
        model.load_state_dict(load_tensors(self.path(f"{net}/dense")))
        return model.to(memory_format=torch.channels_last)

    def path(self, name: str) -> Path:
        """Where weights of a name lie, or a state."""
        return Path(self.args.out) / "states" / f"{name.replace('/', '-')}-{self.args.seed}.safetensors"

    def first(self, name: str, model: nn.Module, attach: Attach | None = None) -> tuple[Any, float]:
        """The training of new weights."""
        training = Training(self.data, self.args.seed, self.args.batch, self.until)
        return training.run(model, self.path(f"{name}-1"), self.args.epochs, RATES[name.split("/")[0]], attach=attach)

    def again(
        self, name: str, model: nn.Module, attach: Attach | None = None, loss: Loss = of_labels
    ) -> tuple[Any, float]:
        """The training after it: half the rate, other data orders, the same for all cells."""
        training = Training(self.data, self.args.seed + 500, self.args.batch, self.until)
        rate = RATES[name.split("/")[0]] / 2
        return training.run(model, self.path(f"{name}-2"), self.args.retrain, rate, loss=loss, attach=attach)

    def figures(self, model: nn.Module, seconds: float, **more: object) -> Found:
        """What a cell says of its network."""
        accuracy = self.data.accuracy(model)
        return {
            "accuracy": accuracy, "params": num_params(model), "nonzero": num_nonzero(model),
            "macs": macs(model.cpu(), EXAMPLE), "seconds": round(seconds, 1), **more,
        }  # fmt: skip

    def smaller(self, plan: sc.Plan, model: nn.Module) -> nn.Module:
        """The network that a plan leaves, of one that lies on the CPU: the cut is proved there, in full float32."""
        return plan.apply(model).to(self.data.device)


# -- cells --------------------------------------------------------------------------------------------------------


def dense(run: Run, name: str) -> Found:
    """New weights, trained."""
    model = run.fresh(name.split("/")[0])
    _, seconds = run.first(name, model)
    save_tensors(run.path(name), model.state_dict())
    return run.figures(model, seconds)


def dense_on(run: Run, name: str) -> Found:
    """The control: what the further epochs alone bring."""
    model = run.dense(name.split("/")[0])
    return run.figures(model, run.again(name, model)[1])


def masked(run: Run, name: str, *, distil: bool = False, **options: Any) -> Found:
    """Masks that a pruner chooses and holds while the loop trains on."""
    model = run.dense("resnet")

    def attach(
        model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, state: Mapping[str, Any] | None
    ) -> sc.Pruner:
        # Along the schedule once per epoch, within the first 60 % of the steps.
        gradual = {"end": int(0.6 * steps), "every": steps // run.args.retrain}
        span = {} if options["schedule"] == "one_shot" else gradual
        return sc.Pruner(model, optimizer=optimizer, state=state, **span, **options)

    loss = taught(of_labels, run.dense("resnet").eval(), TEACHER, model) if distil else of_labels
    pruner, seconds = run.again(name, model, attach, loss)
    counted = pruner.handle.sparsity()
    if counted.zeros < counted.masked:
        raise AssertionError(f"{counted.masked - counted.zeros} masked weights are not zero")
    return run.figures(
        model, seconds, removed=counted.masked, of=counted.elements, sparsity=counted.fraction,
        model_sparsity=counted.model_fraction,
    )  # fmt: skip


def channels(run: Run, name: str, *, distil: bool = False) -> Found:
    """Half the channels cut at once, then trained on the labels, or taught by the dense network too."""
    model = run.dense("resnet").cpu()
    plan = sc.plan(model, EXAMPLE, target={"sparsity": 0.5})
    smaller = run.smaller(plan, model)
    before = run.data.accuracy(smaller)
    loss = taught(of_labels, run.dense("resnet").eval(), TEACHER, smaller) if distil else of_labels
    _, seconds = run.again(name, smaller, loss=loss)
    return run.figures(smaller, seconds, **cut(plan), accuracy_after_cut=before)


def slimming(run: Run, name: str) -> Found:
    """Scales of the norms pay while new weights are trained; then the smallest go, and the rest is trained on."""
    model, plan, seconds = slimmed(run)
    smaller = run.smaller(plan, model)
    reached, before = run.data.accuracy(model.to(run.data.device)), run.data.accuracy(smaller)
    _, more = run.again(name, smaller)
    about = {"accuracy_with_penalty": reached, "accuracy_after_cut": before}
    return run.figures(smaller, seconds + more, **cut(plan), **about)


def slimmed(run: Run) -> tuple[nn.Module, sc.Plan, float]:
    """The network that was trained with the penalty, on the CPU, and which of its channels go; two cells need it."""
    model, path = run.fresh("vgg"), run.path("vgg/penalty")
    if not path.exists():

        def attach(model: nn.Module, optimizer: torch.optim.Optimizer, *_: object) -> object:
            return penalty("slimming", model, strength=run.args.strength, optimizer=optimizer)

        _, seconds = run.first("vgg/penalty", model, attach)
        tensors = model.state_dict()
        save_tensors(path, {**tensors, "seconds": torch.tensor(seconds)})
    tensors = load_tensors(path)
    seconds = float(tensors.pop("seconds"))
    model.load_state_dict(tensors)
    plan = sc.plan(model.cpu(), EXAMPLE, criterion="bn-scale", target={"sparsity": 0.7})
    return model, plan, seconds


def scratch(run: Run, name: str) -> Found:
    """The network that slimming left, with new weights and as many epochs in all."""
    plan = slimmed(run)[1]
    smaller = run.smaller(plan, run.fresh("vgg", run.args.seed + 1000).cpu())
    _, seconds = run.first(name, smaller)
    _, more = run.again(name, smaller)
    return run.figures(smaller, seconds + more, **cut(plan))


def cut(plan: sc.Plan) -> Found:
    """What a plan removed; applied, so certified."""
    units = plan.units
    return {
        "removed": units["removed"], "of": units["total"], "sparsity": units["removed"] / units["total"],
        "certified": plan.certificate is not None,
    }  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """How a cell is made, and the others that it is held against."""

    make: Callable[[Run, str], Found]
    beside: tuple[str, ...] = ()


BASES = ("resnet/dense", "resnet/dense-on")
ONCE: dict[str, Any] = {"schedule": "one_shot"}
SLOWLY: dict[str, Any] = {"schedule": "cubic"}
# In the order in which they are trained: what is asked first, first.
CELLS = {
    "resnet/dense": Cell(dense),
    "resnet/dense-on": Cell(dense_on, BASES[:1]),
    "resnet/gradual-90": Cell(partial(masked, sparsity=0.9, **SLOWLY), (*BASES, "resnet/one-shot-90")),
    "resnet/one-shot-90": Cell(partial(masked, sparsity=0.9, **ONCE), BASES),
    "vgg/dense": Cell(dense),
    "vgg/slimming-70": Cell(slimming, ("vgg/dense", "vgg/dense-on", "vgg/scratch-70")),
    "vgg/dense-on": Cell(dense_on, ("vgg/dense",)),
    "resnet/gradual-80": Cell(partial(masked, sparsity=0.8, **SLOWLY), (*BASES, "resnet/one-shot-80")),
    "resnet/one-shot-80": Cell(partial(masked, sparsity=0.8, **ONCE), BASES),
    "resnet/2:4": Cell(partial(masked, granularity="2:4", **ONCE), BASES),
    "resnet/one-shot-90-distil": Cell(
        partial(masked, distil=True, sparsity=0.9, **ONCE), (*BASES, "resnet/one-shot-90")
    ),
    "resnet/channels-50": Cell(channels, BASES),
    "resnet/channels-50-distil": Cell(partial(channels, distil=True), (*BASES, "resnet/channels-50")),
    "vgg/scratch-70": Cell(scratch, ("vgg/dense", "vgg/dense-on")),
}  # fmt: skip


# -- the table ----------------------------------------------------------------------------------------------------


def interval(values: list[float]) -> str:
    """Mean, and half of the 95 % interval by Student's t."""
    if len(values) < 2:
        return f"{fmean(values):.2f}"
    quantile = float(require_scipy().t.ppf(0.975, len(values) - 1))
    return f"{fmean(values):.2f} ± {quantile * stdev(values) / len(values) ** 0.5:.2f}"


def difference(these: Mapping[int, float], those: Mapping[int, float]) -> str:
    """Mean and half-width of the differences, seed by seed."""
    found = paired(these, those)
    return "-" if not found.pairs else f"{found.mean:+.2f}" + ("" if found.half is None else f" ± {found.half:.2f}")


def table(out: Path) -> str:
    """All cells that any seed has finished, as Markdown."""
    lines = [json.loads(line) for path in sorted(out.glob("results-*.jsonl")) for line in path.read_text().splitlines()]
    found = {name: {line["seed"]: line for line in lines if line["cell"] == name} for name in CELLS}
    text = ["| cell | seeds | accuracy | removed | parameters that are not 0 | MACs | before retraining | seconds |"]
    text += ["|---|---|---|---|---|---|---|---|"]
    text += [row(name, list(rows.values())) for name, rows in found.items() if rows]
    text += ["", "| difference in points, seed by seed | mean and 95 % interval |", "|---|---|"]
    accuracy = {name: {seed: line["accuracy"] for seed, line in rows.items()} for name, rows in found.items()}
    for name, cell in CELLS.items():
        for other in cell.beside if found[name] else ():
            text.append(f"| {name} minus {other} | {difference(accuracy[name], accuracy[other])} |")
    said = {
        key: sorted({str(line[key]) for line in lines}) for key in ("epochs", "retrain", "batch", "device", "torch")
    }
    return "\n".join([*text, "", "; ".join(f"{key} {', '.join(values)}" for key, values in said.items())])


def row(name: str, lines: list[Found]) -> str:
    """One cell: means over the seeds; what was removed is counted."""
    counts = sorted(
        {f"{line['removed']:,} of {line['of']:,} ({line['sparsity']:.2%})" for line in lines if "of" in line}
    )
    before = [line["accuracy_after_cut"] for line in lines if "accuracy_after_cut" in line]
    size, work, seconds = (fmean(line[what] for line in lines) for what in ("nonzero", "macs", "seconds"))
    columns = (
        name, len(lines), interval([line["accuracy"] for line in lines]), "; ".join(counts), f"{size:,.0f}",
        f"{work / 1e6:.1f} M", interval(before) if before else "", f"{seconds:.0f}",
    )  # fmt: skip
    return "| " + " | ".join(map(str, columns)) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "run", "table"))
    parser.add_argument("--data", help="folder with train.parquet and test.parquet")
    parser.add_argument("--out", type=Path, default=Path("runs/training"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--epochs", type=int, default=30, help="of the dense training")
    parser.add_argument("--retrain", type=int, default=24, help="epochs of every training after it")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--width", type=int, default=32, help="of the ResNet-20; 16 in its paper")
    parser.add_argument("--divide-vgg", type=int, default=1, help="widths of the VGG-16 are divided by it")
    parser.add_argument("--strength", type=float, default=5e-4, help="of slimming")
    parser.add_argument("--images", type=int, help="use the first so many of each part only")
    parser.add_argument("--net", choices=list(RATES), help="cells of this network only")
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS), metavar="CELL")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so many")
    args = parser.parse_args()
    if args.what == "table":
        print(table(args.out))
        return 0
    images = args.out / "cifar10.safetensors"
    if args.what == "prepare":
        decode(args.data, images)
        return 0
    (args.out / "states").mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    until = time.time() + 60 * args.minutes
    run = Run(args, Images(images, torch.device(args.device), args.images), until)
    try:
        for name in [cell for cell in args.cells if cell.startswith(args.net or "")]:
            if time.time() > until:
                raise OutOfTimeError(f"{name} is not begun")
            run.cell(name)
    except OutOfTimeError as error:
        print(f"seed {args.seed} stopped: {error}; run it again", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
