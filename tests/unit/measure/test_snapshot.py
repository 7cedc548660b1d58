import pytest
import torch
from torch import nn

from secateur.errors import InputError, NonFiniteError
from secateur.measure import accuracy, accuracy_on, latency, num_params, size_bytes, snapshot


def test_accuracy_equals_the_exact_count_for_any_batching():
    logits = torch.randn(23, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(0, 4, (23,), generator=torch.Generator().manual_seed(1))
    pairs = zip(logits.tolist(), targets.tolist(), strict=True)
    hits = sum(row.index(max(row)) == target for row, target in pairs)
    for size in (1, 5, 23):
        batches = list(zip(logits.split(size), targets.split(size), strict=True))
        assert accuracy(nn.Identity(), batches) == hits / 23


def test_accuracy_runs_in_eval_mode_and_ignores_negative_targets():
    model = nn.Dropout(0.9).train()
    x = torch.eye(4)
    assert accuracy(model, [(x, torch.tensor([0, 1, -100, 0]))]) == 2 / 3
    assert model.training


def test_accuracy_reads_logits_of_mapping_batches():
    class Hugging(nn.Module):
        def forward(self, x):
            return {"hidden": x * 0, "logits": x}

    assert accuracy(Hugging(), [{"x": torch.eye(3), "labels": torch.arange(3)}]) == 1


def test_accuracy_refuses_what_it_cannot_count():
    x = torch.eye(3)
    with pytest.raises(InputError, match="no target"):
        accuracy(nn.Identity(), [])
    with pytest.raises(InputError, match="no integer target"):
        accuracy(nn.Identity(), [(x, torch.ones(3))])
    with pytest.raises(InputError, match="does not fit"):
        accuracy(nn.Identity(), [(x, torch.zeros(2, dtype=torch.int64))])
    with pytest.raises(NonFiniteError, match="batch 1"):
        accuracy(nn.Identity(), [(x, torch.arange(3)), (x * float("nan"), torch.arange(3))])


def test_snapshot_holds_every_figure():
    model = nn.Linear(3, 4)
    with torch.no_grad():
        model.bias.zero_()
    x = torch.zeros(2, 3)
    timed = latency({"m": model}, x, rounds=2, warmup=0)["m"]
    shot = snapshot(model, x, evaluate=accuracy_on([(x, torch.zeros(2).long())]), latency_ms=timed)
    assert (shot.params, shot.nonzero, shot.macs) == (num_params(model), 12, 12)
    assert shot.size_bytes == size_bytes(model)
    assert shot.quality == {"accuracy": 1.0}
    assert shot.latency_ms is timed


def test_macs_say_what_they_are_for():
    assert snapshot(nn.Linear(3, 4), torch.zeros(2, 3)).macs_per == "sample"
    whole = snapshot(nn.LSTM(3, 4), torch.randn(5, 2, 3))
    assert (whole.macs, whole.macs_per) == (5 * 2 * 4 * 4 * (3 + 4), "example")


def test_snapshot_without_an_example_does_not_run_the_forward():
    class Silent(nn.Module):
        def forward(self, x):
            raise AssertionError

    assert snapshot(Silent()).macs is None


def test_bare_number_is_called_quality_and_bad_results_are_refused():
    model = nn.Identity()
    assert snapshot(model, evaluate=lambda m: torch.tensor(0.25)).quality == {"quality": 0.25}
    with pytest.raises(NonFiniteError, match="perplexity"):
        snapshot(model, evaluate=lambda m: {"perplexity": float("inf")})
    with pytest.raises(InputError, match="list"):
        snapshot(model, evaluate=lambda m: [1.0])


def test_nan_in_the_output_is_refused():
    model = nn.Linear(3, 4)
    with torch.no_grad():
        model.weight[1, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="output 0"):
        snapshot(model, torch.ones(1, 3))
