"""Several processes that train one model decide as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Together:
    """Agreement of the processes of the default group; where there is one process only, nothing is sent.

    Args:
        active: whether the processes train one model. Processes that each train their own must not wait for others.
        device: where what is sent lies.
    """

    active: bool
    device: torch.device

    @classmethod
    def of(cls, model: nn.Module, asked: bool | None, device: torch.device) -> Together:
        """Whether processes work together: as asked, or where the model is wrapped for it.

        Args:
            model: as it was given.
            asked: True or False from the caller; None asks the model.
            device: of its weights.
        """
        wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return cls(several and (wrapped if asked is None else asked), device)

    def mean(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean over all processes: each may have seen other data. Taken before anything is ranked."""
        if not self.active:
            return dict(scores)
        result = {}
        for name in sorted(scores):
            total = scores[name].to(self.device, copy=True)
            dist.all_reduce(total)
            result[name] = total / dist.get_world_size()
        return {name: result[name] for name in scores}

    def same(self, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The decision of the first process: sums of floating-point numbers may differ in their last bits."""
        if not self.active:
            return dict(keep)
        result = {}
        for name in sorted(keep):
            sent = keep[name].to(self.device, torch.uint8)
            dist.broadcast(sent, src=0)
            result[name] = sent.bool().to(keep[name].device)
        return {name: result[name] for name in keep}
