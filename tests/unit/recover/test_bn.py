import queue

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.errors import ForwardError, InputError, NonFiniteError
from secateur.recover import refresh_batchnorm


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) > 1), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_statistics_are_those_of_the_whole_data_in_float64(sizes, seed):
    x = torch.randn(sum(sizes), 3, 4, 5, generator=generator(seed)) * 3 + 100
    norm = nn.BatchNorm2d(3)
    assert refresh_batchnorm(norm, list(x.split(sizes)), batches=99) == 1
    whole = x.double().numpy()
    np.testing.assert_allclose(norm.running_mean.numpy(), whole.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(norm.running_var.numpy(), whole.var((0, 2, 3), ddof=1), rtol=1e-5)
    assert norm.num_batches_tracked == len(sizes)


def test_one_batch_gives_what_torch_gives_with_momentum_one():
    x = torch.randn(16, 3, 8, 8, generator=generator())
    ours = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2))
    theirs = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=1.0), nn.ReLU())
    theirs.extend([nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2, momentum=1.0)])
    theirs.load_state_dict(ours.state_dict())
    refresh_batchnorm(ours, [x])
    with torch.no_grad():
        theirs.train()(x)
    for number in (1, 4):
        torch.testing.assert_close(ours[number].running_mean, theirs[number].running_mean)
        torch.testing.assert_close(ours[number].running_var, theirs[number].running_var)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4, momentum=0.37)
        self.drop = nn.Dropout(0.5)
        self.plain = nn.BatchNorm1d(4, track_running_stats=False)
        self.unused = nn.BatchNorm1d(4)
        self.modes = queue.SimpleQueue()  # nothing that a forward can reach and that could be read is left changed

    def forward(self, x):
        self.modes.put((self.training, self.norm.training, self.drop.training))
        return self.plain(self.norm(self.drop(x)))


def test_only_batch_norms_train_and_everything_is_put_back():
    model = Mixed().eval()
    model.drop.train()
    state = torch.get_rng_state()
    weights = {name: value.clone() for name, value in model.named_parameters()}
    x = torch.randn(8, 4, generator=generator())
    assert refresh_batchnorm(model, [(x, torch.zeros(8))]) == 1
    assert model.modes.get_nowait() == (False, True, False)
    assert model.modes.empty()
    assert (model.training, model.norm.training, model.drop.training) == (False, False, True)
    assert model.norm.momentum == 0.37
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())
    assert not model.norm._forward_pre_hooks
    assert model.unused.running_var.tolist() == [1] * 4
    torch.testing.assert_close(model.norm.running_mean, x.mean(0))


def test_at_most_so_many_batches_are_read():
    stream = iter([torch.randn(4, 2) for _ in range(10)])
    refresh_batchnorm(nn.BatchNorm1d(2), stream, batches=3)
    assert len(list(stream)) == 7


def test_no_data_is_refused_and_no_norm_needs_none():
    with pytest.raises(InputError, match="no data"):
        refresh_batchnorm(nn.BatchNorm1d(2), [])
    assert refresh_batchnorm(nn.Linear(2, 2), []) == 0


@pytest.mark.parametrize(
    ("bad", "error"), [(torch.zeros(4, 5), ForwardError), (torch.full((4, 2), float("inf")), NonFiniteError)]
)
def test_on_an_error_the_model_is_as_it_was(bad, error):
    norm = nn.BatchNorm1d(2)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    with pytest.raises(error):
        refresh_batchnorm(norm, [torch.randn(4, 2), bad])
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    assert not norm._forward_pre_hooks


def test_wrong_statistics_are_repaired():
    x = torch.randn(64, 1, 6, 6, generator=generator()) * 2 + 1
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))
    model[1].running_mean.fill_(50)
    refresh_batchnorm(model, list(x.split(16)))
    with torch.no_grad():
        y = model.eval()(x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)
