from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from secateur.errors import FileRefusedError, ResourceError
from secateur.files import atomic, atomic_write, disk, leftovers, publish_dir


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def publish(path: Path, text: str, *, force: bool = False) -> None:
    with publish_dir(path, force=force) as temp:
        (temp / "sub").mkdir()
        (temp / "report.json").write_text(text)
        (temp / "sub" / "data").write_text(text)


def test_atomic_write_creates_and_replaces(tmp_path):
    atomic_write(tmp_path / "a", "grün")
    assert (tmp_path / "a").read_bytes() == "grün".encode()
    atomic_write(str(tmp_path / "a"), b"\x00two")
    assert (tmp_path / "a").read_bytes() == b"\x00two"
    assert names(tmp_path) == ["a"]


def test_atomic_write_respects_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        atomic_write(tmp_path / "a", "x")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_atomic_write_refuses_a_folder_and_a_missing_parent(tmp_path):
    with pytest.raises(FileRefusedError, match="a folder has that name"):
        atomic_write(tmp_path, "x")
    with pytest.raises(FileRefusedError, match="No such file"):
        atomic_write(tmp_path / "none" / "a", "x")


def test_write_goes_on_after_a_short_write(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(disk.os, "write", lambda fd, data: real(fd, data[:3]))
    atomic_write(tmp_path / "a", "0123456789")
    assert (tmp_path / "a").read_text() == "0123456789"


def test_publish_is_invisible_until_it_is_whole(tmp_path):
    target = tmp_path / "deep" / "out"
    with publish_dir(target) as temp:
        (temp / "x").write_text("1")
        assert not target.exists()
        assert temp.parent == target.parent
        assert temp.name.startswith(f".out.partial-{os.getpid()}-")
    assert names(target.parent) == ["out"]
    assert names(target) == ["manifest.json", "x"]


def test_everything_is_flushed_before_the_rename(tmp_path, monkeypatch):
    order: list[str] = []
    sync, move = disk.sync_path, disk.rename_new
    monkeypatch.setattr(disk, "sync_path", lambda p: (order.append(p.name), sync(p))[1])
    monkeypatch.setattr(disk, "rename_new", lambda s, t: (order.append("rename"), move(s, t))[1])
    publish(tmp_path / "out", "1")
    before = order[: order.index("rename")]
    assert {"report.json", "data", "sub"} <= set(before)
    assert before.index("data") < before.index("sub") < len(before) - 1
    assert order[order.index("rename") + 1 :] == [tmp_path.name]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_in_the_body_leaves_nothing(tmp_path, error):
    def stop(temp: Path) -> None:
        (temp / "x").write_text("1")
        raise error

    with pytest.raises(error), publish_dir(tmp_path / "out") as temp:
        stop(temp)
    assert names(tmp_path) == []


def test_an_existing_target_needs_force(tmp_path):
    publish(tmp_path / "out", "old")
    with pytest.raises(FileRefusedError, match="--force"):
        publish(tmp_path / "out", "new")
    assert (tmp_path / "out" / "report.json").read_text() == "old"
    publish(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out" / "report.json").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_force_replaces_an_empty_folder(tmp_path):
    (tmp_path / "out").mkdir()
    publish(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out" / "report.json").read_text() == "new"


@pytest.mark.parametrize("kind", ["other", "file", "link", "git"])
def test_force_never_replaces_what_is_not_ours(tmp_path, kind):
    target = tmp_path / "out"
    if kind == "file":
        target.write_text("x")
    elif kind == "link":
        publish(tmp_path / "real", "old")
        target.symlink_to(tmp_path / "real")
    else:
        target.mkdir()
        (target / "thesis.tex").write_text("x")
        if kind == "git":
            (target / "report.json").write_text("{}")
            (target / ".git").mkdir()
    before = names(tmp_path)
    with pytest.raises(FileRefusedError, match="does not replace"):
        publish(target, "new", force=True)
    assert names(tmp_path) == before


def test_force_never_replaces_a_home_or_the_current_folder(tmp_path, monkeypatch):
    publish(tmp_path / "out", "old")
    monkeypatch.setenv("HOME", str(tmp_path / "out" / "sub"))
    with pytest.raises(FileRefusedError, match="the home folder"):
        publish(tmp_path / "out", "new", force=True)
    monkeypatch.setenv("HOME", "/")
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(FileRefusedError, match="the current folder"):
        publish(Path(), "new", force=True)
    assert (tmp_path / "out" / "report.json").read_text() == "old"


def test_a_target_that_appears_meanwhile_is_kept(tmp_path):
    with pytest.raises(FileRefusedError, match="exists already"), publish_dir(tmp_path / "out"):
        (tmp_path / "out").mkdir()
    assert names(tmp_path / "out") == []


def test_without_an_exchange_the_result_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "exchange", lambda a, b: False)
    publish(tmp_path / "out", "old")
    publish(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out" / "report.json").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_without_renameat2_nothing_is_overwritten(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_renameat2", lambda *a: False)
    publish(tmp_path / "out", "old")
    (tmp_path / "new").mkdir()
    with pytest.raises(FileExistsError):
        disk.rename_new(tmp_path / "new", tmp_path / "out")


def test_a_swap_that_fails_half_way_is_undone(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "exchange", lambda a, b: False)
    publish(tmp_path / "out", "old")
    real, calls = disk.rename, []

    def second_is_interrupted(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(disk, "rename", second_is_interrupted)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out" / "report.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_of_dead_processes_are_cleaned(tmp_path):
    dead, live = dead_pid(), os.getpid()
    folder = tmp_path / f".out.partial-{dead}-{'0' * 16}"
    (folder / "deep").mkdir(parents=True)
    (tmp_path / f".out.partial-{dead}-{'1' * 16}").write_text("a half file")
    (tmp_path / f".out.partial-{dead}-{'2' * 16}").symlink_to(tmp_path)
    kept = [f".out.partial-{live}-{'0' * 16}", f".other.partial-{dead}-{'0' * 16}", f".out.partial-{dead}-x"]
    for name in kept:
        (tmp_path / name).mkdir()
    publish(tmp_path / "out", "1")
    assert names(tmp_path) == sorted([*kept, "out"])


def test_a_marked_leftover_is_kept_although_its_number_is_dead(tmp_path):
    folder = tmp_path / f".out.partial-{dead_pid()}-{'0' * 16}"
    folder.mkdir()
    fd = os.open(folder, os.O_RDONLY)
    assert leftovers.mark(fd)
    publish(tmp_path / "out", "1")
    assert folder.exists()
    os.close(fd)
    publish(tmp_path / "out", "1", force=True)
    assert not folder.exists()


def test_a_folder_moved_aside_by_a_killed_process_comes_back(tmp_path):
    publish(tmp_path / "out", "old")
    aside = tmp_path / f".out.old-{dead_pid()}-{'0' * 16}"
    (tmp_path / "out").rename(aside)
    with pytest.raises(FileRefusedError, match="exists already"):
        publish(tmp_path / "out", "new")
    assert (tmp_path / "out" / "report.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_a_parent_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileRefusedError, match="cannot write"):
        publish(tmp_path / "file" / "out", "1")
    with pytest.raises(FileRefusedError, match="too long"):
        publish(tmp_path / ("n" * 250), "1")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_parent_without_rights_is_refused(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(FileRefusedError, match="Permission denied"):
        publish(tmp_path / "locked" / "out", "1")


def test_a_parent_without_rights_is_refused_for_root_too(tmp_path, monkeypatch):
    def no(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(disk, "make_folder", no)
    with pytest.raises(FileRefusedError, match="Permission denied"):
        publish(tmp_path / "out", "1")


def test_a_full_disk_in_the_body_is_a_resource_error(tmp_path):
    with pytest.raises(ResourceError, match="No space left"), publish_dir(tmp_path / "out"):
        Path("/dev/full").write_text("x" * 100_000)
    assert names(tmp_path) == []


def test_other_errors_of_the_body_keep_their_names(tmp_path):
    with pytest.raises(FileNotFoundError), publish_dir(tmp_path / "out"):
        (tmp_path / "missing").read_text()


def test_many_publishers_one_winner(tmp_path):
    results: list[object] = []

    def go(number: int) -> None:
        try:
            publish(tmp_path / "out", str(number))
            results.append(number)
        except FileRefusedError as error:
            results.append(error)

    threads = [threading.Thread(target=go, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [r for r in results if isinstance(r, int)]
    assert len(results) == 6
    assert len(winners) == 1
    assert (tmp_path / "out" / "sub" / "data").read_text() == str(winners[0])
    assert names(tmp_path) == ["out"]


def test_the_sink_hashes_what_it_writes(tmp_path):
    import hashlib

    with atomic.atomic_file(tmp_path / "a") as sink:
        sink.write(b"ab")
        sink.write(bytearray(b"c"))
    assert sink.sha256 == hashlib.sha256(b"abc").hexdigest()


def test_no_torch_at_import():
    code = (
        "import sys; import secateur.files.atomic, secateur.files.safe, secateur.files.seeds;"
        "secateur.files.seeds.canonical_json({}); import secateur.recipe; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_folder_that_appears_after_the_check_is_not_replaced(tmp_path, monkeypatch):
    from secateur.files import atomic

    checked = atomic.require_free

    def slow(target, *, force, hashes=True):
        checked(target, force=force, hashes=hashes)
        if not target.exists():  # somebody else is faster
            target.mkdir()
            (target / "plan.json").write_text("first")

    def second() -> None:
        with publish_dir(tmp_path / "out") as folder:
            (folder / "plan.json").write_text("second")
            monkeypatch.setattr(atomic, "require_free", slow)

    with pytest.raises(FileRefusedError):
        second()
    assert (tmp_path / "out" / "plan.json").read_text() == "first"
