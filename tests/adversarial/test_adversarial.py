"""No model may be cut wrongly under a green certificate: right, locked, refused in words, or told as a condition."""

from __future__ import annotations

import pytest

from .families import all_cases
from .harness import GOOD, judge

CASES = all_cases()


@pytest.mark.sampled(28)
@pytest.mark.parametrize("name", CASES)
def test_right_or_refused(name: str) -> None:
    verdict, _ = judge(CASES[name])
    assert verdict.outcome in GOOD, f"{verdict.outcome} ({verdict.kind}): {verdict.why}"


def test_the_suite_is_large_and_wide() -> None:
    assert len(CASES) >= 250
    assert len({case.family for case in CASES.values()}) >= 12
