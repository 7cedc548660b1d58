"""Options and words that cannot be meant: one clear sentence, before anything is loaded, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path

import pytest
import typer

import secateur as sc
from secateur import sources
from secateur.cli import job
from secateur.cli.main import app, main
from secateur.comparison import study

MEMORY = "prune demo:lenet --set blocks.from_disk=true --out o"
DISK = "prune hf:there --data text:t --recipe language-model --set blocks.from_disk=true --out o"


@pytest.fixture
def refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[[str], str]]:
    """Run a command line that must end with exit code 2 or 3 before a model is made; gives what it said."""

    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("refused too late")

    monkeypatch.chdir(tmp_path)
    for where, name in ((job, "resolve"), (sources, "resolve_model"), (study, "resolve_model")):
        monkeypatch.setattr(where, name, loaded)

    def run(line: str) -> str:
        assert main(line.split()) in (2, 3)
        return capsys.readouterr().err

    yield run
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        # The demo of a language model trains nothing and cuts nothing; its package need not be there to be told so.
        ("demo --llm --max-drop 1", "--llm and --max-drop do not go together"),
        ("demo --llm --epochs 2", "--llm and --epochs do not go together"),
        ("demo --llm --macs 0.5", "target 'macs' does not apply to masks"),
        ("demo --llm --params 0.5", "target 'params' does not apply to masks"),
        ("demo --llm --latency 5", "target 'latency_ms' does not apply to masks"),
        ("demo --llm --granularity channel", "granularity 'channel' is cut"),
        ("demo --llm --sparsity 50", "write 0.5"),
        # Masks save nothing of the kind in any other command either.
        ("prune demo:lenet --granularity element --macs 0.5 --out o", "Use sparsity, count or threshold"),
        ("estimate demo:lenet --recipe element-90 --params 0.5", "does not apply to masks"),
        ("estimate demo:lenet --granularity 2:4 --set target={memory_bytes:9}", "memory_bytes"),
        # How much goes is said once.
        ("demo --max-drop 1 --sparsity 0.5", "--max-drop and --sparsity both say how much goes"),
        ("demo --max-drop 1 --macs 0.5", "--max-drop and --macs both say how much goes"),
        ("demo --max-drop 1 --set target.macs=0.5", "--max-drop and --set target.macs=0.5 both say"),
        ("prune demo:lenet --max-drop 1 --set target={} --data npz:d.npz --out o", "needs at least one of"),
        # A limit of the loss is nothing without data.
        ("prune demo:lenet --max-drop 1 --out o", "max_drop=1.0 needs data with labels"),
        ("prune demo:lenet --max-drop 1 --recover none --out o", "on the command line --data DATA"),
        # One key, two values.
        ("prune demo:lenet --criterion l1 --set criterion=taylor --out o", "--criterion l1 and --set criterion=taylor"),
        ("prune demo:lenet --macs 0.5 --set target.macs=0.3 --out o", "--macs 0.5 and --set target.macs=0.3 both say"),
        ("prune demo:lenet --macs 0.5 --set target={params:0.3} --out o", "--macs 0.5 and --set target={params:0.3}"),
        ("prune demo:lenet --protect a --set protect=[b] --out o", "--protect a and --set protect=[b] both say"),
        ("prune demo:lenet --seed 1 --set seed=2 --out o", "--seed 1 and --set seed=2 both say what seed is"),
        ("prune demo:lenet --set seed=1 --set seed=2 --out o", "--set seed=1 and --set seed=2 both say"),
        ("prune demo:lenet --recover none --set recover=[{method:refit}] --out o", "--recover none and --set recover="),
        ("demo --granularity element --set granularity=channel", "--granularity element and --set granularity=channel"),
        (
            "demo --llm --sparsity 0.6 --set target.sparsity=0.5",
            "--sparsity 0.6 and --set target.sparsity=0.5 both say",
        ),
        (
            "recipes show two-four --proof full --set verify.proof=example",
            "--proof full and --set verify.proof=example",
        ),
        # One option, two values: the parser would take the last.
        ("prune demo:lenet --macs 0.5 --macs 0.3 --out o", "--macs is given 2 times"),
        ("prune demo:lenet --out o --out p", "--out is given 2 times"),
        ("deploy o --model demo:lenet --out p --table --no-table", "--table is given 2 times"),
        # What nothing reads, even where it says what would stand there anyway.
        ("measure demo:lenet --tokens 1024", "one model without --task and --tokens do not go together"),
        ("measure demo:lenet --task perplexity --data text:t --rounds 30", "--task perplexity and --rounds"),
        ("inspect demo:lenet --granularity channel", "inspect without --sensitivity and --granularity"),
        ("prune demo:lenet --confidence 0.95 --out o", "--confidence belongs to --max-drop"),
        ("prune demo:lenet --set measure.latency=false --set measure.rounds=9 --out o", "so nothing is timed"),
        ("demo --llm --set measure.batch_size=9", "measure.latency is false, so nothing is timed"),
        ("prune demo:lenet --recipe element-90 --set round_to=8 --out o", "round_to: 8 would have no effect"),
        ("estimate demo:lenet --granularity 2:4 --proof full", "verify.proof: full would have no effect"),
        ("estimate demo:lenet --set blocks.damping=0.1", "blocks.damping: 0.1 would have no effect"),
        ("prune hf:x --recipe language-model --expressible --out o", "expressible: True would have no effect"),
        ("lottery demo:lenet --data demo:mnist --set seed=3 --out o", "A search for tickets does not read seed"),
        ("lottery demo:lenet --data demo:mnist --set min_keep=3 --out o", "does not read min_keep"),
        ("compare demo:lenet --data demo:mnist --recover-levels 0.5 --out o", "--recover-levels says where"),
        ("compare demo:lenet --data demo:mnist --recover two-four --recover language-model --out o", "given 2 times"),
        ("compare demo:lenet --data demo:mnist --recover language-model --out o", "has no recovery steps"),
        # What stays on disk.
        (MEMORY, "not demo:lenet on no data"),
        (MEMORY + " --data npz:d.npz", "hf:FOLDER --data text:FILE"),
        (DISK + " --dry-run", "blocks.from_disk and --dry-run do not go together"),
        (DISK + " --metric f1", "blocks.from_disk and --metric do not go together"),
        (DISK + " --max-drop 1", "blocks.from_disk and --max-drop do not go together"),
        (DISK + " --track wandb", "blocks.from_disk and --track do not go together"),
        (DISK + " --device cuda", "blocks.from_disk and --device do not go together"),
    ],
)
def test_it_is_said_in_one_sentence_before_anything_is_loaded(
    line: str, words: str, refuse: Callable[[str], str]
) -> None:
    assert words in " ".join(refuse(line).split())


def choices() -> Iterator[tuple[str, str]]:
    """Every option of every command that takes one of some words."""
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        for parameter in command.params:
            word = parameter.type_descriptor.annotation if hasattr(parameter, "type_descriptor") else None
            if isinstance(word, type) and issubclass(word, Enum):
                yield name, parameter.opts[0]


@pytest.mark.parametrize(("command", "option"), list(choices()))
def test_a_wrong_word_is_answered_with_the_right_ones(command: str, option: str, refuse: Callable[[str], str]) -> None:
    said = refuse(f"{command} {option} tiny")
    assert f"Invalid value for '{option}': 'tiny' is not one of" in said


def test_a_limit_without_data_is_refused_in_python_too() -> None:
    from torch import nn, ones

    with pytest.raises(sc.SecateurError, match="max_drop=1 needs data") as refused:
        sc.prune(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), ones(1, 3), max_drop=1)
    assert "data=" in refused.value.hint
    assert "recover" not in refused.value.hint
