import gc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateur.errors import ForwardError, InputError, RecipeError
from secateur.measure import latency
from secateur.measure.pair import time_pair
from secateur.recipe.schema import Measure


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


@pytest.mark.parametrize(
    "option", [{"rounds": 0}, {"warmup": -1}, {"threads": -2}, {"threads": 0}, {"seconds": -1.0}, {"spread": -0.1}]
)
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
    shares = np.sort(np.array(after) / np.array(before))
    last = len(rounds) - 1
    assert first.ratio is None
    # p10 and p90 are rounds that took place: the next ones outwards from a tenth and nine tenths of the way.
    outwards = [shares[last // 10], shares[-(-9 * last // 10)]]
    np.testing.assert_allclose(second.ratio, [np.median(shares), *outwards], rtol=1e-6)
    assert 10 * (shares <= second.ratio[2] * (1 + 1e-6)).sum() >= 9 * len(rounds)


def test_rounds_are_fixed_where_no_rule_ends_them():
    models, clock, log = pair([1.0] * 20, [1.0] * 20)
    found = latency(models, torch.zeros(1), rounds=18, warmup=2, timer=clock)
    assert (len(log), found["a"].rounds, found["b"].rounds, found["b"].stopped) == (40, 18, 18, "rounds")


def test_a_small_spread_of_the_ratio_ends_the_rounds():
    # The machine gets slower and slower, which both models suffer alike: the times spread, their ratio does not.
    busy = [1.0 + number for number in range(40)]
    models, clock, _ = pair(busy, [0.5 * seconds for seconds in busy])
    found = latency(models, torch.zeros(1), rounds=30, warmup=0, spread=0.05, timer=clock)
    assert (found["b"].rounds, found["b"].stopped, found["b"].ratio) == (6, "spread", (0.5, 0.5, 0.5))
    assert found["a"].p90 > 2 * found["a"].p10


def test_a_spread_that_only_later_rounds_reach():
    # One odd round in front: it is within the outer tenth, and leaves it when there are eleven rounds.
    models, clock, _ = pair([1.0] * 40, [9.0] + [1.0] * 39)
    found = latency(models, torch.zeros(1), rounds=30, warmup=0, spread=0.05, timer=clock)
    assert (found["b"].rounds, found["b"].stopped) == (11, "spread")


def test_a_model_alone_is_timed_until_its_own_spread_is_small():
    models, clock, _ = pair([1.0] * 40, [])
    found = latency({"a": models["a"]}, torch.zeros(1), rounds=30, warmup=0, spread=0.01, timer=clock)
    assert (found["a"].rounds, found["a"].stopped) == (6, "spread")


@pytest.mark.parametrize(
    ("seconds", "warm", "timed", "stopped"),
    [
        (1.0, 1, 6, "time"),  # used up at once: one round to warm up, and the six without which nothing can be said
        (21.0, 3, 8, "time"),  # two seconds a round: a quarter of the budget warms up, the rest is timed
        (1000.0, 5, 12, "rounds"),
    ],
)
def test_a_time_budget_ends_the_rounds(seconds, warm, timed, stopped):
    jitter = [1.0 + 0.1 * (number % 3) for number in range(40)]
    models, clock, log = pair([1.0] * 40, jitter)
    found = latency(models, torch.zeros(1), rounds=12, warmup=5, seconds=seconds, spread=0.01, timer=clock)
    assert (len(log) // 2 - timed, found["b"].rounds, found["b"].stopped) == (warm, timed, stopped)


def test_fewer_rounds_than_six_are_taken_where_they_are_asked_for():
    models, clock, _ = pair([1.0] * 4, [1.0] * 4)
    found = latency(models, torch.zeros(1), rounds=4, warmup=0, seconds=0.5, spread=1.0, timer=clock)
    assert (found["b"].rounds, found["b"].stopped) == (4, "rounds")


@pytest.mark.parametrize(("zeros_only", "rounds"), [(False, 7), (True, 5)])
def test_a_pair_is_timed_as_the_recipe_asks_and_zeros_five_times(zeros_only, rounds):
    models, _, log = pair([0.0] * 40, [0.0] * 40)
    wanted = Measure(rounds=7, warmup=2, batch_size=3, threads=1, spread=0.0, seconds=100.0)
    before, after = time_pair(models["a"], models["b"], torch.zeros(1), wanted, zeros_only=zeros_only)
    assert (before.rounds, after.rounds, len(log)) == (rounds, rounds, 2 * (rounds + 2))
    assert (before.ratio, after.threads, after.batch_size) == (None, 1, 3)
    assert {size for _, size in log} == {3}


def test_a_pair_is_not_timed_where_the_recipe_asks_for_no_latency():
    models, _, log = pair([], [])
    assert time_pair(models["a"], models["b"], torch.zeros(1), Measure(latency=False), zeros_only=False) == (None, None)
    assert log == []


class Forces(nn.Module):
    """A forward that differentiates something itself, as models of energies do."""

    def __init__(self):
        super().__init__()
        self.energy = nn.Linear(3, 1)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            return torch.autograd.grad(self.energy(x).tanh().sum(), x)[0]


def test_models_that_ask_for_gradients_themselves_are_timed_like_all_others_beside_them():
    x = torch.randn(2, 3)
    forces, plain = Forces(), nn.Linear(3, 1)
    wanted = forces(x)
    found = latency({"forces": forces, "plain": plain}, x, rounds=4, warmup=1)
    assert found["forces"].median > 0 < found["plain"].median
    assert found["plain"].rounds == 4
    assert torch.equal(forces(x), wanted)
