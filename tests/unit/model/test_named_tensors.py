"""Tensors by name, and what is refused about their values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.errors import InputError, NonFiniteError
from secateur.model.tensors import has_values, named_tensors, require_finite, require_values


def test_require_finite_names_the_first_index():
    tensor = torch.zeros(2, 3)
    tensor[1, 2] = float("-inf")
    with pytest.raises(NonFiniteError, match=r"'w' holds -inf at index \(1, 2\)"):
        require_finite(tensor, "w")
    require_finite(torch.empty(0), "empty")
    require_finite(torch.full((2,), 6e4, dtype=torch.float16), "large but finite")
    require_finite(torch.tensor([2**62, -1]), "whole numbers")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64])
def test_every_kind_of_number_is_looked_at(bad, dtype):
    tensor = torch.zeros(3, 2, dtype=dtype)
    require_finite(tensor, "w")
    tensor[2, 1] = bad if dtype != torch.complex64 else complex(0, bad)
    tensor[2, 0] = 7
    with pytest.raises(NonFiniteError, match=r"at index \(2, 1\)"):
        require_finite(tensor, "w")


def test_eight_bits_are_looked_at():
    tensor = torch.tensor([1.0, 2.0, float("nan")]).to(torch.float8_e4m3fn)
    require_finite(tensor[:2], "w")
    with pytest.raises(NonFiniteError, match=r"holds nan at index \(2,\)"):
        require_finite(tensor, "w")


@pytest.mark.parametrize("check", [require_finite, require_values])
def test_tensors_without_values_are_refused(check):
    lazy = nn.LazyLinear(2)
    for tensor in (torch.empty(2, device="meta"), lazy.weight):
        assert not has_values(tensor)
        with pytest.raises(InputError, match="parameter 'w' has no values yet"):
            check(tensor, "w", what="parameter")
    assert has_values(torch.empty(0))


def test_named_tensors_keep_the_first_name():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2))
    model[1].weight = model[0].weight
    assert "1.weight" not in named_tensors(model)
    assert {"0.weight", "2.running_mean"} <= set(named_tensors(model))
