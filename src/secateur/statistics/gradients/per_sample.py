"""Gradients: of every sample, of every batch, and Hessian-vector products.

The loss is always ``loss(model, batch) -> scalar``, the mean over the samples of the batch; the loss of one
sample is the loss of a batch that holds it alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from torch.nn.modules.conv import _ConvNd

from secateur.errors import InputError, ResourceError
from secateur.model import call, samples
from secateur.model.kernels import exact_derivatives
from secateur.statistics.gradients.functional import (
    Tensors,
    batches,
    loss_value,
    parameters,
    per_sample_leaves,
    require_finite_loss,
    samples_of,
)
from secateur.statistics.gradients.layer_tape import LayerTape
from secateur.types import Batch, Data, Loss

CHUNK_NUMBERS = 2**25  # gradients held at once: 128 MiB in float32
Way = Literal["auto", "layers", "vmap", "loop"]
AGREE = 1e-3  # relative difference from a backward pass of its own that is put down to rounding


@dataclass(frozen=True, eq=False)
class BatchGradient:
    """Gradient of the mean loss of one batch.

    Args:
        gradients: parameter name -> tensor of the parameter's shape.
        loss: the loss, detached.
        samples: number of samples in the batch: the weight of this gradient in a mean over the data.
    """

    gradients: Tensors
    loss: Tensor
    samples: int


def batch_gradients(model: nn.Module, loss: Loss, data: Data, names: Iterable[str]) -> Iterator[BatchGradient]:
    """Gradient of every batch, one backward pass each; frozen parameters have one too.

    Weigh by `BatchGradient.samples` for the gradient over the data: batches may differ in size. A square of
    these is no Fisher information: use `per_sample_gradients` for that.

    Args:
        model: any module, in the mode (train or eval) that the caller wants; ``.grad`` is not touched.
        loss: ``loss(model, batch) -> scalar``.
        data: iterable of batches.
        names: parameters; those that the loss does not depend on get zeros.

    Raises:
        InputError: no batch, an unknown name, or a loss that is no scalar.
        NonFiniteError: the loss is NaN or Inf; names the batch.

    Cost:
        One forward and one backward pass per batch.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> data = [torch.tensor([[1.0], [3.0]])]
        >>> next(batch_gradients(layer, lambda m, x: m(x).mean(), data, ["weight"])).gradients["weight"]
        tensor([[2.]])
    """
    held = parameters(model, names)
    for number, (batch, size) in enumerate(batches(model, data)):
        with exact_derivatives(model):
            leaves = {name: tensor.clone().requires_grad_() for name, tensor in held.items()}
            value = loss_value(model, loss, batch, leaves)
            require_finite_loss(value, number)
            found = _grad(value, list(leaves.values()))
        yield BatchGradient(dict(zip(leaves, found, strict=True)), value.detach(), size)


def per_sample_gradients(
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    names: Iterable[str],
    *,
    chunk: int | None = None,
    way: Way = "auto",
) -> Tensors:
    """Gradient of every sample's loss, all of them at once: [samples, *shape] per parameter.

    For sums over samples (squares, products with the weights) use `iterate_per_sample_gradients`, which
    never holds more than `chunk` of them.

    Args:
        model: any module, best in eval mode (batch norm in train mode has no per-sample loss).
        loss: ``loss(model, batch) -> scalar``, the mean over the samples.
        batch: tensors whose first dimension is the sample; others are shared by all samples.
        names: parameters.
        chunk: samples at a time; None chooses by memory.
        way: "layers" (one backward pass for the batch, products per layer), "vmap" (torch.func), "loop" (one
            backward pass per sample: always right) or "auto": layers for every parameter where it gives the
            gradient of the first sample and of that with the largest gradient; for the others the loop (for
            convolutions on a CPU, where it beats vmap) or vmap, and the loop where the model cannot be
            vmapped. All give the same numbers up to rounding.

    Returns:
        Parameter name -> tensor [samples, *shape] of the parameter's dtype.

    Raises:
        InputError: an unknown name, or a loss that is no scalar.
        NonFiniteError: the loss of a sample is NaN or Inf.
        ResourceError: memory ran out.

    Cost:
        About twice the forward and backward pass of the batch where layers are read off, else two to ten
        times; samples x parameters numbers.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> per_sample_gradients(layer, lambda m, x: m(x).mean(), x, ["weight"])["weight"].flatten()
        tensor([1., 3.])
    """
    names = list(names)
    parts = list(iterate_per_sample_gradients(model, loss, batch, names, chunk=chunk, way=way))
    return {name: torch.cat([part[name] for part in parts]) for name in dict.fromkeys(names)}


def iterate_per_sample_gradients(
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    names: Iterable[str],
    *,
    chunk: int | None = None,
    way: Way = "auto",
) -> Iterator[Tensors]:
    """The same as `per_sample_gradients` in pieces: each holds [at most chunk, *shape] per parameter."""
    held = parameters(model, names)
    size = samples.batch_size_of(batch)
    total = sum(tensor.numel() for tensor in held.values())
    step = chunk or max(1, min(size, 64, CHUNK_NUMBERS // max(total, 1)))
    for start in range(0, size, step):
        stop = min(start + step, size)
        part = samples_of(batch, size, slice(start, stop))
        with exact_derivatives(model):
            gradients: Tensors = {}
            if way in ("auto", "layers"):
                gradients = _taped(model, loss, part, held, stop - start, start // step)
            rest = {name: tensor for name, tensor in held.items() if name not in gradients}
            if rest and way == "layers":
                raise InputError(
                    f"the gradients of {next(iter(rest))!r} cannot be read off its layer", hint="use way='auto'"
                )
            if rest:
                found, values = _generic(model, loss, part, rest, stop - start, way)
                require_finite_loss(values, start // step)
                gradients.update(found)
        yield {name: gradients[name] for name in held}


def _generic(model: nn.Module, loss: Loss, batch: Batch, held: Tensors, size: int, way: Way) -> tuple[Tensors, Tensor]:
    if way == "vmap" or (way == "auto" and batching_pays(model)):
        found = _vmapped(model, loss, batch, held, strict=way == "vmap")
        if found is not None:
            return found
    return _looped(model, loss, batch, held, size)


def _taped(model: nn.Module, loss: Loss, batch: Batch, held: Tensors, size: int, number: int) -> Tensors:
    """Gradients of the parameters that can be read off their layers, as far as two samples confirm them."""
    tape = LayerTape(model, held)
    if not tape.owner:
        return {}
    leaves = {name: held[name].clone().requires_grad_() for name in tape.owner}
    with tape.recording():
        value = loss_value(model, loss, batch, leaves)
    require_finite_loss(value, number)
    names = tape.covered(size)
    if not names or not value.requires_grad:
        return {}
    # Times the number of samples the mean is their sum, whose slopes are those of each sample's own loss.
    slopes = torch.autograd.grad(value * size, tape.outputs(names), allow_unused=True)
    rows = (None if slope is None else slope.unsqueeze(1) for slope in slopes)
    found = {name: read(slice(None)).squeeze(1) for name, read in tape.gradients(names, rows)}
    if not found:
        return {}
    norms = {name: gradient.flatten(1).norm(dim=1) for name, gradient in found.items()}
    # The largest counts most in every sum of squares, and shows what rounding hides in a small one.
    largest = int(torch.stack(list(norms.values())).square().sum(0).argmax())
    some = sorted({0, largest})
    checked, _ = _looped(model, loss, samples_of(batch, size, some), {name: held[name] for name in found}, len(some))
    for name in disagreeing({n: g[some] for n, g in found.items()}, checked):
        del found[name]
    return found


def disagreeing(found: Tensors, exact: Tensors) -> list[str]:
    """Names of gradients that differ by more than rounding from what backward passes of their own gave.

    Rounding is relative to the gradient, or to the largest one of all where a gradient is zero by symmetry.
    """
    size = max((float(tensor.norm()) for tensor in exact.values()), default=0.0)
    wrong = []
    for name, tensor in exact.items():
        precision = torch.finfo(tensor.dtype).eps
        room = max(AGREE, 8 * precision) * float(tensor.norm()) + 64 * precision * size
        if float((found[name] - tensor).norm()) > room:
            wrong.append(name)
    return wrong


def batching_pays(model: nn.Module) -> bool:
    """Whether vmapped backward passes are faster than single ones: not for convolutions on a CPU.

    There the weight gradient of a batch of convolutions becomes one grouped convolution with a group per
    sample, measured more than ten times slower than the loop. A fixed rule and no timing: results stay reproducible.
    """
    convolves = any(isinstance(module, _ConvNd) for module in model.modules())
    return not (convolves and call.device_of(model).type == "cpu")


def _vmapped(
    model: nn.Module, loss: Loss, batch: Batch, held: Tensors, *, strict: bool
) -> tuple[Tensors, Tensor] | None:
    leaves, rebuild = per_sample_leaves(batch, samples.batch_size_of(batch))

    def one(weights: Tensors, sample: list[Tensor]) -> Tensor:
        return loss_value(model, loss, rebuild([leaf.unsqueeze(0) for leaf in sample]), weights)

    try:
        with torch.no_grad():  # else parameters that are not asked for would put a graph behind the result
            return vmap(grad_and_value(one), in_dims=(None, 0), randomness="different")(held, leaves)
    except torch.OutOfMemoryError as error:
        raise ResourceError("memory ran out in per-sample gradients", hint="use a smaller chunk") from error
    except Exception:
        # A model error shows again, with its own message, in the loop; all else is a limit of vmap.
        if strict:
            raise
        return None


def _looped(model: nn.Module, loss: Loss, batch: Batch, held: Tensors, size: int) -> tuple[Tensors, Tensor]:
    rows: list[list[Tensor]] = []
    values = []
    for number in range(size):
        leaves = [tensor.clone().requires_grad_() for tensor in held.values()]
        sample = samples_of(batch, size, slice(number, number + 1))
        value = loss_value(model, loss, sample, dict(zip(held, leaves, strict=True)))
        rows.append(_grad(value, leaves))
        values.append(value.detach())
    stacked = (torch.stack(column) for column in zip(*rows, strict=True))
    return dict(zip(held, stacked, strict=True)), torch.stack(values)


def _grad(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    if not value.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(value, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


def hessian_operator(model: nn.Module, loss: Loss, batch: Batch, names: Iterable[str]) -> HessianOperator:
    """The Hessian of one batch's loss as a function of vectors; the graph is built once.

    Args:
        model: any module.
        loss: ``loss(model, batch) -> scalar``.
        batch: one batch.
        names: the parameters that span the Hessian.

    Returns:
        A function ``product(vectors, only=None)``: vectors are name -> tensor of the parameter's shape, or
        [k, *shape] for k vectors at once, a name left out stands for zeros; products have the same form, for
        the names in `only` (all where None).

    Raises:
        InputError: an unknown name, or a loss that is no scalar.
        NonFiniteError: the loss is NaN or Inf.

    Cost:
        One forward and one double backward pass here, one backward pass through both per vector.
    """
    held = parameters(model, names)
    with exact_derivatives(model):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in held.items()}
        value = loss_value(model, loss, batch, leaves)
        require_finite_loss(value, 0)
        inputs = list(leaves.values())
        first = (
            torch.autograd.grad(value, inputs, create_graph=True, allow_unused=True)
            if value.requires_grad
            else [None] * len(inputs)
        )
    # A gradient without history (a loss linear in the parameter) has no second derivative.
    curved = {n: g for n, g in zip(leaves, first, strict=True) if g is not None and g.requires_grad}

    batched = batching_pays(model)

    def product(vectors: Mapping[str, Tensor], only: Iterable[str] | None = None) -> Tensors:
        wanted = {name: leaves[name] for name in (leaves if only is None else only)}
        some = next(iter(vectors))
        many = vectors[some].dim() > leaves[some].dim()
        count = vectors[some].shape[:1] if many else torch.Size()
        live = {name: gradient for name, gradient in curved.items() if name in vectors}
        found: tuple[Tensor | None, ...] = (None,) * len(wanted)
        if live:
            rows = [vectors[name] for name in live]
            with exact_derivatives(model):
                found = _second(list(live.values()), list(wanted.values()), rows, many, batched)
        return {
            name: leaf.new_zeros((*count, *leaf.shape)) if h is None else h.detach()
            for (name, leaf), h in zip(wanted.items(), found, strict=True)
        }

    return product


def _second(
    gradients: list[Tensor], inputs: list[Tensor], vectors: list[Tensor], many: bool, batched: bool
) -> tuple[Tensor | None, ...]:
    def once(rows: list[Tensor], together: bool) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(
            gradients, inputs, rows, retain_graph=True, allow_unused=True, is_grads_batched=together
        )

    if not many:
        return once(vectors, False)
    if batched and vectors[0].shape[0] > 1:
        try:
            return once(vectors, True)
        except torch.OutOfMemoryError as error:
            raise ResourceError("memory ran out in Hessian products", hint="use fewer vectors at once") from error
        except RuntimeError:  # an operation without batching rule: one vector at a time gives the same
            pass
    found = [once([v[k] for v in vectors], False) for k in range(vectors[0].shape[0])]
    return tuple(_stack(column) for column in zip(*found, strict=True))


def _stack(column: Sequence[Tensor | None]) -> Tensor | None:
    rows = [row for row in column if row is not None]
    return torch.stack(rows) if rows else None


class HessianOperator(Protocol):
    """Products of one batch's Hessian with vectors."""

    def __call__(self, vectors: Mapping[str, Tensor], only: Iterable[str] | None = None) -> Tensors:
        """See `hessian_operator`."""


def hessian_vector_product(
    model: nn.Module, loss: Loss, batch: Batch, names: Iterable[str], vectors: Mapping[str, Tensor]
) -> Tensors:
    """Product of the Hessian of one batch's loss with a vector, or with k of them, by double backward.

    Exact up to rounding, also for attention (math backend). Use `hessian_operator` for many vectors on one
    batch: it keeps the graph.

    Args:
        model: any module.
        loss: ``loss(model, batch) -> scalar``.
        batch: one batch.
        names: the parameters that span the Hessian.
        vectors: name -> tensor of the parameter's shape, or [k, *shape]; names left out stand for zeros.

    Returns:
        Name -> product, of the vectors' form.

    Raises:
        InputError: an unknown name, or a loss that is no scalar.
        NonFiniteError: the loss is NaN or Inf.

    Cost:
        About three backward passes.

    Source:
        Pearlmutter, "Fast exact multiplication by the Hessian", 1994.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> def cube(m, x):
        ...     return (m.weight * x).pow(3).sum()
        >>> _ = layer.weight.data.fill_(2.0)
        >>> hessian_vector_product(layer, cube, torch.ones(1), ["weight"], {"weight": torch.ones(1, 1)})
        {'weight': tensor([[12.]])}
    """
    return hessian_operator(model, loss, batch, names)(vectors)
