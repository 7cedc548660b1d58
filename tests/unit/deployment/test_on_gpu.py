"""What is on a GPU is multiplied there, by its own kernel or dense; no kernel for the CPU follows its pointers."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.sparse import SparseSemiStructuredTensor, SparseSemiStructuredTensorCUTLASS

import secateur as sc
from secateur.deployment import contest, native, on_gpu, operators, planner
from secateur.deployment.contest import Contender, Contest
from secateur.deployment.formats import FORMATS, format_of
from secateur.deployment.formats.base import same_bits
from secateur.deployment.linear import SparseLinear
from secateur.deployment.packed import densify
from secateur.deployment.semi_structured import SemiStructuredLinear, why_not
from secateur.errors import InputError, RecipeError, UnsupportedError
from secateur.types import Latency

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
prototype = pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
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


def test_which_products_the_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_gpu, "why_not", lambda: "")
    cuda, plain = torch.device("cuda", 0), torch.float32
    assert on_gpu.takes(format_of("bitmask"), plain, plain, cuda, 1)
    assert on_gpu.takes(format_of("bitmask"), torch.int8, torch.bfloat16, cuda, on_gpu.MOST)
    assert not on_gpu.takes(format_of("bitmask"), plain, plain, cuda, 0)
    assert not on_gpu.takes(format_of("bitmask"), plain, plain, cuda, on_gpu.MOST + 1)
    assert not on_gpu.takes(format_of("bitmask"), plain, plain, torch.device("cpu"), 1)
    assert not on_gpu.takes(format_of("bitmask"), torch.float64, plain, cuda, 1)
    assert not on_gpu.takes(format_of("slide16"), plain, plain, cuda, 1)
    assert "slide16" in on_gpu.problem(format_of("slide16"), plain, plain)
    assert "float64" in on_gpu.problem(format_of("bitmask"), plain, torch.float64)
    monkeypatch.setattr(on_gpu, "why_not", lambda: "Triton is away")
    assert not on_gpu.takes(format_of("bitmask"), plain, plain, cuda, 1)


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


# -- deploying -------------------------------------------------------------------------------------------------------


def net(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    """A 2:4 layer, one with scattered zeros, and one without any."""
    torch.manual_seed(0)
    found = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 40), nn.ReLU(), nn.Linear(40, 5)).eval().to(dtype)
    found[0].weight.data.view(32, -1, 4)[..., 1:3] = 0
    found[2].weight.data[torch.rand(40, 32) < 0.7] = 0
    found[2].weight.data[0, :4] = 1
    return found


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU plays a GPU on which Triton is not there and PyTorch has the layout of CUTLASS, in plain PyTorch."""
    monkeypatch.setenv(native.VARIABLE, native.WITHOUT)
    monkeypatch.setattr(on_gpu, "is_gpu", lambda device: True)
    monkeypatch.setattr(on_gpu, "described", lambda device: "a stand-in")
    monkeypatch.setattr(on_gpu, "why_not", lambda: "Triton is away")


@pytest.fixture
def cutlass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SparseSemiStructuredTensor, "_FORCE_CUTLASS", True)
    monkeypatch.setattr(SparseSemiStructuredTensorCUTLASS, "_validate_device_dim_dtype_shape", lambda *_: None)


def ruled(monkeypatch: pytest.MonkeyPatch, ratios: dict[str, float]) -> None:
    def told(self: Contest, layer: nn.Linear, found: list[Contender], rows: int) -> dict[str, float]:
        return {one.name: ratios.get(one.format, 2.0) for one in found}

    one, other = Latency(1.0, 1.0, 1.0, 9), Latency(0.5, 0.5, 0.5, 9, ratio=(0.5, 0.5, 0.5))
    monkeypatch.setattr(Contest, "ratios", told)
    monkeypatch.setattr(planner, "latency", lambda *_, **__: {"dense": one, "deployed": other})


def test_which_weights_are_two_of_four() -> None:
    assert not why_not(net()[0].weight)
    assert "hold 4" in why_not(net()[2].weight)
    assert "float32" in why_not(net(torch.float32)[0].weight)
    short = torch.ones(3, 6, dtype=torch.float16)
    assert "hold 4" in why_not(short)
    short[:, :2] = 0
    assert not why_not(short)  # what is left of the last four are two
    short[1, 1] = 1
    assert "hold 3" in why_not(short)


def test_on_a_gpu_every_layer_says_why_it_has_no_other_form(stand_in: None) -> None:
    done = sc.deploy(net(), torch.randn(1, 64).bfloat16(), table=False)
    assert done.swapped == ()
    assert done.isa == "a stand-in"
    first, second, third = (each.why for each in done.decisions)
    assert "Triton is away" in first
    assert "2:4 bfloat16 does not run here" in first, "PyTorch's own words: it is no GPU"
    assert "CUDA" in first
    assert "Triton is away" in second
    assert "hold 4" in second
    assert "zeros are few" in third
    plain = sc.deploy(net(torch.float32), torch.randn(1, 64), formats=["slide16"], table=False)
    assert "slide16" in plain.decisions[0].why
    with pytest.raises(RecipeError):
        sc.deploy(net(), torch.randn(1, 64).bfloat16(), formats=["2:5"], table=False)


@prototype
def test_a_two_of_four_layer_is_taken_back_bit_for_bit_and_neither_saved_nor_loaded(cutlass: None) -> None:
    layer = net()[0]
    packed = SemiStructuredLinear.of(layer)
    again = copy.deepcopy(packed)
    for each in (packed, again):
        assert same_bits(each.weight, layer.weight.detach())
        assert same_bits(each.densify().bias.detach(), layer.bias.detach())
    assert packed.size_bytes() < 0.6 * layer.weight.numel() * 2 + 64
    assert not list(packed.parameters())
    with pytest.raises(InputError, match="GPU"):
        packed(torch.ones(1, 64).bfloat16())
    with pytest.raises(UnsupportedError, match="not saved"):
        packed.record()
    with pytest.raises(UnsupportedError, match="loaded"):
        again.load_state_dict(packed.state_dict())
    with pytest.raises(UnsupportedError, match="hold 4"):
        SemiStructuredLinear.of(net()[2])


@prototype
@pytest.mark.parametrize(("ratio", "swapped"), [(0.5, ("0",)), (0.96, ()), (1.5, ())])
def test_two_of_four_is_swapped_in_where_it_is_faster(
    stand_in: None,
    cutlass: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    ratio: float,
    swapped: tuple[str, ...],
) -> None:
    """With the product that a GPU would do done dense."""
    monkeypatch.setattr(SemiStructuredLinear, "forward", lambda self, x: functional.linear(x, self.weight, self.bias))
    ruled(monkeypatch, {"2:4": ratio})
    model, x = net(), torch.randn(3, 64).bfloat16()
    done = sc.deploy(model, x, table=False)
    assert done.swapped == swapped
    assert torch.equal(done.model(x), model(x))
    if swapped:
        assert type(done.model[0]) is SemiStructuredLinear
        assert (done.decisions[0].format, done.decisions[0].dtype) == ("2:4", "bfloat16")
        assert done.size_bytes[1] < done.size_bytes[0]
        with pytest.raises(UnsupportedError, match="not saved"):
            sc.save_deployed(done, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert type(densify(done.model)[0]) is nn.Linear
        assert torch.equal(done.model(x), model(x))
    else:
        assert f"{ratio:.2f}x" in done.decisions[0].why
        assert "Triton is away" in done.decisions[0].why


def test_a_layer_elsewhere_than_the_model_stays_and_says_so(stand_in: None) -> None:
    measures = Contest(contest.Table(None), cold=1, rounds=1, bfloat16=False)
    measures.device = torch.device("cuda", 1)  # where the first tensor of the model is
    decide = planner._Planner(measures, "same", None, 0.05, {"1": [torch.Size([1, 4])]}, {})
    decision, layer = decide.decide("1", nn.Linear(4, 4), None, 0, 1)
    assert layer is None
    assert decision.why == "it is on cpu, and the model's first tensor on cuda:1"


def test_a_measurement_on_a_gpu_waits_for_it_and_is_kept_apart(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that was only queued would take no time: the clock stands still until somebody waits."""
    clock = {"now": 0.0, "queued": 0.0}

    def wait(device: torch.device) -> None:
        clock["now"], clock["queued"] = clock["now"] + clock["queued"], 0.0

    def queue(seconds: float) -> None:
        clock["queued"] += seconds

    monkeypatch.setattr(contest, "synchronize", wait)
    own = Contest(contest.Table(None), cold=1, rounds=3, bfloat16=False, timer=lambda: clock["now"])
    calls, twins = (
        {"a": lambda: queue(1.0), "b": lambda: queue(3.0)},
        {"a": lambda: queue(7.0), "b": lambda: queue(9.0)},
    )
    taken = own.times(calls, twins)
    assert {name: set(values) for name, values in taken.items()} == {"a": {1.0}, "b": {3.0}}
    assert "a stand-in" in own._key(net()[0], Contender("bitmask", torch.bfloat16, net()[0]), 1)
    assert contest.clock(torch.device("cpu")) is time.perf_counter


@pytest.mark.gpu
@needs_gpu
@prototype
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64), (7, 64), (2, 3, 64), (300, 64)], ids=str)
def test_two_of_four_on_a_gpu(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no sparse tensor cores")
    layer, x = net(dtype)[0].cuda(), torch.randn(shape, device="cuda").to(dtype)
    packed = SemiStructuredLinear.of(layer)
    with torch.inference_mode():
        assert torch.allclose(packed(x).double(), layer(x).double(), atol=0.05)
        assert torch.equal(copy.deepcopy(packed).densify().weight, layer.weight)


@pytest.mark.gpu
@needs_gpu
@prototype
def test_a_model_on_a_gpu_is_deployed() -> None:
    model, x = net().cuda(), torch.randn(1, 64, device="cuda").bfloat16()
    done = sc.deploy(model, x, table=False, rounds=3)
    assert torch.cuda.get_device_name() in done.isa
    assert all(each.why for each in done.decisions)
    assert torch.allclose(done.model(x).double(), model(x).double(), atol=0.05)
