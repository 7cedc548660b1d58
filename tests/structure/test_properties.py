"""What holds for every cut: composition, permutation, training alike, layouts, meta tensors, and named refusals."""

from __future__ import annotations

import copy
import inspect

import numpy as np
import pytest
import torch
from harness import Expect, check, enliven
from micro import CASES
from micro.base import conv, conv_bn, head, image
from micro.movement import LiteralView
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur.errors import CertificateError, SecateurError, UnsupportedError
from secateur.kinds.slices.certify import certify
from secateur.kinds.slices.cut import cut_copy
from secateur.kinds.slices.replay import Replay
from secateur.structure.attributes import edits
from secateur.structure.axes import kept
from secateur.structure.capture import capture
from secateur.structure.groups import structure


@pytest.mark.parametrize("name", ["ResidualBlock", "ShuffleUnit", "Dense", "VisionBlock", "lstm", "GroupShuffle"])
def test_a_cut_model_is_cut_again(name: str) -> None:
    case = CASES[name]
    first = check(enliven(case.build()), case.example(), ratio=0.3)
    second = check(first.cut, case.example(), ratio=0.3, seed=5, expect=Expect(zeroing=case.expect.zeroing))
    assert second.share > 0.1


def test_two_cuts_are_one() -> None:
    net, x = enliven(nn.Sequential(conv_bn(3, 12), conv_bn(12, 10), head(10))).eval(), image()()
    whole = np.array([0, 2, 3, 5, 8, 9, 11])
    part = np.array([0, 2, 3, 6])
    once = _keep(net, x, "0.0", whole[part])
    twice = _keep(_keep(net, x, "0.0", whole), x, "0.0", part)
    for (name, a), (_, b) in zip(once.state_dict().items(), twice.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def _keep(net: nn.Module, x: torch.Tensor, group: str, units: np.ndarray) -> nn.Module:
    record = capture(net, x)
    found = structure(net, record)
    atom = found.atoms[group]
    masks = {atom.id: np.isin(np.arange(atom.size), units)}
    cuts = {
        name: {d: torch.from_numpy(np.flatnonzero(m)) for d, a in enumerate(axes) if not (m := kept(a, masks)).all()}
        for name, axes in found.tensors.items()
    }
    cut = cut_copy(net, cuts, edits(net, record, {atom.id: len(units)}))
    certify(net, cut, x, record, masks)
    return cut


@pytest.mark.parametrize(
    "name", ["ResidualBlock", "GroupedConvolution", "UnalignedConcats", "SeparateAttention", "gru"]
)
def test_order_of_units_does_not_matter(name: str) -> None:
    """Permuting the units of every free group along all their slices leaves the outputs as they were."""
    case = CASES[name]
    net, x = enliven(case.build()).eval(), case.example()
    found = structure(net, capture(net, x))
    before = net(x)
    rng = np.random.default_rng(0)
    for group in (g for g in found.groups if not g.locks):
        order = torch.from_numpy(rng.permutation(group.size))
        tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
        for span in group.spans:
            assert span.index is not None
            d = max(range(span.index.dim()), key=lambda i, s=span: s.index.shape[i])
            unit = span.index.reshape(-1)
            source = torch.arange(len(unit))
            for number in range(group.size):
                source[unit == number] = torch.arange(len(unit))[unit == order[number]]
            tensors[span.tensor].data = tensors[span.tensor].data.index_select(d, source)
    torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-5)


def test_one_step_equals_a_step_of_the_zeroed_model() -> None:
    net, x = enliven(nn.Sequential(conv(3, 12), nn.ReLU(), conv(12, 10), nn.ReLU(), head(10))), image()()
    units = np.array([0, 1, 4, 7, 10])
    cut, masked = _keep(net, x, "0", units), copy.deepcopy(net)
    gone = torch.from_numpy(np.setdiff1d(np.arange(12), units))
    with torch.no_grad():
        masked[0].weight[gone] = 0
        masked[0].bias[gone] = 0
    for model in (cut, masked):
        model(x).pow(2).sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.01).step()
    torch.testing.assert_close(cut[0].weight, masked[0].weight[units])
    torch.testing.assert_close(cut[2].weight, masked[2].weight[:, units])
    torch.testing.assert_close(cut[4][2].weight, masked[4][2].weight)


def test_memory_format_dtype_and_frozen_state_stay() -> None:
    net = enliven(nn.Sequential(conv_bn(3, 12), conv_bn(12, 10), head(10)))
    net = net.to(memory_format=torch.channels_last).double()  # type: ignore[call-overload]
    net[1].requires_grad_(False)
    cut = check(net, image()().double()).cut
    assert cut[1][0].weight.is_contiguous(memory_format=torch.channels_last)
    assert {p.dtype for p in cut.parameters()} == {torch.float64}
    assert [p.requires_grad for p in cut.parameters()] == [p.requires_grad for p in net.parameters()]


def test_hooks_stay_on_the_cut_model() -> None:
    seen: list[int] = []
    net = nn.Sequential(conv(3, 12), nn.ReLU(), head(12))
    net[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    cut = check(net, image()(), ratio=0.5).cut
    seen.clear()
    cut(image()())
    assert seen == [6]


def test_fast_path_of_native_attention_on_the_cut_model() -> None:
    case = CASES["native_encoder_layers"]
    cut = check(enliven(case.build()), case.example()).cut.eval()
    with torch.no_grad():
        fast = cut(case.example())
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            slow = cut(case.example())
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


def test_models_on_meta_tensors_are_planned() -> None:
    with torch.device("meta"):
        net, x = CASES["TiedLanguageModel"].build(), torch.empty(2, 6, dtype=torch.long)
        groups = {g.name for g in structure(net, capture(net, x)).groups if not g.locks}
    assert groups == CASES["TiedLanguageModel"].expect.free


def test_a_refusal_names_the_line_of_the_literal() -> None:
    case = CASES["LiteralView"]
    found = structure(net := case.build(), capture(net, case.example()))
    lines, start = inspect.getsourcelines(LiteralView)
    line = start + next(i for i, text in enumerate(lines) if "view(-1, 8, 3, 3)" in text)
    [group] = [g for g in found.groups if g.name == "a"]
    assert any(lock.where == f"micro/movement.py:{line}" and lock.hint for lock in group.locks)


def test_a_wrong_cut_is_never_certified() -> None:
    """The certificate is no formality: another choice of units than the one replayed is refused."""
    net, x = enliven(nn.Sequential(conv(3, 8), nn.ReLU(), head(8))).eval(), image()()
    record = capture(net, x)
    atom = structure(net, record).atoms["0"]
    masks = {atom.id: np.arange(8) < 5}
    with pytest.raises(CertificateError):
        certify(net, _keep(net, x, "0", np.arange(3, 8)), x, record, masks)
    assert torch.isfinite(Replay(record, {**dict(net.named_parameters())}, masks).run()[0]).all()


def test_a_model_that_fails_after_the_cut_is_refused_and_nothing_changes() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = conv(3, 8), head(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.relu(self.conv(x))
            if len(self.conv.weight.tolist()) != 8:  # the width leaves the graph as a list
                raise ValueError("eight channels, please")
            return self.head(x)

    net = Stubborn()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(SecateurError, match=r"conv|eight|free|locked"):
        sc.plan(net, image()(), target={"sparsity": 0.5}).apply(net)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_complex_models_are_cut_and_certified() -> None:
    net = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 3)).to(torch.complex64)
    x = torch.randn(2, 6, dtype=torch.complex64)
    cut = _keep(net, x, "0", np.array([1, 2, 5, 7]))
    expected = net[0](x)[:, [1, 2, 5, 7]] @ net[1].weight[:, [1, 2, 5, 7]].t() + net[1].bias
    torch.testing.assert_close(cut(x), expected)


def test_torchscript_is_refused_by_name() -> None:
    net = torch.jit.trace(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)), torch.randn(2, 6))
    with pytest.raises(UnsupportedError, match="TorchScript"):
        sc.plan(net, torch.randn(2, 6), target={"sparsity": 0.5}).apply(net)
