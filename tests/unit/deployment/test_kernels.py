"""Products with packed weights equal dense ones in double precision, by every kernel that this machine has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from secateur.deployment import direct, native, operators
from secateur.deployment.formats import FORMATS, format_of
from secateur.deployment.linear import SparseLinear
from secateur.errors import InputError, RecipeError

KERNELS = [name for name in FORMATS.names() if format_of(name).kernel is not None]
PLAIN = 2.0**-24  # half a unit in the last place of float32


@pytest.fixture(params=[*native.LEVELS, native.WITHOUT])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(native.VARIABLE, request.param)
    if native.isa() != request.param:
        pytest.skip(f"{native.why_not() or 'this processor'} has no {request.param}")
    return request.param


def layer(rows: int, columns: int, zeros: float, dtype: torch.dtype, seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    found = nn.Linear(columns, rows, bias=seed % 2 == 0, dtype=dtype)
    found.weight.data.masked_fill_(torch.rand(rows, columns) < zeros, 0)
    if rows > 2:
        found.weight.data[0], found.weight.data[-1] = 0, 1
    return found


def agrees(packed: SparseLinear, x: Tensor) -> None:
    """Within what sums in float32 may lose, whatever their order, and one rounding to the dtype of the output."""
    weight, bias = packed.weight.double(), 0.0 if packed.bias is None else packed.bias.double()
    wanted = x.double() @ weight.t() + bias
    size = x.double().abs() @ weight.abs().t() + torch.as_tensor(bias).abs()
    found = packed(x)
    assert found.dtype == x.dtype
    assert found.shape == wanted.shape
    rounding = torch.finfo(x.dtype).eps
    assert (
        (found.double() - wanted).abs() <= size * (packed.in_features + 4) * PLAIN * 2 + wanted.abs() * rounding
    ).all()


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 50), columns=st.integers(1, 200), batch=st.integers(1, 9), threads=st.integers(1, 4),
    zeros=st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]), seed=st.integers(0, 99),
    dtypes=st.sampled_from([
        (torch.float32, None), (torch.float32, torch.bfloat16), (torch.float32, torch.int8), (torch.bfloat16, None),
        (torch.bfloat16, torch.float32), (torch.bfloat16, torch.int8),
    ]), step=st.integers(1, 3),
)  # fmt: skip
def test_products_equal_the_dense_ones(
    name: str, rows: int, columns: int, batch: int, threads: int, zeros: float, seed: int,
    dtypes: tuple[torch.dtype, torch.dtype | None], step: int,
) -> None:  # fmt: skip
    before, asked = torch.get_num_threads(), os.environ.get(native.VARIABLE)
    packed = SparseLinear.of(layer(rows, columns, zeros, dtypes[0], seed), name, dtypes[1])
    x = torch.randn(batch, columns * step, dtype=dtypes[0])[:, ::step]
    try:
        torch.set_num_threads(threads)
        for level in (*native.LEVELS, native.WITHOUT):
            os.environ[native.VARIABLE] = level
            if native.isa() == level and (level != "torch" or dtypes[0] == torch.float32):
                agrees(packed, x)
    finally:
        torch.set_num_threads(before)
        os.environ.pop(native.VARIABLE) if asked is None else os.environ.update({native.VARIABLE: asked})


@pytest.mark.parametrize("name", KERNELS)
def test_a_single_input_meets_every_row_and_column(isa: str, name: str) -> None:
    """Kernels of single inputs are others than those of batches, and their last steps others than those before."""
    for rows, columns, zeros in ((37, 500, 0.5), (64, 300, 0.0), (8, 40, 0.9), (24, 1000, 0.8)):
        for dtype in (torch.float32, torch.bfloat16, torch.int8):
            packed = SparseLinear.of(layer(rows, columns, zeros, torch.float32, rows), name, dtype)
            agrees(packed, torch.randn(1, columns))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", KERNELS)
def test_wide_gaps_many_inputs_and_more_dimensions(isa: str, name: str) -> None:
    wide = layer(35, 1500, 0.995, torch.float32, 0)
    agrees(SparseLinear.of(wide, name), torch.randn(2, 3, 11, 1500))
    agrees(SparseLinear.of(wide, name), torch.randn(1500))
    assert SparseLinear.of(wide, name)(torch.randn(0, 1500)).shape == (0, 35)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_compiled_code_unpacks_what_was_packed(name: str, dtype: torch.dtype) -> None:
    if native.why_not():
        pytest.skip(native.why_not())
    for rows, columns, zeros in ((1, 1, 0.0), (37, 75, 0.7), (16, 300, 0.99), (64, 32, 1.0)):
        packed = SparseLinear.of(layer(rows, columns, zeros, torch.float32, 3), name, dtype)
        found = native.unpacked(packed.parts, packed.scale, format_of(name), rows, columns)
        assert torch.equal(found, packed.weight.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_inputs_at_once_take_a_dense_product(
    isa: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    packed = SparseLinear.of(layer(20, 70, 0.5, dtype, 2), "slide16")
    calls: list[int] = []
    unpack = native.unpacked
    monkeypatch.setattr(native, "unpacked", lambda *given: calls.append(1) or unpack(*given))
    for count, dense in ((operators.MANY - 1, 0), (operators.MANY, 1)):
        calls.clear()
        agrees(packed, torch.randn(count, 70, dtype=dtype))
        assert len(calls) == (0 if isa == "torch" else dense)


def test_the_compiled_operator_gives_what_the_one_of_python_gives(isa: str) -> None:
    """Bit for bit, whatever comes: usual inputs, and those that it hands on."""
    if isa != "torch" and (problem := direct.connect(operators.MANY)):
        pytest.skip(problem)
    packed = SparseLinear.of(layer(20, 70, 0.5, torch.float32, 2), "slide32", torch.int8)
    x = torch.randn(3, 140)
    half = packed.bias.bfloat16()
    for came in (x[:, :70], x[:, ::2].contiguous(), x[:, :70].bfloat16(), x[:0, :70], x.view(3, 2, 70), x[0, :70]):
        for bias in (packed.bias, half, None):
            arguments = (packed.parts, packed.scale, bias, "slide32", 20, 70)
            found = torch.ops.secateur.packed_product(came, *arguments)
            assert torch.equal(found, torch.ops.secateur.packed_linear(came, *arguments))
    with pytest.raises(InputError, match="70 numbers"):
        packed(torch.randn(2, 69))


def test_what_numbers_of_eight_bits_lose_is_half_a_step() -> None:
    dense = layer(20, 70, 0.5, torch.float32, 1)
    packed = SparseLinear.of(dense, "bitmask", torch.int8)
    step = dense.weight.abs().amax(1, keepdim=True) / 127
    assert ((packed.weight - dense.weight).abs() <= step * 0.501).all()
    assert (packed.weight[dense.weight == 0] == 0).all()


def test_other_dtypes_take_the_plain_way(isa: str) -> None:
    dense = layer(9, 33, 0.5, torch.float64, 0)
    x = torch.randn(4, 33, dtype=torch.float64)
    assert torch.allclose(SparseLinear.of(dense, "bitmask")(x), dense(x), rtol=1e-12)


def test_a_wrong_input_is_named(isa: str) -> None:
    packed = SparseLinear.of(layer(4, 8, 0.5, torch.float32, 0), "bitmask")
    with pytest.raises(InputError, match="8 numbers"):
        packed(torch.randn(2, 9))
    with pytest.raises(InputError, match="floating"):
        packed(torch.ones(2, 8, dtype=torch.int64))


def test_an_unknown_instruction_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, "avx51")
    with pytest.raises(RecipeError, match="avx512"):
        native.isa()


WITHOUT = """
import torch, warnings
from torch import nn
from secateur.deployment.linear import SparseLinear
dense = nn.Linear(40, 20)
packed = SparseLinear.of(dense, "slide16")
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    found = [packed(torch.ones(2, 40)) for _ in range(3)]
assert len(told) == 1 and "no C++ compiler" in str(told[0].message) and "densify" in str(told[0].message), told
assert torch.allclose(found[0], dense(torch.ones(2, 40)), atol=1e-5)
"""


def test_without_compiler_the_plain_way_runs_with_one_warning(tmp_path) -> None:
    clean = {key: value for key, value in os.environ.items() if key not in (native.VARIABLE, "CXX")}
    environment = {**clean, "PATH": "", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", WITHOUT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


FUZZ = """
import os, torch
from torch import nn
from secateur.deployment.formats import FORMATS, format_of
from secateur.deployment.convolution import SparseConv2d
from secateur.deployment.linear import SparseLinear
from secateur.deployment import native
torch.manual_seed(0)
for name in FORMATS:
    if format_of(name).kernel is None:
        continue
    for rows, columns, batch, threads in ((1, 1, 1, 1), (7, 5, 2, 3), (33, 100, 5, 2), (40, 300, 1, 4), (16, 64, 3, 1)):
        torch.set_num_threads(threads)
        for zeros in (0.0, 0.6, 1.0):
            dense = nn.Linear(columns, rows)
            dense.weight.data.masked_fill_(torch.rand(rows, columns) < zeros, 0)
            for dtype in (torch.float32, torch.bfloat16, torch.int8):
                packed = SparseLinear.of(dense, name, dtype)
                for level in native.LEVELS:
                    os.environ[native.VARIABLE] = level
                    packed(torch.randn(batch, columns))
                native.unpacked(packed.parts, packed.scale, format_of(name), rows, columns)
for kernel, stride, padding, image in ((1, 1, 0, 5), (3, 1, 1, 7), (3, 2, 1, 40), (7, 2, 3, 33), (2, 2, 0, 3)):
    dense = nn.Conv2d(3, 40, kernel, stride=stride, padding=padding)
    dense.weight.data.masked_fill_(torch.rand_like(dense.weight) < 0.6, 0)
    for level in native.LEVELS:
        os.environ[native.VARIABLE] = level
        for relu in ("", "relu"):
            SparseConv2d.of(dense, names=("", relu))(torch.randn(2, 3, image, image))
print("clean")
"""


def _file(name: str) -> str:
    """Where the compiler has a library; the bare name where it has none."""
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=False)
    return found.stdout.strip()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_no_kernel_reads_or_writes_where_it_must_not(tmp_path) -> None:
    """With the address sanitizer, which sees PyTorch's tensors too because it replaces malloc."""
    home = native.home()
    if home is None or native.why_not():
        pytest.skip(native.why_not())
    runtime = _file("libasan.so")
    preload = f"{runtime} {_file('libstdc++.so')}"
    if not Path(runtime).is_absolute():
        pytest.skip("the compiler has no address sanitizer")
    # Checks as calls and lines without variables: the same checks, compiled in seconds where GCC took many minutes.
    as_calls = ("--param", "asan-instrumentation-with-call-threshold=0")
    flags = ("-O1", "-fsanitize=address", *as_calls, "-g1", "-fno-var-tracking", "-fno-omit-frame-pointer")
    home.build(tmp_path / "kernels.so", extra=flags)
    built = f"(ctypes.CDLL({str(tmp_path / 'kernels.so')!r}), '')"
    script = f"import ctypes\nfrom secateur.deployment import native\nnative._load = lambda: {built}\n"
    done = subprocess.run(
        [sys.executable, "-c", script + FUZZ], capture_output=True, text=True, check=False,
        env={**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout.strip() == "clean", done.stderr[-3000:]
