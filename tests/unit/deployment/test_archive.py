"""Archives give every tensor back bit for bit, in few bytes; a file with any bit flipped or byte missing is refused."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur as sc
from secateur.deployment import SparseLinear, archive, folders, load_archive, planes, save_archive
from secateur.deployment.formats import FORMATS
from secateur.deployment.formats.base import same_bits
from secateur.deployment.packed import packed_layers
from secateur.errors import FileRefusedError, InputError, RecipeError
from secateur.files import canonical_json, load_metadata, load_tensors, save_tensors, stable_hash
from secateur.files.mapped import map_file
from secateur.files.safe import dtype_names

DTYPES = sorted(dtype_names(), key=str)


def some(dtype: torch.dtype, shape: tuple[int, ...], zeros: float, seed: int = 0) -> Tensor:
    """Random bits of any dtype, some of them zero."""
    chance = torch.Generator().manual_seed(seed)
    size = math.prod(shape) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8, generator=chance)
    gone = torch.rand(math.prod(shape), generator=chance) < zeros
    raw.view(-1, dtype.itemsize)[gone] = 0
    return raw.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zeros", [0.0, 0.6, 1.0])
def test_every_dtype_and_pattern_of_bits_comes_back(dtype: torch.dtype, zeros: float) -> None:
    for shape in ((), (0,), (3, 0, 2), (1,), (7,), (5, 13), (2, 3, 4)):
        tensor = some(dtype, shape, zeros, len(shape))
        again = planes.decode(*planes.encode(tensor))
        assert (again.dtype, again.shape, bits(again)) == (tensor.dtype, tensor.shape, bits(tensor))


def test_views_and_numbers_that_hide_come_back() -> None:
    odd = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1.0])
    for tensor in (odd, torch.arange(12.0).reshape(3, 4).t(), torch.arange(9.0)[::2], torch.ones(2, 3).expand(2, 3)):
        assert bits(planes.decode(*planes.encode(tensor))) == bits(tensor.contiguous())
    assert bits(planes.decode(*planes.encode(torch.tensor([1 + 2j]).conj()))) == bits(torch.tensor([1 - 2j]))


@pytest.mark.parametrize(("zeros", "times"), [(0.5, 2.4), (0.7, 3.7), (0.8, 5.0), (0.9, 9.0)])
def test_normal_weights_pruned_by_size_come_near_their_entropy(zeros: float, times: float) -> None:
    weight = torch.randn(300, 400, generator=torch.Generator().manual_seed(0))
    border = weight.abs().flatten().kthvalue(int(zeros * weight.numel())).values
    weight = weight.masked_fill(weight.abs() <= border, 0).bfloat16()
    _, data = planes.encode(weight)
    # Told by another count: entropy of places, of exponents among those that stay, and eight bits for the rest.
    kept = weight[weight != 0]
    exponents = torch.frexp(kept.float()).exponent.unique(return_counts=True)[1].double() / len(kept)
    share = len(kept) / weight.numel()
    bound = -(share * math.log2(share) + (1 - share) * math.log2(1 - share)) + share * (
        8 - float((exponents * exponents.log2()).sum())
    )
    assert 0.97 * bound <= 8 * len(data) / weight.numel() <= 1.06 * bound
    assert 2 * weight.numel() / len(data) >= times


def weights() -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(3)
    wide = torch.randn(24, 40, generator=chance).bfloat16()
    wide[torch.rand(24, 40, generator=chance) < 0.6] = 0
    return {"wide": wide, "tied": wide, "none": torch.empty(0, 3), "bias": torch.randn(24, generator=chance),
            "steps": torch.tensor(7), "mask": torch.rand(9, generator=chance) < 0.5}  # fmt: skip


def test_ties_are_stored_once_and_come_back(tmp_path: Path) -> None:
    tensors = weights()
    digest = save_archive(tmp_path / "a", tensors)
    again = load_archive(tmp_path / "a", sha256=digest)
    assert {name: bits(each) for name, each in again.items()} == {name: bits(each) for name, each in tensors.items()}
    assert again["wide"].data_ptr() == again["tied"].data_ptr()
    assert save_archive(tmp_path / "b", tensors) == digest


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("archive") / "a"
    save_archive(path, weights())
    return path.read_bytes()


@pytest.mark.parametrize("step", [61, pytest.param(2, marks=pytest.mark.slow)])
def test_flipped_bits_anywhere_and_every_cut_are_refused(packed: bytes, step: int, tmp_path: Path) -> None:
    """Without the hash of the file: what is in it tells."""
    chance, path = random.Random(0), tmp_path / "a"
    header = 8 + int.from_bytes(packed[:8], "little")
    for at in range(0, len(packed), step):
        broken = bytearray(packed)
        broken[at] ^= 1 << chance.randrange(8)
        path.write_bytes(broken)
        with pytest.raises(FileRefusedError):
            load_archive(path)
    for length in [0, 1, 7, 8, header, *chance.sample(range(len(packed)), 12)]:
        path.write_bytes(packed[:length])
        with pytest.raises(FileRefusedError):
            load_archive(path)
    path.write_bytes(packed + b"\0")
    with pytest.raises(FileRefusedError):
        load_archive(path)


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 3))
def test_planes_of_any_bytes_give_the_tensor_or_are_refused(data: bytes, which: int) -> None:
    coded, whole = planes.encode(weights()["wide"])
    at = sum(plane.stored for plane in coded.planes[:which])
    broken = whole[:at] + data + whole[at + len(data) + 1 :]
    assume(broken != whole)
    with pytest.raises(InputError):
        planes.decode(coded, broken)


def test_a_plane_that_unpacks_to_more_than_it_says_takes_no_memory() -> None:
    import zlib

    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = coder.compress(bytes(1 << 22)) + coder.flush()
    coded = planes.Coded("int8", (4,), False, (planes.Plane("deflate", 4, len(bomb)),), "0" * 64)
    with pytest.raises(InputError, match="does not end"):
        planes.decode(coded, bomb)


def test_what_is_no_archive_or_too_large_is_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path / "plain", weights())
    with pytest.raises(FileRefusedError, match="no archive"):
        load_archive(tmp_path / "plain")
    save_archive(tmp_path / "a", {"x": torch.zeros(1000)})
    with pytest.raises(FileRefusedError, match="4000 bytes"):
        load_archive(tmp_path / "a", max_bytes=3000)
    with pytest.raises(InputError, match="meta"):
        save_archive(tmp_path / "b", {"x": torch.zeros(3, device="meta")})


def forged(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """An archive whose metadata say something else, and whose own hash of them is right."""
    save_archive(path, {"wide": weights()["wide"], "bias": weights()["bias"]})
    said = json.loads(load_metadata(path)["archive"])
    said.pop("sha256")
    change(said)
    save_tensors(path, load_tensors(path), {"archive": canonical_json({**said, "sha256": stable_hash(said)})})


LIES = {
    "nothing": lambda said: None,
    "version": lambda said: said.update(version=2),
    "another shape": lambda said: said["tensors"]["wide"].update(shape=[40, 24]),
    "more numbers": lambda said: said["tensors"]["wide"].update(shape=[48, 40]),
    "a huge shape": lambda said: said["tensors"]["wide"].update(shape=[1 << 39, 1 << 39]),
    "a negative size": lambda said: said["tensors"]["wide"].update(shape=[-24, -40]),
    "truth as a size": lambda said: said["tensors"]["bias"].update(shape=[24, True]),
    "another dtype": lambda said: said["tensors"]["wide"].update(dtype="float32"),
    "no dtype": lambda said: said["tensors"]["wide"].update(dtype="load"),
    "no mask": lambda said: said["tensors"]["wide"].update(masked=False),
    "a mask too many": lambda said: said["tensors"]["bias"].update(masked=True),
    "no planes": lambda said: said["tensors"]["wide"].update(planes=[]),
    "a plane too large": lambda said: said["tensors"]["wide"]["planes"][1].__setitem__(1, 1 << 40),
    "a plane of less than nothing": lambda said: said["tensors"]["wide"]["planes"].append(["raw", 0, -1]),
    "an unknown coder": lambda said: said["tensors"]["wide"]["planes"][0].__setitem__(0, "pickle"),
    "no hash": lambda said: said["tensors"]["wide"].update(sha256=""),
    "a field too many": lambda said: said["tensors"]["wide"].update(code="1"),
    "a tensor too many": lambda said: said["tensors"].update(other=said["tensors"]["wide"]),
    "a tensor too few": lambda said: said["tensors"].pop("bias"),
    "a tie to nothing": lambda said: said["ties"].update(other="none"),
    "a tie that is stored": lambda said: said["ties"].update(bias="wide"),
    "a tie that is not there": lambda said: said["ties"].update(other="wide"),
    "no table": lambda said: said.update(tensors=[]),
}


@pytest.mark.parametrize("lie", LIES)
def test_metadata_that_lie_are_refused_whatever_hash_they_bring(lie: str, tmp_path: Path) -> None:
    forged(tmp_path / "a", LIES[lie])
    if lie in ("nothing", "another shape"):
        # Rows for columns are no damage that a hash of the bytes could see: the model's own shapes refuse it.
        assert load_archive(tmp_path / "a")["wide"].shape == ((24, 40) if lie == "nothing" else (40, 24))
        return
    with pytest.raises(FileRefusedError):
        load_archive(tmp_path / "a")


@pytest.mark.parametrize("size", [-1, 1 << 40])
def test_sizes_that_no_plane_can_have_are_refused_before_anything_is_decoded(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To zlib a size below nothing is no bound at all."""
    forged(tmp_path / "a", lambda said: said["tensors"]["wide"]["planes"][1].__setitem__(1, size))
    monkeypatch.setattr(archive, "decode", lambda *_: pytest.fail("something was decoded"))
    with pytest.raises(FileRefusedError, match="other planes"):
        load_archive(tmp_path / "a")


def test_other_fields_beside_the_metadata_are_refused(tmp_path: Path) -> None:
    save_archive(tmp_path / "a", weights())
    said = load_metadata(tmp_path / "a")["archive"]
    save_tensors(tmp_path / "b", load_tensors(tmp_path / "a"), {"archive": said})
    assert load_archive(tmp_path / "b").keys() == weights().keys()
    save_tensors(tmp_path / "b", load_tensors(tmp_path / "a"), {"archive": said, "note": "run me"})
    with pytest.raises(FileRefusedError, match="header"):
        load_archive(tmp_path / "b")


def test_bits_that_fill_up_a_byte_are_told_apart_too() -> None:
    coded, data = planes.encode(torch.tensor([1.0, 0.0, 0.0, 2.0, 0.0]))
    assert (coded.planes[0].coder, coded.planes[0].stored) == ("raw", 1)
    for bit in (5, 6, 7):
        with pytest.raises(InputError, match="another tensor"):
            planes.decode(coded, bytes([data[0] ^ 1 << bit]) + data[1:])


def test_bytes_behind_the_end_of_a_plane_are_refused_whatever_hash_they_bring() -> None:
    tensor = torch.zeros(40_000)
    coded, data = planes.encode(tensor)
    first = coded.planes[0]
    assert first.coder == "deflate"
    for more in (b"", b"\0"):
        longer = data[: first.stored] + more + data[first.stored :]
        said = replace(first, stored=first.stored + len(more))
        digest = hashlib.sha256(bytes(4 * 40_000) + longer).hexdigest()
        told = replace(coded, planes=(said, *coded.planes[1:]), sha256=digest)
        if not more:
            assert torch.equal(planes.decode(told, longer), tensor)
            continue
        with pytest.raises(InputError, match="does not end"):
            planes.decode(told, longer)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table, self.head = nn.Embedding(20, 32), nn.Linear(32, 20, bias=False)
        self.head.weight = self.table.weight
        self.inner = nn.ModuleList(nn.Linear(32, 32, bias=at % 2 == 0) for at in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x)
        for layer in self.inner:
            x = layer(x).relu()
        return self.head(x)


def deployed(format: str, dtype: torch.dtype | None) -> Net:
    net = Net().eval()
    for at, layer in enumerate(net.inner):
        with torch.no_grad():
            # Zeros that the n:m layout holds as well: one of two beside each other stays.
            layer.weight.view(32, 16, 2)[:, :, at % 2] = 0
            layer.weight.view(2, 16, 32)[1] = 0
        if at < 3:
            net.inner[at] = SparseLinear.of(layer, format, dtype)
    return net


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("format", FORMATS.names())
def test_both_profiles_give_the_same_model_back(format: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    net = deployed(format, dtype)
    wanted = net.state_dict()
    for profile in folders.PROFILES:
        sc.save_deployed(net, tmp_path / profile, profile=profile)
        again = sc.load_deployed(tmp_path / profile, Net)
        found = again.state_dict()
        assert found.keys() == wanted.keys()
        assert all(same_bits(found[name], wanted[name]) for name in wanted)
        assert again.head.weight is again.table.weight or again.head.weight.data_ptr() == again.table.weight.data_ptr()
        assert {name: layer.format for name, layer in packed_layers(again).items()} == dict.fromkeys(
            ("inner.0", "inner.1", "inner.2"), format
        )


@pytest.mark.parametrize("profile", folders.PROFILES)
@pytest.mark.parametrize("file", ["model.safetensors", "deployed.json", "manifest.json"])
def test_a_folder_with_a_flipped_bit_or_a_cut_file_is_refused(
    profile: folders.Profile, file: str, tmp_path: Path
) -> None:
    sc.save_deployed(deployed("bitmask", None), tmp_path / "d", profile=profile)
    path, chance = tmp_path / "d" / file, random.Random(1)
    whole = path.read_bytes()
    for at in chance.sample(range(len(whole)), 5):
        broken = bytearray(whole)
        broken[at] ^= 1 << chance.randrange(8)
        path.write_bytes(broken)
        with pytest.raises((FileRefusedError, InputError)):
            sc.load_deployed(tmp_path / "d", Net)
    for length in (0, len(whole) // 2, len(whole) - 2):  # the last byte of a manifest is the end of its line
        path.write_bytes(whole[:length])
        with pytest.raises((FileRefusedError, InputError)):
            sc.load_deployed(tmp_path / "d", Net)


def test_archives_of_small_numbers_are_smaller_than_what_runs(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    for layer in net:
        layer.weight.data[torch.rand(256, 256) < 0.7] = 0
    sizes = {}
    for word, dtype in (("float32", None), ("int8", torch.int8)):
        model = nn.Sequential(*(SparseLinear.of(layer, "bitmask", dtype) for layer in net))
        for profile in folders.PROFILES:
            sc.save_deployed(model, tmp_path / word / profile, profile=profile)
            sizes[word, profile] = (tmp_path / word / profile / "model.safetensors").stat().st_size
    assert (
        sizes["int8", "archive"] < sizes["int8", "runtime"] < sizes["float32", "archive"] < sizes["float32", "runtime"]
    )
    # 30 % of 131072 numbers: at most their mask and their bytes.
    assert sizes["int8", "archive"] < 131072 * (0.3 + 0.125) + 6000


def test_an_unknown_profile_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="profile"):
        sc.save_deployed(Net(), tmp_path / "d", profile="zip")  # type: ignore[arg-type]


def test_mapped_tensors_are_the_file_and_writing_to_them_leaves_it_alone(tmp_path: Path) -> None:
    tensors = weights()
    digest = save_tensors(tmp_path / "w", tensors)
    found, plain = map_file(tmp_path / "w", sha256=digest), load_tensors(tmp_path / "w", sha256=digest)
    assert {name: bits(each) for name, each in found.items()} == {name: bits(each) for name, each in plain.items()}
    assert found["wide"] is found["tied"]
    found["bias"].zero_()
    assert bits(load_tensors(tmp_path / "w", sha256=digest)["bias"]) == bits(tensors["bias"])
    # All of it lies in one piece as in the file: no tensor was copied.
    near = sorted(
        (each.data_ptr(), each.numel() * each.element_size())
        for name, each in found.items()
        if each.numel() and name != "tied"
    )
    assert all(one + size == other for (one, size), (other, _) in pairwise(near))


@pytest.mark.parametrize("place", [3, 20, -1])
def test_mapping_refuses_what_reading_refuses(place: int, tmp_path: Path) -> None:
    digest = save_tensors(tmp_path / "w", weights())
    whole = bytearray((tmp_path / "w").read_bytes())
    whole[place] ^= 64
    (tmp_path / "w").write_bytes(whole)
    with pytest.raises(FileRefusedError):
        map_file(tmp_path / "w", sha256=digest)
    (tmp_path / "w").write_bytes(whole[:-1])
    with pytest.raises(FileRefusedError):
        map_file(tmp_path / "w")
    (tmp_path / "w").write_bytes(np.array(5).tobytes())
    with pytest.raises(FileRefusedError):
        map_file(tmp_path / "w")
