"""Settings shared by all tests."""

from __future__ import annotations

import gc
from collections import Counter

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# On a busy machine any case may take a second; a test that hangs is ended by its own timeout.
settings.register_profile("secateur", deadline=None)
settings.load_profile("secateur")

BETWEEN = 100
_ran = 0


def pytest_runtest_teardown() -> None:
    """Modules come in one by one, a million objects in the end; no full collection goes through them again."""
    global _ran
    _ran += 1
    if _ran % BETWEEN == 0:
        gc.collect()
        gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a table of cases that is marked ``sampled(n)`` `make test` runs every n-th, `make test-all` all of them."""
    cases: Counter[str] = Counter()
    for item in items:
        marker = item.get_closest_marker("sampled")
        if marker is not None:
            table = item.nodeid.partition("[")[0]
            if cases[table] % marker.args[0]:
                item.add_marker(pytest.mark.slow)
            cases[table] += 1
