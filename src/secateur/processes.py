"""Several processes that decide as one: sums over all, the word of the first, and the end of all where one ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from secateur.errors import ProcessError, RecipeError, SecateurError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes of torch's default group.

    Every call is one step that all of them take, in the same order. Before each they tell each other whether all are
    well, so that a process that has failed ends the others at their next step, and none waits for it.

    Args:
        rank: number of this one.
        world: how many there are.
        device: where what is sent lies: NCCL sends from GPUs only.
    """

    rank: int
    world: int
    device: torch.device

    @classmethod
    def of_group(cls) -> Processes:
        """Those of the default group.

        Raises:
            RecipeError: there is none.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise RecipeError(
                "There is no group of processes to share the work with.",
                hint='start by torchrun, and call torch.distributed.init_process_group("gloo") first',
            )
        # By the name of the backend: a group of both sends tensors of the CPU by gloo.
        alone = dist.get_backend() == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if alone else torch.device("cpu")
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum of everybody's, on the device of this one's."""
        self._all_well()
        sent = tensor.detach().to(self.device, copy=True).contiguous()
        with _connected():
            dist.all_reduce(sent)
        return sent.to(tensor.device)

    def gathered(self, value: T) -> list[T]:
        """Everybody's value, by rank; small things, which are pickled."""
        self._all_well()
        found: list[T | None] = [None] * self.world
        with _connected():
            dist.all_gather_object(found, value)
        return cast("list[T]", found)

    def decided(self, decide: Callable[[], Mapping[str, Tensor]], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the first process decides, for all.

        Args:
            decide: run by the first process alone: sums may differ in their last bits, and measured times do.
            like: name -> tensor of the shape of each part of the decision.
        """
        keep: Mapping[str, Tensor] = {}
        with self.working():
            if self.rank == 0:
                keep = decide()
        self._all_well()
        found = {}
        for name in sorted(like):
            sent = keep[name] if self.rank == 0 else torch.zeros(like[name].shape, dtype=torch.bool)
            sent = sent.to(self.device, torch.uint8)
            with _connected():
                dist.broadcast(sent, src=0)
            found[name] = sent.bool().cpu()
        return {name: found[name] for name in like}

    @contextmanager
    def working(self) -> Iterator[None]:
        """Tell the others if what is done here fails.

        Raises:
            ProcessError: another process has failed; says which and why.
        """
        try:
            yield
        except ProcessError:
            raise  # the others know, or cannot be reached
        except Exception as error:
            said = error.what if isinstance(error, SecateurError) else f"{type(error).__name__}: {error}"
            self._all_well(failed=said)
            raise

    def _all_well(self, failed: str = "") -> None:
        flag = torch.tensor([int(bool(failed))], device=self.device)
        told: list[str | None] = [None] * self.world
        with _connected():
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            if int(flag):
                dist.all_gather_object(told, failed)
        if int(flag) and not failed:
            rank = next(number for number, words in enumerate(told) if words)
            raise ProcessError(
                f"process {rank} of {self.world} failed, so this one ends as well",
                why=str(told[rank]),
                hint="mend what that one says, and start all of them again; nothing was written",
            )


@contextmanager
def _connected() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what torch raises where the other side is gone or silent
        raise ProcessError(
            "the other processes cannot be reached any more",
            why=str(error).splitlines()[0][:300],
            hint="one of them ended or was killed: its output says why. Start all of them again; nothing was written",
        ) from error
