"""The output inside a loss, the loss's curvature in it, and roots of that curvature."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from secateur.errors import UnsupportedError
from secateur.model import call
from secateur.statistics.curvature.hessian import signs
from secateur.statistics.gradients.functional import Tensors, loss_value
from secateur.types import Batch, Loss

OUTPUT_LIMIT = 2048  # outputs per sample for which the Hessian in the outputs is formed and decomposed


@contextmanager
def captured_output(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list that receives the prediction of every call of the model."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _args: object, output: object) -> None:
        seen.append(call.prediction(output))

    handle = model.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def output_and_loss(model: nn.Module, loss: Loss, batch: Batch, weights: Tensors) -> tuple[Tensor, Tensor]:
    """The model's prediction inside one evaluation of the loss, and the loss.

    Raises:
        UnsupportedError: the loss calls the model never, or more than once.
    """
    with captured_output(model) as seen:
        value = loss_value(model, loss, batch, weights)
    if len(seen) != 1:
        raise UnsupportedError(
            f"the loss called the model {len(seen)} times; Gauss-Newton needs one output per sample",
            hint="use criterion obd with method='exact' or 'hutchinson', or a loss with a single forward",
        )
    return seen[0], value


def output_width(model: nn.Module, loss: Loss, batch: Batch) -> float:
    """Outputs per sample, infinite where the loss is no function of one output of the model."""
    try:
        with torch.no_grad():
            output, _ = output_and_loss(model, loss, batch, {})
    except UnsupportedError:
        return float("inf")
    return output[0].numel() if output.dim() else float("inf")


def output_curvature(output: Tensor, value: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of every sample's Hessian in its output.

    Args:
        output: [samples, ...], part of the graph of `value`.
        value: the mean loss over the samples.
        size: number of samples; the loss of one must not depend on the output of another.

    Returns:
        Eigenvalues [samples, m] and eigenvectors as columns [samples, m, m], float64.

    Raises:
        UnsupportedError: the output is not what the loss depends on, or it is too large to decompose.
    """
    if output.dim() == 0 or output.shape[0] != size:
        raise UnsupportedError(
            f"the output {call.describe(output)} has no dimension for the {size} samples of the batch",
            hint="Gauss-Newton needs outputs whose first dimension is the sample",
        )
    width = output[0].numel()
    if width > OUTPUT_LIMIT:
        raise UnsupportedError(
            f"{width} outputs per sample: their Hessian is not formed above {OUTPUT_LIMIT}",
            hint="use criterion fisher with labels='model', or obd with method='hutchinson'",
        )
    slope = torch.autograd.grad(value, output, create_graph=True, allow_unused=True)[0]
    if slope is None:
        raise UnsupportedError(
            "the loss does not depend on the prediction of the model",
            why="the prediction is output.logits where there is one, else the first tensor of the output",
            hint="use criterion obd with method='exact' or 'hutchinson'",
        )
    flat = slope.reshape(size, width)
    rows = [torch.zeros_like(flat) for _ in range(width)]
    if flat.requires_grad:
        # Samples are independent: the gradient of the sum over samples of slope[:, k] holds all rows k.
        for k in range(width):
            found = torch.autograd.grad(flat[:, k].sum(), output, retain_graph=True, allow_unused=True)[0]
            rows[k] = torch.zeros_like(flat) if found is None else found.reshape(size, width)
    hessian = torch.stack(rows, 1).detach().to(torch.float64) * size
    values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
    return values, vectors


def roots(output: Tensor, value: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """``H_out = sum_k sign_k r_k r_k^T`` of every sample: signs [samples, k], roots [samples, k, m].

    Directions without curvature in any sample are left out (one for cross entropy).
    """
    values, vectors = output_curvature(output, value, size)
    noise = 16 * torch.finfo(output.dtype).eps * values.shape[1] * values.abs().amax(1, keepdim=True)
    values = torch.where(values.abs() > noise, values, 0.0)
    alive = (values != 0).any(0)
    scaled = (vectors * values.abs().sqrt()[:, None, :]).mT[:, alive]
    return values.sign()[:, alive], scaled


Pick = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def root_picker(draws: int | None, generator: torch.Generator) -> Pick:
    """All roots, or random-sign sums of them: E[(sum_k s_k r_k)(...)^T] = sum_k r_k r_k^T."""

    def pick(sign: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
        if draws is None:
            return sign, root
        mix = signs(root.new_empty(root.shape[0], draws, root.shape[1]), generator)
        up, down = (mix * (way * sign > 0)[:, None, :] @ root / draws**0.5 for way in (1, -1))
        one = root.new_ones(root.shape[0], draws)
        if not bool((sign < 0).any()):
            return one, up
        # Directions of negative curvature are summed by themselves: their squares count with a minus.
        return torch.cat([one, -one], 1), torch.cat([up, down], 1)

    return pick
