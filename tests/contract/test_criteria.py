"""Every registered criterion keeps the contract; every check catches somebody who breaks it."""

import random
import re
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from secateur.criteria import Criterion, Magnitude, get, names
from secateur.criteria.base import CRITERIA
from secateur.errors import NonFiniteError
from secateur.testing import CHECKS, check_criterion

BY_NAME = {check.name: check for check in CHECKS}


@pytest.mark.sampled(17)
@pytest.mark.parametrize("check", CHECKS, ids=str)
@pytest.mark.parametrize("name", names())
def test_contract(name, check):
    check(lambda: get(name))


@dataclass(frozen=True, kw_only=True)
class Careless(Magnitude):
    """A criterion with one fault."""

    fault: Callable = field(default=lambda context, scores: scores)

    def _score(self, context):
        scores = super()._score(context)
        return self.fault(context, scores)

    def options(self):
        return {**super().options()}


def each(change):
    return lambda context, scores: {name: change(score) for name, score in scores.items()}


def noise(score):
    return score + torch.rand(
        score.shape, generator=torch.Generator().manual_seed(random.SystemRandom().getrandbits(32))
    )


def write(context, scores):
    next(context.model.parameters()).data.add_(1)
    return scores


def by_mode(context, scores):
    return {name: score + float(context.model.training) for name, score in scores.items()}


def freeze(context, scores):
    return scores if next(context.model.parameters()).requires_grad else {n: s * 0 for n, s in scores.items()}


def by_position(context, scores):
    return {n: s + torch.arange(s.numel()).view(s.shape) for n, s in scores.items()}


def by_layout(context, scores):
    strided = not next(context.model.parameters()).is_contiguous()
    return {n: s * (3 if strided else 1) + (s.flatten()[0] if strided else 0) for n, s in scores.items()}


def leak(context, scores):
    return {
        g.name: context.model.get_parameter(g.spans[0].tensor) if g.spans[0].index is None else scores[g.name]
        for g in context.groups
    }


def by_buffers(context, scores):
    return {n: s + len(list(context.model.buffers())) for n, s in scores.items()}


FAULTS = {
    "buffers beside the weights do not count": by_buffers,
    "the same seed gives the same bits": each(noise),
    "scores are finite": each(lambda s: s / 0),
    "scores have the shape of the group": each(lambda s: s.flatten()[:1]),
    "weights keep their bits": write,
    "reordered units keep their scores": by_position,
    "nothing scores below a unit of zeros": each(lambda s: -s),
    "frozen parameters are scored or refused, never guessed": freeze,
    "non-contiguous weights score the same": by_layout,
    "scores share no memory with the model": leak,
    "float64 models score as float32 ones": lambda c, s: {
        n: v * (2 if next(c.model.parameters()).dtype == torch.float64 else 1) for n, v in s.items()
    },
}


@pytest.mark.parametrize("name", FAULTS)
def test_checks_catch_the_fault(name):
    with pytest.raises((AssertionError, NonFiniteError, TypeError)):
        BY_NAME[name](lambda: Careless(fault=FAULTS[name]))


class Vandal(Magnitude):
    """Undoes what the base class restores, by not using it."""

    def score(self, context):
        model = context.model
        for module in model.modules():
            module.training = True
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
            parameter.requires_grad_(True)
        next(model.children()).register_forward_hook(lambda *_: None)
        next(model.buffers()).add_(1)
        random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
        return {g.name: torch.zeros(g.shape, dtype=torch.float64) for g in context.groups} | {"extra": torch.zeros(1)}


@pytest.mark.parametrize(
    "name",
    [
        "training flags are restored one by one",
        "gradients are left alone",
        "hooks are left alone and none stays behind",
        "random states are restored",
        "buffers keep their bits, also in train mode",
        "parameters keep their identity and requires_grad",
        "scores are float32",
        "every group gets one score and nothing else does",
        "no groups give no scores",
        "NaN in a weight is refused by name and index",
        "Inf in a weight is refused by name and index",
        "an unknown tensor is refused",
    ],
)
def test_checks_catch_the_vandal(name):
    with pytest.raises(AssertionError):
        BY_NAME[name](Vandal)


def test_all_failures_are_named_together():
    with pytest.raises(AssertionError, match="checks fail") as caught:
        check_criterion(Vandal)
    assert "gradients are left alone" in str(caught.value)
    assert "scores are float32" in str(caught.value)


def test_a_criterion_without_a_scene_is_not_passed_silently():
    class Heads(Magnitude):
        granularities = ("head",)

    with pytest.raises(AssertionError, match="pass make_scene"):
        check_criterion(Heads)


def test_the_base_class_is_abstract_in_effect():
    with pytest.raises(TypeError, match="neither"):
        Criterion().contributions(None)


@pytest.mark.parametrize("page", ["docs/how-to/write-a-criterion.md", "docs/reference/granularities.md"])
def test_code_of_the_documentation_runs(page):
    text = (Path(__file__).parents[2] / page).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    module = types.ModuleType("documentation")
    sys.modules["documentation"] = module
    try:
        for block in blocks:
            exec(compile(block, page, "exec"), module.__dict__)
    finally:
        del sys.modules["documentation"]
        CRITERIA.remove("relative_magnitude")
