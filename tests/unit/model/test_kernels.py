"""Switches of the process: set inside, and what they were outside, whoever set them and however."""

import pytest
import torch
from torch import nn

from secateur.model.kernels import exact_derivatives, ieee

PLACES = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)


def switches():
    cudnn = torch.backends.cudnn
    return [place.fp32_precision for place in PLACES], cudnn.enabled, cudnn.deterministic


@pytest.fixture(params=["as it is", "newer", "older"])
def _set(request):
    before = [place.fp32_precision for place in PLACES]
    if request.param == "newer":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    elif request.param == "older":
        torch.backends.cuda.matmul.allow_tf32 = True
    yield
    if request.param == "older":
        torch.backends.cuda.matmul.allow_tf32 = False
    for place, precision in zip(PLACES, before, strict=True):
        place.fp32_precision = precision


@pytest.mark.usefixtures("_set")
@pytest.mark.parametrize("fails", [False, True])
def test_full_precision_inside_and_what_it_was_outside(fails):
    before = switches()
    try:
        with exact_derivatives(nn.Sequential(nn.LSTM(2, 2))):
            assert switches() == (["ieee"] * 3, False, True)
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert switches() == before


@pytest.mark.usefixtures("_set")
def test_ieee_alone():
    before = switches()
    with ieee():
        assert [place.fp32_precision for place in PLACES] == ["ieee"] * 3
    assert switches() == before
