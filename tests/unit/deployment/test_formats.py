"""Layouts: what was packed comes back bit for bit, whatever it is, and what pack cannot have written is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.deployment.formats import FORMATS, format_of
from secateur.deployment.formats.base import same_bits
from secateur.errors import InputError, RecipeError

DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.float16, torch.float64)
EVERY = [name for name in FORMATS.names() if name != "nm"]


def matrix(rows: int, columns: int, zeros: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(rows, columns, generator=generator).mul(40).to(dtype)
    # Not by a product: a negative number times nothing is -0.0, which is a number to keep.
    return found.masked_fill(torch.rand(rows, columns, generator=generator) < zeros, 0)


def is_back(name: str, weight: Tensor) -> bool:
    layout = format_of(name)
    parts = layout.pack(weight)
    assert len(parts) == len(layout.parts)
    assert all(type(part) is Tensor and part.layout is torch.strided and part.is_contiguous() for part in parts)
    layout.check(parts, *weight.shape)
    return same_bits(layout.unpack(parts, *weight.shape), weight.contiguous())


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40), columns=st.integers(1, 90), zeros=st.sampled_from([0.0, 0.3, 0.5, 0.9, 0.99, 1.0]),
    dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99),
)  # fmt: skip
def test_everything_comes_back(name: str, rows: int, columns: int, zeros: float, dtype: torch.dtype, seed: int) -> None:
    assert is_back(name, matrix(rows, columns, zeros, dtype, seed))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_numbers_empty_and_full_rows_and_views_come_back(name: str, dtype: torch.dtype) -> None:
    weight = matrix(35, 1100, 0.995, dtype)
    weight[3], weight[4], weight[34, :] = 0, 1, 0
    weight[0, :4] = torch.tensor([-0.0, float("nan"), float("inf"), -float("inf")], dtype=dtype)
    weight[1, 1099] = -0.0  # a gap of more than a thousand columns in front of it
    assert is_back(name, weight)
    assert is_back(name, weight.t())
    assert is_back(name, weight[::3, 5::7])


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9), columns=st.integers(1, 70),
    pattern=st.sampled_from([(1, 4), (2, 4), (1, 8), (4, 8), (8, 16)]),
    dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99), fewer=st.booleans(),
)  # fmt: skip
def test_patterns_come_back(
    rows: int, columns: int, pattern: tuple[int, int], dtype: torch.dtype, seed: int, fewer: bool
) -> None:
    n, m = pattern
    groups = -(-columns // m)
    rank = torch.rand(rows, groups, m, generator=torch.Generator().manual_seed(seed)).argsort(-1).argsort(-1)
    weight = matrix(rows, columns, 0.4 if fewer else 0.0, dtype, seed).masked_fill(
        (rank >= n).flatten(1)[:, :columns], 0
    )
    layout = format_of("nm")
    if layout.why_not(weight):  # a last group that is cut short may be too full
        assert columns % m
        return
    assert is_back("nm", weight)


@pytest.mark.parametrize("name", FORMATS.names())
@pytest.mark.parametrize("zeros", [0.0, 0.9, 1.0])
def test_nothing_is_made_on_another_device_than_the_matrix(name: str, zeros: float) -> None:
    """The device at hand is the other one here: a tensor that is made without naming its own has no numbers."""
    weight = matrix(35, 600, zeros, torch.float32)
    weight[:, 1::2] = 0  # every format takes this
    with torch.device("meta"):
        assert is_back(name, weight)


def test_a_matrix_without_pattern_is_refused_as_one() -> None:
    with pytest.raises(InputError, match="nm"):
        format_of("nm").pack(torch.ones(4, 8))


@pytest.mark.parametrize("name", FORMATS.names())
def test_damage_is_refused(name: str) -> None:
    weight = matrix(40, 64, 0.5, torch.float32)
    weight[:, 1::2] = 0
    layout = format_of(name)
    whole = layout.pack(weight)
    for number, part in enumerate(whole):
        if part.dtype.is_floating_point and name in ("dense", "block"):
            continue  # any number is a number
        shorter = [*whole[:number], part[:-1], *whole[number + 1 :]]
        with pytest.raises(InputError, match="damaged"):
            layout.check(shorter, *weight.shape)
        if part.dtype.is_floating_point:
            continue
        wild = part.clone()
        wild.flatten()[-1] += 100
        with pytest.raises(InputError, match="damaged"):
            layout.check([*whole[:number], wild, *whole[number + 1 :]], *weight.shape)


def test_the_bytes_are_those_of_the_layout() -> None:
    weight = matrix(256, 512, 0.5, torch.bfloat16)
    kept, slots = int(weight.count_nonzero()), weight.numel()
    size = {name: sum(p.numel() * p.element_size() for p in format_of(name).pack(weight)) for name in EVERY}
    assert size["dense"] == 2 * slots
    assert size["bitmask"] == pytest.approx(2 * kept + slots / 8, rel=0.01)
    assert 3 * kept <= size["delta"] <= 3.4 * kept
    # Half a byte per place and a window of four bytes for 16 lanes, which wait in less than every sixth step.
    assert 2.75 * kept <= size["slide16"] <= 1.2 * 2.75 * kept
    assert 3.25 * kept <= size["slide32"] <= 1.1 * 3.25 * kept


def test_an_unknown_format_is_named() -> None:
    with pytest.raises(RecipeError, match="bitmask"):
        format_of("bitmaks")
