"""Prices after a cut: right whatever was asked before, and asked anew only where something changed."""

from __future__ import annotations

from math import prod

import numpy as np
import torch
from torch import nn

from secateur.structure import cost
from secateur.structure.axes import Space, concat, kept, leaves, product
from secateur.structure.capture import capture
from secateur.structure.cost import CostModel, PricedSum
from secateur.structure.groups import structure
from secateur.structure.view import look


def _random_sum(generator):
    """Atoms, and terms over products and concatenations of them."""
    space = Space()
    atoms = [space.fresh(int(n)) for n in generator.integers(2, 6, 6)]
    axes = [*atoms, product(atoms[:2]), product([atoms[2], atoms[2]]), concat([atoms[0], product(atoms[1:3])])]
    terms = []
    for _ in range(12):
        chosen = generator.integers(0, len(axes), int(generator.integers(1, 4)))
        terms.append((tuple(axes[i] for i in chosen), int(generator.integers(1, 4))))
    return space, atoms, terms


def _written_out(terms, counts):
    """The sum with every dimension written out as a mask: no sizes are computed from counts."""
    keep = {}
    for axes, _ in terms:
        for axis in axes:
            for atom in leaves(axis):
                if atom.id in counts:
                    keep[atom.id] = np.arange(atom.size) < counts[atom.id]
    return sum(weight * prod(int(kept(axis, keep).sum()) for axis in axes) for axes, weight in terms)


def test_a_price_does_not_depend_on_what_was_asked_before():
    generator = np.random.default_rng(0)
    for _ in range(10):
        space, atoms, terms = _random_sum(generator)
        priced = PricedSum(terms, space, fixed=7)
        for _ in range(20):
            chosen = [a for a in atoms if generator.random() < 0.5]
            counts = {a.id: int(generator.integers(0, a.size + 1)) for a in chosen}
            assert priced.value(counts) == 7 + _written_out(terms, counts)


def test_atoms_that_are_united_later_are_priced_together():
    space = Space()
    a, b = space.fresh(4), space.fresh(4)
    priced = PricedSum([((a,), 1), ((b,), 10)], space)
    assert priced.value({a.id: 1}) == 41
    space.unify(a, b)
    assert priced.value({a.id: 1}) == 11


class Deep(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6)) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_what_a_view_says_of_each_group_is_what_would_go():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(1), nn.Linear(16, 2))
    found = look(model.eval(), torch.randn(1, 3, 4, 4))
    # 4 x 27 weights and 4 biases, 4 scales and shifts of the norm, 2 x 16 columns
    assert found.weights["0"] == 4 * 27 + 4 + 2 * 4 + 2 * 16
    assert found.params == 4 * 27 + 4 + 2 * 4 + 2 * 16 + 2


def _sizings(monkeypatch, work):
    asked = []
    monkeypatch.setattr(
        cost, "size_after", lambda axis, counts, real=cost.size_after: asked.append(1) or real(axis, counts)
    )
    work()
    monkeypatch.undo()
    return len(asked)


def test_work_for_a_view_grows_with_depth_and_not_with_its_square(monkeypatch):
    x, shallow, deep = torch.randn(1, 6), Deep(4).eval(), Deep(16).eval()
    few, many = _sizings(monkeypatch, lambda: look(shallow, x)), _sizings(monkeypatch, lambda: look(deep, x))
    assert many <= 4 * few + 8


def test_a_search_sizes_only_what_changed(monkeypatch):
    model, x = Deep(12).eval(), torch.randn(1, 6)
    trace = capture(model, x)
    found = structure(model, trace)
    prices = CostModel(model, trace)
    atoms = [found.atoms[g.name].id for g in found.groups if not g.locks]
    assert len(atoms) == 12
    counts = dict.fromkeys(atoms, 4)
    prices.macs(counts)
    changed = {**counts, atoms[5]: 3}
    assert _sizings(monkeypatch, lambda: prices.macs(changed)) == 1  # both products hold the one dimension
    assert prices.macs(changed) == (11 * 4 + 3) * 2 * 6
