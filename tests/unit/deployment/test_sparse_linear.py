"""A packed layer is a module like any other: copied, saved, compiled, exported, differentiated, taken back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from secateur.deployment import native
from secateur.deployment.formats import FORMATS, format_of
from secateur.deployment.formats.base import same_bits
from secateur.deployment.linear import SparseLinear
from secateur.deployment.packed import densify
from secateur.errors import InputError
from secateur.files import load_tensors, save_tensors

EVERY = FORMATS.names()


def dense(rows: int = 24, columns: int = 72) -> nn.Linear:
    torch.manual_seed(0)
    found = nn.Linear(columns, rows)
    found.weight.data[:, 1::2] = 0  # every format takes this
    return found


@pytest.fixture(params=["native", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the compiled kernels where they are, and without."""
    if request.param == "torch":
        monkeypatch.setenv(native.VARIABLE, native.WITHOUT)
    elif native.why_not():
        pytest.skip(native.why_not())
    return request.param


@pytest.mark.parametrize("name", EVERY)
def test_it_is_taken_back_bit_for_bit(name: str) -> None:
    layer = dense()
    back = SparseLinear.of(layer, name).densify()
    assert same_bits(back.weight.detach(), layer.weight.detach())
    assert same_bits(back.bias.detach(), layer.bias.detach())
    assert type(back) is nn.Linear


def test_zeros_with_a_sign_are_zeros() -> None:
    layer = dense()
    layer.weight.data.mul_(-1.0)  # all zeros become -0.0, as a product with a mask leaves them
    packed = SparseLinear.of(layer, "bitmask")
    assert len(packed.values) < 24 * 40
    assert torch.equal(packed.weight, layer.weight)


@pytest.mark.parametrize("name", EVERY)
def test_copies_and_files_give_the_same_layer(name: str, way: str, tmp_path) -> None:
    packed, x = SparseLinear.of(dense(), name), torch.randn(3, 72)
    wanted = packed(x)
    assert torch.equal(copy.deepcopy(packed)(x), wanted)
    save_tensors(tmp_path / "layer.safetensors", packed.state_dict())
    other = SparseLinear.of(dense(), name)
    other.load_state_dict(load_tensors(tmp_path / "layer.safetensors"))
    assert torch.equal(other(x), wanted)
    assert not list(packed.parameters())


def test_damaged_tensors_are_refused_before_a_kernel_follows_them() -> None:
    packed = SparseLinear.of(dense(), "slide16")
    state = packed.state_dict()
    state["windows"] = state["windows"] + 1_000_000
    with pytest.raises(InputError, match="damaged"):
        packed.load_state_dict(state)


@pytest.mark.parametrize("name", ["slide32"])
def test_the_operator_keeps_the_rules_of_operators(name: str, way: str) -> None:
    packed = SparseLinear.of(dense(), name)
    arguments = (packed.parts, None, packed.bias, name, 24, 72)
    x = torch.randn(3, 72, requires_grad=True)
    torch.library.opcheck(torch.ops.secateur.packed_linear.default, (x, *arguments))
    torch.library.opcheck(torch.ops.secateur.packed_product.default, (x.detach(), *arguments))
    torch.library.opcheck(torch.ops.secateur.unpacked.default, (packed.parts, None, name, 24, 72))


def test_gradients_of_input_and_bias_are_those_of_the_dense_layer(way: str) -> None:
    layer = dense()
    packed = SparseLinear.of(layer, "bitmask")
    bias = layer.bias.detach().clone().requires_grad_()
    one, other = (torch.randn(2, 5, 72, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    torch.ops.secateur.packed_linear(one, packed.parts, None, bias, "bitmask", 24, 72).square().sum().backward()
    layer(other).square().sum().backward()
    assert torch.allclose(one.grad, other.grad, atol=1e-4)
    assert torch.allclose(bias.grad, layer.bias.grad, atol=1e-4)


class Net(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.first, self.second = SparseLinear.of(dense(), name, torch.int8), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.mark.parametrize("name", ["slide16"])
def test_compiled_in_one_graph_for_every_batch(name: str, way: str) -> None:
    net = Net(name)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (2, 5):
        x = torch.randn(batch, 72)
        assert torch.allclose(compiled(x), net(x), atol=1e-5)


@pytest.mark.slow
def test_compiled_by_inductor(way: str) -> None:
    net, x = Net("slide16"), torch.randn(4, 72)
    with torch.inference_mode():
        assert torch.allclose(torch.compile(net, fullgraph=True)(x), net(x), atol=1e-5)


def test_exported_and_read_again(way: str, tmp_path) -> None:
    net, x = Net("bitmask").eval(), torch.randn(4, 72)
    shapes = {"x": {0: torch.export.Dim("batch")}}
    torch.export.save(torch.export.export(net, (x,), dynamic_shapes=shapes), tmp_path / "net.pt2")
    again = torch.export.load(tmp_path / "net.pt2").module()
    assert torch.allclose(again(torch.cat([x, x])), net(torch.cat([x, x])), atol=1e-5)


def test_a_whole_model_is_made_dense_again() -> None:
    net, x = Net("block").eval(), torch.randn(4, 72)
    wanted = net(x)
    assert type(densify(net).first) is nn.Linear
    assert torch.allclose(net(x), wanted, atol=1e-5)


def test_bytes_are_counted() -> None:
    packed = SparseLinear.of(dense(), "bitmask")
    assert packed.size_bytes() == sum(t.numel() * t.element_size() for t in packed.state_dict().values())
    assert packed.size_bytes() < dense().weight.numel() * 4
    assert "bitmask" in repr(packed)
    assert format_of("bitmask").parts == ("values", "masks", "offsets")
