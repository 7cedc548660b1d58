import copy
import importlib
import json

import pytest
import torch
from tiny import build, largest_difference
from torch import nn

import secateur as sc
from secateur.errors import CertificateError, RecipeError, UnsupportedError
from secateur.integrations.transformers import (
    build_shapes,
    config_files,
    edited,
    express,
    fields_of,
    is_native,
    scaled_value,
    shapes_of,
    solutions,
)
from secateur.model.reach import LOADERS
from secateur.model.state import State

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

CASES = [
    ("llama", "neuron", {"intermediate_size"}),
    ("llama", "head", {"num_attention_heads", "num_key_value_heads"}),
    ("bert", "neuron", {"intermediate_size"}),
    ("gpt2", "neuron", {"n_inner"}),
    ("vit", "channel", {"intermediate_size"}),
    pytest.param("gemma3", "channel", {"intermediate_size"}, marks=pytest.mark.slow),
    pytest.param("t5", "head", {"num_heads"}, marks=pytest.mark.slow),
    pytest.param("t5", "head_dim", {"d_kv"}, marks=pytest.mark.slow),
    pytest.param("bart", "neuron", {"encoder_ffn_dim", "decoder_ffn_dim"}, marks=pytest.mark.slow),
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("kind", "granularity", "fields"), CASES)
def test_expressible_cuts_go_through_from_pretrained(tmp_path, kind, granularity, fields):
    model, x = build(kind)
    before = model.config.to_json_string()
    plan = sc.plan(model, x, granularity=granularity, target={"sparsity": 0.4}, expressible=True)
    cut = plan.apply(model)
    assert model.config.to_json_string() == before
    assert fields <= {a.name for a in plan.attributes if a.owner == "config"}
    assert plan.units["removed"] >= int(0.4 * plan.units["total"] + 0.5)
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in model.parameters())
    config = cut.config.to_json_string()
    cut.save_pretrained(tmp_path / "hf")
    again = type(model).from_pretrained(tmp_path / "hf")
    assert largest_difference(again, cut, x) <= 1e-6
    plan.save(tmp_path / "plan.json")
    replayed = sc.Plan.load(tmp_path / "plan.json").apply(model)
    assert replayed.config.to_json_string() == config
    assert largest_difference(replayed, cut, x) == 0


def test_families_keep_equal_counts_and_their_best_units():
    model, x = build("llama")
    plan = sc.plan(model, x, granularity="neuron", target={"params": 0.8}, expressible=True, round_to=4)
    left = {(g["size"], g["size"] - len(g["removed"])) for g in plan.groups.values()}
    assert len(left) == len({size for size, _ in left})
    assert all(count % 4 == 0 for _, count in left)
    assert plan.cost["params"][1] <= 0.8 * plan.cost["params"][0]
    for name, group in plan.groups.items():
        if not group["removed"]:
            continue
        score = plan.evidence.scores[name]
        gone = set(group["removed"])
        assert max(score[i] for i in gone) <= min(score[i] for i in range(group["size"]) if i not in gone)


def test_the_target_is_met_by_the_smallest_common_step():
    model, x = build("bert")
    plan = sc.plan(model, x, granularity="neuron", target={"macs": 0.85}, expressible=True, round_to=1)
    before, after = plan.cost["macs"]
    one_neuron_of_every_layer = 3 * 2 * 32 * x["input_ids"].shape[1]  # of one sample
    assert after <= 0.85 * before < after + one_neuron_of_every_layer


@pytest.mark.parametrize("kind", ["bert", "vit", "gpt2"])
def test_heads_that_no_field_sizes_are_refused(kind):
    model, x = build(kind)
    with pytest.raises(UnsupportedError, match="No field of"):
        sc.plan(model, x, granularity="head", target={"sparsity": 0.5}, expressible=True)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("kind", "field"),
    [
        ("llama", "num_hidden_layers"),
        ("gpt2", "n_layer"),
        pytest.param("t5", "num_layers", marks=pytest.mark.slow),
        pytest.param("gemma3", "num_hidden_layers", marks=pytest.mark.slow),
    ],
)
def test_layers_are_expressible(tmp_path, kind, field):
    model, x = build(kind)
    plan = sc.plan(model, x, granularity="layer", target={"count": 1}, expressible=True, protect=_decoder(model))
    cut = plan.apply(model)
    cut.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert largest_difference(again, cut, x) <= 1e-6
    assert getattr(again.config, field) != getattr(model.config, field)


@pytest.mark.slow
def test_swin_shifts_every_other_window_by_place():
    model, x = build("swin")
    request = {"granularity": "layer", "target": {"count": 1}, "expressible": True}
    stays = [f"swin.encoder.layers.{i}.blocks.{j}" for i, j in ((0, 0), (0, 1), (1, 1), (1, 2))]
    with pytest.raises(CertificateError, match="other outputs"):
        sc.plan(model, x, protect=stays, **request).apply(model)
    cut = sc.plan(model, x, protect=[*stays[:3], "swin.encoder.layers.1.blocks.0"], **request).apply(model)
    assert list(cut.config.depths) == [2, 2]


def _decoder(model):
    return ["decoder"] if hasattr(model, "decoder") else []


def test_generation_with_a_cache_after_layers_went():
    model, x = build("llama")
    cut = sc.plan(model, x, granularity="layer", target={"count": 1}).apply(model)
    kwargs = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(cut.generate(**x, use_cache=True, **kwargs), cut.generate(**x, use_cache=False, **kwargs))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["llama_tied", "bert"])
def test_result_folders_load_natively_and_with_us(tmp_path, kind):
    model, x = build(kind)
    recipe = {"granularity": "layer", "target": {"count": 1}, "measure": {"latency": False}}
    result = sc.prune(model, x, recipe=recipe)
    folder = result.save(tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["architectures"] == [type(model).__name__]
    native = type(model).from_pretrained(folder)
    assert largest_difference(native, result.model, x) <= 1e-6
    ours = sc.load(folder, model=lambda: build(kind, seed=5)[0])
    assert largest_difference(ours, result.model, x) == 0
    assert not json.loads((folder / "report.json").read_text())["warnings"]


def test_uneven_results_say_that_they_need_us(tmp_path):
    model, x = build("bert")
    tokenizer = tmp_path / "source"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "vocab.txt", "weights.bin", "evil.py"):
        (tokenizer / name).write_text("{}")
    model.config._name_or_path = str(tokenizer)
    result = sc.prune(
        model, x, recipe={"granularity": "neuron", "target": {"sparsity": 0.4}, "measure": {"latency": False}}
    )
    assert express(model, result.model, x) is None
    folder = result.save(tmp_path / "out")
    assert "secateur.load()" in json.loads((folder / "report.json").read_text())["warnings"][0]
    assert "secateur.load()" in (folder / "report.html").read_text()
    assert json.loads((folder / "config.json").read_text())["intermediate_size"] == 72
    names = {f.name for f in folder.iterdir()}
    assert {"tokenizer.json", "vocab.txt"} <= names
    assert not {"weights.bin", "evil.py"} & names
    config = type(model.config).from_pretrained(folder)
    again = sc.load(folder, model=type(model)(config))
    assert largest_difference(again, result.model, x) == 0


def test_equal_shapes_are_not_enough():
    """Half of the heads and half of every head have the same shapes; only the outputs tell."""
    model, x = build("llama")
    half = edited(model.config, {("num_attention_heads",): 2, ("num_key_value_heads",): 1})
    twin = edited(model.config, {("head_dim",): 4})
    assert build_shapes(model, half) == build_shapes(model, twin)
    torch.manual_seed(0)
    small = type(model)(half).eval()
    assert is_native(small, half, x)
    assert is_native(small, half)
    assert not is_native(small, twin, x)
    assert not is_native(small, twin)
    found = list(solutions(model, shapes_of(small)))
    assert {("num_attention_heads",): 2, ("num_key_value_heads",): 1} in found
    assert express(model, small, x) is not None


def test_other_weights_or_missing_ones_are_not_native():
    model, x = build("bert")
    assert is_native(model, model.config, x)
    changed = copy.deepcopy(model)
    changed.encoder.layer[0].attention.self.scaling = 0.9
    assert not is_native(changed, changed.config, x)
    assert not is_native(model, edited(model.config, {("num_hidden_layers",): 2}), x)


@pytest.mark.parametrize(
    ("field", "value", "old", "new", "result"),
    [
        (("n",), 72, 72, 40, 40),
        (("n",), 4, 32, 16, 2),
        (("n",), 8, 2, 1, 4),
        (("n",), 5, 32, 16, None),
        (("n",), 4, 32, 20, None),
        (("n",), 8, 32, 20, 5),
        (("n_inner",), None, 128, 76, 76),
        (("name",), None, 128, 76, None),
        (("n",), 0, 4, 2, None),
    ],
)
def test_scaled_values(field, value, old, new, result):
    assert scaled_value(field, value, old, new) == result


def test_fields_and_edits_of_nested_configs():
    model, _ = build("swin")
    fields = dict(fields_of(model.config))
    assert fields["depths", 1] == 3
    assert fields["embed_dim",] == 8
    config = edited(model.config, {("depths", 1): 2, ("embed_dim",): 6})
    assert list(config.depths) == [2, 2]
    assert config.embed_dim == 6
    assert list(model.config.depths) == [2, 3]


def test_files_of_a_model_that_generates():
    model, _ = build("gpt2")
    assert set(config_files(model, model.config)) == {"config.json", "generation_config.json"}


def test_wrong_requests():
    model, x = build("bert")
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(RecipeError, match="no config"):
        sc.plan(net, torch.zeros(1, 4), target={"sparsity": 0.5}, expressible=True)
    with pytest.raises(RecipeError, match="masks"):
        sc.plan(model, x, granularity="element", target={"sparsity": 0.5}, expressible=True)
    with pytest.raises(RecipeError, match="threshold"):
        sc.plan(model, x, granularity="neuron", target={"threshold": 0.5}, expressible=True)
    cut = sc.plan(model, x, granularity="neuron", target={"sparsity": 0.3}).apply(model)
    with pytest.raises(UnsupportedError, match="other shapes"):
        sc.plan(cut, x, granularity="neuron", target={"sparsity": 0.3}, expressible=True)


def test_what_the_library_remembers_of_files_is_not_walked_through(tmp_path):
    """It grows with each file that was ever read, and a guard comes by before every run."""
    made, _ = build("bert")
    made.save_pretrained(tmp_path)
    loaded = type(made).from_pretrained(tmp_path)
    spaces = [vars(importlib.import_module(name)) for name in LOADERS]
    remembered = {id(held) for space in spaces for held in space.values() if isinstance(held, (dict, list)) and held}
    assert remembered
    kept = State([loaded], None, copies=False, weights=False).attributes
    assert not remembered & {id(live) for live, _ in (*kept.mappings, *kept.sequences)}
