"""Mutation check: rules are corrupted one at a time, and the certificate (or a crash) must notice.

A mutant is caught when cutting random units of some micro-model ends in an error. One that only makes the engine more
cautious cannot be: its cuts are right. So the cuts of a mutant that was not caught are held against the sound engine:
if every one of them is a choice of units that the sound engine offers too, the mutant is "cautious", else it survived.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from harness import STRUCTURED, enliven
from micro import CASES
from mutants import MUTATIONS, Mutant, corrupted, rule_of
from torch import nn

from secateur.kinds.slices.certify import certify
from secateur.kinds.slices.cut import cut_copy
from secateur.structure.attributes import edits
from secateur.structure.axes import kept, unit_index
from secateur.structure.capture import capture
from secateur.structure.groups import Structure, structure

MODELS_PER_MUTANT = 8


@cache
def prepared(name: str) -> tuple[nn.Module, Any, tuple[Any, ...], frozenset[str], Structure]:
    """Model, example, what the sound engine finds (signature), the rules that take part, and its structure."""
    torch.manual_seed(0)
    model, example = enliven(CASES[name].build()), CASES[name].example()
    record = capture(model, example)
    rules = frozenset(rule.__name__ for step in record.steps if (rule := rule_of(step.func)) is not None)
    found = structure(model, record)
    return model, example, signature(found), rules, found


def signature(found: Structure) -> tuple[Any, ...]:
    free = [g for g in found.groups if not g.locks]
    return tuple(
        sorted((s.tensor, s.index.numpy().tobytes(), g.size) for g in free for s in g.spans if s.index is not None)
    )


def trial(name: str) -> tuple[bool, bool]:
    """Cut random units; whether the engine found the same as when sound, and whether the sound one offers this cut."""
    model, example, sound, _, offered = prepared(name)
    record = capture(model, example)
    found = structure(model, record)
    rng = np.random.default_rng(3)
    masks, free = {}, [g for g in found.groups if not g.locks and g.granularity in STRUCTURED]
    for group in free:
        step = int(group.attributes.get("multiple", 1))
        stays = np.zeros(group.size, bool)
        stays[rng.permutation(group.size)[: max(1, -(-(group.size * 6 // 10) // step)) * step]] = True
        masks[found.atoms[group.name].id] = stays
    counts = {i: int(mask.sum()) for i, mask in masks.items()}
    cuts: dict[str, dict[int, torch.Tensor]] = {}
    for tensor, axes in found.tensors.items():
        for d, axis in enumerate(axes):
            if not kept(axis, masks).all():
                cuts.setdefault(tensor, {})[d] = torch.from_numpy(np.flatnonzero(kept(axis, masks)))
    certify(model, cut_copy(model, cuts, edits(model, record, counts)), example, record, masks)
    return signature(found) == sound, offers(offered, cuts)


def offers(found: Structure, cuts: dict[str, dict[int, torch.Tensor]]) -> bool:
    """Whether some choice of free units of a structure makes exactly these cuts."""
    wanted = {}
    for name, axes in found.tensors.items():
        for d, axis in enumerate(axes):
            mask = np.ones(axis.size, bool)
            if d in cuts.get(name, {}):
                mask = np.isin(np.arange(axis.size), cuts[name][d].numpy())
            wanted[name, d] = mask
    keep: dict[int, np.ndarray] = {}
    for group in found.groups:
        atom = found.atoms[group.name]
        stays = np.ones(atom.size, bool)
        for (name, d), mask in wanted.items():
            for index in unit_index(found.tensors[name][d], atom):
                gone = [u for u in range(atom.size) if (index == u).any() and not mask[index == u].any()]
                stays[gone] = False
        if not group.locks:
            keep[atom.id] = stays
    return all((kept(found.tensors[name][d], keep) == mask).all() for (name, d), mask in wanted.items())


def judge(mutant: Mutant, names: Iterable[str]) -> str:
    """ "caught", "survived", "cautious", "same" (changes nothing that can be seen) or "idle" (never applies)."""
    rank = sorted((n for n in names if mutant.rule in prepared(n)[3]), key=lambda n: len(prepared(n)[3]))
    changed, wrong = False, False
    with corrupted(mutant), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tried = 0
        for name in rank:
            before = mutant.hits
            try:
                same, offered = trial(name)
            except Exception:
                return "caught"
            if mutant.hits > before:
                tried += 1
                changed, wrong = changed or not same, wrong or not offered
                mutant.models += [] if offered else [name]
            if tried >= MODELS_PER_MUTANT and (changed or tried >= 3 * MODELS_PER_MUTANT):
                break
    if not mutant.hits:
        return "idle"
    return "survived" if wrong else "cautious" if changed else "same"


def run(rules: Iterable[str], names: Iterable[str]) -> dict[str, list[Mutant]]:
    verdicts: dict[str, list[Mutant]] = {k: [] for k in ("caught", "survived", "cautious", "same", "idle")}
    for rule in rules:
        for kind in MUTATIONS:
            mutant = Mutant(rule, kind)
            verdicts[judge(mutant, names)].append(mutant)
    return verdicts


def all_rules() -> list[str]:
    return sorted({rule for name in CASES for rule in prepared(name)[3]})


@pytest.mark.slow
def test_corruptions_of_the_main_rules_are_caught() -> None:
    names = ["ResidualBlock", "GroupedConvolution", "Concat", "transposed", "group_norms", "SeparateAttention", "Dense"]
    verdicts = run(["convolution", "cat", "group_norm", "bmm", "batch_norm"], names)
    assert len(verdicts["caught"]) >= 20
    assert [m.name for m in verdicts["survived"]] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_at_least_95_percent_of_all_corruptions_are_caught(capsys: pytest.CaptureFixture[str]) -> None:
    verdicts = run(all_rules(), CASES)
    caught, survived = len(verdicts["caught"]), len(verdicts["survived"])
    figure = caught / (caught + survived)
    with capsys.disabled():
        print(f"\nmutation: {caught} caught, {survived} survived: {figure:.1%};", end=" ")
        print(f"{len(verdicts['cautious'])} only more cautious, {len(verdicts['same'])} change nothing")
        for mutant in verdicts["survived"]:
            print("  survived:", mutant.name, "in", ", ".join(mutant.models[:4]))
    assert figure >= 0.95
