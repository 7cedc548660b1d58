"""Names and flags that scripts rely on; a change here is a change of the interface and belongs in the changelog."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import typing

import pytest
import typer

import secateur as sc
from secateur.cli.main import app, main

COMMON = {"--json", "--verbose", "-v", "--help"}
DECIDE = {
    "--macs", "--params", "--sparsity", "--latency", "--criterion", "--granularity", "--protect", "--expressible",
    "--proof",
}  # fmt: skip
FLAGS = {
    "demo": COMMON
    | (DECIDE - {"--expressible"})
    | {"--device", "--out", "--epochs", "--set", "--seed", "--threads", "--force", "--dry-run", "--llm", "--max-drop"},
    "inspect": COMMON
    | {"--data", "--html", "--protect", "--device", "--seed"}
    | {"--sensitivity", "--picture", "--granularity", "--criterion", "--cache"},
    "estimate": COMMON | DECIDE | {"--device", "--deploy"} | {"--data", "--recipe", "--set", "--seed", "--threads"},
    "prune": COMMON
    | DECIDE
    | {"--device", "--recover", "--max-drop", "--smallest", "--confidence"}
    | {"--data", "--metric", "--recipe", "--set", "--out", "--seed", "--track", "--threads", "--force", "--dry-run"},
    "measure": COMMON
    | {"--model", "--data", "--metric", "--rounds", "--batch-size", "--device", "--seed", "--threads"}
    | {"--task", "--tokens", "--sequences", "--dtype", "--processor-time"},
    "export": COMMON
    | {"--model", "--out", "--format", "--data", "--force", "--dry-run", "--weights", "--dtype", "--fixed-batch"},
    "deploy": COMMON
    | {"--model", "--out", "--data", "--weights", "--batch-size", "--table", "--no-table", "--threads"}
    | {"--force", "--dry-run", "--profile", "--convolutions"},
    "advise": COMMON
    | {
        "--data",
        "--budget",
        "--labels",
        "--no-labels",
        "--protect",
        "--device",
        "--out",
        "--seed",
        "--threads",
        "--force",
    },
    "compare": COMMON
    | {"--data", "--out", "--criteria", "--levels", "--granularity", "--match", "--scope", "--seeds", "--recover"}
    | {"--metric", "--recover-levels", "--epochs", "--probes", "--preset", "--threads", "--protect", "--device"},
    "resume": COMMON,
    "search": COMMON
    | {"--data", "--space", "--out", "--objectives", "--minutes", "--trials", "--sampler", "--to", "--storage"}
    | {"--ray", "--workers", "--device", "--seed", "--threads"},
    "lottery": COMMON
    | {"--data", "--out", "--recipe", "--set", "--rate", "--rewind", "--seeds", "--controls", "--threads"},
    "doctor": COMMON,
    "criteria list": COMMON,
    "recipes list": COMMON,
    "criteria show": COMMON,
    "recipes show": COMMON | DECIDE | {"--set", "--recover"},
}


def commands() -> dict[str, typing.Any]:
    found: dict[str, typing.Any] = {}

    def walk(command: typing.Any, name: str) -> None:
        if getattr(command, "hidden", False):
            return
        inner = getattr(command, "commands", None)
        if inner is None:
            found[name] = command
            return
        for key, child in inner.items():
            walk(child, f"{name} {key}".strip())

    walk(typer.main.get_command(app), "")
    return found


def test_no_command_has_gone() -> None:
    assert set(FLAGS) <= set(commands())


def test_every_command_speaks_json_and_shows_tracebacks() -> None:
    for name, command in commands().items():
        flags = {flag for parameter in command.params for flag in parameter.opts}
        assert {"--json", "-v"} <= flags, name


@pytest.mark.parametrize("name", FLAGS)
def test_flags_are_frozen(name: str) -> None:
    command = commands()[name]
    options = {flag for p in command.params for flag in (*p.opts, *p.secondary_opts) if flag.startswith("-")}
    assert options | {"--help"} == FLAGS[name]


@pytest.mark.parametrize("name", FLAGS)
def test_help_names_every_flag(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main([*name.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert all(flag in text for flag in FLAGS[name])
    assert commands()[name].help.split(":")[0].split(",")[0] in re.sub(r"\s+", " ", text)


def test_help_without_arguments_lists_the_commands_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(name.split()[0] in text for name in FLAGS)
    assert "130 interrupted" in re.sub(r"\s+", " ", text)
    assert "reload-check" not in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import secateur

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"secateur {secateur.__version__}\n"


def test_criteria_come_from_the_registry(capsys: pytest.CaptureFixture[str]) -> None:
    from secateur import criteria

    assert main(["criteria", "list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["criteria"]
    assert [entry["name"] for entry in found] == criteria.names()
    assert all(entry["summary"] and entry["source"] for entry in found)
    assert main(["criteria", "list"]) == 0
    assert "magnitude" in capsys.readouterr().out


def test_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    from secateur.recipe import bundled, load_recipe

    assert main(["recipes", "list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["recipes"]
    assert [entry["name"] for entry in found] == bundled()
    assert all(entry["about"] for entry in found)
    assert main(["recipes", "show", "element-90", "--set", "target.sparsity=0.8"]) == 0
    shown = load_recipe(capsys.readouterr().out)
    assert shown == load_recipe("element-90", ["target.sparsity=0.8"])


def test_doctor_checks_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["self_check"]["ok"] is True
    assert found["packages"]["torch"]
    assert main(["doctor"]) == 0
    assert "self-check: ok" in capsys.readouterr().out


def test_doctor_fails_when_the_self_check_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import secateur as sc
    from secateur.cli.doctor import self_check

    load = sc.load

    def forgetful(path: object, model: typing.Any) -> typing.Any:
        network = load(path, model)  # type: ignore[arg-type]
        network[0].weight.data[0] += 1
        return network

    monkeypatch.setattr(sc, "load", forgetful)
    assert main(["doctor"]) == 4
    assert "self-check failed" in capsys.readouterr().err
    monkeypatch.undo()
    self_check()


@pytest.mark.parametrize("module", ["secateur", "secateur.cli"])
def test_the_package_runs_as_a_module(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True)
    assert sc.__version__ in done.stdout
