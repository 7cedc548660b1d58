"""Parameters of their own in one memory move together in the original, and each by itself in a cut model: said."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import secateur as sc


class Coder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.relu(self.down(x)))


def conditions(model: nn.Module) -> list[str]:
    found = sc.plan(model, torch.randn(5, 6), granularity="neuron", remove={"down": [1, 5]}).conditions
    return [condition.text for condition in found if "share their memory" in condition.text]


def test_a_transpose_in_the_same_memory_is_said() -> None:
    model = Coder()
    model.up.weight = nn.Parameter(model.down.weight.data.t())
    (said,) = conditions(model)
    assert "down.weight" in said
    assert "up.weight" in said


def test_parts_of_one_memory_that_do_not_meet_are_apart() -> None:
    model, flat = Coder(), torch.randn(144)
    model.down.weight = nn.Parameter(flat[:72].view(12, 6))
    model.up.weight = nn.Parameter(flat[72:].view(6, 12))
    assert conditions(model) == []


def test_weights_that_are_not_cut_may_share_what_they_like() -> None:
    model = nn.Sequential(Coder(), nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = nn.Parameter(model[2].weight.data)
    found = sc.plan(model, torch.randn(5, 6), granularity="neuron", remove={"0.down": [1]}).conditions
    assert not [condition for condition in found if "share their memory" in condition.text]


def test_one_parameter_under_two_names_stays_one() -> None:
    one, other = Coder(), Coder()
    other.down.weight = one.down.weight
    model = nn.Sequential(one, other)
    found = sc.plan(model, torch.randn(5, 6), granularity="neuron", remove={"0.down": [1]}).conditions
    assert not [condition for condition in found if "share their memory" in condition.text]


def test_a_buffer_in_the_memory_of_a_weight_is_said() -> None:
    model = Coder()
    model.register_buffer("view", model.down.weight.data[:, :3])
    (said,) = conditions(model)
    assert "view" in said
    model.register_buffer("view", model.down.weight.data[:, :3].clone())
    assert conditions(model) == []


@pytest.mark.parametrize("keep", [lambda flat: flat, lambda flat: [flat], lambda flat: {"flat": flat.view(2, -1)}])
def test_a_flat_tensor_of_all_weights_is_said(keep: Callable[[Tensor], object]) -> None:
    """An optimizer that holds it moves the weights of the original, and none of the cut model."""
    model, start = Coder(), 0
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    for parameter in model.parameters():
        parameter.data = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    model.flat = keep(flat)  # type: ignore[assignment]
    said = conditions(model)
    assert len(said) == 3  # the bias of `up` is not cut
    assert all("flat share" in text for text in said)


def test_a_list_of_the_parameters_themselves_is_no_other_memory() -> None:
    model = Coder()
    model.held, model.by_name = list(model.parameters()), {"down": model.down.weight}
    assert conditions(model) == []
