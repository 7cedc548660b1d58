"""``torchrun ... -m secateur prune``: several processes decide together, and the first one does the rest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from secateur.errors import RecipeError

if TYPE_CHECKING:
    from secateur.cli.job import Job
    from secateur.objective.limits import AtMostWords
    from secateur.recipe import Recipe

ABLE = ("prune", "doctor", "criteria", "recipes", "")  # commands that several processes may be started for
DAYS = 7  # that helpers wait for the first process, which measures before it scores; one that dies is noticed at once


@dataclass(frozen=True)
class Crew:
    """The processes that torchrun has started for one command; one alone where it has not.

    Args:
        rank: number of this one.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def of(cls, settings: Recipe, limit: AtMostWords | None) -> Crew:
        """The processes of this run.

        Raises:
            RecipeError: several, and the recipe asks for what one process does alone.
        """
        found = cls.started()
        if found.several:
            found._require_shareable(settings, limit)
        return found

    @classmethod
    def started(cls) -> Crew:
        """As the environment says it; torchrun sets all of these."""
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if not all(os.environ.get(name) for name in names):
            return cls()
        return cls(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.world > 1

    @property
    def helps(self) -> bool:
        """Whether this one only scores: nothing is trained, measured or written by it."""
        return self.rank > 0

    @contextmanager
    def joined(self) -> Iterator[None]:
        """In the group of all; one process alone makes none."""
        if not self.several:
            yield
            return
        from datetime import timedelta

        import torch.distributed as dist

        # Sums travel by the CPU whatever the models run on: they are small beside the passes.
        dist.init_process_group("gloo", timeout=timedelta(days=DAYS))
        try:
            yield
        finally:
            dist.destroy_process_group()

    def device(self, asked: str | None) -> str | None:
        """The device of this process: of several GPUs each takes its own."""
        return f"cuda:{os.environ.get('LOCAL_RANK', self.rank)}" if self.several and asked == "cuda" else asked

    def sharing(self, work: Job) -> Job:
        """The job with calibration data of which each process takes its share."""
        if not self.several or work.data is None:
            return work
        from secateur.model.share import shared

        return replace(work, data=replace(work.data, calibration=shared(work.data.calibration)))

    def help(self, work: Job, settings: Recipe) -> int:
        """Take part in the scores; the plan is the same everywhere, and the first process goes on with it."""
        from secateur.asking import plan_by

        if work.data is not None:
            plan_by(work.model, work.needed_example(), settings, work.data.calibration)
        return 0

    def _require_shareable(self, settings: Recipe, limit: AtMostWords | None) -> None:
        from secateur.planning.solved import solver_of

        plain = settings.model_dump(by_alias=True)
        alone = {
            "--max-drop": limit is not None,
            f"training: {settings.training and settings.training.method}": settings.training is not None,
            "a solver of layers": solver_of(plain["criterion"], plain["blocks"]) is not None,
        }
        for what, asked in alone.items():
            if asked:
                raise RecipeError(
                    f"{what} and several processes do not go together on the command line.",
                    why="they share the batches that scores are gathered from, and nothing else",
                    hint="start one process, or do it from Python: docs/how-to/several-processes.md",
                )


def require_alone(command: str) -> None:
    """Refuse to run a command several times side by side under torchrun.

    Raises:
        RecipeError: several processes, and a command that does not share its work.
    """
    if Crew.started().several and command not in ABLE:
        raise RecipeError(
            f"`secateur {command}` runs in one process, and torchrun has started {Crew.started().world}.",
            hint="start it without torchrun; `secateur prune` shares its scoring",
        )
