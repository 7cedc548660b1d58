"""The exact border, against a sort by numpy; with chunks of a few numbers every path is taken."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.amounts import border, select
from secateur.amounts.border import assemble, common_dtype, find_border, flat_chunks, floored, kept_chunks

SINGLE = st.floats(allow_nan=False, allow_infinity=False, width=32)
# Neighbours among doubles, which are one number in single precision, and numbers at both ends of the range.
DOUBLE = st.one_of(
    st.sampled_from([1.0, 1.0 + 2**-52, 1.0 - 2**-53, -1.0, -1.0 - 2**-52, 0.0, -0.0, 5e-324, -5e-324, 1.7e308]),
    st.floats(allow_nan=False, allow_infinity=False),
)
CHUNKS = st.sampled_from([1, 2, 3, 7, 1 << 18])


def lowest(values, count):
    """Mark the `count` lowest values, as a selection from one group does."""
    if count == 0:
        return torch.zeros(values.shape, dtype=torch.bool)
    dtype = common_dtype([values])
    chunks = partial(flat_chunks, values, dtype)
    return ~assemble(kept_chunks(chunks(), find_border(chunks, count, values.numel(), dtype)), values)


def expected(values, count):
    """Which of the values are the `count` lowest, equal ones from the front."""
    order = np.lexsort((np.arange(len(values)), np.asarray(values) + 0.0))
    marked = np.zeros(len(values), bool)
    marked[order[:count]] = True
    return marked.tolist()


@pytest.fixture
def chunk(monkeypatch):
    return lambda size: monkeypatch.setattr(border, "CHUNK", size)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from([torch.float32, torch.float64]), CHUNKS)
def test_lowest_is_a_sort(data, dtype, size):
    values = data.draw(st.lists(SINGLE if dtype == torch.float32 else DOUBLE, min_size=1, max_size=20))
    values += data.draw(st.lists(st.sampled_from(values), max_size=10))  # ties
    count = data.draw(st.integers(0, len(values)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(border, "CHUNK", size)
        found = lowest(torch.tensor(values, dtype=dtype), count)
    assert found.tolist() == expected(values, count)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_a_short_format_has_its_place(dtype, chunk):
    chunk(1000)
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    shuffled = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))]
    values = shuffled.double().numpy()
    for count in (1, len(every) // 2, len(every) // 2 + 1, len(every)):
        assert lowest(shuffled, count).tolist() == expected(values, count)


@pytest.mark.parametrize("size", [1, 5, 24, 1 << 18])
def test_layouts_are_read_in_row_major_order(chunk, size):
    chunk(size)
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 4, (2, 3, 4, 5), generator=generator).float()
    for turned in (values, values.permute(3, 1, 0, 2), values.to(memory_format=torch.channels_last), values[:, ::2]):
        flat = turned.contiguous().flatten().tolist()
        for count in (0, 1, len(flat) // 2, len(flat)):
            assert lowest(turned, count).flatten().tolist() == expected(flat, count)


def test_scalars_and_nothing():
    assert lowest(torch.tensor(3.0), 1).tolist() is True
    assert lowest(torch.zeros(0, 3), 0).shape == (0, 3)


@settings(max_examples=100, deadline=None)
@given(st.lists(SINGLE, min_size=1, max_size=12), st.integers(0, 14), st.sampled_from([1, 3, 1 << 18]))
def test_the_best_are_lifted_to_infinity(values, floor, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(border, "CHUNK", size)
        found = torch.cat(list(floored(torch.tensor(values), floor, torch.float32)()))
    free = expected(values, max(len(values) - floor, 0))
    assert found.tolist() == [value if goes else np.inf for value, goes in zip(values, free, strict=True)]


def test_more_ties_than_a_chunk_holds(chunk):
    chunk(4)
    values = torch.tensor([2.0] * 5 + [1.0] * 30 + [0.0] * 5)
    found = find_border(lambda: values.split(4), 20, 40, torch.float32)
    assert (found.value, found.ties) == (1.0, 15)
    assert lowest(values, 20).tolist() == expected(values, 20)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["b", "a", "c"]), st.lists(DOUBLE, min_size=1, max_size=8), min_size=1),
    st.data(),
    st.sampled_from([2, 1 << 18]),
)
def test_pools_of_doubles_and_singles_are_one_sort(scores, data, size):
    single = data.draw(st.sets(st.sampled_from(sorted(scores))))
    tensors = {n: torch.tensor(v, dtype=torch.float64) for n, v in scores.items()}
    for name in single:
        tensors[name] = tensors[name].clamp(-3e38, 3e38).float()
    units = [(x, n, i) for n, t in tensors.items() for i, x in enumerate(t.double().tolist())]
    count = data.draw(st.integers(0, len(units)))
    gone = {(n, i) for _, n, i in sorted(units)[:count]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(border, "CHUNK", size)
        keep = select(tensors, count=count)
    assert {n: m.tolist() for n, m in keep.items()} == {
        n: [(n, i) not in gone for i in range(len(t))] for n, t in tensors.items()
    }


@pytest.mark.parametrize("with_singles", [False, True])
@pytest.mark.parametrize("scope", ["global", "local", "row"])
def test_doubles_are_not_rounded(scope, with_singles):
    """Two numbers that single precision cannot tell apart; by index the wrong one would go."""
    close = torch.tensor([[1.0 + 2**-40, 1.0]], dtype=torch.float64)
    scores = {"a": close, **({"b": torch.tensor([[3.0, 2.0]])} if with_singles else {})}
    keep = select(scores, count=1, scope="global") if scope == "global" else select(scores, sparsity=0.5, scope=scope)
    assert keep["a"].tolist() == [[True, False]]


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that an operation makes, masks apart."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        shares = any(r.alias_info is not None for r in func._schema.returns)
        if isinstance(out, torch.Tensor) and not shares and out.dtype != torch.bool:
            self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        return out


@pytest.mark.sampled(6)
@pytest.mark.parametrize("options", [{}, {"min_keep": 10}, {"scope": "local"}, {"scope": "row"}], ids=str)
@pytest.mark.parametrize("case", ["plain", "turned", "equal"])
def test_a_selection_copies_no_scores(chunk, options, case):
    chunk(4096)
    scores = {name: torch.ones(500, 1000) if case == "equal" else torch.rand(500, 1000) for name in "abc"}
    if case == "turned":
        scores = {name: score.T for name, score in scores.items()}
    with Largest() as seen:
        select(scores, sparsity=0.5, **options)
    assert 0 < seen.bytes <= 8 << 16  # a histogram; one tensor of scores has 2,000,000 bytes


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=5))
def test_the_best_of_all_chunks_is_the_last_of_equal_ones(chunks: list[list[int]]) -> None:
    flat = [value for chunk in chunks for value in chunk]
    wanted = max(range(len(flat)), key=lambda place: (flat[place], place))
    assert border._place_of_best(torch.tensor(chunk, dtype=torch.float32) for chunk in chunks) == wanted
