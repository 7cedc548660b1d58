"""Buffers that are no part of a model's state: a saved folder holds them, and a model that has others is told so."""

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import FileRefusedError, PlanMismatchError
from secateur.loading import BUFFERS, fill_buffers

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Each one is made with a scale of its own: of the width that is cut, or of the outputs."""

    def __init__(self, size=12):
        super().__init__()
        self.up, self.down, self.inner = nn.Linear(6, 12), nn.Linear(12, 3), size == 12
        self.register_buffer("scale", torch.randn(size), persistent=False)

    def forward(self, x):
        h, scale = self.up(x).relu(), self.scale
        return self.down(h * scale) if self.inner else self.down(h) * scale


def saved(folder, model):
    result = sc.prune(model, X, granularity="neuron", target={"sparsity": 0.4}, overrides=["measure.latency=false"])
    result.save(folder)
    return result


@pytest.mark.parametrize("size", [12, 3])
def test_a_loaded_model_has_the_buffers_that_were_saved(tmp_path, size):
    result = saved(tmp_path / "out", Net(size))
    loaded = sc.load(tmp_path / "out", model=lambda: Net(size))
    assert torch.equal(loaded.eval()(X), result.model.eval()(X))
    assert "scale" not in loaded.state_dict()


def test_a_model_without_such_buffers_has_no_such_file(tmp_path):
    saved(tmp_path / "out", nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)))
    assert not (tmp_path / "out" / BUFFERS).exists()


@pytest.mark.parametrize(
    "tensors", [{"other": torch.ones(3)}, {"scale": torch.ones(4)}, {"scale": torch.ones(3, dtype=torch.long)}]
)
def test_buffers_of_another_model_are_refused_before_anything_is_filled(tensors):
    model = Net(3)
    before = model.scale.clone()
    with pytest.raises(PlanMismatchError, match=repr(next(iter(tensors)))):
        fill_buffers(model, {"scale": torch.zeros(3), **tensors})
    assert torch.equal(model.scale, before)


def test_a_file_that_is_damaged_is_refused(tmp_path):
    saved(tmp_path / "out", Net(3))
    (tmp_path / "out" / BUFFERS).write_bytes(b"x" + (tmp_path / "out" / BUFFERS).read_bytes()[1:])
    with pytest.raises(FileRefusedError):
        sc.load(tmp_path / "out", model=lambda: Net(3))
