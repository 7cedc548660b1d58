import copy

import pytest
import torch
from stacks import deep, example, resnet
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import secateur as sc
from secateur.errors import PlanMismatchError, RecipeError

REQUESTS = {
    "layer": {"granularity": "layer", "target": {"count": 2}},
    "sub_block": {"granularity": "sub_block", "target": {"count": 2}},
    "neuron": {"granularity": "neuron", "target": {"sparsity": 0.4}},
    "element": {"granularity": "element", "target": {"sparsity": 0.4}},
}


def trained(model, x, steps=3):
    """The model after some steps, and the average over them in both forms."""
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(model)
    plain = {name: p.detach().clone() for name, p in averaged.module.named_parameters()}
    return averaged, {**plain, "steps": torch.tensor(steps)}


@pytest.mark.parametrize("kind", REQUESTS)
def test_averages_are_what_the_plan_makes_of_a_model_with_these_weights(kind):
    model, x = deep(), example()
    averaged, plain = trained(model, x)
    reference = copy.deepcopy(model)
    reference.load_state_dict({k: v for k, v in plain.items() if k != "steps"})
    plan = sc.plan(model, x, **REQUESTS[kind])
    expected = dict(plan.apply(reference).named_parameters())
    plan.apply(model, inplace=True, ema=plain)
    assert int(plain.pop("steps")) == 3
    assert plain.keys() == expected.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(plain[name], expected[name]) for name in plain)

    again = deep()
    again.load_state_dict(reference.state_dict())
    plan.apply(again, inplace=True, ema=averaged)
    assert all(torch.equal(p, expected[name]) for name, p in averaged.module.named_parameters())
    averaged.update_parameters(again)
    assert torch.isfinite(averaged(x)).all()


@pytest.mark.parametrize("kind", ["layer", "sub_block"])
def test_buffers_follow_too(kind):
    model, x = resnet(), torch.randn(2, 3, 8, 8)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    plan = sc.plan(model, x, granularity=kind, target={"count": 2})
    cut = plan.apply(model, ema=state)
    assert state.keys() == cut.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in cut.state_dict().items())


def test_wrong_averages_change_nothing():
    model, x = deep(), example()
    plan = sc.plan(model, x, **REQUESTS["neuron"])
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(PlanMismatchError, match="shape"):
        plan.apply(model, inplace=True, ema={"head.weight": torch.zeros(1)})
    with pytest.raises(PlanMismatchError, match="other parameters"):
        plan.apply(model, inplace=True, ema=AveragedModel(deep(5)))
    with pytest.raises(RecipeError, match="ema is a list"):
        plan.apply(model, inplace=True, ema=[])
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
