"""What the page about other libraries says of those that are not installed here; skipped where they are absent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.cli.main import main
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


OWN = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))


def data():
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(64, 4, generator=draws)
    part = [(x[i : i + 16], (x[i : i + 16, 0] > 0).long()) for i in range(0, 64, 16)]
    return {"train": part, "test": part}
"""
QUICK = ["--sparsity", "0.5", "--granularity", "neuron", "--recover", "finetune:epochs=1", "--out", "o"]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    Path("tracked_net.py").write_text(OWN)
    return ["prune", "tracked_net.py:build", "--data", "tracked_net.py:data", *QUICK, "--set", "measure.latency=false"]


def test_wandb_logs_a_run_of_the_command_line(own: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert main([*own, "--track", "wandb"]) == 0
    (log,) = Path("wandb").glob("offline-run-*/run-*.wandb")
    content = log.read_bytes()
    assert all(name in content for name in (b"train/loss", b"before/accuracy", b"after/accuracy", b"target.sparsity"))


def test_mlflow_logs_a_run_of_the_command_line(own: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", minversion="3")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs.db")
    assert main([*own, "--track", "mlflow"]) == 0
    mlflow.set_tracking_uri("sqlite:///runs.db")
    (run,) = mlflow.search_runs(experiment_names=["tracked_net.py-build"], output_format="list")
    assert {"train/loss", "train/lr", "before/accuracy", "after/accuracy"} <= set(run.data.metrics)
    assert run.data.params["target.sparsity"] == "0.5"


METRIC = """
import datasets
import evaluate


class Misses(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"misses": float(sum(a != b for a, b in zip(predictions, references)))}
"""


def test_a_metric_of_the_library_evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = pytest.importorskip("evaluate")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (tmp_path / "misses").mkdir()
    (tmp_path / "misses/misses.py").write_text(METRIC)
    found = evaluate.load(str(tmp_path / "misses"))
    random = torch.Generator().manual_seed(1)
    data = [(torch.randn(16, 16, generator=random), torch.randint(0, 4, (16,), generator=random)) for _ in range(4)]
    result = sc.prune(net(), data=data, test=data, granularity="neuron", target={"sparsity": 0.5}, evaluate=found)
    model = net()
    before = sum(int((model(x).argmax(1) != y).sum()) for x, y in data)
    assert result.report.before.quality == {"misses": before}
    assert set(result.report.after.quality) == {"misses"}


def test_a_data_set_of_the_library_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    image = pytest.importorskip("PIL.Image")
    from secateur.sources import resolve_data

    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for part, name, level in [(p, n, v) for p in ("train", "test") for n, v in (("cat", 10), ("dog", 200))]:
        folder = tmp_path / "pictures" / part / name
        folder.mkdir(parents=True)
        for number in range(5):
            image.fromarray(np.full((6, 5, 3), level + number, np.uint8)).save(folder / f"{number}.png")
    data = resolve_data(f"hf:{tmp_path / 'pictures'}")
    (x, y), *_ = list(data.test)
    assert x.shape == (10, 3, 6, 5)
    assert sorted(y.tolist()) == [0] * 5 + [1] * 5
    assert x[y == 0].mean() < 0 < x[y == 1].mean()
