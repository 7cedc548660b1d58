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


class Factors(torch.nn.Module):
    """A width that is the product of two: pieces of a feature, or heads and what is in them."""

    def __init__(self, pieces: int) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, 12), torch.nn.Linear(20, 3)
        self.left, self.right = (torch.nn.Parameter(torch.randn(n, m)) for n, m in ((pieces, 4), (12 // pieces, 5)))

    def forward(self, x):
        parts = self.up(x).relu().view(len(x), self.left.shape[0], -1)
        return self.down((self.left.T @ parts @ self.right).flatten(1).relu())


class OneHeadLeft(torch.nn.Module):
    """Two heads: where one is left, its dimensions are ordinary features."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.q, self.k, self.v = (torch.nn.Linear(8, 12) for _ in range(3))
        self.out = torch.nn.Linear(12, 3)

    def forward(self, x):
        q, k, v = (f(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.out(((q @ k.mT * 0.3).softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("build", "shape", "first", "second", "sizes"),
    [
        (lambda: Factors(2), (5, 8), {"remove": {"up": [0], "up#2": [1, 4]}}, {"remove": {"up": [0, 3]}},
         {"up": (2, [0]), "up#2": (6, [0, 1, 4, 5])}),
        (lambda: Factors(3), (5, 8), {"remove": {"up#2": [1, 2, 3]}}, {"remove": {"up": [2]}},
         {"up": (3, [2]), "up#2": (4, [1, 2, 3])}),
        (OneHeadLeft, (2, 4, 8), {"remove": {"q/head": [0]}, "granularity": "head"},
         {"remove": {"q": [0, 5], "v": [1]}}, {"q/head": (2, [0]), "q": (6, [0, 5]), "v": (6, [1])}),
    ],
)  # fmt: skip
def test_a_step_after_one_that_left_a_single_unit_knows_units_by_other_names(
    tmp_path, build, shape, first, second, sizes
):
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(shape)
    one = sc.plan(model, x, **{"granularity": "channel", **first})
    cut = one.apply(model)
    two = sc.plan(cut, x, granularity="channel", **second)
    twice, whole = two.apply(cut), one.then(two, model)
    said = {name: (group["size"], group["removed"]) for name, group in whole.groups.items() if group["removed"]}
    assert said == sizes
    whole.save(tmp_path / "plan.json")
    again = sc.Plan.load(tmp_path / "plan.json")
    for found in (again.apply(model), again.apply(model, example=x)):  # taken from the file, and proved anew
        assert {n: tuple(t.shape) for n, t in found.state_dict().items()} == {
            n: tuple(t.shape) for n, t in twice.state_dict().items()
        }
        torch.testing.assert_close(found(x), twice(x), atol=0, rtol=0)
    torch.manual_seed(0)
    results = sc.prune(model, x, **{"granularity": "channel", **first})
    sc.prune(results.model, x, granularity="channel", **second).save(tmp_path / "out")
    loaded = sc.load(tmp_path / "out", model=build, example=x).eval()
    torch.testing.assert_close(loaded(x), twice(x), atol=0, rtol=0)


def test_a_composed_plan_whose_slices_are_no_units_is_not_proved(tmp_path):
    torch.manual_seed(0)
    model, x = Factors(2).eval(), torch.randn(5, 8)
    one = sc.plan(model, x, remove={"up": [0], "up#2": [1, 4]})
    cut = one.apply(model)
    whole = one.then(sc.plan(cut, x, remove={"up": [0, 3]}), model)
    kept = whole.cuts["up.weight"][0]
    other = torch.tensor([*kept.tolist()[:-1], 11])  # a position of another unit
    shifted = {**whole.cuts, "up.weight": {0: other}, "up.bias": {0: other}}
    with pytest.raises(PlanMismatchError, match=r"do not belong together|not as free units"):
        replace(whole, cuts=shifted).apply(Factors(2).eval(), example=x)
