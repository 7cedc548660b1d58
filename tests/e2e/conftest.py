"""The command line run inside this process, and a current folder to run it in."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from e2e_tools import NETS, ROOT, Cli, Done, images

from secateur.cli.main import main


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    """Run the command line in this process."""
    threads = torch.get_num_threads()

    def run(*words: object) -> Done:
        capsys.readouterr()
        code = main([str(word) for word in words])
        text = capsys.readouterr()
        return Done(code, text.out, text.err)

    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder with e2e_nets.py and d.npz; examples/ can be imported from it."""
    (tmp_path / "e2e_nets.py").write_text(NETS)
    images(tmp_path / "d.npz")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    yield tmp_path
    for name in ("e2e_nets", "examples.lenet", "examples"):
        sys.modules.pop(name, None)
