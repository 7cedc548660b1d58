"""Packed convolutions on the disk: the same model again, bit for bit; damage and other models are refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.deployment import densify
from secateur.deployment.convolution import SparseConv2d
from secateur.deployment.folders import PROFILES, Profile
from secateur.deployment.packed import in_places, install, packed_layers
from secateur.errors import FileRefusedError, InputError, PlanMismatchError, UnsupportedError
from secateur.files import canonical_json


def net(
    *, width: int = 8, stride: int = 1, padding: int = 1, dilation: int = 1, second: nn.Module | None = None,
    third: nn.Module | None = None, bias: bool = True,
) -> nn.Sequential:  # fmt: skip
    torch.manual_seed(1)
    first = nn.Conv2d(3, width, 3, stride=stride, padding=padding, dilation=dilation, bias=False)
    last = nn.Conv2d(width, 5, 3, bias=bias)
    norm, relu = second or nn.BatchNorm2d(width), third or nn.ReLU()
    if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    for layer in (first, last):
        layer.weight.data.masked_fill_(torch.rand_like(layer.weight) < 0.8, 0)
    return nn.Sequential(first, norm, relu, last, nn.Flatten()).eval().requires_grad_(False)


def packed(model: nn.Sequential | None = None) -> nn.Sequential:
    """The net as `deploy` makes it."""
    model = model or net()
    layers = {"0": SparseConv2d.of(model[0], norm=model[1], names=("1", "2")), "3": SparseConv2d.of(model[3])}
    install(model, in_places(layers))
    return model


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.view(torch.uint8) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("mapped", [True, False])
def test_a_folder_gives_the_same_model_bit_for_bit(tmp_path: Path, profile: Profile, mapped: bool) -> None:
    model, x = packed(), torch.randn(3, 3, 9, 11)
    model[0].values[3] = float("nan")  # a number like any other
    sc.save_deployed(model, tmp_path / "out", profile=profile)
    again = sc.load_deployed(tmp_path / "out", net, mapped=mapped)
    assert list(map(repr, again)) == list(map(repr, model))
    mine, other = bits(again), bits(model)
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert torch.equal(again(x).nan_to_num(7), model(x).nan_to_num(7))
    # And once more: what was loaded is written as what was made.
    sc.save_deployed(again, tmp_path / "more", profile=profile)
    for name in ("deployed.json", "model.safetensors"):
        assert (tmp_path / "more" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.parametrize("profile", PROFILES)
def test_the_kernel_of_a_loaded_layer_gives_what_the_dense_model_gives(tmp_path: Path, profile: Profile) -> None:
    sc.save_deployed(packed(), tmp_path / "out", profile=profile)
    again, x = sc.load_deployed(tmp_path / "out", net), torch.randn(2, 3, 9, 9)
    assert type(again[0]) is SparseConv2d
    assert torch.allclose(again(x), net()(x), atol=1e-5)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: net(width=9), "8x3x3x3"), (lambda: net(stride=2), "stride"), (lambda: net(padding=0), "stride"),
        (lambda: net(dilation=2), "dilation"), (lambda: net(second=nn.Identity()), "no norm of 8"),
        (lambda: net(second=nn.BatchNorm2d(9)), "no norm of 8"), (lambda: net(second=nn.GroupNorm(2, 8)), "no norm"),
        (lambda: net(second=nn.BatchNorm2d(8, track_running_stats=False)), "no norm"),
        (lambda: net(third=nn.ReLU6()), "no ReLU"), (lambda: net(bias=False), "has no bias"),
        (lambda: nn.Sequential(nn.Linear(3, 3)), "no convolution"), (lambda: net()[:3], "no layer '3'"),
        (lambda: net().insert(0, nn.Identity()), "no convolution"),
    ],
)  # fmt: skip
def test_another_model_is_refused_in_words(tmp_path: Path, make: Callable[[], nn.Module], word: str) -> None:
    sc.save_deployed(packed(), tmp_path / "out")
    with pytest.raises(PlanMismatchError, match=word):
        sc.load_deployed(tmp_path / "out", make)


@pytest.mark.parametrize(
    ("part", "damage"),
    [
        ("columns", lambda part: part.fill_(27)), ("columns", lambda part: part.neg_()),
        ("columns", lambda part: part.zero_()), ("columns", lambda part: part.copy_(part.flip(0))),
        ("starts", lambda part: part[2].fill_(1 << 40)), ("starts", lambda part: part[0].fill_(1)),
        ("starts", lambda part: part[-1].fill_(2)), ("values", lambda part: part[0].fill_(0)),
    ],
)  # fmt: skip
def test_damaged_tensors_with_right_hashes_are_refused(tmp_path: Path, part: str, damage: Callable) -> None:
    model = packed()
    damage(getattr(model[0], part))
    sc.save_deployed(model, tmp_path / "out")
    with pytest.raises(InputError, match="damaged"):
        sc.load_deployed(tmp_path / "out", net)


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("bias", torch.zeros(7)), ("bias", torch.zeros(8).long()), ("bias", torch.zeros(1, 8)),
        ("values", torch.ones(3)), ("values", torch.ones(3, dtype=torch.int32)), ("columns", torch.zeros(3)),
        ("columns", torch.zeros(3, 3, dtype=torch.int32)), ("starts", torch.zeros(4, dtype=torch.int64)),
        ("starts", torch.zeros(0, dtype=torch.int64)),
    ],
)  # fmt: skip
def test_tensors_of_other_shapes_and_dtypes_are_refused(tmp_path: Path, part: str, other: Tensor) -> None:
    model = packed()
    model[0]._buffers[part] = other
    sc.save_deployed(model, tmp_path / "out")
    with pytest.raises(InputError, match="damaged"):
        sc.load_deployed(tmp_path / "out", net)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    model = packed()
    del model[0]._buffers["starts"]
    sc.save_deployed(model, tmp_path / "out")
    with pytest.raises(InputError, match=r"0\.starts"):
        sc.load_deployed(tmp_path / "out", net)


@pytest.mark.parametrize("weight", [torch.ones(8, 27), torch.ones(8, 3, 3, 3).int(), torch.ones(8, 3, 3, 4)])
def test_an_archive_with_another_weight_is_refused(tmp_path: Path, weight: Tensor) -> None:
    class Lies(SparseConv2d):
        @property
        def unpacked(self) -> Tensor:
            return weight

    model = packed()
    model[0].__class__ = Lies
    sc.save_deployed(model, tmp_path / "out", profile="archive")
    with pytest.raises(InputError, match="weight of"):
        sc.load_deployed(tmp_path / "out", net)


def rewritten(folder: Path, change: Callable[[dict], object]) -> None:
    """The list of layers as told, with the right hash."""
    said = json.loads((folder / "deployed.json").read_text())
    change(said["layers"])
    text = canonical_json(said)
    (folder / "deployed.json").write_text(text)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["deployed.json"] = sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_text(canonical_json(manifest))


@pytest.mark.parametrize(
    "wrong",
    [
        {"format": "plains"}, {"shape": [8, 3, 3]}, {"shape": [8, 3, 3, True]}, {"shape": [8, 3, 3, -3]},
        {"shape": "8333"}, {"stride": [1, 1, 1]}, {"stride": [1.0, 1]}, {"padding": [1, None]}, {"bias": 1},
        {"norm": None}, {"relu": True}, {"more": 1},
    ],
)  # fmt: skip
def test_a_malformed_record_is_refused(tmp_path: Path, wrong: dict) -> None:
    folder = sc.save_deployed(packed(), tmp_path / "out")
    rewritten(folder, lambda layers: layers["0"].update(wrong))
    with pytest.raises(FileRefusedError, match="0"):
        sc.load_deployed(folder, net)


@pytest.mark.parametrize("left", ["format", "shape", "stride", "padding", "bias", "norm", "relu"])
def test_a_record_that_lacks_something_is_refused(tmp_path: Path, left: str) -> None:
    folder = sc.save_deployed(packed(), tmp_path / "out")
    rewritten(folder, lambda layers: layers["0"].pop(left))
    with pytest.raises(FileRefusedError, match="0"):
        sc.load_deployed(folder, net)


def test_no_module_is_taken_in_twice(tmp_path: Path) -> None:
    folder = sc.save_deployed(packed(), tmp_path / "out")
    rewritten(folder, lambda layers: layers["3"].update(relu="2"))
    with pytest.raises(PlanMismatchError, match="by two layers"):
        sc.load_deployed(folder, net)
    rewritten(folder, lambda layers: (layers["3"].update(relu=""), layers["0"].update(relu="", norm="3")))
    with pytest.raises(PlanMismatchError, match="no norm"):
        sc.load_deployed(folder, net)


def test_dense_again_it_has_a_bias_and_the_relu_is_back() -> None:
    model, x = packed(), torch.randn(2, 3, 9, 9)
    dense = densify(copy.deepcopy(model))
    assert [type(each) for each in dense[:4]] == [nn.Conv2d, nn.Identity, nn.ReLU, nn.Conv2d]
    assert dense[0].bias is not None
    assert torch.equal(dense[0].weight, model[0].weight)
    assert not any(module.training for module in dense.modules())
    assert torch.allclose(dense(x), net()(x), atol=1e-5)
    assert not packed_layers(dense)


@pytest.mark.parametrize("use", [densify, lambda model: sc.save_deployed(model, "never")])
@pytest.mark.parametrize(
    "part", [lambda model: model[0], lambda model: nn.Sequential(nn.ReLU(), model), lambda m: m[:2]]
)
def test_a_part_of_the_model_is_refused(use: Callable, part: Callable) -> None:
    with pytest.raises(UnsupportedError, match="deployed in another model"):
        use(part(packed()))
    assert not Path("never").exists()


def test_a_model_rounded_to_bfloat16_is_written_too(tmp_path: Path) -> None:
    model = packed()
    sc.export(model, tmp_path / "out", format="archive", weights="bfloat16")
    again = sc.load_deployed(tmp_path / "out", net)
    assert again[0].values.dtype == torch.bfloat16
    x = torch.randn(2, 3, 9, 9)
    assert torch.allclose(again(x), model(x), atol=0.2)


@pytest.mark.parametrize("format", ["safetensors", "archive"])
def test_exports_take_packed_convolutions(tmp_path: Path, format: str) -> None:
    made = sc.export(packed(), tmp_path / "out", format=format)
    assert made.size_bytes > 0
