"""Mixtures of experts from transformers: whole experts are cut, certified, trained, saved and loaded."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from transformers_zoo import build

import secateur as sc
from secateur.errors import SecateurError, UnsupportedError

pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = (
    "MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM", "GraniteMoeForCausalLM",
    "PhimoeForCausalLM", "GptOssForCausalLM", "DeepseekV2ForCausalLM",
)  # fmt: skip


@pytest.mark.sampled(5)
@pytest.mark.parametrize("kind", ["grouped_mm", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_experts_are_cut(name: str, kind: str, tmp_path: Path) -> None:
    model, example = build(name)
    model.config._experts_implementation = kind
    fresh = copy.deepcopy(model)
    plan = sc.plan(model, example, granularity="expert", target={"sparsity": 0.25})
    cut = plan.apply(model)
    assert plan.certificate is not None
    assert plan.certificate.method == "masked-router"
    assert all(len(group["removed"]) == 1 for group in plan.groups.values())
    fields = ("num_experts", "num_local_experts", "n_routed_experts")
    assert {vars(cut.config)[f] for f in fields if f in vars(cut.config)} == {3}
    plan.save(tmp_path / "plan.json")
    again = sc.Plan.load(tmp_path / "plan.json").apply(fresh)
    with torch.no_grad():
        assert torch.equal(cut(**example).logits, again(**example).logits)
    cut.train()
    optimizer = torch.optim.SGD(cut.parameters(), lr=0.01)
    cut(**example, labels=example["input_ids"]).loss.backward()
    optimizer.step()


@pytest.mark.sampled(5)
@pytest.mark.parametrize("kind", ["grouped_mm", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_reap_is_what_one_expert_alone_adds(name: str, kind: str) -> None:
    model, example = build(name)
    model.config._experts_implementation = kind
    scores = sc.score(model, example, criterion="reap", granularity="expert", data=[example])
    heard = {}
    for group in scores:
        experts = model.get_submodule(group.removesuffix("/expert")).experts
        experts.register_forward_hook(lambda m, args, _, group=group: heard.update({group: (m, *args)}))
    with torch.no_grad():
        model(**example)
        for group, (experts, hidden, chosen, weights) in heard.items():
            experts._forward_hooks.clear()
            for number in range(4):
                mine = chosen == number
                sizes = experts(hidden, chosen, weights * mine).flatten(0, -2).norm(dim=-1)[mine.any(-1).flatten()]
                wanted = sizes.double().mean().float() if len(sizes) else torch.tensor(0.0)
                torch.testing.assert_close(scores[group][number], wanted, rtol=1e-4, atol=1e-7)


def test_the_config_describes_the_result(tmp_path: Path) -> None:
    model, example = build("MixtralForCausalLM")
    plan = sc.plan(model, example, granularity="expert", target={"params": 0.7}, expressible=True)
    cut = plan.apply(model).eval()
    cut.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.num_local_experts == 2
    with torch.no_grad():
        assert torch.allclose(cut(**example).logits, again(**example).logits, atol=1e-6)


def test_experts_in_groups_are_refused() -> None:
    model, example = build("DeepseekV3ForCausalLM")
    with pytest.raises(UnsupportedError, match="groups of fixed size"):
        sc.plan(model, example, granularity="expert", target={"count": 1})


def test_a_dense_model_has_no_experts() -> None:
    model, example = build("LlamaForCausalLM")
    with pytest.raises(SecateurError, match="no experts"):
        sc.plan(model, example, granularity="expert", target={"count": 1})
