"""Architectures of transformers, tiny and random: branches of blocks go by themselves, or are refused by name."""

import pytest
import torch

import secateur as sc
from secateur.errors import UnsupportedError

transformers = pytest.importorskip("transformers")

from transformers_zoo import CASES, build  # noqa: E402

TEXT = [
    name
    for name, case in CASES.items()
    if case.inputs == "text" and name.endswith(("CausalLM", "LMHeadModel")) and name != "CTRLLMHeadModel"
]
OTHERS = [
    "T5ForConditionalGeneration", "BartForConditionalGeneration", "ViTForImageClassification",
    "SwinForImageClassification", "WhisperForConditionalGeneration",
]  # fmt: skip
REFUSED = {
    # attention and MLP read one norm, and are added one after the other
    "CohereForCausalLM": "no branches that can be removed",
    "Cohere2ForCausalLM": "no branches that can be removed",
    # the block reads a weight of its norm
    "MambaForCausalLM": "no attribute 'weight'",
    "Mamba2ForCausalLM": "no attribute 'weight'",
    "FalconMambaForCausalLM": "no attribute 'weight'",
    "RwkvForCausalLM": "writes to its own weight",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TEXT, *OTHERS])
def test_a_branch_goes_or_is_refused_by_name(name):
    model, example = build(name)
    asked = {"granularity": "sub_block", "criterion": "random", "target": {"count": 1}}
    if name in REFUSED:
        with pytest.raises(UnsupportedError, match=REFUSED[name]):
            sc.plan(model, example, **asked)
        return
    plan = sc.plan(model, example, **asked)
    cut = plan.apply(model)
    assert plan.certificate.max_abs_error == 0.0  # both add the same numbers in the same order
    before, after = plan.cost["params"]
    assert (before, after) == tuple(sum(p.numel() for p in one.parameters()) for one in (model, cut))
    assert after < before
    with torch.no_grad():
        assert all(torch.isfinite(t).all() for t in cut(**example).values() if isinstance(t, torch.Tensor))
