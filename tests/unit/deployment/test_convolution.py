"""A packed convolution equals the dense one, by every kernel; the planner takes it only where it wins."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.deployment import convolution, convolving, native, planner
from secateur.deployment.contest import Contest
from secateur.deployment.convolution import SparseConv2d
from secateur.deployment.convolving import decide_convolutions
from secateur.deployment.following import Behind
from secateur.deployment.lookup import Table
from secateur.deployment.packed import densify
from secateur.errors import InputError, UnsupportedError
from secateur.types import Latency

# channels in and out, kernel, stride, padding, image, zeros
KINDS = [
    (6, 40, 1, 1, 0, (13, 17), 0.9), (3, 8, 3, 1, 1, (16, 16), 0.8), (4, 33, 3, 2, 1, (15, 14), 0.8),
    (6, 8, 1, 2, 0, (9, 9), 0.5), (3, 8, 7, 2, 3, (33, 30), 0.5), (5, 6, (3, 2), (2, 3), (1, 0), (12, 17), 0.5),
    (2, 3, 1, 1, 0, (3, 3), 0.1), (4, 9, 3, 1, 1, (1, 1), 0.5), (4, 5, 3, 1, 1, (5, 30), 1.0),
    (4, 4, 1, 1, 1, (5, 6), 0.0), (2, 3, 2, 2, 0, (64, 9), 0.3), (2, 3, 1, 1, 0, (4, 37), 0.5),
]  # fmt: skip


def layer(inputs, outputs, kernel, stride, padding, zeros: float, bias: bool = True) -> nn.Conv2d:
    torch.manual_seed(0)
    found = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=bias)
    found.weight.data.masked_fill_(torch.rand_like(found.weight) < zeros, 0)
    return found.eval().requires_grad_(False)


@pytest.fixture(params=[*native.LEVELS, native.WITHOUT])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(native.VARIABLE, request.param)
    if native.isa() != request.param:
        pytest.skip(f"{native.why_not() or 'this processor'} has no {request.param}")
    return request.param


@pytest.mark.parametrize("threads", [1, 3])
def test_convolutions_equal_the_dense_ones(isa: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for at, (inputs, outputs, kernel, stride, padding, image, zeros) in enumerate(KINDS):
            dense = layer(inputs, outputs, kernel, stride, padding, zeros, bias=at % 2 == 0)
            x = torch.randn(1 + at % 3, inputs, *image)
            found, wanted = SparseConv2d.of(dense)(x), dense(x)
            assert found.shape == wanted.shape
            assert found.is_contiguous()
            assert torch.allclose(found, wanted, atol=1e-5), KINDS[at]
            again = SparseConv2d.of(dense)(x.to(memory_format=torch.channels_last))
            assert torch.allclose(again, wanted, atol=1e-5)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("images", [0, 1, 2, 5, 7])
def test_a_few_images_at_a_time_are_what_all_at_once_are(
    isa: str, images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What PyTorch's own convolution rounds to depends on how many images come at once.
    same = partial(torch.allclose, atol=1e-5) if isa == native.WITHOUT else torch.equal
    for inputs, outputs, kernel, stride, padding, image, zeros in KINDS:
        packed = SparseConv2d.of(layer(inputs, outputs, kernel, stride, padding, zeros))
        x = torch.randn(images, inputs, *image)
        each = [packed(one[None]) for one in x] or [packed(x)]
        monkeypatch.setattr(convolution, "AT_ONCE", 2 * inputs * image[0] * image[1])
        found = packed(x)
        assert same(found, torch.cat(each))
        assert found.is_contiguous()


def stated(channels: int) -> nn.BatchNorm2d:
    """A norm with statistics of its own."""
    norm = nn.BatchNorm2d(channels, eps=1e-3).eval().requires_grad_(False)
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        tensor.normal_()
    norm.running_var.uniform_(0.1, 4)
    return norm


def by_hand(dense: nn.Conv2d, norm: nn.BatchNorm2d | None, relu: bool, x: torch.Tensor) -> np.ndarray:
    """Pixel by pixel in NumPy's float64."""
    w, (down, right) = dense.weight.double().numpy(), dense.stride
    (above, left), (_, _, tall, wide) = dense.padding, w.shape
    padded = np.pad(x.double().numpy(), ((0, 0), (0, 0), (above, above), (left, left)))
    rows, columns = (padded.shape[2] - tall) // down + 1, (padded.shape[3] - wide) // right + 1
    y = np.zeros((len(x), len(w), rows, columns))
    for i in range(rows):
        for j in range(columns):
            window = padded[:, :, i * down : i * down + tall, j * right : j * right + wide]
            y[:, :, i, j] = np.einsum("nchw,ochw->no", window, w)
    if dense.bias is not None:
        y += dense.bias.double().numpy()[:, None, None]
    if norm is not None:
        mean, var, gamma, beta = (
            each.double().numpy()[:, None, None]
            for each in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        )
        y = (y - mean) / np.sqrt(var + norm.eps) * gamma + beta
    return np.maximum(y, 0) if relu else y


@pytest.mark.parametrize("relu", ["", "relu"])
def test_a_norm_and_a_relu_are_what_they_are_by_hand(isa: str, relu: str) -> None:
    for at, (inputs, outputs, kernel, stride, padding, image, zeros) in enumerate(KINDS):
        dense, norm = layer(inputs, outputs, kernel, stride, padding, zeros, bias=at % 2 == 0), stated(outputs)
        x = torch.randn(2, inputs, *image)
        wanted = by_hand(dense, norm, bool(relu), x)
        found = SparseConv2d.of(dense, norm=norm, names=("norm", relu))(x)
        assert np.abs(found.numpy() - wanted).max() <= 1e-5 * max(1.0, np.abs(wanted).max()), KINDS[at]
        assert relu == "" or (found >= 0).all()


def test_a_norm_is_folded_in_double_precision_and_rounded_once() -> None:
    dense, norm = layer(3, 8, 3, 1, 1, 0.5), stated(8)
    scale = norm.weight.double().numpy() / np.sqrt(norm.running_var.double().numpy() + norm.eps)
    weight = (dense.weight.double().numpy() * scale[:, None, None, None]).astype(np.float32)
    bias = (dense.bias.double().numpy() - norm.running_mean.double().numpy()) * scale + norm.bias.double().numpy()
    packed = SparseConv2d.of(dense, norm=norm)
    # Two ways to the same quotient may differ in the last of 52 bits, and so, once in many, in the last of 23.
    assert np.isclose(packed.weight.numpy(), weight, rtol=2**-23, atol=0).all()
    assert (packed.weight.numpy() == weight).mean() > 0.99
    assert np.isclose(packed.bias.numpy(), bias.astype(np.float32), rtol=2**-23, atol=1e-12).all()


def test_nan_stays_nan_behind_a_relu(isa: str) -> None:
    for image in ((3, 3), (6, 7), (20, 30)):  # fewer pixels than a vector, and more
        dense = layer(2, 3, 1, 1, 0, 0.0)
        x = torch.randn(1, 2, *image)
        x[0, 0, 1, 1] = float("nan")
        found, wanted = SparseConv2d.of(dense, names=("", "relu"))(x), dense(x).relu()
        assert torch.equal(found.isnan(), wanted.isnan())
        assert wanted.isnan().sum() == 3
        assert torch.allclose(found, wanted, atol=1e-5, equal_nan=True)


def test_other_dtypes_never_reach_a_kernel(isa: str) -> None:
    dense = layer(4, 6, 3, 1, 1, 0.7)
    x = torch.randn(2, 4, 9, 9)
    for dtype in (torch.bfloat16, torch.float64):
        packed = SparseConv2d.of(dense).to(dtype)
        assert packed.values.dtype == dtype
        wanted = dense(x)
        for given_ in (x, x.to(dtype)):
            assert packed(given_).dtype == given_.dtype
            assert torch.allclose(packed(given_).float(), wanted, atol=0.05)


def test_it_is_copied_taken_back_and_compiled_in_one_graph() -> None:
    dense = layer(4, 6, 3, 2, 1, 0.7)
    packed, x = SparseConv2d.of(dense), torch.randn(2, 4, 9, 9)
    back = densify(nn.Sequential(copy.deepcopy(packed)))[0]
    assert type(back) is nn.Conv2d
    assert torch.equal(back.weight, dense.weight)
    assert torch.equal(back(x), dense(x))
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), packed(x))
    own = (packed.values, packed.columns, packed.starts, packed.bias, packed.shape, packed.stride, packed.padding)
    torch.library.opcheck(torch.ops.secateur.packed_convolution.default, (x, *own, True))


@pytest.mark.parametrize(
    "dense",
    [nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, dilation=2),
     nn.Conv2d(4, 4, 3, padding_mode="reflect", padding=1),
     nn.Conv2d(4, 4, 3, padding="same"), nn.Conv2d(4, 4, 3).double()],
    ids=["groups", "dilation", "reflect", "same", "float64"],
)  # fmt: skip
def test_other_kinds_are_refused(dense: nn.Conv2d) -> None:
    with pytest.raises(UnsupportedError, match="convolution"):
        SparseConv2d.of(dense)


def test_wrong_images_are_named() -> None:
    packed = SparseConv2d.of(layer(4, 6, 3, 1, 0, 0.7))
    for wrong in (torch.randn(1, 3, 9, 9), torch.randn(4, 9, 9), torch.randn(1, 4, 2, 9)):
        with pytest.raises(InputError):
            packed(wrong)


@pytest.mark.parametrize(
    ("part", "wild"),
    [("columns", 36), ("columns", -1), ("columns", 0), ("starts", 1_000), ("starts", -1), ("values", 0.0)],
)
def test_damaged_tensors_are_refused_before_a_kernel_follows_them(part: str, wild: int) -> None:
    packed = SparseConv2d.of(layer(4, 6, 3, 1, 0, 0.7))
    state = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    state[part][2] = wild
    with pytest.raises(InputError, match="damaged"):
        packed.load_state_dict(state)


@pytest.mark.skipif(bool(native.why_not()), reason=native.why_not())
def test_only_winners_are_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(layer(3, 8, 3, 1, 1, 0.9), layer(8, 8, 1, 1, 0, 0.9), layer(8, 8, 1, 1, 0, 0.1)).eval()
    model.append(nn.Conv2d(8, 8, 3, groups=2)).requires_grad_(False)
    told = {3: 0.5, 8: 0.97}
    monkeypatch.setattr(convolving, "_measure", lambda stretch, *_: told[stretch.layer.in_channels])
    both = {"dense": Latency(1.0, 1.0, 1.0, 9), "deployed": Latency(0.5, 0.5, 0.5, 9, ratio=(0.5, 0.5, 0.5))}
    monkeypatch.setattr(planner, "latency", lambda *_, **__: both)
    x = torch.randn(1, 3, 8, 8)
    done = sc.deploy(model, x, convolutions=True, table=False)
    assert done.swapped == ("0",)
    why = {each.name: each.why for each in done.decisions}
    assert "0.97x" in why["1"]
    assert "few" in why["2"]
    assert torch.allclose(done.model(x), model(x), atol=1e-5)
    assert not sc.deploy(model, x, table=False).decisions


def test_of_several_sizes_of_images_the_slowest_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(nn.Module):
        def __init__(self, sizes: tuple[int, int]) -> None:
            super().__init__()
            self.conv, self.sizes = layer(3, 8, 3, 1, 1, 0.9), sizes

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sum(self.conv(x[..., :size, :size]).mean() for size in self.sizes)

    monkeypatch.setattr(native, "isa", lambda: "scalar")
    monkeypatch.setattr(convolving, "_ratio", lambda layer, shape, contest: {8: 1.4, 12: 0.5}[shape[-1]])
    for sizes in ((8, 12), (12, 8)):
        [(decided, packed)] = convolving.decide_convolutions(Twice(sizes), [torch.randn(2, 3, 12, 12)], None, 0.05)
        assert packed is None
        assert decided.ratio == {2: 1.4}


def test_an_image_without_a_batch_leaves_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "isa", lambda: "scalar")
    model = nn.Sequential(layer(3, 8, 3, 1, 1, 0.9))
    [(decided, packed)] = convolving.decide_convolutions(model, [torch.randn(3, 12, 12)], None, 0.05)
    assert packed is None
    assert "without a batch" in decided.why


@pytest.mark.skipif(bool(native.why_not()), reason=native.why_not())
@pytest.mark.parametrize("times", [(2.0, 1.0), (1.0, 2.0)])
def test_the_better_layout_of_images_is_the_one_to_beat(times: tuple[float, float]) -> None:
    class Told:
        def times(self, calls: dict, twins: dict) -> dict[str, np.ndarray]:
            assert calls.keys() == twins.keys() == {"dense", "last", "packed"}
            return {
                name: np.full(3, time) for name, time in zip(("dense", "last", "packed"), (*times, 0.8), strict=True)
            }

    stretch = convolving.Stretch(layer(3, 8, 3, 1, 1, 0.9), None, Behind())
    ratio = convolving._measure(stretch, torch.Size((1, 3, 8, 8)), Told())  # type: ignore[arg-type]
    assert ratio == pytest.approx(0.8)


@pytest.mark.skipif(bool(native.why_not()), reason=native.why_not())
def test_every_batch_size_has_to_win_and_other_strides_are_other_measurements(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[object, ...]] = []

    def told(stretch: convolving.Stretch, shape: torch.Size, *_: object) -> float:
        asked.append((stretch.layer.stride, stretch.layer.padding, *shape))
        return 0.5 if shape[0] == 1 else 1.1

    monkeypatch.setattr(convolving, "_measure", told)
    same = [layer(4, 4, 3, stride, padding, 0.9) for stride, padding in ((1, 1), (2, 1), (1, 2), (1, 1))]
    contest = Contest(Table(None), cold=1000, rounds=2, bfloat16=False)
    examples = [torch.randn(size, 4, 8, 8) for size in (1, 3)]
    for dense in same:
        found = decide_convolutions(nn.Sequential(dense), examples, contest, 0.05)
        ((decision, packed),) = found
        assert (decision.format, packed) == ("", None)
        assert decision.ratio == {1: 0.5, 3: 1.1}
    # Three kinds at two sizes; the fourth layer is like the first.
    assert len(asked) == len(set(asked)) == 6
