"""Architectures of transformers, tiny and random, pruned block by block: to the exact count, saved, loaded, counted."""

import pytest
import torch

import secateur as sc
from secateur.errors import UnsupportedError

transformers = pytest.importorskip("transformers")

from transformers_zoo import CASES, build  # noqa: E402

FAST = ("LlamaForCausalLM", "GPT2LMHeadModel", "GptOssForCausalLM")
# Layers as wide as their authors made them, whatever the config says, or no stack of blocks.
LARGE = ("CTRLLMHeadModel",)
TEXT = [
    name
    for name, case in CASES.items()
    if case.inputs == "text" and name.endswith(("CausalLM", "LMHeadModel")) and name not in LARGE
]
OTHERS = [
    "T5ForConditionalGeneration", "BartForConditionalGeneration", "BertForSequenceClassification",
    "ViTForImageClassification", "SwinForImageClassification", "WhisperForConditionalGeneration",
]  # fmt: skip
# Refused by name: the sentence says what the forward does that nobody could work with.
REFUSED = {"RwkvForCausalLM": "writes to its own weight"}
NAMES = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
    for name in (*TEXT, *OTHERS)
    if name not in REFUSED
]
# What may stay whole although it was asked for, and the word by which it is named.
NAMED = {
    "MambaForCausalLM": "grouped convolution",
    "Mamba2ForCausalLM": "grouped convolution",
    "FalconMambaForCausalLM": "grouped convolution",
    "Lfm2ForCausalLM": "grouped convolution",
}


def batches(example, count=4):
    """The example, and others of its form."""
    generator = torch.Generator().manual_seed(5)

    def other(value):
        if value.dtype == torch.int64:
            return torch.randint(3, 30, value.shape, generator=generator)
        return torch.randn(value.shape, generator=generator)

    return [example, *({key: other(value) for key, value in example.items()} for _ in range(count - 1))]


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_pruned_is_refused_by_name(name):
    model, example = build(name)
    with pytest.raises(UnsupportedError, match=REFUSED[name]):
        sc.plan(
            model,
            example,
            criterion="admm",
            scope="row",
            target={"sparsity": 0.5},
            data=batches(example),
            granularity="element",
        )


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_that_is_named_is_pruned_to_the_exact_count_and_the_zeros_are_loaded_again(name, tmp_path):
    model, example = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rule = {"name": "admm", "steps": 6, "choosing": 4, "polish": 2}
    plan = sc.plan(
        model,
        example,
        criterion=rule,
        granularity="element",
        scope="row",
        target={"sparsity": 0.5},
        data=batches(example),
    )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert plan.units["removed"] == round(0.5 * plan.units["total"])
    kept_whole = [one for one in plan.left_out if one.wanted]
    assert all(NAMED.get(name, "nothing") in one.why for one in kept_whole), kept_whole

    pruned = plan.apply(model)
    assert_zeros(pruned, plan)
    assert all(bool(torch.isfinite(value).all()) for value in pruned.parameters())
    pruned.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_zeros(loaded, plan)
    # Everything inside the blocks that is a matrix of a product is pruned, or is named.
    said = {*plan.masks, *(one.name for one in plan.left_out)}
    matrices = {key for key, value in model.named_parameters() if value.dim() > 1}
    assert matrices <= said


def assert_zeros(model, plan):
    parameters = dict(model.named_parameters())
    for key, mask in plan.masks.items():
        assert not bool(parameters[key][~mask].any()), key
    # Weights that were zero before, or fell on zero, may come on top; there are next to none.
    zeros = sum(int((parameters[key] == 0).sum()) for key in plan.masks)
    assert plan.units["removed"] <= zeros <= plan.units["removed"] + 8


# Residual branches of all blocks: two blocks of two, side by side as one; of encoder and decoder those with a second
# attention have three.
BRANCHES = {
    "LlamaForCausalLM": 4, "GPT2LMHeadModel": 4, "OPTForCausalLM": 4, "Gemma3ForCausalLM": 4, "MixtralForCausalLM": 4,
    "BloomForCausalLM": 4, "BertForSequenceClassification": 4, "ViTForImageClassification": 4, "MambaForCausalLM": 2,
    "FalconForCausalLM": 2, "GPTNeoXForCausalLM": 2, "T5ForConditionalGeneration": 10,
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in BRANCHES])
def test_sub_blocks_are_found_without_names_and_trained_with_every_zero_in_place(name):
    model, example = build(name)
    plan = sc.plan(
        model,
        example,
        criterion="admm",
        granularity="element",
        scope="row",
        target={"sparsity": 0.5},
        data=batches(example),
        blocks={"reconstruct": {"epochs": 1, "lr": 1e-3}},
    )
    assert any(f"{BRANCHES[name]} residual branches and 0 blocks" in note for note in plan.notes), plan.notes
    assert all(bool((plan.weights[key][~mask] == 0).all()) for key, mask in plan.masks.items())


@pytest.mark.slow
def test_norms_behind_the_residual_and_projections_around_the_stack_are_no_obstacle(tmp_path):
    # As the OPT of 350 million parameters has it: narrower embeddings, and every norm behind its sum.
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, ffn_dim=48, num_attention_heads=4, word_embed_proj_dim=16,
        do_layer_norm_before=False, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config).eval()
    example = {"input_ids": torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))}
    plan = sc.plan(
        model, example, criterion="admm", granularity="element", scope="row", target={"sparsity": 0.5},
        data=batches(example),
    )  # fmt: skip
    assert plan.units["removed"] == round(0.5 * plan.units["total"])
    assert not [one for one in plan.left_out if one.wanted]
    pruned = plan.apply(model)
    pruned.save_pretrained(tmp_path)
    assert_zeros(type(model).from_pretrained(tmp_path), plan)
