"""Every micro-model behaves as its author would expect: which groups are free, why others stay, and exact cuts."""

from __future__ import annotations

import pytest
import torch
from harness import check, enliven
from micro import CASES


@pytest.mark.sampled(4)
@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", sorted(CASES))
def test_author_expects(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = enliven(case.build())
    check(model, case.example(), expect=case.expect)
