"""Every micro-model, saved after its cut, gives the same outputs when another process rebuilds and loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fresh import load_all_elsewhere, main
from harness import enliven
from micro import CASES
from torch import nn


def build(name: str, seed: int) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    model = enliven(CASES[name].build()).eval()
    torch.manual_seed(0)  # some examples draw from the global generator
    return model, CASES[name].example()


@pytest.mark.parametrize("every", [12, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_micro_models_load_in_a_fresh_process(every: int, tmp_path: Path) -> None:
    names = sorted(CASES)[::every]
    assert load_all_elsewhere(names, build, tmp_path, __file__) > 0.9 * len(names)


if __name__ == "__main__":
    main(build)
