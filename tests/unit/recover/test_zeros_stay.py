"""A second round keeps the zeros of the first, whatever recovers; or it is said that they are gone."""

import copy

import numpy as np
import pytest
import torch
from sparse_stack import Stack, batches, sparse, zeros
from tiny_language_models import llama
from torch import nn

import secateur as sc
from secateur.comparison.cells import AS_IS, DENSE
from secateur.objective import evaluate
from secateur.planning.history import zeros_of
from secateur.solve import refit, refit_blocks
from secateur.solve.gaps import refit_gaps
from secateur.solve.refit import refit_consumers

CLOSED = [{"method": "refit"}, {"method": "refit", "ridge": 0.01}, {"method": "obs_update"}]
TRAINED = [{"method": "finetune", "steps": 4, "optimizer": {"name": "sgd", "lr": 0.1}}]


def second(model, **how):
    return sc.prune(
        model, batches()[0][0][:2], data=batches(), overrides=["measure.rounds=6", "measure.quality=false"], **how
    )


SECOND = {
    "channel": {"granularity": "channel", "target": {"sparsity": 0.3}},
    "element": {"granularity": "element", "target": {"sparsity": 0.75}, "criterion": "taylor"},
    "layer": {"granularity": "layer", "target": {"count": 1}, "protect": ["layers.0", "layers.2"]},
}
# obs_update is refused for layers
CASES = [(how, s) for how in SECOND for s in (*CLOSED, *TRAINED) if (how, s["method"]) != ("layer", "obs_update")]


@pytest.mark.parametrize(("how", "step"), CASES, ids=str)
def test_zeros_of_the_first_round_stay(how, step):
    first = sparse().model
    found = second(first, recover=[step], **SECOND[how])
    expected = zeros(found.plan.apply(first))  # what the cut alone leaves
    before = {name: p.detach() for name, p in found.plan.apply(first).named_parameters()}
    assert float(expected["head.weight"].float().mean()) > 0.2
    after = zeros(found.model)
    for name, zero in expected.items():
        assert bool(after[name][zero].all()), name
    assert any(not torch.equal(before[name], p.detach()) for name, p in found.model.named_parameters()), "it recovers"
    assert not [line for line in found.report.warnings if "filled zeros" in line]


def test_a_loop_of_the_users_and_the_dense_control_keep_them_too():
    first, seen = sparse().model, []

    def train(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in batches():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        seen.append(zeros(model))

    found = second(first, granularity="channel", target={"sparsity": 0.3}, train=train)
    expected = zeros(found.plan.apply(first))
    assert all(bool(zeros(found.model)[name][zero].all()) for name, zero in expected.items())
    # The control of a sparse model is a sparse one: with two models trained, the last is it.
    assert len(seen) == 1
    control = sc.prune(
        first, batches()[0][0][:2], data=batches(), granularity="channel", target={"sparsity": 0.3}, recover=TRAINED,
        evaluate=lambda model: seen.append(zeros(model)) or {"accuracy": 0.5},
        overrides=["measure.rounds=6", "control=dense"],
    )  # fmt: skip
    assert control.report.control is not None
    wide = [found for found in seen if found["layers.0.up.weight"].shape == (24, 12)]
    assert len(wide) >= 2, "the model as it came, and the control"
    assert all(bool(found[name][zero].all()) for found in wide for name, zero in zeros(first).items())


def test_a_comparison_recovers_a_sparse_model_as_a_sparse_one(tmp_path):
    first = sparse().model
    found = sc.compare(
        first, batches(), criteria=["magnitude"], evaluate=lambda model: {"accuracy": 0.5}, out=tmp_path, seeds=1,
        example=batches()[0][0][:2], levels=[0.3], recover={"trained": TRAINED}, rounds=0, probes=0,
    )  # fmt: skip
    nonzero = {(row["criterion"], row["recovery"]): row["nonzero"] for row in found.rows if row["variant"] == AS_IS}
    trained = [name for name, recovery in nonzero if recovery == "trained"]
    assert {"magnitude", "random", DENSE} <= set(trained)
    assert all(nonzero[name, "trained"] <= nonzero[name, "none"] for name in trained)


def test_what_a_search_tries_keeps_them(monkeypatch):
    first, seen = sparse().model, []
    step = evaluate.run_step

    def watched(model, *given, **more):
        before = zeros(model)
        step(model, *given, **more)
        seen.append(all(bool(zeros(model)[name][zero].all()) for name, zero in before.items()))

    monkeypatch.setattr(evaluate, "run_step", watched)
    data = [(x, y) for x, y in batches()]
    second_data = {"train": data, "calibration": data, "test": data}
    sc.prune(
        first, batches()[0][0][:2], data=second_data, granularity="channel", max_drop=50.0, recover=TRAINED,
        overrides=["measure.rounds=6"],
    )  # fmt: skip
    assert len(seen) >= 2
    assert all(seen)


def test_a_saved_model_brings_its_zeros_along(tmp_path):
    sparse().save(tmp_path / "sparse")
    loaded = sc.load(tmp_path / "sparse", Stack)
    found = second(loaded, granularity="layer", target={"count": 1}, protect=["layers.0", "layers.2"], recover=TRAINED)
    kept = zeros(found.plan.apply(loaded))
    assert all(bool(zeros(found.model)[name][zero].all()) for name, zero in kept.items())
    for place, number in enumerate((0, 2)):  # under the names that blocks have once others are gone
        assert torch.equal(
            zeros_of(found.model)[f"layers.{place}.up.weight"], ~zeros(loaded)[f"layers.{number}.up.weight"]
        )
    found.save(tmp_path / "both")
    again = sc.load(tmp_path / "both", Stack)
    assert all(bool(zeros(again)[name][zero].all()) for name, zero in kept.items())


@pytest.mark.parametrize("step", [CLOSED[0], *TRAINED], ids=["refit", "finetune"])
def test_zeros_that_no_plan_knows_are_spoken_of_where_they_go(step):
    copied = copy.deepcopy(sparse().model)  # a copy has no history
    found = second(copied, granularity="channel", target={"sparsity": 0.3}, recover=[step])
    assert float(zeros(found.model)["layers.1.down.weight"].float().mean()) < 0.2, "or there is nothing to speak of"
    line = next(line for line in found.report.warnings if "filled zeros" in line)
    assert f"recover: {step['method']}" in line
    assert "down.weight: 6" in line
    assert "-> 0%" in line


def test_nothing_is_said_of_dense_models_and_of_layers_that_begin_with_zeros_alone():
    torch.manual_seed(3)
    model = Stack().eval()
    with torch.no_grad():
        model.layers[1].down.weight.zero_()
        model.layers[2].down.weight[0, 0] = 0.0  # one weight of 288
    found = second(model, granularity="channel", target={"sparsity": 0.2}, recover=TRAINED)
    assert bool((found.model.layers[1].down.weight != 0).any())
    assert not [line for line in found.report.warnings if "filled zeros" in line]


def rows_of_numpy(x, y, keep, ridge):
    """Each output by itself on the columns it has, and a column of ones that is hardly damped."""
    found = np.zeros((x.shape[1] + 1, y.shape[1]))
    for row in range(y.shape[1]):
        own = np.flatnonzero(keep[row])
        part = np.concatenate([x[:, own], np.ones((len(x), 1))], 1)
        level = np.square(part[:, :-1]).sum(0).mean()
        damping = np.diag([ridge * level] * len(own) + [1e-12 * level])
        found[[*own, x.shape[1]], row] = np.linalg.solve(part.T @ part + damping, part.T @ y[:, row])
    return found


def test_a_gap_behind_a_sparse_layer_is_least_squares_row_by_row():
    torch.manual_seed(5)
    model = Stack().double().eval()
    cut = copy.deepcopy(model)
    cut.layers = nn.ModuleList([cut.layers[0], cut.layers[2]])
    keep = torch.rand(12, 24, generator=torch.Generator().manual_seed(6)) < 0.5
    with torch.no_grad():
        cut.layers[0].down.weight *= keep
    x = torch.cat([x for x, _ in batches()]).double()
    with torch.no_grad():
        h = model.stem(x)
        goal = model.layers[1](model.layers[0](h))
        features, now = torch.relu(cut.layers[0].up(h)), cut.layers[0](h)
        before = cut.layers[0].down.weight.numpy().copy(), cut.layers[0].down.bias.numpy().copy()
    entry = {"layers": {"size": 3, "removed": [1], "lists": []}}
    refit_gaps(model, cut, [x], layers=entry, masks={"layers.0.down.weight": keep}, ridge=1e-3)
    change = rows_of_numpy(features.numpy(), (goal - now).numpy(), keep.numpy(), 1e-3)
    np.testing.assert_allclose(cut.layers[0].down.weight.detach(), before[0] + change[:-1].T, atol=1e-9)
    np.testing.assert_allclose(cut.layers[0].down.bias.detach(), before[1] + change[-1], atol=1e-9)
    assert bool((cut.layers[0].down.weight[~keep] == 0).all())


def test_earlier_zeros_alone_are_no_reason_for_a_fit():
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)).double().eval()
    kept = torch.arange(12)
    cut = copy.deepcopy(model)
    keep = torch.rand(16, 12, generator=torch.Generator().manual_seed(8)) < 0.6
    last = torch.rand(3, 16, generator=torch.Generator().manual_seed(9)) < 0.6
    with torch.no_grad():
        cut[0] = nn.Linear(8, 12).double()
        cut[0].weight.copy_(model[0].weight[kept])
        cut[0].bias.copy_(model[0].bias[kept])
        cut[2] = nn.Linear(12, 16).double()
        cut[2].weight.copy_(model[2].weight[:, kept] * keep)
        cut[2].bias.copy_(model[2].bias)
        cut[4].weight.mul_(last)
    data = [x.double() for x, _ in batches()]
    cuts = {"0.weight": {0: kept}, "0.bias": {0: kept}, "2.weight": {1: kept}}
    made, old = keep.clone(), keep.clone()
    made[:, 0], old[:, 1] = True, True  # each knows of zeros that the other does not
    with torch.no_grad():
        cut[2].weight.mul_(keep := made & old)
    earlier = {"2.weight": old, "4.weight": last}
    changed = refit_consumers(model, cut, data, cuts=cuts, masks={"2.weight": made}, zeros=earlier, ridge=1e-3)
    assert set(changed) == {"2.weight", "2.bias"}
    assert bool((cut[2].weight[~keep] == 0).all())
    assert bool((cut[2].weight[keep] != 0).all())


def test_what_lost_nothing_stays_to_the_bit_in_a_second_round():
    torch.manual_seed(11)
    layers = (nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    x = batches()[0][0][:2]
    first = sc.prune(
        nn.Sequential(*layers).eval(),
        x,
        granularity="element",
        target={"sparsity": 0.5},
        overrides=["measure.rounds=6"],
    ).model
    found = second(first, granularity="channel", keep={"0": torch.arange(16) < 12}, recover=[CLOSED[0]])
    assert [name for name, group in found.plan.groups.items() if group["removed"]] == ["0"]
    assert torch.equal(found.model[4].weight, first[4].weight)
    assert not torch.equal(found.model[2].bias, first[2].bias), "what lost inputs is fitted"


def test_a_refit_block_by_block_keeps_them(monkeypatch):
    model = llama(layers=3).eval()
    ids = [torch.randint(0, 40, (4, 12), generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    data = [{"input_ids": one} for one in ids]
    quiet = ["measure.rounds=6", "measure.quality=false"]
    first = sc.prune(model, data[0], granularity="element", target={"sparsity": 0.5}, overrides=quiet).model
    alone, seen = refit_blocks.blocks_alone, []
    monkeypatch.setattr(refit, "blocks_alone", lambda *given: seen.append(alone(*given)) or seen[-1])
    found = sc.prune(
        first, data[0], data=data, granularity="neuron", target={"sparsity": 0.25}, recover=[CLOSED[0]], overrides=quiet
    )
    assert seen[0] is not None, "the block path is the one that is tried here"
    cut = found.plan.apply(first)
    assert not torch.equal(found.model.model.layers[1].mlp.down_proj.weight, cut.model.layers[1].mlp.down_proj.weight)
    assert all(bool(zeros(found.model)[name][zero].all()) for name, zero in zeros(cut).items())
