"""The judge itself: it has to see wrong cuts of every kind, and to let right ones pass."""

from __future__ import annotations

import copy
import linecache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from .cases import ROWS, Case, floats
from .harness import CRASH, RIGHT, TOLD, WRONG, build, compare
from .nets import Mid


def case(**options: Any) -> Case:
    return Case("self", "case", Mid, tuple(floats(*ROWS)), **options)


def cut(model: nn.Module, keep: torch.Tensor, read: torch.Tensor) -> nn.Module:
    """Rows `keep` of the first layer, columns `read` of the second."""
    result = copy.deepcopy(model)
    with torch.no_grad():
        result.fc1.weight = nn.Parameter(model.fc1.weight[keep])
        result.fc1.bias = nn.Parameter(model.fc1.bias[keep])
        result.fc2.weight = nn.Parameter(model.fc2.weight[:, read])
    return result


def plan(keep: torch.Tensor) -> Any:
    cuts = {"fc1.weight": {0: keep}, "fc1.bias": {0: keep}, "fc2.weight": {1: keep}}
    return SimpleNamespace(cuts=cuts, groups={}, layers={}, explain=lambda: "")


KEEP = torch.tensor([0, 3, 4, 7, 9, 15, 20])


def test_a_right_cut_is_right() -> None:
    model = build(case())
    assert compare(case(), "channel", model, plan(KEEP), cut(model, KEEP, KEEP)).outcome == RIGHT


@pytest.mark.parametrize("read", [KEEP.flip(0), KEEP - KEEP.min() + 1, KEEP.roll(1)], ids=["flipped", "next", "rolled"])
def test_other_units_are_seen(read: torch.Tensor) -> None:
    model = build(case())
    assert compare(case(), "channel", model, plan(KEEP), cut(model, KEEP, read)).outcome == WRONG


def test_a_cut_that_does_not_run_is_seen() -> None:
    model = build(case())
    assert compare(case(), "channel", model, plan(KEEP), cut(model, KEEP, KEEP[:-1])).outcome == CRASH


def test_a_cut_that_fails_in_train_mode_alone_is_seen() -> None:
    model = build(case())
    small = cut(model, KEEP, KEEP)
    small.register_forward_hook(lambda m, i, o: o * 1.01 if m.training else o)
    verdict = compare(case(), "channel", model, plan(KEEP), small)
    assert verdict.outcome == WRONG
    assert "train mode" in verdict.why


def test_a_cut_that_fails_on_other_batches_alone_is_seen() -> None:
    model = build(case())
    small = cut(model, KEEP, KEEP)
    small.register_forward_hook(lambda m, i, o: o.flip(1) if len(o) == 9 else o)
    verdict = compare(case(), "channel", model, plan(KEEP), small)
    assert verdict.outcome == WRONG
    assert "[input 2]" in verdict.why


def test_state_left_by_a_trial_run_is_seen() -> None:
    class Counts(Mid):
        calls = 0

        def mid(self, h: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return h * self.calls

    one = Case("self", "counts", Counts, tuple(floats(*ROWS)))
    model = build(one)
    small = cut(model, KEEP, KEEP)
    assert compare(one, "channel", model, plan(KEEP), small).outcome == RIGHT
    small(one.inputs[0]())
    assert compare(one, "channel", model, plan(KEEP), small).outcome == WRONG


def test_parameters_that_gradients_no_longer_reach_are_seen() -> None:
    model = build(case())
    small = cut(model, KEEP, KEEP)
    small.fc1.bias.requires_grad_(False)
    verdict = compare(case(), "channel", model, plan(KEEP), small)
    assert verdict.outcome == WRONG
    assert "fc1.bias" in verdict.why


def test_data_that_lost_a_part_is_seen() -> None:
    model = build(case())
    verdict = compare(case(whole=("fc1.weight:0",)), "channel", model, plan(KEEP), cut(model, KEEP, KEEP))
    assert verdict.outcome == WRONG


def test_noise_is_held_when_the_case_says_so() -> None:
    class Noisy(Mid):
        def noise(self, h: torch.Tensor) -> torch.Tensor:
            return torch.randn_like(h)

        def mid(self, h: torch.Tensor) -> torch.Tensor:
            return h + self.noise(h)

    for still, outcome in (((), WRONG), (("noise",), RIGHT)):
        one = Case("self", "noisy", Noisy, tuple(floats(*ROWS)), still=still)
        model = build(one)
        assert compare(one, "channel", model, plan(KEEP), cut(model, KEEP, KEEP)).outcome == outcome


class Noisy(Mid):
    """Draws as many numbers as there are units."""

    def noise(self, h: torch.Tensor) -> torch.Tensor:
        return torch.rand_like(h)

    def mid(self, h: torch.Tensor) -> torch.Tensor:
        return h + self.noise(h)


def said(keep: torch.Tensor, words: str) -> Any:
    return SimpleNamespace(**{**vars(plan(keep)), "explain": lambda: words})


def test_chance_that_is_told_excuses_no_other_difference() -> None:
    noisy = Case("harness_self", "noisy", Noisy, tuple(floats(*ROWS)), chance="noise", condition="Draws as many")
    here = Path(__file__).with_name("family_harness_self.py")
    words = f"numbers drawn at random were held at fixed values: rand_like at {here.name}:1"
    model = build(noisy)
    small = cut(model, KEEP, KEEP)
    wrong = cut(model, KEEP, KEEP.flip(0))
    line = '"""Draws as many numbers as there are units."""\n'
    linecache.cache[str(here)] = (len(line), None, [line], str(here))
    try:
        assert compare(noisy, "channel", model, said(KEEP, words), small).outcome == TOLD
        assert compare(noisy, "channel", model, said(KEEP, words), wrong).outcome == WRONG
        assert compare(noisy, "channel", model, said(KEEP, f"condition: {here.name}:1"), small).outcome == WRONG
        assert compare(noisy, "channel", model, plan(KEEP), small).outcome == WRONG
    finally:
        del linecache.cache[str(here)]
