"""Whatever runs a model gives it back: every user of the guard against a block that changes all that can be changed."""

from __future__ import annotations

import random
import threading
from collections import deque
from contextlib import suppress
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from secateur.advice.facts import _seconds
from secateur.comparison.fidelity import loss_changes
from secateur.comparison.scoring import epoch_seconds
from secateur.criteria import Context, Criterion, OptimalBrainSurgeon
from secateur.criteria.curvature.diagonal import DiagonalCriterion
from secateur.files import seed_everything
from secateur.measure import latency, macs, quality
from secateur.model.guard import evaluating, generators, guard
from secateur.model.kernels import exact_derivatives, unfused, unfused_attention
from secateur.recover.finetune import finetune
from secateur.structure.capture import capture, quiet


class Stop(Exception):
    pass


class Busy(nn.Module):
    """Holds one of each thing that a block may change; `body` runs in the forward."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm, self.drop = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("zero", torch.tensor([0.0, float("nan"), -0.0]))
        self.register_buffer("wide", torch.ones(1, 3).expand(4, 3))
        self.register_buffer("last", torch.zeros(3))
        self.register_buffer("gone", torch.ones(2), persistent=False)
        self.register_buffer("narrow", torch.ones(2, dtype=torch.bfloat16))
        self.register_buffer("swapped", torch.full((2,), 7.0))
        self.again = self.count
        self.calls, self.cache = 0, None
        self.total = torch.zeros(3)
        self.memo = {"seen": [], "deep": ({"words": {"a"}},), "queue": deque([1])}
        self.aside = [nn.BatchNorm1d(2)]
        self.body = None

    def forward(self, x):
        if self.body is not None:
            self.body()
        return self.norm(self.fc(x)) * self.scale


def busy():
    torch.manual_seed(0)
    model = Busy()
    model.drop.eval()
    model.aside[0].train()
    model.fc.bias.requires_grad_(False)
    model.fc.weight.grad = torch.full((3, 3), 2.0)
    model.last.grad = None
    model.fc.register_forward_hook(keep_out)
    model.fc.weight.register_hook(keep_gradient)
    return model


def keep_out(module, args, out):
    return None


def keep_gradient(gradient):
    return None


def bits(tensor):
    return None if tensor is None else (tuple(tensor.shape), tensor.detach().reshape(-1).view(torch.uint8).tolist())


def hooks(owner):
    names = sorted(name for name in dir(owner) if name.endswith("_hooks") or "_hooks_" in name)
    found = {name: getattr(owner, name, None) for name in names}
    return {name: list(value.values()) for name, value in found.items() if isinstance(value, dict) and value}


def of_tensor(tensor):
    return (id(tensor), bits(tensor), tensor.requires_grad, id(tensor.grad), bits(tensor.grad), hooks(tensor))


def of_value(value):
    if isinstance(value, torch.Tensor):
        return of_tensor(value)
    if isinstance(value, nn.Module):
        return of_module(value)
    if isinstance(value, dict):
        return [(id(value), key, of_value(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple, deque)):
        return [id(value), *map(of_value, value)]
    return sorted(value) if isinstance(value, set) else value


def of_module(model):
    """What is put back in any case, and what a training may leave changed."""
    always = [(name, m.training, hooks(m)) for name, m in model.named_modules()]
    always += [(p.requires_grad, id(p.grad), bits(p.grad), hooks(p)) for p in model.parameters()]
    rest = [(name, key, of_value(value)) for name, m in model.named_modules() for key, value in vars(m).items()]
    return always, rest


def of_process():
    numpy = np.random.get_state()  # noqa: NPY002
    return (
        random.getstate(),
        (numpy[0], numpy[1].tolist(), *numpy[2:]),
        torch.get_rng_state().tolist(),
        torch.initial_seed(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )


def draw():
    return random.random(), np.random.rand(), torch.rand(())  # noqa: NPY002


def havoc(model, example=None, *, train=True):
    """Change everything."""
    draw()
    with torch.inference_mode(False), torch.enable_grad():
        if train:
            model.train()
        model.fc.eval()
        model.aside[0].eval()
        model.requires_grad_(True)
        model.scale.requires_grad_(False)
        (model.fc.weight * torch.rand(3, 3)).sum().backward()
        model.fc.weight.grad.add_(1)
        model.fc.register_forward_hook(lambda *_: None)
        model.norm.register_full_backward_hook(lambda *_: None)
        model.fc.weight.register_hook(lambda gradient: gradient)
        model.fc.bias.register_post_accumulate_grad_hook(lambda parameter: None)
        functional.batch_norm(torch.randn(5, 3), model.norm.running_mean, model.norm.running_var, training=True)
    with torch.no_grad():
        model.count += 1
        model.zero.neg_()
        model.narrow.mul_(3)
        model.total += 1
    model.last = torch.ones(3)
    model.swapped.data = torch.zeros(5)
    del model.gone
    model.register_buffer("fresh", torch.ones(1))
    model.norm.extra = nn.Linear(1, 1)
    model.calls, model.cache = 1, torch.ones(2)
    model.memo["seen"].append(torch.ones(1))
    model.memo["deep"][0]["words"].add("b")
    model.memo["queue"].append(2)
    model.memo["new"] = 1
    model.aside.append(nn.Linear(1, 1))
    torch.set_grad_enabled(not torch.is_grad_enabled())
    if example is not None:
        with torch.no_grad():
            example["x"].mul_(2)


def in_score(mode):
    def run(model, example, body):
        class Asked(Criterion):
            name = "asked"

            def _score(self, context):
                body()
                return {}

        Asked.mode = mode
        group = SimpleNamespace(name="g", granularity="any", shape=(1,), spans=())
        with suppress(KeyError):  # it has given no score for the group, which no one asked for
            Asked().score(Context(model, [group], example=example))

    return run


def in_diagonal(model, example, body):
    class Asked(DiagonalCriterion):
        name: ClassVar[str] = "asked"

        def _diagonal(self, context, names):
            body()

    Asked().diagonal(Context(model, [], example=example))


def in_fit(model, example, body):
    class Asked(OptimalBrainSurgeon):
        def _fit(self, context):
            body()

    Asked().fit(Context(model, [], data=[(torch.ones(1, 3), torch.zeros(1))], example=example))


def as_loss(body):
    def loss(model, batch):
        body()
        with torch.enable_grad():
            return (model.fc.weight * 0).sum()

    return loss


def in_damage(model, example, body):
    loss_changes(model, [], {}, [(example["x"], torch.zeros(4))], as_loss(body))


def within(context):
    def run(model, example, body):
        with context(model, example):
            body()

    return run


def in_forward(run):
    def inner(model, example, body):
        model.body = body
        try:
            run(model, example)
        finally:
            model.body = None

    return inner


WITH_EXAMPLE = {
    "guard": within(lambda model, example: guard(model, example=example)),
    "guard-eval": within(lambda model, example: guard(model, mode="eval", gradients=False, seed=1, example=example)),
    "guard-train": within(lambda model, example: guard(model, mode="train", gradients=True, example=example)),
    "guard-twice": within(lambda model, example: guard(model, model.fc, model, example=[example, example])),
    "evaluating": within(lambda model, example: evaluating(model, example=example)),
    "quiet": within(lambda model, example: quiet(model, example)),
    "score-eval": in_score("eval"),
    "score-train": in_score("train"),
    "diagonal": in_diagonal,
    "obs-fit": in_fit,
    "macs": in_forward(lambda model, example: macs(model, example)),
    "latency": in_forward(lambda model, example: latency({"m": model}, example, rounds=1, warmup=0)),
}
WITHOUT_EXAMPLE = {
    "epoch-seconds": lambda model, example, body: epoch_seconds(model, [(example["x"],)], as_loss(body)),
    "advice": lambda model, example, body: _seconds(model, example["x"], as_loss(body)),
    "fidelity": in_damage,
    "quality": lambda model, example, body: quality(model, lambda _: body() or 1.0),
}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("user", [*WITH_EXAMPLE, *WITHOUT_EXAMPLE])
def test_everything_comes_back(user, fails):
    run = (WITH_EXAMPLE | WITHOUT_EXAMPLE)[user]
    model, example = busy(), {"x": torch.randn(4, 3)}
    ran = threading.Event()  # not a list: what the forward can reach is put back as well

    def body():
        if ran.is_set():  # some users call it more than once
            return
        ran.set()
        havoc(model, example if user in WITH_EXAMPLE else None, train=user != "latency")
        if fails:
            raise Stop

    before = of_module(model), of_process(), of_tensor(example["x"])
    # Some users meet what the block has done to the model, and some wrap the error; it has to have run, though.
    with suppress(Exception):
        run(model, example, body)
    after = of_module(model), of_process(), of_tensor(example["x"])
    assert ran.is_set()
    assert after == before


def test_a_failed_finetune_puts_everything_back():
    model = busy()
    data = [(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))] * 2
    steps = []

    def loss(model, batch):
        steps.append(1)
        if len(steps) == 2:
            havoc(model)
            model.last.data = torch.full((9,), 1.0)
            raise Stop
        with torch.enable_grad():
            return model(batch[0]).square().sum()

    before = of_module(model), of_process()
    with pytest.raises(Exception, match="step 1"):
        finetune(model, data, loss)
    assert (of_module(model), of_process()) == before


def test_a_finetune_keeps_what_it_learned_and_gives_back_the_rest():
    model = busy()
    weight, mean, buffer = model.fc.weight.detach().clone(), model.norm.running_mean.clone(), model.last
    (always, _), process = of_module(model), of_process()

    def loss(model, batch):
        draw()
        model.calls += 1
        model.last = torch.ones(3)
        model.eval()
        model.fc.register_forward_hook(lambda *_: None)
        model.train()
        return model(batch[0]).square().sum()

    finetune(model, [(torch.arange(12.0).view(4, 3),)], loss, seed=3)
    assert of_module(model)[0] == always
    assert of_process() == process
    assert not torch.equal(model.fc.weight, weight)
    assert not torch.equal(model.norm.running_mean, mean)
    assert model.calls == 1
    assert model.last is not buffer


class Restless(nn.Module):
    """A forward that changes the model and its input."""

    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))
        self.register_buffer("gone", torch.zeros(1))
        self.register_buffer("last", torch.zeros(1))
        self.calls, self.total, self.memo = 0, torch.zeros(()), {"seen": []}

    def forward(self, x):
        self.count += 1
        self.total += 1
        self.calls += 1
        self.memo["seen"].append(x)
        if "gone" in self._buffers:
            del self.gone
        self.last = torch.ones(1)
        self.register_buffer("fresh", torch.ones(1))
        hidden = functional.relu(self.fc(x.mul_(2)))
        # Writes its statistics without saying so in the signature of the operator.
        hidden = functional.batch_norm(hidden, self.mean, self.var, training=True)
        return self.out(functional.dropout(hidden, training=True))


RUNS = {
    "capture": capture,
    "quiet": lambda model, example: within(lambda *_: quiet(model, example))(model, example, lambda: model(example)),
    "macs": macs,
    "evaluating": lambda model, example: within(lambda *_: evaluating(model, example=example))(
        model, example, lambda: model(example)
    ),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_forward_that_changes_the_model_leaves_no_trace(run):
    torch.manual_seed(0)
    model, example = Restless(), torch.randn(5, 3)
    before = of_module(model), of_process(), of_tensor(example)
    RUNS[run](model, example)
    assert (of_module(model), of_process(), of_tensor(example)) == before


@pytest.mark.parametrize("fails", [False, True])
def test_generators_and_seed_everything(fails):
    def used(context):
        before = of_process()
        try:
            with context:
                drawn = draw()
                if fails:
                    raise Stop
        except Stop:
            pass
        assert of_process() == before
        return drawn

    torch.manual_seed(5)
    expected = draw()
    random.seed(3), np.random.seed(3)  # noqa: NPY002
    first = used(seed_everything(7)) if not fails else None
    assert first == (used(generators(7)) if not fails else None)
    with pytest.raises(Stop), generators():
        raise Stop
    assert expected[2] != draw()[2]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kernels", [exact_derivatives, unfused, lambda model: unfused_attention()])
def test_kernels_come_back(kernels, fails):
    def switches():
        return (
            torch.backends.mha.get_fastpath_enabled(),
            torch._C._get_mkldnn_enabled(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.enabled,
            torch.backends.cudnn.allow_tf32,
            torch.backends.cuda.flash_sdp_enabled(),
            torch.is_grad_enabled(),
        )

    before = switches()
    try:
        with kernels(nn.LSTM(2, 2)):
            assert switches() != before
            if fails:
                raise Stop
    except Stop:
        assert fails
    assert switches() == before


def test_what_is_seen_inside():
    model = busy()
    with guard(model, mode="eval", gradients=False, seed=4):
        assert not any(module.training for module in model.modules())
        assert model.fc.weight.grad is None
        assert not torch.is_grad_enabled()
        first = draw()
    with guard(model, mode="train", gradients=True, seed=4):
        assert model.drop.training
        assert torch.is_grad_enabled()
        assert draw() == first
    with guard(model):
        assert not model.drop.training


def test_train_respects_a_model_that_keeps_its_norms_frozen_and_eval_does_not_ask():
    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.drop = nn.BatchNorm1d(2), nn.Dropout()

        def train(self, mode=True):
            super().train(mode)
            self.norm.training = False
            self.drop.training = True
            return self

    model = Stubborn()
    with guard(model, mode="train"):
        assert not model.norm.training
        assert model.training
    with guard(model, mode="eval"):
        assert not model.drop.training
    assert model.drop.training


def test_without_copies_values_stay_and_names_come_back():
    model = busy()
    count, last = model.count, model.last
    with guard(model, copies=False):
        model.count += 1
        model.last = torch.ones(3)
    assert model.count is count
    assert count == 1
    assert model.last is last


def test_weights_are_not_copied_unless_asked_for():
    model = nn.Linear(2, 2)
    model.view = model.weight.detach()[0]  # lies in the memory of the weight
    with guard(model), torch.no_grad():
        model.weight.fill_(5)
    assert model.weight.eq(5).all()
    with suppress(Stop), guard(model, rollback=True), torch.no_grad():
        model.weight.fill_(6)
        raise Stop
    assert model.weight.eq(5).all()


def test_a_buffer_that_became_part_of_a_graph_is_a_leaf_again():
    model = busy()
    with guard(model, gradients=True):
        model.last.add_(model.scale)
        assert not model.last.is_leaf
    assert model.last.is_leaf
    assert not model.last.requires_grad
    assert model.last.tolist() == [0, 0, 0]


def test_scripted_modules_come_back():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    mean = dict(scripted.named_buffers())["1.running_mean"]
    with guard(scripted, mode="eval"):
        assert not scripted.training
        mean.fill_(3)
    assert scripted.training
    assert all(module.training for module in scripted.modules())
    assert mean.tolist() == [0, 0]


def test_tensors_of_inference_mode_come_back():
    with torch.inference_mode():
        model = nn.BatchNorm1d(2)
        with guard(model):
            model.running_mean.fill_(1)
    with guard(model), torch.inference_mode():
        model.running_var.fill_(4)
    assert model.running_mean.tolist() == [0, 0]
    assert model.running_var.tolist() == [1, 1]


def test_lazy_modules_may_run_for_the_first_time_inside():
    model = nn.Sequential(nn.LazyLinear(2), nn.BatchNorm1d(2))
    with guard(model, mode="eval", gradients=False):
        model(torch.ones(1, 3))
    assert model(torch.ones(4, 3)).shape == (4, 2)
    assert model.training


def test_meta_models_cost_no_values():
    model = nn.BatchNorm1d(2, device="meta")
    with guard(model, mode="eval", example=torch.ones(1, 2, device="meta")):
        assert not model.training
    assert model.training


def test_what_was_not_changed_is_not_written():
    model = busy()
    versions = [tensor._version for tensor in (*model.parameters(), *model.buffers())]
    with guard(model, mode="eval"):
        pass
    with pytest.raises(Stop), guard(model, rollback=True):
        raise Stop
    assert [tensor._version for tensor in (*model.parameters(), *model.buffers())] == versions


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("user", ["guard", "evaluating", "quiet", "score-eval"])
def test_generators_of_cuda_come_back(user):
    model = busy().cuda()  # seeds
    torch.rand(1, device="cuda")
    before = torch.cuda.get_rng_state()
    WITH_EXAMPLE[user](model, {"x": torch.ones(4, 3, device="cuda")}, lambda: torch.rand(3, device="cuda"))
    assert torch.equal(torch.cuda.get_rng_state(), before)
