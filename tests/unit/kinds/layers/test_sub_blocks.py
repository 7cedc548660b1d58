"""Attention and MLP of a block, each by itself: against forwards written out by hand, and on transformers' families."""

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stacks import resnet
from torch import nn

import secateur as sc
from secateur.criteria import BlockInfluence, LossIncrease
from secateur.errors import CertificateError, InputError, PlanMismatchError, RecipeError, UnsupportedError
from secateur.kinds.edit import Edit
from secateur.kinds.layers.prove import certify_branches, require_silent
from secateur.kinds.layers.stub import Stub
from secateur.measure import macs, num_params
from secateur.result import NotNativeWarning
from secateur.structure.branches import find_branches
from secateur.structure.left_out import left_out

WIDTH, DEPTH = 8, 4


class Mix(nn.Module):
    """Stands for attention: mixes positions, answers with a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden, scale=1.0):
        return self.o(torch.tanh(self.v(hidden)).cumsum(1) * scale), None


class PreNorm(nn.Module):
    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.n1, self.mix = nn.LayerNorm(WIDTH), Mix()
        self.n2, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.inplace, self.drop = inplace, nn.Dropout(0.1)

    def parts(self, x):
        """Each branch by hand, on its input."""
        return self.mix(self.n1(x))[0], lambda h: self.down(torch.relu(self.up(self.n2(h))))

    def forward(self, x):
        h, _ = self.mix(hidden=self.n1(x), scale=1.0)
        h = self.drop(h)
        if self.inplace:
            h += x  # over what was added, and then into the trunk
            x = h
            x += self.drop(self.down(torch.relu(self.up(self.n2(x)))))
            return x
        x = x + h
        return self.drop(self.down(torch.relu(self.up(self.n2(x))))) + x


class PostNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n1, self.mix = nn.LayerNorm(WIDTH), Mix()
        self.n2, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x):
        x = self.n1(x + self.mix(x)[0])
        return self.n2(self.down(torch.relu(self.up(x))) + x)


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)
        self.kind = kind
        self.layers = nn.ModuleList(PostNorm() if kind == "post" else PreNorm(kind == "inplace") for _ in range(DEPTH))

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def by_hand(net, gone, x):
    """The forward written out; branch 2 i is the mixing of layer i, 2 i + 1 its MLP."""
    x = net.stem(x)
    for i, layer in enumerate(net.layers):
        mix = (lambda h, of=layer: of.mix(of.n1(h))[0]) if net.kind != "post" else (lambda h, of=layer: of.mix(h)[0])
        inner = (lambda h, of=layer: of.n2(h)) if net.kind != "post" else (lambda h: h)
        x = x if 2 * i in gone else x + mix(x)
        x = layer.n1(x) if net.kind == "post" else x
        x = x if 2 * i + 1 in gone else x + layer.down(torch.relu(layer.up(inner(x))))
        x = layer.n2(x) if net.kind == "post" else x
    return net.head(x)


def net(kind="pre", seed=0):
    torch.manual_seed(seed)
    return Net(kind).eval()


def example(seed=0, batch=3):
    return torch.randn(batch, 5, 4, generator=torch.Generator().manual_seed(seed))


def plan_for(model, x, gone, **changes):
    return sc.plan(model, x, granularity="sub_block", remove={"layers.sub_blocks": list(gone)}, **changes)


@pytest.mark.parametrize("kind", ["pre", "post", "inplace"])
@given(gone=st.sets(st.integers(0, 2 * DEPTH - 1), min_size=1, max_size=2 * DEPTH - 1), seed=st.integers(0, 99))
@settings(max_examples=8, deadline=None)
def test_what_is_left_is_the_forward_without_those_branches(kind, gone, seed):
    model, x = net(kind, seed), example(seed)
    before = copy.deepcopy(model.state_dict())
    plan = plan_for(model, x, gone)
    cut = plan.apply(model)
    other = example(seed + 1, batch=2)
    assert torch.allclose(cut(other), by_hand(model, gone, other), atol=1e-6)
    assert plan.cost["params"] == [num_params(model), num_params(cut)]
    assert plan.cost["macs"] == [macs(model, x), macs(cut, x)]
    assert plan.certificate.method == "nothing added"
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m)]
    said = "".join(line for line in plan.explain().splitlines() if "zeros in the place of" in line)
    assert said.count("layers.") == sum(isinstance(module, Stub) for module in cut.modules())
    assert all(f"layers.{i // 2}.{'down' if i % 2 else 'mix'}" in said for i in gone)


@pytest.mark.parametrize("kind", ["pre", "post", "inplace"])
def test_branches_are_found_in_their_order_with_their_own_modules_only(kind):
    model, x = net(kind), example()
    found = find_branches(model, x, [f"layers.{i}" for i in range(DEPTH)])
    first, second = (["mix"], ["up", "down"]) if kind == "post" else (["n1", "mix"], ["n2", "up", "down"])
    for i in range(DEPTH):
        names = [[part.name.removeprefix(f"layers.{i}.") for part in branch.modules] for branch in found[f"layers.{i}"]]
        assert names == [first, second]


@pytest.mark.parametrize("kind", ["pre", "post", "inplace"])
def test_influence_and_loss_increase_from_their_definitions(kind):
    model, x, y = net(kind), example(batch=6), torch.randint(0, 3, (6, 5))
    hidden, pairs = model.stem(x), []
    for layer in model.layers:
        start = hidden
        after = start + layer.mix(start if kind == "post" else layer.n1(start))[0]
        pairs.append((start, after))
        trunk = layer.n1(after) if kind == "post" else after
        inner = trunk if kind == "post" else layer.n2(trunk)
        end = trunk + layer.down(torch.relu(layer.up(inner)))
        pairs.append((trunk, end))
        hidden = layer.n2(end) if kind == "post" else end
    arrays = [(a.detach().double().numpy(), b.detach().double().numpy()) for a, b in pairs]
    wanted = [(1 - (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).mean() for a, b in arrays]
    given_ = {"granularity": "sub_block", "data": [x[:2], x[2:]]}
    assert np.allclose(sc.score(model, x, criterion=BlockInfluence(), **given_)["layers.sub_blocks"], wanted, atol=1e-6)

    def loss(module, batch):
        return nn.functional.cross_entropy(module(batch[0]).flatten(0, 1), batch[1].flatten())

    scores = sc.score(model, x, granularity="sub_block", criterion=LossIncrease(), data=[(x, y)], loss=loss)[
        "layers.sub_blocks"
    ]
    with torch.no_grad():
        whole = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        rises = [
            float(nn.functional.cross_entropy(by_hand(model, {i}, x).flatten(0, 1), y.flatten()) - whole)
            for i in range(2 * DEPTH)
        ]
    assert np.allclose(scores, rises, atol=1e-6)

    sizes = []
    for layer in model.layers:
        norms = [] if kind == "post" else [layer.n1, layer.n2]
        parts = [[layer.mix, *norms[:1]], [layer.up, layer.down, *norms[1:]]]
        sizes += [sum(p.numel() for module in part for p in module.parameters()) for part in parts]
    per = sc.score(
        model, x, granularity="sub_block", criterion=LossIncrease(per="params"), data=[(x, y)], loss=loss
    )["layers.sub_blocks"]  # fmt: skip
    assert np.allclose(per, np.array(rises) / sizes, atol=1e-8)


@pytest.mark.parametrize("seed", range(6))
def test_greedy_turns_are_those_of_brute_force(seed):
    model, x = net(seed=seed), example(seed, batch=6)
    y = torch.randint(0, 3, (6, 5), generator=torch.Generator().manual_seed(seed))

    def loss(module, batch):
        return nn.functional.cross_entropy(module(batch[0]).flatten(0, 1), batch[1].flatten())

    @torch.no_grad()
    def without(gone):
        return float(nn.functional.cross_entropy(by_hand(model, gone, x).flatten(0, 1), y.flatten()))

    sizes = [num_params(part) for layer in model.layers for part in _parts_of(layer)]
    criterion = LossIncrease(per="params", greedy=True, turns=4)
    turns = sc.score(model, x, granularity="sub_block", criterion=criterion, data=[(x, y)], loss=loss)
    found = turns["layers.sub_blocks"].argsort().tolist()
    gone, last = set(), without(set())
    for turn in range(4):
        after = {i: without({*gone, i}) for i in set(range(2 * DEPTH)) - gone}
        first = min(after, key=lambda i: (after[i] - last) / sizes[i])
        assert found[turn] == first
        gone.add(first)
        last = after[first]


def _parts_of(layer):
    """Each branch of a pre-norm layer with its norm, as one module."""
    return nn.ModuleList([layer.n1, layer.mix]), nn.ModuleList([layer.n2, layer.up, layer.down])


class Loud(nn.Module):
    def forward(self, hidden, scale=1.0):
        return hidden + 1, None


def test_a_branch_that_a_norm_hides_is_still_heard():
    model, x = net("post"), example()
    branch = find_branches(model, x, ["layers.3"])["layers.3"][1]
    cut = plan_for(model, x, [7]).apply(model)
    require_silent(cut, x, [branch])
    cut.layers[3].down = nn.Linear(WIDTH, WIDTH, bias=False)
    nn.init.eye_(cut.layers[3].down.weight)  # of zeros it makes zeros
    require_silent(cut, x, [branch])
    cut.layers[3].up = nn.Identity()  # and now the positive part of the input is added
    with pytest.raises(CertificateError, match="that is gone adds numbers up to"):
        require_silent(cut, x, [branch])


def test_the_proof_sees_a_branch_that_is_cut_otherwise():
    model, x = net(), example()
    plan = plan_for(model, x, [2])
    gone = [find_branches(model, x, ["layers.1"])["layers.1"][0]]
    for name, stub in (("layers.1.mix", Loud()), ("layers.2.mix", Stub(2)), ("layers.1.n1", None)):
        wrong = Edit(layers=plan.layers).copy(model)
        owner, _, last = name.rpartition(".")
        if stub is None:
            wrong.layers[1].mix = copy.deepcopy(model.layers[1].mix)
        else:
            setattr(wrong.get_submodule(owner), last, stub)
        with pytest.raises(CertificateError, match="without the branches"):
            certify_branches(model, wrong, x, gone, plan.layers)


def test_a_changed_file_is_refused_and_an_honest_one_is_proved_anew(tmp_path):
    model, x = net(), example()
    plan_for(model, x, [1, 2]).save(tmp_path / "plan.json")
    loaded = sc.Plan.load(tmp_path / "plan.json")
    assert loaded.prove(net(seed=3), x).method == "nothing added"
    data = json.loads((tmp_path / "plan.json").read_text())
    stubs = data["layers"]["layers"]["stubs"]
    stubs["layers.3.mix"] = stubs.pop("layers.1.mix")
    data["certificate"] = data["decision"] = None
    with pytest.raises(PlanMismatchError, match="the blocks would be cut otherwise"):
        sc.Plan.from_data(data).prove(net(), x)
    stubs["layers.9.mix"] = stubs.pop("layers.3.mix")
    with pytest.raises(PlanMismatchError, match=r"layers\.9\.mix"):
        sc.Plan.from_data(data).apply(net())


def test_rounds_of_all_kinds_become_one_plan_that_loads(tmp_path):
    model, x = net(), example()
    rounds = [
        {"granularity": "sub_block", "remove": {"layers.sub_blocks": [0, 3]}},
        {"granularity": "layer", "remove": {"layers": [1]}},
        {"granularity": "sub_block", "target": {"count": 1}},
        {"granularity": "neuron", "target": {"sparsity": 0.3}},
    ]
    cut, whole = model, None
    for one in rounds:
        plan = sc.plan(cut, x, criterion="random", **one) if "target" in one else sc.plan(cut, x, **one)
        whole = plan if whole is None else whole.then(plan, model)
        cut = plan.apply(cut)
    assert len(cut.layers) == DEPTH - 1
    again = whole.apply(net(), example=x)
    assert torch.allclose(again(x), cut(x), atol=1e-6)
    whole.save(tmp_path / "plan.json")
    assert torch.allclose(sc.Plan.load(tmp_path / "plan.json").apply(net())(x), cut(x), atol=1e-6)


def test_in_place_the_optimizer_forgets_what_is_gone():
    model, x = net(), example()
    optimizer = torch.optim.Adam(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    plan_for(model, x, [2]).apply(model, inplace=True, optimizer=optimizer)
    here = {id(p) for p in model.parameters()}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == here
    assert set(map(id, optimizer.state)) <= here
    assert isinstance(model.layers[1].mix, Stub)
    assert not model.layers[1].mix.training
    assert model.train().layers[1].mix.training


def test_the_result_of_prune_is_saved_and_loaded(tmp_path):
    model, x = net(), example()
    result = sc.prune(
        model, x, granularity="sub_block", criterion="magnitude", target={"params": 0.7},
        overrides=["measure.latency=false"],
    )  # fmt: skip
    result.save(tmp_path / "out")
    loaded = sc.load(tmp_path / "out", net(seed=5), example=x)
    assert torch.equal(loaded(x), result.model(x))
    assert num_params(loaded) <= 0.7 * num_params(model)
    row = next(row for row in result.report.layers if row.name == "layers")
    gone = sum(len(group["removed"]) for group in result.plan.groups.values())
    assert (row.total, row.removed) == (2 * DEPTH, gone)
    assert row.params_before - row.params_after == num_params(model) - num_params(loaded)


def test_a_weight_that_something_else_holds_stays_and_is_counted_so():
    model, x = net(), example()
    model.layers[3].up.weight = model.layers[1].up.weight
    result = sc.prune(
        model, x, granularity="sub_block", criterion="magnitude", target={"count": 7},
        overrides=["measure.latency=false", "measure.quality=false"],
    )  # fmt: skip
    assert result.plan.cost["params"] == [num_params(model), num_params(result.model)]
    plan = plan_for(model, x, [3])
    assert plan.cost["params"] == [num_params(model), num_params(plan.apply(model))]
    row = next(row for row in result.report.layers if row.name == "layers")
    assert row.params_before - row.params_after == num_params(model) - num_params(result.model)


def test_protected_and_tied_branches_stay():
    model, x = net(), example()
    model.layers[3].mix = model.layers[2].mix  # two branches, one set of weights
    plan = sc.plan(
        model, x, granularity="sub_block", criterion="random", target={"count": 3}, protect=["layers.0", "layers.1.up"]
    )
    gone = plan.groups["layers.sub_blocks"]["removed"]
    assert len(gone) == 3
    assert set(gone) <= {2, 5, 7}


def test_an_identity_in_the_trunk_is_no_part_of_the_branch():
    model, x = resnet(), torch.randn(2, 3, 8, 8)
    plan = sc.plan(model, x, granularity="sub_block", criterion="random", target={"count": 2})
    gone = [name for entry in plan.layers.values() for name in entry["stubs"] if name.endswith("bn")]
    assert len(gone) == 2
    silent = copy.deepcopy(model)  # a norm without scale and shift gives zeros
    for name in gone:
        nn.init.zeros_(silent.get_submodule(name).weight)
        nn.init.zeros_(silent.get_submodule(name).bias)
    cut = plan.apply(model)
    assert torch.allclose(cut(x), silent(x), atol=1e-6)
    assert not [name for name, module in cut.named_modules() if name.endswith("skip") and isinstance(module, Stub)]


class SideBySide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix, self.mlp = nn.LayerNorm(WIDTH), Mix(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        h = self.norm(x)
        return self.mix(h)[0] + self.mlp(h) + x


class Counted(nn.Module):
    """A branch of which something beside the sum is used."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        h = self.a(x)
        return self.b(x + h) * h.mean() + (x + h)


class Fused(nn.TransformerEncoderLayer):
    """Asks its attention for settings before it decides whether to call it."""

    def __init__(self) -> None:
        super().__init__(WIDTH, 2, 12, batch_first=True)


class Turned(nn.Module):
    """Answers in another layout than it adds in."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 5)

    def forward(self, x):
        return x + self.a(x.transpose(1, 2)).transpose(1, 2)


def test_branches_side_by_side_go_together():
    torch.manual_seed(0)
    blocks = nn.Sequential(*(SideBySide() for _ in range(3)))
    model = nn.Sequential(nn.Linear(4, WIDTH), blocks, nn.LayerNorm(WIDTH)).eval()
    x = example()
    for place in range(3):
        cut = sc.plan(model, x, granularity="sub_block", remove={"1.sub_blocks": [place]}).apply(model)
        hidden = model[0](x)
        for i, block in enumerate(blocks):
            hidden = hidden if i == place else block(hidden)
        assert torch.equal(cut(x), model[2](hidden))


@pytest.mark.parametrize("block", [Counted, Fused, Turned])
def test_branches_that_cannot_go_alone_are_refused(block):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, WIDTH), nn.Sequential(*(block() for _ in range(3)))).eval()
    with pytest.raises(UnsupportedError, match="no branches that can be removed"):
        sc.plan(model, example(), granularity="sub_block", criterion="random", target={"count": 3})


@pytest.mark.parametrize("step", [{"method": "refit"}, {"method": "obs_update"}])
def test_recoveries_of_whole_blocks_are_refused(step):
    with pytest.raises(RecipeError, match="does not apply to sub-blocks"):
        sc.prune(
            net(), example(), data=[example()], granularity="sub_block", criterion="random", target={"count": 1},
            recover=[step], overrides=["measure.latency=false", "measure.quality=false"],
        )  # fmt: skip


# -- transformers ----------------------------------------------------------------------------------------------

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# family -> (its model, its config, branches of a layer that may not go, by a part of their name)
FAMILIES = {
    "Llama": ("LlamaForCausalLM", {**SMALL, "num_key_value_heads": 2}, ["0.self_attn"]),
    "Mixtral": ("MixtralForCausalLM", {**SMALL, "num_key_value_heads": 2, "num_local_experts": 4}, ["0.self_attn"]),
    "Gemma3Text": (
        "Gemma3ForCausalLM",
        {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        ["0.self_attn", "1.self_attn"],
    ),
    "GPT2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 64, "bos_token_id": 1,
                                 "eos_token_id": 2}, ["0.attn"]),
    "OPT": ("OPTForCausalLM", {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
                               "vocab_size": 64, "word_embed_proj_dim": 32}, ["0.self_attn"]),
    "Bert": ("BertForMaskedLM", SMALL, []),
    "ViT": ("ViTForImageClassification", {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
                                          "num_attention_heads": 4, "image_size": 16, "patch_size": 8}, []),
    "T5": ("T5ForConditionalGeneration", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4,
                                          "vocab_size": 64, "decoder_start_token_id": 0}, ["SelfAttention"]),
}  # fmt: skip


def of_family(name):
    transformers = pytest.importorskip("transformers")
    kind, config, locked = FAMILIES[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, f"{name}Config")(**config)).eval()
    ids = torch.randint(3, 64, (2, 10), generator=torch.Generator().manual_seed(0))
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16)} if name == "ViT" else {"input_ids": ids}
    return model, {**inputs, "decoder_input_ids": ids} if name == "T5" else inputs, locked


@pytest.mark.parametrize("name", FAMILIES)
def test_families_lose_branches_and_load_again(name, tmp_path):
    model, x, locked = of_family(name)
    result = sc.prune(
        model, x, granularity="sub_block", criterion="random", target={"count": 2},
        overrides=["measure.latency=false", "measure.quality=false"],
    )  # fmt: skip
    for group in result.plan.evidence.groups:
        known = group.attributes
        kept = [one for one, free in zip(known["blocks"], known["free"], strict=True) if not free]
        assert all(any(part in one for part in locked) for one in kept), kept
        assert not locked or kept
        assert set(kept) <= {one.name for one in result.report.left_out}
    with pytest.warns(NotNativeWarning, match=r"secateur\.load"):
        result.save(tmp_path / "out")
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"config\.json"):  # with one it would make up at random what is gone
        transformers.AutoModel.from_pretrained(tmp_path / "out")
    fresh, _, _ = of_family(name)
    loaded = sc.load(tmp_path / "out", fresh, example=x)
    with torch.no_grad():
        assert torch.equal(loaded(**x).logits, result.model(**x).logits)
    tried = name in ("Llama", "Mixtral", "Gemma3Text", "GPT2", "OPT")  # the others are no decoders of their own
    generates = tried or name in ("T5",)
    assert any("from a cache was not tried" in note for note in result.plan.certificate.notes) == (generates > tried)
    before, after = result.plan.cost["params"]
    assert (before, after) == (num_params(model), num_params(loaded))
    stubs = [name for entry in result.plan.layers.values() for name in entry["stubs"]]
    assert sorted(stubs) == sorted(name for name, module in loaded.named_modules() if isinstance(module, Stub))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_caches_are_tried_in_other_precisions_too(dtype):
    model, x, _ = of_family("Llama")
    plan = sc.plan(model.to(dtype), x, granularity="sub_block", criterion="random", target={"count": 1})
    assert [one.name for one in plan.left_out] == ["model.layers.0.self_attn"]
    assert "from its cache" in plan.left_out[0].why
    plan.apply(model)
    assert not [note for note in plan.certificate.notes if "not tried" in note]


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Gemma3Text", "OPT", "Mixtral"])
def test_generation_with_a_cache_is_that_without(name):
    model, x, _ = of_family(name)
    # Two branches of random weights in a row change much: what is generated would be another text.
    cut = sc.plan(model, x, granularity="sub_block", criterion="random", target={"count": 2}).apply(model)
    ids = x["input_ids"][:1, :4]
    said = cut.generate(ids, max_new_tokens=8, do_sample=False, use_cache=True)
    for _ in range(said.shape[1] - 4):
        with torch.no_grad():
            ids = torch.cat([ids, cut(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(said, ids[:, : said.shape[1]])


def test_the_first_attention_would_break_generation_and_is_seen():
    model, x, _ = of_family("Llama")
    with pytest.raises(InputError, match="from its cache"):
        sc.plan(model, x, granularity="sub_block", remove={"model.layers.sub_blocks": [0]})
    # Put in by hand it answers as it should, and generates otherwise.
    branch = find_branches(model, x, ["model.layers.0"])["model.layers.0"][0]
    with left_out(model, [branch]), torch.no_grad():
        expected = model(**x).logits
    model.model.layers[0].input_layernorm, model.model.layers[0].self_attn = Stub(), Stub(2)
    with torch.no_grad():
        assert torch.allclose(model(**x).logits, expected, atol=1e-6)
    ids = x["input_ids"]
    with torch.no_grad():
        past = model(input_ids=ids[:, :5], use_cache=True).past_key_values
        found = model(input_ids=ids[:, 5:], past_key_values=past).logits
    assert float((found - expected[:, 5:]).abs().max()) > 1e-2


def test_a_tokenizer_goes_along_without_a_config(tmp_path):
    model, x, _ = of_family("Llama")
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    model.config._name_or_path = str(source)
    result = sc.prune(
        model, x, granularity="sub_block", criterion="random", target={"count": 1},
        overrides=["measure.latency=false", "measure.quality=false"],
    )  # fmt: skip
    with pytest.warns(NotNativeWarning):
        result.save(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "generation_config.json", "README.md", "plan.json"} <= names
    assert "config.json" not in names


def test_a_file_that_removes_a_locked_branch_is_refused():
    model, x, _ = of_family("Llama")
    plan = sc.plan(model, x, granularity="sub_block", remove={"model.layers.sub_blocks": [2]})
    data = json.loads(plan.to_json())
    entry = data["layers"]["model.layers"]
    entry["stubs"] = {name.replace("layers.1", "layers.0"): stub for name, stub in entry["stubs"].items()}
    data["groups"]["model.layers.sub_blocks"]["removed"] = [[0, 1]]
    data["certificate"] = data["decision"] = None
    with pytest.raises(PlanMismatchError, match="locked units"):
        sc.Plan.from_data(data).prove(model, x)


def test_no_config_says_it():
    model, x, _ = of_family("Llama")
    with pytest.raises(UnsupportedError, match="lacks its attention or its MLP"):
        sc.plan(model, x, granularity="sub_block", criterion="random", target={"count": 1}, expressible=True)
