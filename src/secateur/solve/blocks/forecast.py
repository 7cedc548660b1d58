"""What a run will take, said before it starts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from secateur.kinds.weights.found import find_weights
from secateur.model.call import device_of
from secateur.request import Target
from secateur.solve.base import Solver
from secateur.solve.blocks.settings import Settings
from secateur.types import Example

TRAINED = 4  # forward passes that an epoch of training is worth
RESIDENT = 2.2  # weights of a block, and copies of them while they are solved
KEPT = 40_000_000  # bytes that were freed and that the C library has not given back
ROUNDS = 30  # products of o d^2 that the costliest solver makes per layer


@dataclass(frozen=True)
class Forecast:
    """An estimate.

    Args:
        seconds: of the whole run, from the speed of a product measured now.
        memory_bytes: beside the model: a copy of the weights, hidden states, one block's activations, second moments.
        weights: that are looked at.
        least_bytes: of a run whose weights stay on disk, hidden states too: the largest block with what is made of it,
            one block's activations, second moments.
        tokens: that all is learned from.
    """

    seconds: float
    memory_bytes: int
    weights: int
    least_bytes: int
    tokens: int


def forecast(
    model: nn.Module,
    example: Example,
    solver: Solver,
    *,
    tokens: int,
    settings: Settings | None = None,
    target: Target | None = None,
    protect: Sequence[str] = (),
) -> Forecast:
    """Estimate time and memory of a run.

    Args:
        model: left as it is.
        example: what one forward takes.
        solver: what solves the layers.
        tokens: of all calibration batches together.
        settings: how to go about it: with dense targets the original passes through every block, too, training goes
            through it several times, and unequal shares are compared with equal ones in a run of each.
        target: how much is to go, which may decide about the targets of layers.
        protect: what stays whole.

    Returns:
        the estimate; attention and other operations without weights are not in it.

    Cost: one product.
    """
    found = find_weights(model, protect, example=example).weights
    settings = settings or Settings()
    tuned, allocated = settings.reconstruct, settings.allocation
    streams = 2 if settings.dense(target) and (solver.moves or tuned is not None) else 1
    # A backward pass is worth two forward ones, and each sub-block runs behind those before it.
    trained = 0 if tuned is None else 2 + TRAINED * tuned.epochs
    compared = allocated is not None and allocated.check
    runs = (3 if tuned is not None else 2) if compared else 1
    operations, training, widest, largest = 0.0, 0.0, 0, 0
    blocks: dict[str, int] = {}
    for weight in found:
        out, *rest = weight.matrix_shape if weight.matrix else weight.shape[-2:]
        into, size = prod(rest), prod(weight.shape)
        operations += 2.0 * size * tokens * streams
        training += 2.0 * size * tokens * trained
        if solver.needs_gram:
            operations += (1 + (streams - 1)) * tokens * into**2 + 2.0 * ROUNDS * out * into**2
        widest, largest = max(widest, into, out), max(largest, into)
        place = _block_of(weight.name)
        blocks[place] = blocks.get(place, 0) + size
    item = max(next(model.parameters()).element_size(), 4)
    copies = sum(prod(weight.shape) for weight in found) * item
    activations = 6 * tokens * widest * item * streams
    seconds = (operations * runs + training) / _speed(model)
    moments = 8 * largest**2 * 8
    least = int(RESIDENT * max(blocks.values(), default=0) * item) + activations + moments + KEPT
    return Forecast(seconds, copies + activations + moments, sum(prod(weight.shape) for weight in found), least, tokens)


def _block_of(name: str) -> str:
    """What stands before and with the first number in a name: the place of a block in its stack."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
    return ".".join(parts[: number + 1])


def _speed(model: nn.Module) -> float:
    """Operations per second of a product of the size that blocks make, measured once."""
    device = device_of(model)
    a = torch.ones(512, 512, device=device)
    a @ a
    started = time.perf_counter()
    for _ in range(3):
        float((a @ a)[0, 0])
    return 3 * 2 * 512**3 / max(time.perf_counter() - started, 1e-9)
