"""Further inputs of a large model go through some of many alike blocks, and a wrong cut is found there all the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.errors import CertificateError
from secateur.kinds import trials
from secateur.kinds.shallow import PassedBlocks, passing, repeated
from secateur.kinds.slices.ablation import ablated

TOKENS = torch.tensor([[5, 1, 7, 3] * 10])


class Block(nn.Module):
    def __init__(self, place: int, wide: bool = False) -> None:
        super().__init__()
        self.place, self.wide = place, wide
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Deep(nn.Module):
    """Tokens, blocks of which the fourth says that it is wide, and a head."""

    def __init__(self, blocks: int = 8) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(Block(i, wide=i == 3) for i in range(blocks))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "LARGE", 1)


def test_of_each_kind_one_runs_and_the_last() -> None:
    model = Deep()
    alike = {f"blocks.{i}.up.weight": {0: None} for i in range(8)}
    assert repeated(model, alike) == ("blocks.1", "blocks.2", "blocks.4", "blocks.5", "blocks.6")  # 3 is wide, 7 last
    other = {**alike, "blocks.5.down.weight": {0: None}}
    assert "blocks.5" not in repeated(model, other)
    assert repeated(Deep(3), {}) == ()


def test_only_blocks_that_hand_on_a_state_of_the_same_form_are_passed_by() -> None:
    model = Deep(5).eval()
    model.blocks[1].forward = lambda x: (x,)[0][..., :8] * 1.0
    blocks = PassedBlocks(["blocks.1", "blocks.2", "head"])
    with blocks.watched(model):
        model(TOKENS)
    assert blocks.passed == ("blocks.1", "blocks.2")
    before = dict(vars(model.blocks[1]))
    with passing(model, blocks.passed):
        state = torch.randn(1, 2, 8)
        assert torch.equal(model.blocks[1](state), state)
    assert vars(model.blocks[1]) == before
    with blocks.watched(model):
        model.blocks[2](torch.randn(1, 2, 8))
        model(TOKENS)
    assert blocks.passed == ("blocks.1",)  # the other ran twice


def test_a_large_model_is_tried_on_little_and_the_certificate_says_so(everything_is_large: None) -> None:
    torch.manual_seed(0)
    model = Deep().eval()
    plan = sc.plan(model, TOKENS, target={"sparsity": 0.3}, criterion="random")
    plan.apply(model)
    assert plan.certificate is not None
    what = [trial.input for trial in plan.certificate.trials]
    assert what[0] == "the example"
    assert any("size 8 for 40" in each and "blocks that are like others" in each for each in what)
    assert any("size 48 for 40" in each for each in what)
    assert any("training mode" in each for each in what)


class Odd(Deep):
    """Answers otherwise in some cases."""

    odd = ""

    def forward(self, ids: Tensor) -> Tensor:
        cases = {
            "longer": ids.shape[1] > 40,
            "shorter": ids.shape[1] < 40,
            "batch": len(ids) > 1,
            "train": self.training,
        }
        return super().forward(ids) + float(cases.get(self.odd, False))


@pytest.mark.parametrize("odd", ["longer", "shorter", "batch", "train"])
def test_what_is_wrong_elsewhere_only_is_found_through_few_blocks(everything_is_large: None, odd: str) -> None:
    torch.manual_seed(0)
    model = Odd().eval()
    plan = sc.plan(model, TOKENS, target={"sparsity": 0.3}, criterion="random")
    cut = plan.edit.copy(model)
    blocks = repeated(model, plan.cuts)
    assert len(trials.tried([partial(ablated, cuts=plan.cuts)], model, cut, TOKENS, blocks=blocks).trials) == 4
    cut.odd = odd
    with pytest.raises(CertificateError):
        trials.tried([partial(ablated, cuts=plan.cuts)], model, cut, TOKENS, blocks=blocks)


MANY = torch.arange(128).view(1, 128) % 9


def test_the_example_is_left_to_the_replay_where_all_blocks_run_on_less(everything_is_large: None) -> None:
    torch.manual_seed(0)
    model = Deep().eval()
    plan = sc.plan(model, MANY, target={"sparsity": 0.3}, criterion="random")
    plan.apply(model)
    assert plan.certificate is not None
    what = [trial.input for trial in plan.certificate.trials]
    assert what[0] == "other values, batch 2 for 1, size 8 for 128"
    assert any("size 136 for 128, without 5 blocks" in each for each in what)
    assert "the example" not in what
    assert any("the replay alone" in note for note in plan.certificate.notes)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("block", range(8))
@pytest.mark.parametrize("effort", ["default", "full"])
def test_what_is_wrong_in_any_block_is_found_without_the_replay(
    everything_is_large: None, block: int, effort: trials.Effort
) -> None:
    torch.manual_seed(0)
    model = Deep().eval()
    plan = sc.plan(model, MANY, target={"sparsity": 0.3}, criterion="random")
    cut, make = plan.edit.copy(model), partial(ablated, cuts=plan.cuts)
    blocks = repeated(model, plan.cuts)

    def prove() -> trials.Tried:
        return trials.tried([make], model, cut, MANY, blocks=blocks, replayed=True, effort=effort)

    assert prove().on_example == (effort == "full")
    with torch.no_grad():
        cut.blocks[block].down.bias += 0.1
    with pytest.raises(CertificateError):
        prove()


class Short(Deep):
    """Takes no more tokens than the example has."""

    def forward(self, ids: Tensor) -> Tensor:
        if ids.shape[1] > 128:
            raise ValueError("too long")
        return super().forward(ids)


def test_where_nothing_longer_is_taken_the_example_runs_through_few_blocks(everything_is_large: None) -> None:
    torch.manual_seed(0)
    model = Short().eval()
    plan = sc.plan(model, MANY, target={"sparsity": 0.3}, criterion="random")
    cut, make = plan.edit.copy(model), partial(ablated, cuts=plan.cuts)
    found = trials.tried([make], model, cut, MANY, blocks=repeated(model, plan.cuts), replayed=True)
    assert "the example, without 5 blocks that are like others" in [trial.input for trial in found.trials]


def chain(layer: Callable[[], list[nn.Module]], *, nested: bool) -> nn.Sequential:
    """A plain stack, without shortcuts: every layer hands on other units than it takes."""
    layers = [layer() for _ in range(6)]
    return nn.Sequential(*(nn.Sequential(*each) for each in layers) if nested else (m for each in layers for m in each))


CHAINS = {
    "convolutions": (
        lambda: [nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()],
        torch.randn(2, 8, 6, 6),
    ),
    "linear": (lambda: [nn.Linear(8, 8), nn.ReLU()], torch.randn(2, 8)),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("which", CHAINS)
def test_blocks_that_hand_on_other_units_than_they_take_are_not_passed_by(
    everything_is_large: None, which: str, scope: str, nested: bool
) -> None:
    torch.manual_seed(0)
    layer, example = CHAINS[which]
    model = chain(layer, nested=nested).eval()
    plan = sc.plan(model, example, target={"sparsity": 0.5}, criterion="random", scope=scope)
    cut = plan.apply(model)
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in model.parameters())
    assert plan.certificate is not None
    what = [trial.input for trial in plan.certificate.trials]
    assert len(what) > 2
    assert not any("blocks that are like others" in each for each in what)
    # What is wrong is found all the same, wherever it lies, and on inputs that differ from the example alone.
    blocks, make = repeated(model, plan.cuts), partial(ablated, cuts=plan.cuts)
    assert blocks
    for batch in (len(example), len(example) + 1):
        wrong = plan.edit.copy(model)
        wrong.register_forward_hook(lambda _, args, out, batch=batch: out + 0.1 * (len(args[0]) == batch))
        with pytest.raises(CertificateError):
            trials.tried([make], model, wrong, example, blocks=blocks)
