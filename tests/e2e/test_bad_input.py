"""Every bad input: a clear error, its exit code, nothing written, nothing changed."""

from __future__ import annotations

import errno
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from e2e_tools import QUICK, Cli, contents, images

import secateur as sc
from secateur.files import disk
from secateur.sources import build_lenet

MODEL, DATA = "py:examples.lenet:build", "npz:d.npz"


def refused(cli: Cli, work: Path, code: int, words: str, *argv: object) -> None:
    before = contents(work)
    done = cli(*argv)
    assert done.code == code, (done.code, done.err)
    assert words.lower() in done.err.lower(), done.err
    assert "code: SEC" in done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    assert contents(work) == before


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ("criterion=magnitud", 2, "did you mean 'magnitude'"),
        ("criterion.nrm=l1", 2, "no option 'nrm'"),
        ("granularity=chanel", 2, "chanel"),
        ("granularity=4:2", 2, "4"),
        ("targt.macs=0.5", 2, "did you mean target"),
        ("recover.0.batchs=3", 2, "did you mean batches"),
        ("target={sparsity: 1.0}", 2, "[0, 1)"),
        ("target={sparsity: -0.1}", 2, "[0, 1)"),
        ("target={sparsity: 50}", 2, "write 0.5"),
        ("target={sparsity: 50%}", 2, "write 0.5"),
        ("target={macs: .nan}", 2, "finite"),
        ("target={macs: 0.001}", 5, "the least is"),
        ("target={count: 100000}", 5, "at most"),
        ("target={sparsity: 0.99}", 5, "at most"),
        ("seed=-1", 2, "seed"),
        ("recover.1={method: finetune, epochs: 3, optimizer: {lr: 1.0e+30}}", 3, "at step 1"),
    ],
)
def test_recipe_values(cli: Cli, work: Path, change: str, code: int, words: str) -> None:
    quick = QUICK[:-2] if change.startswith("recover.1") else QUICK  # the last of it says how long that step trains
    refused(cli, work, code, words, "prune", MODEL, "--data", DATA, "--out", "out", *quick, "--set", change)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("model", "code", "words"),
    [
        ("py:e2e_nets:nan_weights", 3, "conv1.weight"),
        ("py:e2e_nets:inf_weights", 3, "conv1.weight"),
        ("py:e2e_nets:nan_activations", 3, "nan"),
        ("py:e2e_nets:broken", 4, "kaput in my own forward"),
        ("py:e2e_nets:no_module", 3, "returned a int"),
        ("py:e2e_nets:raising", 3, "no weights today"),
        ("py:e2e_nets:missing", 2, "has no 'missing'"),
        ("py:no_such_module:build", 2, "no module"),
        ("lenet", 2, "unknown model"),
        ("demo:convnett", 2, "did you mean demo:convnet"),
    ],
)
@pytest.mark.parametrize("command", ["prune", "estimate"])
def test_models(cli: Cli, work: Path, command: str, model: str, code: int, words: str) -> None:
    out = ("--out", "out") if command == "prune" else ()
    refused(cli, work, code, words, command, model, "--data", DATA, *out, *QUICK)


def _no_samples(path: Path) -> None:
    np.savez(path, x=np.zeros((0, 1, 28, 28), np.uint8), y=np.zeros(0, np.int64))


def _other_shape(path: Path) -> None:
    images(path, shape=(3, 12, 12))


def _nan(path: Path) -> None:
    x = np.zeros((20, 1, 28, 28), np.float32)
    x[7, 0, 3, 4] = np.nan
    np.savez(path, x=x, y=np.arange(20) % 10)


def _objects(path: Path) -> None:
    np.savez(path, x=np.array([{"a": 1}], dtype=object), y=np.zeros(1))


def _pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"x": [1, 2, 3]}))


def _truncated(path: Path) -> None:
    images(path)
    path.write_bytes(path.read_bytes()[:2000])


def _unlabelled(path: Path) -> None:
    np.savez(path, pictures=np.zeros((4, 1, 28, 28), np.uint8))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_no_samples, "0 samples"),
        (_other_shape, "does not fit"),
        (_nan, "nan or inf at (7, 0, 3, 4)"),
        (_objects, "refused"),
        (_pickle, "refused"),
        (_truncated, "refused"),
        (_unlabelled, "it needs x and y"),
    ],
)
def test_data(cli: Cli, work: Path, make: Callable[[Path], None], words: str) -> None:
    make(work / "bad.npz")
    refused(cli, work, 3, words, "prune", MODEL, "--data", "npz:bad.npz", "--out", "out", *QUICK)


def test_wrong_shape_where_the_model_has_no_example_of_its_own(cli: Cli, work: Path) -> None:
    _other_shape(work / "bad.npz")
    refused(cli, work, 4, "conv1", "prune", "py:e2e_nets:bare", "--data", "npz:bad.npz", "--out", "out", *QUICK)


@pytest.mark.parametrize("word", ["npz:none.npz", "npz:", "cifar", "demo:mnst"])
def test_unknown_data(cli: Cli, work: Path, word: str) -> None:
    code = 3 if word == "npz:none.npz" else 2
    refused(cli, work, code, "", "prune", MODEL, "--data", word, "--out", "out", *QUICK)


def test_recipe_files(cli: Cli, work: Path) -> None:
    _pickle(work / "recipe.yaml")
    argv = ("prune", MODEL, "--data", DATA, "--out", "out")
    refused(cli, work, 3, "pickle", *argv, "--recipe", "recipe.yaml")
    refused(cli, work, 3, "did you mean the bundled recipe element-90", *argv, "--recipe", "element-9")
    (work / "typo.yaml").write_text("target:\n  macs: 0.5\nprotekt: [conv1]\n")
    refused(cli, work, 2, "typo.yaml:3: protekt: unknown key, did you mean protect?", *argv, "--recipe", "typo.yaml")


def test_recovery_without_data(cli: Cli, work: Path) -> None:
    refused(cli, work, 2, "needs data", "prune", MODEL, "--out", "out", *QUICK)


def test_an_output_that_is_in_the_way_is_found_before_the_model_is_built(cli: Cli, work: Path) -> None:
    (work / "out").mkdir()
    (work / "file").write_text("mine")
    for out in ("out", "file"):
        refused(cli, work, 3, "exists already", "prune", "py:no_such_module:build", "--data", DATA, "--out", out)
    refused(cli, work, 3, "exists already", "demo", "--out", "out")
    refused(cli, work, 3, "cannot be written", "prune", MODEL, "--data", DATA, "--out", "file/below")


def test_a_full_disk(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: memoryview) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk, "write", full)
    refused(cli, work, 6, "no space left", "prune", MODEL, "--data", DATA, "--out", "out", *QUICK)


# -- output folders that were damaged ---------------------------------------------------------------------------


@pytest.fixture(scope="session")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    example = torch.zeros(1, 1, 28, 28)
    recipe = {"target": {"macs": 0.5}, "measure": {"latency": False}}
    return sc.prune(build_lenet(), example, recipe=recipe).save(tmp_path_factory.mktemp("pruned") / "out")


def _weights_are_pickle(folder: Path) -> None:
    _pickle(folder / "model.safetensors")


def _plan_is_pickle(folder: Path) -> None:
    _pickle(folder / "plan.json")


def _cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def _flipped(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def _plan_cut_short(folder: Path) -> None:
    path = folder / "plan.json"
    path.write_text(path.read_text()[: path.stat().st_size // 2])


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "damage", [_weights_are_pickle, _plan_is_pickle, _cut_short, _flipped, _plan_cut_short, _no_weights]
)
@pytest.mark.parametrize("command", ["measure", "export"])
def test_damaged_output_folders(
    cli: Cli, work: Path, pruned: Path, damage: Callable[[Path], None], command: str
) -> None:
    shutil.copytree(pruned, work / "out")
    damage(work / "out")
    extra = ("--out", "x.safetensors") if command == "export" else ("--rounds", 1)
    refused(cli, work, 3, "", command, "out", "--model", "demo:lenet", *extra)


def test_the_undamaged_folder_is_taken(cli: Cli, work: Path, pruned: Path) -> None:
    shutil.copytree(pruned, work / "out")
    assert cli("measure", "out", "--model", "demo:lenet", "--rounds", 1).code == 0


def test_a_plan_of_another_model(cli: Cli, work: Path, pruned: Path) -> None:
    shutil.copytree(pruned, work / "out")
    refused(cli, work, 3, "another model", "measure", "out", "--model", "demo:convnet")
    refused(cli, work, 3, "another model", "export", "out", "--model", MODEL, "--out", "x.safetensors")
    refused(cli, work, 2, "give --model", "measure", "out")


def test_export_does_not_overwrite(cli: Cli, work: Path, pruned: Path) -> None:
    shutil.copytree(pruned, work / "out")
    (work / "x.safetensors").write_text("mine")
    argv = ("export", "out", "--model", "demo:lenet", "--out", "x.safetensors")
    refused(cli, work, 3, "exists already", *argv)
    before = contents(work)
    assert cli(*argv, "--force", "--dry-run").code == 0
    assert contents(work) == before
    assert cli(*argv, "--force").code == 0
    assert contents(work) != before
