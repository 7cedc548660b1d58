import pytest
import torch

from secateur.measure import staircase, width_grid


@pytest.mark.parametrize("block", [1, 4, 16, 32])
def test_the_grid_is_the_block_size_of_the_kernel(monkeypatch, block):
    """A machine whose products take as long as the next full block of columns."""
    now = [0.0]

    def product(left, right):
        now[0] += -(-right.shape[1] // block) * block * 1e-6
        return right

    monkeypatch.setattr(torch, "mm", product)
    assert staircase.width_grid.__wrapped__(timer=lambda: now[0], rounds=2) == block


def test_this_machine_has_one_and_it_is_remembered():
    assert width_grid() in staircase.STEPS
    assert width_grid() == width_grid()
