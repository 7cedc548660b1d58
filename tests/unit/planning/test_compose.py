from dataclasses import replace

import pytest
import torch
from nets import example, net

import secateur as sc
from secateur.errors import PlanMismatchError


def test_cut_train_cut_again_is_one_plan_for_the_original(tmp_path):
    model, x = net(), example()
    first = sc.plan(model, x, target={"macs": 0.7})
    cut = first.apply(model)
    with torch.no_grad():  # training moves the weights between the cuts
        for parameter in cut.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    second = sc.plan(cut, x, target={"macs": 0.6})
    twice = second.apply(cut)
    third = sc.plan(twice, x, granularity="element", target={"sparsity": 0.5})
    final = third.apply(twice)
    whole = first.then(second, model).then(third, net(seed=5))
    whole.save(tmp_path / "plan.json")
    fresh = sc.Plan.load(tmp_path / "plan.json").apply(net(seed=7))
    assert {n: tuple(p.shape) for n, p in fresh.named_parameters()} == {
        n: tuple(p.shape) for n, p in final.named_parameters()
    }
    fresh.load_state_dict(final.state_dict())
    torch.testing.assert_close(fresh(x), final(x), atol=0, rtol=0)
    assert whole.certificate.max_abs_error <= whole.certificate.tolerance
    assert whole.cost["macs"] == [first.cost["macs"][0], second.cost["macs"][1]]
    assert whole.masks.keys() == third.masks.keys()


def test_indices_count_what_was_kept():
    model, x = net(), example()
    first = sc.plan(model, x, target={"count": 9})
    cut = first.apply(model)
    second = sc.plan(cut, x, target={"count": 5})
    whole = first.then(second, model)
    assert sum(len(g["removed"]) for g in whole.groups.values()) == 14 == whole.units["removed"]
    direct, stepwise = whole.apply(model), second.apply(cut)
    for name, tensor in direct.state_dict().items():
        assert torch.equal(tensor, stepwise.state_dict()[name])


def test_what_the_making_of_either_plan_has_said_is_said_of_both():
    model, x = net(), example()
    first = replace(sc.plan(model, x, target={"count": 9}), notes=("one matrix saw no token", "of both"))
    second = replace(sc.plan(first.apply(model), x, target={"count": 5}), notes=("of both", "one was refused"))
    whole = first.then(second, model)
    assert whole.notes == ("one matrix saw no token", "of both", "one was refused")
    assert "  one matrix saw no token" in whole.explain()


def test_a_mask_is_cut_by_the_cut_that_follows():
    model, x = net(), example()
    first = sc.plan(model, x, granularity="element", target={"sparsity": 0.3})
    masked = first.apply(model)
    second = sc.plan(masked, x, target={"macs": 0.6})
    both = first.then(second, model).apply(model)
    for name, tensor in second.apply(masked).state_dict().items():
        assert torch.equal(tensor, both.state_dict()[name])


def test_plans_that_do_not_follow_each_other_are_refused():
    model, x = net(), example()
    plans = [sc.plan(model, x, target={"macs": share}) for share in (0.7, 0.5)]
    with pytest.raises(PlanMismatchError, match="not made for the model"):
        plans[0].then(plans[1], model)
    with pytest.raises(PlanMismatchError):
        plans[0].then(plans[1], net(width=8))
