import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.errors import InputError
from secateur.files.safe import save_tensors, size_of
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


class Zoo(nn.Module):
    """Every kind of tensor that a state can hold, under names that need escapes."""

    def __init__(self):
        super().__init__()
        self.register_parameter("weiß", nn.Parameter(torch.randn(3, 5)))
        self.short = nn.Parameter(torch.randn(7).half())
        self.brain = nn.Parameter(torch.randn(2, 1, 3).bfloat16())
        self.register_buffer("complex", torch.randn(3, dtype=torch.complex64))
        self.register_buffer("truth", torch.tensor([True, False, True]))
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("nothing", torch.empty(0, 4))
        self.register_buffer("hidden", torch.ones(1000), persistent=False)
        self.square = nn.Parameter(torch.randn(4, 4))
        self.turned = nn.Parameter(self.square.data.t())
        self.tied = self.square
        self.norm = nn.BatchNorm1d(3)

    def get_extra_state(self):
        return {"not": "a tensor"}

    def set_extra_state(self, state):
        pass


def test_size_is_exactly_that_of_the_file_for_every_kind_of_tensor(tmp_path):
    state = {n: t for n, t in Zoo().state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}
    save_tensors(tmp_path / "x", state)
    assert size_bytes(Zoo()) == (tmp_path / "x").stat().st_size


@given(st.dictionaries(st.text(min_size=1, max_size=9), st.lists(st.integers(0, 4), max_size=3), max_size=5))
@settings(max_examples=30, deadline=None)
def test_size_of_any_tensors_is_that_of_their_file(shapes):
    tensors = {name: torch.zeros(shape, dtype=torch.int16) for name, shape in shapes.items() if name != "__metadata__"}
    for metadata in (None, {"a": "b" * len(tensors)}):
        with tempfile.TemporaryDirectory() as folder:
            save_tensors(Path(folder) / "x", tensors, metadata)
            assert size_of(tensors, metadata) == (Path(folder) / "x").stat().st_size


def test_nothing_is_written_to_learn_a_size(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    monkeypatch.setattr("secateur.files.disk.create", lambda path: pytest.fail(f"{path} was written"))
    assert size_bytes(nn.Linear(3, 4)) > 64


def test_a_weight_and_its_transpose_are_two_tensors():
    """A square weight has the shape of its transpose, and the same address: only the strides tell."""

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.arange(9.0).reshape(3, 3))
            self.b = nn.Parameter(self.a.data.t())

    assert num_params(Turned()) == 18
    assert payload(Turned()) == 18 * 4


def test_weights_that_cannot_be_stored_are_refused():
    with pytest.raises(InputError, match="meta"):
        size_bytes(nn.Linear(2, 2, device="meta"))
