"""Settings around the calls, several examples, masks before cuts, averages, saved results."""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import secateur as sc
from secateur.errors import SecateurError

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

AROUND: dict[str, Callable[[], Any]] = {
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default device meta": lambda: torch.device("meta"),
    "anomaly": torch.autograd.detect_anomaly,
    "saved tensors": lambda: torch.autograd.graph.save_on_cpu(),
    "graph break": lambda: torch.autograd.set_multithreading_enabled(False),
}


@pytest.mark.parametrize(("net", "name"), thirds([(net, name) for name in AROUND for net in ("conv", "former")], of=4))
def test_planned_and_applied_under(net: str, name: str) -> None:
    build, shape = (Convnet, (2, 3, 8, 8)) if net == "conv" else (Former, (2, 6, 8))
    model, x = seeded(build), data(*shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with AROUND[name]():
            plan = planned(model, x, **({"granularity": "head_dim"} if net == "former" else {}))
            cut = applied(plan, model)
    assert not any(p.is_inference() for p in cut.parameters())
    equal(zeroed(model, Kept(model, plan))(x), cut(x))
    if net == "conv":
        steps(cut, torch.optim.SGD(cut.parameters(), 0.01), x)


def test_default_dtype_of_double() -> None:
    model, x = seeded(Former), data(2, 6, 8)
    torch.set_default_dtype(torch.float64)
    try:
        plan = planned(model, x, granularity="head_dim")
        cut = applied(plan, model)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in cut.parameters()} == {torch.float32}
    equal(zeroed(model, Kept(model, plan))(x), cut(x))


class Branchy(Mlp):
    """Long inputs take another path, and the example list shows both."""

    def forward(self, x: Tensor, far: bool = False) -> Tensor:
        h = self.fc1(x).relu()
        if len(x) > 16 or far:
            h = h * torch.linspace(0.5, 2, h.shape[-1])
        return self.fc3(self.fc2(h).relu())


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("second", ["long", "keyword"])
def test_examples_show_both_paths(second: str, order: int) -> None:
    model = seeded(Branchy)
    other: Any = data(20, 8) if second == "long" else (data(5, 8), True)
    examples: list[Any] = [data(5, 8), other]
    plan = planned(model, None, examples=examples[::-1] if order else examples, granularity="channel")
    cut, truth = applied(plan, model), zeroed(model, Kept(model, plan))
    for x in (data(7, 8), data(30, 8), data(20, 8)):
        equal(truth(x), cut(x))
    equal(truth(data(5, 8), True), cut(data(5, 8), True))


def test_masked_then_cut_then_trained() -> None:
    """Masks held by an optimizer, a cut in place, and the hold goes on (or is refused)."""
    model, x = seeded(Mlp), data(5, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    masks = sc.select(sc.score(model, granularity="element"), sparsity=0.5)
    handle = sc.mask_model(model, masks)
    handle.hold(optimizer)
    steps(model, optimizer, x)
    plan = planned(model, x, granularity="neuron")
    truth = zeroed(model, Kept(model, plan))
    try:
        plan.apply(model, inplace=True, optimizer=optimizer)
    except SecateurError:
        return
    equal(truth(data(7, 8)), model(data(7, 8)))
    zeros = {n: p == 0 for n, p in model.named_parameters() if p.dim() == 2}
    try:
        steps(model, optimizer, x)
        handle.enforce()
    except SecateurError:
        return
    for n, p in model.named_parameters():
        if n in zeros:
            assert bool((p[zeros[n]] == 0).all()), "masks were lost by the cut, without a word"


@pytest.mark.parametrize("after", ["remove", "state_dict"])
def test_a_handle_after_the_cut(after: str) -> None:
    model, x = seeded(Mlp), data(5, 8)
    handle = sc.mask_model(model, sc.select(sc.score(model, granularity="element"), sparsity=0.5))
    plan = planned(model, x, granularity="neuron")
    applied(plan, model, inplace=True)
    with contextlib.suppress(SecateurError):
        handle.remove() if after == "remove" else handle.load_state_dict(handle.state_dict())
    model(x)


def test_scales_follow_is_said() -> None:
    model, x = seeded(Former), data(2, 6, 8)
    plan = planned(model, x, granularity="head_dim", scales="follow")
    cut = applied(plan, model)
    truth = zeroed(model, Kept(model, plan))
    try:
        equal(truth(data(3, 9, 8)), cut(data(3, 9, 8)))
    except Exception:
        assert "scale" in plan.explain().lower()


@pytest.mark.parametrize("form", ["mapping", "module"])
@pytest.mark.parametrize("kind", thirds(["head_dim", "channel", "head", "layer"], of=4))
def test_averages_follow(form: str, kind: str) -> None:
    model, x = seeded(Former), data(2, 6, 8)
    shadow = copy.deepcopy(model)
    with torch.no_grad():
        for p in shadow.parameters():
            p.mul_(1.05)
    averaged = torch.optim.swa_utils.AveragedModel(shadow)
    ema: Any = {n: p.detach().clone() for n, p in shadow.named_parameters()} if form == "mapping" else averaged
    options: dict[str, Any] = {"granularity": kind}
    if kind == "layer":
        options |= {"criterion": "magnitude", "scope": "global"}
    plan = planned(model, x, **options)
    truth = zeroed(shadow, Kept(shadow, plan))
    applied(plan, model, inplace=True, ema=ema)
    result = ema.module if form == "module" else copy.deepcopy(model)
    if form == "mapping":
        result.load_state_dict(ema, strict=True)
    equal(truth(data(3, 9, 8)), result(data(3, 9, 8)))


@pytest.mark.parametrize("kind", thirds(["head_dim", "channel", "head", "layer", "element"], of=5))
def test_result_is_saved_and_loaded(kind: str, tmp_path: Any) -> None:
    model, x = seeded(Former), data(2, 6, 8)
    options: dict[str, Any] = {"granularity": kind, "target": {"sparsity": 0.3}}
    if kind != "layer":
        options["criterion"] = "magnitude"
    recipe = {"target": {"sparsity": 0.3}, "measure": {"latency": False, "quality": False}}
    try:
        result = sc.prune(model, x, recipe=recipe, **options)
    except SecateurError as error:
        pytest.skip(str(error))
    result.save(tmp_path / "out")
    loaded = sc.load(tmp_path / "out", model=seeded(Former))
    equal(result.model(data(3, 9, 8)), loaded(data(3, 9, 8)))


def test_an_edited_plan_is_found_out() -> None:
    model, x = seeded(Former), data(2, 6, 8)
    plan = planned(model, x, granularity="head_dim")
    plan.certify()
    text = json.loads(plan.to_json())
    scales = text.get("scales")
    assert scales, "a width sets a scale here"
    for scale in scales if isinstance(scales, list) else scales.values():
        for key, value in list(scale.items()):
            if isinstance(value, float):
                scale[key] = value * 2
    try:
        edited = sc.Plan.from_data(text)
        cut = edited.apply(seeded(Former), example=x)
    except SecateurError:
        return
    equal(zeroed(model, Kept(model, edited))(x), cut(x))
