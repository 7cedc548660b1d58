"""The 25 complaints about other pruners that can be expressed, each as a named regression."""

from __future__ import annotations

import copy
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import Expect, check, enliven
from micro import CASES
from micro.base import conv, conv_bn, head
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.errors import UnsupportedError
from secateur.structure.capture import capture
from secateur.structure.groups import structure

SAME_AS = {
    "tp-146-concat-of-the-same-tensor-twice": "SameTensorTwice",
    "tp-481-concat-of-unequal-branches": "ConcatNorm",
    "tp-415-pooled-and-concatenated-with-itself": "PyramidPooling",
    "tp-510-mask-of-one-channel": "BroadcastMask",
    "tp-420-tp-98-pixel-shuffle": "PixelShuffle",
    "tp-14-tp-45-channel-shuffle": "ShuffleUnit",
    "tp-126-nni-5751-nncf-986-one-output-channel": "OneOutputChannel",
    "tp-179-channel-multiplier": "DepthwiseMultiplier",
    "tp-393-tp-340-tp-287-fused-qkv": "VisionBlock",
    "tp-147-tp-386-tp-522-chunk-of-c2f": "CrossStage",
    "tp-436-grouped-queries": "RepeatedKeys",
    "tp-44-lstm": "lstm_of_two_layers",
    "tp-44-gru": "gru_both_directions_two_layers",
    "tp-44-projected-lstm": "lstm_projected",
    "tp-211-frozen-layers": "frozen_backbone",
    "oto-5-oto-17-slices-and-concats": "HalfSlices",
    "nni-3050-data-dependent-branch": "DataBranch",
    "tinynn-commented-out-unaligned-concats": "UnalignedConcats",
    "modelopt-prelu-has-a-weight-per-channel": "Parametric",
    "modelopt-glu-halves-its-input": "GatedLinearUnits",
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("issue", sorted(SAME_AS))
def test_structure_that_broke_others(issue: str) -> None:
    case = CASES[SAME_AS[issue]]
    torch.manual_seed(1)
    found = check(enliven(case.build(), seed=1), case.example(), seed=1, ratio=0.5, expect=case.expect)
    assert found.share > case.expect.share or case.expect.share == 0


def small() -> nn.Module:
    torch.manual_seed(0)
    return enliven(nn.Sequential(OrderedDict(a=conv_bn(3, 12), b=conv_bn(12, 16), c=conv_bn(16, 9), head=head(9))))


def picture() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class WithCache(nn.Module):
    """A causal model that returns logits and, layer by layer, its keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        self.embed, self.heads = nn.Embedding(20, 16), 4
        self.q, self.k, self.v, self.o, self.up, self.down = (
            nn.Linear(i, n) for i, n in [(16, 16), (16, 16), (16, 16), (16, 16), (16, 40), (40, 16)]
        )
        self.out = nn.Linear(16, 20)

    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids)
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(x)))
        return OrderedDict(logits=self.out(x), past=((k, v),), empty=None)


def test_tp_519_tp_467_causal_model_with_cache_and_ordered_output() -> None:
    expect = Expect(frozenset({"embed", "up"}), {"q/head": "output", "q/head_dim": "output"}, share=0.2)
    check(enliven(WithCache()), torch.arange(12).view(2, 6), expect=expect)


def test_nni_5738_mmrazor_431_feature_pyramid_in_a_dict() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.ModuleDict({"c2": conv_bn(3, 8), "c3": conv_bn(8, 12), "c4": conv_bn(12, 16)})
            self.lateral = nn.ModuleDict({k: nn.Conv2d(n, 10, 1) for k, n in [("c2", 8), ("c3", 12), ("c4", 16)]})
            self.head = conv(10, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            features: dict[str, Tensor] = {}
            for name, stage in self.body.items():
                x = stage(x if not features else F.max_pool2d(x, 2))
                features[name] = self.lateral[name](x)
            above: Tensor | None = None
            for name in sorted(features, reverse=True):
                if isinstance(above, Tensor):
                    features[name] = features[name] + F.interpolate(above, size=features[name].shape[-2:])
                above = features[name]
            return {name: self.head(F.relu(value)) for name, value in features.items()}

    free = frozenset({"body.c2.0", "body.c3.0", "body.c4.0", "lateral.c2"})
    check(enliven(Pyramid()), picture(), expect=Expect(free, share=0.4, zeroing=True))


def test_oto_57_nothing_to_prune_is_an_error_with_reasons() -> None:
    net = nn.Sequential(conv(3, 6), nn.Flatten())
    with pytest.raises(UnsupportedError, match="output"):
        sc.plan(net, picture(), target={"sparsity": 0.5})


@pytest.mark.parametrize("target", [{"sparsity": 0.85}, {"params": 0.1}])
def test_tinynn_109_nni_4991_no_layer_is_emptied(target: dict[str, float]) -> None:
    plan = sc.plan(small(), picture(), target=target)
    cut = plan.apply(small())
    assert min(m.weight.shape[0] for m in cut.modules() if isinstance(m, nn.Conv2d)) >= 1
    assert cut(picture()).shape == (2, 5)


def test_tp_448_floor_holds_in_global_ranking() -> None:
    net = small()
    with torch.no_grad():
        net.a[0].weight.mul_(1e-4)  # by scale alone every channel of this layer would go first
    plan = sc.plan(net, picture(), target={"sparsity": 0.6}, criterion="magnitude")
    assert plan.apply(net).a[0].out_channels >= 2


def test_nni_5187_whole_heads_are_units() -> None:
    case = CASES["VisionBlock"]
    found = check(enliven(case.build()), case.example(), kinds=("head",), ratio=0.5)
    assert found.cut.attention.num_heads == 2
    assert found.cut.attention.qkv.weight.shape == (3 * 2 * 6, 24)


def test_tp_436_attributes_stay_consistent() -> None:
    case = CASES["RepeatedKeys"]
    cut = check(enliven(case.build()), case.example(), kinds=("head",), ratio=0.5).cut
    assert cut.num_heads == cut.num_kv * cut.num_kv_groups
    assert cut.q.out_features == cut.num_heads * cut.head_dim
    assert cut.k.out_features == cut.num_kv * cut.head_dim


def test_tp_139_nni_3093_weights_load_into_the_original_class() -> None:
    plan = sc.plan(small(), picture(), target={"sparsity": 0.4})
    pruned = plan.apply(small())
    fresh = plan.apply(small())
    with torch.no_grad():
        [p.zero_() for p in fresh.parameters()]
    fresh.load_state_dict(pruned.state_dict())
    assert torch.equal(fresh.eval()(picture()), pruned.eval()(picture()))


def test_ultralytics_16806_copy_and_cast_of_the_result() -> None:
    pruned = sc.plan(small(), picture(), target={"sparsity": 0.4}).apply(small()).eval()
    twin = copy.deepcopy(pruned)
    assert torch.equal(twin(picture()), pruned(picture()))
    assert pruned.double()(picture().double()).dtype == torch.float64


def test_tp_120_tp_63_optimizer_trains_what_is_left() -> None:
    net = small()
    optimizer = torch.optim.AdamW(net.parameters())
    net(picture()).sum().backward()
    optimizer.step()
    plan = sc.plan(net, picture(), target={"sparsity": 0.4})
    plan.apply(net, inplace=True, optimizer=optimizer)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.zero_grad()
    net(picture()).pow(2).sum().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in net.parameters())


def test_tp_341_protected_layers_are_not_touched() -> None:
    plan = sc.plan(small(), picture(), target={"sparsity": 0.3}, protect=["b"])
    cut = plan.apply(small())
    assert all(torch.equal(x, y) for x, y in zip(cut.b.parameters(), small().b.parameters(), strict=True))
    assert cut.c[0].out_channels < 9


def test_tp_347_removing_nothing_changes_nothing() -> None:
    net = small().eval()
    assert torch.equal(sc.plan(net, picture(), target={"count": 0}).apply(net)(picture()), net(picture()))


def test_tp_149_result_keeps_no_gradients() -> None:
    net = small()
    net(picture()).sum().backward()
    cut = sc.plan(net, picture(), target={"sparsity": 0.4}).apply(net)
    assert all(p.grad is None for p in cut.parameters())
    assert sum(t.untyped_storage().nbytes() for t in cut.state_dict().values()) < sum(
        t.untyped_storage().nbytes() for t in net.state_dict().values()
    )


def test_tp_474_tp_525_index_sets_do_not_grow_with_the_width() -> None:
    def atoms(width: int) -> int:
        with torch.device("meta"):
            net = nn.Sequential(conv(3, width), nn.BatchNorm2d(width), nn.ReLU(), conv(width, width), head(width))
            record = capture(net, torch.empty(1, 3, 8, 8))
        assert structure(net, record).groups
        return len(record.space.atoms)

    assert atoms(16) == atoms(4096)


def test_modelopt_176_prune_a_chosen_submodule_only() -> None:
    plan = sc.plan(small(), picture(), target={"sparsity": 0.3}, protect=["a", "head"])
    assert set(plan.groups) == {"b.0"}


class Positions(nn.Module):
    """A table of positions beside the table that it is looked up in, as BERT has them."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(16, 8), nn.Linear(8, 4)
        self.register_buffer("numbers", torch.arange(16))

    def forward(self, x):
        return self.head(torch.relu(x + self.table(self.numbers[: x.shape[0]])))


def test_what_only_buffers_have_is_no_unit():
    model, example = Positions().eval(), torch.randn(8, 8)
    groups = structure(model, capture(model, example)).groups
    weights = {name for name, _ in model.named_parameters()}
    without = [group for group in groups if not any(span.tensor in weights for span in group.spans)]
    assert {span.tensor for group in without for span in group.spans} == {"numbers"}
    assert all("only buffers" in group.locks[-1].reason for group in without)
    with pytest.raises(UnsupportedError, match="everything is locked"):
        sc.plan(model, example, granularity="neuron", target={"sparsity": 0.5})
