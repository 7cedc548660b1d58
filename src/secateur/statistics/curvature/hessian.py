"""The Hessian of the loss over the data: its diagonal, blocks of it, and quadratic forms.

Everything is made of Hessian-vector products (double backward), summed over the batches in float64 and
weighted by their numbers of samples: the Hessian of the mean loss over the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from secateur.statistics.gradients.functional import Tensors, batches, parameters
from secateur.statistics.gradients.per_sample import HessianOperator, hessian_operator
from secateur.types import Advance, Data, Loss

CHUNK_NUMBERS = 2**24


@dataclass(frozen=True, eq=False)
class Diagonal:
    """Diagonal of a curvature matrix, and how it was found.

    Args:
        values: parameter name -> float64 tensor of the parameter's shape.
        method: parameter name -> "exact", "gauss-newton", "hutchinson" or "fisher".
        error: parameter name -> standard error of each value; only the sampled ones have one.
        samples: number of samples that the mean runs over.
        probes: random vectors per batch, 0 where nothing was sampled.
    """

    values: Tensors
    method: Mapping[str, str]
    error: Tensors = field(default_factory=dict)
    samples: int = 0
    probes: int = 0

    @property
    def relative_error(self) -> float:
        """Root of (sum of squared standard errors / sum of squared values), over the sampled parameters."""
        noise = sum(float(e.square().sum()) for e in self.error.values())
        size = sum(float(self.values[name].square().sum()) for name in self.error)
        return (noise / size) ** 0.5 if size else 0.0


def operators(model: nn.Module, loss: Loss, data: Data, names: Sequence[str]) -> Iterator[tuple[HessianOperator, int]]:
    """Hessian-vector product of every batch, with its number of samples."""
    for batch, size in batches(model, data):
        yield hessian_operator(model, loss, batch, names), size


def unit_vectors(like: Tensor, index: Tensor) -> Tensor:
    """Rows of the identity: [k, *shape], with a one at each of the k flat indices."""
    rows = like.new_zeros((len(index), like.numel()))
    rows[torch.arange(len(index), device=like.device), index] = 1
    return rows.view(len(index), *like.shape)


def exact_diagonal(
    model: nn.Module,
    loss: Loss,
    data: Data,
    names: Iterable[str],
    *,
    chunk: int | None = None,
    progress: Advance | None = None,
) -> Diagonal:
    """True Hessian diagonal, by one product with every unit vector.

    The oracle: right for every twice differentiable network, and dear. Not for more than about 1e5 weights.

    Args:
        model: any module, in eval mode.
        loss: ``loss(model, batch) -> scalar``, the mean over the samples.
        data: batches.
        names: parameters.
        chunk: unit vectors at a time; None chooses by memory.
        progress: called with the number of batches done (total 0: unknown).

    Returns:
        The diagonal, method "exact".

    Raises:
        InputError: no batch, or an unknown name.
        NonFiniteError: the loss is NaN or Inf.

    Cost:
        As many Hessian-vector products per batch as there are weights.

    Source:
        LeCun, Denker, Solla, "Optimal Brain Damage", 1989, equation 3 (the quantity).
    """
    held = parameters(model, names)
    total = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in held.items()}
    count = 0
    for number, (product, size) in enumerate(operators(model, loss, data, list(held))):
        for name, tensor in held.items():
            step = chunk or max(1, min(128, CHUNK_NUMBERS // max(tensor.numel(), 1)))
            for index in torch.split(torch.arange(tensor.numel(), device=tensor.device), step):
                # Only the tensor's own rows: the rest of each product would be worked out and thrown away.
                rows = product({name: unit_vectors(tensor, index)}, only=[name])[name].flatten(1)
                entries = rows.gather(1, index[:, None])[:, 0]
                total[name].view(-1)[index] += size * entries.to(torch.float64)
        count += size
        if progress:
            progress(number + 1, 0)
    values = {name: tensor / count for name, tensor in total.items()}
    return Diagonal(values, dict.fromkeys(values, "exact"), samples=count)


def hutchinson_diagonal(
    model: nn.Module,
    loss: Loss,
    data: Data,
    names: Iterable[str],
    *,
    probes: int = 16,
    seed: int = 0,
    progress: Advance | None = None,
) -> Diagonal:
    """Unbiased estimate of the Hessian diagonal from random signs, with error bars.

    For a vector v of independent signs, E[v * Hv] is the diagonal; one draw has the variance of the squared
    off-diagonal entries of its row (a Gaussian v would add twice the squared diagonal). Every batch draws its
    own vectors, so that the noise falls with the number of batches too.

    Args:
        model: any module, in eval mode.
        loss: ``loss(model, batch) -> scalar``, the mean over the samples.
        data: batches.
        names: parameters; they are probed together.
        probes: sign vectors per batch, at least 2 (the error needs two).
        seed: of the signs.
        progress: called with the number of batches done (total 0: unknown).

    Returns:
        The diagonal, method "hutchinson", with the standard error of each value.

    Raises:
        InputError: no batch, or an unknown name.
        NonFiniteError: the loss is NaN or Inf.

    Cost:
        `probes` Hessian-vector products per batch, whatever the number of weights.

    Source:
        Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1989; Bekas, Kokiopoulou,
        Saad, "An estimator for the diagonal of a matrix", 2007.
    """
    held = parameters(model, names)
    generator = torch.Generator().manual_seed(seed)
    total = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in held.items()}
    variance = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in held.items()}
    count = 0
    for number, (product, size) in enumerate(operators(model, loss, data, list(held))):
        mean, spread = _probe(product, held, probes, generator)
        for name in held:
            total[name] += size * mean[name]
            # Of the mean over the probes, hence by probes * (probes - 1); batches draw apart, so variances add up.
            variance[name] += size**2 * spread[name] / (probes * (probes - 1))
        count += size
        if progress:
            progress(number + 1, 0)
    values = {name: tensor / count for name, tensor in total.items()}
    error = {name: tensor.sqrt() / count for name, tensor in variance.items()}
    return Diagonal(values, dict.fromkeys(values, "hutchinson"), error, samples=count, probes=probes)


def signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random -1 and +1 of the shape, dtype and device of a tensor; drawn on the CPU, the same everywhere."""
    drawn = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8)
    return (drawn * 2 - 1).to(device=like.device, dtype=like.dtype)


def _probe(product: HessianOperator, held: Tensors, probes: int, generator: torch.Generator) -> tuple[Tensors, Tensors]:
    """Mean of v * Hv over the probes, and the sum of squared deviations from it (Welford)."""
    mean = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in held.items()}
    spread = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in held.items()}
    for draw in range(1, probes + 1):
        vectors = {name: signs(tensor, generator) for name, tensor in held.items()}
        found = product(vectors)
        for name in held:
            value = (vectors[name] * found[name]).to(torch.float64)
            step = value - mean[name]
            mean[name] += step / draw
            spread[name] += step * (value - mean[name])
    return mean, spread


def quadratic_forms(
    model: nn.Module,
    loss: Loss,
    data: Data,
    vectors: Callable[[int], Tensors],
    count: int,
    *,
    names: Sequence[str],
    progress: Advance | None = None,
) -> Tensor:
    """``v^T H v`` of the loss over the data, for a number of vectors.

    Args:
        model: any module, in eval mode.
        loss: ``loss(model, batch) -> scalar``, the mean over the samples.
        data: batches.
        vectors: number of a vector -> name -> tensor of the parameter's shape (left out = zeros).
        count: number of vectors.
        names: parameters that any of the vectors may touch.
        progress: called with the number of batches done (total 0: unknown).

    Returns:
        float64 [count].

    Cost:
        `count` Hessian-vector products per batch.
    """
    total = torch.zeros(count, dtype=torch.float64)
    samples = 0
    # Batches outside: the graph of a batch's gradient is made once, and serves all vectors.
    for number, (product, size) in enumerate(operators(model, loss, data, names)):
        for k in range(count):
            vector = vectors(k)
            found = product(vector, only=list(vector))
            forms = ((v.to(torch.float64) * found[name].to(torch.float64)).sum() for name, v in vector.items())
            total[k] += size * float(sum(forms, torch.zeros((), dtype=torch.float64, device=_device(vector))))
        samples += size
        if progress:
            progress(number + 1, 0)
    return total / samples


def _device(vector: Tensors) -> torch.device:
    return next(iter(vector.values())).device


def hessian_blocks(model: nn.Module, loss: Loss, data: Data, blocks: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
    """Dense diagonal blocks of the true Hessian.

    Args:
        model: any module, in eval mode.
        loss: ``loss(model, batch) -> scalar``, the mean over the samples.
        data: batches.
        blocks: (parameter name, flat indices into it) of each block.

    Returns:
        One symmetric float64 matrix per block.

    Cost:
        One Hessian-vector product per batch and row.
    """
    names = list(dict.fromkeys(name for name, _ in blocks))
    held = parameters(model, names)
    found = [torch.zeros(len(i), len(i), dtype=torch.float64, device=held[n].device) for n, i in blocks]
    count = 0
    for product, size in operators(model, loss, data, names):
        for matrix, (name, index) in zip(found, blocks, strict=True):
            step = max(1, min(128, CHUNK_NUMBERS // max(held[name].numel(), 1)))
            for start in range(0, len(index), step):
                some = index[start : start + step]
                rows = product({name: unit_vectors(held[name], some)}, only=[name])[name].flatten(1)
                matrix[start : start + step] += size * rows[:, index].to(torch.float64)
        count += size
    # Symmetric but for rounding, which a Cholesky factor of one triangle would take for curvature.
    return [(matrix + matrix.T) / (2 * count) for matrix in found]
