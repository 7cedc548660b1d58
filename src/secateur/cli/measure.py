"""``secateur measure``: parameters, MACs, size, latency and quality of a model or an output folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from secateur.cli import options
from secateur.cli.console import emit, say, table
from secateur.errors import RecipeError

if TYPE_CHECKING:
    from torch import nn

    from secateur.cli.job import Job
    from secateur.measure import Yardstick
    from secateur.types import Snapshot


EXAMPLES = ("measure runs/mine --model mynet.py:build --data npz:mine.npz", "measure demo:lenet --data demo:mnist")


def measure(
    what: Annotated[str, typer.Argument(metavar="PATH|MODEL", help=f"An output folder, or {options.MODEL_WORDS}.")],
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--model", metavar="MODEL", help="Where PATH is an output folder: the model it was made from."),
    ] = None,
    data: options.Data = None,
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
    from secateur.cli.progress import Stages
    from secateur.files import seed_everything
    from secateur.measure import latency, snapshot

    jobs.use_threads(threads)
    if task is not None:
        return measure_task(task, (what, model, data), tokens, sequences, dtype, as_json=json)
    with seed_everything(seed or 0), Stages() as stages:
        work, network = load(what, model, data, seed=seed or 0, device=device)
        example = work.needed_example()
        stages("latency", 0, 0)
        timed = latency({what: network}, example, rounds=rounds, batch_size=batch_size)[what]
        stages("quality", 0, 0)
        judged = work.judged
        found = snapshot(network, example, evaluate=judged.evaluate, latency_ms=timed)
    if json:
        said = {"quality_on": judged.on, "quality_missing": judged.why}
        emit({"schema": 1, "what": what, "model": work.source.name, "data": data or "", **asdict(found), **said})
    else:
        table((what, ""), rows(found, judged))
    return 0


def measure_task(
    task: str,
    asked: tuple[str, str | None, str | None],
    tokens: int,
    sequences: int | None,
    dtype: str | None,
    *,
    as_json: bool,
) -> int:
    """Perplexity of a language model on the whole of a text, or tasks of the harness lm-eval."""
    from secateur.measure.lm_eval import PREFIX
    from secateur.measure.perplexity import perplexity, with_dtype
    from secateur.report.safe_text import significant
    from secateur.sources.prose import NAME
    from secateur.sources.text import whole_text

    what, model, data = asked
    if task.startswith(PREFIX):
        return measure_harness(task, (what, model), sequences, as_json=as_json)
    if task != "perplexity":
        raise RecipeError(f"task {task!r} is not known.", hint=f"perplexity, or {PREFIX}NAME")
    if dtype not in (None, "float32", "bfloat16"):
        raise RecipeError(f"dtype {dtype!r} is not known.", hint="float32 or bfloat16")
    if data is None or not (data.startswith("text:") or data == NAME):
        raise RecipeError("perplexity is measured on text.", hint="--data text:FILE")
    work, network = load(what, model, None, seed=0)
    blocks = whole_text(data, work.source.tokenizer, tokens=tokens, most=sequences)
    found = perplexity(with_dtype(network, dtype), blocks)
    count = len(blocks.blocks)
    if as_json:
        said = {"tokens": tokens, "sequences": count, "dtype": dtype or str(next(network.parameters()).dtype)[6:]}
        emit({"schema": 1, "what": what, "data": data, "task": task, **found, **said})
    else:
        table(
            (what, ""),
            [(name, significant(value)) for name, value in found.items()]
            + [("text", f"{count} blocks of {tokens} tokens")],
        )
    return 0


def measure_harness(task: str, asked: tuple[str, str | None], limit: int | None, *, as_json: bool) -> int:
    """Tasks of lm-eval, at most `limit` samples of each."""
    from secateur.measure.lm_eval import PREFIX, lm_eval
    from secateur.report.safe_text import significant

    names = [name.strip() for name in task.removeprefix(PREFIX).split(",") if name.strip()]
    if not names:
        raise RecipeError(f"task {task!r} names no task.", hint=f"{PREFIX}hellaswag, for example")
    what, model = asked
    work, network = load(what, model, None, seed=0)
    found = lm_eval(network, work.source.tokenizer, names, limit=limit)
    if as_json:
        emit({"schema": 1, "what": what, "task": task, "limit": limit, "results": found})
    else:
        lines = [
            (f"{name} {metric}", significant(value)) for name, one in found.items() for metric, value in one.items()
        ]
        table((what, ""), lines)
    return 0


def load(
    what: str, model: str | None, data: str | None, *, seed: int, device: str | None = None
) -> tuple[Job, nn.Module]:
    """The job and the network to look at: of a MODEL word itself, or of an output folder replayed onto it."""
    import secateur as sc
    from secateur.cli import job as jobs
    from secateur.sources.models import MODEL_KINDS

    # A folder may have a colon in its name; what lies on the disk is meant before a word is.
    kind, colon, _ = what.partition(":")
    if colon and kind in MODEL_KINDS and not Path(what).exists():
        if model is not None:
            raise RecipeError("--model goes with an output folder.", hint=f"Leave it out to measure {what}.")
        work = jobs.resolve(what, data, seed=seed, device=device)
        return work, work.model
    if model is None:
        raise RecipeError(
            f"{what!r} is an output folder, and its files hold no code." if Path(what).is_dir() else
            f"{what!r} is neither an output folder nor a MODEL word.",
            hint=f"Give --model, the model that was pruned: {options.MODEL_WORDS}.",
        )  # fmt: skip
    work = jobs.resolve(model, data, seed=seed, device=device)
    network = sc.load(what, model=work.model, example=work.example)
    tell_doubt(network)
    return work, network


def tell_doubt(network: nn.Module) -> None:
    """Say that the cut of a loaded network is not proved, where no example was at hand to prove it with."""
    from secateur.loading import doubt

    said = doubt(network)
    if said:
        say(f"note: {said}; --data, or a factory that returns (model, example), lets it be proved", style="yellow")


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
    return [*lines, *((f"{name} on {judged.on}", score(name, value)) for name, value in found.quality.items())]
