"""Plans made in low precision or under autocast: the tolerance there must not hide a cut that float32 finds wrong."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.errors import SecateurError

from .cases import Case
from .families import all_cases
from .harness import RIGHT, build, compare
from .references import Kept
from .usages import thirds

CASES = {
    name: case
    for name, case in all_cases().items()
    if case.family in ("attention", "caches", "parts", "positions", "whole") and not case.condition
}
MODES = ("autocast", "bfloat16", "half")


def lowered(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(lowered(v, dtype) for v in value)
    return {k: lowered(v, dtype) for k, v in value.items()} if isinstance(value, dict) else value


def judged(case: Case, kind: str, mode: str) -> tuple[str, str]:
    """The plan is made low; what it says is done to the same weights in float32 and compared there."""
    model, example = build(case), case.inputs[0]()
    low = copy.deepcopy(model)
    if mode != "autocast":
        dtype = torch.bfloat16 if mode == "bfloat16" else torch.half
        low, example = low.to(dtype), lowered(example, dtype)
    try:
        low(*(copy.deepcopy(example) if isinstance(example, tuple) else (copy.deepcopy(example),)))
    except Exception as error:
        return "not taken", str(error)
    options: dict[str, Any] = {"scope": "local", "criterion": {"name": "random"}, "target": {"sparsity": 0.3}}
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
            plan = sc.plan(low, example, granularity=kind, **options)
            cut = plan.apply(low)
    except SecateurError as error:
        return ("internal" if "please report" in str(error).lower() else "refused"), " ".join(str(error).split())
    if mode != "autocast":
        rounded, cut = cut.float(), plan.edit.copy(low.float())  # a factor is rounded in weights of low precision
        with torch.no_grad():
            for (name, a), b in zip(cut.named_parameters(), rounded.parameters(), strict=True):
                assert (a - b).abs().max() <= torch.finfo(dtype).eps * a.abs().max(), name
        model = low
    verdict = compare(case, kind, model, plan, cut)
    return verdict.outcome, verdict.why


PAIRS = [(n, k, m) for n, c in CASES.items() for k in c.kinds if k in ("head_dim", "channel", "head") for m in MODES]
HEAD_DIM = [p for p in PAIRS if p[1] == "head_dim"]


@pytest.mark.parametrize(("name", "kind", "mode"), thirds(HEAD_DIM, of=10))
def test_low_precision(name: str, kind: str, mode: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome, why = judged(CASES[name], kind, mode)
        if outcome not in (RIGHT, "not taken", "refused", "told"):
            case = CASES[name]
            model, example = build(case), case.inputs[0]()
            try:  # where float32 is as wrong, or the truth is, this says nothing about precision
                plan = sc.plan(
                    model,
                    example,
                    granularity=kind,
                    scope="local",
                    criterion={"name": "random"},
                    target={"sparsity": 0.3},
                )
                plain = compare(case, kind, model, plan, plan.apply(model)).outcome
            except SecateurError:
                plain = RIGHT
            assert plain != RIGHT, f"{outcome}: {why}"


class InnerAutocast(nn.Module):
    """Attention in bfloat16 inside a float32 model, over one by the root of its width."""

    def __init__(self, enabled: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8 if i < 3 else 24, 24 if i < 3 else 3) for i in range(4))
        self.enabled = enabled

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.enabled):
            q, k, v = (p(x).unflatten(-1, (4, 6)).transpose(1, 2) for p in (self.q, self.k, self.v))
            a = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
            y = (a @ v).transpose(1, 2).flatten(2)
        return self.o(y.float())


def test_autocast_inside_the_model() -> None:
    from .references import zeroed
    from .usages import data, equal, planned, seeded

    model, x = seeded(InnerAutocast), 3 * data(2, 6, 8)
    plan = planned(model, x, granularity="head_dim")
    cut = plan.apply(model)
    truth = zeroed(model, Kept(model, plan))
    truth.enabled = cut.enabled = False
    equal(truth(x), cut(x))
