"""Zeros of an earlier round stay while a model is trained once more."""

import copy

import pytest
import torch
from sparse_stack import Stack, batches, sparse, zeros
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import secateur as sc
from secateur import run_training
from secateur.errors import RecipeError
from secateur.recover import during

LESSON = {"steps": 8, "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}}
CHANNELS = {"granularity": "channel", "target": {"sparsity": 0.3}}
LAYER = {"granularity": "layer", "target": {"count": 1}, "protect": ["layers.0", "layers.2"]}
MASKS = {"granularity": "element", "target": {"sparsity": 0.75}}


def charged(name, **options):
    return {"method": "slimming", "penalty": {"name": name, "strength": 1e-2, **options}}


TRAININGS = {
    "gradual channels": (CHANNELS, {"method": "gradual", "every": 2}),
    "gradual weights": (MASKS, {"method": "gradual", "every": 2}),
    "gradual layers": (LAYER, {"method": "gradual", "every": 2}),
    "movement": ({**MASKS, "criterion": "movement"}, {"method": "movement"}),
    "soft movement": ({**MASKS, "criterion": "movement"}, {"method": "movement", "form": "soft"}),
    "l2": (CHANNELS, charged("l2")),
    "proximal": (CHANNELS, charged("group_lasso", method="proximal")),
    "gates": (CHANNELS, charged("gates")),
    "hard_concrete": (CHANNELS, charged("hard_concrete")),
    "growing": (CHANNELS, charged("growing")),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_keeps_them_and_so_does_its_control(name, monkeypatch):
    first, ends = sparse().model, []
    how, training = TRAININGS[name]
    original = during.dense_training

    def watched(model, *given, **more):
        original(model, *given, **more)
        ends.append(model)

    monkeypatch.setattr(run_training, "dense_training", watched)
    found = sc.prune(
        first, batches()[0][0][:2], data=batches(), recipe={"training": {**LESSON, **training}, **how},
        evaluate=lambda model: {"accuracy": 0.5}, overrides=["measure.rounds=6", "control=dense"],
    )  # fmt: skip
    cut = found.plan.apply(first)
    expected, after = zeros(cut), zeros(found.model)
    assert float(expected["head.weight"].float().mean()) > 0.2
    for parameter, zero in expected.items():
        assert bool(after[parameter][zero].all()), parameter
    assert not torch.equal(found.model.head.weight, cut.head.weight), "it trains"
    assert not [line for line in found.report.warnings if "filled zeros" in line]
    (control,) = ends
    assert all(bool(zeros(control)[parameter][zero].all()) for parameter, zero in zeros(first).items())
    assert not torch.equal(control.head.weight, first.head.weight)


@pytest.mark.parametrize("name", ["gradual channels", "gradual layers", "l2", "gates"])
def test_zeros_that_no_plan_knows_are_spoken_of_where_a_training_fills_them(name):
    copied = copy.deepcopy(sparse().model)  # a copy has no history
    how, training = TRAININGS[name]
    found = sc.prune(
        copied, batches()[0][0][:2], data=batches(), recipe={"training": {**LESSON, **training}, **how},
        overrides=["measure.rounds=6", "measure.quality=false"],
    )  # fmt: skip
    line = next(line for line in found.report.warnings if "filled zeros" in line)
    assert line.startswith(f"training: {training['method']}")
    assert "-> 0%" in line


def test_zeros_that_go_with_what_is_cut_are_not_filled():
    torch.manual_seed(3)
    model = Stack().eval()
    with torch.no_grad():
        for block in model.layers:  # a third of the channels is dead, and goes first
            block.up.weight[:8], block.up.bias[:8], block.down.weight[:, :8] = 0.0, 0.0, 0.0
    how, training = TRAININGS["gradual channels"]
    found = sc.prune(
        model, batches()[0][0][:2], data=batches(), protect=["stem"], overrides=["measure.rounds=6"],
        recipe={"training": {**LESSON, **training, "optimizer": {"name": "sgd", "lr": 1e-6}}, **how, "scope": "local"},
    )  # fmt: skip
    assert float(zeros(model)["layers.1.up.weight"].float().mean()) > 0.3
    assert float(zeros(found.model)["layers.1.up.weight"].float().mean()) < 0.15
    assert not [line for line in found.report.warnings if "filled zeros" in line]


def test_a_recovery_behind_a_training_keeps_them_too():
    first = sparse().model
    step = {"method": "finetune", "steps": 4, "optimizer": {"name": "sgd", "lr": 0.1}}
    found = sc.prune(
        first, batches()[0][0][:2], data=batches(), overrides=["measure.rounds=6", "measure.quality=false"],
        recipe={"training": {**LESSON, **charged("l2")}, **CHANNELS, "recover": [step]},
    )  # fmt: skip
    assert all(bool(zeros(found.model)[name][zero].all()) for name, zero in zeros(found.plan.apply(first)).items())


def steps_of(model, optimizer, pruner, count, each=lambda: None):
    data = batches()
    for number in range(count):
        x, y = data[number % len(data)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        pruner.step()
        each()


@pytest.mark.parametrize("told", [True, False], ids=["told of the optimizer", "not told"])
def test_a_pruner_of_weights_in_a_loop_of_the_users_keeps_them_at_every_step(told):
    model = sparse().model
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    pruner = sc.Pruner(model, sparsity=0.75, begin=4, end=8, every=2, optimizer=optimizer if told else None)
    first = zeros(model)

    def each():
        for name, zero in first.items():
            weight = model.get_parameter(name)[zero]
            assert not bool(weight.any() | torch.signbit(weight).any()), "+0.0"

    steps_of(model, optimizer, pruner, 10, each)
    assert pruner.sparsity == 0.75


@pytest.mark.parametrize("stop", [None, 3, 7])
def test_a_pruner_that_cuts_in_a_loop_of_the_users_keeps_them(stop):
    model, x = sparse().model, batches()[0][0][:2]
    how = {"sparsity": 0.5, "end": 8, "every": 4, "granularity": "channel"}

    def begun(model, **state):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return optimizer, sc.Pruner(model, x, **how, optimizer=optimizer, **state)

    optimizer, pruner = begun(model)
    steps_of(model, optimizer, pruner, 10 if stop is None else stop)
    if stop is not None:  # as a process that begins anew: the model of before, cut and filled as the state says
        kept, weights = pruner.state_dict(), model.state_dict()
        model = sparse().model
        optimizer, pruner = begun(model, state=kept)
        model.load_state_dict(weights)
        steps_of(model, optimizer, pruner, 10 - stop)
    for group in optimizer.param_groups:
        list(map(torch.nn.init.ones_, group["params"]))  # other hands
    pruner.finish()
    expected = zeros(pruner.plan.apply(sparse().model))
    assert pruner.sparsity == 0.5
    assert float(expected["head.weight"].float().mean()) > 0.2
    assert all(bool(zeros(model)[name][zero].all()) for name, zero in expected.items())


@pytest.mark.parametrize("kind", ["cuts", "movement"])
def test_averages_of_them_are_zero_too(kind):
    model, x = sparse().model, batches()[0][0][:2]
    first, averaged = zeros(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if kind == "movement":
        pruner = sc.MovementPruner(model, sparsity=0.75, end=6, optimizer=optimizer, ema=averaged)
    else:
        how = {"sparsity": 0.1, "begin": 9, "end": 10, "granularity": "channel"}  # later than the test ends
        pruner = sc.Pruner(model, x, **how, optimizer=optimizer, ema=averaged)
    update, pruner.step = pruner.step, lambda: (averaged.update_parameters(model), update())  # as loops do
    steps_of(model, optimizer, pruner, 6)
    assert all(bool(zeros(averaged.module)[name][zero].all()) for name, zero in first.items())
    assert not torch.equal(averaged.module.head.bias, model.head.bias)


def test_movement_in_a_loop_of_the_users_keeps_them():
    model = sparse().model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    first, pruner = zeros(model), sc.MovementPruner(model, sparsity=0.75, end=6, optimizer=optimizer)
    steps_of(model, optimizer, pruner, 8)
    pruner.finish()
    assert all(bool(zeros(model)[name][zero].all()) for name, zero in first.items())


def test_what_has_to_stay_zero_does_not_grow_back():
    model = sparse().model
    how = {"sparsity": 0.75, "end": 6, "regrow": "set"}
    with pytest.raises(RecipeError, match="an earlier round has removed"):
        sc.Pruner(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), **how)
    copied = copy.deepcopy(model)
    sc.Pruner(copied, optimizer=torch.optim.SGD(copied.parameters(), lr=0.1), **how)
