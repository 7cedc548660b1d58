"""What would not fit into memory is refused with both figures, before any pass over the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import ResourceError
from secateur.model import room


@pytest.mark.parametrize(
    ("criterion", "words", "free"),
    [
        ("thinet", "Gram matrices", 8 * 8 * 8 - 1),  # of the second layer alone, in double precision
        ("lasso", "Gram matrices", 8 * 8 * 8 - 1),
        ("structured-obs", "Gram matrices", 8 * 8 * 8 - 1),
        ("kfac", "Kronecker factors", 700),
        ({"name": "obs", "gradients": 4}, "4 gradients of single samples", 700),
    ],
)
def test_too_large_statistics_are_refused_before_the_work(
    criterion: object, words: str, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    data = [(torch.randn(5, 6), torch.arange(5) % 3)]
    sc.score(model, data[0][0], criterion=criterion, data=data, granularity="channel")
    losses: list[int] = []
    monkeypatch.setattr(room, "free_bytes", lambda device: free)
    with pytest.raises(ResourceError, match=words) as caught:
        sc.score(
            model, data[0][0], criterion=criterion, data=data, granularity="channel",
            loss=lambda *given: losses.append(1) or torch.zeros((), requires_grad=True),
        )  # fmt: skip
    assert "are free" in str(caught.value)
    assert not losses


def test_free_memory_is_what_the_system_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemFree: 10 kB\nMemAvailable:  500 kB\n")
    monkeypatch.setattr(room, "MEMORY", tmp_path / "meminfo")
    assert room.free_bytes(torch.device("cpu")) == 512_000
    room.require_room("this", 512_000, torch.device("cpu"), hint="")
    with pytest.raises(ResourceError, match=r"this would take at least 2\.0 GB"):
        room.require_room("this", 2_000_000_000, torch.device("cpu"), hint="less")
