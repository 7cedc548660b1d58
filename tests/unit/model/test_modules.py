"""The walk over a model finds what torch's own finds: names, order, what is shared, what is empty."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.model.modules import modules_of, named_modules, named_parameters
from secateur.model.tensors import named_tensors


class Hides(nn.Sequential):
    """Says nothing of what is inside."""

    def named_modules(self, memo=None, prefix="", remove_duplicate=True) -> Iterator[tuple[str, nn.Module]]:
        yield prefix, self


@st.composite
def models(draw: st.DrawFn) -> nn.Module:
    """Nested modules of which some stand in several places, hold nothing, or share their tensors."""
    made: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 7))):
        module = draw(st.sampled_from((nn.Module, Hides) if draw(st.booleans()) else (nn.Module,)))()
        for place in range(draw(st.integers(0, 3))):
            inside = draw(st.sampled_from([None, *made]))
            module.register_module(f"m{place}", inside)
        tensors = [t for other in made for t in (*other._parameters.values(), *other._buffers.values())]
        for place in range(draw(st.integers(0, 2))):
            tensor = draw(st.sampled_from([None, nn.Parameter(torch.zeros(1)), torch.zeros(1), *tensors]))
            add = module.register_parameter if isinstance(tensor, nn.Parameter) else module.register_buffer
            add(f"t{place}", tensor)
        made.append(module)
    return made[-1]


@settings(max_examples=100, deadline=None)
@given(models())
def test_all_that_torch_finds_and_in_its_order(model: nn.Module) -> None:
    def told(found):
        return [(name, id(each)) for name, each in found]

    assert told(named_modules(model)) == told(model.named_modules())
    assert [id(module) for module in modules_of(model)] == [id(module) for module in model.modules()]
    assert told(named_parameters(model)) == told(model.named_parameters())
    both = [*model.named_parameters(), *model.named_buffers()]
    assert told(named_tensors(model).items()) == told(both)


def test_a_class_with_names_of_its_own_is_asked() -> None:
    class Renames(nn.Linear):
        def named_parameters(self, prefix="", recurse=True, remove_duplicate=True):
            for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
                yield f"own_{name}", parameter

    assert [name for name, _ in named_parameters(Renames(1, 1))] == ["own_weight", "own_bias"]
    assert [name for name, _ in named_modules(nn.Sequential(Hides(nn.ReLU())))] == ["", "0"]


@pytest.mark.parametrize("walk", [named_modules, named_parameters])
def test_a_model_may_stand_in_itself(walk) -> None:
    model = nn.Sequential(nn.Linear(1, 1))
    model.append(model)
    assert [name for name, _ in walk(model)] == [name for name, _ in getattr(model, walk.__name__)()]
