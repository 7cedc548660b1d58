import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import InputError, RecipeError
from secateur.sources import TensorData
from secateur.sources.in_memory import build_dataset, channel_statistics, split_indices


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 5), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_every_epoch_holds_every_sample_once_in_an_order_of_its_own(samples, size, seed, epoch):
    x = torch.arange(samples)
    data = TensorData(x, x * 10, batch_size=size, shuffle=True, seed=seed)
    data.set_epoch(epoch)
    batches = list(data)
    assert len(batches) == len(data)
    assert all(len(inputs) == size for inputs, _ in batches[:-1])
    assert sorted(torch.cat([inputs for inputs, _ in batches]).tolist()) == x.tolist()
    assert all(torch.equal(targets, inputs * 10) for inputs, targets in batches)
    again = TensorData(x, x * 10, batch_size=size, shuffle=True, seed=seed)
    again.set_epoch(epoch)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, again, strict=True))


def test_reading_does_not_change_the_order_but_the_epoch_does():
    data = TensorData(torch.arange(50), torch.arange(50), batch_size=50, shuffle=True)
    first, second = next(iter(data))[0], next(iter(data))[0]
    assert torch.equal(first, second)
    data.set_epoch(1)
    assert not torch.equal(first, next(iter(data))[0])


def test_global_random_state_plays_no_part():
    data = TensorData(torch.arange(50), torch.arange(50), batch_size=50, shuffle=True)
    torch.manual_seed(1)
    first = next(iter(data))[0]
    torch.manual_seed(2)
    assert torch.equal(first, next(iter(data))[0])


def test_normalised_images_have_mean_zero_and_std_one_per_channel():
    images = np.random.default_rng(0).integers(0, 200, (30, 3, 6, 5)).astype(np.uint8)
    images[:, 1] //= 4
    mean, std = channel_statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, (images / 255).std((0, 2, 3)), rtol=1e-12)
    data = TensorData(torch.from_numpy(images), torch.zeros(30), batch_size=30, normalize=(mean, std))
    batch = next(iter(data))[0]
    torch.testing.assert_close(batch.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(batch.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=60), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_splits_are_disjoint_complete_and_stratified(labels, seed):
    y = np.array(labels)
    train, test = split_indices(y, seed=seed)
    assert sorted([*train, *test]) == list(range(len(y)))
    for label in set(labels):
        members, out = (y == label).sum(), (y[test] == label).sum()
        assert out == min(max(round(members * 0.2), 1), members - 1)
    assert np.array_equal(test, split_indices(y, seed=seed)[1])


def test_calibration_comes_from_the_training_part():
    x = np.arange(1000, dtype=np.float32)[:, None]
    data = build_dataset("x", (x, np.arange(1000) % 4), None, batch_size=64, seed=0)
    parts = {
        name: {float(v) for batch, _ in getattr(data, name) for v in batch} for name in ("train", "calibration", "test")
    }
    assert len(parts["train"]) == 800
    assert len(parts["test"]) == 200
    assert len(parts["calibration"]) == 512
    assert parts["calibration"] < parts["train"]
    assert not parts["train"] & parts["test"]
    assert data.num_classes == 4


def test_float_targets_have_no_classes():
    x = np.ones((10, 2), dtype=np.float64)
    data = build_dataset("x", (x, x), None, batch_size=4, seed=0)
    assert data.num_classes is None
    assert next(iter(data.train))[1].dtype == torch.float32


def test_wrong_sizes_are_refused():
    with pytest.raises(InputError, match="3 inputs and 2 targets"):
        TensorData(torch.zeros(3), torch.zeros(2))
    with pytest.raises(InputError, match="no sample"):
        TensorData(torch.zeros(0), torch.zeros(0))
    with pytest.raises(RecipeError, match="batch size"):
        TensorData(torch.zeros(2), torch.zeros(2), batch_size=0)
