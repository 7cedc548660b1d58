import copy

import numpy as np
import pytest
import torch
from stacks import Deep, deep, example, resnet
from torch import nn

import secateur as sc
from secateur.criteria import AngularDistance, BlockInfluence, Every, LossIncrease
from secateur.criteria.depth.loss_increase import loss_without
from secateur.errors import InputError, NonFiniteError, RecipeError


def states(model: Deep, x):
    """Inputs and outputs of every block as float64 arrays."""
    hidden, pairs = model.stem(x), []
    for i, block in enumerate(model.layers):
        start = hidden * model.layer_scales[i]
        end = block(start)
        pairs.append((start.detach().double().numpy(), end.detach().double().numpy()))
        hidden = end / model.layer_scales[i]
    return pairs


def cosines(pairs):
    return [(a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1) for a, b in pairs]


def score(rule, model, x, data=None, loss=None):
    data = [x] if data is None else data
    return sc.score(model, x, granularity="layer", criterion=rule, data=data, loss=loss)


def test_block_influence_and_angle_from_their_definitions():
    model, x = deep(), example()
    cos = cosines(states(model, x))
    assert np.allclose(score(BlockInfluence(), model, x)["layers"], [(1 - c).mean() for c in cos], atol=1e-6)
    angles = [(np.arccos(c) / np.pi).mean() for c in cos]
    assert np.allclose(score(AngularDistance(), model, x)["layers"], angles, atol=1e-6)


def test_influence_averages_over_the_data_whatever_the_batches():
    model, x = deep(), torch.randn(8, 5, 4)
    whole = score(BlockInfluence(), model, x)["layers"]
    parts = score(BlockInfluence(), model, x, data=[x[:3], x[3:]])["layers"]
    assert torch.allclose(whole, parts, atol=1e-9)


def test_influence_of_images_is_over_channels():
    model, x = resnet(), torch.randn(2, 3, 8, 8)
    found = score(BlockInfluence(), model, x)["0"]
    start = model[0][0](x)
    end = model[0][1](start.clone())
    a, b = start.detach().double().numpy(), end.detach().double().numpy()
    cos = (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-8)
    assert found[1] == pytest.approx(float((1 - cos).mean()), abs=1e-6)


@pytest.mark.parametrize("span", [2, 3])
def test_the_run_with_the_smallest_angle_goes_as_one(span):
    model, x = deep(), example()
    with torch.no_grad():
        for block in model.layers[2:4]:
            block.inner[2].weight.mul_(0.01), block.inner[2].bias.mul_(0.01)
    model.layer_scales = (1.0,) * 6
    pairs = states(model, x)
    runs = {
        i: float(np.mean(np.arccos(cosines([(pairs[i][0], pairs[i + span - 1][1])])[0])) / np.pi)
        for i in range(7 - span)
    }
    found = score(AngularDistance(span=span), model, x)["layers"]
    for i in range(6):
        assert found[i] == pytest.approx(min(runs[j] for j in runs if j <= i < j + span), abs=1e-6)
    plan = sc.plan(
        model, x, granularity="layer", criterion=AngularDistance(span=span), data=[x], target={"count": span}
    )
    best = min(runs, key=runs.__getitem__)
    assert plan.layers["layers"]["removed"] == list(range(best, best + span))


def test_locked_blocks_score_as_the_best():
    model, x = deep(), example()
    data = [(x, torch.randn(3, 5, 3))]
    for rule in (BlockInfluence(), AngularDistance(), AngularDistance(span=2), LossIncrease()):
        found = sc.score(model, x, granularity="layer", criterion=rule, data=data, protect=["layers.2"])["layers"]
        assert found[2] == found[[0, 1, 3, 4, 5]].max()


def test_wrong_spans_are_refused():
    model, x = deep(), example()
    for span in (0, 1.5, True):
        with pytest.raises(RecipeError, match="span"):
            AngularDistance(span=span)
    with pytest.raises(RecipeError, match="does not fit"):
        score(AngularDistance(span=7), model, x)


def test_an_identity_block_goes_first():
    model, x = deep(), example()
    with torch.no_grad():
        model.layers[3].inner[2].weight.zero_()
        model.layers[3].inner[2].bias.zero_()
    data = [(x, torch.zeros(3, 5, 3))]
    for rule in ("block-influence", "angular-distance", "loss-increase", LossIncrease(greedy=True)):
        plan = sc.plan(model, x, granularity="layer", criterion=rule, data=data, target={"count": 1})
        removed = plan.layers["layers"]["removed"]
        if rule == "loss-increase" or isinstance(rule, LossIncrease):
            best = min(loss_without(model, data, None, without=[f"layers.{i}"]) for i in range(6))
            assert loss_without(model, data, None, without=[f"layers.{removed[0]}"]) == best
        else:
            assert removed == [3]


def test_loss_increase_is_the_measured_difference():
    model, x = deep(), example()
    data = [(x, torch.randn(3, 5, 3)), (x + 1, torch.randn(3, 5, 3))]
    found = score(LossIncrease(), model, x, data)["layers"]

    def loss(net):
        return np.mean([float(nn.functional.mse_loss(net(a), b)) for a, b in data])

    with torch.no_grad():
        whole = loss(model)
        for i in range(6):
            plan = sc.plan(model, x, granularity="layer", target={"count": 5}, protect=[f"layers.{i}"])
            assert plan.layers["layers"]["removed"] == [j for j in range(6) if j != i]
            one = sc.plan(
                model, x, granularity="layer", target={"count": 1},
                protect=[f"layers.{j}" for j in range(6) if j != i],
            ).apply(model)  # fmt: skip
            assert float(found[i]) == pytest.approx(loss(one) - whole, abs=1e-6)


@pytest.mark.parametrize("turns", [None, 1, 2, 9])
def test_greedy_order_is_the_brute_force_one(turns):
    model, x = deep(4), example()
    data = [(x, torch.randn(3, 5, 3))]
    found = score(LossIncrease(greedy=True, turns=turns), model, x, data)["layers"]
    gone, losses = [], {}
    for turn in range(min(turns or 4, 4)):
        rest = [i for i in range(4) if i not in gone]
        losses = {i: loss_without(model, data, None, without=[f"layers.{j}" for j in (*gone, i)]) for i in rest}
        best = min(rest, key=losses.__getitem__)
        assert int(found[best]) == turn
        gone.append(best)
    rest = [i for i in range(4) if i not in gone]
    assert found.argsort().tolist() == gone + sorted(rest, key=losses.__getitem__)


@pytest.mark.slow
def test_greedy_removal_from_a_language_model_is_that_by_perplexity():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=32, num_hidden_layers=4, initializer_range=0.3, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 32, (4, 12))
    data = [{"input_ids": part, "labels": part} for part in ids.split(2)]
    (found,) = sc.score(
        model, {"input_ids": ids[:1, :6]}, granularity="layer", criterion=LossIncrease(greedy=True, turns=2), data=data
    ).values()
    # By models that were built without the blocks, and a loss that is written out here.
    gone = []
    for _ in range(2):
        without = {i: perplexity_without(model, ids, [*gone, i]) for i in range(4) if i not in gone}
        gone.append(min(without, key=without.__getitem__))
    assert found.argsort().tolist()[:2] == gone


def perplexity_without(model, ids, gone):
    smaller = copy.deepcopy(model)
    smaller.model.layers = nn.ModuleList(b for i, b in enumerate(smaller.model.layers) if i not in gone)
    smaller.config.num_hidden_layers = len(smaller.model.layers)
    with torch.no_grad():
        logits = smaller(input_ids=ids, use_cache=False).logits.double()
    told = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
    return float((-told.mean()).exp())


def test_turns_that_mean_nothing_are_refused():
    for options in ({"turns": 2}, {"greedy": True, "turns": 0}, {"greedy": True, "turns": 1.0}):
        with pytest.raises(RecipeError, match="turns"):
            LossIncrease(**options)


@pytest.mark.parametrize(("k", "removed"), [(2, [1, 3, 5]), (3, [2, 5]), (1, list(range(1, 6)))])
def test_every(k, removed):
    model, x = deep(), example()
    plan = sc.plan(model, x, granularity="layer", criterion=Every(k=k), target={"count": len(removed)})
    assert plan.layers["layers"]["removed"] == removed


def test_magnitude_scores_the_weights_of_blocks():
    model, x = deep(), example()
    found = sc.score(model, x, granularity="layer", criterion={"name": "magnitude", "norm": "l1"})["layers"]
    sums = [sum(float(p.detach().abs().sum()) for p in block.parameters()) for block in model.layers]
    assert np.allclose(found, sums, rtol=1e-5)


def test_bad_data():
    model, x = deep(), example()
    with pytest.raises(NonFiniteError):
        score(BlockInfluence(), model, x, data=[x * float("nan")])
    with pytest.raises(InputError, match="no batch"):
        score(LossIncrease(), model, x, data=[])
    assert not [m for m in model.modules() if "forward" in vars(m) or m._forward_hooks]
    with torch.no_grad():
        model.head.bias[1] = float("inf")
    with pytest.raises(NonFiniteError, match=r"head\.bias"):
        sc.plan(model, x, granularity="layer", criterion="every", target={"count": 1})
    with torch.device("meta"):
        shell = Deep()
    with pytest.raises(InputError, match="no values yet"):
        sc.plan(shell, x, granularity="layer", criterion="every", target={"count": 1})
