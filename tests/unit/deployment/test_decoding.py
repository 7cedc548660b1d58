"""Language models that write: a step of one token decides, and what is written stays the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.deployment import native
from secateur.deployment.contest import Contest
from secateur.deployment.decoding import step_of, writes
from secateur.deployment.linear import SparseLinear
from secateur.deployment.packed import install

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def zeroed(model: nn.Module, share: float) -> nn.Module:
    found = copy.deepcopy(model)
    plan = sc.plan(
        found, {"input_ids": torch.ones(1, 4, dtype=torch.long)}, criterion="magnitude", granularity="element",
        scope="local", target={"sparsity": share},
    )  # fmt: skip
    return plan.apply(found, inplace=True)


def packed_everywhere(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    found = copy.deepcopy(model)
    layers = {name: layer for name, layer in found.named_modules() if type(layer) is nn.Linear}
    install(found, {name: SparseLinear.of(layer, "slide16", dtype) for name, layer in layers.items()})
    return found


@pytest.mark.parametrize(("cache", "beams"), [(None, 2), ("static", 1)])
def test_generate_writes_what_the_masked_model_writes(llama: nn.Module, cache: str | None, beams: int) -> None:
    masked = zeroed(llama, 0.5)
    prompt = torch.randint(1, 96, (2, 5), generator=torch.Generator().manual_seed(1))
    asked = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache, "num_beams": beams}
    wanted = masked.generate(prompt, **asked)
    assert wanted.shape == (2, 13)
    assert torch.equal(packed_everywhere(masked, None).generate(prompt, **asked), wanted)


def test_logits_differ_by_the_rounding_of_weights_alone(llama: nn.Module) -> None:
    masked = zeroed(llama, 0.7)
    tokens = torch.randint(1, 96, (2, 7))
    rounded = copy.deepcopy(masked)
    for layer in rounded.modules():
        if type(layer) is nn.Linear:
            layer.weight = nn.Parameter(layer.weight.detach().bfloat16().float())
    with torch.no_grad():
        found, wanted = packed_everywhere(masked, torch.bfloat16)(tokens).logits, rounded(tokens).logits
    assert torch.allclose(found, wanted, atol=1e-5 * float(wanted.abs().max()))


def test_a_step_holds_one_token_of_models_that_write_and_of_no_others(llama: nn.Module) -> None:
    tokens = torch.ones(3, 7, dtype=torch.long)
    assert step_of(llama, {"input_ids": tokens, "attention_mask": tokens})["input_ids"].shape == (3, 1)
    assert step_of(llama, tokens).shape == (3, 1)
    assert step_of(llama, (tokens,)).shape == (3, 1)
    embedded = {"inputs_embeds": torch.zeros(3, 7, 32)}
    assert step_of(llama, embedded) is embedded
    rows = torch.zeros(3, 7)
    assert step_of(llama, rows) is rows, "numbers are no tokens"
    plain = nn.Linear(7, 2)
    x = torch.ones(3, 7)
    assert not writes(plain)
    assert step_of(plain, x) is x
    both = transformers.T5Config(vocab_size=96, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2)
    assert not writes(transformers.T5ForConditionalGeneration(both))


@pytest.mark.skipif(bool(native.why_not()), reason=native.why_not())
def test_deploy_measures_steps_and_not_prompts(llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()

    def told(self: Contest, layer: nn.Linear, found: list, rows: int) -> dict[str, float]:
        seen.add(rows)
        return {one.name: 2.0 for one in found}

    monkeypatch.setattr(Contest, "ratios", told)
    sc.deploy(llama, {"input_ids": torch.ones(1, 40, dtype=torch.long)}, batch_sizes=[1, 3], table=False)
    assert seen == {1, 3}
