"""Weights whose missing slices are made only where they are read: nothing can tell them from weights that are made."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.kinds.slices import ablation
from secateur.kinds.slices.ablation import ablated
from secateur.kinds.slices.unmade import SameSlices
from secateur.model.tensors import cut_tensor

ROWS, COLUMNS = torch.tensor([0, 2, 3, 6, 7]), torch.tensor([1, 2, 4])


class Uses(nn.Module):
    """A weight, of which rows and columns go, in a use of the test's."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...] = (8, 6)) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(shape, generator=generator))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.weight)


def gappy() -> Tensor:
    """An input that lacks what the columns lack."""
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    return x.index_fill(1, torch.tensor([0, 3, 5]), float("nan"))


def _written(x: Tensor, weight: Tensor) -> Tensor:
    with torch.no_grad():
        weight.mul_(2)
    return F.linear(x, weight)


USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": F.linear,
    "matrix product": lambda x, w: x @ w.t(),
    "added": lambda x, w: torch.addmm(torch.ones(8), x, w.t()),
    "turned by transpose": lambda x, w: x @ w.transpose(0, 1),
    "turned by permute": lambda x, w: x @ w.permute(1, 0),
    "the first factor": lambda x, w: (w @ x.t()).t(),
    "with itself": lambda x, w: w @ w.t(),
    "scaled before": lambda x, w: F.linear(x, w * 3),
    "part of it": lambda x, w: F.linear(x, w[2:]),
    "in other dimensions": lambda x, w: F.linear(x, w.reshape(2, 4, 6).flatten(0, 1)),
    "a sum of it": lambda x, w: x.nan_to_num(0).sum() * w.sum(1),
    "its softmax": lambda x, w: F.linear(x, w.softmax(1)),
    "looked up": lambda x, w: F.embedding(torch.tensor([0, 2, 5]), w),
    "joined": lambda x, w: F.linear(x, torch.cat([w, w])),
    "written to": _written,
    "written to through data": lambda x, w: F.linear(x, w.data.clamp_(-0.5, 0.5)),
    "a mean that is a number": lambda x, w: F.linear(x, w) * float(w.detach().mean()),
    "in a convolution": lambda x, w: F.conv1d(x[:, :, None].expand(4, 6, 3), w[:, :, None].contiguous()),
}


def run(module: nn.Module, cuts: dict[str, dict[int, Tensor]], same: SameSlices | None, x: Tensor) -> list[Tensor]:
    """What a reference gives, called twice in eval and once with the graph of a training."""
    reference = ablated(module, cuts, same=same)
    found = []
    for graph in (False, False, True):
        with torch.set_grad_enabled(graph), reference.around():
            found.append(reference.model(x).detach())
    return found


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("use", USES)
def test_no_use_can_tell_whether_a_weight_was_made(use: str, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cuts = {"weight": {0: ROWS, 1: COLUMNS}}

    def answers(*, wait: bool) -> tuple[list[Tensor], Tensor]:
        module, cut = Uses(USES[use]), Uses(USES[use])
        before = module.weight.detach().clone()
        cut.weight = nn.Parameter(cut_tensor(module.weight, cuts["weight"]))
        if not wait:
            monkeypatch.setattr(ablation, "can_wait", lambda tensors, cuts: [])
        found = run(module, cuts, SameSlices(module, cut, cuts) if shared else None, gappy())
        assert torch.equal(module.weight, before)  # whatever the use writes, it writes to the copy
        return found, before

    later, made = answers(wait=True)[0], answers(wait=False)[0]
    for a, b in zip(later, made, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert any(bool((~torch.isnan(t)).any()) for t in made)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_too(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cuts = {"weight": {0: ROWS}} if groups == 2 else {"weight": {0: ROWS, 1: COLUMNS}}
    module = Uses(lambda x, w: F.conv2d(x, w, groups=groups), (8, 6 // groups, 1, 3))
    x = gappy() if groups == 1 else torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    x = x[:, :, None, None].expand(4, 6, 2, 5).contiguous()
    later = run(module, cuts, None, x)
    monkeypatch.setattr(ablation, "can_wait", lambda tensors, cuts: [])
    torch.testing.assert_close(later, run(module, cuts, None, x), equal_nan=True)


def test_a_weight_of_products_is_never_made_and_taken_from_the_cut_model() -> None:
    module, cuts = Uses(F.linear), {"weight": {0: ROWS, 1: COLUMNS}}
    cut = Uses(F.linear)
    cut.weight = nn.Parameter(cut_tensor(module.weight, cuts["weight"]))
    reference = ablated(module, cuts, same=SameSlices(module, cut, cuts))
    with torch.no_grad(), reference.around() as missing:
        reference.model(gappy())
    (unmade,) = missing.unmade.values()
    assert unmade._made is None
    (taken,) = missing._picked.values()
    assert taken.data_ptr() == cut.weight.data_ptr()


@pytest.mark.parametrize("place", [(0, 0), (4, 2), (2, 1)])
def test_only_what_holds_the_same_bits_is_taken(place: tuple[int, int]) -> None:
    module, cuts = Uses(F.linear), {"weight": {0: ROWS, 1: COLUMNS}}
    cut = Uses(F.linear)
    cut.weight = nn.Parameter(cut_tensor(module.weight, cuts["weight"]))
    assert SameSlices(module, cut, cuts).small("weight") is not None
    assert SameSlices(module, cut, cuts, frozenset(["weight"])).small("weight") is None
    with torch.no_grad():
        cut.weight[place] = torch.nextafter(cut.weight[place], torch.tensor(9.0))
    assert SameSlices(module, cut, cuts).small("weight") is None


def test_a_forward_that_writes_to_weights_is_not_believed() -> None:
    module, cuts = Uses(USES["written to"]), {"weight": {0: ROWS, 1: COLUMNS}}
    cut = Uses(USES["written to"])
    cut.weight = nn.Parameter(cut_tensor(module.weight, cuts["weight"]))
    same = SameSlices(module, cut, cuts)
    run(module, cuts, same, gappy())
    assert same.small("weight") is None
