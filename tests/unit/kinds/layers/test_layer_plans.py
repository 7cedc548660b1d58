import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stacks import Block, Deep, Mixed, deep, example, resnet
from torch import nn

import secateur as sc
from secateur.errors import (
    CertificateError,
    FileRefusedError,
    PlanMismatchError,
    RecipeError,
    TargetError,
    UnsupportedError,
)
from secateur.kinds.edit import Edit
from secateur.kinds.layers.prove import certify_layers
from secateur.measure import macs, num_params
from secateur.planning.plan import Plan
from secateur.structure.stacks import find_stacks


def by_hand(model: Deep, removed, x):
    """The forward of Deep written out, without the removed blocks."""
    hidden = model.stem(x)
    for i, block in enumerate(model.layers):
        if i not in removed:
            scaled = hidden * model.layer_scales[i]
            hidden = (scaled + block.inner(block.norm(scaled))) / model.layer_scales[i]
    return model.head(hidden)


def plan_for(model, x, **changes):
    return sc.plan(model, x, **{"granularity": "layer", "target": {"count": 2}, **changes})


@pytest.mark.parametrize("gone", [[1], [4], [1, 4], [1, 2, 4]])
def test_a_weight_that_two_blocks_share_goes_with_the_last_of_them(gone):
    model, x = deep(), example()
    model.layers[4].inner[0].weight = model.layers[1].inner[0].weight
    plan = sc.plan(model, x, granularity="layer", remove={"layers": gone})
    cut = plan.apply(model)
    assert plan.cost["params"] == [num_params(model), num_params(cut)]
    assert torch.allclose(cut(x), by_hand(model, gone, x), atol=1e-6)


def test_removal_is_physical_and_equals_identity():
    model, x = deep(), example()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan = plan_for(model, x)
    cut = plan.apply(model)
    removed = plan.layers["layers"]["removed"]
    assert len(removed) == 2
    assert len(cut.layers) == cut.num_layers == len(cut.layer_scales) == 4
    assert [block.layer_idx for block in cut.layers] == [0, 1, 2, 3]
    assert torch.allclose(cut(x), by_hand(model, removed, x), atol=1e-6)
    assert plan.certificate.method == "identity"
    assert [plan.cost["params"], plan.cost["macs"]] == [
        [num_params(model), num_params(cut)],
        [macs(model, x), macs(cut, x)],
    ]
    assert len(model.layers) == model.num_layers == 6
    assert [block.layer_idx for block in model.layers] == list(range(6))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not [m for m in model.modules() if "forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks]


@settings(max_examples=25, deadline=None)
@given(st.sets(st.integers(0, 5), min_size=1, max_size=5), st.integers(0, 3))
def test_any_choice_equals_the_forward_written_out(removed, seed):
    model, x = deep(seed=seed), example(seed)
    plan = plan_for(model, x)
    layers = {"layers": {**plan.layers["layers"], "removed": sorted(removed)}}
    left = [i for i in range(6) if i not in removed]
    attributes = {a: len(left) for a in plan.attributes if a.name == "num_layers"}
    forced = Plan(**{**vars(plan), "layers": layers, "attributes": attributes, "evidence": None})
    assert torch.allclose(forced.apply(model)(x), by_hand(model, removed, x), atol=1e-6)


def test_float64_certificate():
    model = deep()
    plan = plan_for(model, example(), dtype="float64")
    plan.apply(model)
    assert plan.certificate.dtype == "float64"
    assert plan.certificate.max_abs_error <= 1e-10


def test_outputs_in_tuples_dicts_and_keyword_arguments():
    torch.manual_seed(0)
    model, x = Mixed().eval(), torch.randn(2, 5, 8)
    plan = plan_for(model, x)
    cut = plan.apply(model)
    hidden = x
    for i, block in enumerate(model.blocks):
        if i not in plan.layers["blocks"]["removed"]:
            hidden = Block.forward(block, hidden) + hidden.mean()
    assert torch.allclose(cut(x), hidden, atol=1e-6)


def test_stages_and_in_place_relu():
    model, x = resnet(), torch.randn(2, 3, 8, 8)
    found = {s.path: s.free for s in find_stacks(model, x).stacks}
    assert found == {"0": [1, 2], "2": [1, 2, 3]}
    plan = plan_for(model, x, target={"sparsity": 0.99 * 3 / 7}, criterion="block-influence", data=[x])
    cut = plan.apply(model)
    assert len(cut[0]) + len(cut[2]) == 4
    gone = [plan.layers.get(str(s), {"removed": []})["removed"] for s in (0, 2)]
    kept = [[m for i, m in enumerate(model[s]) if i not in out] for s, out in zip((0, 2), gone, strict=True)]
    by_hand = nn.Sequential(*kept[0], model[1], *kept[1], *list(model)[3:])
    assert torch.equal(cut(x), by_hand(x))


def test_targets_are_exact():
    model, x = deep(8), example()
    one = num_params(model.layers[0])
    for fraction in (0.9, 0.5, 0.3):
        cut = plan_for(model, x, target={"params": fraction}).apply(model)
        assert num_params(cut) <= fraction * num_params(model) < num_params(cut) + one
        cut = plan_for(model, x, target={"macs": fraction}).apply(model)
        assert macs(cut, x) <= fraction * macs(model, x) < macs(cut, x) + macs(model.layers[0], torch.randn(3, 5, 8))
    assert len(plan_for(model, x, target={"sparsity": 0.25}).apply(model).layers) == 6
    assert len(plan_for(model, x, target={"count": 3}, round_to=4).apply(model).layers) == 4
    assert len(plan_for(model, x, target={"count": 5, "params": 0.9}).apply(model).layers) == 3
    with pytest.raises(TargetError, match="at most 5 of 8"):
        plan_for(model, x, target={"count": 6}, min_keep=3)
    with pytest.raises(TargetError, match="cannot be reached"):
        plan_for(model, x, target={"params": 0.01})


def test_protect_and_locked_blocks():
    model, x = deep(), example()
    plan = plan_for(model, x, target={"count": 4}, protect=["layers.0", "layers.5.norm"])
    assert plan.layers["layers"]["removed"] == [1, 2, 3, 4]
    with pytest.raises(TargetError, match="at most 4 of 6"):
        plan_for(model, x, target={"count": 5}, protect=["layers.0", "layers.5.norm"])
    with pytest.raises(UnsupportedError, match="protected"):
        plan_for(model, x, protect=["layers"])


class Parallel(nn.Module):
    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(Block(8, i) for i in range(3))

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], -1)


class Literal(Deep):
    def forward(self, x):
        x = self.stem(x)
        for i in range(6):
            x = self.layers[i](x)
        return self.head(x)


class Auxiliary(Deep):
    """The last but one state is read too, so that the last block is no identity that can go."""

    def forward(self, x):
        x = self.stem(x)
        states = []
        for block in self.layers:
            x = block(x)
            states.append(x)
        return self.head(x) + self.head(states[-2])


@pytest.mark.parametrize("kind", [Parallel, Literal])
def test_stacks_that_other_code_depends_on_are_locked(kind):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8 if kind is Parallel else 4)
    with pytest.raises(UnsupportedError, match="no blocks that can be removed"):
        plan_for(kind().eval(), x)


def test_a_block_that_feeds_others_is_locked():
    torch.manual_seed(0)
    model, x = Auxiliary().eval(), example()
    plan = plan_for(model, x, target={"count": 4})
    assert 5 not in plan.layers["layers"]["removed"]
    plan.apply(model)
    assert plan.certificate.max_abs_error <= 1e-5
    with pytest.raises(UnsupportedError, match="index out of range"):
        plan_for(model, x, target={"count": 5})


def test_plain_sequentials_have_no_layers():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(UnsupportedError):
        plan_for(net, torch.randn(2, 4))


def test_certificate_catches_a_tampered_plan():
    model, x = deep(), example()
    plan = plan_for(model, x)
    i = next(i for i in range(6) if i not in plan.layers["layers"]["removed"])
    plan.layers["layers"]["removed"] = [i, *plan.layers["layers"]["removed"][1:]]
    for attribute in [a for a in plan.attributes if a.name == "layer_idx"]:
        del plan.attributes[attribute]
    with pytest.raises(CertificateError):
        plan.apply(model)


def test_wrong_requests():
    model, x = deep(), example()
    with pytest.raises(RecipeError, match="latency_ms"):
        plan_for(model, x, target={"latency_ms": 0})
    with pytest.raises(RecipeError, match="at least one of"):
        plan_for(model, x, target={})
    with pytest.raises(RecipeError, match="scope"):
        plan_for(model, x, scope="row")
    with pytest.raises(RecipeError, match="no option"):
        plan_for(model, x, criterion={"name": "every", "step": 2})
    with pytest.raises(RecipeError, match="k is 0"):
        plan_for(model, x, criterion={"name": "every", "k": 0})
    with pytest.raises(RecipeError, match="needs data"):
        plan_for(model, x, criterion="loss-increase")


def test_explain_diff_and_replay(tmp_path):
    model, x = deep(), example()
    plan = plan_for(model, x, criterion="every")
    cut = plan.apply(model)
    assert "layers  layer      4/6 kept" in plan.explain()
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded.to_json() == plan.to_json()
    assert plan.diff(loaded) == ""
    assert "only here" in plan.diff(plan_for(model, x, criterion={"name": "every", "k": 3}))
    fresh = deep(seed=7)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(loaded.apply(fresh)(x), cut(x))
    with pytest.raises(PlanMismatchError):
        loaded.apply(cut)
    with pytest.raises(PlanMismatchError):
        loaded.apply(deep(7))


def test_inplace_with_optimizer_and_training():
    model, x = deep(), example()
    optimizer = torch.optim.Adam(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    plan = plan_for(model, x)
    expected = plan.apply(model)(x)
    kept = [p for i, b in enumerate(model.layers) if i not in plan.layers["layers"]["removed"] for p in b.parameters()]
    assert plan.apply(model, inplace=True, optimizer=optimizer) is model
    assert torch.equal(model(x), expected)
    ours = [p for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in ours] == [id(p) for p in model.parameters()]
    assert {id(p) for p in kept} <= {id(p) for p in ours}
    assert set(map(id, optimizer.state)) == set(map(id, ours))
    before = model.layers[0].inner[0].weight.clone()
    optimizer.zero_grad()
    model(x).sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.layers[0].inner[0].weight)


def test_removed_weights_are_not_copied_and_memory_is_apart():
    model, x = deep(), example()
    cut = plan_for(model, x).apply(model)
    theirs = {p.data_ptr() for p in model.parameters()}
    assert not theirs & {p.data_ptr() for p in cut.parameters()}


def test_save_and_load(tmp_path):
    model, x = deep(), example()
    result = sc.prune(
        model,
        x,
        data=[x],
        recipe={
            "granularity": "layer",
            "criterion": "block-influence",
            "target": {"sparsity": 0.5},
            "measure": {"latency": False},
        },
    )
    result.save(tmp_path / "out")
    again = sc.load(tmp_path / "out", model=lambda: deep(seed=9))
    assert torch.equal(again(x), result.model(x))
    assert len(again.layers) == 3


def hostile(data):
    entry = data["layers"]["layers"]
    for bad in (
        {"size": 6, "removed": [0, 0], "lists": []},
        {"size": 6, "removed": [3, 1], "lists": []},
        {"size": 6, "removed": [-1], "lists": []},
        {"size": 6, "removed": [6], "lists": []},
        {"size": 6, "removed": [], "lists": []},
        {"size": 6, "removed": list(range(6)), "lists": []},
        {"size": True, "removed": [0], "lists": []},
        {"size": 6, "removed": "01", "lists": []},
        {"size": 6, "removed": [0.0], "lists": []},
        {"size": 6, "removed": [0], "lists": [["x"]]},
        {"size": 6, "removed": [0], "lists": [[1, 2]]},
        {"size": 6, "removed": [0], "lists": [], "code": "x"},
        None,
        [],
    ):
        yield {**data, "layers": {"layers": bad}}
    yield {**data, "layers": [1]}
    yield {**data, "masks": {"stem.weight": {"shape": [9], "kept": 1, "bits": "gA=="}}}
    yield {**data, "cuts": {"stem.weight": {"0": [[2, 0]]}}}
    yield {**data, "request": {**data["request"], "target": {"count": -1}}}
    yield {**data, "request": {**data["request"], "run": "code"}}
    yield {**data, "units": {**data["units"], "removed": "many"}}
    yield {**data, "cost": {"macs": ["x", None]}}
    yield {**data, "groups": {"layers": {"granularity": "layer", "size": 2, "removed": [[0, 5]]}}}
    yield {**data, "attributes": [{"owner": "", "name": "num_layers", "item": None, "value": -1}]}
    assert entry


def test_hostile_files_are_refused(tmp_path):
    plan = plan_for(deep(), example())
    good = json.loads(plan.to_json())
    for i, bad in enumerate(hostile(good)):
        path = tmp_path / f"{i}.json"
        path.write_text(json.dumps(bad))
        with pytest.raises(FileRefusedError):
            Plan.load(path)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("path", "lists"),
    [
        ("stem", []),
        ("layers.0", []),
        ("no.such", []),
        ("__class__", []),
        ("layers", [["", "__dict__"]]),
        ("layers", [["", "training"]]),
        ("layers", [["layers.0.__class__", "__mro__"]]),
        ("layers", [["", "_modules"]]),
        ("head", []),
    ],
)
def test_plans_that_reach_for_something_else_are_refused(path, lists):
    model = deep()
    data = json.loads(plan_for(model, example()).to_json())
    data["attributes"] = []
    data["layers"] = {path: {"size": 6, "removed": [0], "lists": lists}}
    plan = Plan.from_data(data)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanMismatchError):
        plan.apply(model)
    assert before.keys() == model.state_dict().keys()


def test_attributes_of_a_removed_block_are_refused():
    model = deep()
    data = json.loads(plan_for(model, example()).to_json())
    data["attributes"] = [{"owner": "layers.0", "name": "layer_idx", "item": None, "value": 3}]
    data["layers"]["layers"]["removed"] = [0]
    with pytest.raises(PlanMismatchError):
        Plan.from_data(data).apply(model)


class CountsItsBlocks(nn.Module):
    """Multiplies by the number of its blocks: without one of them it is another function."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual(8) for _ in range(4))
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x * len(self.blocks) * self.scale


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.relu(self.fc(x))


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6, 1e-9])
def test_a_wrong_removal_is_refused_however_small_the_outputs_are(scale: float) -> None:
    torch.manual_seed(0)
    model, x = CountsItsBlocks(scale).eval(), torch.randn(2, 8)
    with pytest.raises(UnsupportedError):
        plan_for(model, x, target={"count": 1})


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_the_certificate_itself_refuses_a_wrong_removal(scale: float) -> None:
    torch.manual_seed(0)
    model, x = CountsItsBlocks(scale).eval(), torch.randn(2, 8)
    layers = {"blocks": {"size": 4, "removed": [1], "lists": []}}
    with pytest.raises(CertificateError):
        certify_layers(model, Edit(layers=layers).copy(model), x, layers)


def test_an_error_of_a_thousandth_is_no_rounding():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x):
            return x + torch.tanh(self.inner(x))

    torch.manual_seed(0)
    model, x = nn.Sequential(*(Block() for _ in range(4))).eval(), torch.randn(5, 6)
    plan = sc.plan(model, x, granularity="layer", remove={"Sequential": [1]})
    cut = plan.apply(model)
    certify_layers(model, cut, x, plan.layers)
    with torch.no_grad():
        cut[0].inner.weight.mul_(1.002)
    with pytest.raises(CertificateError, match="identity in their place"):
        certify_layers(model, cut, x, plan.layers)
