"""What is on a GPU is multiplied there, by its own kernel or dense; no kernel for the CPU follows its pointers."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from secateur.deployment import native, on_gpu, operators
from secateur.deployment.formats import FORMATS, format_of
from secateur.deployment.linear import SparseLinear
from secateur.errors import InputError

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def in_a_process(tmp_path: Path, *words: str, **environment: str) -> None:
    """Triton reads its environment once, at its import."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    kept |= {"TRITON_CACHE_DIR": str(tmp_path / "triton"), **environment}
    done = subprocess.run([sys.executable, *words], env=kept, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_triton
@pytest.mark.parametrize(
    "interpreted", ["1", pytest.param("0", marks=[pytest.mark.gpu, needs_gpu])], ids=["interpreter", "gpu"]
)
def test_the_kernel_multiplies(interpreted: str, tmp_path: Path) -> None:
    cases = str(HERE / "on_gpu_cases.py")
    in_a_process(tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", cases, TRITON_INTERPRET=interpreted)


COMPILE = """
import inspect
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from secateur.deployment import triton_bitmask as own

words = {"values": "*i8", "masks": "*i16", "offsets": "*i64", "scale": "*fp32", "bias": "*fp32"}
words |= {"x": "*bf16", "y": "*bf16"}
plain = {"SCALED": True, "BIASED": True, "HEIGHT": own.HEIGHT, "STEP": own.STEP, "TOGETHER": own.TOGETHER}
names = list(inspect.signature(own._panel).parameters)
signature = {name: words.get(name, "constexpr" if name in plain else "i32") for name in names}
for capability in (80, 90):
    source, target = ASTSource(own.PANEL, signature, plain), GPUTarget("cuda", capability, 32)
    made = triton.compile(source, target=target, options={"num_warps": own.WARPS})
    assert made.asm["cubin"]
"""


@needs_triton
@pytest.mark.slow
def test_the_kernel_compiles_for_gpus_that_are_not_there(tmp_path: Path) -> None:
    in_a_process(tmp_path, "-c", COMPILE)


def packed(name: str = "dense", dtype: torch.dtype | None = None) -> SparseLinear:
    torch.manual_seed(0)
    layer = nn.Linear(72, 24)
    layer.weight.data[:, 1::2] = 0  # every format takes this
    return SparseLinear.of(layer, name, dtype)


@pytest.mark.parametrize("name", FORMATS.names())
@pytest.mark.parametrize("device", ["cuda", "meta", "mps", "xpu"])
def test_kernels_for_the_cpu_take_nothing_else(name: str, device: str) -> None:
    assert not native.takes(format_of(name), torch.float32, torch.float32, torch.device(device))


@pytest.mark.skipif(bool(native.why_not()), reason=native.why_not())
def test_no_pointer_into_another_memory_reaches_compiled_code() -> None:
    """Whoever calls it: each tensor alone is elsewhere once."""
    own, layout = packed("bitmask", torch.int8), format_of("bitmask")
    x, parts, beside = torch.randn(2, 72), own.parts, [own.scale, own.bias]
    for at in range(6):
        tensors = [each.to("meta") if at == number else each for number, each in enumerate([x, *parts, *beside])]
        with pytest.raises(InputError, match="meta"):
            native.linear(tensors[0], tensors[1:4], tensors[4], tensors[5], layout, 24, 72)
        if at in range(1, 5):
            with pytest.raises(InputError, match="meta"):
                native.unpacked(tensors[1:4], tensors[4], layout, 24, 72)
    values, columns, starts, image = torch.ones(1), torch.zeros(1).int(), torch.tensor([0, 1]), torch.ones(1, 4)
    arguments = [image, values, columns, starts, torch.zeros(1).long(), torch.ones(1)]
    for at in range(6):
        some = [each.to("meta") if at == number else each for number, each in enumerate(arguments)]
        with pytest.raises(InputError, match="meta"):
            native.convolution(*some, 4, torch.ones(1, 1, 4))


def test_what_is_elsewhere_is_multiplied_there_and_that_it_is_slow_is_said_once() -> None:
    """The body of the operator, which a GPU's tensors reach: tensors without memory would stop a kernel of the CPU."""
    on_gpu.warn_once.cache_clear()
    own, x = packed("dense").to("meta"), torch.ones(2, 72, device="meta")
    arguments = (x, own.parts, None, own.bias, "dense", 24, 72)
    with pytest.warns(UserWarning, match="unpacked at every product"):
        found = operators._product(*arguments)
    assert (found.device.type, found.shape, found.dtype) == ("meta", (2, 24), torch.float32)
    assert operators._linear(*arguments).shape == (2, 24)  # warnings are errors here: none came
    on_gpu.warn_once.cache_clear()
    many = torch.ones(on_gpu.MOST + 1, 72, device="meta")  # so many are multiplied dense on purpose
    assert operators._linear(many, *arguments[1:]).shape == (on_gpu.MOST + 1, 24)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("who", ["x", "values", "masks", "offsets", "scale", "bias"])
@pytest.mark.parametrize("alone", [False, True], ids=["it is elsewhere", "all others are elsewhere"])
def test_tensors_on_two_devices_are_refused(who: str, gradient: bool, alone: bool) -> None:
    own = packed("bitmask", torch.int8)
    names = ["x", "values", "masks", "offsets", "scale", "bias"]
    tensors: list[Tensor] = [torch.ones(2, 72, requires_grad=gradient), *own.parts, own.scale, own.bias]
    x, *parts, scale, bias = (
        each.to("meta") if (name == who) is not alone else each for name, each in zip(names, tensors, strict=True)
    )
    shape = ("bitmask", 24, 72)
    # Of these devices tensors on "meta" decide who answers, of others the body of the operator does.
    for multiply in (operators.packed_linear, operators._product, operators._linear):
        with pytest.raises(InputError, match="meta"):
            multiply(x, parts, scale, bias, *shape)
    if who in names[1:5]:
        for unpack in (operators.unpacked, operators._unpacked):
            with pytest.raises(InputError, match="meta"):
                unpack(parts, scale, *shape)


def test_which_products_the_kernel_takes() -> None:
    cuda, plain = torch.device("cuda", 0), torch.float32
    there = not on_gpu.why_not()
    assert on_gpu.takes(format_of("bitmask"), plain, plain, cuda, 1) is there
    assert on_gpu.takes(format_of("bitmask"), torch.int8, torch.bfloat16, cuda, on_gpu.MOST) is there
    assert not on_gpu.takes(format_of("bitmask"), plain, plain, cuda, on_gpu.MOST + 1)
    assert not on_gpu.takes(format_of("bitmask"), plain, plain, torch.device("cpu"), 1)
    assert not on_gpu.takes(format_of("bitmask"), torch.float64, plain, cuda, 1)
    assert not on_gpu.takes(format_of("slide16"), plain, plain, cuda, 1)
    assert "slide16" in on_gpu.problem(format_of("slide16"), plain, plain)
    assert "float64" in on_gpu.problem(format_of("bitmask"), plain, torch.float64)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.filterwarnings("ignore:weights are unpacked")
@pytest.mark.parametrize("name", FORMATS.names())
@pytest.mark.parametrize("inputs", [1, 300])
def test_a_layer_that_was_moved_to_a_gpu_gives_the_same(name: str, inputs: int) -> None:
    own, x = packed(name), torch.randn(inputs, 72)
    wanted = own(x)
    moved = own.cuda()
    assert torch.allclose(moved(x.cuda()).cpu(), wanted, atol=1e-4)
    assert torch.equal(moved.densify().weight.cpu(), packed(name).weight)
    moved.check()
