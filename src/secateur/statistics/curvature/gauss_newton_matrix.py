"""The Gauss-Newton matrix: the part of the Hessian that comes from the curvature of the loss alone.

    G = mean over samples of  J^T H_out J

J is the derivative of a sample's output z (flattened, m numbers) in the weights, H_out the m x m Hessian of
the sample's loss in z. With H_out = sum of e_k r_k r_k^T (eigenvalues and eigenvectors) the diagonal is the
mean of sum_k e_k (J^T r_k)^2: m backward passes whose results are squared sample by sample. It is exact for
every loss of the output, cross entropy and squared error among them; nothing assumes a convex loss.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap

from secateur.errors import ResourceError, UnsupportedError
from secateur.model.kernels import exact_derivatives
from secateur.statistics.curvature.hessian import Diagonal
from secateur.statistics.curvature.output_curvature import Pick, output_and_loss, root_picker, roots
from secateur.statistics.gradients.functional import (
    Tensors,
    batches,
    parameters,
    per_sample_leaves,
    require_finite_loss,
    samples_of,
)
from secateur.statistics.gradients.layer_tape import LayerTape
from secateur.statistics.gradients.per_sample import CHUNK_NUMBERS, batching_pays, disagreeing, hessian_operator
from secateur.types import Advance, Batch, Data, Loss

TAPED = 16  # samples at a time: all roots of all of them are pulled back together


def gauss_newton_diagonal(
    model: nn.Module,
    loss: Loss,
    data: Data,
    names: Iterable[str],
    *,
    draws: int | None = None,
    seed: int = 0,
    progress: Advance | None = None,
) -> Diagonal:
    """Diagonal of the Gauss-Newton matrix, exact or from random combinations of its columns.

    Args:
        model: any module, in eval mode, with outputs whose first dimension is the sample.
        loss: ``loss(model, batch) -> scalar``, the mean over the samples, of one output of the model.
        data: batches.
        names: parameters.
        draws: None is exact; a number replaces the m columns by that many random-sign sums of them per
            sample (unbiased).
        seed: of the signs.
        progress: called with the number of batches done (total 0: unknown).

    Returns:
        The diagonal, method "gauss-newton".

    Raises:
        UnsupportedError: the loss is no function of one output per sample, or that output is too large.
        InputError: no batch, or an unknown name.

    Cost:
        m backward passes per sample (m - 1 for cross entropy), or `draws`; no Hessian-vector product.

    Source:
        Schraudolph, "Fast curvature matrix-vector products", 2002; Dangel, Kunstner, Hennig, "BackPACK",
        2020, section 2 (diagonal by per-sample squares).
    """
    held = parameters(model, names)
    total = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in held.items()}
    generator = torch.Generator().manual_seed(seed)
    generic = _vmapped_squares if batching_pays(model) else _looped_squares
    count, pick = 0, root_picker(draws, generator)
    for number, (batch, size) in enumerate(batches(model, data)):
        with exact_derivatives(model):
            if number == 0:
                # One sample will do: how the loss is written decides, and not the data.
                require_output_only(model, loss, samples_of(batch, size, slice(0, 1)), held)
            for start in range(0, size, TAPED):
                stop = min(start + TAPED, size)
                part = samples_of(batch, size, slice(start, stop))
                done = _taped_squares(model, loss, part, stop - start, held, total, pick)
                rest = {name: tensor for name, tensor in held.items() if name not in done}
                if rest:
                    generic(model, loss, part, stop - start, rest, total, pick)
        count += size
        if progress:
            progress(number + 1, 0)
    values = {name: tensor / count for name, tensor in total.items()}
    return Diagonal(values, dict.fromkeys(values, "gauss-newton"), samples=count, probes=draws or 0)


def same_layer_exact(
    model: nn.Module, loss: Loss, batch: Batch, names: Iterable[str], *, seed: int = 0, tolerance: float = 1e-3
) -> frozenset[str]:
    """Parameters whose own block of the Hessian equals that of the Gauss-Newton matrix.

    Both blocks are equal where the outputs are affine in the parameter while the others stay: weights of
    networks with piecewise linear activations (ReLU, max pooling, batch norm in eval mode) that are used in
    one place; not so before GELU, layer norm or attention, or for recurrent weights. Module types cannot tell
    (a forward may call anything), so it is tried: the quadratic forms of both blocks are compared for one
    random vector per parameter. They differ by v^T (sum of residuals times second derivatives of the outputs)
    v, which for a Gaussian v is zero only where that matrix is zero on this batch.

    Args:
        model: any module, in eval mode.
        loss: ``loss(model, batch) -> scalar``, the mean over the samples.
        batch: the samples to try it on.
        names: parameters.
        seed: of the vectors.
        tolerance: relative difference of the forms that counts as equal (rounding is 1e-5 in float32).

    Returns:
        The names that passed; none where the loss is not a function of one output of the model.

    Cost:
        One Hessian-vector product and one directional derivative per parameter tensor.

    Source:
        Botev, Ritter, Barber, "Practical Gauss-Newton Optimisation for Deep Learning", 2017, section 3.4
        (piecewise linear activations).
    """
    held = parameters(model, names)
    generator = torch.Generator().manual_seed(seed)
    passed = set()
    with exact_derivatives(model):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in held.items()}
        try:
            require_output_only(model, loss, batch, held)
            output, value = output_and_loss(model, loss, batch, leaves)
        except UnsupportedError:
            return frozenset()
        slope = torch.autograd.grad(value, output, create_graph=True, allow_unused=True)[0]
        if slope is None:
            return frozenset()
        product = hessian_operator(model, loss, batch, list(held))
        for name, leaf in leaves.items():
            # On the CPU and in double precision, so that every device and dtype tries the same vector.
            drawn = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
            vector = drawn.to(device=leaf.device, dtype=leaf.dtype)
            hessian = float((vector * product({name: vector}, only=[name])[name]).sum(dtype=torch.float64))
            gauss_newton = _gauss_newton_form(output, slope, leaf, vector)
            if abs(hessian - gauss_newton) <= tolerance * max(abs(hessian), abs(gauss_newton)):
                passed.add(name)
    return frozenset(passed)


def _gauss_newton_form(output: Tensor, slope: Tensor, leaf: Tensor, vector: Tensor) -> float:
    """``(J v)^T H_out (J v)`` for the mean loss; J v as the derivative of J^T u in u."""
    dummy = torch.zeros_like(output, requires_grad=True)
    back = torch.autograd.grad(output, leaf, dummy, create_graph=True, allow_unused=True)[0]
    if back is None or not slope.requires_grad:
        return 0.0
    along = torch.autograd.grad(back, dummy, vector, retain_graph=True, allow_unused=True)[0]
    if along is None:
        return 0.0
    bent = torch.autograd.grad((slope * along.detach()).sum(), output, retain_graph=True, allow_unused=True)[0]
    return 0.0 if bent is None else float((along * bent).sum(dtype=torch.float64))


def require_output_only(model: nn.Module, loss: Loss, batch: Batch, held: Tensors) -> None:
    """Refuse a loss that depends on the weights by another way than the output (penalties, inner losses).

    Raises:
        UnsupportedError: the gradient through the output is not the gradient of the loss.
    """
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in held.items()}
    output, value = output_and_loss(model, loss, batch, leaves)
    require_finite_loss(value, 0)
    inputs = list(leaves.values())
    whole = torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True)
    slope = torch.autograd.grad(value, output, retain_graph=True, allow_unused=True)[0]
    if slope is None or not output.requires_grad:
        return  # said where the curvature is formed, with the reason
    part = torch.autograd.grad(output, inputs, slope, allow_unused=True)
    for name, a, b in zip(leaves, whole, part, strict=True):
        difference = 0.0 if a is None else float((a - (0 if b is None else b)).norm())
        if a is not None and difference > 1e-3 * float(a.norm()) + 1e-12:
            raise UnsupportedError(
                f"the loss depends on {name!r} by another way than the model's output",
                hint="take penalties on weights out of the loss, or use obd with method='exact'/'hutchinson'",
            )


@dataclass(frozen=True, eq=False)
class Pulled:
    """The roots of the output curvature of one batch, pulled back to the outputs of the layers.

    Args:
        tape: has the layers' inputs.
        names: parameters whose gradients can be read off, confirmed on one sample.
        sign: [B, K], float64.
        slopes: in the order of ``tape.outputs(names)``: [B, K, ...].
    """

    tape: LayerTape
    names: tuple[str, ...]
    sign: Tensor
    slopes: list[Tensor | None]


def pull_back(model: nn.Module, loss: Loss, batch: Batch, size: int, held: Tensors, pick: Pick) -> Pulled | None:
    """Pull all roots of a batch back together, as far as layers can be read off; None where none can."""
    tape = LayerTape(model, held)
    if not tape.owner:
        return None
    leaves = {name: held[name].clone().requires_grad_() for name in tape.owner}
    with tape.recording():
        output, value = output_and_loss(model, loss, batch, leaves)
    require_finite_loss(value, 0)
    names = tape.covered(size)
    if not names or not output.requires_grad:
        return None
    sign, root = pick(*roots(output, value, size))
    if root.shape[1] == 0:
        return Pulled(tape, tuple(names), sign, [None] * len(tape.outputs(names)))
    slopes = _slopes(output, tape.outputs(names), root)
    # The sample with the largest root: where it is nearly zero any two ways would agree.
    chosen = int(root[:, -1].norm(dim=1).argmax())
    here = slice(chosen, chosen + 1)
    sample = samples_of(batch, size, here)
    probe = _one_pull(model, loss, sample, {name: held[name] for name in names}, root[chosen, -1])
    own = {name: read(here)[0, -1] for name, read in tape.gradients(names, slopes)}
    wrong = disagreeing(own, {name: probe[name] for name in own})
    layers = [id(layer) for layer in tape.outputs(names)]
    good = [name for name in names if name not in wrong]
    kept = [slopes[layers.index(id(layer))] for layer in tape.outputs(good)]
    return Pulled(tape, tuple(good), sign, kept)


def _taped_squares(
    model: nn.Module, loss: Loss, batch: Batch, size: int, held: Tensors, total: Tensors, pick: Pick
) -> frozenset[str]:
    """Add the squares of all parameters that can be read off their layers; returns their names."""
    pulled = pull_back(model, loss, batch, size, held, pick)
    if pulled is None:
        return frozenset()
    for name, read in pulled.tape.gradients(pulled.names, pulled.slopes):
        # Gradients of all samples and roots at once would be many times the model.
        step = max(1, CHUNK_NUMBERS // max(pulled.sign.shape[1] * held[name].numel(), 1))
        for start in range(0, size, step):
            some = slice(start, start + step)
            squares = read(some).to(torch.float64).square()
            total[name] += torch.einsum("bk...,bk->...", squares, pulled.sign[some])
    return frozenset(pulled.names)


def _slopes(output: Tensor, layers: list[Tensor], root: Tensor) -> list[Tensor | None]:
    """Slopes of every root's sum in the layers' outputs: [B, K, ...] each."""
    rows = root.to(output.dtype).movedim(1, 0).reshape(root.shape[1], *output.shape)
    try:
        found = torch.autograd.grad(output, layers, rows, retain_graph=True, allow_unused=True, is_grads_batched=True)
        return [None if slope is None else slope.movedim(0, 1) for slope in found]
    except torch.OutOfMemoryError as error:
        raise ResourceError("memory ran out in Gauss-Newton", hint="use smaller batches") from error
    except RuntimeError:  # an operation without batching rule
        each = [torch.autograd.grad(output, layers, row, retain_graph=True, allow_unused=True) for row in rows]
        return [
            None if column[0] is None else torch.stack([c for c in column if c is not None], 1)
            for column in zip(*each, strict=True)
        ]


def _one_pull(model: nn.Module, loss: Loss, sample: Batch, held: Tensors, root_m: Tensor) -> Tensors:
    """One root of one sample pulled back by a backward pass of its own."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in held.items()}
    output, _ = output_and_loss(model, loss, sample, leaves)
    row = root_m.to(output.dtype).view(output.shape)
    found = torch.autograd.grad(output, list(leaves.values()), row, allow_unused=True)
    return {
        name: torch.zeros_like(held[name]) if gradient is None else gradient
        for name, gradient in zip(leaves, found, strict=True)
    }


def _looped_squares(
    model: nn.Module, loss: Loss, batch: Batch, size: int, held: Tensors, total: Tensors, pick: Pick
) -> None:
    for number in range(size):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in held.items()}
        sample = samples_of(batch, size, slice(number, number + 1))
        output, value = output_and_loss(model, loss, sample, leaves)
        require_finite_loss(value, number)
        sign, root = pick(*roots(output, value, 1))
        for k in range(root.shape[1]):
            row = root[0, k].to(output.dtype).view(output.shape)
            found = torch.autograd.grad(output, list(leaves.values()), row, retain_graph=True, allow_unused=True)
            for name, gradient in zip(leaves, found, strict=True):
                if gradient is not None:
                    total[name] += sign[0, k] * gradient.to(torch.float64).square()


def _vmapped_squares(
    model: nn.Module, loss: Loss, batch: Batch, size: int, held: Tensors, total: Tensors, pick: Pick
) -> None:
    numbers = sum(tensor.numel() for tensor in held.values())
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in held.items()}
    output, value = output_and_loss(model, loss, batch, leaves)
    require_finite_loss(value, 0)
    sign, root = pick(*roots(output, value, size))
    if root.shape[1] == 0:
        return
    step = max(1, min(size, CHUNK_NUMBERS // max(numbers * root.shape[1], 1)))
    for start in range(0, size, step):
        stop = min(start + step, size)
        part = samples_of(batch, size, slice(start, stop))
        try:
            found = _vmapped_pulls(model, loss, part, stop - start, held, sign[start:stop], root[start:stop])
        except torch.OutOfMemoryError as error:
            raise ResourceError("memory ran out in Gauss-Newton", hint="use smaller batches") from error
        except Exception:  # a limit of vmap; an error of the model shows again in the loop
            _looped_roots(model, loss, part, stop - start, held, total, sign[start:stop], root[start:stop])
            continue
        for name, squares in found.items():
            total[name] += squares


def _vmapped_pulls(
    model: nn.Module, loss: Loss, batch: Batch, size: int, held: Tensors, sign: Tensor, root: Tensor
) -> Tensors:
    tensors, rebuild = per_sample_leaves(batch, size)
    like = next(iter(held.values()))

    def one(sample: list[Tensor], sign_k: Tensor, root_km: Tensor) -> Tensors:
        one_batch = rebuild([tensor.unsqueeze(0) for tensor in sample])

        def predict(weights: Tensors) -> Tensor:
            return output_and_loss(model, loss, one_batch, weights)[0].reshape(-1)

        output, pull = vjp(predict, held)[:2]
        found = vmap(pull)(root_km.to(output.dtype))[0]
        return {
            name: torch.einsum("k...,k->...", gradient.to(torch.float64).square(), sign_k)
            for name, gradient in found.items()
        }

    device = like.device
    with torch.no_grad():
        squares = vmap(one, randomness="different")(tensors, sign.to(device), root.to(device))
    return {name: tensor.sum(0) for name, tensor in squares.items()}


def _looped_roots(
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    size: int,
    held: Tensors,
    total: Tensors,
    sign: Tensor,
    root: Tensor,
) -> None:
    for number in range(size):
        here = slice(number, number + 1)
        pick = partial(_given, (sign[here], root[here]))
        _looped_squares(model, loss, samples_of(batch, size, here), 1, held, total, pick)


def _given(drawn: tuple[Tensor, Tensor], _sign: Tensor, _root: Tensor) -> tuple[Tensor, Tensor]:
    return drawn
