"""Fail the n-th call that changes the disk, for every n: what is there afterwards is whole, old or new."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from faulty_disk import FaultyDisk

from secateur.errors import FileRefusedError, ResourceError
from secateur.files import atomic_write, disk, load_tensors, publish_dir, save_tensors

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EIO}


def publish(target: Path, text: str, *, force: bool) -> None:
    with publish_dir(target, force=force) as temp:
        atomic_write(temp / "report.json", text)
        (temp / "sub").mkdir()
        (temp / "sub" / "data").write_text(text)


def state(folder: Path) -> str | None:
    """The text of a whole folder, None if there is none; anything else fails the test."""
    left = sorted(path.name for path in folder.iterdir())
    if not left:
        return None
    assert left == ["out"]
    files = {str(p.relative_to(folder / "out")) for p in (folder / "out").rglob("*") if p.is_file()}
    assert files == {"report.json", "sub/data", "manifest.json"}
    texts = {(folder / "out" / name).read_text() for name in files - {"manifest.json"}}
    assert len(texts) == 1
    return texts.pop()


@contextmanager
def faults(**options):
    with pytest.MonkeyPatch.context() as patch:
        if not options.pop("swap", True):
            patch.setattr(disk, "exchange", lambda a, b: False)
        yield FaultyDisk(patch, **options)


def count_calls(tmp_path: Path, *, force: bool, swap: bool) -> int:
    folder = tmp_path / "count"
    folder.mkdir()
    if force:
        publish(folder / "out", "old", force=False)
    with faults(swap=swap) as disk_calls:
        publish(folder / "out", "new", force=force)
    assert state(folder) == "new"
    return disk_calls.count


@pytest.mark.sampled(7)
@pytest.mark.parametrize("forever", [False, True], ids=["once", "forever"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES], ids=errno.errorcode.get)
@pytest.mark.parametrize(("force", "swap"), [(False, True), (True, True), (True, False)])
def test_publish_fails_whole(tmp_path, force, swap, code, forever):
    old = "old" if force else None
    total = count_calls(tmp_path, force=force, swap=swap)
    assert total >= 9
    for number in range(total):
        folder = tmp_path / str(number)
        folder.mkdir()
        if force:
            publish(folder / "out", "old", force=False)
        expected = pytest.raises(ResourceError if code in FULL else FileRefusedError)
        with faults(fail_at=number, code=code, forever=forever, swap=swap), expected as error:
            publish(folder / "out", "new", force=force)
        aside = list(folder.glob(".out.old-*"))
        if aside:
            # The way back is barred as well: both folders are whole, and the user hears where the old one is.
            assert forever
            assert not swap
            assert str(aside[0]) in str(error.value)
            if (folder / "out").exists():
                shutil.rmtree(aside[0])
            else:
                aside[0].rename(folder / "out")
        assert state(folder) in ({old, "new"} if forever else {old})
        publish(folder / "out", "again", force=True)
        assert state(folder) == "again"


@pytest.mark.parametrize(("force", "swap"), [(False, True), (True, True), (True, False)])
def test_publish_interrupted_after_any_call(tmp_path, force, swap):
    old = "old" if force else None
    total = count_calls(tmp_path, force=force, swap=swap)
    seen = set()
    for number in range(total):
        folder = tmp_path / str(number)
        folder.mkdir()
        if force:
            publish(folder / "out", "old", force=False)
        with faults(fail_at=number, after=True, swap=swap), pytest.raises(KeyboardInterrupt):
            publish(folder / "out", "new", force=force)
        seen.add(state(folder))
    assert seen == {old, "new"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("exists", [False, True])
def test_save_tensors_fails_whole(tmp_path, monkeypatch, code, exists):
    monkeypatch.setattr("secateur.files.safe._CHUNK", 1000)
    old, new = {"a": torch.zeros(3)}, {"a": torch.ones(1000), "b": torch.ones(7)}
    with faults() as disk_calls:
        save_tensors(tmp_path / "count", new)
    assert disk_calls.count == 10
    for number in range(disk_calls.count):
        folder = tmp_path / str(number)
        folder.mkdir()
        if exists:
            save_tensors(folder / "x", old)
        with faults(fail_at=number, code=code), pytest.raises(ResourceError):
            save_tensors(folder / "x", new)
        # Only the last call, the flush of the folder, comes after the new file has its name.
        last = number == disk_calls.count - 1
        assert [p.name for p in folder.iterdir()] == (["x"] if exists or last else [])
        if exists or last:
            assert load_tensors(folder / "x")["a"].numel() == (1000 if last else 3)


def test_a_file_size_limit_is_a_resource_error(tmp_path):
    code = (
        "import resource, sys, torch\n"
        "from secateur.errors import ResourceError\n"
        "from secateur.files import save_tensors\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "try: save_tensors(sys.argv[1], {'a': torch.zeros(100_000)})\n"
        "except ResourceError as error: print(error.what)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], capture_output=True, text=True, check=True)
    assert "too large" in run.stdout
    assert list(tmp_path.iterdir()) == []
