"""Masks in a training loop of one's own: zeros stay, and a masked layer trains like a smaller one."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.errors import InputError
from secateur.masks import mask_model

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, weight_decay=0.1, initial_accumulator_value=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.3, max_iter=5),
    "line search": lambda p: torch.optim.LBFGS(p, max_iter=5, line_search_fn="strong_wolfe"),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def batch(seed=0, width=5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(24, width, generator=generator)
    return x, torch.randint(0, 3, (24,), generator=generator)


def positive_zeros(parameter, mask):
    values = parameter.detach()[~mask]
    return bool((values == 0).all()) and not bool(torch.signbit(values).any())


def step(model, optimizer, x, y):
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_after_every_step_and_the_rest_moves(name):
    model, mask = nn.Linear(5, 3), torch.rand(3, 5) > 0.4
    mask[0, 0], mask[1, 1] = False, True
    optimizer = OPTIMIZERS[name](model.parameters())
    step(model, optimizer, *batch())  # state from a time without masks
    mask_model(model, {"weight": mask}).hold(optimizer)
    for seed in range(4):
        before = model.weight.detach().clone()
        step(model, optimizer, *batch(seed))
        assert positive_zeros(model.weight, mask)
        assert not torch.equal(model.weight.detach()[mask], before[mask])
        for key, value in optimizer.state[model.weight].items():
            if torch.is_tensor(value) and value.shape == mask.shape and key != "step_size":
                assert not value[~mask].any(), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masked_columns_train_like_a_layer_without_them(name):
    """Also after steps without masks: what an optimizer knew of the columns is gone, LBFGS starts anew."""
    kept = torch.tensor([0, 2, 3])
    wide, narrow = nn.Linear(5, 3).double(), nn.Linear(3, 3).double()
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[:, kept] = True
    optimizer = OPTIMIZERS[name](wide.parameters())
    x, y = batch()
    if "lbfgs" in name or name == "line search":
        step(wide, optimizer, x.double(), y)
    with torch.no_grad():
        narrow.weight.copy_(wide.weight[:, kept])
        narrow.bias.copy_(wide.bias)
    other = OPTIMIZERS[name](narrow.parameters())
    mask_model(wide, {"weight": mask}).hold(optimizer)
    for seed in range(4):
        x, y = batch(seed)
        step(wide, optimizer, x.double(), y)
        step(narrow, other, x[:, kept].double(), y)
    torch.testing.assert_close(wide.weight[:, kept], narrow.weight, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(wide.bias, narrow.bias, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("way", ["no closure", "closure", "keyword"])
def test_the_optimizer_sees_masked_gradients(way):
    model, mask = nn.Linear(5, 3), torch.eye(3, 5).bool()
    seen = []

    class Watching(torch.optim.SGD):
        def step(self, closure=None):
            with torch.enable_grad():
                closure() if closure else None
            seen.append((model.weight.grad[~mask].abs().sum().item(), model.weight.grad[mask].abs().sum().item()))
            return super().step()

    optimizer = Watching(model.parameters(), lr=0.1)
    mask_model(model, {"weight": mask}).hold(optimizer)

    def closure():
        optimizer.zero_grad()
        F.cross_entropy(model(batch()[0]), batch()[1]).backward()

    if way == "no closure":
        closure()
        optimizer.step()
    else:
        optimizer.step(closure=closure) if way == "keyword" else optimizer.step(closure)
    ((masked, kept),) = seen
    assert masked == 0 < kept


def test_gradients_that_add_up_over_batches():
    model, mask = nn.Linear(5, 3), torch.rand(3, 5) > 0.5
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    mask_model(model, {"weight": mask}).hold(optimizer)
    expected, bias = model.weight.detach().double().clone(), model.bias.detach().double().clone()
    gradient = torch.zeros_like(expected)
    for seed in range(3):
        x, y = batch(seed)
        F.cross_entropy(model(x), y).backward()
        probabilities = (x.double() @ expected.T + bias).softmax(1) - F.one_hot(y, 3)
        gradient += probabilities.T @ x.double() / 24
    assert model.weight.grad[~mask].any()  # untouched until the step
    optimizer.step()
    moved = expected - 0.05 * 1.9 * (gradient + 0.1 * expected)  # one step of Nesterov from rest
    torch.testing.assert_close(model.weight.detach().double(), torch.where(mask, moved, 0.0), rtol=1e-4, atol=1e-6)


def test_several_optimizers_each_hold_their_own():
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    masks = {"0.weight": torch.rand(4, 5) > 0.5, "2.weight": torch.rand(3, 4) > 0.5}
    first = OPTIMIZERS["adam"](model[0].parameters())
    second = OPTIMIZERS["sgd"](model[2].parameters())
    handle = mask_model(model, masks)
    holds = [handle.hold(first), handle.hold(second)]
    for seed in range(3):
        F.cross_entropy(model(batch(seed)[0]), batch(seed)[1]).backward()
        first.step()
        second.step()
    assert all(positive_zeros(model.get_parameter(name), mask) for name, mask in masks.items())
    holds[0].remove()
    F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    first.step()
    assert not positive_zeros(model[0].weight, masks["0.weight"])
    second.step()
    assert positive_zeros(model[2].weight, masks["2.weight"])
    assert not positive_zeros(model[0].weight, masks["0.weight"])  # another optimizer's affair


def test_parameters_that_join_later_are_held_too():
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    mask = torch.rand(4, 5) > 0.5
    optimizer = OPTIMIZERS["sgd"](model[2].parameters())
    mask_model(model, {"0.weight": mask}).hold(optimizer)
    optimizer.add_param_group({"params": model[0].parameters()})
    step(model, optimizer, *batch())
    assert positive_zeros(model[0].weight, mask)


def test_a_hold_ends_with_its_block_and_with_the_masks():
    model, mask = nn.Linear(5, 3), torch.rand(3, 5) > 0.5
    optimizer = OPTIMIZERS["adam"](model.parameters())
    handle = mask_model(model, {"weight": mask})
    with handle.hold(optimizer):
        step(model, optimizer, *batch())
        assert positive_zeros(model.weight, mask)
    step(model, optimizer, *batch())
    assert not positive_zeros(model.weight, mask)
    handle.hold(optimizer)
    handle.hold(optimizer)  # twice is once
    assert positive_zeros(model.weight, mask)
    handle.remove()
    before = model.weight.detach().clone()
    step(model, optimizer, *batch())
    assert (model.weight.detach() != before).all()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_hold_keeps_no_optimizer_alive():
    model = nn.Linear(5, 3)
    handle = mask_model(model, {"weight": torch.rand(3, 5) > 0.5})
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    handle.hold(optimizer)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    handle.update({"weight": torch.ones(3, 5).bool()})


def test_rows_of_an_embedding_with_sparse_gradients():
    model = nn.Embedding(6, 4, sparse=True)
    mask = torch.rand(6, 4) > 0.5
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.1)
    mask_model(model, {"weight": mask}).hold(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        (model(torch.tensor([1, 3, 3])) + 0.3).pow(2).sum().backward()
        optimizer.step()
        assert positive_zeros(model.weight, mask)
        assert not optimizer.state[model.weight]["exp_avg"][~mask].any()
        assert not model.weight.grad.to_dense()[~mask].any()


def test_masked_gradients_that_are_not_numbers_do_no_harm():
    model, mask = nn.Linear(5, 3), torch.rand(3, 5) > 0.5
    optimizer = OPTIMIZERS["adam"](model.parameters())
    mask_model(model, {"weight": mask}).hold(optimizer)
    F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    model.weight.grad[~mask] = float("nan")
    optimizer.step()
    assert positive_zeros(model.weight, mask)
    assert model.weight.isfinite().all()
    assert (model.weight.grad[~mask] == 0).all()


def test_gradients_are_clipped_by_the_norm_of_what_is_kept():
    model, mask = nn.Linear(5, 3, bias=False), torch.rand(3, 5) > 0.5
    handle = mask_model(model, {"weight": mask})
    F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    kept = model.weight.grad[mask].norm()
    handle.mask_gradients()
    assert torch.equal(nn.utils.clip_grad_norm_(model.parameters(), 1e9), kept)


# -- places that change sides ----------------------------------------------------------------------------------


def momentum(name, model):
    """An optimizer that has moved every weight, and goes on to move them where gradients are zero."""
    optimizer = OPTIMIZERS[name](model.parameters())
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    step(model, optimizer, *batch())
    return optimizer


def coast(model, optimizer):
    """A step without gradients: what moves is moved by what the optimizer remembers."""
    before = model.weight.detach().clone()
    model.weight.grad = torch.zeros_like(model.weight)
    model.bias.grad = torch.zeros_like(model.bias)
    optimizer.step()
    return model.weight.detach() != before


MEMORY = {"sgd": "momentum_buffer", "adam": "exp_avg", "rmsprop": "momentum_buffer"}


@pytest.mark.parametrize("name", MEMORY)
def test_a_weight_that_comes_back_is_not_moved_by_old_momentum(name):
    model, mask = nn.Linear(5, 3), torch.rand(3, 5) > 0.5
    optimizer = momentum(name, model)
    handle = mask_model(model, {"weight": torch.ones(3, 5).bool()})
    handle.hold(optimizer)
    assert coast(model, optimizer).all()
    handle.update({"weight": mask})
    kind = MEMORY[name]
    assert not optimizer.state[model.weight][kind][~mask].any()  # at once, not after the next step
    assert optimizer.state[model.weight][kind][mask].all()
    handle.update({"weight": torch.ones(3, 5).bool()})
    moved = coast(model, optimizer)
    assert moved[mask].all()
    assert not moved[~mask].any()


@pytest.mark.parametrize("after_a_step", [False, True])
@pytest.mark.parametrize("name", MEMORY)
def test_momentum_that_was_loaded_under_the_masks_moves_nothing(name, after_a_step):
    model, mask = nn.Linear(5, 3), torch.rand(3, 5) > 0.5
    optimizer = momentum(name, model)
    saved = copy.deepcopy(optimizer.state_dict())
    handle = mask_model(model, {"weight": mask})
    handle.hold(optimizer)
    optimizer.load_state_dict(saved)
    if after_a_step:
        assert not coast(model, optimizer)[~mask].any()
        handle.remove()
    else:
        handle.update({"weight": torch.ones(3, 5).bool()})
    moved = coast(model, optimizer)
    assert moved[mask].all()
    assert not moved[~mask].any()


def test_momentum_from_before_the_hold_is_gone_at_once():
    model, mask = nn.Linear(5, 3), torch.rand(3, 5) > 0.5
    optimizer = momentum("sgd", model)
    handle = mask_model(model, {"weight": mask})
    handle.hold(optimizer).remove()
    assert not coast(model, optimizer)[~mask].any()


def test_counters_and_step_sizes_are_no_memory():
    """Of a scalar parameter they have the parameter's shape; zero would break the optimizer."""
    model = nn.ParameterDict({"a": nn.Parameter(torch.tensor(2.0)), "b": nn.Parameter(torch.tensor(3.0))})
    for build in (OPTIMIZERS["adam"], OPTIMIZERS["nadam"], OPTIMIZERS["rprop"], OPTIMIZERS["asgd"]):
        optimizer = build(model.parameters())
        with torch.no_grad():
            model["a"].fill_(2.0)
        handle = mask_model(model, {"a": torch.tensor(False)})
        handle.hold(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            (model["a"] + model["b"]).pow(2).backward()
            optimizer.step()
        assert model["a"] == 0
        one, other = optimizer.state[model["a"]], optimizer.state[model["b"]]
        assert all(one[key] == other[key] for key in ("step", "mu_product", "eta", "mu") if key in other)
        assert one.get("step_size", 1) != 0
        handle.remove()


# -- what is refused -------------------------------------------------------------------------------------------


def test_the_optimizer_of_another_model_is_refused():
    model, other = nn.Linear(5, 3), nn.Linear(5, 3)
    handle = mask_model(model, {"weight": torch.rand(3, 5) > 0.5})
    with pytest.raises(InputError, match="no parameter of the masked model"):
        handle.hold(OPTIMIZERS["sgd"](other.parameters()))
    handle.hold(OPTIMIZERS["sgd"]([model.bias]))


def test_masks_of_what_is_no_longer_there_are_not_held_in_silence():
    model, mask = nn.Linear(5, 3), torch.rand(3, 5) > 0.5
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    handle = mask_model(model, {"weight": mask})
    handle.hold(optimizer)
    own = model.weight
    model.weight = nn.Parameter(torch.rand(3, 5))
    with pytest.raises(InputError, match="'weight' is not the parameter that was masked"):
        step(model, optimizer, *batch())
    model.weight = own
    own.data = torch.rand(2, 5)
    with pytest.raises(InputError, match=r"shape \(3, 5\), not \(2, 5\)"):
        handle.enforce()
    own.data = torch.rand(3, 5)
    mask[0] = True
    with pytest.raises(InputError, match="was written to"):
        handle.enforce()


def test_removed_masks_are_not_used_again():
    model = nn.Linear(5, 3)
    handle = mask_model(model, {"weight": torch.rand(3, 5) > 0.5})
    handle.remove()
    for use in (handle.enforce, lambda: handle.update({}), lambda: handle.hold(OPTIMIZERS["sgd"](model.parameters()))):
        with pytest.raises(InputError, match="were removed"):
            use()
