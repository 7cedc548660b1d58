import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.errors import InputError
from secateur.files.safe import save_tensors
from secateur.measure import num_nonzero, num_params, size_bytes


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embed.weight


class SharedMemory(nn.Module):
    """Two Parameter objects on the same memory: one tensor, not two."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.ones(5))
        self.b = nn.Parameter(self.a.data)


def test_tied_parameters_count_once():
    assert num_params(Tied()) == 21
    assert num_params(SharedMemory()) == 5
    assert num_nonzero(SharedMemory()) == 5


@given(st.lists(st.booleans(), min_size=12, max_size=12))
@settings(max_examples=20, deadline=None)
def test_nonzero_counts_what_is_not_zero(kept):
    layer = nn.Linear(3, 4, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.where(torch.tensor(kept).reshape(4, 3), -2.5, -0.0))
    assert num_nonzero(layer) == sum(kept)
    assert num_params(layer) == 12


def payload(model):
    """Bytes of the file that `save_tensors` leaves, less its header: the format's first 8 bytes tell its length."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        save_tensors(path, dict(model.state_dict(keep_vars=True)))
        assert size_bytes(model) == path.stat().st_size
        return path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")


def test_buffers_are_no_parameters_but_are_in_the_file():
    norm = nn.BatchNorm2d(6)
    assert num_params(norm) == 12
    assert payload(norm) == 4 * 6 * 4 + 8


def test_size_is_that_of_the_file_with_tied_weights_once():
    model = Tied()
    assert payload(model) == 7 * 3 * 4


def test_size_follows_dtype_and_layout():
    conv = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    half = nn.Conv2d(4, 8, 3).half()
    assert size_bytes(conv) - size_bytes(half) == pytest.approx(2 * num_params(conv), abs=16)


def test_views_of_one_storage_are_stored_each():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            whole = torch.arange(10.0)
            self.a, self.b = nn.Parameter(whole[:6]), nn.Parameter(whole[6:])

    model = Views()
    assert num_params(model) == 10
    assert payload(model) == 10 * 4


def test_weights_that_cannot_be_stored_are_refused():
    with pytest.raises(InputError, match="meta"):
        size_bytes(nn.Linear(2, 2, device="meta"))
