"""``secateur measure``: parameters, MACs, size, latency and quality of a model or folder, or two against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from secateur.cli import options
from secateur.cli.console import emit, say, table
from secateur.cli.typed import only
from secateur.errors import RecipeError

if TYPE_CHECKING:
    from torch import nn

    from secateur.cli.job import Job
    from secateur.measure import Yardstick
    from secateur.measure.versus import Versus
    from secateur.types import Example, Latency, Snapshot

# What is read of the options, and where the others belong.
MODEL, TIMED = ("model", "data", "metric", "device", "seed"), ("rounds", "batch_size")
ONE = "Leave it out: --tokens, --sequences and --dtype belong to --task, --processor-time to two models."
TWO = "Leave it out: --tokens, --sequences and --dtype belong to --task; --processor-time counts one thread."
TASK = "Leave it out: a task gives its own figures, and times nothing."
STOLEN = 0.01  # share of processor time that other virtual machines took, above which it is said


@dataclass(frozen=True)
class _Asked:
    """What is asked of one model and of two alike, in the words of the command line."""

    model: str | None
    data: str | None
    seed: int
    device: str | None
    metric: Sequence[str] | None
    rounds: int
    batch_size: int | None
    as_json: bool

    def load(self, what: str, model: str | None) -> tuple[Job, nn.Module]:
        """See `load`."""
        return load(what, model, self.data, seed=self.seed, device=self.device, metric=self.metric)


EXAMPLES = (
    "measure runs/mine --model mynet.py:build --data npz:mine.npz",
    "measure demo:lenet --data demo:mnist --metric top5",
    "measure mynet.py:build runs/fast --model mynet.py:build --threads 1",
)


def measure(
    what: Annotated[str, typer.Argument(metavar="PATH|MODEL", help=f"An output folder, or {options.MODEL_WORDS}.")],
    against: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="[PATH|MODEL]", help="A second one: both are timed in the same rounds and compared."),
    ] = None,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--model", metavar="MODEL", help="Where PATH is an output folder: the model it was made from."),
    ] = None,
    data: options.Data = None,
    metric: options.Metric = None,
    task: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--task",
            metavar="perplexity|lm-eval:NAME,..",
            help="Only this: perplexity by the documented harness on text: data, or tasks of lm-eval.",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="For --task: tokens per block.")] = 1024,
    sequences: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--sequences", min=1, help="For --task: blocks (or samples) at most; default all."),
    ] = None,
    dtype: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--dtype", help="For --task: float32 or bfloat16; default that of the model."),
    ] = None,
    processor_time: Annotated[
        bool,
        typer.Option("--processor-time", help="Of two: count the processor's time (busy machines); one thread only."),
    ] = False,
    rounds: options.Rounds = 30,
    batch_size: options.BatchSize = None,
    device: options.Device = None,
    seed: options.Seed = None,
    threads: options.Threads = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Count parameters, MACs and bytes, time the forward pass, and evaluate on --data (its test part, if any)."""
    from secateur.cli import job as jobs

    asked = _Asked(model, data, seed or 0, device, metric, rounds, batch_size, json)
    if task is not None:
        return measure_task(task, (what, against), asked, tokens, sequences, dtype, threads=threads)
    if against is None:
        only("one model without --task", (*MODEL, *TIMED, "threads"), hint=ONE)
        jobs.use_threads(threads)
        return measure_one(what, asked)
    own = "processor_time" if processor_time else "threads"
    only("--processor-time" if processor_time else "two models", (*MODEL, *TIMED, own), hint=TWO)
    jobs.use_threads(1 if processor_time else threads)
    return measure_two((what, against), asked, processor_time=processor_time)


def measure_one(what: str, asked: _Asked) -> int:
    """One model: what it is."""
    from secateur.cli.progress import Stages
    from secateur.files import seed_everything
    from secateur.measure import latency

    with seed_everything(asked.seed), Stages() as stages:
        work, network = asked.load(what, asked.model)
        example = work.needed_example()
        stages("latency", 0, 0)
        timed = latency({what: network}, example, rounds=asked.rounds, batch_size=asked.batch_size)[what]
        stages("quality", 0, 0)
        judged = work.judged
        found = _counted(network, example, judged, timed)
    head: dict[str, object] = {"what": what, "model": work.source.name, "data": asked.data or ""}
    return _tell(head, found, judged, as_json=asked.as_json)


def _counted(network: nn.Module, example: Example, judged: Yardstick, timed: Latency | None = None) -> Snapshot:
    """What a network is. Packed layers are counted as the layers that they stand for, and their bytes as they are."""
    import copy

    from secateur.deployment import densify
    from secateur.deployment.packed import packed_layers
    from secateur.measure import size_bytes, snapshot

    # Packed weights are no parameters, and their product is one operator that no count knows.
    dense = densify(copy.deepcopy(network)) if packed_layers(network) else network
    found = snapshot(dense, example, evaluate=judged.evaluate, latency_ms=timed)
    return found if dense is network else replace(found, size_bytes=size_bytes(network))


def _tell(head: dict[str, object], found: Snapshot, judged: Yardstick, *, as_json: bool) -> int:
    if as_json:
        emit({"schema": 1, **head, **asdict(found), "quality_on": judged.on, "quality_missing": judged.why})
    else:
        table((str(head["what"]), ""), rows(found, judged))
    return 0


def measure_two(both: tuple[str, str], asked: _Asked, *, processor_time: bool) -> int:
    """Two models in the same rounds: what each is, and what may be said of their times."""
    import time

    from secateur.cli.progress import Stages
    from secateur.files import seed_everything
    from secateur.measure.versus import versus

    if asked.model is not None and all(map(_is_word, both)):
        raise RecipeError("--model goes with an output folder.", hint="Leave it out: both are measured as they are.")
    with seed_everything(asked.seed), Stages() as stages:
        loaded = [asked.load(each, None if _is_word(each) else asked.model) for each in both]
        work = loaded[0][0]
        first, second = (network for _, network in loaded)
        stages("latency", 0, 0)
        timer = time.process_time if processor_time else time.perf_counter
        found = versus(
            first, second, work.needed_example(),
            rounds=asked.rounds, batch_size=asked.batch_size, seed=asked.seed, timer=timer,
        )  # fmt: skip
        stages("quality", 0, 0)
        judged = [each.judged for each, _ in loaded]
        snapshots = [
            _counted(network, work.needed_example(), yard) for (_, network), yard in zip(loaded, judged, strict=True)
        ]
    clock = "processor" if processor_time else "wall"
    if asked.as_json:
        each = [{"what": name, **asdict(one)} for name, one in zip(both, snapshots, strict=True)]
        emit({"schema": 1, "models": each, "versus": {**asdict(found), "clock": clock}})
    else:
        columns = [dict(rows(one, yard)) for one, yard in zip(snapshots, judged, strict=True)]
        lines = [(key, columns[0].get(key, ""), columns[1].get(key, "")) for key in columns[0] | columns[1]]
        table(("", *both), lines + told(found, clock))
    return 0


def told(found: Versus, clock: str) -> list[tuple[str, str, str]]:
    """A comparison as lines of words."""
    where = found.machine
    on = f"{where['cpu']}, {where['isa']}, {where['threads']} of {where['cores']} threads, torch {where['torch']}"
    stolen = f", {found.stolen:.0%} of the processor's time went elsewhere" if found.stolen > STOLEN else ""
    return [
        (f"median ms ({clock} time)", f"{found.first_ms:.4g}", f"{found.second_ms:.4g}"),
        ("time over the first", f"{found.null}: null", str(found.ratio)),
        ("so the second is", "", found.verdict),
        ("measured", f"{found.rounds} rounds, batch {found.batch_size}{stolen}", on),
    ]


def measure_task(
    task: str,
    both: tuple[str, str | None],
    asked: _Asked,
    tokens: int,
    sequences: int | None,
    dtype: str | None,
    *,
    threads: int | None,
) -> int:
    """Perplexity of a language model on the whole of a text, or tasks of the harness lm-eval."""
    from secateur.cli import job as jobs
    from secateur.files import seed_everything
    from secateur.measure.lm_eval import PREFIX
    from secateur.measure.perplexity import perplexity, require_next, with_dtype
    from secateur.report.safe_text import significant
    from secateur.sources.prose import NAME
    from secateur.sources.text import block_length, whole_text

    (what, against), data = both, asked.data
    if against is not None:
        raise RecipeError("--task measures one model.", hint="Run it once for each.")
    if task.startswith(PREFIX):
        only(f"--task {PREFIX}", ("model", "device", "seed", "threads", "task", "sequences"), hint=TASK)
        jobs.use_threads(threads)
        return measure_harness(task, what, asked, sequences)
    if task != "perplexity":
        raise RecipeError(f"task {task!r} is not known.", hint=f"perplexity, or {PREFIX}NAME")
    reads = ("model", "device", "seed", "threads", "task", "data", "tokens", "sequences", "dtype")
    only("--task perplexity", reads, hint=TASK)
    jobs.use_threads(threads)
    if dtype not in (None, "float32", "bfloat16"):
        raise RecipeError(f"dtype {dtype!r} is not known.", hint="float32 or bfloat16")
    if data is None or not (data.startswith("text:") or data == NAME):
        raise RecipeError("perplexity is measured on text.", hint="--data text:FILE")
    with seed_everything(asked.seed):
        work, network = load(what, asked.model, None, seed=asked.seed, device=asked.device)
        tokens, notes = block_length(tokens, work.source.longest)
        for note in notes:
            say(f"note: {note}", style="yellow")
        blocks = whole_text(data, work.source.tokenizer, tokens=tokens, most=sequences)
        require_next(network, blocks)
        found = perplexity(with_dtype(network, dtype), blocks)
    count = len(blocks.blocks)
    if asked.as_json:
        said = {"tokens": tokens, "sequences": count, "dtype": dtype or str(next(network.parameters()).dtype)[6:]}
        emit({"schema": 1, "what": what, "data": data, "task": task, **found, **said})
    else:
        table(
            (what, ""),
            [(name, significant(value)) for name, value in found.items()]
            + [("text", f"{count} blocks of {tokens} tokens")],
        )
    return 0


def measure_harness(task: str, what: str, asked: _Asked, limit: int | None) -> int:
    """Tasks of lm-eval, at most `limit` samples of each."""
    from secateur.files import seed_everything
    from secateur.measure.lm_eval import PREFIX, lm_eval
    from secateur.report.safe_text import significant

    names = [name.strip() for name in task.removeprefix(PREFIX).split(",") if name.strip()]
    if not names:
        raise RecipeError(f"task {task!r} names no task.", hint=f"{PREFIX}hellaswag, for example")
    with seed_everything(asked.seed):
        work, network = load(what, asked.model, None, seed=asked.seed, device=asked.device)
        found = lm_eval(network, work.source.tokenizer, names, limit=limit)
    if asked.as_json:
        emit({"schema": 1, "what": what, "task": task, "limit": limit, "results": found})
    else:
        lines = [
            (f"{name} {metric}", significant(value)) for name, one in found.items() for metric, value in one.items()
        ]
        table((what, ""), lines)
    return 0


def load(
    what: str,
    model: str | None,
    data: str | None,
    *,
    seed: int,
    device: str | None = None,
    metric: Sequence[str] | None = None,
) -> tuple[Job, nn.Module]:
    """The job and the network to look at: of a MODEL word itself, or of an output folder replayed onto it."""
    from secateur.cli import job as jobs

    if _is_word(what):
        if model is not None:
            raise RecipeError("--model goes with an output folder.", hint=f"Leave it out to measure {what}.")
        work = jobs.resolve(what, data, seed=seed, device=device, metric=metric)
        return work, work.model
    if model is None:
        raise RecipeError(
            f"{what!r} is an output folder, and its files hold no code." if Path(what).is_dir() else
            f"{what!r} is neither an output folder nor a MODEL word.",
            hint=f"Give --model, the model that was pruned: {options.MODEL_WORDS}.",
        )  # fmt: skip
    work = jobs.resolve(model, data, seed=seed, device=device, metric=metric)
    return work, jobs.pruned(what, work)


def _is_word(what: str) -> bool:
    """Whether a MODEL word is meant. A folder may have a colon in its name: what lies on the disk comes first."""
    from secateur.sources.models import MODEL_KINDS
    from secateur.sources.words import is_python

    kind, colon, _ = what.partition(":")
    return bool(colon) and (kind in MODEL_KINDS or is_python(what)) and not Path(what).exists()


def rows(found: Snapshot, judged: Yardstick) -> list[tuple[str, str]]:
    """A snapshot as lines of words."""
    from secateur.report.safe_text import count, significant, size
    from secateur.report.verdict import score

    time = found.latency_ms
    lines = [("parameters", count(found.params)), ("non-zero parameters", count(found.nonzero))]
    lines.append((f"MACs per {found.macs_per}", "not counted" if found.macs is None else count(found.macs)))
    lines.append(("size", size(found.size_bytes)))
    if time is not None:
        lines.append(
            (
                "latency",
                f"{significant(time.median)} ms (p10-p90 {significant(time.p10)}-{significant(time.p90)}, "
                f"{time.threads} threads, batch {time.batch_size}, {time.rounds} rounds)",
            )
        )
    if judged.evaluate is None:
        return [*lines, ("quality", f"not measured ({judged.why})")]
    return [
        *lines,
        *(
            (f"{name} on {judged.on}" if judged.on else name, score(name, value))
            for name, value in found.quality.items()
        ),
    ]
