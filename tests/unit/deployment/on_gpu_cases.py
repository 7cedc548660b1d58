"""The Triton kernel against products in double precision: run by `test_on_gpu`, on the interpreter or on a GPU.

A file of its own, because Triton asks once, at its import, whether it interprets.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.deployment import native, on_gpu, planner
from secateur.deployment.contest import Contest
from secateur.deployment.formats import format_of
from secateur.deployment.linear import SparseLinear, quantize
from secateur.types import Latency

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
PLAIN = 2.0**-24  # half a unit in the last place of float32
SHAPES = [(1, 1), (8, 16), (9, 17), (7, 15), (35, 530)]  # the last takes three turns of the kernel's loop
WEIGHTS, INPUTS = (
    [torch.float32, torch.bfloat16, torch.float16, torch.int8],
    [torch.float32, torch.bfloat16, torch.float16],
)


def matrix(rows: int, columns: int, zeros: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(1, 9, (rows, columns), generator=generator).float()
    return found.masked_fill(torch.rand(rows, columns, generator=generator) < zeros, 0)


def product(x: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> np.ndarray:
    """By the kernel, in double precision."""
    parts = [part.to(DEVICE) for part in format_of("bitmask").pack(weight)]
    moved = (None if each is None else each.to(DEVICE) for each in (scale, bias))
    found = on_gpu.linear(x.to(DEVICE), parts, *moved, *weight.shape)
    assert found.dtype == x.dtype
    assert found.shape == (*x.shape[:-1], len(weight))
    return numbers(found)


def numbers(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_of_small_whole_numbers_are_exact(shape: tuple[int, int]) -> None:
    rows, columns = shape
    weight, x = matrix(rows, columns, 0.5), torch.arange(1.0, columns + 1).expand(1, -1) % 7 - 3
    weight[rows // 2], weight[-1] = 0, 1  # a row of zeros, and a full one that ends in the last column
    assert (product(x, weight) == numbers(x) @ numbers(weight).T).all()


@pytest.mark.parametrize("zeros", [0.0, 0.97, 1.0])
def test_full_nearly_empty_and_empty_matrices(zeros: float) -> None:
    weight, x = matrix(19, 300, zeros), torch.randint(-4, 5, (2, 300)).float()
    assert (product(x, weight) == numbers(x) @ numbers(weight).T).all()


@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize("to", INPUTS, ids=str)
def test_every_dtype_with_scale_and_bias(dtype: torch.dtype, to: torch.dtype) -> None:
    torch.manual_seed(1)
    weight, x, bias = torch.randn(11, 45), torch.randn(1, 45).to(to), torch.randn(11).to(to)
    weight[torch.rand(11, 45) < 0.6] = 0
    weight, scale = quantize(weight) if dtype == torch.int8 else (weight.to(dtype), None)
    factor = 1.0 if scale is None else numbers(scale)
    for beside in (bias, None):
        more = 0.0 if beside is None else numbers(beside)
        wanted = numbers(x) @ numbers(weight).T * factor + more
        size = np.abs(numbers(x)) @ np.abs(numbers(weight)).T * factor + np.abs(more)
        allowed = size * (45 + 4) * PLAIN * 2 + np.abs(wanted) * torch.finfo(to).eps
        assert (np.abs(product(x, weight, scale, beside) - wanted) <= allowed).all()


def test_several_inputs_in_any_form_and_order() -> None:
    weight, x = matrix(10, 33, 0.5), torch.randint(-4, 5, (33, 4, 2)).float()
    x = x.permute(2, 1, 0)  # (2, 4, columns)
    wide = torch.randint(-4, 5, (3, 66)).float()
    for each in (x, wide[:, :33], wide[:, ::2]):
        assert (product(each, weight) == numbers(each) @ numbers(weight).T).all()


def test_no_inputs_give_nothing() -> None:
    assert product(torch.ones(0, 16), torch.ones(3, 16)).shape == (0, 3)


@pytest.mark.parametrize("faster", [True, False])
def test_deploy_swaps_the_kernel_in_where_it_is_faster(monkeypatch: pytest.MonkeyPatch, faster: bool) -> None:
    """Measured in truth where nothing is told: on the interpreter, where the CPU plays the GPU, it is slow for sure."""
    if DEVICE == "cpu":
        monkeypatch.setenv(native.VARIABLE, native.WITHOUT)
        monkeypatch.setattr(on_gpu, "is_gpu", lambda device: True)
        monkeypatch.setattr(on_gpu, "described", lambda device: "the interpreter")
    if faster:
        half = Latency(0.5, 0.5, 0.5, 9, ratio=(0.5, 0.5, 0.5))
        monkeypatch.setattr(Contest, "ratios", lambda self, layer, found, rows: {one.name: 0.5 for one in found})
        monkeypatch.setattr(planner, "latency", lambda *_, **__: {"dense": half, "deployed": half})
    model = nn.Sequential(nn.Linear(33, 10)).to(DEVICE).eval()
    model[0].weight.data[:, ::2] = 0
    x = torch.randn(1, 33, device=DEVICE)
    done = sc.deploy(model, x, weights="int8", formats=["bitmask"], rounds=1, table=False)
    if faster:
        assert type(done.model[0]) is SparseLinear
        assert done.largest_difference < 0.05
    elif DEVICE == "cpu":
        assert "x at 1 rows of dense" in done.decisions[0].why
    with torch.inference_mode():
        assert torch.allclose(done.model(x), model(x), atol=0.05)


def test_the_operator_calls_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setenv(native.VARIABLE, native.WITHOUT)
        monkeypatch.setattr(on_gpu, "is_gpu", lambda device: True)
    called: list[int] = []
    real = on_gpu.linear
    monkeypatch.setattr(on_gpu, "linear", lambda *arguments: called.append(1) or real(*arguments))
    layer = nn.Linear(33, 10).to(DEVICE)
    packed = SparseLinear.of(layer, "bitmask")
    for inputs, calls in ((1, 1), (on_gpu.MOST, 2), (on_gpu.MOST + 1, 2)):  # more are unpacked and multiplied dense
        x = torch.randn(inputs, 33, device=DEVICE)
        assert torch.allclose(packed(x), layer(x), atol=1e-5)
        assert len(called) == calls
