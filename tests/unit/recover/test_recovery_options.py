"""What a fine-tuning can be asked for: each option against an independent truth, and refused where it means nothing."""

import copy
import inspect
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, RandomSampler, TensorDataset, WeightedRandomSampler

import secateur as sc
from secateur.errors import InputError, RecipeError, UnsupportedError
from secateur.recover import AdapterSpec, Distil, finetune, taught
from secateur.recover.optimizers import optimizers
from secateur.recover.rates import schedulers
from secateur.recover.validation import divided
from secateur.sources import TensorData

LOSSLESS = {"atol": 0, "rtol": 0}


def problem(seed=0, samples=24, width=5, classes=3):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(samples, width, generator=g), torch.randint(0, classes, (samples,), generator=g)


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


def masks_of(model, seed=1):
    g = torch.Generator().manual_seed(seed)
    return {n: torch.rand(p.shape, generator=g) > 0.5 for n, p in model.named_parameters() if p.dim() > 1}


def assert_zeros(model, masks):
    for name, mask in masks.items():
        value = model.get_parameter(name).detach()[~mask]
        assert not value.any()
        assert not torch.signbit(value).any()


@pytest.mark.sampled(3)
# Muon takes matrices only; LBFGS is refused.
@pytest.mark.parametrize("name", sorted(set(optimizers()) - {"lbfgs", "muon"}))
def test_every_optimizer_of_torch_trains_by_name_with_masks_exact(name):
    model, (x, y) = network(), problem()
    masks, before = masks_of(model), copy.deepcopy(network().state_dict())
    finetune(model, [(x, y)], optimizer={"name": name, "lr": 0.01}, steps=30, masks=masks)
    assert_zeros(model, masks)
    assert all(not torch.equal(model.get_parameter(n)[m], before[n][m]) for n, m in masks.items())


@pytest.mark.sampled(4)
@pytest.mark.parametrize("more", [{}, {"amp": "bf16"}, {"accumulate": 2}, {"best": True}, {"adapters": AdapterSpec(2)}])
@pytest.mark.parametrize(
    "optimizer", [{"name": "sgd", "lr": 0.05, "momentum": 0.9}, {"name": "adamw", "lr": 0.01, "weight_decay": 0.1}]
)
def test_after_200_steps_every_masked_weight_is_plus_zero(optimizer, more):
    model, (x, y) = network(), problem()
    masks = masks_of(model)
    validation = [(x, y)] if more.get("best") else None
    history = finetune(
        model,
        TensorData(x, y, batch_size=12),
        steps=200,
        optimizer=optimizer,
        masks=masks,
        validation=validation,
        **more,
    )
    assert history.steps == 200
    assert_zeros(model, masks)


OPTIONS = {
    "steplr": {"step_size": 2}, "multisteplr": {"milestones": [2, 4]}, "exponentiallr": {"gamma": 0.9},
    "cosineannealingwarmrestarts": {"T_0": 3}, "cycliclr": {"base_lr": 0.01, "max_lr": 0.1},
    "onecyclelr": {"max_lr": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(schedulers()) - {"reducelronplateau"}))
def test_every_scheduler_of_torch_gives_the_rates_that_it_gives_by_hand(name):
    kind, options = schedulers()[name], OPTIONS.get(name, {})
    lengths = {key: 6 for key in ("total_steps", "T_max", "total_iters") if key in inspect.signature(kind).parameters}
    optimizer = torch.optim.SGD(network().parameters(), lr=0.1, momentum=0.9)
    by_hand, rates = kind(optimizer, **{**lengths, **options}), []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        by_hand.step()
    sgd = {"name": "sgd", "lr": 0.1, "momentum": 0.9}
    history = finetune(network(), [problem()], optimizer=sgd, steps=6, schedule={"name": kind.__name__, **options})
    assert [record.lr for record in history.records] == rates


def test_a_scheduler_per_epoch_and_one_that_asks_for_a_figure():
    x, y = problem()
    data = TensorData(x, y, batch_size=8)
    step = {"name": "StepLR", "step_size": 1, "gamma": 0.1, "per": "epoch"}
    history = finetune(network(), data, optimizer={"lr": 1.0}, epochs=3, schedule=step)
    assert [r.lr for r in history.records] == pytest.approx([1] * 3 + [0.1] * 3 + [0.01] * 3)
    plateau = {"name": "ReduceLROnPlateau", "patience": 0, "factor": 0.1}
    # Never better than at first, since nothing moves: the rate falls after every pass but the first.
    history = finetune(network(), data, optimizer={"lr": 1e-30}, epochs=4, schedule=plateau, validation=[(x, y)])
    assert [r.lr for r in history.records][::3] == pytest.approx([1e-30] * 2 + [1e-30] * 2, rel=1)
    with pytest.raises(RecipeError, match="figure"):
        finetune(network(), data, schedule=plateau)


def test_rewound_rates_are_the_last_ones_of_the_whole_training():
    x, y = problem()
    data = TensorData(x, y, batch_size=8)

    def rates(**options):
        return [r.lr for r in finetune(network(), data, optimizer={"lr": 1.0}, **options).records]

    for schedule in (
        "cosine",
        {"name": "PolynomialLR", "power": 2.0},
        {"name": "StepLR", "step_size": 2, "per": "epoch"},
    ):
        whole = rates(epochs=6, schedule=schedule)
        assert rates(epochs=2, last_of=6, schedule=schedule) == pytest.approx(whole[-6:])
    assert rates(steps=4, last_of=18, schedule="linear") == pytest.approx(rates(steps=18, schedule="linear")[-4:])
    warm = rates(epochs=6, schedule="linear", warmup_steps=15)
    assert rates(epochs=2, last_of=6, schedule="linear", warmup_steps=15) == pytest.approx(warm[-6:])


def test_accumulated_batches_are_one_large_batch():
    x, y = problem()
    ours, theirs = network(), network()
    sgd = {"name": "sgd", "lr": 0.1, "momentum": 0.9}
    history = finetune(ours, TensorData(x, y, batch_size=6), optimizer=sgd, accumulate=4, epochs=3)
    finetune(theirs, [(x, y)], optimizer=sgd, epochs=3)
    assert history.steps == 3
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    # What is left at the end of a pass is a step of its own, with the mean over what it has.
    ours, theirs = network(), network()
    finetune(ours, TensorData(x[:18], y[:18], batch_size=6), optimizer=sgd, accumulate=2)
    finetune(theirs, [(x[:12], y[:12]), (x[12:18], y[12:18])], optimizer=sgd)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_mixed_precision_runs_the_forward_in_bfloat16_and_keeps_the_weights_in_float32():
    model, seen = network(), set()
    model[0].register_forward_hook(lambda _m, _i, output: seen.add(output.dtype))
    masks = masks_of(model)
    finetune(model, [problem()], steps=5, amp="bf16", masks=masks)
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert_zeros(model, masks)


def test_the_best_pass_is_kept_and_patience_stops():
    (x, noise), (held_x, _) = problem(), problem(1)
    y = torch.where(torch.arange(24) % 3 == 0, noise, x[:, :3].argmax(1))  # a third of the labels are noise
    held = held_x, held_x[:, :3].argmax(1)

    def loss_of(model):
        model.eval()
        return functional.cross_entropy(model(held[0]), held[1]).item()

    losses = []
    for epochs in range(1, 9):
        model = network()
        finetune(model, [(x, y)], optimizer={"name": "adam", "lr": 0.2}, epochs=epochs)
        losses.append(loss_of(model))
    model = network()
    options = {"optimizer": {"name": "adam", "lr": 0.2}, "validation": [held], "best": True}
    history = finetune(model, [(x, y)], epochs=8, **options)
    assert history.validation == pytest.approx(losses)
    lowest = losses.index(min(losses))
    assert 0 < lowest < 6, "the problem over-fits, else the test shows nothing"
    assert history.best == lowest
    assert loss_of(model) == pytest.approx(min(losses))
    short = finetune(network(), [(x, y)], epochs=8, patience=2, **options)
    first = next(i for i in range(2, 8) if min(losses[: i - 1]) <= min(losses[i - 1 : i + 1]))
    assert len(short.validation) == first + 1


def test_the_teacher_is_what_hinton_wrote():
    student, teacher, (x, y) = network(0), network(1), problem()
    before = copy.deepcopy(teacher.state_dict())
    spec = Distil(temperature=3.0, weight=0.7, hidden=["0"], hidden_weight=0.2)
    by_hand = copy.deepcopy(student)
    with torch.no_grad():
        wanted, states = teacher(x), teacher[0](x)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.5)
    for _ in range(3):
        p, q = functional.softmax(wanted / 3, 1), functional.softmax(by_hand(x) / 3, 1)
        loss = 0.3 * functional.cross_entropy(by_hand(x), y) + 0.7 * 9 * (p * (p / q).log()).sum(1).mean()
        loss = loss + 0.2 * ((by_hand[0](x) - states) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    finetune(student, [(x, y)], steps=3, optimizer={"name": "sgd", "lr": 0.5}, teacher=teacher, distil=spec)
    for a, b in zip(student.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("hidden", [(), ("0",)])
def test_a_loop_of_ones_own_is_taught_what_finetune_is(hidden):
    teacher, (x, y), spec = network(1), problem(), Distil(temperature=3.0, weight=0.7, hidden=hidden)
    own, ours = network(0), network(0)
    loss = taught(None, teacher, spec, own)
    optimizer = torch.optim.SGD(own.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        loss(own, (x, y)).backward()
        optimizer.step()
    finetune(ours, [(x, y)], steps=3, optimizer={"name": "sgd", "lr": 0.5}, teacher=teacher, distil=spec)
    for a, b in zip(own.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert all(p.grad is None for p in teacher.parameters())


def test_a_teacher_needs_no_labels_and_tells_a_regression_too():
    student, teacher, (x, _) = network(0), network(1), problem()
    for spec in (Distil(weight=1.0), Distil(weight=1.0, form="mse")):
        history = finetune(student, [x], steps=60, optimizer={"name": "adam", "lr": 0.02}, teacher=teacher, distil=spec)
        assert history.losses[-1] < 0.2 * history.losses[0]
    model = nn.Linear(5, 1)
    with pytest.raises(InputError, match="form: mse"):
        finetune(model, [(x, torch.zeros(24, 1))], teacher=copy.deepcopy(model), distil=Distil())


def test_hidden_states_of_a_cut_layer_are_compared_with_the_kept_ones_of_the_teacher():
    model, (x, y) = network(), problem()
    plan = sc.plan(model, x, remove={"0": [1, 4, 6]})
    cut = plan.apply(model)
    spec = Distil(weight=0.0, hidden=["0"])
    history = finetune(
        cut, [(x, y)], lambda m, b: 0 * m(b[0]).sum(), teacher=model, distil=spec, cuts=plan.cuts, steps=1
    )
    # The kept outputs are those of the teacher; a product of another width may add up in another order.
    assert history.losses == pytest.approx((0.0,), abs=1e-12)
    with torch.no_grad():
        first = model[0](x)[:, : cut[0].out_features]
        assert nn.functional.mse_loss(cut[0](x), first) > 1e-3, "other outputs than the kept ones are not alike"
    with pytest.raises(RecipeError, match="not cut"):
        finetune(cut, [(x, y)], teacher=model, distil=Distil(hidden=["1"]), cuts=plan.cuts, steps=1)


@pytest.mark.parametrize("masked", [False, True])
def test_adapters_are_low_rank_changes_that_keep_every_zero(masked):
    model, (x, y) = network(), problem()
    masks = masks_of(model) if masked else {}
    history = finetune(
        model, [(x, y)], steps=80, optimizer={"name": "adam", "lr": 0.02}, masks=masks, adapters=AdapterSpec(rank=2)
    )
    assert history.losses[-1] < 0.8 * history.losses[0]
    assert_zeros(model, masks)
    for name, value in network().state_dict().items():
        change = model.get_parameter(name).detach() - value
        if name.endswith("bias"):
            assert not change.any()
        elif not masked:
            assert torch.linalg.matrix_rank(change, rtol=1e-4) <= 2
            assert change.any()
    assert all(p.requires_grad for p in model.parameters())


def test_adapters_have_the_gradients_of_autograd():
    """Against the same adapters written as a product in the forward."""
    from secateur.recover.adapters import Adapters

    layer, mask = nn.Linear(5, 3), torch.rand(3, 5) > 0.5
    with torch.no_grad():
        layer.weight.mul_(mask)
    found = Adapters(layer, AdapterSpec(rank=2, scale=1.5), {"weight": mask})
    a, b = found.parameters
    with torch.no_grad():
        b.normal_()
    first = layer.weight.detach().clone()
    found.write()
    x = torch.randn(7, 5)
    layer(x).square().sum().backward()
    found.take_gradients()
    ours = a.grad.clone(), b.grad.clone()
    a.grad = b.grad = None
    functional.linear(x, first + mask * (1.5 * (b @ a)), layer.bias.detach()).square().sum().backward()
    torch.testing.assert_close(ours[0], a.grad)
    torch.testing.assert_close(ours[1], b.grad)


REFUSED = {
    "twice nothing": ({"teacher": network(), "distil": None}, RecipeError, "belong together"),
    "best of training data": ({"best": True}, RecipeError, "nothing trains on"),
    "patience of nothing": ({"patience": 2}, RecipeError, "nothing trains on"),
    "accumulate": ({"accumulate": 0}, RecipeError, "at least 1"),
    "amp": ({"amp": "fp8"}, RecipeError, "bf16"),
    "longer than the whole": ({"epochs": 4, "last_of": 2, "schedule": "cosine"}, RecipeError, "at least 4"),
    "rewound constant": ({"epochs": 1, "last_of": 2}, RecipeError, "same everywhere"),
    "warm-up of torch's": ({"schedule": {"name": "StepLR", "step_size": 1}, "warmup_steps": 2}, RecipeError, "warmup"),
    "no data": ({"schedule": {"name": "LambdaLR"}}, RecipeError, "unknown schedule"),
    "no option": ({"schedule": {"name": "StepLR", "size": 1}}, RecipeError, "no option 'size'"),
    "needed option": ({"schedule": {"name": "StepLR"}}, RecipeError, "step_size"),
    "optimizer": ({"optimizer": {"name": "RMSpro"}}, RecipeError, "did you mean 'RMSprop"),
    "closure": ({"optimizer": {"name": "LBFGS"}}, UnsupportedError, "several times"),
    "rank": ({"adapters": AdapterSpec(rank=4)}, RecipeError, "larger than"),
    "targets": ({"adapters": AdapterSpec(rank=1, targets=["nothing.*"])}, RecipeError, "names no weight"),
    "hidden": ({"teacher": network(), "distil": Distil(hidden=["9"])}, RecipeError, "names no module"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_and_the_model_stays(name):
    options, error, words = REFUSED[name]
    model = network()
    with pytest.raises(error, match=words):
        finetune(model, [problem()], **options)
    assert all(torch.equal(value, network().state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "make",
    [lambda: Distil(temperature=0), lambda: Distil(weight=0), lambda: AdapterSpec(rank=0), lambda: Distil(form="x")],
)
def test_numbers_out_of_range_are_refused(make):
    with pytest.raises(RecipeError):
        make()


STEPS = {
    "holdout for nothing": ({"holdout": 0.1}, "none of them is set"),
    "best without holdout": ({"best": True}, "need holdout"),
    "rewound constant": ({"last_of": 3}, "same everywhere"),
    "teaches nothing": ({"distil": {"weight": 0.0}}, "teaches nothing"),
    "unknown optimizer": ({"optimizer": {"name": "rmsprob"}}, "did you mean"),
    "unknown option": ({"optimizer": {"name": "RMSprop", "options": {"alfa": 0.9}}}, "did you mean 'alpha'"),
    "option twice": ({"optimizer": {"name": "adam", "options": {"lr": 0.9}}}, "beside name"),
    "unknown schedule": ({"schedule": "cosin"}, "did you mean 'cosine'"),
    "held out of a loader": ({"holdout": 0.5, "best": True}, "cannot divide"),
}


def samples(**options):
    x, y = problem()
    return DataLoader(TensorDataset(x, y), batch_size=options.pop("batch_size", 8), **options)


def rows(data):
    return sorted(tuple(row.tolist()) for batch in data for row in batch[0])


LOADERS = {
    "in order": lambda: samples(),
    "shuffled": lambda: samples(shuffle=True),
    "of a generator": lambda: samples(shuffle=True, generator=torch.Generator().manual_seed(4), drop_last=True),
    "a generator of the sampler": lambda: samples(
        sampler=RandomSampler(range(24), generator=torch.Generator().manual_seed(4))
    ),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_a_loader_is_divided_by_its_samples(kind):
    loader = LOADERS[kind]()
    train, held = divided(loader, 0.33)
    assert len(held.dataset) == 8
    assert not set(rows(train)) & set(rows(held))
    assert sorted(rows(train) + rows(held)) == sorted(tuple(row.tolist()) for row in problem()[0])
    orders = [[tuple(row.tolist()) for batch in train for row in batch[0]] for _ in range(2)]
    assert (orders[0] == orders[1]) == (kind == "in order")
    assert [x[0].tolist() for x in held] == [x[0].tolist() for x in held]
    if "generator" in kind:
        one, two = ([b[0].tolist() for b in divided(LOADERS[kind](), 0.33)[0]] for _ in range(2))
        assert one == two, "the order is that of the generator"
    step = {"method": "finetune", "epochs": 3, "holdout": 0.33, "best": True, "patience": 2}
    recipe = {"granularity": "element", "target": {"sparsity": 0.5}, "measure": {"latency": False}}
    result = sc.prune(network(), data=loader, recipe=recipe, recover=[step], test=[problem()])
    assert len(result.report.training) in (4, 6)  # two batches a pass; patience may end it


def test_what_is_judged_by_is_whole_and_spread_evenly_and_batches_are_made_as_before():
    def doubled(rows):
        return tuple(2 * torch.stack(part) for part in zip(*rows, strict=True))

    numbers = torch.arange(24.0).view(-1, 1)
    loader = DataLoader(TensorDataset(numbers, numbers), batch_size=8, drop_last=True, collate_fn=doubled)
    train, held = divided(loader, 0.25)
    found = [[row[0] / 2 for row in rows(part)] for part in (train, held)]
    # Six of 24 make no whole batch of eight; samples that are sorted must not all come from one end.
    assert len(found[1]) == 6
    assert {b - a for a, b in itertools.pairwise(found[1])} == {4}
    assert len(found[0]) == 16, "training goes on without its last, smaller batch"


class OwnLoader(DataLoader):
    pass


UNDIVIDED = {
    "own batches": lambda: samples(batch_size=1, batch_sampler=[[0, 1], [2, 3]]),
    "with replacement": lambda: samples(sampler=RandomSampler(range(24), replacement=True)),
    "a part of them": lambda: samples(sampler=RandomSampler(range(24), num_samples=12)),
    "a loader of another class": lambda: OwnLoader(TensorDataset(*problem()), batch_size=8),
    "weighted": lambda: samples(sampler=WeightedRandomSampler([1.0] * 24, 24)),
    "one sample": lambda: DataLoader(TensorDataset(*(part[:1] for part in problem()))),
}


@pytest.mark.parametrize("kind", UNDIVIDED)
def test_a_loader_of_which_nobody_knows_what_it_reads_is_refused(kind):
    with pytest.raises(RecipeError, match="cannot divide"):
        divided(UNDIVIDED[kind](), 0.5)


@pytest.mark.parametrize("name", STEPS)
def test_a_recipe_is_refused_before_anything_long_starts(name):
    step, words = STEPS[name]
    x, y = problem()
    loader = DataLoader(TensorDataset(x, y), batch_size=8, sampler=WeightedRandomSampler([1.0] * len(x), len(x)))
    recover = [{"method": "finetune", "epochs": 1, **step}]
    with pytest.raises(RecipeError, match=words):
        sc.prune(network(), data=loader, recipe={"target": {"params": 0.7}}, recover=recover)


def test_every_option_by_recipe_keyword_and_set():
    x, y = problem(samples=60)
    data = TensorData(x, y, batch_size=8, shuffle=True)
    step = {
        "method": "finetune", "epochs": 2, "last_of": 8, "schedule": "cosine", "accumulate": 2, "amp": "bf16",
        "optimizer": {"name": "RMSprop", "lr": 0.001, "options": {"alpha": 0.9}}, "holdout": 0.2, "best": True,
        "patience": 3, "distil": {"temperature": 4.0, "hidden": ["0"]},
    }  # fmt: skip
    masks = {"target": {"sparsity": 0.5}, "granularity": "element", "measure": {"latency": False}}
    by_recipe = sc.prune(network(), data=data, recipe={**masks, "recover": [step]})
    by_keyword = sc.prune(network(), data=data, recipe=masks, recover=step)
    sets = [f"recover.0.{key}={value}" for key, value in step.items()]
    by_set = sc.prune(
        network(), data=data, recipe=masks, overrides=[s.replace("'", '"').replace("True", "true") for s in sets]
    )
    models = [one.model.state_dict() for one in (by_recipe, by_keyword, by_set)]
    for other in models[1:]:
        assert all(torch.equal(value, other[name]) for name, value in models[0].items())
    assert by_recipe.report.training
    assert_zeros(by_recipe.model, by_recipe.plan.masks)
    named = sc.prune(
        network(), data=data, recipe={"target": {"params": 0.7}, "measure": {"latency": False}}, recover="refit"
    )
    assert [one["stage"] for one in named.log].count("recover 1: refit") == 1


@pytest.mark.parametrize("conv", [False, True])
def test_least_squares_of_masked_rows_is_that_of_lstsq_and_zeros_stay(conv):
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 1) if conv else nn.Linear(3, 4)
    x = torch.randn(200, 3, 1, 1) if conv else torch.randn(200, 3)
    model = nn.Sequential(layer, nn.Flatten())
    with torch.no_grad():
        x[:, 1] += 0.9 * x[:, 0]  # dependent inputs, so that what stays can stand in
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 0], [0, 0, 0]]).bool().view_as(layer.weight)
    goal = model(x).detach().double()
    options = {"granularity": "element", "target": {"sparsity": 0.5}, "measure": {"latency": False}}
    from secateur.solve.refit import refit_consumers

    pruned = sc.plan(model, masks={"0.weight": mask}).apply(model)
    refit_consumers(model, pruned, [x], cuts={}, masks={"0.weight": mask}, ridge=0.0)
    assert_zeros(pruned, {"0.weight": mask})
    flat, rows = x.flatten(1).double(), mask.flatten(1)
    for row in range(3):
        inputs = torch.cat([flat[:, rows[row]], torch.ones(200, 1).double()], 1)
        best = torch.linalg.lstsq(inputs, goal[:, row : row + 1]).solution[:, 0]
        found = pruned[0].weight.detach().flatten(1)[row][rows[row]]
        torch.testing.assert_close(found.double(), best[:-1], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(pruned[0].bias[row].detach().double(), best[-1], atol=1e-5, rtol=1e-4)
    by_recipe = sc.prune(model, data=[x], recipe=options, recover={"method": "refit"})
    assert_zeros(by_recipe.model, by_recipe.plan.masks)


@pytest.mark.parametrize("kind", ["mask", "cut"])
def test_bias_compensation_gives_every_output_its_mean_back(kind):
    model, (x, _) = network(), problem()
    x = x + 2
    masked = {"granularity": "element", "target": {"sparsity": 0.5}}
    recipe = {**(masked if kind == "mask" else {"target": {"count": 4}, "round_to": 1}), "measure": {"latency": False}}
    plain = sc.prune(model, data=[x], recipe=recipe, recover=[])
    shifted = sc.prune(model, data=[x], recipe=recipe, recover={"method": "refit", "what": "bias"})
    wanted = model(x).mean(0)
    assert not torch.allclose(plain.model(x).mean(0), wanted, atol=1e-3)
    torch.testing.assert_close(shifted.model(x).mean(0), wanted, atol=1e-5, rtol=1e-4)
    for name, value in plain.model.named_parameters():
        assert name.endswith("bias") or torch.equal(value, shifted.model.get_parameter(name))
    bare = nn.Sequential(nn.Linear(5, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))
    with pytest.raises(RecipeError, match="no bias"):
        sc.prune(bare, data=[x], recipe=recipe, recover={"method": "refit", "what": "bias"})
