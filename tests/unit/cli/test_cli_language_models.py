"""The command line on a language model: a folder that transformers loads, and perplexity."""

import json
import shutil

import pytest
import torch

import secateur as sc
from secateur.cli.main import main
from secateur.solve.blocks.step import BlockSolver

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    words = {word: number for number, word in enumerate(["<unk>", *(f"w{i}" for i in range(59))])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(path)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    text = torch.randint(0, 59, (1600,), generator=torch.Generator().manual_seed(1)).tolist()
    (path / "text.txt").write_text(" ".join(f"w{i}" for i in text))
    return path


def test_a_solver_named_on_the_command_line_prunes_block_by_block(folder, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["prune", f"hf:{folder}", "--data", f"text:{folder / 'text.txt'}", "--out", str(out), "--json"]
    sets = ["criterion=admm", "granularity=2:4", "calibration.tokens=16", "measure.latency=false"]
    assert main([*words, *(word for one in sets for word in ("--set", one))]) == 0
    said = capsys.readouterr()
    assert "minutes here" in said.err
    report = json.loads(said.out)
    assert report["before"]["quality"]["perplexity"] > 1
    assert report["after"]["quality"]["perplexity"] > 1
    assert {layer["sparsity"] for layer in report["layers"]} == {0.5}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(out)
    for layer in report["layers"]:
        weight = loaded.get_parameter(layer["name"])
        assert bool(((weight == 0).reshape(-1, 4).sum(1) == 2).all())

    # What it writes stands in the report: the likeliest token, one at a time, by hand, up to the mark of an end.
    ids = torch.tensor([transformers.AutoTokenizer.from_pretrained(out)(report["sample"]["prompt"])["input_ids"]])
    length = ids.shape[1]
    for _ in range(24):
        ids = torch.cat([ids, loaded.eval()(ids).logits[:, -1:].argmax(-1)], 1)
    written = report["sample"]["after"].split()
    assert written
    # Four of the model's numbers are no words of the tokenizer's, which writes nothing for them.
    by_hand = [f"w{number - 1}" for number in ids[0, length:].tolist() if number < 60]
    assert written == by_hand[: len(written)]
    for name in ("report.html", "README.md"):
        assert report["sample"]["prompt"] in (out / name).read_text()

    # The plan of the folder, whose tensors lie beside it, says the same.
    config = transformers.AutoConfig.from_pretrained(folder)
    replayed = sc.load(out, transformers.LlamaForCausalLM(config))
    assert all(torch.equal(a, loaded.state_dict()[key]) for key, a in replayed.state_dict().items())

    assert main(["measure", f"hf:{out}", "--task", "perplexity", "--data", f"text:{folder / 'text.txt'}",
                 "--tokens", "16", "--sequences", "5", "--json"]) == 0  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert found["sequences"] == 5
    assert found["perplexity"] > 1


def test_a_model_of_short_contexts_is_pruned_and_measured_on_blocks_that_it_takes(folder, tmp_path, capsys):
    short, out = tmp_path / "short", tmp_path / "out"
    shutil.copytree(folder, short)
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=24, bos_token_id=0,
                                     eos_token_id=0)  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(short)
    data = ["--data", f"text:{folder / 'text.txt'}"]
    sets = ["criterion=admm", "granularity=2:4", "measure.latency=false"]
    assert main(["prune", f"hf:{short}", *data, "--out", str(out), "--json",
                 *(word for one in sets for word in ("--set", one))]) == 0  # fmt: skip
    assert any("blocks of 24 tokens, not 1024" in line for line in json.loads(capsys.readouterr().out)["warnings"])
    assert main(["measure", f"hf:{out}", "--task", "perplexity", *data, "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["tokens"] == 24
    assert "not 1024" in said.err


def test_a_model_that_cannot_write_loses_nobody_the_run(folder, tmp_path, capsys, monkeypatch):
    def breaks(*args, **kwargs):
        raise ValueError("no such cache")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "generate", breaks)
    sets = ["criterion=admm", "granularity=2:4", "calibration.tokens=16", "measure.latency=false"]
    assert main(["prune", f"hf:{folder}", "--data", f"text:{folder / 'text.txt'}", "--out", str(tmp_path / "out"),
                 "--json", *(word for one in sets for word in ("--set", one))]) == 0  # fmt: skip
    report = json.loads(capsys.readouterr().out)
    assert report["sample"] is None
    assert any("generate() failed with ValueError: no such cache" in line for line in report["warnings"])
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--task", "bleu", "--data", "text:x"], 2),
        (["--task", "perplexity"], 2),
        (["--task", "perplexity", "--data", "text:/nonexistent"], 3),
        (["--task", "perplexity", "--data", "text:x", "--dtype", "int8"], 2),
    ],
)
def test_what_cannot_be_measured_is_refused(folder, words, code, capsys):
    assert main(["measure", f"hf:{folder}", *words]) == code


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_the_blocks_of_text_that_it_began_with(folder, tmp_path, capsys, monkeypatch):
    # Of another length than the default, so that a run that forgot it would read other data.
    asked = ["criterion=admm", "calibration.tokens=16", "calibration.sequences=12", "calibration.batch=3",
             "calibration.test=4", "measure.latency=false"]  # fmt: skip
    words = ["prune", f"hf:{folder}", "--data", f"text:{folder / 'text.txt'}", "--json",
             *(word for one in asked for word in ("--set", one))]  # fmt: skip
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    whole = json.loads(capsys.readouterr().out)
    solve = BlockSolver.solve

    def killed(self, block, stream, **options):
        if block.endswith("1"):
            raise KeyboardInterrupt
        solve(self, block, stream, **options)

    with monkeypatch.context() as patch:
        patch.setattr(BlockSolver, "solve", killed)
        assert main([*words, "--out", str(tmp_path / "cut")]) != 0
    capsys.readouterr()
    assert main(["resume", str(tmp_path / "cut"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["recipe"]["calibration"]["tokens"] == 16
    assert whole["sample"] is not None
    assert report["sample"] == whole["sample"]
    for name in ("model.safetensors", "plan.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("recipe", "changed"),
    [
        ("language-model-layers", ["num_hidden_layers"]),
        pytest.param("language-model-width", ["intermediate_size", "num_attention_heads"], marks=pytest.mark.slow),
    ],
)
def test_fewer_blocks_or_narrower_ones_load_with_from_pretrained_alone(recipe, changed, folder, tmp_path, capsys):
    words = ["prune", f"hf:{folder}", "--data", f"text:{folder / 'text.txt'}", "--out", str(tmp_path / "out"), "--json"]
    sets = ["calibration.tokens=16", "calibration.sequences=8", "measure.latency=false", "target.params=0.85"]
    assert main([*words, "--recipe", recipe, *(word for one in sets for word in ("--set", one))]) == 0
    report = json.loads(capsys.readouterr().out)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = transformers.AutoConfig.from_pretrained(folder)
    sizes = [name for name in vars(model.config) if name.startswith(("num_", "inter", "hidden_size"))]
    smaller = [name for name in sizes if name in vars(before) and getattr(model.config, name) != getattr(before, name)]
    assert smaller
    assert set(smaller) <= {*changed, "num_key_value_heads"}
    assert sum(p.numel() for p in model.parameters()) == report["after"]["params"] <= 0.85 * report["before"]["params"]
    assert report["certificate"]["max_abs_error"] <= report["certificate"]["tolerance"]
    for moment in ("before", "after"):
        assert report[moment]["quality"]["perplexity"] > 1
    assert report["sample"]["after"]
