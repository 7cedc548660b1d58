"""Every option of every command, in every mode: it changes what is asked of the library, or it is refused by its name.

A command runs up to what would take long; there stands a recorder. What two runs that differ in one option ask for and
print must differ. An option that is new is tried without being listed here; one whose value nobody knows fails.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from torch import nn, zeros

import secateur
from secateur.cli import demo, estimate, inspect, job, prune, reload
from secateur.cli.job import Job
from secateur.cli.main import app, main
from secateur.cli.typed import EVERYWHERE
from secateur.recipe import Recipe
from secateur.sources import DataSet, Source

# What an option is given that is not there yet, and instead of what stands in the line of the mode.
VALUES = {
    "--data": "demo:digits", "--model": "demo:convnet", "--out": "other", "--recipe": "two-four", "--set": "seed=5",
    "--seed": "3", "--threads": "3", "--device": "cpu", "--metric": "f1", "--protect": "*.0", "--track": "tensorboard",
    "--macs": "0.7", "--params": "0.7", "--sparsity": "0.4", "--latency": "7", "--criterion": "taylor",
    "--granularity": "neuron", "--recover": "bn_refresh", "--proof": "full", "--max-drop": "2", "--smallest": "params",
    "--confidence": "0.9", "--deploy": "int8", "--epochs": "5", "--rounds": "7", "--batch-size": "3",
    "--task": "lm-eval:other", "--tokens": "512", "--sequences": "9", "--dtype": "bfloat16", "--html": "a.html",
    "--picture": "a.svg", "--cache": "kept", "--budget": "9", "--criteria": "l1", "--levels": "0.3", "--match": "units",
    "--scope": "local", "--seeds": "2", "--recover-levels": "0.3", "--probes": "64", "--preset": "quick",
    "--space": "space.yaml", "--objectives": "quality,params", "--minutes": "2", "--trials": "2", "--sampler": "nsga2",
    "--to": "macs=0.4", "--storage": "sqlite:///s.db", "--ray": "local", "--workers": "2", "--rate": "0.3",
    "--rewind": "rates", "--controls": "none", "--format": "pt2", "--weights": "bfloat16", "--profile": "archive",
}  # fmt: skip
SOLVER = {"--recipe": "language-model", "--data": "text:t"}
DISK = {**SOLVER, "--set": "blocks.from_disk=true", "--out": "o"}
SEARCH = {"--data": "demo:mnist", "--space": "s.yaml", "--out": "o", "--trials": "3"}
FOLDER = {"--model": "demo:lenet", "--out": "o"}
PATTERN = {"--granularity": "2:4"}
TICKETS = {"--recipe": "element-90", "--set": "scope=local"}
# Command, arguments, options of the mode, and what is beyond it: an option that the mode knows by another value.
MODES: list[tuple[str, list[str], dict[str, str], dict[str, str]]] = [
    ("prune", ["demo:lenet"], {"--out": "o", "--data": "demo:mnist"}, {}),
    ("prune", ["demo:lenet"], {"--out": "o", "--data": "demo:mnist", "--max-drop": "1"}, {}),
    ("prune", ["demo:lenet"], {"--out": "o", "--recipe": "element-90", "--data": "demo:mnist"}, PATTERN),
    ("prune", ["demo:lenet"], {"--out": "o", "--dry-run": ""}, {}),
    ("prune", ["demo:smollm2"], {"--out": "o", **SOLVER}, {"--granularity": "2:4", "--criterion": "sparsegpt"}),
    ("prune", ["hf:there"], DISK, {"--granularity": "2:4", "--criterion": "sparsegpt", "--device": "cuda"}),
    ("estimate", ["demo:lenet"], {}, {}),
    ("estimate", ["demo:lenet"], {"--recipe": "two-four"}, {"--recipe": "element-90", "--granularity": "1:4"}),
    ("demo", [], {}, {}),
    ("demo", [], {"--granularity": "element"}, {"--granularity": "2:4"}),
    ("demo", [], {"--dry-run": ""}, {}),
    ("demo", [], {"--llm": ""}, {"--granularity": "2:4", "--criterion": "sparsegpt"}),
    ("inspect", ["demo:lenet"], {}, {}),
    ("inspect", ["demo:lenet"], {"--sensitivity": "", "--data": "demo:mnist"}, {}),
    ("advise", ["demo:lenet"], {}, {}),
    ("advise", ["demo:lenet"], {"--data": "demo:mnist", "--out": "o"}, {}),
    ("compare", ["demo:lenet"], {"--data": "demo:mnist", "--out": "o"}, {"--recover": "two-four"}),
    ("compare", ["demo:lenet"], {"--data": "demo:mnist", "--out": "o", "--preset": "quick"},
     {"--recover": "two-four", "--preset": "slow"}),
    ("search", ["demo:lenet"], SEARCH, {}),
    ("search", ["demo:lenet"], {**SEARCH, "--sampler": "descent", "--to": "macs=0.5"}, {}),
    ("search", ["demo:lenet"], {**SEARCH, "--ray": "auto"}, {}),
    ("lottery", ["demo:lenet"], {"--data": "demo:mnist", "--out": "o"}, TICKETS),
    ("measure", ["demo:lenet"], {}, {}),
    ("measure", ["demo:lenet", "demo:convnet"], {}, {}),
    ("measure", ["demo:lenet", "folder"], {"--model": "demo:lenet"}, {}),
    ("measure", ["demo:lenet", "demo:convnet"], {"--processor-time": ""}, {}),
    ("measure", ["demo:lenet"], {"--task": "perplexity", "--data": "text:t"}, {"--data": "text:u"}),
    ("measure", ["demo:lenet"], {"--task": "lm-eval:one"}, {}),
    ("export", ["folder"], FOLDER, {}),
    ("export", ["folder"], {**FOLDER, "--format": "archive"}, {}),
    ("deploy", ["folder"], FOLDER, {"--weights": "int8"}),
    ("reload-check", ["folder"], {"--model": "demo:lenet"}, {}),
    ("recipes show", ["element-90"], {}, {"--granularity": "2:4"}),
]  # fmt: skip


class _ReachedError(Exception):
    """A command has come as far as it has to."""


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What a command asks for, in order; long work is not done."""
    found: list[object] = []

    def spy(where: object, name: str, result: object = None, *, last: bool = False) -> None:
        def called(*args: object, **more: object) -> object:
            if name == "unfinished":  # what it is to be found again by
                args = args[:1]
            # A line that repeats what was typed is no effect of it.
            found.append((name, plain(args), plain({key: one for key, one in more.items() if key != "command"})))
            if last:
                raise _ReachedError(name)
            return result

        monkeypatch.setattr(where, name, called)

    monkeypatch.chdir(tmp_path)
    for name, high in (("s.yaml", 0.6), ("space.yaml", 0.7)):
        Path(name).write_text(f"base: channel-half-macs\ntarget.macs: {{low: 0.3, high: {high}}}\n", "utf-8")
    network = nn.Sequential(nn.Linear(2, 2))
    data = DataSet("data", [], [], None, zeros(1, 2))
    made = Job(Source("demo:lenet", network, zeros(1, 2), trained=True), data, zeros(1, 2))
    boundaries(spy, made)
    root = typer.main.get_command(app)
    monkeypatch.setattr(typer.main, "get_command", lambda _: root)
    return found


def boundaries(spy: Callable[..., None], made: Job) -> None:
    """Put recorders in the place of what takes long, or touches the disk."""
    from secateur import advice, asking, files, measure, pipeline, sources
    from secateur.comparison import study
    from secateur.measure import lm_eval, perplexity, versus
    from secateur.search import on_ray, storage
    from secateur.search import study as searching
    from secateur.sources import text

    spy(job, "resolve", made)
    spy(job, "pruned", made.model)
    for name in ("use_threads", "require_free", "require_free_file", "unfinished", "warn_untrained"):
        spy(job, name)
    for module, name in ((prune, "say_forecast"), (asking, "plan_by"), (demo, "train"), (storage, "require_optuna"),
                         (perplexity, "with_dtype"), (perplexity, "require_next"), (text, "whole_text")):  # fmt: skip
        spy(module, name)
    spy(secateur, "deploy", _Deployed())
    for name in ("run", "show_plan", "prune_on_disk"):
        spy(prune, name, last=True)
    for module, name in ((pipeline, "estimate"), (secateur, "inspect"), (secateur, "lottery"), (secateur, "export"),
                         (secateur, "sensitivity"), (secateur, "save_deployed"), (advice, "advise"),
                         (study, "run_study"), (searching, "search"), (measure, "latency"), (versus, "versus"),
                         (perplexity, "perplexity"), (lm_eval, "lm_eval"), (reload, "facts")):  # fmt: skip
        spy(module, name, last=name not in LATER, result=RESULTS.get(name, lambda: None)())
    for name in ("_page", "_tables"):
        spy(inspect, name)
    spy(estimate, "deployed", last=True)
    spy(estimate, "_print", last=True)
    spy(files, "atomic_write", last=True)
    spy(sources, "resolve_model", made.source)
    spy(sources, "resolve_data", made.data)
    spy(on_ray, "RayCrew", type("Crew", (), {"start": lambda self: self})())


class _View:
    """What `inspect` and `advise` find."""

    def __str__(self) -> str:
        return "a view"

    def to_yaml(self) -> str:
        """Nothing."""
        return ""


class _Deployed:
    """What `deploy` finds."""

    decisions = ()

    def __str__(self) -> str:
        return "deployed"


# What a command does something with after it was found.
LATER = ("inspect", "advise", "estimate")
RESULTS: Mapping[str, Callable[[], object]] = {"inspect": _View, "advise": _View}


def plain(value: Any) -> object:
    """What was asked, without what every run makes anew."""
    if isinstance(value, Recipe):
        return value.model_dump()
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, (str, int, float, range, Path, type(None))):
        return str(value)
    if is_dataclass(value) and not isinstance(value, (Job, DataSet, Source)):
        return {one.name: plain(getattr(value, one.name)) for one in fields(value)}
    return getattr(value, "__name__", type(value).__name__)


def words(command: str, arguments: list[str], options: Mapping[str, str | list[str]]) -> list[str]:
    """A command line."""
    said = []
    for option, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            said += [option, one] if one else [option]
    return [*command.split(), *arguments, *said]


@functools.cache
def options_of(command: str) -> tuple[Any, ...]:
    """All options of a command but those that mean the same everywhere."""
    found: Any = typer.main.get_command(app)
    for word in command.split():
        found = found.commands[word]
    return tuple(one for one in found.params if one.param_type_name == "option" and one.name not in EVERYWHERE)


@pytest.mark.parametrize(
    ("command", "arguments", "mode", "others"), MODES, ids=[" ".join([a, *b, *c]) for a, b, c, _ in MODES]
)
def test_an_option_has_an_effect_or_is_refused(
    command: str,
    arguments: list[str],
    mode: dict[str, str],
    others: dict[str, str],
    seen: list[object],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(options: Mapping[str, str | list[str]]) -> tuple[int, list[object], str]:
        seen.clear()
        code = main(words(command, arguments, options))
        told = capsys.readouterr()
        return code, [*seen, told.out], told.err

    code, usual, said = run(mode)
    assert code == 0 or "_ReachedError" in said, said
    silent = []
    for option in options_of(command):
        for name in (*option.opts, *option.secondary_opts):
            value = "" if option.is_flag else others.get(name) or VALUES[name]
            several: Any = [mode[name], value] if option.multiple and name in mode else value
            code, now, said = run({**mode, name: several})
            bare = name.removeprefix("--")
            refused = code in (2, 3) and any(one in said for one in (name, bare, bare.replace("-", "_")))
            changed = (code == 0 or "_ReachedError" in said) and now != usual
            # A switch that is on in this mode, or stands for what is usual, has nothing to change.
            same = option.is_flag and (name in mode or (name in option.opts) == option.default)
            if not (refused or changed or same):
                silent.append((name, several, code, said[-300:]))
    assert not silent, silent


def test_every_command_is_tried() -> None:
    root: Any = typer.main.get_command(app)
    named = [
        f"{name} {inner}".strip() for name, one in root.commands.items() for inner in getattr(one, "commands", [""])
    ]
    without = {command for command in named if not options_of(command)}
    assert {mode[0] for mode in MODES} == set(named) - without
