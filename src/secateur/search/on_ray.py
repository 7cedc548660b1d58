"""Workers of a search on a Ray cluster: each task is a worker like any other, on the same storage."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Protocol, cast

from secateur.errors import RecipeError, ResourceError, UnsupportedError

AGAIN = 2  # times that Ray starts a worker anew whose process died


@dataclass(frozen=True)
class SearchWords:
    """What a worker has to know: words and numbers alone, so that nothing of a program has to travel.

    Args:
        folder: in which the words are meant; there on every machine of the cluster.
        model: MODEL of the command line.
        data: DATA.
        space: the file of the space.
        objectives: by name.
        sampler: by name.
        storage: that all workers reach.
        minutes: after which no trial is begun.
        trials: of all workers at most.
        seed: of the sampler.
        device: of each worker's model.
        threads: of each worker.
    """

    folder: str
    model: str
    data: str
    space: str
    objectives: tuple[str, ...]
    sampler: str
    storage: str
    minutes: float | None
    trials: int | None
    seed: int
    device: str | None
    threads: int


Work = Callable[[SearchWords], int]


class _Ray(Protocol):
    """What is used of Ray, which ships types that change with every version."""

    def init(self, **options: object) -> object: ...
    def nodes(self) -> list[dict[str, object]]: ...
    def cluster_resources(self) -> dict[str, float]: ...
    def remote(self, **options: object) -> Callable[[Callable[..., int]], _Task]: ...
    def get(self, reference: object) -> int: ...
    def shutdown(self) -> None: ...


class _Task(Protocol):
    def remote(self, *given: object) -> object: ...


@dataclass(frozen=True)
class RayCrew:
    """Tasks that search side by side.

    Args:
        address: "local" starts a cluster on this machine, "auto" joins one that runs here, else that of one.
        workers: how many; None = one for each CPU.
        words: what they are to do.
        work: does it, in the process of a worker.
    """

    address: str
    workers: int | None
    words: SearchWords
    work: Work

    def start(self) -> Callable[[], int]:
        """Join the cluster; returns what has the workers search.

        Raises:
            UnsupportedError: Ray is not installed, or the sampler goes step by step.
            ResourceError: the cluster cannot be reached.
            RecipeError: several machines, and a storage in a file of one.
        """
        if self.words.sampler == "descent":
            raise UnsupportedError("a descent goes step by step, in one process", hint="leave --ray out")
        ray = _ray()
        address = None if self.address == "local" else self.address
        try:
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="error")
        except Exception as error:
            raise ResourceError(
                f"the Ray cluster {self.address} cannot be reached",
                why=str(error).splitlines()[0][:300],
                hint="`ray start --head` starts one; --ray local needs none",
            ) from error
        machines = {str(node["NodeManagerAddress"]) for node in ray.nodes() if node["Alive"]}
        if len(machines) > 1 and ("://" not in self.words.storage or self.words.storage.startswith("sqlite")):
            ray.shutdown()
            raise RecipeError(
                f"the cluster has {len(machines)} machines, and the study is a file of this one",
                hint="give --storage the URL of a PostgreSQL that all of them reach",
            )
        return self.search

    def search(self) -> int:
        """Have all workers search; returns how many trials they have made."""
        ray = _ray()
        count = self.workers or max(1, int(ray.cluster_resources().get("CPU", 1)) // self.words.threads)
        begun = time.time()
        # A worker that Ray has started anew takes what time is left, and its share of the trials again.
        task = ray.remote(num_cpus=self.words.threads, max_retries=AGAIN)(_in_folder)
        shares = [self._share(number, count) for number in range(count)]
        tasks = [task.remote(self.work, words, begun) for words in shares if words.trials != 0]
        made, lost = 0, []
        # Ray tells of dead workers on standard output, which belongs to the result.
        with redirect_stdout(sys.stderr):
            for one in tasks:
                try:
                    made += ray.get(one)
                except Exception as error:  # a worker that failed for good: what the others do is not touched
                    lost.append(str(error).strip().splitlines()[-1][:300])
            ray.shutdown()
        if len(lost) == len(tasks):
            raise ResourceError("no worker of the Ray cluster came to an end", why=lost[0])
        return made

    def _share(self, number: int, count: int) -> SearchWords:
        trials = self.words.trials
        return self.words if trials is None else replace(self.words, trials=len(range(number, trials, count)))


def _in_folder(work: Work, words: SearchWords, begun: float) -> int:
    """A worker, in its own process; words are meant in the folder of the command."""
    os.chdir(words.folder)
    if words.minutes is not None:
        left = words.minutes - (time.time() - begun) / 60
        if left <= 0:
            return 0
        words = replace(words, minutes=left)
    return work(words)


def _ray() -> _Ray:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing of a search is anybody else's business
    try:
        return cast(_Ray, import_module("ray"))
    except ImportError as error:
        raise UnsupportedError("--ray needs Ray", hint="pip install 'secateur[ray]'") from error
