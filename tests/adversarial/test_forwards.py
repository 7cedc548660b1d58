"""Forwards that are no plain methods, hooks, and methods of a model beside its forward."""

from __future__ import annotations

import functools
import types

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .references import Kept, zeroed
from .usages import (
    NETS,
    Convnet,
    Mlp,
    applied,
    data,
    equal,
    pair,
    planned,
    seeded,
    thirds,
)


def _lambda(m: nn.Module) -> None:
    m.forward = lambda x, inner=m.forward: inner(x) * 2


def _partial(m: nn.Module) -> None:
    m.forward = functools.partial(m.forward)


def _wrapped(m: nn.Module) -> None:
    inner = m.forward

    @functools.wraps(inner)
    def forward(x: Tensor) -> Tensor:
        return inner(x) + 1

    m.forward = forward


def _method(m: nn.Module) -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return type(self).forward(self, x) * 3

    m.forward = types.MethodType(forward, m)


def _inner(m: nn.Module) -> None:
    first = next(c for c in m.modules() if isinstance(c, (nn.Linear, nn.Conv2d)))
    inner = first.forward
    first.forward = lambda x: inner(x) * 0.5


def _inner_partial(m: nn.Module) -> None:
    first = next(c for c in m.modules() if isinstance(c, (nn.Linear, nn.Conv2d)))
    kind = F.linear if isinstance(first, nn.Linear) else functools.partial(F.conv2d, padding=1)
    first.forward = functools.partial(kind, weight=first.weight, bias=first.bias)


def _pre_hook(m: nn.Module) -> None:
    m.register_forward_pre_hook(lambda mod, args: (args[0] * 0.5,))


def _post_hook_of_the_original(m: nn.Module) -> None:
    m.register_forward_hook(lambda mod, args, out: out + m.offset)
    m.register_buffer("offset", torch.ones(()))


def _hook_holds_a_weight(m: nn.Module) -> None:
    last = [c for c in m.modules() if isinstance(c, nn.Linear)][-1]
    weight = last.weight
    m.register_forward_hook(lambda mod, args, out: out + weight.sum())


def _hook_holds_a_mask(m: nn.Module) -> None:
    first = next(c for c in m.modules() if isinstance(c, (nn.Linear, nn.Conv2d)))
    size = first.weight.shape[0]
    mask = torch.linspace(0.5, 2, size)
    mask = mask[:, None, None] if isinstance(first, nn.Conv2d) else mask
    first.register_forward_hook(lambda mod, args, out: out * mask)


def _weights_pre_hook(m: nn.Module) -> None:
    first = next(c for c in m.modules() if isinstance(c, (nn.Linear, nn.Conv2d)))
    first.register_forward_pre_hook(lambda mod, args: (mod.weight.data.clamp_(-0.2, 0.2), None)[1])


def _compiled_inside(m: nn.Module) -> None:
    torch._dynamo.reset()
    m.compile(backend="eager")


def _checkpointed(m: nn.Module) -> None:
    from torch.utils.checkpoint import checkpoint

    inner = m.forward
    m.forward = lambda x: checkpoint(inner, x, use_reentrant=False)


def _no_grad(m: nn.Module) -> None:
    m.forward = torch.no_grad()(m.forward)


def _own_call(m: nn.Module) -> None:
    class Called(type(m)):  # type: ignore[misc]
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x * 2) - 1

    m.__class__ = Called


WRAPPERS = {
    f.__name__[1:]: f
    for f in (
        _lambda,
        _partial,
        _wrapped,
        _method,
        _inner,
        _inner_partial,
        _pre_hook,
        _post_hook_of_the_original,
        _hook_holds_a_weight,
        _hook_holds_a_mask,
        _weights_pre_hook,
        _compiled_inside,
        _checkpointed,
        _no_grad,
        _own_call,
    )
}


@pytest.mark.parametrize(
    ("net", "wrapper"), thirds([(net, name) for name in WRAPPERS for net in ("mlp", "conv")], of=5)
)
def test_wrapped(net: str, wrapper: str) -> None:
    """Whatever is certified gives the outputs of the zeroed original, also once the original is gone."""
    build, shape, other = NETS[net]
    model, plain_model = seeded(build), seeded(build)
    WRAPPERS[wrapper](model)
    plan = planned(model, data(*shape))
    cut = applied(plan, model)
    truth = zeroed(plain_model, Kept(plain_model, plan))
    WRAPPERS[wrapper](truth)
    with torch.no_grad():
        want = truth(data(*other))
        for p in model.parameters():
            p.data.fill_(7.0)  # the user goes on with the original; the cut model has nothing to do with it
        have = cut(data(*other))
    equal(want, have)


@pytest.mark.parametrize("wrapper", thirds(WRAPPERS, of=4))
def test_wrapped_and_cut_in_place(wrapper: str) -> None:
    model, plain_model = seeded(Mlp), seeded(Mlp)
    WRAPPERS[wrapper](model)
    plan = planned(model, data(5, 8))
    cut = applied(plan, model, inplace=True)
    truth = zeroed(plain_model, Kept(plain_model, plan))
    WRAPPERS[wrapper](truth)
    with torch.no_grad():
        equal(truth(data(7, 8)), cut(data(7, 8)))


class Deploys(nn.Module):
    """Three branches in training, one convolution after `deploy`; sizes are remembered as integers."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = 3, 12
        self.stem, self.three, self.one = (
            nn.Conv2d(3, 12, 3, padding=1),
            nn.Conv2d(12, 12, 3, padding=1),
            nn.Conv2d(12, 12, 1),
        )
        self.width, self.head = 12, nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).relu()
        if hasattr(self, "merged"):
            h = self.merged(h)
        else:
            h = self.three(h) + self.one(h) + h
        return self.head(h.relu().mean((2, 3)))

    def deploy(self) -> None:
        merged = nn.Conv2d(self.width, self.width, 3, padding=1)
        eye = torch.zeros(self.width, self.width, 3, 3)
        for i in range(self.width):
            eye[i, i, 1, 1] = 1
        with torch.no_grad():
            merged.weight.copy_(self.three.weight + F.pad(self.one.weight, [1] * 4) + eye)
            merged.bias.copy_(self.three.bias + self.one.bias)
        self.merged = merged
        del self.three, self.one


class Lora(nn.Module):
    """Merged in evaluation, apart in training, as an override of `train`."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(out, into) / 4), nn.Parameter(torch.zeros(out))
        self.a, self.b = nn.Parameter(torch.randn(3, into) / 4), nn.Parameter(torch.randn(out, 3) / 4)
        self.merged = False

    def train(self, mode: bool = True) -> Lora:
        super().train(mode)
        with torch.no_grad():
            if mode == self.merged:
                self.weight.add_(self.b @ self.a, alpha=-1 if mode else 1)
                self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y if self.merged else y + x @ self.a.t() @ self.b.t()


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = Lora(8, 24), Lora(24, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc2(self.fc1(x).relu()).relu())


class ResetsItsHead(Convnet):
    def __init__(self) -> None:
        super().__init__()
        self.num_features, self.feature_info = 12, [{"name": "a", "channels": 16}, {"name": "b", "channels": 12}]

    def features(self, x: Tensor) -> list[Tensor]:
        h = self.bn(self.a(x)).relu()
        return [h, self.b(h).relu()]

    def reset_classifier(self, classes: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.out = nn.Linear(self.num_features, classes)


def test_deployed_after_the_cut() -> None:
    truth, cut, plan = pair(seeded(Deploys), data(2, 3, 8, 8))
    x = data(3, 3, 9, 9)
    equal(truth(x), cut(x))
    truth.deploy()
    with torch.no_grad():
        gone = Kept(seeded(Deploys), plan).gone("head.weight", 1)
        truth.head.weight[:, gone] = 0
    try:
        cut.deploy()
        have = cut(x)
    except RuntimeError:
        assert "Deploys.deploy() reads width, which stays 12" in plan.explain()
        return
    equal(truth(x), have)


@pytest.mark.parametrize("first", ["eval", "train"])
def test_merging_by_train_and_eval(first: str) -> None:
    model = seeded(Adapted)
    model.train(first == "train")
    truth, cut, plan = pair(model, data(5, 8))
    for mode in (True, False, True):
        truth.train(mode)
        try:
            cut.train(mode)
            have = cut(data(7, 8))
        except RuntimeError:
            assert "fc1.a" in plan.explain() or "fc2.a" in plan.explain(), "nothing said that the other mode breaks"
            return
        equal(truth(data(7, 8)), have)


def test_head_is_reset_after_the_cut() -> None:
    """Integers of the model that name widths follow the cut, or what reads them is said."""
    _, cut, plan = pair(seeded(ResetsItsHead), data(2, 3, 8, 8))
    cut.reset_classifier(7)
    try:
        assert cut(data(2, 3, 8, 8)).shape == (2, 7)
    except RuntimeError:
        assert "ResetsItsHead.reset_classifier() reads num_features, which stays 12" in plan.explain()
