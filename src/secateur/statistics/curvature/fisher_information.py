"""Fisher information from per-sample gradients: empirical (the data's labels) or the model's (drawn labels)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from secateur.errors import UnsupportedError
from secateur.model import call
from secateur.model.kernels import exact_derivatives
from secateur.model.share import Share, over_processes
from secateur.statistics.curvature.hessian import Diagonal
from secateur.statistics.curvature.output_curvature import output_and_loss
from secateur.statistics.gradients.functional import Tensors, batches, parameters
from secateur.statistics.gradients.per_sample import iterate_per_sample_gradients
from secateur.statistics.notes import note
from secateur.types import Advance, Batch, Data, Loss

Labels = Literal["data", "model"]
Consume = Callable[[Tensors, Tensor], None]
MATCH = 1e-3  # relative difference from the slope of a log-likelihood that is put down to rounding


def fisher_diagonal(
    model: nn.Module,
    loss: Loss,
    data: Data,
    names: Iterable[str],
    *,
    labels: Labels = "data",
    draws: int = 1,
    seed: int = 0,
    progress: Advance | None = None,
) -> Diagonal:
    """Mean over the samples of the squared per-sample gradient.

    Args:
        model: any module, in eval mode.
        loss: ``loss(model, batch) -> scalar``, the mean over the samples.
        data: batches; with targets for labels "model".
        names: parameters.
        labels: "data" is the empirical Fisher, which is not a Hessian and vanishes where the network fits
            its data; "model" draws labels from the network's own predictions: its mean is the Gauss-Newton
            diagonal, for cross entropy and squared error.
        draws: labels drawn per sample.
        seed: of the labels.
        progress: called with the number of batches done (total 0: unknown).

    Returns:
        The diagonal, method "fisher".

    Raises:
        UnsupportedError: labels "model" and a loss that is neither cross entropy nor squared error.
        InputError: no batch, an unknown name.

    Cost:
        One backward pass per sample (and draw); chunked, never samples x parameters at once.

    Source:
        Kunstner, Balles, Hennig, "Limitations of the empirical Fisher approximation", 2019, equations 3 and 4.
    """
    total = {n: torch.zeros_like(t, dtype=torch.float64) for n, t in parameters(model, names).items()}

    def squares(gradients: Tensors, weight: Tensor) -> None:
        for name, gradient in gradients.items():
            total[name] += torch.einsum("b...,b->...", gradient.to(torch.float64).square(), weight)

    count = each_sample(
        model, loss, data, list(total), squares, labels=labels, draws=draws, seed=seed, progress=progress
    )
    total, count = over_processes(data, total, count)
    values = {name: tensor / count for name, tensor in total.items()}
    return Diagonal(values, dict.fromkeys(values, "fisher"), samples=count)


def each_sample(
    model: nn.Module,
    loss: Loss,
    data: Data,
    names: Iterable[str],
    consume: Consume,
    *,
    labels: Labels = "data",
    draws: int = 1,
    seed: int = 0,
    progress: Advance | None = None,
) -> int:
    """Hand per-sample gradients to a function, in chunks, and say when they tell nothing.

    Args:
        model: see `fisher_diagonal`, as the other arguments.
        loss: see there.
        data: see there.
        names: see there.
        consume: called with the gradients (name -> [chunk, *shape]) and their weights [chunk], float64: a sum
            of ``weight * f(gradient)`` divided by the returned number is the mean over samples and draws.
        labels: see there.
        draws: see there.
        seed: see there.
        progress: see there.

    Returns:
        Number of samples.
    """
    names = list(names)
    if labels == "model" and isinstance(data, Share):
        raise UnsupportedError(
            "labels='model' draws one stream of labels, which processes cannot share", hint="use labels='data'"
        )
    generator = torch.Generator().manual_seed(seed)
    count, right, judged, largest = 0, 0, 0, 0.0
    for number, (batch, size) in enumerate(batches(model, data)):
        hits, asked = _hits(model, loss, batch) if labels == "data" else (0, 0)
        right, judged = right + hits, judged + asked
        for _ in range(draws if labels == "model" else 1):
            drawn, weight = batch, torch.ones(size, dtype=torch.float64)
            if labels == "model":
                drawn, weight = sampled_targets(model, loss, batch, size, generator)
                # A mean over the draws: more of them make a sample more certain, and not heavier.
                weight = weight / draws
            start = 0
            for part in iterate_per_sample_gradients(model, loss, drawn, names):
                rows = next(iter(part.values()))
                consume(part, weight[start : start + len(rows)].to(rows.device))
                start += len(rows)
                largest = max([largest, *(float(g.abs().max()) for g in part.values() if g.numel())])
        count += size
        if progress:
            progress(number + 1, 0)
    if largest == 0.0:
        note("every per-sample gradient is zero: the Fisher information is zero and says nothing")
    elif judged and right > 0.999 * judged:
        note(
            f"the model is right on {right} of {judged} samples: the empirical Fisher of a network that fits "
            "its data is close to zero and may say little; labels='model' or criterion 'obd' do not have this"
        )
    return count


def _hits(model: nn.Module, loss: Loss, batch: Batch) -> tuple[int, int]:
    """How many integer targets are the largest logit, and of how many; (0, 0) where that has no meaning."""
    target = call.to_target(batch)
    if target is None or target.is_floating_point() or target.dim() == 0:
        return 0, 0
    try:
        with torch.no_grad():
            output, _ = output_and_loss(model, loss, batch, {})
    except UnsupportedError:
        return 0, 0
    if output.dim() < 2 or output[:, 0].shape != target.shape:
        return 0, 0
    return int((output.argmax(1) == target).sum()), target.numel()


def sampled_targets(
    model: nn.Module, loss: Loss, batch: Batch, size: int, generator: torch.Generator
) -> tuple[Batch, Tensor]:
    """The batch with targets drawn from the model's own predictions.

    Integer targets are drawn from the softmax of the output; float targets are the output plus Gaussian noise
    of the variance for which the loss is the negative log-likelihood. That the loss is one of the two is
    checked on its slope in the output.

    Returns:
        The batch, and the weight of every sample (the number of its positions: a loss that is the mean over
        T positions has a gradient T times too small for its curvature).

    Raises:
        UnsupportedError: no target, or a loss that is neither cross entropy nor squared error.
    """
    target = call.to_target(batch)
    if target is None:
        raise UnsupportedError(
            f"the batch {call.describe(batch)} holds no target that could be drawn",
            hint="give (input, target) batches, or use labels='data'",
        )
    output, slope = _slope(model, loss, batch)
    if target.is_floating_point():
        return _gaussian(model, loss, batch, output, size, generator)
    dim = 1 if output.dim() > 1 and output[:, 0].shape == target.shape else output.dim() - 1
    logits = output.movedim(dim, -1)
    if logits.shape[:-1] != target.shape:
        raise UnsupportedError(
            f"the target {call.describe(target)} does not fit the output {call.describe(output)}",
            hint="labels='model' needs outputs [batch, classes, ...] with targets [batch, ...]",
        )
    p = logits.to(torch.float64).softmax(-1)
    known = (target >= 0) & (target < p.shape[-1])
    here = torch.zeros_like(p).scatter_(-1, target.clamp(0, p.shape[-1] - 1)[..., None], 1.0)
    ideal = (p - here) * known[..., None]
    _require_likelihood(slope.movedim(dim, -1), ideal, size, "cross entropy")
    # On the CPU, where one seed draws the same labels for every device.
    drawn = torch.multinomial(p.reshape(-1, p.shape[-1]).cpu(), 1, generator=generator).view(target.shape)
    fresh = torch.where(known, drawn.to(target.device, target.dtype), target)
    return _replace(batch, fresh), known.reshape(size, -1).sum(1).to("cpu", torch.float64)


def _gaussian(
    model: nn.Module, loss: Loss, batch: Batch, output: Tensor, size: int, generator: torch.Generator
) -> tuple[Batch, Tensor]:
    noise = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.device)
    if call.to_target(batch).shape != output.shape:  # type: ignore[union-attr]
        raise UnsupportedError(
            f"the target does not have the shape of the output {call.describe(output)}",
            hint="labels='model' needs float targets of the output's shape; or use labels='data'",
        )
    # The slope at output plus noise is the curvature times the noise, if the loss is a squared error: this measures
    # the curvature, whose inverse is the variance that makes the loss a likelihood.
    trial = _replace(batch, (output + noise).to(output.dtype))
    slope = _slope(model, loss, trial)[1]
    curvature = _require_likelihood(slope, -noise, size, "squared error") * size
    return _replace(batch, (output + noise / curvature**0.5).to(output.dtype)), torch.ones(size).double()


def _require_likelihood(slope: Tensor, ideal: Tensor, size: int, name: str) -> float:
    """The factor in slope = factor * ideal, one for the batch."""
    precision = torch.finfo(slope.dtype).eps
    slope, ideal = slope.reshape(size, -1).to(torch.float64), ideal.reshape(size, -1)
    factor = float((slope * ideal).sum() / ideal.square().sum().clamp(min=1e-300))
    apart = float((slope - factor * ideal).norm())
    if factor <= 0 or apart > max(MATCH, 16 * precision) * float(slope.norm()) + 1e-12:
        raise UnsupportedError(
            f"labels='model' cannot draw targets: the loss is not the {name} of the output",
            hint="use labels='data', criterion gauss-newton, or a plain cross entropy or squared error",
        )
    return factor


def _slope(model: nn.Module, loss: Loss, batch: Batch) -> tuple[Tensor, Tensor]:
    """Output and the slope of the mean loss in it."""
    with exact_derivatives(model):
        leaves = {n: p.detach().requires_grad_() for n, p in model.named_parameters() if p.is_floating_point()}
        output, value = output_and_loss(model, loss, batch, leaves)
        slope = torch.autograd.grad(value, output, allow_unused=True)[0]
    return output.detach(), torch.zeros_like(output) if slope is None else slope


def _replace(batch: Batch, target: Tensor) -> Batch:
    if isinstance(batch, Mapping):
        old = call.to_target(batch)
        return {key: target if item is old else item for key, item in batch.items()}
    return (*batch[:-1], target)
