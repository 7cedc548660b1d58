"""Movement: scores by the definition, masks by the scores, values that come back, exact amounts."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from pattern_problem import Net, patterns
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import secateur as sc
from secateur.errors import InputError, RecipeError
from secateur.training import MovementPruner

X, Y = patterns(32, 1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 4))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def train(model, optimizer, pruner, steps):
    for _ in range(steps):
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()


def reference(start, steps, sparsity, lr, rate):
    """The definition, written down anew in float64: masked forward, straight-through scores, top-v."""
    w = [start[1].weight.detach().double().clone(), start[3].weight.detach().double().clone()]
    b = [start[1].bias.detach().double().clone(), start[3].bias.detach().double().clone()]
    s = [torch.zeros_like(v) for v in w]
    m = [torch.ones_like(v) for v in w]
    x = X.flatten(1).double()
    for step in range(1, steps + 1):
        leaves = [(v * k).requires_grad_() for v, k in zip(w, m, strict=True)] + [v.requires_grad_() for v in b]
        loss = F.cross_entropy(F.linear(torch.relu(F.linear(x, leaves[0], leaves[2])), leaves[1], leaves[3]), Y)
        g = torch.autograd.grad(loss, leaves)
        s = [score - rate * gradient * v for score, gradient, v in zip(s, g, w, strict=False)]
        w = [v - lr * gradient * k for v, gradient, k in zip(w, g, m, strict=False)]
        b = [(v - lr * gradient).detach() for v, gradient in zip(b, g[2:], strict=True)]
        wanted = sparsity * (1 - (1 - min(step / 6, 1)) ** 3)
        flat = torch.cat([score.flatten() for score in s])
        count = int(wanted * len(flat) + 0.5)
        gone = torch.zeros(len(flat), dtype=torch.bool)
        gone[flat.argsort(stable=True)[:count]] = True
        m = [(~part).double().view_as(v) for part, v in zip(gone.split([v.numel() for v in w]), w, strict=True)]
    return s, m, w


def test_the_hard_form_is_that_of_the_paper():
    model = small()
    start, optimizer = copy.deepcopy(model), sgd(model)
    pruner = MovementPruner(
        model, sparsity=0.7, end=6, optimizer=optimizer, scores=lambda p: torch.optim.SGD(p, lr=1.0)
    )
    seen = []
    for _ in range(9):
        train(model, optimizer, pruner, 1)
        seen.append({name: mask.clone() for name, mask in pruner.masks.items()})
    scores, masks, weights = reference(start, 9, 0.7, 0.1, 1.0)
    for name, score, mask, weight in zip(("1.weight", "3.weight"), scores, masks, weights, strict=True):
        torch.testing.assert_close(pruner.scores[name].detach().double(), score, rtol=1e-3, atol=1e-5)
        assert (pruner.masks[name] != mask.bool()).sum() <= 1  # a tie in single precision
        torch.testing.assert_close(model.get_parameter(name).detach().double(), weight * mask, rtol=1e-3, atol=1e-4)
    # Scores of masked weights move too, so that some come back.
    assert any((seen[at][name] & ~seen[at - 1][name]).any() for at in range(1, 9) for name in seen[at])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads, self.head_dim = 4, 4
        self.qkv, self.out, self.classify = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.classify((x + self.out(mixed.reshape(batch, length, self.heads * self.head_dim))).mean(1))


def attend(model, optimizer, pruner, steps):
    x = torch.randn(8, 5, 16)
    for _ in range(steps):
        F.cross_entropy(model(x), torch.arange(8) % 4).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()


FORMS = {
    "element": {"granularity": "element"},
    "block": {"granularity": {"name": "block", "shape": [4, 4]}, "protect": ["classify"]},
    "head": {"granularity": "head"},
}


ALL = [(kind, form, freeze) for kind in FORMS for form in ("hard", "soft") for freeze in ("none", "masks", "weights")]
FAST = {("element", "soft", "masks"), ("block", "hard", "none"), ("head", "hard", "weights"), ("block", "soft", "none")}


@pytest.mark.parametrize(
    ("kind", "form", "freeze"), [pytest.param(*one, marks=() if one in FAST else pytest.mark.slow) for one in ALL]
)
def test_amounts_are_exact_in_every_form(kind, form, freeze):
    model = Attention()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    before = copy.deepcopy(model.state_dict())
    pruner = MovementPruner(
        model, torch.randn(2, 5, 16), sparsity=0.5, end=5, optimizer=optimizer, form=form, freeze=freeze, **FORMS[kind]
    )
    attend(model, optimizer, pruner, 6)
    held = {name: mask.clone() for name, mask in pruner.masks.items()}
    attend(model, optimizer, pruner, 3)
    if freeze == "masks":
        assert all(torch.equal(held[name], mask) for name, mask in pruner.masks.items())
    pruner.finish()
    gone, total = pruner._held.removed()
    assert gone == int(0.5 * total + 0.5)
    for name, mask in pruner.masks.items():
        values = model.get_parameter(name).detach()
        assert not values[~mask].any()
        assert not torch.signbit(values[~mask]).any()
        if freeze == "weights":
            assert torch.equal(values[mask], before[name][mask])
    if kind == "head":
        x = torch.randn(3, 5, 16)
        smaller = sc.plan(model, x, granularity="head", keep=pruner.keep).apply(model)
        torch.testing.assert_close(smaller(x), model(x))


def test_soft_scores_are_driven_down_by_their_penalty():
    def gone(strength):
        torch.manual_seed(0)
        model = small()
        optimizer = sgd(model)
        pruner = MovementPruner(
            model, sparsity=0.9, end=30, optimizer=optimizer, form="soft", strength=strength, scores=0.2
        )
        train(model, optimizer, pruner, 30)
        return pruner.sparsity

    assert gone(0.0) < gone(100.0)


def test_filling_gives_back_whole_units_that_are_not_empty():
    model = Attention()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = torch.randn(2, 5, 16)
    pruner = MovementPruner(
        model, x, sparsity=0.7, end=4, optimizer=optimizer, fill="head", protect=["classify"],
        granularity={"name": "block", "shape": [4, 4]},
    )  # fmt: skip
    attend(model, optimizer, pruner, 4)
    pruner._held.keep["qkv.weight"][0] = False  # head 0: queries, keys and values all gone, and its output
    pruner._held.keep["qkv.weight"][4] = False
    pruner._held.keep["qkv.weight"][8] = False
    pruner._held.keep["out.weight"][:, 0] = False
    before = pruner._held.keep
    pruner._top = lambda sparsity: before
    pruner.finish()
    qkv = pruner.masks["qkv.weight"].view(3, 4, 4, 16)
    for head in range(4):
        part = torch.cat([qkv[:, head].flatten(), pruner.masks["out.weight"].view(16, 4, 4)[:, head].flatten()])
        assert part.all() or not part.any(), head
    assert not qkv[:, 0].any()
    assert qkv.any()
    # What is said is what the masks are, and not what they were before.
    for name, mask in pruner.masks.items():
        blocks = mask.view(mask.shape[0] // 4, 4, -1, 4).permute(0, 2, 1, 3).flatten(2)
        assert torch.equal(pruner.keep[name], blocks.any(-1))
    total = sum(mask.numel() for mask in pruner.masks.values())
    assert pruner.sparsity == pytest.approx(sum(int((~m).sum()) for m in pruner.masks.values()) / total)
    assert pruner.sparsity < 0.7


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("form", ["hard", "soft"])
def test_a_loop_that_was_stopped_goes_on_to_the_same_bytes(form, at_once):
    """Also one that has loaded its weights before the pruner is made, and hands it the state with the rest."""

    def start(model, state=None):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return optimizer, MovementPruner(model, sparsity=0.8, end=8, optimizer=optimizer, form=form, state=state)

    torch.manual_seed(5)
    model = Net()
    optimizer, pruner = start(model)
    train(model, optimizer, pruner, 4)
    state = copy.deepcopy((pruner.state_dict(), model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, pruner, 6)
    other = Net()
    if at_once:
        other.load_state_dict(state[1])
    its, resumed = start(other, state[0] if at_once else None)
    if not at_once:
        resumed.load_state_dict(state[0])
        other.load_state_dict(state[1])
    its.load_state_dict(state[2])
    assert resumed.done == 4
    train(other, its, resumed, 6)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        ({"form": "hrad"}, RecipeError),
        ({"freeze": "all"}, RecipeError),
        ({"scope": "row"}, RecipeError),
        ({"threshold": 1.0}, RecipeError),
        ({"threshold": "high"}, RecipeError),
        ({"granularity": "2:4"}, RecipeError),
        ({"sparsity": 1.0}, RecipeError),
        ({"sparsity": {"*": 0.5}}, RecipeError),
        ({"initial": "none"}, RecipeError),
        ({"strength": -1.0}, RecipeError),
        ({"strength": "weak"}, RecipeError),
        ({"start": "size"}, RecipeError),
        ({"scores": "adam"}, RecipeError),
        ({"scores": -1.0}, RecipeError),
        ({"scores": lambda parameters: None}, RecipeError),
        ({"fill": "hed"}, RecipeError),
        ({"ema": 3}, RecipeError),
        ({"ema": {"nobody": torch.zeros(1)}}, InputError),
        ({"state": {"done": 1}}, InputError),
        ({"optimizer": None}, InputError),
    ],
)
def test_what_cannot_be_is_refused(wrong, kind):
    """When the pruner is made, and not after hours of training; the optimizer is left as it was."""
    model = small()
    moving = sgd(model)
    with pytest.raises(kind):
        MovementPruner(model, **{"sparsity": 0.5, "end": 3, "optimizer": moving, **wrong})
    listeners = len(moving._optimizer_step_post_hooks)
    assert listeners <= 1, "of a pruner that was refused at most a hold of no masks is left"
    with pytest.raises(InputError):
        MovementPruner(model, sparsity=0.5, end=3, optimizer=sgd(model)).load_state_dict({"done": 1})


class AsksNothing(TorchDispatchMode):
    """Refuses what would make an accelerator wait for the processor: numbers, and sizes that depend on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "bincount"), name
        assert not (name == "index" and any(one is not None and one.dtype == torch.bool for one in args[1])), name
        return func(*args, **(kwargs or {}))


QUIET = {
    "magnitude": lambda model, moving: sc.Pruner(model, sparsity=0.7, end=8, every=4, optimizer=moving),
    "rigl": lambda model, moving: sc.Pruner(model, sparsity=0.7, end=8, every=4, optimizer=moving, regrow="rigl"),
    "hard": lambda model, moving: MovementPruner(
        model, sparsity=0.7, end=8, every=4, optimizer=moving, scores=lambda p: torch.optim.SGD(p, lr=1.0)
    ),
    "soft": lambda model, moving: MovementPruner(
        model,
        sparsity=0.7,
        end=8,
        every=4,
        optimizer=moving,
        form="soft",
        threshold=0.5,
        scores=lambda p: torch.optim.SGD(p, lr=1.0),
    ),
}


@pytest.mark.parametrize("kind", QUIET)
def test_steps_between_updates_do_not_wait_for_an_accelerator(kind):
    model = small()
    moving = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = QUIET[kind](model, moving)
    updates = 0
    for step in range(1, 8):
        F.cross_entropy(model(X), Y).backward()
        with AsksNothing() if step % 4 else nullcontext():
            moving.step()
            updates += pruner.step()
        moving.zero_grad()
    assert updates == 1
    assert pruner.sparsity > 0.3


def test_the_penalty_is_steered_by_steps_however_far_updates_lie_apart():
    strengths = {}
    for every in (1, 4, 10):
        model = small()
        moving = sgd(model)
        pruner = MovementPruner(
            model, sparsity=0.7, end=20, every=every, optimizer=moving, form="soft",
            scores=lambda p: torch.optim.SGD(p, lr=0.0),
        )  # fmt: skip
        train(model, moving, pruner, 21)  # scores rest, so nothing goes, and more is wanted at every step
        strengths[every] = pruner.strength
    assert strengths[1] == pytest.approx(1.05**20, rel=0.15)
    assert strengths[4] == pytest.approx(strengths[1], rel=0.4)
    assert strengths[10] == pytest.approx(strengths[1], rel=0.7)


@pytest.mark.parametrize("kind", FORMS)
def test_scores_may_start_with_the_sizes_of_their_units(kind):
    model = Attention()
    with torch.no_grad():
        model.out.weight.mul_(100)  # sizes are relative to those of the same tensor
    optimizer = sgd(model)
    pruner = MovementPruner(
        model, torch.randn(2, 5, 16), sparsity=0.5, end=3, optimizer=optimizer, scope="local", start=3.0, **FORMS[kind]
    )
    for name, score in pruner.scores.items():
        assert score.detach().square().mean().sqrt().item() == pytest.approx(3.0, rel=1e-5), name
    if kind == "element":
        weight = model.out.weight.detach()
        expected = 3 * weight.abs() / weight.square().mean().sqrt()
        torch.testing.assert_close(pruner.scores["out.weight"].detach(), expected)


def test_until_movement_overrules_it_the_start_decides_like_magnitude():
    model = small()
    before, optimizer = copy.deepcopy(model), sgd(model)
    pruner = MovementPruner(model, sparsity=0.5, end=1, optimizer=optimizer, scores=1e-9, start=1.0, scope="local")
    train(model, optimizer, pruner, 1)
    for name, mask in pruner.masks.items():
        size = before.get_parameter(name).detach().abs()
        assert mask.any()
        assert not mask.all()
        assert size[mask].min() >= size[~mask].max()


@pytest.mark.parametrize("start", [-1.0, float("nan"), float("inf")])
def test_a_start_that_is_no_size_is_refused(start):
    model = small()
    with pytest.raises(RecipeError, match="start"):
        MovementPruner(model, sparsity=0.5, end=3, optimizer=sgd(model), start=start)


def test_a_tensor_of_zeros_may_start_with_its_sizes():
    model = small()
    with torch.no_grad():
        model[1].weight.zero_()
    pruner = MovementPruner(model, sparsity=0.5, end=3, optimizer=sgd(model), start=3.0)
    assert all(torch.isfinite(score).all() for score in pruner.scores.values())


def test_what_a_mask_hides_is_that_of_the_newest_mask():
    layer = nn.Linear(3, 2)
    whole = layer.weight.detach().clone()
    handle = sc.masks.mask_model(layer, {"weight": torch.tensor([[True, False, True], [False, True, True]])})
    torch.testing.assert_close(handle.unmasked("weight"), whole, rtol=0, atol=0)
    handle.update({"weight": torch.tensor([[False, True, True], [True, True, False]])})
    torch.testing.assert_close(handle.unmasked("weight"), whole, rtol=0, atol=0)
    with torch.no_grad():
        layer.weight[0, 2] = 7.0
    assert handle.unmasked("weight")[0, 2] == 7.0
    layer.double()
    assert handle.unmasked("weight").dtype == torch.float64
