"""The figure that decides: what it is of single samples, in which unit it falls, and that two readings see the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from secateur.errors import InputError
from secateur.objective.gauge import Gauge, GaugeReading, gauge_of


def test_pixels_count_one_by_one_and_samples_are_the_units() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Conv2d(2, 3, 1), torch.randn(12, 2, 3, 3), torch.randint(0, 3, (12, 3, 3))
    y[:4, 1:] = -100
    y[5] = -100  # a sample of which nothing is known
    counted = y >= 0
    reading = gauge_of(model, [(x[:5], y[:5]), (x[5:], y[5:])]).read(model)
    right = (model(x).argmax(1) == y) & counted
    assert reading.figure == pytest.approx(int(right.sum()) / int(counted.sum()))
    assert reading.outcomes is not None
    known = counted.flatten(1).any(1)
    assert reading.outcomes.weights.tolist() == counted.flatten(1).sum(1)[known].tolist()
    shares = right.flatten(1).sum(1)[known] / counted.flatten(1).sum(1)[known]
    assert reading.outcomes.values.tolist() == pytest.approx(shares.tolist())


@pytest.mark.parametrize(
    ("higher", "before", "after", "unit", "fall"),
    [
        (True, 0.9, 0.8, "points", 10.0),
        (True, 0.8, 0.9, "points", -10.0),
        (True, 30.0, 24.0, "percent", 20.0),
        (True, -2.0, -3.0, "percent", 50.0),
        (False, 2.0, 3.0, "percent", 50.0),
        (False, 0.5, 0.4, "percent", -20.0),
    ],
)
def test_shares_fall_in_points_and_all_else_in_percent_of_what_it_was(
    higher: bool, before: float, after: float, unit: str, fall: float
) -> None:
    gauge = Gauge("own", lambda model: GaugeReading(0.0), higher)
    assert gauge.unit(GaugeReading(before)) == unit
    found = gauge.fall(GaugeReading(before), GaugeReading(after), confidence=0.95)
    assert (found.amount, found.low, found.high) == (pytest.approx(fall), None, None)


def test_of_nothing_there_are_no_percent() -> None:
    with pytest.raises(InputError, match="no percent"):
        Gauge("own", lambda model: GaugeReading(0.0), higher=False).fall(
            GaugeReading(0.0), GaugeReading(1.0), confidence=0.95
        )


def test_a_loader_that_shuffles_hands_out_the_same_at_every_reading_and_nobody_notices() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    loader = DataLoader(TensorDataset(torch.randn(40, 4), torch.randint(0, 3, (40,))), batch_size=8, shuffle=True)
    gauge = gauge_of(model, loader)
    before = torch.get_rng_state()
    first = gauge.read(model)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)  # whoever draws in between changes nothing
    second = gauge.read(model)
    assert first.outcomes is not None
    assert second.outcomes is not None
    assert first.outcomes.values.tolist() == second.outcomes.values.tolist()
