"""Hugging Face models: what is saved loads, or is refused; model cards; labelled text from the command line on."""

from __future__ import annotations

import copy
import json
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import build, largest_difference

import secateur as sc
from secateur.cli.main import main
from secateur.errors import UnsupportedError
from secateur.recipe import bundled
from secateur.result import NotNativeWarning

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

QUICK = {"measure": {"latency": False}}


def uneven(kind: str = "bert"):
    model, x = build(kind)
    plan = sc.plan(model, x, granularity="neuron", target={"sparsity": 0.4})
    return model, x, plan, plan.apply(model)


def test_a_cut_that_no_config_describes_is_not_written(tmp_path):
    model, x, plan, small = uneven()
    loaded = build("bert")[0]
    plan.apply(loaded, inplace=True)
    for number, cut in enumerate((small, copy.deepcopy(small), loaded)):
        folder = tmp_path / str(number)
        with pytest.raises(UnsupportedError, match="expressible=True"):
            cut.save_pretrained(folder)
        with pytest.raises(UnsupportedError, match="from_pretrained cannot load"):
            cut.push_to_hub("somebody/something")  # asks for no network: it saves first
        assert not folder.exists()
    again = pickle.loads(pickle.dumps(small))
    assert largest_difference(again, small, x) == 0
    model.save_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole" / "config.json").exists()


@pytest.mark.parametrize("granularity", ["element", pytest.param("neuron", marks=pytest.mark.slow)])
def test_what_a_config_describes_is_written_as_ever(granularity, tmp_path):
    model, x = build("bert")
    cut = sc.plan(model, x, granularity=granularity, target={"sparsity": 0.4}, expressible=granularity != "element")
    small = cut.apply(model)
    small.save_pretrained(tmp_path)
    assert largest_difference(type(model).from_pretrained(tmp_path), small, x) <= 1e-6


class Hub:
    """A hub that keeps what is uploaded, and knows no network."""

    def __init__(self):
        self.files = {}

    def create_repo(self, repo_id, **_):
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, *, operations, **_):
        self.files.update({one.path_in_repo: Path(one.path_or_fileobj).read_bytes() for one in operations})


@pytest.mark.slow
def test_push_to_hub_uploads_what_can_be_loaded(tmp_path, monkeypatch):
    import transformers.utils.hub as calls

    hub, card = Hub(), SimpleNamespace(save=lambda path: Path(path).write_text("card"))
    if not hasattr(calls, "hf_api"):
        pytest.skip("this version of transformers uploads by other calls")
    monkeypatch.setattr(calls, "hf_api", lambda: hub)
    monkeypatch.setattr(calls, "create_and_tag_model_card", lambda *_, **__: card)
    model, x = build("bert")
    cut = sc.plan(model, x, granularity="neuron", target={"sparsity": 0.4}, expressible=True).apply(model)
    cut.push_to_hub("a/b")
    assert {"config.json", "model.safetensors"} <= set(hub.files)
    for name, data in hub.files.items():
        (tmp_path / name).write_bytes(data)
    assert largest_difference(type(model).from_pretrained(tmp_path), cut, x) <= 1e-6
    hub.files.clear()
    with pytest.raises(UnsupportedError, match="push_to_hub"):
        uneven()[3].push_to_hub("a/b")
    assert hub.files == {}


@pytest.mark.slow
@pytest.mark.parametrize("expressible", [True, False])
def test_the_folder_says_how_it_is_loaded(expressible, tmp_path):
    model, x = build("bert")
    recipe = {"target": {"params": 0.9}, "granularity": "neuron", "expressible": expressible, **QUICK}
    result = sc.prune(model, x, recipe=recipe)
    if expressible:
        result.save(tmp_path / "out")
    else:
        with pytest.warns(NotNativeWarning, match="from_pretrained cannot load"):
            result.save(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\ntags:\n- pruned\n")
    assert ("BertModel.from_pretrained" in card) is expressible
    assert ("sc.load(" in card) is not expressible
    warned = any("from_pretrained cannot load" in text for text in result.report.warnings)
    assert warned is not expressible
    for row in ("parameters", "MACs per sample", "size"):
        assert f"| {row} |" in card
    assert f"{result.report.units.removed:,} of {result.report.units.total:,}" in card
    assert "largest error" in card
    assert str(tmp_path) not in card
    assert "README.md" in json.loads((tmp_path / "out" / "manifest.json").read_text())
    # The code in the card runs, in a process that knows nothing else.
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    space = {"YourModel": lambda: build("bert", 1)[0]}
    exec(code.replace("THIS_FOLDER", str(tmp_path / "out")), space)
    assert largest_difference(space["model"], result.model, x) <= 1e-6


def test_names_in_a_card_are_no_markup(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    recipe = {"target": {"sparsity": 0.5}, "granularity": "neuron", **QUICK}
    title = "<script>alert(1)</script> [x](http://a) | `b`"
    result = sc.prune(net, torch.zeros(1, 4), recipe=recipe, title=title)
    card = (result.save(tmp_path / "out") / "README.md").read_text()
    assert "<script>" not in card.replace("\\<script>", "")
    assert "[x](" not in card.replace("\\[x\\](", "")


@pytest.fixture
def reviews(tmp_path, monkeypatch):
    """A classifier with a tokenizer in a folder, and reviews in a tsv file."""
    tokenizers = pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "very"]
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]")
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=32, num_labels=2, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1},
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    model.save_pretrained("model")
    wrapped.save_pretrained("model")
    lines = ["sentence\tlabel", *(f"very {word} film\t{word}" for word in ("good", "bad") * 20)]
    Path("sst.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_text_from_the_command_line_to_from_pretrained(reviews, capsys):
    argv = ["prune", "hf:model", "--data", "tsv:sst.tsv", "--granularity", "neuron", "--params", "0.9", "--expressible"]
    argv += ["--recover", "finetune:epochs=1", "--out", "out", "--set", "measure.rounds=2", "--threads", "1", "--json"]
    assert main(argv) == 0, capsys.readouterr().err
    record = json.loads(capsys.readouterr().out)
    assert set(record["after"]["quality"]) == {"accuracy"}
    assert record["quality_on"] == "the test part"
    model = transformers.BertForSequenceClassification.from_pretrained("out")
    assert model.config.intermediate_size < 64
    pipe = transformers.pipeline("text-classification", model="out", device="cpu")
    assert pipe("very good film")[0]["label"] in ("good", "bad")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in bundled() if name.startswith("transformer")])
def test_bundled_recipes_for_transformers_run(name, reviews, capsys):
    argv = ["prune", "hf:model", "--data", "tsv:sst.tsv", "--recipe", name, "--out", "out", "--threads", "1"]
    argv += ["--set", "measure.rounds=2", "--set", "recover.0.epochs=1", "--json"]
    assert main(argv) == 0, capsys.readouterr().err
    record = json.loads(capsys.readouterr().out)
    assert set(record["after"]["quality"]) == {"accuracy"}
    told = any("from_pretrained cannot load" in text for text in record["warnings"])
    assert told is (name == "transformer-heads")
