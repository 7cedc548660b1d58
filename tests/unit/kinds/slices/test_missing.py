"""Arithmetic with missing slices is the arithmetic of what is there: every operator beside a run on kept slices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from secateur.kinds.slices.missing import Missing

NAN = float("nan")
SIZE = 6


def without(tensor: Tensor, d: int, gone: list[int]) -> Tensor:
    result = tensor.clone()
    result.index_fill_(d, torch.tensor(gone), NAN)
    return result


def kept(tensor: Tensor, d: int, gone: list[int]) -> Tensor:
    return tensor.index_select(d, torch.tensor([i for i in range(tensor.shape[d]) if i not in gone]))


def same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


gone_units = st.lists(
    st.integers(0, SIZE - 1), min_size=1, max_size=SIZE - 2, unique=True
)  # two are left: a variance needs them

# What puts positions of dimension 1 together: the result has no such dimension, or has it at full size.
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(1),
    "mean": lambda x: x.mean(1),
    "mean of several": lambda x: x.mean((1, 2)),
    "mean of all": lambda x: x.mean(),
    "amax": lambda x: x.amax(1),
    "max": lambda x: x.max(1).values,
    "min": lambda x: x.min(1).values,
    "var": lambda x: x.var(1),
    "std": lambda x: x.std(1, correction=0),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=1),
    "logsumexp": lambda x: x.logsumexp(1),
    "prod": lambda x: x.prod(1),
    "median": lambda x: x.median(1).values,
    "largest two": lambda x: x.topk(1, 1).values,
    "how many are positive": lambda x: (x > 0).float().sum(1),
    "share of positives": lambda x: (x > 0).float().mean(1),
    "any above": lambda x: (x > 0.5).any(1),
}
FULL_SIZE: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(1),
    "log softmax": lambda x: x.log_softmax(1),
    "running sum": lambda x: x.cumsum(1),
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "normalize": lambda x: functional.normalize(x, dim=1),
    "layer norm by hand": lambda x: (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-5).sqrt(),
    "repaired": lambda x: torch.nan_to_num(x),
}


@pytest.mark.parametrize("name", REDUCTIONS)
@given(gone=gone_units)
@settings(max_examples=8, deadline=None)
def test_reductions_run_over_what_is_there(name: str, gone: list[int]) -> None:
    x = torch.randn(3, SIZE, 4)
    with Missing():
        found = REDUCTIONS[name](without(x, 1, gone))
    same(found, REDUCTIONS[name](kept(x, 1, gone)))


@pytest.mark.parametrize("name", FULL_SIZE)
@given(gone=gone_units)
@settings(max_examples=8, deadline=None)
def test_what_keeps_its_size_keeps_what_is_missing(name: str, gone: list[int]) -> None:
    x = torch.randn(3, SIZE, 4)
    with Missing():
        found = FULL_SIZE[name](without(x, 1, gone))
    assert torch.isnan(found.index_select(1, torch.tensor(gone))).all()
    same(kept(found, 1, gone), FULL_SIZE[name](kept(x, 1, gone)))


def _into_zeros(x: Tensor) -> Tensor:
    made = x.new_zeros(x.shape[0] + 2, *x.shape[1:])
    made[1 : 1 + len(x)] = x
    return made


def _row_by_row(x: Tensor) -> Tensor:
    made = torch.zeros(x.shape[0], x.shape[1], x.shape[2] + 1)
    for i in range(len(x)):
        made[i, :, : x.shape[2] - i] = x[i, :, : x.shape[2] - i]
    return made


def _emptied(x: Tensor) -> Tensor:
    x = x.clone()
    x[torch.tensor([True, False, True])] = 0
    return x


def _behind(x: Tensor) -> Tensor:
    made = x.new_zeros(*x.shape[:2], 7)
    made[:, :, torch.tensor([4, 0, 2, 6])] = x
    return made


# What puts data beside a number that fills a place, or beside other data: units lie in dimension 1.
PLACED: dict[str, Callable[[Tensor], Tensor]] = {
    "padded behind": lambda x: functional.pad(x, (0, 2)),
    "padded in front": lambda x: functional.pad(x, (0, 0, 0, 0, 2, 0), value=3.0),
    "filled": lambda x: x.masked_fill(torch.arange(4) > 1, -5.0),
    "one or the other": lambda x: torch.where(torch.arange(4) > 1, x, torch.zeros(())),
    "the other or one": lambda x: torch.where(torch.arange(4) > 1, torch.zeros_like(x), x),
    "moved by a step": lambda x: torch.cat([torch.zeros_like(x[:1]), x[:-1]]),
    "one on the other": lambda x: torch.stack([torch.ones_like(x), x], 2).flatten(2),
    "scattered": lambda x: x.new_zeros(5, *x.shape[1:]).scatter(
        0, torch.tensor([4, 0, 2])[:, None, None].expand_as(x), x
    ),
    "added by number": lambda x: x.new_zeros(5, *x.shape[1:]).index_add(0, torch.tensor([4, 0, 0]), x),
    "copied by number": lambda x: x.new_zeros(5, *x.shape[1:]).index_copy(0, torch.tensor([4, 0, 2]), x),
    "put by number": lambda x: x.new_zeros(5, *x.shape[1:]).index_put((torch.tensor([4, 0, 2]),), x),
    "put behind": _behind,
    "rows emptied": _emptied,
    "written into zeros": _into_zeros,
    "written row by row": _row_by_row,
}


@pytest.mark.parametrize("name", PLACED)
@given(gone=gone_units)
@settings(max_examples=6, deadline=None)
def test_what_fills_a_place_brings_no_missing_unit_back(name: str, gone: list[int]) -> None:
    """A norm behind it, by hand, is the norm of what is kept."""
    norm = FULL_SIZE["layer norm by hand"]
    x = torch.randn(3, SIZE, 4)
    with Missing():
        placed = PLACED[name](without(x, 1, gone))
        found = norm(placed)
    assert torch.isnan(placed.index_select(1, torch.tensor(gone))).all()
    same(kept(placed, 1, gone), PLACED[name](kept(x, 1, gone)))
    same(kept(found, 1, gone), norm(PLACED[name](kept(x, 1, gone))))


def test_parts_that_are_joined_along_units_keep_their_own() -> None:
    x, y = torch.randn(2, 3), torch.randn(2, 4)
    with Missing():
        found = torch.cat([without(x, 1, [0]), y, without(x, 1, [2])], 1)
        padded = functional.pad(without(x, 1, [0, 2]), (1, -1))
    assert torch.isnan(found).all(0).nonzero().flatten().tolist() == [0, 9]
    assert torch.isnan(padded).all(0).nonzero().flatten().tolist() == [1]
    assert torch.isnan(found).any(0).sum() == 2


def test_numbers_that_are_no_missing_unit_are_moved_as_they_are() -> None:
    """NaN that does not fill a slice is a result: it marks nothing."""
    x = torch.randn(3, SIZE, 4)
    x[0, 2, 1] = NAN
    with Missing():
        for name, place in PLACED.items():
            found = place(x)
            assert int(torch.isnan(found).sum()) <= 1, name


@given(gone=gone_units, other=gone_units)
@settings(max_examples=20, deadline=None)
def test_a_product_leaves_out_what_either_factor_misses(gone: list[int], other: list[int]) -> None:
    x, weight = torch.randn(2, 5, SIZE), torch.randn(7, SIZE)
    both = sorted({*gone, *other})
    if len(both) == SIZE:
        return
    with Missing():
        found = functional.linear(without(x, 2, gone), without(weight, 1, other))
    same(found, functional.linear(kept(x, 2, both), kept(weight, 1, both)))


@given(gone=gone_units)
@settings(max_examples=10, deadline=None)
def test_rows_of_a_weight_that_are_missing_make_results_that_are(gone: list[int]) -> None:
    x, weight, bias = torch.randn(2, 5), torch.randn(SIZE, 5), torch.randn(SIZE)
    with Missing():
        found = functional.linear(x, without(weight, 0, gone), without(bias, 0, gone))
    assert torch.isnan(found[:, gone]).all()
    same(kept(found, 1, gone), functional.linear(x, kept(weight, 0, gone), kept(bias, 0, gone)))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2, SIZE])
def test_convolutions(transposed: bool, groups: int) -> None:
    """Whole groups of channels go, or one channel of each group: what a cut can do."""
    gone = [1, 4] if groups == 2 else [2]  # the second of three in both groups, one of all, or one group
    x = torch.randn(2, SIZE, 7)
    convolve = functional.conv_transpose1d if transposed else functional.conv1d
    inside = SIZE // groups
    weight = torch.randn(SIZE, 1, 3) if transposed else torch.randn(groups, inside, 3)
    if transposed:
        lost = without(weight, 0, gone)
        less = kept(weight, 0, gone)
    else:
        lost = without(weight, 0, gone) if groups == SIZE else without(weight, 1, [1] if groups == 2 else gone)
        less = kept(weight, 0, gone) if groups == SIZE else kept(weight, 1, [1] if groups == 2 else gone)
    left = groups if groups < SIZE else SIZE - 1
    with Missing():
        found = convolve(without(x, 1, gone), lost, groups=groups)
    wanted = convolve(kept(x, 1, gone), less, groups=left)
    if groups == SIZE:
        assert torch.isnan(found[:, gone]).all()
        found = kept(found, 1, gone)
    same(found, wanted)


@pytest.mark.parametrize("causal", [False, True])
def test_fused_attention_without_heads_and_coordinates(causal: bool) -> None:
    """The scale is that of the whole width, as the code of the original takes it."""
    q, k, v = (torch.randn(2, 4, 5, 8) for _ in range(3))
    heads, inner, outer = [1], [0, 5], [2]
    lost = [without(without(t, 1, heads), 3, inner) for t in (q, k)]
    value = without(without(v, 1, heads), 3, outer)
    attend = functional.scaled_dot_product_attention
    with Missing(), torch.no_grad():
        found = attend(*lost, value, is_causal=causal)
    less = [kept(kept(t, 1, heads), 3, inner) for t in (q, k)]
    wanted = attend(*less, kept(kept(v, 1, heads), 3, outer), is_causal=causal, scale=8**-0.5)
    assert torch.isnan(found[:, heads]).all()
    assert torch.isnan(found[..., outer]).all()
    same(kept(kept(found, 1, heads), 3, outer), wanted)


@pytest.mark.parametrize("norm", ["layer", "rms", "group", "instance", "batch"])
def test_norms_see_what_is_there(norm: str) -> None:
    x = torch.randn(3, SIZE, 5)
    gone = [0, 3] if norm == "group" else [1, 4]
    weight, bias = torch.rand(SIZE) + 0.5, torch.randn(SIZE)
    run: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "layer": lambda x, w, b: functional.layer_norm(x.transpose(1, 2), (x.shape[1],), w, b).transpose(1, 2),
        "rms": lambda x, w, b: functional.rms_norm(x.transpose(1, 2), (x.shape[1],), w).transpose(1, 2),
        "group": lambda x, w, b: functional.group_norm(x, 2, w, b),
        "instance": lambda x, w, b: functional.instance_norm(x, None, None, w, b),
        "batch": lambda x, w, b: functional.batch_norm(x, None, None, w, b, training=True),
    }
    with Missing():
        found = run[norm](without(x, 1, gone), without(weight, 0, gone), without(bias, 0, gone))
    assert torch.isnan(found[:, gone]).all()
    same(kept(found, 1, gone), run[norm](kept(x, 1, gone), kept(weight, 0, gone), kept(bias, 0, gone)))


def test_places_are_those_of_the_whole_tensor() -> None:
    x = torch.tensor([[5.0, NAN, 9.0, 1.0]])
    with Missing():
        assert x.argmax(1).item() == 2
        assert x.max(1).indices.item() == 2
        assert x.topk(2, 1).indices.tolist() == [[2, 0]]
        assert x.sort(1).indices[0, :3].tolist() == [3, 0, 2]


def test_a_number_gone_wrong_is_no_missing_slice() -> None:
    x = torch.ones(3, 4)
    x[0, 1] = NAN
    with Missing():
        total, product = x.sum(1), functional.linear(x, torch.ones(2, 4))
    assert torch.isnan(total).tolist() == [True, False, False]
    assert torch.isnan(product).all(1).tolist() == [True, False, False]


def test_missing_is_not_nan_to_the_model() -> None:
    x = without(torch.randn(2, 4), 1, [2])
    with Missing():
        assert not torch.isnan(x).any()
        assert torch.isfinite(x).all()


def test_weights_computed_from_weights_keep_their_value_or_are_noted() -> None:
    """A row over its own norm loses nothing when other rows go; a whole over its norm does."""
    whole, x = torch.randn(SIZE, 3), torch.randn(2, 3)
    for dims, changes in (((1,), False), ((0, 1), True)):
        poisoned = without(whole, 0, [1])
        mode = Missing([(poisoned, whole)])
        with mode:
            functional.linear(x, poisoned / torch.linalg.vector_norm(poisoned, dim=dims, keepdim=True))
        assert bool(mode.changed) is changes


def test_nothing_missing_is_plain_arithmetic() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        with Missing():
            found = net.eval()(x)
        assert torch.equal(found, net(x))
