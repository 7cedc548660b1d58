"""Several workers on one study: in PostgreSQL and on Ray they end more trials in the same time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from secateur.errors import RecipeError, ResourceError, UnsupportedError
from secateur.search.on_ray import RayCrew, SearchWords
from secateur.search.storage import url_of

pytest.importorskip("optuna")

SECONDS = 9  # of every search whose trials are counted
NETWORK = """
import time, torch
from torch import nn
class Slow(nn.Module):
    # What a trial takes is waiting: the test asks whether workers work side by side, not how many cores are free.
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    def forward(self, x):
        time.sleep(0.05)
        return self.inner(x)
def build():
    torch.manual_seed(0)
    return Slow()
"""
SPACE = """
base: {target: {macs: 0.6}, granularity: neuron, recover: [{method: finetune, steps: 4}]}
criterion: [magnitude, random]
target.macs: {low: 0.3, high: 0.9}
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import numpy as np

    folder = tmp_path_factory.mktemp("job")
    draw = np.random.default_rng(0)
    x = draw.normal(size=(120, 4)).astype("float32")
    np.savez(folder / "d.npz", x=x, y=x[:, :3].argmax(1))
    (folder / "net.py").write_text(NETWORK)
    (folder / "space.yaml").write_text(SPACE)
    return folder


def search(job: Path, out: str, *more: str) -> subprocess.Popen[str]:
    words = ["search", "net.py:build", "--data", "npz:d.npz", "--space", "space.yaml", "--out", out, "--threads", "1"]
    return subprocess.Popen(
        [sys.executable, "-m", "secateur", *words, *more, "--json"],
        cwd=job, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def made(*searches: subprocess.Popen[str]) -> int:
    total = 0
    for one in searches:
        told, error = one.communicate(timeout=250)
        assert one.returncode == 0, error[-2000:]
        total += json.loads(told)["made"]
    return total


def binary(name: str) -> str | None:
    found = [shutil.which(name), *sorted(map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{name}")), reverse=True)]
    return next((path for path in found if path), None)


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The URL of a server of our own, started from Debian's package."""
    pytest.importorskip("psycopg", reason="needs psycopg: pip install 'secateur[postgres]'")
    initdb, server = binary("initdb"), binary("postgres")
    if initdb is None or server is None:
        pytest.skip("needs PostgreSQL: apt-get install postgresql")
    # PostgreSQL refuses to run as root, and pytest's own folders may not be entered by anybody else.
    user = "postgres" if os.getuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="secateur-postgres-") as folder:
        if user is not None:
            shutil.chown(folder, user)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        made = [initdb, "-D", f"{folder}/data", "-A", "trust", "-U", "secateur", "--no-sync"]
        subprocess.run(made, check=True, capture_output=True, user=user, cwd="/")
        begun = [server, "-D", f"{folder}/data", "-k", folder, "-h", "127.0.0.1", "-p", str(port), "-c", "fsync=off"]
        running = subprocess.Popen(begun, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, user=user, cwd="/")
        try:
            for _ in range(300):
                with socket.socket() as line:
                    if line.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            yield f"postgresql://secateur@127.0.0.1:{port}/"
        finally:
            running.send_signal(signal.SIGINT)  # ends it without waiting for those who are connected
            running.wait(60)


def database(server: str, name: str) -> str:
    import psycopg

    with psycopg.connect(f"{server}postgres", autocommit=True) as line:
        line.execute(f"CREATE DATABASE {name}")
    return f"{server}{name}"


@pytest.mark.slow
def test_two_workers_on_one_postgresql_end_more_trials(job: Path, postgres: str) -> None:
    lasts = ("--minutes", str(SECONDS / 60))
    alone = made(search(job, "pg1", "--storage", database(postgres, "one"), *lasts))
    both = database(postgres, "two")
    # Begun at once, so that both come to a database without tables.
    together = made(*[search(job, f"pg2{name}", "--storage", both, *lasts) for name in "ab"])
    assert alone >= 5
    print(f"PostgreSQL: {alone} trials by one worker, {together} by two")
    assert together >= 1.6 * alone, (together, alone)
    study = trials_of(both)
    ended = [one for one in study if one.state.name == "COMPLETE"]
    assert len(ended) >= together
    assert len({one.number for one in study}) == len(study)


def trials_of(url: str) -> list[object]:
    import optuna

    storage = optuna.storages.RDBStorage(url_of(url))
    found = optuna.load_study(study_name="secateur", storage=storage).trials
    storage.engine.dispose()
    return found


@pytest.mark.slow
def test_workers_on_ray_end_more_trials_and_a_dead_one_loses_its_own(job: Path) -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install 'secateur[ray]'")
    lasts = ("--minutes", str(SECONDS / 60), "--ray", "local")
    alone = made(search(job, "ray1", *lasts, "--workers", "1"))
    together = made(search(job, "ray2", *lasts, "--workers", "2"))
    assert alone >= 5
    print(f"Ray: {alone} trials by one worker, {together} by two")
    assert together >= 1.6 * alone, (together, alone)
    # A worker is killed in the middle; Ray starts it anew, and the search ends with all of its trials.
    killed = search(job, "ray3", "--trials", "16", "--ray", "local", "--workers", "2")
    study = f"sqlite:///{job / 'ray3' / 'study.db'}"
    for _ in range(600):
        busy = [one for one in workers_of(killed.pid)]
        if len(busy) == 2 and (job / "ray3" / "study.db").exists() and len(trials_of(study)) >= 5:
            break
        time.sleep(0.1)
    before = {one.number: one.values for one in trials_of(study) if one.state.name == "COMPLETE"}
    os.kill(busy[0], signal.SIGKILL)
    made(killed)
    after = {one.number: one for one in trials_of(study)}
    assert all(after[number].values == values for number, values in before.items())
    ended = [one for one in after.values() if one.state.name == "COMPLETE"]
    assert len(ended) >= 16
    assert sum(one.state.name == "RUNNING" for one in after.values()) + sum(
        one.state.name == "FAIL" for one in after.values()
    ) == 1, "one trial, that of the dead worker, is lost"  # fmt: skip


def workers_of(driver: int) -> list[int]:
    """Processes of Ray's workers that are at work for a driver."""
    import psutil

    family = psutil.Process(driver).children(recursive=True)
    return [one.pid for one in family if "ray::_in_folder" in " ".join(one.cmdline())]


WORDS = SearchWords(".", "m", "d", "s", ("accuracy",), "tpe", "study.db", None, 4, 0, None, 1)


def test_what_ray_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    with pytest.raises(UnsupportedError, match="step by step"):
        RayCrew("local", None, replace(WORDS, sampler="descent"), lambda words: 0).start()
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UnsupportedError, match="needs Ray"):
        RayCrew("local", None, WORDS, lambda words: 0).start()
    ray = type("Cluster", (), {
        "init": lambda self, **options: None,
        "nodes": lambda self: [{"NodeManagerAddress": host, "Alive": True} for host in ("a", "b")],
        "shutdown": lambda self: None,
    })()  # fmt: skip
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(RecipeError, match="2 machines"):
        RayCrew("auto", None, WORDS, lambda words: 0).start()
    ray.init = lambda **options: (_ for _ in ()).throw(ConnectionError("nobody answers"))
    with pytest.raises(ResourceError, match="cannot be reached"):
        RayCrew("10.0.0.1:6379", None, WORDS, lambda words: 0).start()


def test_workers_share_the_trials_that_were_asked_for() -> None:
    crew = RayCrew("local", 3, WORDS, lambda words: 0)
    assert [crew._share(number, 3).trials for number in range(3)] == [2, 1, 1]


def test_postgresql_goes_by_the_driver_of_the_extra() -> None:
    assert url_of("postgres://a@h/b") == url_of("postgresql://a@h/b") == "postgresql+psycopg://a@h/b"
    assert url_of("postgresql+psycopg2://a@h/b") == "postgresql+psycopg2://a@h/b"
    assert url_of("mysql://a@h/b") == "mysql://a@h/b"
