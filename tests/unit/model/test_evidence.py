"""Inputs made anew: of the same form, other in everything else, and only what the model takes."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from secateur.model.call import tensors_in
from secateur.model.evidence import Form, Input, each_alone, inputs_beside, longer, shorter
from secateur.model.held import HeldRandomness


@pytest.mark.parametrize("size", range(2, 300))
def test_sizes_around_a_size(size: int) -> None:
    assert 1 <= shorter(size) < size < longer(size) <= 2 * size
    power = size & -size
    if 1 < power < size:  # strides and patches of a power of two still divide it
        assert longer(size) % min(power, 32) == 0


def test_masks_stay_masks_and_tokens_stay_in_their_range() -> None:
    tokens = torch.tensor([[5, 9, 7, 3], [4, 4, 8, 5]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    form = Form({"ids": tokens, "mask": mask, "flag": True, "none": None}, nn.Embedding(50, 2))
    made = form.anew(batch=3, sizes={4: 6})
    assert made["ids"].shape == made["mask"].shape == (3, 6)
    assert made["ids"].min() >= 3
    assert made["ids"].max() <= 9
    assert set(made["mask"].unique().tolist()) <= {0, 1}
    assert made["flag"] is True
    assert made["none"] is None


def test_an_example_that_asks_for_gradients_gets_others_that_do_and_hang_on_nothing() -> None:
    wanted = torch.randn(3, 4, requires_grad=True)
    made = Form({"x": wanted, "y": wanted * 2, "z": torch.randn(3, 4)}, nn.Linear(4, 2)).anew(batch=5)
    assert [made[name].requires_grad for name in "xyz"] == [True, True, False]
    assert all(made[name].is_leaf for name in "xyz")
    ones = Form(torch.ones(3, 4, requires_grad=True), nn.Linear(4, 2)).anew()  # a mask, for all that is known
    assert ones.requires_grad


@pytest.mark.parametrize("blank", [torch.zeros(3, 4), torch.full((3, 4), 7.0), torch.full((3, 4), float("nan"))])
def test_a_blank_example_gets_live_values(blank: Tensor) -> None:
    made = Form(blank, nn.Linear(4, 2)).anew()
    assert torch.isfinite(made).all()
    assert made.std() > 0.01


def test_values_stay_in_the_range_of_the_example() -> None:
    x = torch.rand(40, 10)
    made = Form(x, nn.Linear(10, 2)).anew()
    assert made.min() >= x.min()
    assert made.max() <= x.max()
    assert not torch.equal(made, x)


def test_only_what_the_model_takes_is_made() -> None:
    table, seen = nn.Embedding(20, 6), []

    def accepts(given: Input) -> bool:
        x = given.example
        if x.shape[1] > 12 or x.max() >= 20:
            return False
        seen.append(tuple(x.shape))
        return True

    found = list(inputs_beside(torch.zeros(2, 12, dtype=torch.long), table, accepts))
    assert [tuple(each.example.shape) for each in found] == [(3, 4)]  # nothing longer than the table of positions
    assert found[0].example.unique().numel() > 3  # all zeros says nothing about the vocabulary
    assert "batch 3 for 2" in found[0].what
    assert "size 4 for 12" in found[0].what


def test_a_single_step_is_tried_as_several() -> None:
    found = list(inputs_beside(torch.randn(2, 1, 5), nn.Linear(5, 3), lambda given: given.example.shape[2] == 5))
    assert (2, 4, 5) in [tuple(each.example.shape) for each in found]


@pytest.mark.parametrize(
    "draw",
    [
        lambda n: torch.rand(n),
        lambda n: torch.randn(n),
        lambda n: torch.randn_like(torch.empty(n)),
        lambda n: torch.empty(n).uniform_(2, 3),
        lambda n: torch.empty(n).normal_(5, 2),
        lambda n: torch.empty(n).exponential_(),
        lambda n: torch.bernoulli(torch.full((n,), 0.9)),
        lambda n: torch.randint(3, 9, (n,)),
        lambda n: nn.functional.dropout(torch.ones(n), 0.5, training=True),
        lambda n: torch.randperm(n)[:1],
    ],
)
def test_held_numbers_do_not_depend_on_how_many_are_drawn(draw) -> None:
    with HeldRandomness() as held:
        few, many = draw(5), draw(9)
    assert torch.equal(few, many[: len(few)])
    assert held.seen


def test_of_a_large_batch_a_small_one_is_tried_where_inputs_are_dear() -> None:
    """A batch of one or two is tried one larger, as that costs little."""

    def batches(samples: int, *, sparing: bool) -> list[int]:
        images = torch.randn(samples, 3, 64, 64)
        found = inputs_beside(images, nn.Conv2d(3, 2, 1), lambda given: given.example.shape[1] == 3, sparing=sparing)
        return [len(each.example) for each in found]

    assert batches(16, sparing=True) == [3, 3]
    assert batches(16, sparing=False) == [17, 16]
    assert batches(1, sparing=True) == [2, 1]


def test_each_change_alone() -> None:
    found = {each.what: tuple(each.example.shape) for each in each_alone(torch.randn(2, 12, 5), nn.Linear(5, 3))}
    assert (2, 12, 5) in found.values()
    assert {(1, 12, 5), (3, 12, 5), (2, 4, 5), (2, 16, 5), (2, 24, 5)} <= set(found.values())
    assert all(sum(a != b for a, b in zip(shape, (2, 12, 5), strict=True)) <= 1 for shape in found.values())


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass
class Loose:
    x: Tensor
    y: Tensor
    words: str = "as they are"


@dataclass(frozen=True, slots=True)
class Tight:
    x: Tensor
    y: Tensor


HOLDERS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, [y]],
    "dict": lambda x, y: {"x": x, "y": y},
    "ordered": lambda x, y: OrderedDict(x=x, y=y),
    "mapping of a class": lambda x, y: (UserDict(x=x, y=y),),
    "mapping that is closed": lambda x, y: MappingProxyType({"x": x, "y": y}),
    "named tuple": Pair,
    "dataclass": Loose,
    "frozen dataclass": Tight,
    "one in another": lambda x, y: {"a": (Loose(x, y),), "b": Tight(y, x), "c": None},
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_what_is_said_to_have_other_values_has_them(kind: str) -> None:
    x, y = torch.arange(12.0).view(3, 4), torch.arange(20, 32).view(3, 4)
    example = HOLDERS[kind](x, y)
    given = list(inputs_beside(example, nn.Embedding(50, 2), lambda _: True))
    assert {input.what for input in given} == {
        "other values, batch 4 for 3, size 1 for 4",
        "other values, size 5 for 4",
    }
    for input, shape in zip(given, ((4, 1), (3, 5)), strict=True):
        made = list(tensors_in(input.example))
        assert [(t.shape, t.dtype) for t in made] == [(shape, t.dtype) for t in tensors_in(example)]
        assert not any(torch.equal(t[:1, :1], old[:1, :1]) for t, old in zip(made, tensors_in(example), strict=True))
        if "closed" not in kind:
            assert type(input.example) is type(example)
    if isinstance(example, Loose):
        assert given[0].example.words == "as they are"
    assert [torch.equal(t, old) for t, old in zip(tensors_in(example), tensors_in(HOLDERS[kind](x, y)), strict=True)]
