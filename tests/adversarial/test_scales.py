"""A scale by a width is refused also where something of the same size is averaged elsewhere in the model."""

from __future__ import annotations

import pytest

from .cases import CASES
from .families import all_cases
from .harness import LOCKED, REFUSED, judge, needless

NAMES = [name for name in all_cases() if name.startswith("scales/")]


@pytest.mark.parametrize("name", NAMES)
def test_a_sum_elsewhere_excuses_no_scale(name: str) -> None:
    case = CASES[name]
    verdict, tries = judge(case)
    if case.right:
        assert not needless(case, tries), verdict
    else:
        assert verdict.outcome in (LOCKED, REFUSED), verdict
