"""One proof of agreement for every kind of removal: what the smaller model gives is what it should give."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import CertificateError, ForwardError, UnsupportedError
from secateur.model.call import call, fresh
from secateur.model.forms import map_tensors
from secateur.model.rebound import rebind
from secateur.model.tensors import computed_tensors, cut_tensor, dense
from secateur.types import Certificate, Example

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
MEANINGFUL = 100.0  # times the tolerance: no error larger than this part of the largest output passes


def agreement(
    expected: Sequence[Tensor],
    found: Sequence[Tensor],
    tolerance: float | None,
    *,
    method: str,
    differs: str,
    hint: str,
    nan: str = "the model gives NaN where it should give a number, or the other way round",
) -> Certificate:
    """The certificate that the outputs of a cut model are the expected ones.

    Args:
        expected: what the cut model should give.
        found: what it gives.
        tolerance: largest allowed error relative to max(1, largest output), and never above a hundred times that
            relative to the largest output itself; default by dtype (1e-5 in float32, 1e-10 in float64).
        method: what the certificate calls the proof.
        differs: says what an output is not, for the error.
        hint: what to do then.
        nan: what it means, as the reason of the error, where only one of the two is NaN.

    Raises:
        CertificateError: another number of outputs, other shapes, or an error above the tolerance.
    """
    if len(found) != len(expected):
        raise CertificateError(
            "The cut model returns another number of tensors than the original.",
            why=f"{len(found)} instead of {len(expected)}",
        )
    worst, limit, precision = 0.0, tolerance or TOLERANCE[torch.float32], torch.float32
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        error, size = _compare(i, dense(a), dense(b), nan, hint)
        if a.is_floating_point():
            precision = a.dtype
            limit = TOLERANCE.get(precision, limit) if tolerance is None else tolerance
        # Relative to 1 below outputs of 1, as rounding inside the model does not shrink with its output; but never
        # more than a small part of the output itself, or the proof of a model with tiny outputs would be empty.
        allowed = limit * min(max(1.0, size), MEANINGFUL * size)
        worst = max(worst, error)
        if error > allowed:
            raise CertificateError(
                f"Output {i} of the cut model {differs}.",
                why=f"largest error {error:.3g}, allowed {allowed:.3g}, largest output {size:.3g}",
                hint=hint,
            )
    return Certificate(worst, limit, str(precision).removeprefix("torch."), method, len(found))


def run_cut(cut: nn.Module, example: Example, *, when: str, hint: str) -> object:
    """Run a cut model on the example.

    Raises:
        UnsupportedError: its forward fails; says `when` and gives the hint.
    """
    try:
        return call(cut, fresh(example))
    except ForwardError as error:
        what = f"{type(cut).__name__} does not run {when}; nothing was changed or saved."
        raise UnsupportedError(what, why=error.why, hint=hint) from error


def _compare(i: int, expected: Tensor, found: Tensor, nan: str, hint: str) -> tuple[float, float]:
    """Largest error and largest value of one output; refuses other shapes, and NaN on one side only."""
    if expected.is_complex() and found.is_complex():
        expected, found = torch.view_as_real(expected.resolve_conj()), torch.view_as_real(found.resolve_conj())
    if expected.shape != found.shape:
        raise CertificateError(
            f"Output {i} of the cut model has another shape than its plan says.",
            why=f"{tuple(found.shape)} instead of {tuple(expected.shape)}",
        )
    if not expected.is_floating_point():
        return float((expected != found).sum()), 1.0
    both = torch.isnan(expected) & torch.isnan(found)
    same = both | (expected == found)  # equal infinities count as equal
    difference = torch.where(same, torch.zeros_like(expected), expected - found).abs()
    if difference.numel() == 0:
        return 0.0, 1.0
    if torch.isnan(difference).any():
        raise CertificateError(
            f"Output {i} of the cut model is NaN where its proof is not, or the other way round.",
            why=nan,
            hint=hint,
        )
    finite = expected[torch.isfinite(expected)]
    return float(difference.max()), float(finite.abs().max()) if finite.numel() else 0.0


PART = 2**19  # elements that are compared at once


def require_slices(name: str, wanted: Tensor, found: Tensor | None) -> None:
    """Refuse a tensor of the cut model that is not exactly what its plan keeps: the example may leave a unit silent.

    Args:
        name: of the tensor, for the error.
        wanted: the kept slices of the original.
        found: what the cut model holds; None where it has no such tensor.

    Raises:
        CertificateError: shape, dtype or a single bit differ.
    """
    if found is None or wanted.shape != found.shape or wanted.dtype != found.dtype or not _same_bits(wanted, found):
        raise CertificateError(
            f"{name!r} of the cut model does not hold the slices that its plan keeps.",
            why="the plan was changed after it was made, or the model between planning and cutting",
            hint="Make the plan anew; nothing was changed or saved.",
        )


def require_kept(name: str, whole: Tensor, dims: Mapping[int, Tensor], found: Tensor | None) -> None:
    """As `require_slices`, part by part: what is taken out of the original is compared while it is in the caches.

    Args:
        name: of the tensor, for the error.
        whole: the original's.
        dims: dimension -> kept indices.
        found: what the cut model holds; None where it has no such tensor.

    Raises:
        CertificateError: shape, dtype or a single bit differ.
    """
    whole = whole.detach()
    kept = [len(dims[d]) if d in dims else size for d, size in enumerate(whole.shape)]
    if found is None or not kept or list(found.shape) != kept or whole.layout is not torch.strided:
        require_slices(name, cut_tensor(whole, dims), found)
        return
    rows = max(1, PART * kept[0] // max(1, found.numel()))
    for first in range(0, kept[0], rows):
        own = {**dims, 0: dims[0][first : first + rows]} if 0 in dims else dims
        part = whole if 0 in dims else whole[first : first + rows]
        require_slices(name, cut_tensor(part, own), found[first : first + rows])


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bits; a third of the time that `torch.equal` takes."""
    if a.is_quantized or a.layout is not torch.strided:
        return torch.equal(a, b)
    bits = [t.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8) for t in (a, b)]
    # Eight bytes at a time, where both begin at a multiple of eight in their storage.
    if all(t.numel() % 8 == 0 and t.storage_offset() % 8 == 0 for t in bits):
        bits = [t.view(torch.int64) for t in bits]
    return torch.equal(*bits)


def doubled(value: object) -> Any:
    """A copy in float64: of a module, or of the tensors in an example."""
    if isinstance(value, nn.Module):
        memo = computed_tensors(value)
        twin = copy.deepcopy(value, memo)
        rebind(twin, memo)
        return twin.double()
    return map_tensors(value, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def worst(proofs: Iterable[Certificate]) -> Certificate:
    """One certificate of several runs: that of the run with the largest error, and what all of them have shown."""
    known = list(proofs)
    first = max(known, key=lambda proof: proof.max_abs_error)
    trials = tuple(dict.fromkeys(trial for proof in known for trial in proof.trials))
    return replace(first, trials=trials, notes=tuple(dict.fromkeys(note for proof in known for note in proof.notes)))
