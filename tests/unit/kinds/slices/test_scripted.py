"""A compiled module refuses cuts of its own tensors, and of no other's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.errors import UnsupportedError
from secateur.kinds.slices.cut import cut_copy, cut_model

KEEP = torch.tensor([0, 2])


def net(scripted: str) -> nn.Module:
    layers = {name: nn.Linear(3, 3) for name in ("fc1", "fc10", "fc2")}
    layers["fc1_old"] = nn.Linear(3, 3)
    model = nn.ModuleDict({"fc": nn.ModuleDict(layers), "fc1": nn.Linear(3, 3)})
    owner, _, name = scripted.rpartition(".")
    parent = model.get_submodule(owner)
    parent[name] = torch.jit.script(parent[name])  # type: ignore[index]
    return model


@pytest.mark.parametrize("cut", ["fc.fc10.weight", "fc.fc1_old.weight", "fc.fc2.weight", "fc1.weight"])
def test_a_name_that_begins_alike_is_another_module(cut: str) -> None:
    model = net("fc.fc1")
    smaller = cut_copy(model, {cut: {0: KEEP}}, {})
    assert torch.equal(smaller.get_parameter(cut), model.get_parameter(cut)[KEEP])
    cut_model(model, {cut: {0: KEEP}}, {})
    assert model.get_parameter(cut).shape == (2, 3)


@pytest.mark.parametrize("scripted", ["fc.fc1", "fc1"])
def test_its_own_tensors_are_refused(scripted: str) -> None:
    model = net(scripted)
    for cut in (cut_copy, cut_model):
        with pytest.raises(UnsupportedError, match=rf"^{scripted} is a TorchScript module"):
            cut(model, {f"{scripted}.weight": {0: KEEP}}, {})


def test_a_whole_model_in_torchscript_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="is a TorchScript module"):
        cut_copy(torch.jit.script(nn.Linear(3, 3)), {"weight": {0: KEEP}}, {})
