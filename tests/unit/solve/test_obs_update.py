"""The OBS update of pruned models against its closed form, written out in float64 NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import InputError, RecipeError
from secateur.masks import mask_model
from secateur.recipe import load_recipe
from secateur.recover import finetune
from secateur.solve.obs_update import obs_update

DAMPING = 0.1


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def data():
    torch.manual_seed(1)
    x, y = torch.randn(64, 5), torch.randint(0, 3, (64,))
    return [(x[:40], y[:40]), (x[40:], y[40:])]


def closed_form(model, removed):
    """All weights as one vector after the removal of some: numpy, one gradient at a time."""
    names = list(removed)
    rows = []
    for x, y in data():
        for i in range(len(x)):
            loss = nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
            gradients = torch.autograd.grad(loss, [model.get_parameter(name) for name in names])
            rows.append(np.concatenate([g.double().numpy().ravel() for g in gradients]))
    rows = np.stack(rows)
    fisher = rows.T @ rows / len(rows)
    fisher += DAMPING * np.trace(fisher) / len(fisher) * np.eye(len(fisher))
    inverse = np.linalg.inv(fisher)
    w = np.concatenate([model.get_parameter(name).detach().double().numpy().ravel() for name in names])
    gone = np.concatenate([removed[name].numpy().ravel() for name in names])
    moved = w - inverse[:, gone] @ np.linalg.solve(inverse[np.ix_(gone, gone)], w[gone])
    found, start = {}, 0
    for name in names:
        shape = model.get_parameter(name).shape
        found[name] = moved[start : start + shape.numel()].reshape(shape)
        start += shape.numel()
    return found


@pytest.mark.parametrize("options", [{}, {"form": "block", "block_size": 99}])
def test_masks(options):
    model = net()
    plan = sc.plan(model, data()[0][0], granularity="element", target={"sparsity": 0.4})
    pruned = plan.apply(model)
    if options:  # blocks do not span tensors, so compare where there is one
        plan = sc.plan(model, None, granularity="element", target={"sparsity": 0.4}, protect=["2"])
        pruned = plan.apply(model)
    obs_update(model, pruned, data(), cuts={}, masks=plan.masks, gradients=64, damping=DAMPING, **options)
    wanted = closed_form(model, {name: ~mask for name, mask in plan.masks.items()})
    for name, value in wanted.items():
        found = pruned.get_parameter(name).detach()
        np.testing.assert_allclose(found.numpy(), value, atol=2e-5)
        assert bool((found[~plan.masks[name]] == 0).all())


def test_cuts():
    model, x = net(), data()[0][0]
    plan = sc.plan(model, x, granularity="neuron", target={"count": 2})
    pruned = plan.apply(model)
    gone = plan.groups["0"]["removed"]
    stay = [i for i in range(6) if i not in gone]
    obs_update(model, pruned, data(), cuts=plan.cuts, masks={}, gradients=64, damping=DAMPING)
    removed = {
        name: torch.zeros_like(model.get_parameter(name), dtype=torch.bool)
        for name in ("0.weight", "0.bias", "2.weight")
    }
    removed["0.weight"][gone] = True
    removed["0.bias"][gone] = True
    removed["2.weight"][:, gone] = True
    wanted = closed_form(model, {name: removed[name] for name in plan.cuts})
    np.testing.assert_allclose(pruned[0].weight.detach(), wanted["0.weight"][stay], atol=2e-5)
    np.testing.assert_allclose(pruned[0].bias.detach(), wanted["0.bias"][stay], atol=2e-5)
    np.testing.assert_allclose(pruned[2].weight.detach(), wanted["2.weight"][:, stay], atol=2e-5)


def test_it_lowers_the_loss_of_a_linear_model_to_the_least_there_is():
    """With squared errors around the optimum Fisher and Hessian agree up to noise: no other survivors do better."""
    torch.manual_seed(0)
    x = torch.randn(4000, 4, dtype=torch.float64) @ torch.randn(4, 4, dtype=torch.float64)
    truth = torch.tensor([1.0, -0.8, 0.6, 0.5], dtype=torch.float64)
    y = x @ truth + torch.randn(4000, dtype=torch.float64)
    model = nn.Linear(4, 1, bias=False).double()
    model.weight.data = torch.linalg.lstsq(x, y[:, None]).solution.T.contiguous()

    def loss(m, batch):
        return (m(batch[0])[:, 0] - batch[1]).square().mean() / 2

    def measured(m):
        return loss(m, (x, y)).item()

    mask = {"weight": torch.tensor([[True, True, False, True]])}
    pruned = nn.Linear(4, 1, bias=False).double()
    pruned.load_state_dict(model.state_dict())
    mask_model(pruned, mask)
    before = measured(pruned)
    options = {"gradients": 4000, "damping": 1e-9}
    obs_update(model, pruned, [(x, y)], cuts={}, masks=mask, loss=loss, **options)
    best = torch.linalg.lstsq(x[:, [0, 1, 3]], y[:, None]).solution[:, 0]
    least = float((x[:, [0, 1, 3]] @ best - y).square().mean() / 2)
    after = measured(pruned)
    assert after - least < 0.05 * (before - least)


def test_prune_runs_it_by_recipe():
    model = net()
    finetune(model, data(), optimizer={"name": "adam", "lr": 0.01}, epochs=100)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recipe = {"granularity": "element", "target": {"sparsity": 0.5}, "criterion": "obs", "measure": {"latency": False}}
    plain = sc.prune(model, data=data(), recipe=recipe)
    moved = sc.prune(model, data=data(), recipe={**recipe, "recover": [{"method": "obs_update", "damping": 0.1}]})

    def loss(m):
        return sum(nn.functional.cross_entropy(m(x), y).item() * len(x) for x, y in data())

    assert loss(moved.model) < loss(plain.model)
    for name, mask in moved.plan.masks.items():
        assert bool((moved.model.get_parameter(name)[~mask] == 0).all())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_it_comes_first_and_needs_labels():
    steps = [{"method": "bn_refresh"}, {"method": "obs_update"}]
    with pytest.raises(RecipeError, match="comes first"):
        load_recipe({"target": {"sparsity": 0.5}, "recover": steps})
    model = net()
    plan = sc.plan(model, None, granularity="element", target={"sparsity": 0.4})
    pruned = plan.apply(model)
    with pytest.raises(InputError):
        obs_update(model, pruned, [x for x, _ in data()], cuts={}, masks=plan.masks)
    with torch.no_grad():
        pruned[0].weight.mul_(2)
    with pytest.raises(RecipeError, match="was changed"):
        obs_update(model, pruned, data(), cuts={}, masks=plan.masks)


def test_whole_layers_have_no_closed_form():
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(5, 5)

        def forward(self, x):
            return x + self.inner(x).tanh()

    model = nn.Sequential(nn.Sequential(*(Block() for _ in range(3))), nn.Linear(5, 3))
    recipe = {"granularity": "layer", "target": {"count": 1}, "measure": {"latency": False}}
    for step in ({"method": "obs_update"}, {"method": "refit", "what": "bias"}):
        with pytest.raises(RecipeError, match="whole layers"):
            sc.prune(model, data=data(), recipe={**recipe, "recover": [step]})
