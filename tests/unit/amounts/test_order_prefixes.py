"""The ordered list of removals: what a prefix of it leaves of every group."""

from __future__ import annotations

import numpy as np
import torch

from secateur.amounts.order import RemovalOrder, removal_order


def _by_hand(order: RemovalOrder, removals: int) -> dict[str, list[bool]]:
    """Walk the list one removal at a time, then give back the last ones where counts are rounded up."""
    gone: dict[str, list[int]] = {name: [] for name in order.names}
    for group, unit in zip(order.group[:removals], order.unit[:removals], strict=True):
        gone[order.names[group]].append(int(unit))
    found = {}
    for name, size, step in zip(order.names, order.sizes.tolist(), order.round_to.tolist(), strict=True):
        while gone[name] and (size - len(gone[name])) % step:
            gone[name].pop()
        found[name] = [unit not in gone[name] for unit in range(size)]
    return found


def test_every_prefix_keeps_what_a_walk_along_the_list_leaves():
    generator = np.random.default_rng(0)
    for scope in ("global", "local"):
        sizes = {"a": 7, "b": 1, "c": 12, "d": 5}
        scores = {name: torch.from_numpy(generator.integers(0, 5, n)).float() for name, n in sizes.items()}  # with ties
        order = removal_order(scores, scope=scope, min_keep={"a": 2, "d": 0}, round_to={"a": 3, "c": 4})
        for removals in range(len(order.group) + 1):
            kept = order.keep(removals)
            assert {name: mask.tolist() for name, mask in kept.items()} == _by_hand(order, removals)
            assert order.kept_counts(removals) == {name: int(mask.sum()) for name, mask in kept.items()}
