"""One agreement of outputs: what passes, what does not, at every scale of the outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from secateur.errors import CertificateError
from secateur.model import agreement as module
from secateur.model.agreement import agreement, require_kept, require_slices
from secateur.types import Certificate


def agree(expected: Tensor, found: Tensor, tolerance: float | None = None) -> Certificate:
    return agreement([expected], [found], tolerance, method="test", differs="differs", hint="look")


@pytest.mark.parametrize("scale", [1e-9, 5e-6, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("relative", [0.21, 0.01])
def test_a_visible_error_is_refused_however_small_or_large_the_outputs_are(scale: float, relative: float) -> None:
    expected = torch.tensor([scale, -scale / 2])
    with pytest.raises(CertificateError, match="largest error"):
        agree(expected, expected * (1 + relative))


@pytest.mark.parametrize("scale", [5e-6, 1.0, 1e4])
def test_rounding_passes(scale: float) -> None:
    expected = torch.tensor([scale, -scale / 2])
    proof = agree(expected, expected * (1 + 2e-7))
    assert proof.max_abs_error == pytest.approx(float((expected * 2e-7).abs().max()), rel=1.0)
    assert proof.tolerance == 1e-5


@pytest.mark.parametrize("times", [3.0, 30.0, 900.0])
def test_the_default_limit_is_a_hundred_thousandth(times: float) -> None:
    """Ten times more lenient, or a thousand times: both are caught."""
    expected = torch.full((3,), 10.0)
    with pytest.raises(CertificateError):
        agree(expected, expected + times * 1e-5 * 10)
    agree(expected, expected + 0.5e-5 * 10)


def test_all_zero_outputs_must_be_zero() -> None:
    with pytest.raises(CertificateError):
        agree(torch.zeros(3), torch.full((3,), 1e-12))
    agree(torch.zeros(3), torch.zeros(3))


@pytest.mark.parametrize(
    "found", [torch.tensor([1.0, float("nan")]), torch.tensor([1.0]), torch.tensor([float("inf"), 2.0])]
)
def test_nan_infinity_and_other_shapes_are_refused(found: Tensor) -> None:
    with pytest.raises(CertificateError):
        agree(torch.tensor([1.0, 2.0]), found)


def test_equal_nan_and_infinity_count_as_equal() -> None:
    both = torch.tensor([float("nan"), float("inf"), 1.0])
    assert agree(both, both.clone()).max_abs_error == 0


def test_whole_numbers_must_be_the_same() -> None:
    agree(torch.tensor([3, 4]), torch.tensor([3, 4]))
    with pytest.raises(CertificateError):
        agree(torch.tensor([3, 4]), torch.tensor([3, 5]))


def test_another_number_of_outputs_is_refused() -> None:
    with pytest.raises(CertificateError, match="another number"):
        agreement([torch.ones(1)], [torch.ones(1)] * 2, None, method="test", differs="differs", hint="look")


@pytest.mark.parametrize(
    "found", [None, torch.tensor([1.0, 2.5]), torch.tensor([1.0]), torch.tensor([1.0, 2.0], dtype=torch.float64)]
)
def test_slices_agree_bit_for_bit(found: Tensor | None) -> None:
    require_slices("w", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
    with pytest.raises(CertificateError, match="'w'"):
        require_slices("w", torch.tensor([1.0, 2.0]), found)


KINDS = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.int64,
    torch.int8,
    torch.bool,
]


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("size", [1, 3, 8, 17])
def test_one_other_number_anywhere_is_seen(dtype: torch.dtype, size: int) -> None:
    """Whatever the width of the numbers, and wherever in its storage the tensor begins."""
    held = torch.arange(size + 1).to(dtype)
    for tensor in (held, held[1:], held.expand(2, -1).t()):
        require_slices("w", tensor, tensor.clone())
        for place in range(tensor.shape[0]):
            other = tensor.clone()
            other[place] = ~other[place] if dtype is torch.bool else other[place] + 1
            with pytest.raises(CertificateError, match="'w'"):
                require_slices("w", tensor, other)


@pytest.mark.parametrize("dims", [{0: [0, 2, 3, 5, 6]}, {1: [1, 2]}, {0: [1, 4, 5, 6], 1: [0, 2]}, {}])
def test_every_part_of_what_is_kept_is_compared(dims: dict[int, list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART", 4)  # one or two rows at once
    whole = torch.randn(7, 3)
    kept = {d: torch.tensor(indices) for d, indices in dims.items()}
    right = whole.clone()
    for d, indices in kept.items():
        right = right.index_select(d, indices)
    require_kept("weight", whole, kept, right)
    for place in range(right.numel()):
        wrong = right.clone()
        wrong.view(-1)[place] += 1e-3
        with pytest.raises(CertificateError, match="weight"):
            require_kept("weight", whole, kept, wrong)
    with pytest.raises(CertificateError, match="weight"):
        require_kept("weight", whole, kept, right[:-1])
