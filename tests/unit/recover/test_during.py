"""The training stage of a recipe: what it leaves is what was asked for, and what a loop of one's own would leave."""

from __future__ import annotations

import copy
import functools
import io

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

import secateur as sc
import secateur.report
from secateur.errors import RecipeError
from secateur.recipe import load_recipe
from secateur.report.stage_progress import Stages
from secateur.training import penalty

QUICK = {"measure": {"rounds": 2, "warmup": 0, "latency": False}}
MOVES = {"optimizer": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1}, "every": 2}
STEPS = {"steps": 10, **MOVES}
WEIGHTS = {"granularity": "element", "target": {"sparsity": 0.75}}
X = torch.zeros(2, 6)
GROWS = {"method": "slimming", "steps": 2}


def net(width=16):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return nn.Sequential(
            nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 12), nn.ReLU(), nn.Linear(12, 3)
        )


def batches():
    g = torch.Generator().manual_seed(3)
    return [(torch.randn(8, 6, generator=g), torch.arange(8) % 3) for _ in range(4)]


def pruned(recipe, model=None, **options):
    model = net() if model is None else model
    return sc.prune(model, X, data=batches(), recipe={**recipe, **QUICK}, **options)


def zeros(model):
    return sum(int((p == 0).sum()) for name, p in model.named_parameters() if p.ndim > 1)


@pytest.mark.parametrize(
    "recipe",
    [
        {**WEIGHTS, "training": {"method": "gradual", **STEPS}},
        {**WEIGHTS, "training": {"method": "gradual", **STEPS, "regrow": "set", "schedule": "linear", "initial": 0.2}},
        {**WEIGHTS, "criterion": "taylor", "training": {"method": "gradual", **STEPS, "accumulate": 3}},
        {**WEIGHTS, "criterion": "movement", "training": {"method": "movement", **STEPS, "distil": {}}},
        {**WEIGHTS, "criterion": "movement", "training": {"method": "movement", **STEPS, "form": "soft"}},
    ],
    ids=["gradual", "regrow", "data", "movement", "soft"],
)
def test_weights_go_to_the_exact_amount_and_training_goes_on_without_them(recipe):
    model = net()
    before = copy.deepcopy(model.state_dict())
    result = pruned(recipe, model)
    total = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert zeros(result.model) == result.plan.units["removed"] == round(0.75 * total)
    for name, mask in result.plan.masks.items():
        gone = result.model.get_parameter(name)[~mask]
        assert not torch.signbit(gone).any()
        assert not torch.equal(result.model.get_parameter(name)[mask], model.get_parameter(name)[mask]), "trained"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    curve = [point.sparsity for point in result.report.training]
    assert len(curve) == 10
    assert curve == sorted(curve)
    # Ten steps move no score below the threshold of the soft form: there the rest goes at the end.
    assert curve[-1] == (0 if recipe["training"].get("form") == "soft" else pytest.approx(0.75, abs=0.01))
    assert curve[0] < 0.5
    assert result.report.criterion.name == load_recipe(recipe).criterion


def test_it_is_what_a_loop_of_ones_own_gives():
    """The same steps by hand: the plain loop with a pruner that the documents show."""
    result = pruned({**WEIGHTS, "training": {"method": "gradual", **STEPS}})
    model = net().train()
    moving = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    pruner = sc.Pruner(model, sparsity=0.75, end=7, every=2, optimizer=moving, granularity="element")
    for step in range(10):
        x, y = batches()[step % 4]
        moving.zero_grad()
        F.cross_entropy(model(x), y).backward()
        moving.step()
        pruner.step()
    pruner.finish()
    for name, value in model.state_dict().items():
        assert torch.equal(value, result.model.state_dict()[name]), name


@pytest.mark.parametrize("method", ["gradual", "slimming"])
def test_channels_are_cut_for_real_and_the_plan_holds_for_a_fresh_model(method, tmp_path):
    lessons = {"method": method, **STEPS}
    recipe = {"target": {"sparsity": 0.25}, "round_to": 1, "training": lessons, "control": "dense"}
    if method == "slimming":
        del lessons["every"]
        lessons["penalty"] = {"name": "slimming", "strength": 0.5}
        recipe |= {"criterion": {"name": "bn-scale", "missing": "keep"}, "recover": [{"method": "bn_refresh"}]}
    result = pruned(recipe)
    assert result.report.after.params < result.report.before.params
    assert result.plan.units["removed"] == 7
    assert result.report.certificate is not None
    assert result.report.control.steps == ((method,) if method == "gradual" else (method, "bn_refresh"))
    result.save(tmp_path / "out")
    loaded = sc.load(tmp_path / "out", model=net()).eval()
    x = batches()[0][0]
    assert torch.equal(loaded(x), result.model.eval()(x))


def test_a_penalty_decides_what_goes():
    """Slimming with a strong penalty makes scales small; the plan is of the trained weights, and not of the first."""
    lessons = {"method": "slimming", "steps": 40, "optimizer": {"name": "sgd", "lr": 0.1}}
    recipe = {"criterion": {"name": "bn-scale", "missing": "keep"}, "target": {"sparsity": 0.25}, "round_to": 1}
    weak, strong = (
        pruned({**recipe, "training": {**lessons, "penalty": {"name": "slimming", "strength": s}}}) for s in (0.0, 0.2)
    )
    sizes = [float(result.model[1].weight.detach().abs().mean()) for result in (weak, strong)]
    assert sizes[1] < sizes[0]
    assert len(weak.report.training) == 40
    assert all(point.sparsity is None for point in weak.report.training)


PAID = {
    "gates": {"strength": 0.1, "method": "proximal", "lr": 0.2},
    "hard_concrete": {"strength": 0.05, "lr": 0.1},
    "growing": {"strength": 0.2, "every": 2},
}


@pytest.mark.parametrize("name", PAID)
def test_a_penalty_that_decides_is_that_of_a_loop_of_ones_own(name):
    """The same steps by hand, as the documents show them: gates folded and their sizes the scores, or units kept."""
    lessons = {"method": "slimming", "steps": 8, "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}}
    recipe = {"target": {"sparsity": 0.25}, "scope": "local", "round_to": 1}
    result = pruned({**recipe, "training": {**lessons, "penalty": {"name": name, **PAID[name]}}})
    model = net().train()
    moving = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    own = {"sparsity": 0.25} if name == "growing" else {}
    paid = penalty(name, model, X, optimizer=moving, granularity="channel", **PAID[name], **own)
    torch.manual_seed(0)
    for step in range(8):
        x, y = batches()[step % 4]
        moving.zero_grad()
        F.cross_entropy(model(x), y).backward()
        moving.step()
    scores = paid.keep if name == "growing" else paid.finish()
    units = {"keep": scores} if name == "growing" else {"scores": scores, **recipe}
    smaller = sc.plan(model, X, **units).apply(model)
    assert smaller[0].out_features == 12
    for key, value in smaller.state_dict().items():
        assert torch.equal(value, result.model.state_dict()[key]), key
    assert result.plan.units["removed"] == 7
    assert len(result.report.training) == 8


def test_filling_gives_back_what_lies_in_units_that_are_not_empty():
    block = {"name": "block", "shape": [2, 2]}
    recipe = {**WEIGHTS, "granularity": block, "criterion": "movement"}
    result = pruned({**recipe, "training": {"method": "movement", **STEPS, "fill": {"name": "block", "shape": [4, 2]}}})
    mask = result.plan.masks["3.weight"]
    blocks = mask.view(3, 4, 8, 2).permute(0, 2, 1, 3).flatten(2)
    assert bool((blocks.all(-1) | ~blocks.any(-1)).all())
    assert not mask.all()


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({**WEIGHTS, "training": {"method": "gradual", "steps": 2}, "recover": [{"method": "refit"}]}, "refit"),
        ({"target": {"threshold": 0.1}, "training": {"method": "gradual", "steps": 2}}, "walks to an amount"),
        ({**WEIGHTS, "training": {"method": "movement", "steps": 2}}, "criterion: movement"),
        (
            {**WEIGHTS, "training": {"method": "slimming", "steps": 2, "penalty": {"name": "gates"}}},
            "penalty is one of",
        ),
        (
            {**WEIGHTS, "training": {**GROWS, "penalty": {"name": "growing", "strength": 0.1, "sparsity": 0.5}}},
            "from the recipe",
        ),
        (
            {"target": {"macs": 0.5}, "training": {**GROWS, "penalty": {"name": "growing", "strength": 0.1}}},
            "target: {sparsity",
        ),
        ({**WEIGHTS, "training": {"method": "gradual", "steps": 2, "begin": 0.9, "end": 0.5}}, "begin lies behind"),
        ({**WEIGHTS, "training": {"method": "gradual", "epochs": 1, "rates": "ReduceLROnPlateau"}}, "held-out"),
        ({**WEIGHTS, "training": {"method": "gradual", "steps": 2, "schedule": "cubid"}}, "cubic"),
        ({**WEIGHTS, "training": {"method": "gradual", "steps": 2, "regrow": "rigle"}}, "rigl"),
        ({**WEIGHTS, "training": {"method": "gradual", "steps": 2, "optimizer": {"name": "adamv"}}}, "adamv"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused_in_words(recipe, words):
    with pytest.raises(RecipeError, match=words):
        pruned(recipe)


def test_without_data_and_in_a_comparison_it_is_refused():
    recipe = {**WEIGHTS, "training": {"method": "gradual", "steps": 2}, **QUICK}
    with pytest.raises(RecipeError, match="needs data"):
        sc.prune(net(), X, recipe=recipe)
    from secateur.cli.lottery import training_of
    from secateur.comparison.study import recovery_of

    with pytest.raises(RecipeError, match="training"):
        recovery_of("gradual-90")
    with pytest.raises(RecipeError, match="training"):
        training_of(load_recipe("gradual-90"))


def test_progress_says_loss_sparsity_and_the_time_that_is_left(monkeypatch):
    clock = iter(range(0, 1000, 5))
    shows = functools.partial(sc.report.progress, clock=lambda: next(clock))
    monkeypatch.setattr("secateur.report.stage_progress.progress", shows)
    text = io.StringIO()
    with Stages(Console(file=text, width=200)) as shown:
        for done in range(1, 5):
            shown("train: gradual", done, 10, "loss 0.5, sparsity 0.250")
    assert "loss 0.5, sparsity 0.250" in text.getvalue()
    assert "left" in text.getvalue()
    notes = []

    class Noting:
        takes_note = True

        def __call__(self, stage, done, total, note=""):
            notes.append((stage, done, total, note))

    pruned({**WEIGHTS, "training": {"method": "gradual", **STEPS}}, progress=Noting())
    steps = [one for one in notes if one[0] == "train: gradual" and one[1]]
    assert [(done, total) for _, done, total, _ in steps] == [(n, 10) for n in range(1, 11)]
    assert steps[-1][3].startswith("loss ")
    assert steps[-1][3].endswith("sparsity 0.750")


def test_bundled_trainings_take_settings_of_the_command_line():
    shown = load_recipe("gradual-90", ["training.epochs=null", "training.steps=3", "training.regrow.name=rigl"])
    assert (shown.training.steps, shown.training.epochs, shown.training.regrow) == (3, None, {"name": "rigl"})
    assert load_recipe("slimming-70", ["training.penalty.strength=0.5"]).training.penalty["strength"] == 0.5
    moved = load_recipe("movement-bert", ["training.form=soft", "training.start=2"])
    assert (moved.training.form, moved.training.start) == ("soft", 2.0)
