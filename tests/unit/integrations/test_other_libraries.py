"""What the page about other libraries says of those that are not installed here; skipped where they are absent."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import SecateurError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).eval()


def test_a_cut_model_is_quantised_by_torchao_and_is_refused_afterwards() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    small = sc.plan(net(), X, granularity="neuron", target={"macs": 0.5}).apply(net())
    dense = small(X)
    quantization.quantize_(small, quantization.Int8WeightOnlyConfig())
    assert 0 < (small(X) - dense).abs().max() < 0.05 * dense.abs().max()
    with pytest.raises(SecateurError, match="prune the float model first"):
        sc.plan(small, X, granularity="neuron", target={"macs": 0.5})


def test_optuna_chooses_what_a_recipe_says() -> None:
    optuna = pytest.importorskip("optuna")
    random = torch.Generator().manual_seed(1)
    data = [(torch.randn(16, 16, generator=random), torch.randint(0, 4, (16,), generator=random)) for _ in range(4)]

    def objective(trial: optuna.Trial) -> float:
        result = sc.prune(
            net(),
            data=data,
            test=data,
            granularity="neuron",
            criterion=trial.suggest_categorical("criterion", ["l2", "taylor"]),
            target={"macs": trial.suggest_float("macs", 0.4, 0.9)},
            recover={"method": "finetune", "epochs": 1},
            recipe={"measure": {"latency": False}},
        )
        assert result.report.after.macs <= trial.params["macs"] * result.report.before.macs
        return result.report.after.quality["accuracy"]

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(objective, n_trials=3)
    assert study.best_value == max(trial.value for trial in study.trials)


@pytest.mark.parametrize("when", ["before", "after"])
def test_adapters_of_peft_come_before_or_after_the_cut(when: str) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=64, num_hidden_layers=2, bos_token_id=1, eos_token_id=2, **sizes)
    ).eval()
    example = {"input_ids": torch.randint(0, 64, (2, 7))}
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    if when == "before":
        adapted = peft.get_peft_model(model, lora).eval()
        small = sc.plan(adapted, example, granularity="neuron", target={"sparsity": 0.25}).apply(adapted)
        logits = small(**example).logits
        assert torch.allclose(small.merge_and_unload()(**example).logits, logits, atol=1e-5)
    else:
        small = sc.plan(model, example, granularity="neuron", target={"params": 0.8}, expressible=True).apply(model)
        adapted = peft.get_peft_model(small, lora)
        adapted(**example, labels=example["input_ids"]).loss.backward()
        trained = [name for name, parameter in adapted.named_parameters() if parameter.grad is not None]
        assert trained
        assert all("lora_" in name for name in trained)
