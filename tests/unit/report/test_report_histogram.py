import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from secateur.errors import NonFiniteError, RecipeError
from secateur.report import distribution, histogram, near_zero
from secateur.report.layers import measure_layer

FINITE = {"allow_nan": False, "allow_infinity": False}


@pytest.mark.parametrize("bins", [1, 7, 40])
def test_it_equals_numpy(bins):
    values = torch.randn(5000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    counts, edges = np.histogram(values.numpy(), bins=bins)
    found = histogram(values, bins)
    assert found.counts == tuple(counts)
    assert found.edges == tuple(edges)


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(np.float64, st.integers(1, 30), elements=st.floats(**FINITE) | st.sampled_from([0.0, 1.0, 1e308])),
    st.integers(1, 9),
)
def test_every_element_is_counted_in_the_bin_that_numpy_puts_it_in(values, bins):
    found = histogram(torch.from_numpy(values), bins)
    edges = np.array(found.edges)
    assert sum(found.counts) == values.size
    assert edges[0] <= values.min()
    assert values.max() <= edges[-1]
    assert np.isfinite(edges).all()
    if (edges[1:] > edges[:-1]).all():
        assert found.counts == tuple(np.histogram(values, bins=edges)[0])


def old(values: torch.Tensor, bins: int) -> tuple[int, ...]:
    """Bins in float64, one pass each: what histograms were before they were made fast."""
    wide = values.double().flatten()
    edges = np.linspace(float(wide.min()), float(wide.max()), bins + 1)
    return tuple(np.histogram(wide.numpy(), bins=edges)[0])


@pytest.mark.parametrize("bins", [1, 10, 40, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 0.5, -30.0])
def test_single_precision_counts_are_those_of_double_precision(offset, dtype, bins):
    """Numbers on an edge, next to it, and around an offset that leaves few bits for the range."""
    torch.manual_seed(4)
    ends = torch.tensor([-1.0, 1.0])
    on_edges = torch.linspace(-1, 1, bins + 1, dtype=torch.float64).float()
    beside = [torch.nextafter(on_edges, torch.full_like(on_edges, side)) for side in (-9.0, 9.0)]
    values = torch.cat([ends, on_edges, *(near.clamp(-1, 1) for near in beside), torch.randn(3000).clamp(-1, 1)])
    values = (values + offset).to(dtype)
    assert histogram(values, bins).counts == old(values, bins)


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        st.integers(1, 30),
        elements=st.floats(width=32, **FINITE) | st.sampled_from([0.0, 1.0, 3e38, 1e-45]),
    ),
    st.integers(1, 9),
)
def test_single_precision_of_any_range(values, bins):
    found = histogram(torch.from_numpy(values), bins)
    edges = np.array(found.edges)
    assert sum(found.counts) == values.size
    if (edges[1:] > edges[:-1]).all():
        assert found.counts == tuple(np.histogram(values.astype(np.float64), bins=edges)[0])


def test_doubles_whose_range_is_a_few_units_in_the_last_place():
    values = 1e9 + torch.arange(0, 40, dtype=torch.float64) * 2.0**-22
    for bins in (2, 3, 7, 20):
        assert histogram(values, bins).counts == old(values, bins)


@pytest.mark.parametrize("value", [0.0, 3.0, -1e-30, 1e30, 1.7e308, -1.7e308])
def test_constant_tensors_have_proper_edges(value):
    found = histogram(torch.full((9,), value, dtype=torch.float64), 5)
    assert sum(found.counts) == 9
    assert found.edges[0] < found.edges[-1]


def test_empty_tensors_are_all_zeros():
    found = histogram(torch.empty(0, 3), 4)
    assert found.counts == (0, 0, 0, 0)
    assert near_zero(torch.empty(0)) == 0


def test_chunks_change_nothing(monkeypatch):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(2))
    whole, small = histogram(values), near_zero(values)
    monkeypatch.setattr(sys.modules[histogram.__module__], "_CHUNK", 64)
    assert histogram(values) == whole
    assert near_zero(values) == small


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.bfloat16])
def test_all_real_dtypes_and_strides_are_counted(dtype):
    values = torch.tensor([[0, 1, 1], [0, 0, 1]], dtype=dtype).T
    assert histogram(values, 2).counts == (3, 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_named_with_its_index(bad):
    values = torch.zeros(2, 3)
    values[1, 1] = bad
    for function in (histogram, near_zero):
        with pytest.raises(NonFiniteError, match="flat index 4"):
            function(values)


def test_wrong_arguments_are_refused():
    with pytest.raises(RecipeError):
        histogram(torch.ones(3), 0)


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.complex64, 1.0), (torch.complex128, 1.0), (torch.complex128, 1e200)]
)
def test_complex_numbers_are_counted_by_their_magnitudes(dtype, scale):
    values = torch.randn(50, 8, generator=torch.Generator().manual_seed(5), dtype=dtype)
    values[0, :3] *= 1e-4
    values *= scale
    magnitudes = values.abs().to(torch.float64).numpy()
    found = histogram(values.t(), 7)
    counts, _ = np.histogram(magnitudes, bins=np.array(found.edges))
    assert found.counts == tuple(counts)
    assert found.edges[0] == magnitudes.min()
    assert found.edges[-1] == magnitudes.max()
    small = magnitudes / scale < 1e-2 * np.sqrt(np.square(magnitudes / scale).mean())
    assert near_zero(values) == small.mean() >= 3 / 400


@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
def test_near_zero_is_the_share_below_a_hundredth_of_the_root_mean_square(scale):
    values = torch.randn(4000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = (values.abs() < 1e-2 * values.square().mean().sqrt()).double().mean()
    assert near_zero(values * scale) == pytest.approx(float(expected), abs=1e-3)


def test_near_zero_of_single_precision_is_the_share_of_double_precision():
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(5)) * 0.02
    wide = values.double()
    expected = float((wide.abs() < 1e-2 * wide.square().mean().sqrt()).double().mean())
    assert near_zero(values) == distribution(values).near_zero == expected
    assert distribution(values).histogram == histogram(values)


def test_a_bound_between_two_neighbours_keeps_them_apart():
    """Rounded to single precision, the bound would be the lower of the two, which is not below itself."""
    lower = torch.tensor(0.01)
    upper = torch.nextafter(lower, torch.tensor(1.0))
    values = torch.stack([lower, upper, torch.tensor(1.0), torch.tensor(-1.0)])
    between = float(lower) + 0.25 * (float(upper) - float(lower))
    fraction = between / float(values.double().square().mean().sqrt())
    assert near_zero(values, fraction=fraction) == 0.25


def test_zeros_beside_the_tiniest_numbers_are_near_zero():
    values = torch.tensor([5e-324, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert near_zero(values) == 0.75


def test_near_zero_of_zeros_is_everything():
    assert near_zero(torch.zeros(5)) == 1


def test_a_layer_counts_its_units_and_finds_the_cut():
    scores = torch.tensor([3.0, 1.0, 2.0, 4.0])
    layer = measure_layer("fc", torch.ones(4, 5), params_after=10, scores=scores, keep=scores > 2)
    assert (layer.removed, layer.total, layer.sparsity, layer.score_cut) == (2, 4, 0.5, 2.0)
    assert (layer.shape, layer.params_before, layer.params_after, layer.near_zero) == ((4, 5), 20, 10, 0)
    untouched = measure_layer("fc", torch.ones(4, 5), params_after=20, scores=scores, keep=scores > 0)
    assert untouched.score_cut is None
