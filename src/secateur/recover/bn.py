"""Batch-norm refresh: the statistics of a changed network are not those of the old one."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.errors import InputError, NonFiniteError
from secateur.model.call import call, device_of, to_device, to_example
from secateur.model.guard import evaluating
from secateur.types import Batch, Data


@dataclass
class _Pool:
    """Pooled count, mean and sum of squared deviations of one channel axis, in float64."""

    count: int = 0
    mean: Tensor | None = None
    squares: Tensor | None = None

    def add(self, x: Tensor) -> None:
        dims = [dim for dim in range(x.dim()) if dim != 1]
        count = x.numel() // max(x.shape[1], 1)
        if count == 0:
            return
        # The batch in float32, as the layer itself sees it; the pool in float64, since it adds up over many batches.
        variance, mean = torch.var_mean(x.detach().float(), dims, correction=0)
        variance, mean = variance.double(), mean.double()
        if self.mean is None or self.squares is None:
            self.count, self.mean, self.squares = count, mean, variance * count
            return
        total, delta = self.count + count, mean - self.mean
        self.squares = self.squares + variance * count + delta**2 * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total


def refresh_batchnorm(model: nn.Module, data: Data, batches: int = 20) -> int:
    """Compute the running mean and variance of every batch norm anew, from unlabelled data.

    Cutting channels changes what the later batch norms see; new statistics often bring back most of the
    accuracy without any training. A bad choice with a handful of samples: the statistics are then noise.

    The statistics are pooled over all batches as if they were one (batches of unequal size count by their
    samples); the variance is the unbiased one, as in torch. Every layer is fed by batch norms that use the
    statistics of the batch. Everything else runs in eval mode and no weight changes.

    Args:
        model: changed in place: ``running_mean``, ``running_var`` and ``num_batches_tracked``.
        data: batches as in `secateur.model.call.to_example`; one pass, so a generator will do.
        batches: at most so many are read.

    Returns:
        Number of batch norms that have new statistics (one that the forward does not reach keeps its own).

    Raises:
        InputError: there is no batch although the model has batch norms.
        NonFiniteError: statistics came out NaN or infinite; the model is then as it was.
        ForwardError: the forward fails; the model is then as it was.

    Cost: ``batches`` forward passes.

    Source: Wu and Johnson, "Rethinking Batch in BatchNorm", 2021, section 3 (precise statistics); pooling by
    Chan, Golub and LeVeque, 1983, equation 2.1.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> refresh_batchnorm(norm, [torch.tensor([[1.0], [3.0]])])
        1
        >>> norm.running_mean.item(), norm.running_var.item()
        (2.0, 2.0)
    """
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats and module.running_mean is not None
    }
    if not norms:
        return 0
    pools, read = _collect(model, norms, islice(iter(data), batches))
    if read == 0:
        raise InputError("there is no data to refresh the batch norms with", hint="give at least one batch")
    # All are checked before one is written: on an error the model is as it was.
    for name, pool in pools.items():
        _check(name, pool)
    for name, pool in pools.items():
        _write(norms[name], pool, read)
    return len(pools)


def _collect(model: nn.Module, norms: dict[str, _BatchNorm], batches: Iterable[Batch]) -> tuple[dict[str, _Pool], int]:
    pools = {name: _Pool() for name in norms}
    device, read = device_of(model), 0
    with ExitStack() as stack:
        for name, norm in norms.items():
            handle = norm.register_forward_pre_hook(partial(_observe, pools[name]), with_kwargs=True)
            stack.callback(handle.remove)
        # `evaluating` puts back modes and the buffers that the forward passes below change.
        stack.enter_context(evaluating(model))
        # Batch norms alone in training: they hand on what they normalise by the batch, dropout stays off.
        for norm in norms.values():
            norm.training = True
        for batch in batches:
            call(model, to_device(to_example(batch), device))
            read += 1
    # One value has no variance; a norm that saw no more keeps what it has.
    return {name: pool for name, pool in pools.items() if pool.count > 1}, read


def _observe(pool: _Pool, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
    pool.add(args[0] if args else kwargs["input"])


def _check(name: str, pool: _Pool) -> None:
    for value in (pool.mean, pool.squares):
        if value is None or not value.isfinite().all():
            raise NonFiniteError(f"the statistics for the batch norm {name!r} are not finite")


def _write(norm: _BatchNorm, pool: _Pool, batches: int) -> None:
    if pool.mean is None or pool.squares is None or norm.running_mean is None or norm.running_var is None:
        return
    norm.running_mean.copy_(pool.mean)
    norm.running_var.copy_(pool.squares / (pool.count - 1))
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.fill_(batches)
