"""The picture's data against an independent count: the smaller model itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.report.bound import Attempt, Limit, Measured
from secateur.report.intervals import share_interval
from secateur.report.limit import limit_lines
from secateur.report.network import MOST_NAMED, drawn_parts, network_parts
from secateur.report.next_steps import loading, next_steps


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.a, self.b = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 2)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.norm(self.stem(x))
        return self.head(self.up(x + self.b(self.a(x).relu())).mean((2, 3)))


X = torch.randn(2, 3, 8, 8)


def widths(model):
    """Outputs of a module, as PyTorch itself calls them."""
    names = ("out_channels", "out_features")
    return {
        n: next(getattr(m, k) for k in names if hasattr(m, k))
        for n, m in model.named_modules()
        if any(hasattr(m, k) for k in names)
    }


def test_widths_and_parameters_are_those_of_the_smaller_model():
    model = Residual()
    plan = sc.plan(model, X, target={"sparsity": 0.4})
    small = plan.apply(model)
    parts = network_parts(model, plan)
    assert [part.name for part in parts] == ["stem", "a", "b", "up", "head"], "in the model's order, norms go along"
    assert {part.name: part.width_before for part in parts} == widths(model)
    assert {part.name: part.width_after for part in parts} == widths(small)
    for part in parts:
        left = sum(p.numel() for p in small.get_submodule(part.name).parameters())
        assert (part.name, part.params_after) == (part.name, left)
        assert part.kept == part.width_after / part.width_before
    by_name = {part.name: part for part in parts}
    assert set(by_name["stem"].makes) & set(by_name["b"].makes) & set(by_name["a"].reads) & set(by_name["up"].reads)
    assert by_name["head"].locked


def test_of_masks_the_share_of_weights_that_stay():
    model = Residual()
    plan = sc.plan(model, X, target={"sparsity": 0.5}, granularity="element")
    masked = plan.apply(model)
    for part in network_parts(model, plan):
        weight = masked.get_submodule(part.name).weight
        assert part.kept == pytest.approx(float((weight != 0).float().mean()))
        assert part.width_after == part.width_before


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.part(x).relu()


class Deep(nn.Module):
    def __init__(self, blocks=4):
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block() for _ in range(blocks)]), nn.Linear(4, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_blocks_that_went_are_gone():
    model = Deep()
    plan = sc.plan(model, torch.randn(2, 4), target={"count": 1}, granularity="layer", criterion="random")
    gone = [part.name for part in network_parts(model, plan) if part.width_after == 0]
    ((path, stack),) = plan.layers.items()
    assert gone == [f"{path}.{stack['removed'][0]}.part"]


def test_block_one_is_not_block_ten():
    model = Deep(12)
    plan = sc.plan(model, torch.randn(2, 4), remove={"blocks": [1]}, granularity="layer")
    assert [part.name for part in network_parts(model, plan) if part.width_after == 0] == ["blocks.1.part"]


def test_a_row_says_what_else_hangs_together_with_it():
    model = Residual()
    plan = sc.plan(model, X, target={"sparsity": 0.4})
    said = {part.name: "\n".join(part.said) for part in drawn_parts(network_parts(model, plan), [])}
    assert "outputs hang together with those of b\n" in said["stem"]
    assert "outputs hang together with those of stem\n" in said["b"]
    assert "hang together" not in said["a"], "nothing hangs together with itself"
    assert "outputs are read by b" in said["a"]
    deep = nn.Sequential(nn.Linear(3, 4), Deep(MOST_NAMED))
    parts = network_parts(deep, sc.plan(deep, torch.randn(2, 3), target={"sparsity": 0.25}))
    (text,) = (line for line in drawn_parts(parts, [])[-1].said if line.startswith("reads what"))
    assert text.endswith(f"1.blocks.{MOST_NAMED - 2}.part and 1 more make")
    assert f"1.blocks.{MOST_NAMED - 1}.part" not in text


def test_every_attempt_is_a_line_with_its_bound_and_its_zeros_where_there_are_more():
    none = {"macs": None, "low": None, "method": "", "why": "", "seconds": 1.0, "removed": 0.5, "params": 1.0}
    limit = Limit(
        max_drop=1.0, unit="points", figure="accuracy", smallest="sparsity", confidence=0.95, amount=0.5,
        chosen_by="them", chosen=Measured(drop=0.25, low=-0.5, high=0.75), attempts=(
            Attempt(amount=0.5, nonzero=0.5, drop=0.25, high=0.75, kept=True, **none),
            Attempt(amount=0.9, nonzero=1.0, drop=3.0, high=None, kept=False, **none),
            Attempt(amount=0.99, nonzero=None, drop=None, high=None, kept=False, **{**none, "why": "diverged"}),
        ),
    )  # fmt: skip
    first, second, third = list(limit_lines(limit))[-3:]
    assert "non-zero 50" in first
    assert "lost 0.25, at most 0.75: kept" in first
    assert "non-zero" not in second
    assert "lost 3.00: not kept" in second
    assert "diverged: not kept" in third
    assert "at least -0.50 and at most 0.75" in list(limit_lines(limit))[1]


def test_a_plan_from_a_file_is_drawn_without_couplings(tmp_path):
    model = Residual()
    sc.plan(model, X, target={"sparsity": 0.4}).save(tmp_path / "plan.json")
    read = sc.Plan.load(tmp_path / "plan.json")
    parts = network_parts(model, read)
    assert [part.makes for part in parts] == [()] * 5
    assert any(part.width_after < part.width_before for part in parts)


@pytest.mark.parametrize(("hits", "samples"), [(0, 10), (3, 10), (10, 10), (870, 1000)])
def test_an_interval_is_where_the_share_could_come_from(hits, samples):
    """Wilson's interval holds exactly the shares whose normal test does not refuse what was counted."""
    low, high = share_interval(hits / samples, samples)
    for true in (low, high):
        if 1e-9 < true < 1 - 1e-9:
            distance = abs(hits / samples - true) / (true * (1 - true) / samples) ** 0.5
            assert distance == pytest.approx(1.959964, rel=1e-4)
    assert 0 <= low <= hits / samples <= high <= 1


def test_the_count_of_samples_comes_from_the_data():
    data = {"test": [(X, torch.tensor([0, 1])), (X[:1], torch.tensor([-100]))]}
    result = sc.prune(Residual(), X, data=data, target={"sparsity": 0.3}, overrides=["measure.latency=false"])
    assert result.report.quality_samples == {"accuracy": 2}, "what is not to be counted is not"


@pytest.mark.parametrize(
    ("word", "lines", "made"),
    [
        ("mynet.py:build", ["from mynet import build"], "build"),
        ("py:package.net:make", ["from package.net import make"], "make"),
        ("nets/mynet.py:build", ["import sys", "sys.path.insert(0, 'nets')", "from mynet import build"], "build"),
        ("demo:lenet", [], "YourModel"),
        ("", [], "YourModel"),
        ("mynet.py:build; rm -rf", [], "YourModel"),
    ],
)
def test_the_lines_that_load_name_the_factory(word, lines, made):
    body, _ = loading("runs/mine", word)
    assert body.splitlines() == ["import secateur as sc", *lines, "", f'model = sc.load("runs/mine", model={made})']


def test_the_next_steps_name_the_folder_the_model_and_the_data(tmp_path):
    """Typed as they stand, they run: the loading of a saved folder is tried."""
    (tmp_path / "netfile.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def build():\n    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.zeros(1, 4)\n"
    )
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    command = f"secateur prune {tmp_path}/netfile.py:build --data npz:x.npz --recipe r.yaml --out o"
    result = sc.prune(
        model, torch.zeros(1, 4), target={"sparsity": 0.5}, overrides=["measure.latency=false"], command=command
    )
    result.save(tmp_path / "out")
    load, *rest = next_steps(result.report, str(tmp_path / "out"))
    assert all(f"--model {tmp_path}/netfile.py:build --data npz:x.npz" in step.code for step in rest)
    assert [step.code.split()[1] for step in rest] == ["measure", "export", "deploy"]
    found: dict[str, nn.Module] = {}
    exec(load.code, found)
    assert torch.equal(found["model"](torch.ones(1, 4)), result.model(torch.ones(1, 4)))
    assert load.code.splitlines()[0] in (tmp_path / "out" / "report.html").read_text()


def test_words_with_blanks_stay_one_word(make):
    command = "secateur prune net.py:build --data 'npz:my file.npz' --out o"
    steps = next_steps(make(command=command), "my out")
    for step in steps[1:]:
        assert " 'my out' --model net.py:build --data 'npz:my file.npz'" in step.code


@pytest.mark.parametrize("command", ["", "python x.py", "secateur prune 'open", "secateur prune"])
def test_a_run_that_no_command_line_made_says_what_to_put_in(make, command):
    steps = next_steps(make(command=command), "out")
    assert "--model MODEL" in steps[1].code
    assert "mynet.py:build" in steps[1].said
