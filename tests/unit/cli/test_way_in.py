"""The way in: options that stand over the recipe, files as MODEL and DATA, hints, help, completion, lists, progress."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from rich.console import Console
from ruamel.yaml import YAML

import secateur as sc
from secateur.cli import doctor
from secateur.cli.decisions import TARGETS
from secateur.cli.failures import show
from secateur.cli.main import app, main
from secateur.recipe import load_recipe
from secateur.report.progress import progress
from secateur.shown import in_notebook

ROOT = Path(__file__).parents[3]
NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 16), nn.Linear(16, 2)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def build():
    return Net()


def data():
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
    batches = [(x[i : i + 8], (x[i : i + 8, 0] > 0).long()) for i in range(0, 32, 8)]
    return {"train": batches, "calibration": batches[:1], "test": batches}
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    (tmp_path / "own_net.py").write_text(NET)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("own_net"):
            del sys.modules[name]


def said(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> str:
    assert main(list(argv)) == code
    text = capsys.readouterr()
    return text.err if code else text.out


def shown(capsys: pytest.CaptureFixture[str], *options: str) -> sc.Recipe:
    return load_recipe(said(capsys, "recipes", "show", "channel-half-macs", *options))


# -- options that are recipe keys -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("option", "key"), TARGETS.items())
def test_a_target_takes_the_place_of_the_recipes(option: str, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, f"--{option}", "0.3").target.given() == {key: 0.3}


@pytest.mark.parametrize(
    ("options", "target"),
    [
        (["--macs", "0.4", "--params", "0.6"], {"macs": 0.4, "params": 0.6}),
        (["--set", "target.sparsity=0.3"], {"sparsity": 0.3}),
        (["--set", "target.macs=0.3"], {"macs": 0.3}),
        (["--set", "target.sparsity=0.3", "--set", "target.params=0.5"], {"sparsity": 0.3, "params": 0.5}),
        (["--set", "target={sparsity: 0.3}", "--set", "target.params=0.5"], {"sparsity": 0.3, "params": 0.5}),
        (["--sparsity", "0.3", "--set", "target.params=0.5"], {"sparsity": 0.3, "params": 0.5}),
        ([], {"macs": 0.5}),
    ],
)
def test_which_target_holds(options: list[str], target: dict[str, float], capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, *options).target.given() == target


def test_what_a_target_holds_already_is_only_changed() -> None:
    both = {"target": {"macs": 0.5, "params": 0.6}}
    assert load_recipe(both, ["target.macs=0.4"]).target.given() == {"macs": 0.4, "params": 0.6}
    uneven = {"target": {"sparsity": {"a.*": 0.5, "*": 0.3}}}
    assert load_recipe(uneven, ["target.sparsity.*=0.2"]).target.given()["sparsity"]["*"] == 0.2  # type: ignore[index]


@pytest.mark.parametrize(
    ("options", "key", "value"),
    [
        (["--criterion", "taylor"], "criterion", "taylor"),
        (["--criterion", "magnitude:norm=l1"], "criterion", {"name": "magnitude", "norm": "l1"}),
        (["--criterion", "l1"], "criterion", {"name": "magnitude", "norm": "l1"}),
        (["--granularity", "filter"], "granularity", "channel"),
        (["--granularity", "2:4"], "granularity", "2:4"),
        (["--granularity", "channel,head"], "granularity", ["channel", "head"]),
        (["--protect", "head.*", "--protect", "stem"], "protect", ("head.*", "stem")),
        (["--expressible"], "expressible", True),
        (["--recover", "none"], "recover", ()),
    ],
)
def test_an_option_is_a_key_of_the_recipe(
    options: list[str], key: str, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert getattr(shown(capsys, *options), key) == value


def test_protect_joins_what_the_recipe_protects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text("target: {macs: 0.5}\nprotect: [head]\n")
    found = load_recipe(said(capsys, "recipes", "show", str(tmp_path / "r.yaml"), "--protect", "stem"))
    assert found.protect == ("head", "stem")


@pytest.mark.parametrize(
    ("text", "methods"),
    [
        ("bn_refresh,finetune:epochs=7", ["bn_refresh", "finetune"]),
        ("finetune", ["finetune"]),
        ("element-90", ["finetune"]),
        ("channel-half-macs", ["bn_refresh", "finetune"]),
    ],
)
def test_recovery_in_one_word(text: str, methods: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    steps = shown(capsys, "--recover", text).recover
    assert [step.method for step in steps] == methods
    assert "epochs=7" not in text or steps[-1].epochs == 7  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--macs", "50"], "--macs 50: target.macs: macs is the fraction kept, in (0, 1]: 50 looks like a percentage"),
        (["--sparsity", "50%"], "write 0.5"),
        (["--macs", "half"], "should be a valid number"),
        (["--recover", "finetun"], "method must be one of"),
        (["--recover", "finetune:epochs"], "write name:option=value"),
        (["--granularity", "kv_head"], ""),
    ],
)
def test_wrong_options_are_answered(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    if words:
        assert words in said(capsys, "recipes", "show", "channel-half-macs", *options, code=2)
    else:
        assert "write head" in said(capsys, "estimate", "demo:lenet", *options, code=2)


# -- files as MODEL and DATA ----------------------------------------------------------------------------------------


def test_one_command_prunes_a_file_and_measures_quality(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["prune", "own_net.py:build", "--data", "own_net.py:data", "--granularity", "neuron", "--macs", "0.5"]
    text = said(capsys, *words, "--recover", "finetune:epochs=1", "--out", "o", "--json", "--set", "measure.rounds=2")
    record = json.loads(text)
    assert set(record["after"]["quality"]) == {"accuracy"}  # a mapping from a factory is measured like any data
    assert record["quality_on"] == "the test part"
    assert record["recipe"]["target"] == {"macs": 0.5}
    found = json.loads(
        said(capsys, "measure", "o", "--model", "own_net.py:build", "--data", "own_net.py:data", "--json")
    )
    assert found["quality"] == record["after"]["quality"]
    assert "own_net.py:build" in record["command"]


def test_a_file_may_lie_anywhere_and_be_called_anything(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "deep").mkdir()
    (work / "deep" / "json.py").write_text(
        NET.replace("16", "neighbour.WIDTH").replace("import torch\n", "import neighbour\nimport torch\n", 1)
    )
    (work / "deep" / "neighbour.py").write_text("WIDTH = 12\n")
    np.savez(work / "d.npz", x=np.zeros((8, 3), np.float32), y=np.arange(8) % 2)
    text = said(capsys, "inspect", "deep/json.py:build", "--data", "npz:d.npz", "--json")
    assert json.loads(text)["groups"][0]["units"] == 12
    assert json.__name__ == "json"
    sys.modules.pop("neighbour")


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["inspect", "own_net.py"], "did you mean own_net.py:Net or own_net.py:build or own_net.py:data?"),
        (["inspect", "own_net.py:buidl"], "did you mean 'build'?"),
        (["inspect", "own_net"], "write py:own_net:factory"),
        (["inspect", "nothing.py:build"], "looked in"),
        (["inspect", "lenet"], "did you mean demo:lenet?"),
        (["inspect", "dmo:lenet"], "did you mean demo:lenet?"),
        (["inspect", "hub"], "did you mean hf:hub?"),
        (["inspect", "own_net.py:build", "--data", "cifar.npz"], "did you mean npz:cifar.npz?"),
        (["inspect", "own_net.py:build", "--data", "a/b.csv"], "did you mean csv:a/b.csv?"),
        (["inspect", "own_net.py:build", "--data", "x.jsonl"], "did you mean jsonl:x.jsonl?"),
        (["inspect", "own_net.py:build", "--data", "own_net.py"], "own_net.py:data"),
        (["inspect", "own_net.py:build", "--data", "mnist"], "did you mean demo:mnist?"),
        (["inspect", "own_net.py:build", "--data", "nzp:x.npz"], "did you mean npz:x.npz?"),
        (["inspect", "own_net.py:build", "--ignored-layers", "a"], "write protect"),
        (["prune", "own_net.py:build", "--pruning-ratio", "0.5"], "write sparsity"),
        (["prun", "own_net.py:build"], "Did you mean 'prune'?\n  do: See: secateur --help"),
        (["inspect", "own_net.py:build", "--device", "cuda:99"], "this machine has: cpu"),
        (["inspect", "own_net.py:build", "--device", "tpu9"], "this machine has: cpu"),
    ],
)
def test_did_you_mean(argv: list[str], hint: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "hub").mkdir()
    (work / "hub" / "config.json").write_text("{}")
    code = 2
    assert hint in said(capsys, *argv, code=code)


def test_device_puts_the_model_somewhere() -> None:
    from secateur.cli.job import resolve

    work = resolve("demo:lenet", None, device="meta")
    assert next(work.model.parameters()).device == torch.device("meta")
    assert work.example.device == torch.device("meta")


# -- help, completion, lists ----------------------------------------------------------------------------------------


def every_command() -> dict[str, Any]:
    root = typer.main.get_command(app)
    found: dict[str, Any] = {}
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found.update({f"{name} {key}": child for key, child in inner.items()} if inner else {name: command})
    return {name: command for name, command in found.items() if not command.hidden}


def test_every_help_text_has_an_example_that_parses() -> None:
    for name, command in every_command().items():
        lines = [line for line in (command.epilog or "").split("\n\n") if line.startswith("secateur ")]
        assert lines, name
        for line in lines:
            words = line.removeprefix(f"secateur {name}").split(" > ")[0]
            assert line.startswith(f"secateur {name}"), line
            assert len(line) <= 78, line
            typed = [word.strip("'") for word in words.split()]
            command.make_context(name, typed, resilient_parsing=False)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("secateur pru", {"prune"}),
        ("secateur prune --gran", {"--granularity"}),
        ("secateur prune --granularity he", {"head"}),
        ("secateur prune --recipe transformer-h", {"transformer-heads"}),
        ("secateur inspect demo:l", {"demo:lenet"}),
    ],
)
def test_the_shell_is_told_what_may_follow(typed: str, offered: set[str]) -> None:
    words = typed.split()
    env = {**os.environ, "_SECATEUR_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv[0] = 'secateur'; from secateur.cli.main import main; main()"],
        env=env, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert offered <= set(done.stdout.split()), done


def test_completion_can_be_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--install-completion" in said(capsys, "--help")


@pytest.mark.parametrize("columns", [80, 120])
def test_lists_break_no_word(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert main(["criteria", "list"]) == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", sys.stdout.getvalue())  # type: ignore[attr-defined]
    names = sc.criteria.names()
    lines = text.splitlines()
    assert len(lines) <= 3 * len(names) + 8
    summaries = " ".join(sc.criteria.get(name).summary for name in names)
    needs = ["data", "gradients", "labels", "training"]
    known = {*summaries.split(), *names, *needs, *(f"{need}," for need in needs)}
    seen = {word for line in lines[3:-1] for word in line.split()}
    assert seen <= known | {"nothing", "─" * columns}, seen - known


def test_one_criterion_is_told_whole(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "criteria", "show", "taylor")
    assert all(f"{key}: " in text for key in ("name", "summary", "needs", "cost", "source", "best for"))
    assert "did you mean 'taylor'" in said(capsys, "criteria", "show", "taylr", code=2)


def test_doctor_lists_every_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, needs in extras.items():
        if extra != "dev":  # what only this project itself needs
            names = {re.split(r"[<>=\[ ]", need)[0] for need in needs}
            assert names <= set(doctor.EXTRAS[extra]), extra


# -- progress and errors --------------------------------------------------------------------------------------------


def test_a_time_stands_before_its_word() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120, color_system=None)
    with progress("finetune", 225, console=console) as step:
        step(11, 225)
    bar = re.search(r"11/225 (\S+) so far, (\S+) left", stream.getvalue())
    assert bar, stream.getvalue()


@pytest.mark.parametrize("width", [40, 80])
def test_errors_wrap_between_words(width: int) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width, color_system=None)
    sentence = "an output folder appears whole, at the end of the run, or it does not appear at all, ever, anywhere"
    show("interrupted", why=sentence, code="SEC130", exit_code=130, as_json=False, console=console)
    assert set(sentence.split()) <= set(stream.getvalue().split())


def test_a_notebook_sees_one_line_that_moves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = type("ZMQInteractiveShell", (), {})()
    module = type(sys)("IPython")
    module.get_ipython = lambda: shell  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", module)
    assert in_notebook()
    clock = iter(range(100))
    with progress("score", 4, clock=lambda: float(next(clock))) as step:
        for done in range(1, 5):
            step(done, 4)
    text = capsys.readouterr().err
    assert text.startswith("\rscore: 1/4 (25 %)")
    assert "\rscore: 4/4 (100 %)" in text
    assert text.count("\n") == 1
    assert "done in" in text
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    measured = {"target": {"sparsity": 0.5}, "measure": {"latency": False}}
    seen: list[str] = []
    for given, quiet in ((None, False), (False, True), (lambda stage, done, total: seen.append(stage), True)):
        monkeypatch.setattr("secateur.report.stage_progress.progress", _loud(capsys))
        sc.prune(net, torch.zeros(1, 3), recipe=measured, granularity="neuron", progress=given)
        assert ("loud" in capsys.readouterr().err) is not quiet
    assert "plan" in seen


def _loud(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    from contextlib import contextmanager

    @contextmanager
    def bar(*_: Any, **__: Any) -> Any:
        sys.stderr.write("loud")
        yield lambda done, total, note="": None

    return bar


# -- the project ----------------------------------------------------------------------------------------------------


def test_the_workflow_does_what_the_check_does() -> None:
    flow = YAML(typ="safe").load((ROOT / ".github/workflows/check.yml").read_text())
    job = flow["jobs"]["check"]
    assert {step.get("run") for step in job["steps"]} >= {".ci/run"}
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    versions = {line.rsplit(" ", 1)[1] for line in named if re.search(r":: 3\.\d+$", line)}
    assert set(job["strategy"]["matrix"]["python"]) == versions
    citation = YAML(typ="safe").load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == sc.__version__
    assert "@" not in (ROOT / "CITATION.cff").read_text()


@pytest.fixture
def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model and data of one's own, and a metric beside them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judged_net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def build():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))\n"
        "def data():\n    torch.manual_seed(1)\n"
        "    part = [(torch.randn(8, 4), torch.arange(8) % 3) for _ in range(2)]\n"
        "    return {'train': part, 'test': part}\n"
        "def zeros(model):\n    return float(sum((p == 0).sum() for p in model.parameters()))\n"
    )
    return tmp_path


def test_the_same_metric_for_pruning_measuring_and_comparing(judged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    word = ["judged_net.py:build", "--data", "judged_net.py:data"]
    metrics = ["--metric", "top2", "--metric", "judged_net.py:zeros"]
    quick = ["--recover", "none", "--set", "measure.latency=false"]
    assert main(["prune", *word, *metrics, "--sparsity", "0.5", *quick, "--out", "o", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["after"]["quality"]) == {"top2", "zeros"}
    assert "--metric top2 --metric judged_net.py:zeros" in report["command"]
    assert main(["measure", "o", "--model", *word, *metrics, "--rounds", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quality"] == report["after"]["quality"]
    few = ["--criteria", "magnitude", "--levels", "0.5", "--seeds", "2", "--probes", "0"]
    assert main(["compare", *word, "--metric", "top2", *few, "--out", "c", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["summary"]["metric"] == "top2"


def test_a_named_metric_without_data_is_refused(judged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", "judged_net.py:build", "--metric", "f1", "--sparsity", "0.5", "--out", "o"]) == 2
    said = capsys.readouterr().err
    assert "--metric f1 needs data with labels" in said
    assert "Give --data." in said


@pytest.mark.slow
def test_a_run_that_goes_on_measures_by_the_same_metric_on_the_same_device(
    judged: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from secateur import pipeline, sources
    from secateur.sources import Source

    real, calls = pipeline.snapshot, []

    def dies(*given: object, **named: object) -> object:
        calls.append(1)
        if len(calls) == 2:  # the model before is measured; the one after is not
            raise RuntimeError("power")
        return real(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "snapshot", dies)
    metrics = ["--metric", "top2", "--metric", "judged_net.py:zeros"]
    word = ["judged_net.py:build", "--data", "judged_net.py:data", *metrics, "--sparsity", "0.5", "--device", "cpu"]
    assert main(["prune", *word, "--recover", "finetune:epochs=1", "--set", "measure.latency=false", "--out", "o"]) == 1
    monkeypatch.setattr(pipeline, "snapshot", real)
    placed: list[str | None] = []

    def put(source: Source, where: str | None) -> Source:
        placed.append(where)
        return source

    monkeypatch.setattr(sources, "on_device", put)
    capsys.readouterr()
    assert main(["resume", "o", "--json"]) == 0
    assert placed == ["cpu"]
    report = json.loads(capsys.readouterr().out)
    assert set(report["after"]["quality"]) == set(report["before"]["quality"]) == {"top2", "zeros"}
    assert "--device cpu --metric top2 --metric judged_net.py:zeros" in report["command"]


def test_calibration_of_data_that_are_no_text_is_said_to_be_unread(
    judged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    word = ["judged_net.py:build", "--data", "judged_net.py:data", "--sparsity", "0.5", "--recover", "none"]
    sets = ["--set", "calibration.tokens=64", "--set", "measure.latency=false"]
    assert main(["prune", *word, *sets, "--out", "o", "--json"]) == 0
    assert "calibration (tokens) was not read" in capsys.readouterr().out
    assert main(["prune", *word, "--set", "measure.latency=false", "--out", "p", "--json"]) == 0
    assert "was not read" not in capsys.readouterr().out
