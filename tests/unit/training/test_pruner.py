"""Gradual pruning inside a loop of one's own: exact amounts, zeros that stay, shapes and state that follow."""

from __future__ import annotations

import copy
import io
from itertools import pairwise

import pytest
import torch
from pattern_problem import Net, patterns
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import secateur as sc
from secateur.errors import InputError, RecipeError, UnsupportedError
from secateur.request import Target
from secateur.training import MovementPruner, Pruner
from secateur.training.course import Course
from secateur.training.schedules import schedule_of

X, Y = patterns(64, 1)
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def train(model, optimizer, pruner, steps, *, batches=1, autocast=False, scaler=None, ema=None):
    for step in range(steps):
        for part in range(batches):
            at = (step * batches + part) * 16 % 64
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = F.cross_entropy(model(X[at : at + 16]), Y[at : at + 16]) / batches
            (scaler.scale(loss) if scaler else loss).backward()
            if part + 1 < batches:
                assert pruner.step() is False  # no step of the optimizer, so nothing to count
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        if ema is not None:
            ema.update_parameters(model)
        optimizer.zero_grad()
        pruner.step()


def exact_zeros(tensor, mask):
    values = tensor.detach()[~mask]
    return not values.any() and not torch.signbit(values).any()


LOOPS = {
    "plain": {},
    "bf16 and scaled": {"autocast": True, "scaler": True},
    "accumulated": {"batches": 3},
    "averaged": {"ema": True},
    "all at once": {"autocast": True, "scaler": True, "batches": 2, "ema": True},
}


def small():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4))


FAST = {("sgd", "plain"), ("sgd", "bf16 and scaled"), ("adamw", "all at once")}
PAIRS = [
    pytest.param(optimizer, loop, marks=() if (optimizer, loop) in FAST else pytest.mark.slow)
    for optimizer in OPTIMIZERS
    for loop in LOOPS
]


def loop_of(name, model):
    """Options of `train`, with objects of their own."""
    options = dict(LOOPS[name])
    if "ema" in options:
        options["ema"] = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    if "scaler" in options:
        options["scaler"] = torch.amp.GradScaler("cpu", init_scale=128.0)
    return options


@pytest.mark.parametrize(("optimizer", "loop"), PAIRS)
def test_the_amount_is_exact_and_the_zeros_stay_for_200_steps(optimizer, loop):
    model = small()
    options = loop_of(loop, model)
    moving = OPTIMIZERS[optimizer](model.parameters())
    pruner = Pruner(model, sparsity=0.9, end=20, every=3, optimizer=moving, ema=options.get("ema"))
    train(model, moving, pruner, 20, **options)
    masks = {name: mask.clone() for name, mask in pruner.masks.items()}
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int((~mask).sum()) for mask in masks.values()) == int(0.9 * total + 0.5)
    train(model, moving, pruner, 200, **options)
    for name, mask in masks.items():
        assert torch.equal(pruner.masks[name], mask)
        assert exact_zeros(model.get_parameter(name), mask)
        if "ema" in options:
            assert exact_zeros(options["ema"].module.get_parameter(name), mask)
    assert pruner.finish() is model
    assert pruner.done == 220
    assert sum(int((model.get_parameter(n) == 0).sum()) for n in masks) == int(0.9 * total + 0.5)


UNITS = {
    "2:4": {"granularity": "2:4"},
    "block": {"granularity": {"name": "block", "shape": [4, 4]}, "sparsity": 0.7},
    "row": {"granularity": {"name": "vector", "axis": "row"}, "sparsity": 0.5},
    "rigl": {"sparsity": 0.9, "regrow": "rigl"},
    "set": {"sparsity": 0.9, "regrow": "set"},
    "movement": {"kind": MovementPruner, "sparsity": 0.9, "freeze": "masks"},
    "soft movement": {"kind": MovementPruner, "sparsity": 0.9, "form": "soft", "threshold": 0.5},
}


HELD = [(units, optimizer) for units in UNITS for optimizer in OPTIMIZERS]
QUICK = {("2:4", "adamw"), ("movement", "sgd")}


@pytest.mark.parametrize(
    ("units", "optimizer"), [pytest.param(*one, marks=() if one in QUICK else pytest.mark.slow) for one in HELD]
)
def test_the_zeros_of_all_units_stay_for_200_steps_behind_the_end(units, optimizer):
    """In a loop that has everything at once; `finish` lets the loop go, and the masks stay held."""
    settings = dict(UNITS[units])
    model, kind = small(), settings.pop("kind", Pruner)
    options = loop_of("all at once", model)
    moving = OPTIMIZERS[optimizer](model.parameters())
    pruner = kind(model, end=6, every=3, optimizer=moving, ema=options["ema"], **settings)
    train(model, moving, pruner, 8, **options)
    pruner.finish()
    masks = {name: mask.clone() for name, mask in pruner.masks.items()}
    before = {name: model.get_parameter(name).detach().clone() for name in masks}
    assert sum(int((~mask).sum()) for mask in masks.values()) > 200
    train(model, moving, pruner, 200, **options)
    for name, mask in masks.items():
        assert torch.equal(pruner.masks[name], mask)
        assert exact_zeros(model.get_parameter(name), mask)
        assert exact_zeros(options["ema"].module.get_parameter(name), mask)
        assert not torch.equal(model.get_parameter(name)[mask], before[name][mask]), "the rest is trained"


@pytest.mark.parametrize("kind", [Pruner, MovementPruner])
def test_weights_that_an_untold_optimizer_moves_are_zero_after_every_step(kind):
    model = small()
    told = torch.optim.SGD(model[1].parameters(), lr=0.1, momentum=0.9)
    untold = torch.optim.SGD(model[4].parameters(), lr=0.1, momentum=0.9)
    averages = {name: p.detach().clone() for name, p in model.named_parameters()}
    pruner = kind(model, sparsity=0.8, end=4, every=4, optimizer=told, ema=averages)
    for _ in range(20):
        F.cross_entropy(model(X), Y).backward()
        told.step()
        untold.step()
        for name, p in model.named_parameters():
            averages[name].lerp_(p.detach(), 0.5)
        pruner.step()
        for name, mask in pruner.masks.items():
            assert exact_zeros(model.get_parameter(name), mask), name
            assert exact_zeros(averages[name], mask), name
    assert not pruner.masks["4.weight"].all()


def walk(pruner, steps):
    """Gone at every step of a loop in which nothing else happens."""
    seen = []
    for _ in range(steps):
        pruner.step()
        seen.append(pruner.sparsity)
    return seen


MASKED = {
    "element": {"granularity": "element"},
    "vector": {"granularity": {"name": "vector", "axis": "row"}},
    "block": {"granularity": {"name": "block", "shape": [2, 2]}},
    "kernel": {"granularity": "kernel"},
    "local": {"scope": "local"},
    "erk": {"allocation": "erk"},
    "lamp": {"allocation": "lamp"},
    "random": {"criterion": "random"},
    "signed": {"criterion": {"name": "movement", "steps": 2}, "data": [(X, Y)]},
    "data": {"criterion": "taylor", "data": [(X, Y)]},
}


@pytest.mark.parametrize("kind", MASKED)
def test_every_update_has_the_amount_of_the_schedule_and_nothing_comes_back(kind):
    options = MASKED[kind]
    pruner = Pruner(Net(), sparsity=0.6, begin=1, end=9, every=2, **options)
    units = pruner._removal.whole("count")
    before = {}
    for step in range(1, 11):
        pruner.step()
        gone, _ = pruner._removal.removed()
        slack = 0 if options.get("scope", "global") == "global" else 3  # every group rounds for itself
        held = max(at for at in (1, 3, 5, 7, 9) if at <= step)
        assert abs(gone - int(pruner.schedule.at(held) * units + 0.5)) <= slack
        for name, mask in before.items():
            assert not (pruner._removal.keep[name] & ~mask).any()
        before = {name: mask.clone() for name, mask in pruner._removal.keep.items()}
    assert pruner.schedule.at(9) == 0.6


def test_the_last_masks_are_those_of_select():
    model = Net()
    scores = sc.score(model)
    pruner = Pruner(model, sparsity=0.73, end=7)
    walk(pruner, 7)  # nothing is trained, so that one shot and seven give the same
    wanted = sc.select(scores, sparsity=0.73, min_keep=1)
    assert all(torch.equal(pruner.masks[name], mask) for name, mask in wanted.items())


def test_a_pattern_is_walked_to():
    model = Net()
    pruner = Pruner(model, granularity="2:4", end=6, schedule="linear")
    seen = walk(pruner, 6)
    assert all(later > earlier for earlier, later in pairwise(seen))
    for name, mask in pruner.masks.items():
        lines = mask.movedim(1, -1)
        whole = lines[..., : lines.shape[-1] // 4 * 4].unflatten(-1, (-1, 4)) if lines.shape[-1] >= 4 else None
        assert whole is None or bool((whole.sum(-1) == 2).all()), name


def test_amounts_per_pattern():
    pruner = Pruner(Net(), sparsity={"conv*": 0.5, "*": 0.25}, end=4, schedule="linear")
    walk(pruner, 4)
    gone = {name: int((~mask).sum()) for name, mask in pruner.masks.items()}
    assert gone["conv1.weight"] + gone["conv2.weight"] == (72 + 1152) // 2
    assert gone["classify.weight"] == 16


# -- cuts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [pytest.param("sgd", marks=pytest.mark.slow), "adamw"])
def test_channels_shrink_while_training_and_the_state_follows(optimizer):
    model = Net()
    moving = OPTIMIZERS[optimizer](model.parameters())
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    identities = [id(p) for p in model.parameters()]
    pruner = Pruner(model, X[:2], sparsity=0.5, granularity="channel", end=6, every=2, optimizer=moving, ema=ema)
    widths = []
    for _ in range(8):
        train(model, moving, pruner, 1, ema=ema)
        widths.append(model.conv1.out_channels + model.conv2.out_channels)
        for parameter in model.parameters():
            for value in moving.state[parameter].values():
                assert not torch.is_tensor(value) or value.dim() == 0 or value.shape == parameter.shape
        assert [p.shape for p in ema.module.parameters()] == [p.shape for p in model.parameters()]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] == 12
    assert pruner.sparsity == 0.5
    assert [id(p) for p in model.parameters()] == identities
    assert pruner.plan.certificate is not None
    again = Net()
    pruner.plan.replay(again)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(X), model.eval()(X))


@pytest.mark.parametrize("granularity", ["element", "channel"])
def test_a_copy_of_the_model_may_hold_the_averages(granularity):
    model = Net()
    averaged = copy.deepcopy(model)
    moving = OPTIMIZERS["sgd"](model.parameters())
    pruner = Pruner(model, X[:2], sparsity=0.5, granularity=granularity, end=3, every=3, optimizer=moving, ema=averaged)
    for _ in range(5):
        train(model, moving, pruner, 1)
        with torch.no_grad():
            for mean, p in zip(averaged.parameters(), model.parameters(), strict=True):
                mean.lerp_(p, 0.1)
    assert [p.shape for p in averaged.parameters()] == [p.shape for p in model.parameters()]
    assert all(exact_zeros(averaged.get_parameter(name), mask) for name, mask in pruner.masks.items())
    assert any(not torch.equal(a, b) for a, b in zip(averaged.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(
    "target",
    [
        {"macs": 0.4},
        pytest.param({"params": 0.5}, marks=pytest.mark.slow),
        pytest.param({"count": 9}, marks=pytest.mark.slow),
        pytest.param({"memory_bytes": 3000}, marks=pytest.mark.slow),
    ],
)
def test_every_target_holds_in_the_end_as_in_one_shot(target):
    model = Net()
    once = sc.plan(Net(), X[:2], target=target, round_to=1)
    pruner = Pruner(model, X[:2], target=target, granularity="channel", end=3, round_to=1)
    walk(pruner, 3)
    if "count" in target:
        assert pruner._removal.removed()[0] == 9
    for what, bound in (("macs", 0.4), ("params", 0.5)):
        if what in target:
            whole, left = pruner.plan.cost[what]
            assert left <= bound * whole
            assert left >= 0.8 * once.cost[what][1]  # not much below it either
    assert torch.isfinite(model(X)).all()


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads, self.head_dim = 4, 4
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.out(mixed.reshape(batch, length, self.heads * self.head_dim))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.classify = nn.Linear(16, 4)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.classify(x.mean(1))


@pytest.mark.parametrize(("sparsity", "kept"), [(0.85, (4, 8)), (0.9, (4, 4))])
def test_floors_are_those_of_the_model_as_it_came(sparsity, kept):
    """A tenth of what is left, update by update, would be less and less."""
    model = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 4))
    moving, x = torch.optim.SGD(model.parameters(), lr=0.0), torch.randn(4, 8)
    pruner = Pruner(
        model, x, sparsity=sparsity, end=8, schedule="linear", optimizer=moving, granularity="neuron",
        criterion="random", min_keep_fraction=0.1, proof="example",
    )  # fmt: skip
    for _ in range(9):
        model(x).sum().backward()
        moving.step()
        pruner.step()
    assert tuple(sorted((model[0].out_features, model[2].out_features))) == kept


@pytest.mark.parametrize(
    ("granularity", "sparsity"),
    [
        ("head", 0.5),
        pytest.param("layer", 2 / 3, marks=pytest.mark.slow),
        pytest.param("neuron", 0.25, marks=pytest.mark.slow),
    ],
)
def test_heads_layers_and_neurons(granularity, sparsity):
    model, x = Encoder(), torch.randn(2, 5, 16)
    moving = torch.optim.AdamW(model.parameters(), lr=1e-3)
    units = {"head": 12, "layer": 3, "neuron": 96}[granularity]
    rule = {"name": "every"} if granularity == "layer" else "magnitude"
    pruner = Pruner(
        model, x, sparsity=sparsity, granularity=granularity, criterion=rule, end=2, optimizer=moving,
        schedule={"name": "steps", "count": 2}, min_keep_fraction=0.0,
    )  # fmt: skip
    for _ in range(3):
        model(x).square().sum().backward()
        moving.step()
        moving.zero_grad()
        pruner.step()
    assert pruner._removal.removed() == (round(sparsity * units), units)
    assert all(p.shape == moving.state[p]["exp_avg"].shape for p in model.parameters())
    assert model(x).shape == (2, 4)


# -- regrowth --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["set", "rigl"])
@pytest.mark.parametrize("granularity", ["element", {"name": "vector", "axis": "row"}])
def test_regrowth_keeps_the_amount_of_every_layer_and_moves_the_places(rule, granularity):
    model = Net()
    moving = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = Pruner(
        model, sparsity=0.5, schedule="one_shot", end=12, every=3, regrow=rule, optimizer=moving,
        criterion="random", granularity=granularity, allocation="uniform",
    )  # fmt: skip
    first = {name: mask.clone() for name, mask in pruner._removal.keep.items()}
    gradients = {}
    for step in range(1, 14):
        before = {name: mask.clone() for name, mask in pruner._removal.keep.items()}
        F.cross_entropy(model(X), Y).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        moving.step()
        moving.zero_grad()
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        pruner.step()
        for name, kept in pruner._removal.keep.items():
            assert int(kept.sum()) == int(first[name].sum())
            came = kept & ~before[name]
            assert step % 3 == 0 or not came.any()
            full = pruner.masks[name]
            assert exact_zeros(model.get_parameter(name), full)
            if rule == "rigl" and granularity == "element" and came.any():
                stays_out = ~kept & ~before[name]
                assert gradients[name][came].abs().min() >= gradients[name][stays_out].abs().max()
                went = before[name] & ~kept
                assert weights[name][went].abs().max() <= weights[name][kept & before[name]].abs().max()
                assert not model.get_parameter(name)[came].any()
    assert any(not torch.equal(first[name], mask) for name, mask in pruner._removal.keep.items())


def test_regrowth_follows_the_cosine():
    from secateur.training.regrowth import regrowth_of

    rule = regrowth_of({"name": "rigl", "fraction": 0.4})
    assert rule.share(0) == 0.4
    assert rule.share(0.5) == pytest.approx(0.2)
    assert rule.share(1) == 0.0


# -- checkpoints -----------------------------------------------------------------------------------------------


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


SETTINGS = {
    "element": {"sparsity": 0.8},
    "rigl": {"sparsity": 0.8, "regrow": "rigl"},
    "set": {"sparsity": 0.8, "regrow": "set"},
    "movement": {"sparsity": 0.8, "criterion": "movement"},
    "row": {"sparsity": 0.5, "granularity": {"name": "vector", "axis": "row"}},
    "channel": {"sparsity": 0.5, "granularity": "channel"},
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in ("set", "row") else kind for kind in SETTINGS]
)
def test_a_loop_that_was_stopped_goes_on_to_the_same_bytes(kind):
    def start():
        torch.manual_seed(3)
        model = Net()
        moving = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, moving, Pruner(model, X[:2], end=9, every=3, optimizer=moving, **{
            "granularity": "element", **SETTINGS[kind]
        })  # fmt: skip

    model, moving, pruner = start()
    train(model, moving, pruner, 4)
    state = saved(
        copy.deepcopy({"pruner": pruner.state_dict(), "model": model.state_dict(), "optimizer": moving.state_dict()})
    )
    train(model, moving, pruner, 8)

    other, its, resumed = start()
    resumed.load_state_dict(state["pruner"])
    other.load_state_dict(state["model"])
    its.load_state_dict(state["optimizer"])
    assert (resumed.done, resumed.sparsity) == (4, pytest.approx(state_sparsity(state, resumed)))
    train(other, its, resumed, 8)
    assert resumed.done == pruner.done == 12
    for (name, one), two in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


AT_ONCE = {
    "random": {"criterion": "random", "regrow": "set", "end": 12},
    "magnitude": {"regrow": "rigl", "end": 12},
    "channel": {"granularity": "channel"},
}


@pytest.mark.parametrize("kind", AT_ONCE)
def test_a_loop_that_has_loaded_its_weights_goes_on_too(kind):
    # What goes at step 0 goes when the pruner is made: not again on the weights of a checkpoint.
    def start(model, state=None):
        moving = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        settings = {"granularity": "element", "every": 2, **AT_ONCE[kind]}
        return moving, Pruner(
            model, X[:2], sparsity=0.5, schedule="one_shot", optimizer=moving, state=state, **settings
        )  # fmt: skip

    model = Net()
    moving, pruner = start(model)
    train(model, moving, pruner, 5)
    state = saved(copy.deepcopy((pruner.state_dict(), model.state_dict(), moving.state_dict())))
    train(model, moving, pruner, 5)
    other = Net()
    Pruner.restore_shapes(other, state[0])
    other.load_state_dict(state[1])
    its, resumed = start(other, state[0])
    assert all(torch.equal(one, two) for one, two in zip(other.state_dict().values(), state[1].values(), strict=True))
    its.load_state_dict(state[2])
    train(other, its, resumed, 5)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def state_sparsity(state, pruner):
    removal = state["pruner"]["removal"]
    if "gone" in removal:
        return removal["gone"] / pruner._removal.total
    masks = removal["keep"].values()
    return sum(int((~m).sum()) for m in masks) / sum(m.numel() for m in masks)


# -- the rest --------------------------------------------------------------------------------------------------


def test_finish_reaches_the_amount_when_the_loop_ends_early():
    model = Net()
    pruner = Pruner(model, sparsity=0.9, end=1000)
    walk(pruner, 10)
    pruner.finish()
    assert sum(int((~m).sum()) for m in pruner.masks.values()) == round(0.9 * pruner._removal.whole("count"))


def test_steps_that_a_scaler_skips_do_not_count():
    model = Net()
    moving = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Pruner(model, sparsity=0.5, end=3, optimizer=moving)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(F.cross_entropy(model(X), Y) * float("inf")).backward()
    scaler.step(moving)
    assert pruner.step() is False
    assert pruner.done == 0


def test_a_course_ends_on_the_very_target():
    course = Course.of(Target(macs=0.3, count=7), schedule_of("cubic", final=0.0, end=5), lambda what: 20)
    assert course.at(5) is course.target
    assert 0.3 < course.at(4).macs < course.at(1).macs < 1
    assert [course.at(step).count for step in (0, 5)] == [0, 7]


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        ({}, RecipeError),
        ({"sparsity": 0.5, "target": {"sparsity": 0.5}, "end": 3}, RecipeError),
        ({"sparsity": 0.5}, RecipeError),
        ({"sparsity": 90, "end": 3}, RecipeError),
        ({"sparsity": 0.5, "end": 3, "initial": 0.7}, RecipeError),
        ({"sparsity": 0.5, "end": 3, "initial": "half"}, RecipeError),
        ({"granularity": "2:4", "end": 3, "initial": 0.7}, RecipeError),
        ({"target": {"threshold": 0.1}, "end": 3}, RecipeError),
        ({"target": {"macs": 0.5}, "end": 3}, RecipeError),
        ({"sparsity": 0.5, "end": 3, "regrow": "rigle"}, RecipeError),
        ({"granularity": "2:4", "end": 3, "regrow": "set"}, RecipeError),
        ({"granularity": "2:4", "sparsity": 0.7, "schedule": "one_shot"}, RecipeError),
        ({"sparsity": 0.5, "end": 3, "optimizer": 3}, RecipeError),
        ({"sparsity": 0.5, "end": 3, "granularity": "channel"}, RecipeError),
        ({"sparsity": 0.5, "end": 3, "criterion": "taylor"}, RecipeError),
    ],
)
def test_what_cannot_be_is_refused(wrong, kind):
    with pytest.raises(kind):
        walk(Pruner(Net(), **wrong), 3)


@pytest.mark.parametrize(
    ("wrong", "kind", "words"),
    [
        ({"sparsity": {"nobody*": 0.5}}, RecipeError, "nobody"),
        ({"sparsity": {"conv*": 0.5}}, RecipeError, "classify"),
        ({"ema": 3}, RecipeError, "ema is a int"),
        ({"ema": {"nobody": torch.zeros(1)}}, InputError, "no average"),
        ({"ema": nn.Linear(2, 2)}, InputError, "no average"),
        ({"ema": 3, "granularity": "channel"}, RecipeError, "ema is a int"),
        ({"granularity": "channel", "optimizer": "two"}, RecipeError, "Give one optimizer"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_step(wrong, kind, words):
    model = Net()
    if wrong.get("optimizer") == "two":
        wrong = {**wrong, "optimizer": [torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2)]}
    with pytest.raises(kind, match=words):
        Pruner(model, X[:2], **{"sparsity": 0.5, "begin": 100, "end": 200, "granularity": "element", **wrong})


def test_an_optimizer_of_another_model_and_a_foreign_state_are_refused():
    with pytest.raises(InputError):
        Pruner(Net(), sparsity=0.5, end=3, optimizer=torch.optim.SGD(Net().parameters(), lr=0.1))
    pruner = Pruner(Net(), sparsity=0.5, end=3)
    for state in ({}, {"done": 1, "removal": {}}, {"done": 1, "removal": {"keep": {"nobody": torch.ones(1)}}}):
        with pytest.raises(InputError):
            pruner.load_state_dict(state)


def test_a_pruner_that_could_not_be_made_leaves_the_optimizer_alone():
    model = Net()
    moving = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RecipeError):
        Pruner(model, target={"threshold": 0.1}, end=3, optimizer=moving)
    before = copy.deepcopy(model.state_dict())
    pruner = Pruner(model, sparsity=0.0, end=3, optimizer=moving)
    train(model, moving, pruner, 1)
    assert pruner.done == 1
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())
    # Of the first one nothing is left but a hold of no masks.
    assert len(moving._optimizer_step_pre_hooks) == 3


def test_quantised_models_are_refused_at_the_door():
    scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(UnsupportedError):
        Pruner(scripted, sparsity=0.5, end=3)
