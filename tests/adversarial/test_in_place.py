"""A cut in place, with what trains the model and what averages it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import SecateurError

from .harness import same, snapshot
from .references import Kept, zeroed
from .usages import (
    Convnet,
    Former,
    Mlp,
    applied,
    data,
    equal,
    planned,
    seeded,
    steps,
    thirds,
)

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2),
}


def silence(optimizer: torch.optim.Optimizer, model: nn.Module, plan: Any) -> None:
    """State of what the plan removes, set to zero."""
    kept = Kept(model, plan)
    for name, p in model.named_parameters():
        for dim in plan.cuts.get(name, {}):
            for tensor in optimizer.state.get(p, {}).values():
                if isinstance(tensor, Tensor) and tensor.shape == p.shape:
                    tensor.index_fill_(dim, kept.gone(name, dim), 0.0)


EXACT = {"sgd", "adam", "adamw foreach", "adamw fused", "rmsprop", "adagrad", "adamax", "nadam", "radam"}


@pytest.mark.parametrize("name", thirds(OPTIMIZERS))
def test_in_place_with_an_optimizer(name: str) -> None:
    """Training goes on as if the removed units had been silent."""
    model = seeded(Mlp)
    groups = [{"params": [*model.fc2.parameters()]}, {"params": [*model.fc1.parameters(), *model.fc3.parameters()]}]
    optimizer = OPTIMIZERS[name](groups if name not in ("lbfgs",) else model.parameters())
    x = data(5, 8)
    steps(model, optimizer, x)
    twin = copy.deepcopy((model, optimizer))
    plan = planned(model, x, granularity="neuron")
    identities = {n: id(p) for n, p in model.named_parameters()}
    cut = applied(plan, model, inplace=True, optimizer=optimizer)
    assert cut is model
    assert identities == {n: id(p) for n, p in model.named_parameters()}
    steps(model, optimizer, x)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    steps(model, optimizer, x, 1)
    if name in EXACT:
        other, its = twin
        truth = zeroed(other, Kept(other, plan))
        with torch.no_grad():
            for a, b in zip(other.parameters(), truth.parameters(), strict=True):
                a.copy_(b)
        silence(its, other, plan)
        steps(other, its, x)
        steps(other, its, x, 1)
        equal(other(data(7, 8)), model(data(7, 8)))


class OwnOptimizer(torch.optim.Optimizer):
    """State per row and per column, in lists and in nested mappings, as written by hand."""

    def __init__(self, parameters: Any, form: str) -> None:
        super().__init__(parameters, {"lr": 0.01})
        self.form = form

    def make(self, p: Tensor) -> dict[str, Any]:
        if self.form == "rows":
            return {"row": torch.ones(p.shape[0]), "column": torch.ones(p.shape[-1])}
        if self.form == "list":
            return {"moments": [torch.zeros_like(p), torch.zeros_like(p)]}
        if self.form == "nested":
            return {"slots": {"m": torch.zeros_like(p)}}
        if self.form == "flat":
            return {"m": torch.zeros(p.numel())}
        if self.form == "transposed":
            return {"m": torch.zeros_like(p.t()).contiguous() if p.dim() == 2 else torch.zeros_like(p)}
        return {"shape": tuple(p.shape), "m": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(self.make(p))
                g = p.grad
                if self.form == "rows" and p.dim() == 2:
                    state["row"].mul_(0.9).add_(g.square().mean(1))
                    state["column"].mul_(0.9).add_(g.square().mean(0))
                    g = g / (state["row"][:, None] * state["column"]).sqrt().clamp(min=1e-6)
                elif self.form == "list":
                    state["moments"][0].mul_(0.9).add_(g)
                    g = state["moments"][0]
                elif self.form == "nested":
                    g = state["slots"]["m"].mul_(0.9).add_(g)
                elif self.form == "flat":
                    g = state["m"].mul_(0.9).add_(g.flatten()).view(p.shape)
                elif self.form == "transposed" and p.dim() == 2:
                    g = state["m"].mul_(0.9).add_(g.t()).t()
                elif self.form == "shape":
                    g = state["m"].mul_(0.9).add_(g).view(state["shape"])
                p.sub_(g, alpha=group["lr"])


@pytest.mark.parametrize("form", thirds(["rows", "list", "nested", "flat", "transposed", "shape"], of=2))
def test_in_place_with_an_optimizer_of_ones_own(form: str) -> None:
    """State that cannot be cut is refused, not left behind to crash or to be misread at the next step."""
    model, x = seeded(Mlp), data(5, 8)
    optimizer = OwnOptimizer(model.parameters(), form)
    steps(model, optimizer, x)
    before, state = snapshot(model), copy.deepcopy(optimizer.state_dict())
    plan = planned(model, x, granularity="neuron")
    try:
        plan.apply(model, inplace=True, optimizer=optimizer)
    except SecateurError:
        assert snapshot(model) == before, "refused, and changed the model"
        assert same(state["state"], optimizer.state_dict()["state"]), "refused, and changed the optimizer"
        return
    steps(model, optimizer, x)


def test_in_place_with_averages_and_schedule() -> None:
    model, x = seeded(Convnet), data(4, 3, 8, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=20)
    ema = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    for _ in range(2):
        steps(model, optimizer, x, 1)
        schedule.step()
        ema.update_parameters(model)
    twin = copy.deepcopy(ema.module)
    plan = planned(model, x)
    applied(plan, model, inplace=True, optimizer=optimizer, ema=ema)
    equal(zeroed(twin, Kept(twin, plan)).eval()(data(3, 3, 12, 9)), ema.module.eval()(data(3, 3, 12, 9)))
    steps(model, optimizer, x, 1)
    schedule.step()
    ema.update_parameters(model)
    ema(x)


@pytest.mark.parametrize("kind", ["mapping", "copy"])
def test_in_place_with_other_averages(kind: str) -> None:
    model, x = seeded(Former), data(2, 6, 8)
    shadow = copy.deepcopy(model)
    with torch.no_grad():
        for p in shadow.parameters():
            p.mul_(1.05)
    ema: Any = {n: p.detach().clone() for n, p in shadow.named_parameters()} if kind == "mapping" else shadow
    plan = planned(model, x, granularity="head_dim")
    truth = zeroed(shadow, Kept(shadow, plan))
    try:
        plan.apply(model, inplace=True, ema=ema)
    except SecateurError:
        return
    result = ema if isinstance(ema, nn.Module) else copy.deepcopy(model)
    if isinstance(ema, dict):
        result.load_state_dict(ema, strict=True)
    equal(truth(data(3, 9, 8)), result(data(3, 9, 8)))


def test_refused_in_place_leaves_all_as_it_was() -> None:
    """A proof that fails in place changes nothing: neither model, nor optimizer, nor averages."""
    model, x = seeded(Mlp), data(5, 8)
    optimizer = torch.optim.Adam(model.parameters())
    steps(model, optimizer, x)
    plan = planned(model, x, granularity="neuron")
    other = seeded(Mlp)
    other.fc2 = nn.Linear(24, 20)
    other.fc3 = nn.Linear(20, 4)
    before, state = snapshot(other), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(SecateurError):
        plan.apply(other, inplace=True, optimizer=optimizer)
    assert snapshot(other) == before
    assert same(state["state"], optimizer.state_dict()["state"])
