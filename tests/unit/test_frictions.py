"""What new users stumbled over in Python, one row each: refused or answered by one clear sentence."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateur as sc
from secateur.errors import ForwardError, InputError, RecipeError, SecateurError, TargetError
from secateur.model.admit import WrapperWarning

X = torch.zeros(2, 3, 8, 8)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )


class TakesMapping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        result: torch.Tensor = self.body(batch["image"])
        return result


LOADER = DataLoader(TensorDataset(X, torch.zeros(2, dtype=torch.int64)), batch_size=1)
ENTRIES = {
    "plan": lambda model, example, **o: sc.plan(model, example, **{"target": {"macs": 0.5}, **o}),
    "prune": lambda model, example, **o: sc.prune(model, example, **{"target": {"macs": 0.5}, **o}),
    "estimate": lambda model, example, **o: sc.estimate(
        model, example, recipe={"target": {"macs": 0.5}, "measure": {"latency": False}, **o}
    ),
    "inspect": lambda model, example, **_: sc.inspect(model, example),
    "score": lambda model, example, **_: sc.score(model, example, granularity="channel"),
}
EXAMPLES = [
    ((1, 3, 8, 8), InputError, "torch.zeros(1, 3, 8, 8)"),
    ([1, 3, 8, 8], InputError, "torch.zeros(1, 3, 8, 8)"),
    (torch.Size([1, 3, 8, 8]), InputError, "torch.zeros(1, 3, 8, 8)"),
    (LOADER, InputError, "next(iter(loader))[0]"),
    (iter([X]), InputError, "next(iter(loader))[0]"),
    ({"image": X}, ForwardError, "put it in a tuple: example=(mapping,)"),
    ("image", SecateurError, ""),
]


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(("example", "kind", "hint"), EXAMPLES, ids=[str(type(e[0]).__name__) for e in EXAMPLES])
def test_what_is_no_example(entry: str, example: object, kind: type[SecateurError], hint: str) -> None:
    with pytest.raises(kind) as caught:
        ENTRIES[entry](net(), example)
    assert hint in str(caught.value)


def test_a_mapping_in_a_tuple_goes_through_training_as_well() -> None:
    model, y = TakesMapping(), torch.tensor([0, 1])
    with pytest.raises(ForwardError, match="put it in a tuple"):
        sc.plan(model, {"image": X}, target={"macs": 0.5})
    recipe = {
        "target": {"sparsity": 0.5},
        "recover": [{"method": "finetune", "steps": 1}],
        "measure": {"latency": False},
    }
    with pytest.raises(ForwardError, match=r"batches \(\(mapping,\), target\)"):
        sc.prune(model, ({"image": X},), data=[({"image": X}, y)], recipe=recipe)
    result = sc.prune(model, data=[((({"image": X}),), y)], recipe=recipe)
    assert set(result.report.after.quality) == {"accuracy"}


TARGETS = [
    (0.5, 'write {"sparsity": 0.5} or {"macs": 0.5}'),
    ({"macs": 50}, "write 0.5"),
    ({"params": 1.5}, "write 0.015"),
    ({"macs": True}, "valid number"),
    ({"sparsity": "50%"}, "write 0.5"),
    ({"flops": 0.5}, "write macs"),
    ("macs", "is not a mapping"),
]


@pytest.mark.parametrize(("target", "words"), TARGETS, ids=str)
def test_what_is_no_target(target: Any, words: str) -> None:
    asks = {
        "plan": lambda: sc.plan(net(), X, target=target),
        "prune": lambda: sc.prune(net(), X, target=target),
        "estimate": lambda: sc.estimate(net(), X, recipe={"target": target}),
    }
    for entry, ask in asks.items():
        with pytest.raises(RecipeError) as caught:
            ask()
        # A recipe that is no mapping is answered by the recipe's own words.
        if entry == "plan" or isinstance(target, dict):
            assert words in str(caught.value)
    with pytest.raises(RecipeError):
        sc.select({"a": torch.rand(8)}, sparsity=50)


def test_wrappers_are_taken_off_with_a_word() -> None:
    wrapped = nn.DataParallel(net())
    for entry in ENTRIES.values():
        with pytest.warns(WrapperWarning, match=r"model\.module"):
            entry(wrapped, X)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"train": [X], "val": [X]}, "write test"),
        ({"training": [X]}, "write train"),
        ({"image": X}, "put the batch into a list"),
        (TensorDataset(X), "DataLoader(dataset"),
        (X, "[tensor]"),
        ((x for x in [X]), "read only once"),
    ],
    ids=["val", "training", "batch", "dataset", "tensor", "generator"],
)
def test_what_is_no_data(data: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        sc.prune(net(), X, data=data, target={"macs": 0.5})
    assert words in str(caught.value)


def test_a_gain_that_training_alone_may_have_brought_is_called_so() -> None:
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    y = (x.mean((1, 2, 3)) > 0).long()
    recipe = {
        "target": {"sparsity": 0.25},
        "recover": [{"method": "finetune", "epochs": 30, "optimizer": {"name": "adam", "lr": 0.02}}],
        "measure": {"latency": False},
    }
    result = sc.prune(net(), data=[(x, y)], test=[(x, y)], recipe=recipe)
    before, after = result.report.before.quality["accuracy"], result.report.after.quality["accuracy"]
    assert after > before
    assert "the dense model was not given the same steps" in repr(result)


def test_macs_are_those_of_one_sample_whatever_the_batch() -> None:
    found = {sc.inspect(net(), torch.zeros(size, 3, 8, 8)).macs for size in (1, 2, 5)}
    assert len(found) == 1
    assert "MACs per sample" in str(sc.inspect(net(), X))
    assert "macs per sample" in sc.plan(net(), X, target={"macs": 0.5}).explain()


def test_what_is_always_locked_is_called_normal() -> None:
    from secateur.report.terminal import plain_lines

    result = sc.prune(
        net(), X, target={"sparsity": 0.5}, recipe={"target": {"macs": 0.5}, "measure": {"latency": False}}
    )
    assert any("normal: inputs, outputs and positions" in line for line in plain_lines(result.report))
    assert "locked (normal: inputs, outputs and positions" in str(sc.inspect(net(), X))
    unusual = sc.inspect(net(), X, protect=["0"])
    assert "protected" in str(unusual)
    assert "normal" not in str(unusual)


def test_unknown_granularity_is_what_is_wrong_also_with_other_options() -> None:
    with pytest.raises(RecipeError, match="unknown granularity"):
        sc.plan(net(), X, granularity="chanel", expressible=True, target={"macs": 0.5})


def test_masks_that_should_hold_are_held_where_the_page_says_so() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    handle = sc.mask_model(model, sc.select(sc.score(model), sparsity=0.5))
    handle.hold(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        optimizer.step()
    assert handle.sparsity().zeros == handle.sparsity().masked


def test_a_target_out_of_reach_is_told_in_numbers_of_one_form() -> None:
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 10, 3))
    with pytest.raises(TargetError) as error:
        sc.plan(net, torch.zeros(1, 3, 32, 32), target={"macs": 0.001})
    numbers = re.findall(r"\d[\d.,e+]*", f"{error.value.what} {error.value.why}")
    assert len(numbers) == 3
    assert all(re.fullmatch(r"\d{1,3}(,\d{3})*,?\.?", number) for number in numbers), numbers
