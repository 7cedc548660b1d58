from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import NonFiniteError, RecipeError
from secateur.files import canonical_json, seed_everything, stable_hash

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def shuffled(value):
    """The same data, all keys in the opposite order."""
    if isinstance(value, dict):
        return {key: shuffled(value[key]) for key in reversed(list(value))}
    return [shuffled(item) for item in value] if isinstance(value, list) else value


@settings(max_examples=150, deadline=None)
@given(PLAIN)
def test_canonical_json_reads_back_and_ignores_key_order(value):
    text = canonical_json(value)
    assert json.loads(text) == value
    assert canonical_json(shuffled(value)) == text
    assert canonical_json(json.loads(text)) == text
    assert text.endswith("\n")
    assert text.isascii()
    assert "\n" not in text[:-1]


@settings(max_examples=100, deadline=None)
@given(PLAIN, PLAIN)
def test_equal_hash_means_equal_text(first, second):
    assert (stable_hash(first) == stable_hash(second)) == (canonical_json(first) == canonical_json(second))


class Words(str):
    __slots__ = ()


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        ({"a": [1, {"b": [0.5, float("nan")]}]}, NonFiniteError, r"at \$\.a\[1\]\.b\[1\]"),
        ([1.0, -float("inf")], NonFiniteError, r"at \$\[1\]"),
        ({"a": {3: 1}}, TypeError, r"3 at \$\.a is not text"),
        ({"a": (1, {1, 2})}, TypeError, r"set at \$\.a\[1\]"),
        ([[[object()]]], TypeError, r"object at \$\[0\]\[0\]\[0\]"),
        ({"a": np.int64(3)}, TypeError, r"int64 at \$\.a"),
    ],
)
def test_what_is_not_plain_is_named_with_its_place(value, error, text):
    with pytest.raises(error, match=text):
        canonical_json(value)


def test_look_alikes_of_plain_types_are_written_like_them():
    from types import MappingProxyType

    inner = {"b": 1, "a": (np.float64(0.5), Words("x"), True)}
    assert canonical_json(MappingProxyType(inner)) == canonical_json({"a": [0.5, "x", True], "b": 1})


def test_data_that_hold_themselves_are_refused_and_not_followed_for_ever():
    loop = []
    loop.append(loop)
    with pytest.raises(RecursionError):
        canonical_json({"a": loop})


def test_canonical_json_golden():
    assert canonical_json({"b": [1.0, -0.0, 1e-7, 0.1], "a": (True, None, "é")}) == (
        '{"a":[true,null,"\\u00e9"],"b":[1.0,-0.0,1e-07,0.1]}\n'
    )
    assert stable_hash([]) == hashlib.sha256(b"[]\n").hexdigest()


def test_the_hash_is_the_same_in_another_process():
    value = {name: [name] for name in "zebra"}
    code = f"from secateur.files.seeds import stable_hash; print(stable_hash({value!r}))"
    for seed in "01":
        run = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={"PYTHONHASHSEED": seed},
            check=True,
        )
        assert run.stdout.strip() == stable_hash(value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), np.float64("nan")])
def test_canonical_json_names_the_place_of_a_non_finite_number(bad):
    with pytest.raises(NonFiniteError, match=r"\$\.a\[1\]\.b"):
        canonical_json({"a": [0, {"b": bad}]})


@pytest.mark.parametrize("bad", [{1: 2}, {"a": {None: 1}}, {1, 2}, b"x", np.int64(1), object()])
def test_canonical_json_takes_plain_data_only(bad):
    with pytest.raises(TypeError, match="not"):
        canonical_json({"x": bad})


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))  # noqa: NPY002


def test_seed_everything_repeats_and_restores():
    torch.manual_seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    with seed_everything(7):
        first = draw()
    with seed_everything(7):
        assert draw() == first
    with seed_everything(8):
        assert not set(draw()) & set(first)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])
    assert torch.initial_seed() == 5


def test_seed_everything_restores_after_an_error_and_nests():
    torch.manual_seed(5)
    expected = torch.rand(())
    torch.manual_seed(5)

    def work() -> None:
        draw()
        with seed_everything(2):
            inner = draw()
        assert inner != draw()
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"), seed_everything(1):
        work()
    assert torch.rand(()) == expected


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, True, "1", None])
def test_seed_out_of_range(seed):
    with pytest.raises(RecipeError, match="seed"), seed_everything(seed):
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_seed_everything_restores_cuda():
    torch.rand(1, device="cuda")
    before = torch.cuda.get_rng_state()
    with seed_everything(3):
        first = torch.rand(4, device="cuda")
    with seed_everything(3):
        assert torch.equal(torch.rand(4, device="cuda"), first)
    assert torch.equal(torch.cuda.get_rng_state(), before)
