import gc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateur.errors import ForwardError, InputError, RecipeError
from secateur.measure import latency


class Clock:
    """Seconds that advance only when a model says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Fake(nn.Module):
    """Takes the given durations in turn, and writes down that it was run."""

    def __init__(self, name, clock, durations, log):
        super().__init__()
        self.name, self.clock = name, clock
        # Kept outside the module: what its own lists hold is put back after the measurement.
        self.take, self.note = list(reversed(durations)).pop, log.append
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        assert not self.training
        assert torch.is_inference_mode_enabled()
        assert not gc.isenabled()
        self.note((self.name, len(x)))
        self.clock.now += self.take()
        return x


def pair(durations_a, durations_b):
    clock, log = Clock(), []
    return {"a": Fake("a", clock, durations_a, log), "b": Fake("b", clock, durations_b, log)}, clock, log


def test_rounds_are_interleaved_in_alternating_order():
    models, clock, log = pair([1.0] * 5, [1.0] * 5)
    latency(models, torch.zeros(1), rounds=4, warmup=1, timer=clock)
    assert "".join(name for name, _ in log) == "ba" + "ab" + "ba" + "ab" + "ba"


def test_percentiles_are_those_of_the_timed_rounds_in_milliseconds():
    a, b = [100.0, 0.003, 0.001, 0.002, 0.010], [100.0] + [0.5] * 4
    models, clock, _ = pair(a, b)
    result = latency(models, torch.zeros(1), rounds=4, warmup=1, timer=clock)
    p10, median, p90 = np.percentile([3, 1, 2, 10], [10, 50, 90])
    assert (result["a"].p10, result["a"].median, result["a"].p90) == pytest.approx((p10, median, p90))
    assert result["b"].median == pytest.approx(500)
    assert result["a"].rounds == 4


def test_modes_threads_and_collector_are_put_back():
    models, clock, _ = pair([1.0] * 2, [1.0] * 2)
    models["a"].train()
    models["b"].eval()
    threads = torch.get_num_threads()
    result = latency(models, torch.zeros(1), rounds=1, warmup=1, threads=2, timer=clock)
    assert result["a"].threads == 2
    assert torch.get_num_threads() == threads
    assert (models["a"].training, models["b"].training) == (True, False)
    assert gc.isenabled()


def test_threads_are_put_back_after_a_failure():
    threads = torch.get_num_threads()
    with pytest.raises(ForwardError):
        latency({"x": nn.Linear(3, 4)}, torch.zeros(1, 5), threads=threads + 1)
    assert torch.get_num_threads() == threads
    assert gc.isenabled()


def test_batch_size_is_the_one_asked_for():
    models, clock, log = pair([1.0], [1.0])
    result = latency(models, torch.zeros(3, 2), rounds=1, warmup=0, batch_size=5, timer=clock)
    assert log == [("a", 5), ("b", 5)]
    assert result["a"].batch_size == 5


def test_the_real_clock_gives_positive_times_in_order():
    result = latency({"a": nn.Linear(64, 8), "b": nn.Linear(64, 16)}, torch.zeros(4, 64), rounds=9)
    for one in result.values():
        assert 0 < one.p10 <= one.median <= one.p90


@pytest.mark.parametrize("option", [{"rounds": 0}, {"warmup": -1}, {"threads": -2}])
def test_options_out_of_range(option):
    with pytest.raises(RecipeError, match=next(iter(option))):
        latency({"x": nn.Identity()}, torch.zeros(1), **option)


def test_nothing_to_measure():
    with pytest.raises(InputError):
        latency({}, torch.zeros(1))


@given(st.lists(st.tuples(st.floats(0.001, 10), st.floats(0.001, 10)), min_size=1, max_size=12))
def test_the_ratio_is_taken_round_by_round(rounds):
    before, after = zip(*rounds, strict=True)
    models, timer, _ = pair(before, after)
    measured = latency(models, torch.zeros(1), rounds=len(rounds), warmup=0, timer=timer)
    first, second = measured.values()
    shares = np.array(after) / np.array(before)
    assert first.ratio is None
    np.testing.assert_allclose(second.ratio, [np.median(shares), *np.percentile(shares, [10, 90])], rtol=1e-6)
