"""A refit block by block gives what a refit through the whole model gives, and is taken only where it does."""

import copy
import os

import pytest
import torch
from tiny_language_models import llama, small_gpt2
from torch import nn

from secateur.planning.build import make_plan
from secateur.solve import refit, refit_blocks
from secateur.solve.refit import refit_consumers
from secateur.solve.refit_seen import RefitBatch


def ids(rows=6, seed=3):
    return torch.randint(0, 40, (rows, 12), generator=torch.Generator().manual_seed(seed))


def padded():
    mask = torch.ones(6, 12, dtype=torch.int64)
    mask[:3, 8:] = 0
    return [{"input_ids": ids(seed=s), "attention_mask": mask} for s in range(3)]


def plain():
    return [{"input_ids": ids(seed=s)} for s in range(3)]


NARROWER = {  # heads and inner neurons; the hidden state keeps its width
    "target": {"sparsity": 0.5}, "granularity": ["head", "neuron"], "scope": "local",
    "protect": ["type:Embedding"],
}  # fmt: skip


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    def __init__(self, count=4, kind=Block):
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(count))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Deep(Block):
    """A layer in the middle loses inputs and outputs."""

    def __init__(self):
        super().__init__()
        self.middle = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.middle(torch.relu(self.up(x)))))


class Whispering(Block):
    """Tells the block behind it something that is not in the hidden state."""

    said = [0.0]

    def forward(self, x):
        found = x + self.down(torch.relu(self.up(x))) + 0.3 * self.said[0]
        self.said[0] = float(x.detach().mean())
        return found


def t5():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def both(model, data, monkeypatch, what="weights", **options):
    """Cut weights, fitted block by block where that can be, and through the whole model; whether it could be."""
    example = data[0]
    plan = make_plan(model, example, **NARROWER | options)
    found, asked, taken = [], refit_blocks.blocks_alone, []
    for whole in (False, True):

        def watched(*args, whole=whole):
            alone = None if whole else asked(*args)
            taken.append(alone is not None)
            return alone

        monkeypatch.setattr(refit, "blocks_alone", watched)
        cut = plan.apply(copy.deepcopy(model))
        changed = refit_consumers(model, cut, data, cuts=plan.cuts, masks=plan.masks, what=what)
        for name, value in changed.items():
            torch.testing.assert_close(cut.get_parameter(name).detach(), value, rtol=0, atol=0)
        before = plan.apply(copy.deepcopy(model)).state_dict()
        moved = {name for name, value in cut.state_dict().items() if not torch.equal(value, before[name])}
        assert moved == set(changed)
        found.append(changed)
    assert taken[1] is False
    return *found, taken[0]


MASKS = {"granularity": "element", "protect": ["type:Embedding", "lm_head"]}


@pytest.mark.parametrize(
    ("make", "data", "options"),
    [(llama, plain, {}), (llama, padded, {}), (small_gpt2, plain, {}), (small_gpt2, plain, {"what": "bias"}),
     (llama, plain, MASKS)],
)  # fmt: skip
def test_it_is_what_the_whole_model_gives(make, data, options, monkeypatch):
    alone, whole, taken = both(make().double(), data(), monkeypatch, **options)
    assert taken
    assert set(alone) == set(whole)
    assert len(whole) >= 4
    for name, value in whole.items():
        torch.testing.assert_close(alone[name], value, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "whole model"])
def test_padding_is_not_fitted(whole, monkeypatch):
    """Padded samples give the weights that the same samples give one by one, without any padding."""
    model, found = llama().double(), []
    alone = [
        {"input_ids": row[: int(real.sum())][None]}
        for batch in padded()
        for row, real in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    plan = make_plan(model, {"input_ids": ids()}, criterion="magnitude", **{**NARROWER, "granularity": "neuron"})
    if whole:
        monkeypatch.setattr(refit, "blocks_alone", lambda *_: None)
    for data in (padded(), alone):
        found.append(refit_consumers(model, plan.apply(copy.deepcopy(model)), data, cuts=plan.cuts, ridge=1e-4))
    assert len(found[0]) >= 4
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-6, atol=1e-8)


def test_layers_that_lose_inputs_and_outputs(monkeypatch):
    torch.manual_seed(0)
    model = Stack(kind=Deep).double().eval()
    data = [torch.randn(20, 6, dtype=torch.float64) for _ in range(3)]
    alone, whole, taken = both(model, data, monkeypatch, granularity="neuron", protect=())
    assert taken
    assert "layers.0.middle.weight" in whole
    for name, value in whole.items():
        torch.testing.assert_close(alone[name], value, rtol=1e-7, atol=1e-9)


def test_an_encoder_with_a_decoder_goes_through_the_whole_model(monkeypatch):
    data = [{"input_ids": ids(seed=s), "decoder_input_ids": ids(seed=s + 9)} for s in range(2)]
    alone, whole, taken = both(t5().double(), data, monkeypatch, granularity="neuron")
    assert not taken
    for name, value in whole.items():
        torch.testing.assert_close(alone[name], value, rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "expected"), [(Block, True), (Whispering, False)])
def test_blocks_that_tell_each_other_more_than_the_hidden_state_are_not_run_alone(kind, expected):
    torch.manual_seed(0)
    model = Stack(kind=kind).double().eval()
    data = [torch.randn(5, 6, dtype=torch.float64) for _ in range(3)]
    cut = copy.deepcopy(model)
    Whispering.said[0] = 0.0
    weights = [f"layers.{i}.down.weight" for i in range(4)]
    found = refit_blocks.blocks_alone((model, cut), data[0], weights, lambda: (RefitBatch(x, x) for x in data))
    assert (found is not None) == expected


def test_the_first_block_runs_as_often_however_many_layers_are_behind_it(monkeypatch, tmp_path):
    """Through the whole model it runs once more per batch for every layer."""
    data, runs = plain(), {}
    for layers in (3, 5):
        model = llama(layers)
        plan = make_plan(model, data[0], **NARROWER | {"granularity": "neuron"})
        for whole in (False, True):
            with monkeypatch.context() as patch, (tmp_path / f"{layers}{whole}").open("a+") as seen:
                if whole:
                    patch.setattr(refit, "blocks_alone", lambda *args: None)
                cut, number = plan.apply(copy.deepcopy(model)), seen.fileno()
                # A file, since what a hook notes in memory is put back with the model.
                hook = cut.model.layers[0].register_forward_hook(lambda *_, n=number: os.write(n, b"1") and None)
                refit_consumers(model, cut, data, cuts=plan.cuts)
                hook.remove()
                seen.seek(0)
                runs[layers, whole] = len(seen.read())
    assert runs[5, True] == runs[3, True] + 2 * len(data)
    assert runs[5, False] == runs[3, False]


def test_hidden_states_beyond_the_room_give_the_same(monkeypatch):
    model, data = llama(3).double(), plain()
    plan = make_plan(model, data[0], **NARROWER | {"granularity": "neuron"})
    found = []
    for room in (refit_blocks.ROOM, 2):
        monkeypatch.setattr(refit_blocks, "ROOM", room)
        found.append(refit_consumers(model, plan.apply(copy.deepcopy(model)), data, cuts=plan.cuts))
    assert len(found[0]) == 3
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=0)


def test_progress_counts_every_batch_of_every_layer(monkeypatch):
    model, data, seen = llama(), plain(), []
    plan = make_plan(model, data[0], **NARROWER | {"granularity": "neuron"})
    refit_consumers(model, plan.apply(model), data, cuts=plan.cuts, progress=lambda *a: seen.append(a))
    assert seen == [(i + 1, 12) for i in range(12)]
