"""Transformers architectures: cut without per-model code, certified, trainable; or a known, named refusal."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from transformers_cut import cut_and_prove
from transformers_zoo import CASES, build

from secateur.structure.capture import capture
from secateur.structure.cost import CostModel
from secateur.structure.groups import structure

pytestmark = pytest.mark.filterwarnings("ignore")

FAST = (
    "LlamaForCausalLM", "Qwen3ForCausalLM:eager", "GPT2LMHeadModel", "MixtralForCausalLM", "DeepseekV3ForCausalLM",
    "MambaForCausalLM", "BertForSequenceClassification", "AlbertForSequenceClassification",
    "FunnelForSequenceClassification",
    "T5ForConditionalGeneration", "ViTForImageClassification", "SwinForImageClassification",
    "SegformerForSemanticSegmentation", "ResNetForImageClassification", "WhisperForConditionalGeneration",
    "Wav2Vec2ForCTC", "CLIPModel",
)  # fmt: skip
# Below a tenth of the parameters, and why: the encoder's width leaves the model as an output, and its attention
# addresses windows through explicit strides.
SMALL = {"LEDForConditionalGeneration": "accessed through explicit strides"}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else (pytest.mark.slow,)) for name in CASES]
)
def test_cut_is_certified_and_trainable(name: str) -> None:
    model, inputs = build(name)
    before = copy.deepcopy(model.state_dict())
    outcome = cut_and_prove(model, inputs)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    if name in SMALL:
        assert any(SMALL[name] in reason for reason in outcome.locks)
    else:
        assert outcome.share >= 0.1, outcome.locks


def test_zoo_covers_enough_architectures() -> None:
    architectures = {case.model for case in CASES.values()}
    assert len(architectures) >= 70
    assert len(SMALL) <= 0.05 * len(architectures)


def test_heads_of_all_kinds_are_units() -> None:
    model, inputs = build("LlamaForCausalLM")
    heads = [g for g in structure(model, capture(model, inputs)).groups if g.granularity == "head"]
    assert sorted(g.size for g in heads) == [2, 2, 2, 2]  # per layer: key heads, and query heads of each
    assert not any(g.locks for g in heads)


def test_head_counts_of_a_shared_config_shrink_together() -> None:
    model, inputs = build("FunnelForSequenceClassification")
    heads = [g for g in structure(model, capture(model, inputs)).groups if g.granularity == "head"]
    assert len(heads) == 1
    assert not heads[0].locks


def test_capture_leaves_config_attributes_and_caches_alone() -> None:
    model, inputs = build("LevitForImageClassification")
    plain = [(store, dict(store)) for store in _stores(model)]
    capture(model, inputs)
    for store, before in plain:
        assert store.keys() == before.keys()
        assert all(type(store[key]) is type(value) for key, value in before.items())
    assert all(not m.attention_bias_cache for m in model.modules() if hasattr(m, "attention_bias_cache"))


def _stores(model: nn.Module) -> list[dict[str, Any]]:
    return [vars(model.config), *(vars(module) for module in model.modules())]


def test_expert_products_keep_aligned_rows() -> None:
    model, inputs = build("MixtralForCausalLM")
    found = structure(model, capture(model, inputs))
    groups = [g for g in found.groups if "experts" in g.name and not g.locks]
    assert groups
    assert all(g.attributes["multiple"] == 8 for g in groups)  # 16 bytes of the halves that it can be cast to


def test_a_model_on_meta_tensors_is_planned_from_shapes() -> None:
    import transformers

    config = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    counts = []
    for layers in (2, 4):
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(
                transformers.LlamaConfig(**config, num_key_value_heads=2, num_hidden_layers=layers)
            )
        record = capture(model, {"input_ids": torch.zeros(1, 8, dtype=torch.int64)})
        found = structure(model, record)
        free = [g for g in found.groups if g.granularity == "neuron" and not g.locks]
        assert len(free) == layers + 1  # one per feed-forward network, and the width of all layers
        half = {found.atoms[g.name].id: g.size // 2 for g in free}
        assert CostModel(model, record).params(half) < 0.6 * sum(p.numel() for p in model.parameters())
        counts.append(len(record.steps))
    assert counts[1] < 2 * counts[0]
