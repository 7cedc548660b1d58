import pytest
import torch
from mixtures import H


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(32, H)
