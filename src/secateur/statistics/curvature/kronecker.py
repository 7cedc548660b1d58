"""Kronecker factors of the curvature of linear and convolutional layers (K-FAC).

    block of one layer  ~  A (x) S,   A = E[a a^T],   S = E[d d^T]

a is what a weight row sees (for convolutions: a patch), with a 1 at the end where the bias counts; d is the
slope of a sample's loss in the layer's output. Positions follow the "expand" convention: A is the mean over
samples and positions, S the mean over samples of the *sum* over positions. So A (x) S keeps the scale of the
loss in every layer, and layers with many positions compare with those with one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from secateur.errors import UnsupportedError
from secateur.model.call import to_example
from secateur.model.kernels import exact_derivatives
from secateur.model.padding import real_tokens
from secateur.model.room import require_room
from secateur.model.share import Share, over_processes
from secateur.statistics.curvature.gauss_newton_matrix import TAPED, Pulled, pull_back
from secateur.statistics.curvature.output_curvature import Pick, output_and_loss, root_picker
from secateur.statistics.gradients.functional import Tensors, batches, parameters, samples_of
from secateur.statistics.gradients.layer_tape import LayerTape, unfolded
from secateur.statistics.gradients.per_sample import disagreeing, per_sample_gradients
from secateur.types import Advance, Batch, Data, Loss

Slopes = Literal["exact", "sampled", "data"]
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True, eq=False)
class Factors:
    """Curvature factors of one layer, per group of a grouped convolution.

    Args:
        weight: name of the weight.
        bias: name of the bias where it counts, else "".
        a_GJJ: input factor, float64; the last row and column belong to the bias where there is one.
        s_GOO: output factor, float64.
        spectrum_GOJ: mean squared per-sample gradient in the basis of the factors' eigenvectors, where it was
            asked for (EKFAC); replaces the products of their eigenvalues.
    """

    weight: str
    bias: str
    a_GJJ: Tensor
    s_GOO: Tensor
    spectrum_GOJ: Tensor | None = None

    def matrix(self, weights: Tensors) -> Tensor:
        """Weight (and bias as the last column) as [G, O, J]."""
        groups, rows = self.s_GOO.shape[:2]
        flat = weights[self.weight].to(torch.float64).reshape(groups, rows, -1)
        if self.bias:
            flat = torch.cat([flat, weights[self.bias].to(torch.float64).reshape(groups, rows, 1)], 2)
        return flat

    def eigenvectors(self) -> tuple[Tensor, Tensor]:
        """Of both factors, as columns: [G, J, J] and [G, O, O]."""
        return torch.linalg.eigh(self.a_GJJ)[1], torch.linalg.eigh(self.s_GOO)[1]


def kronecker_factors(
    model: nn.Module,
    loss: Loss,
    data: Data,
    names: Iterable[str],
    *,
    slopes: Slopes = "exact",
    spectrum: bool = False,
    seed: int = 0,
    progress: Advance | None = None,
) -> dict[str, Factors]:
    """Factors of every layer that owns some of the parameters.

    Args:
        model: any module, in eval mode.
        loss: ``loss(model, batch) -> scalar``, the mean over the samples.
        data: batches; read twice with `spectrum`. Tokens that `attention_mask` leaves out are no inputs.
        names: weights and biases of Linear, Conv1d and Conv2d layers; others are passed over.
        slopes: "exact" pulls back every column of the loss's Hessian in the outputs (no sampling noise),
            "sampled" one random-sign sum of them per sample, "data" the slope of the loss itself (empirical).
        spectrum: measure `Factors.spectrum_GOJ` too.
        seed: of the signs.
        progress: called with the number of batches done (total 0: unknown).

    Returns:
        Name of the weight -> factors.

    Raises:
        UnsupportedError: a layer is called more than once, or not with the samples first.
        ResourceError: the factors need more memory than is free.

    Cost:
        As many backward passes as outputs ("exact") or one, and J^2 + O^2 numbers per layer; twice that with
        `spectrum`.

    Source:
        Martens, Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", 2015;
        Grosse, Martens, "A Kronecker-factored approximate Fisher matrix for convolution layers", 2016;
        George et al., "Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis", 2018.
    """
    if slopes == "sampled" and isinstance(data, Share):
        raise UnsupportedError(
            "slopes='sampled' draws one stream of signs, which processes cannot share", hint="use 'exact' or 'data'"
        )
    names = list(names)
    held, bias_of, _ = _owned(model, names)
    if not held:
        return {}
    require_room_for_factors(model, names)
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    count, positions = 0, dict.fromkeys(held, 0)
    picks = root_picker(1 if slopes == "sampled" else None, torch.Generator().manual_seed(seed))
    for number, (pulled, size, real) in enumerate(_pulls(model, loss, data, held, slopes, picks)):
        for name, a_BGJP, slope in _layers(pulled, bias_of):
            a_BGJP, there = _unpadded(a_BGJP, real)
            a, s = _moments(a_BGJP, slope, pulled.sign)
            before = sums.get(name)
            sums[name] = (a, s) if before is None else (before[0] + a, before[1] + s)
            positions[name] += there
        count += size
        if progress:
            progress(number + 1, 0)
    sums, positions, count = _of_all(data, sums, positions, count)
    found = {n: Factors(n, bias_of[n], a / positions[n], s / count) for n, (a, s) in sums.items()}
    if not spectrum:
        return found
    # The same signs once more: the spectrum is to be that of the very slopes that the factors were made of.
    picks = root_picker(1 if slopes == "sampled" else None, torch.Generator().manual_seed(seed))
    bases = {name: factors.eigenvectors() for name, factors in found.items()}
    squares: Tensors = {}
    for pulled, _, _ in _pulls(model, loss, data, held, slopes, picks):
        for name, a_BGJP, slope in _layers(pulled, bias_of):
            part = _rotated_squares(a_BGJP, slope, pulled.sign, *bases[name])
            squares[name] = squares[name] + part if name in squares else part
    squares, _ = over_processes(data, squares, 0)
    return {n: Factors(n, f.bias, f.a_GJJ, f.s_GOO, squares[n] / count) for n, f in found.items()}


def _owned(model: nn.Module, names: Iterable[str]) -> tuple[Tensors, dict[str, str], dict[str, nn.Module]]:
    """Weights of layers that have factors, the bias of each ("" for none), and their modules."""
    names = list(names)
    held = parameters(model, names)
    owner = LayerTape(model, names).owner
    weights = [n for n, (module, slot) in owner.items() if slot == "weight" and isinstance(module, LAYERS)]
    biases = {id(module): n for n, (module, slot) in owner.items() if slot == "bias"}
    bias_of = {name: biases.get(id(owner[name][0]), "") for name in weights}
    return {name: held[name] for name in weights}, bias_of, {name: owner[name][0] for name in weights}


def require_room_for_factors(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse factors that need more memory than is free: both of every layer, and those of the batch that is added.

    Args:
        model: any module; nothing is run.
        names: as for `kronecker_factors`.

    Raises:
        ResourceError: they do; says both figures.
    """
    held, bias_of, modules = _owned(model, names)
    if not held:
        return
    wanted = 0
    for name, weight in held.items():
        groups = int(getattr(modules[name], "groups", 1))
        wide, rows = weight[0].numel() + bool(bias_of[name]), len(weight) // groups
        wanted += 2 * 8 * groups * (wide**2 + rows**2)
    hint = "score fewer layers at a time (protect), or take criterion fisher, whose memory is that of the weights"
    require_room("Kronecker factors", wanted, next(iter(held.values())).device, hint=hint)


def _of_all(
    data: Data, sums: dict[str, tuple[Tensor, Tensor]], positions: dict[str, int], count: int
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, int], int]:
    """Sums, positions and samples of all processes that share the data."""
    counts = {name: torch.tensor(number) for name, number in positions.items()}
    inputs, total = over_processes(data, {name: a for name, (a, _) in sums.items()}, count)
    slopes, _ = over_processes(data, {name: s for name, (_, s) in sums.items()}, 0)
    counts, _ = over_processes(data, counts, 0)
    return {n: (inputs[n], slopes[n]) for n in inputs}, {n: int(number) for n, number in counts.items()}, total


def _pulls(
    model: nn.Module, loss: Loss, data: Data, held: Tensors, slopes: Slopes, pick: Pick
) -> Iterable[tuple[Pulled, int, Tensor | None]]:
    """What is pulled back, the number of samples, and which of their tokens are no padding."""
    for batch, whole in batches(model, data):
        # All roots of a part are pulled back together, so a large batch is taken in parts.
        for start in range(0, whole, TAPED):
            size = min(TAPED, whole - start)
            part = samples_of(batch, whole, slice(start, start + size))
            with exact_derivatives(model):
                pulled = (
                    _pull_loss(model, loss, part, size, held)
                    if slopes == "data"
                    else pull_back(model, loss, part, size, held, pick)
                )
            missing = [name for name in held if pulled is None or name not in pulled.names]
            if missing or pulled is None:
                raise UnsupportedError(
                    f"no Kronecker factors for {missing[:3]}: the layer is used more than once, not at all, "
                    "or not with the samples first",
                    hint="leave it out of the groups, or use criterion fisher, gauss-newton or obd",
                )
            yield pulled, size, real_tokens(to_example(part))


def _pull_loss(model: nn.Module, loss: Loss, batch: Batch, size: int, held: Tensors) -> Pulled:
    tape = LayerTape(model, held)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in held.items()}
    with tape.recording():
        _, value = output_and_loss(model, loss, batch, leaves)
    names = tape.covered(size)
    found = torch.autograd.grad(value * size, tape.outputs(names), allow_unused=True)
    rows = [None if slope is None else slope.unsqueeze(1) for slope in found]
    # A layer that is called by other means than the tape hears (tied to another, say) gives a part of its gradient.
    # The first sample shows it, against a gradient that no tape has a part in.
    first = samples_of(batch, size, slice(0, 1))
    exact = per_sample_gradients(model, loss, first, names, way="loop")
    own = {name: read(slice(0, 1))[0, 0] for name, read in tape.gradients(names, rows)}
    wrong = disagreeing(own, {name: exact[name][0] for name in own})
    names = [name for name in names if name not in wrong]
    sign = torch.ones(size, 1, dtype=torch.float64, device=value.device)
    return Pulled(tape, tuple(names), sign, [*rows])


def _layers(pulled: Pulled, bias_of: dict[str, str]) -> Iterable[tuple[str, Tensor, Tensor]]:
    """Name, inputs [B, G, J, P] (a row of ones where the bias counts) and slopes [B, K, G, O, P]."""
    for name, slope in zip(pulled.names, pulled.slopes, strict=True):
        module, x = pulled.tape.owner[name][0], pulled.tape.input(name)
        if isinstance(module, nn.Linear):
            a = x.reshape(x.shape[0], 1, -1, x.shape[-1]).mT
            d = None if slope is None else slope.reshape(*slope.shape[:2], 1, -1, slope.shape[-1]).mT
        elif isinstance(module, (nn.Conv1d, nn.Conv2d)):
            a = unfolded(module, x)
            rows = module.out_channels // module.groups
            d = None if slope is None else slope.reshape(*slope.shape[:2], module.groups, rows, -1)
        else:
            continue
        if d is None:  # the loss does not reach the layer: its slope is zero
            rows = module.weight.shape[0] // a.shape[1]
            d = a.new_zeros(len(a), pulled.sign.shape[1], a.shape[1], rows, a.shape[3])
        if bias_of[name]:
            a = torch.cat([a, a.new_ones(*a.shape[:2], 1, a.shape[3])], 2)
        yield name, a, d


def _unpadded(a_BGJP: Tensor, real_BP: Tensor | None) -> tuple[Tensor, int]:
    """Inputs with zeros where there is padding, and the number of positions that are left."""
    if real_BP is None or (len(a_BGJP), a_BGJP.shape[3]) != real_BP.shape:
        return a_BGJP, len(a_BGJP) * a_BGJP.shape[3]
    return a_BGJP * real_BP[:, None, None].to(a_BGJP), int(real_BP.sum())


def _moments(a_BGJP: Tensor, d_BKGOP: Tensor, sign_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the samples, each sample's product in the parameters' dtype, the sums in float64."""
    groups, wide, rows = a_BGJP.shape[1], a_BGJP.shape[2], d_BKGOP.shape[3]
    a_sum = a_BGJP.new_zeros(groups, wide, wide, dtype=torch.float64)
    s_sum = a_BGJP.new_zeros(groups, rows, rows, dtype=torch.float64)
    for a_GJP, d_KGOP, sign_K in zip(a_BGJP, d_BKGOP, sign_BK, strict=True):
        a_sum += a_GJP @ a_GJP.mT
        signed = d_KGOP * sign_K.to(d_KGOP.dtype)[:, None, None, None]
        s_sum += torch.einsum("kgop,kgqp->goq", signed, d_KGOP)
    return a_sum, s_sum


def _rotated_squares(a_BGJP: Tensor, d_BKGOP: Tensor, sign_BK: Tensor, qa_GJJ: Tensor, qs_GOO: Tensor) -> Tensor:
    """Sum over the samples of the squared gradient in the eigenbasis, [G, O, J]."""
    total = a_BGJP.new_zeros(a_BGJP.shape[1], d_BKGOP.shape[3], a_BGJP.shape[2], dtype=torch.float64)
    qa, qs = qa_GJJ.to(a_BGJP.dtype), qs_GOO.to(a_BGJP.dtype)
    for a_GJP, d_KGOP, sign_K in zip(a_BGJP, d_BKGOP, sign_BK, strict=True):
        gradient = (qs.mT @ d_KGOP) @ (qa.mT @ a_GJP).mT
        total += torch.einsum("kgoj,k->goj", gradient.to(torch.float64).square(), sign_K)
    return total
