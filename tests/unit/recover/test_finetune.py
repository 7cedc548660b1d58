import copy

import pytest
import torch
from torch import nn

from secateur.errors import ForwardError, InputError, NonFiniteError, RecipeError, UnsupportedError
from secateur.masks import mask_model
from secateur.recover import finetune, train_step
from secateur.sources import TensorData

OPTIMIZERS = {
    "sgd": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    "adam": {"name": "adam", "lr": 0.01, "weight_decay": 0.1, "amsgrad": True},
    "adamw": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1},
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.01, weight_decay=0.1),
}


def problem(seed=0, samples=24, width=5, classes=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, width, generator=generator)
    y = torch.randint(0, classes, (samples,), generator=generator)
    return x, y


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, state):
    now = model.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[name], state[name]) for name in now)


def random_masks(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    named = model.named_parameters()
    return {name: torch.rand(value.shape, generator=generator) > 0.5 for name, value in named if value.dim() > 1}


class Keep:
    """A factory that keeps the optimizer it made, so that a test can look into its state."""

    def __init__(self, spec):
        self.spec, self.made = spec, None

    def __call__(self, parameters):
        from secateur.recover import build_optimizer

        self.made = build_optimizer(self.spec, parameters)
        return self.made


def is_positive_zero(tensor):
    return bool((tensor == 0).all()) and not bool(torch.signbit(tensor).any())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masks_are_held_bitwise_after_every_step(name):
    model, (x, y) = network(), problem()
    masks, keep = random_masks(model), Keep(OPTIMIZERS[name])
    looked_at = []

    def look(done, total):
        for parameter_name, mask in masks.items():
            parameter = model.get_parameter(parameter_name)
            assert is_positive_zero(parameter.detach()[~mask])
            for key, value in keep.made.state[parameter].items():
                if key != "step" and torch.is_tensor(value) and value.shape == parameter.shape:
                    assert not value[~mask].any()
                    looked_at.append(key)

    history = finetune(model, TensorData(x, y, batch_size=8), optimizer=keep, epochs=3, masks=masks, progress=look)
    assert history.steps == 9
    assert looked_at
    assert all(model.get_parameter(name)[mask].any() for name, mask in masks.items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masked_columns_train_like_a_layer_without_them(name):
    x, y = problem()
    kept = torch.tensor([0, 2, 3])
    wide, narrow = nn.Linear(5, 3), nn.Linear(3, 3)
    with torch.no_grad():
        narrow.weight.copy_(wide.weight[:, kept])
        narrow.bias.copy_(wide.bias)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[:, kept] = True
    options = {"optimizer": OPTIMIZERS[name], "epochs": 4, "schedule": "cosine"}
    finetune(wide, TensorData(x, y, batch_size=8), masks={"weight": mask}, **options)
    finetune(narrow, TensorData(x[:, kept], y, batch_size=8), **options)
    torch.testing.assert_close(wide.weight[:, kept], narrow.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(wide.bias, narrow.bias, rtol=1e-4, atol=1e-5)


def test_masks_hold_through_nan_free_fills_and_frozen_layers():
    model, (x, y) = network(), problem()
    model[0].weight.requires_grad_(False)
    mask = torch.rand(8, 5) > 0.5
    frozen = torch.where(mask, model[0].weight, torch.zeros(()))
    finetune(model, [(x, y)], steps=2, masks={"0.weight": mask})
    assert torch.equal(model[0].weight, frozen)
    assert is_positive_zero(model[0].weight[~mask])


def test_tied_parameters_take_both_masks():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    first, second = torch.rand(4, 4) > 0.3, torch.rand(4, 4) > 0.3
    finetune(model, [(torch.randn(6, 4), torch.randn(6, 4))], masks={"0.weight": first, "1.weight": second})
    assert is_positive_zero(model[0].weight.detach()[~(first & second)])


def test_a_scalar_parameter_can_be_masked_without_breaking_adam():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(3.0))

        def forward(self, x):
            return x * self.a + self.b

    model = Scale()
    batch = (torch.ones(4), torch.zeros(4))
    finetune(model, [batch], optimizer=OPTIMIZERS["adam"], steps=3, masks={"a": torch.tensor(False)})
    assert model.a == 0
    assert 0 < model.b < 3


@pytest.mark.parametrize(
    ("masks", "text"),
    [
        ({"nowhere": torch.ones(1, dtype=torch.bool)}, "nowhere"),
        ({"weight": torch.ones(2, 2, dtype=torch.bool)}, r"shape \(2, 2\), not \(3, 5\)"),
        ({"weight": torch.ones(3, 5)}, "not a bool tensor"),
    ],
)
def test_bad_masks_are_refused(masks, text):
    with pytest.raises(InputError, match=text):
        finetune(nn.Linear(5, 3), [problem()], masks=masks)


def test_same_seed_gives_the_same_bits_and_global_random_state_is_kept():
    x, y = problem()
    data = TensorData(x, y, batch_size=8, shuffle=True, seed=3)
    models = [network() for _ in range(3)]
    before = torch.get_rng_state()
    for model, seed in zip(models, (5, 5, 6), strict=True):
        finetune(model, data, epochs=2, seed=seed)
        torch.rand(1)
    torch.set_rng_state(before)
    finetune(network(), data, seed=9)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(models[0], state_of(models[1]))
    assert not same(models[0], state_of(models[2]))
    assert data.epoch == 0


def test_loss_goes_down_on_a_learnable_problem_and_modes_are_put_back():
    x, _ = problem(samples=64)
    y = (x[:, 0] > 0).long()
    model = network().eval()
    model[4].weight.grad = torch.ones(3, 8)
    history = finetune(model, [(x, y)], steps=150, optimizer={"name": "adam", "lr": 0.02})
    assert history.losses[-1] < 0.5 * history.losses[0]
    assert not any(module.training for module in model.modules())
    assert torch.equal(model[4].weight.grad, torch.ones(3, 8))
    assert model[0].weight.grad is None


def test_one_sgd_step_by_hand():
    model = nn.Linear(2, 1, bias=False)
    x, y = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[1.0], [0.0]])
    w = model.weight.detach().clone().double()
    gradient = (2 * (x.double() @ w.T - y) * x / 2).sum(0)
    expected = w - 0.1 * (gradient + 0.01 * w)
    finetune(model, [(x, y)], optimizer={"name": "sgd", "lr": 0.1, "weight_decay": 0.01})
    torch.testing.assert_close(model.weight.detach().double(), expected, rtol=1e-5, atol=1e-7)


def test_learning_rates_follow_warm_up_and_schedule():
    batch = problem()

    def rates(**options):
        history = finetune(nn.Linear(5, 3), [batch], optimizer={"lr": 1.0}, steps=4, **options)
        return [record.lr for record in history.records]

    assert rates() == [1, 1, 1, 1]
    assert rates(schedule="linear") == [1, 0.75, 0.5, 0.25]
    assert rates(schedule="cosine") == pytest.approx([1, 0.8535534, 0.5, 0.1464466])
    assert rates(schedule="linear", warmup_steps=2) == [0.5, 1, 1, 0.5]
    assert rates(schedule=lambda step, total: 10 * total + step) == [40, 41, 42, 43]


def test_steps_repeat_the_data_and_epochs_are_numbered():
    x, y = problem(samples=20)
    history = finetune(nn.Linear(5, 3), TensorData(x, y, batch_size=8), steps=7)
    assert [record.epoch for record in history.records] == [0, 0, 0, 1, 1, 1, 2]
    seen = []
    finetune(nn.Linear(5, 3), TensorData(x, y, batch_size=8), epochs=2, progress=lambda *pair: seen.append(pair))
    assert seen == [(step, 6) for step in range(1, 7)]


def test_generators_are_read_once_and_refused_twice():
    def stream():
        yield from [problem(seed) for seed in range(3)]

    assert finetune(nn.Linear(5, 3), stream()).steps == 3
    with pytest.raises(InputError, match="read only once"):
        finetune(nn.Linear(5, 3), stream(), epochs=2)
    model = nn.Linear(5, 3)
    before = state_of(model)
    with pytest.raises(InputError, match="read only once"):
        finetune(model, stream(), steps=5)
    assert same(model, before)


def test_data_that_is_empty_at_once_or_later():
    class Once:
        def __init__(self):
            self.stream = iter([problem()])

        def __iter__(self):
            return self.stream

    with pytest.raises(InputError, match="no batch"):
        finetune(nn.Linear(5, 3), [])
    with pytest.raises(InputError, match="pass 2 gave no batch"):
        finetune(nn.Linear(5, 3), Once(), steps=4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_loss_names_the_step_and_puts_the_model_back(value):
    model, (x, y) = network(), problem()
    before = state_of(model)
    bad = x.clone()
    bad[3, 1] = value
    with pytest.raises(NonFiniteError, match="step 2"):
        finetune(model, [(x, y), (x, y), (bad, y)], masks=random_masks(model))
    assert same(model, before)
    assert model.training


def test_weights_that_blow_up_in_the_last_step_are_noticed():
    model, batch = nn.Linear(5, 3), problem()
    before = state_of(model)
    with pytest.raises(NonFiniteError, match="after the last step"):
        finetune(model, [batch], optimizer={"lr": 1.0}, schedule=lambda step, total: float("inf"))
    assert same(model, before)


def test_an_interrupt_puts_the_model_back():
    model, batch = network(), problem()
    before = state_of(model)

    def interrupt(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(model, [batch], steps=5, progress=interrupt)
    assert same(model, before)


def test_batches_that_do_not_fit_are_named_with_their_shapes():
    model, (x, y) = network(), problem()
    before = state_of(model)
    with pytest.raises(ForwardError, match=r"step 1.*\[4, 7\]"):
        finetune(model, [(x, y), (torch.zeros(4, 7), y[:4])])
    with pytest.raises(InputError, match=r"int64\[5\]"):
        finetune(model, [(x, y[:5])])
    with pytest.raises(ForwardError, match=r"(?s)the loss failed at step 0.*no such thing.*test_finetune.py"):
        finetune(model, [(x, y)], loss=_failing_loss)
    with pytest.raises(InputError, match="no scalar"):
        finetune(model, [(x, y)], loss=lambda model, batch: model(batch[0]))
    assert same(model, before)


def _failing_loss(model, batch):
    raise KeyError("no such thing")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"steps": 1, "epochs": 1}, "both"),
        ({"steps": 0}, "steps is 0"),
        ({"epochs": -1}, "epochs is -1"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"optimizer": {"name": "adamm"}}, "did you mean 'adam"),
        ({"optimizer": {"name": "sgd", "momentun": 0.9}}, "did you mean 'momentum'"),
        ({"optimizer": {"name": "sgd", "lr": -1}}, "lr|learning rate"),
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)}, "already built"),
    ],
)
def test_wrong_options_are_recipe_errors(options, text):
    with pytest.raises(RecipeError, match=text):
        finetune(nn.Linear(5, 3), [problem()], **options)


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(UnsupportedError, match="LBFGS"):
        finetune(nn.Linear(5, 3), [problem()], optimizer=torch.optim.LBFGS)
    with pytest.raises(InputError, match="requires a gradient"):
        finetune(nn.Linear(5, 3).requires_grad_(False), [problem()])
    with pytest.raises(RecipeError, match="no length"):
        finetune(nn.Linear(5, 3), iter([problem()]), schedule="cosine")


def test_without_masks_it_is_the_plain_loop():
    x, y = problem()
    ours = nn.Linear(5, 3)
    theirs = copy.deepcopy(ours)
    finetune(ours, [(x, y)], optimizer=OPTIMIZERS["adamw"], steps=5)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(theirs(x), y).backward()
        optimizer.step()
    assert torch.equal(ours.weight, theirs.weight)


def test_the_optimizer_sees_masked_gradients():
    model, (x, y) = nn.Linear(5, 3), problem()
    mask = torch.rand(3, 5) > 0.5
    norms = []

    class Watching(torch.optim.SGD):
        def step(self, closure=None):
            norms.append((float(model.weight.grad[~mask].abs().sum()), float(model.weight.grad[mask].abs().sum())))
            return super().step(closure)

    finetune(model, [(x, y)], steps=2, masks={"weight": mask}, optimizer=lambda params: Watching(params, lr=0.1))
    assert [masked for masked, _ in norms] == [0, 0]
    assert all(kept > 0 for _, kept in norms)


class Rebinding(nn.Linear):
    """Counts its forward passes in a buffer that it replaces by a new one each time."""

    def __init__(self):
        super().__init__(5, 3)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        self.passes = self.passes + 1
        return super().forward(x)


def test_buffers_that_were_replaced_are_put_back():
    model, (x, y) = Rebinding(), problem()
    passes = model.passes
    with pytest.raises(NonFiniteError, match="step 1"):
        finetune(model, [(x, y), (x * float("nan"), y)])
    assert model.passes is passes
    assert passes == 0
    finetune(model, [(x, y)])
    assert model.passes == 1


def test_one_step_in_a_loop_of_ones_own():
    model, (x, y) = nn.Linear(5, 3), problem()
    theirs = copy.deepcopy(model)
    mask = random_masks(model)["weight"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    mask_model(model, {"weight": mask}).hold(optimizer)
    seen = []
    losses = [
        train_step(model, (x, y), optimizer=optimizer, after_backward=lambda: seen.append(model.weight.grad.clone()))
        for _ in range(3)
    ]
    finetune(
        theirs,
        [(x, y)],
        optimizer={"name": "sgd", "lr": 0.1, "momentum": 0.9},
        steps=3,
        masks={"weight": mask},
        progress=lambda done, total: losses.append(done),
    )
    assert torch.equal(model.weight, theirs.weight)
    assert len(seen) == 3
    assert all(gradient[~mask].any() for gradient in seen)  # masked places still have theirs
    assert losses[3:] == [1, 2, 3]


def test_a_step_that_cannot_be_made_moves_nothing():
    model, (x, y) = nn.Linear(5, 3), problem()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    before = state_of(model)
    with pytest.raises(NonFiniteError, match=r"(?s)the loss is nan at step 7.*the step was not made"):
        train_step(model, (x * float("nan"), y), optimizer=optimizer, step=7)
    with pytest.raises(ForwardError, match="step 2"):
        train_step(model, (x[:, :2], y), optimizer=optimizer, step=2)
    assert same(model, before)
    assert not optimizer.state
    with pytest.raises(NonFiniteError, match=r"(?s)step 0.*back at the state before"):
        finetune(model, [(x * float("nan"), y)])


def test_training_the_rest_alone_leaves_masked_weights_alone():
    model, (x, y) = network(), problem()
    masks = random_masks(model)
    frozen = {name: torch.where(masks[name], model.get_parameter(name), torch.zeros(())) for name in masks}
    finetune(model, [(x, y)], steps=2, masks=masks, optimizer=lambda p: torch.optim.SGD([p[2], p[3]], lr=0.1))
    assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())
