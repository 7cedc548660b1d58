"""Models whose weights stay on disk: the same result as in memory, within a budget, or refused."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import secateur as sc
from secateur import from_disk
from secateur.errors import InputError, RecipeError, ResourceError, UnsupportedError
from secateur.files import load_tensors
from secateur.from_disk import prune_folder
from secateur.recipe import load_recipe
from secateur.solve.blocks.step import BlockSolver
from secateur.sources.in_memory import DataSet
from secateur.sources.text import TokenData

transformers = pytest.importorskip("transformers")

SHORT = ["criterion.name=admm", "criterion.steps=6", "criterion.choosing=4", "blocks.from_disk=true"]

# Without second moments: what they take is the same for every depth.
CHEAP = ["criterion=wanda", "blocks.use=true", "blocks.from_disk=true"]


def written(folder, *, tied=True, kind="Llama", layers=2):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64, tie_word_embeddings=tied,
    )  # fmt: skip
    # Several files, with an index.
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder, max_shard_size="8KB")
    return folder


def text(tokens=16):
    blocks = torch.randint(0, 64, (12, tokens), generator=torch.Generator().manual_seed(1))
    return DataSet(
        "tokens", TokenData(blocks, batch_size=2), TokenData(blocks[:8], batch_size=2),
        TokenData(blocks[8:], batch_size=1), {"input_ids": blocks[:1, :8]},
    )  # fmt: skip


def recipe(*more):
    return load_recipe("language-model", [*SHORT, *more])


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_folder_is_the_one_that_memory_would_have_given(tied, tmp_path):
    source, data = written(tmp_path / "in", tied=tied), text()
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    report = prune_folder(source, tmp_path / "out", data, recipe("blocks.memory_bytes=60000000"))
    model = transformers.LlamaForCausalLM.from_pretrained(source)
    plan = sc.plan(
        model, data.example, criterion={"name": "admm", "steps": 6, "choosing": 4}, granularity="element", scope="row",
        target={"sparsity": 0.5}, data=data.calibration,
    )  # fmt: skip
    wanted = plan.apply(model).state_dict()
    found = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert (report.units.removed, report.units.total) == (plan.units["removed"], plan.units["total"])
    assert report.after.nonzero == sum(int(p.count_nonzero()) for p in plan.apply(model).parameters())
    assert report.after.quality["perplexity"] != report.before.quality["perplexity"]
    assert any("solved towards" in note for note in plan.notes)
    assert set(plan.notes) <= set(report.warnings)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_matrices_of_a_stack_add_up_to_one_row():
    model = torch.nn.Module()
    model.stack, model.plain = torch.nn.Parameter(torch.ones(2, 4, 4)), torch.nn.Parameter(torch.ones(3, 5))
    records = [SimpleNamespace(name=n, removed=r) for n, r in (("stack[0]", 3), ("stack[1]", 5), ("plain", 6))]
    stack, plain = from_disk._layers(model, records)
    assert (stack.name, stack.shape, stack.removed, stack.total, stack.sparsity) == ("stack", (2, 4, 4), 8, 32, 0.25)
    assert (plain.name, plain.removed, plain.total, plain.sparsity) == ("plain", 6, 15, 0.4)


def test_what_the_largest_block_needs_is_not_given_to_activations(tmp_path, monkeypatch):
    told, given = [], []

    def looked(*_, settings, **__):
        given.append(settings.memory_bytes)
        raise KeyboardInterrupt

    monkeypatch.setattr(from_disk, "prune_blocks", looked)
    with pytest.raises(KeyboardInterrupt):
        prune_folder(
            written(tmp_path / "in"), tmp_path / "out", text(), recipe("blocks.memory_bytes=60000000"), tell=told.append
        )
    assert given == [60_000_000 - told[0].least_bytes]


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    source, data = written(tmp_path / "in", layers=3), text()
    prune_folder(source, tmp_path / "whole", data, recipe())
    solve = BlockSolver.solve

    def killed(self, block, stream, **options):
        if block.endswith("2"):
            raise KeyboardInterrupt
        solve(self, block, stream, **options)

    monkeypatch.setattr(BlockSolver, "solve", killed)
    with pytest.raises(KeyboardInterrupt):
        prune_folder(source, tmp_path / "cut", data, recipe(), begun=tmp_path / "blocks")
    assert not (tmp_path / "cut").exists()
    solved = []
    monkeypatch.setattr(
        BlockSolver, "solve", lambda self, block, *a, **k: (solved.append(block), solve(self, block, *a, **k))
    )
    prune_folder(source, tmp_path / "cut", data, recipe(), begun=tmp_path / "blocks")
    assert solved == ["model.layers.2"]
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        (["blocks.memory_bytes=1000"], ResourceError),
        (["blocks.allocation.name=owl"], RecipeError),
        (["criterion=taylor"], RecipeError),
    ],
)
def test_what_cannot_be_done_is_refused_and_leaves_nothing(changes, error, tmp_path):
    with pytest.raises(error):
        prune_folder(
            written(tmp_path / "in"), tmp_path / "out", text(), load_recipe("language-model", [*SHORT[3:], *changes])
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_weights_that_are_converted_on_loading_and_folders_without_weights_are_refused(tmp_path):
    source = written(tmp_path / "in")
    # A weight under a name that the model does not know.
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(UnsupportedError, match="transformers converts them"):
        prune_folder(source, tmp_path / "out", text(), recipe())
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no folder with safetensors"):
        prune_folder(tmp_path / "empty", tmp_path / "out", text(), recipe())
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config, "num_hidden_layers": 1}))
    with pytest.raises(RecipeError, match="prune_folder"):
        sc.plan(model, text().example, criterion="admm", target={"sparsity": 0.5}, granularity="element", scope="row",
                data=text().calibration, blocks={"from_disk": True})  # fmt: skip


MEASURE = """
import json, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from test_from_disk import CHEAP, SHORT, load_recipe, prune_folder, text, written

def memory(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))

folder, budget = Path(sys.argv[2]), int(sys.argv[3])
# Once on a small model: what libraries load and compile at first use is not the model's.
prune_folder(written(folder / "small"), folder / "small-out", text(32), load_recipe("language-model", SHORT))
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
prune_folder(folder / "large", folder / "large-out", text(32),
             load_recipe("language-model", [*CHEAP, f"blocks.memory_bytes={budget}"]))
print(json.dumps({"peak": memory("VmHWM") - before}))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_a_model_four_times_as_large_as_the_budget_is_pruned_within_it(tmp_path):
    budget = 95_000_000
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=120, num_attention_heads=4, vocab_size=64
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "large", max_shard_size="50MB")
    size = sum(path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors"))
    assert size > 4 * budget
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(Path(__file__).parent), str(tmp_path), str(budget)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["peak"] < budget
    zeros = total = 0
    for path in (tmp_path / "large-out").glob("*.safetensors"):
        for name, value in load_tensors(path).items():
            if "proj" in name:
                zeros, total = zeros + int((value == 0).sum()), total + value.numel()
    assert zeros == total // 2
