"""Random networks: a cut of random units equals its replay, and equals zeroing wherever that is exact."""

from __future__ import annotations

import pytest
import torch
from harness import Expect, check, enliven
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_networks import networks
from torch import Tensor, nn

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def picture() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def hold(drawn: tuple[nn.Module, bool], seed: int, ratio: float) -> None:
    net, zeroing = drawn
    check(enliven(net), picture(), seed=seed, ratio=ratio, expect=Expect(zeroing=zeroing, double=seed % 4 == 0))


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=SLOW)
@given(networks(), st.integers(0, 9), st.sampled_from([0.2, 0.5, 0.8]))
def test_random_networks(drawn: tuple[nn.Module, bool], seed: int, ratio: float) -> None:
    hold(drawn, seed, ratio)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@settings(max_examples=400, deadline=None, suppress_health_check=SLOW)
@given(networks(size=12), st.integers(0, 99), st.sampled_from([0.2, 0.5, 0.8]))
def test_many_larger_random_networks(drawn: tuple[nn.Module, bool], seed: int, ratio: float) -> None:
    hold(drawn, seed, ratio)
