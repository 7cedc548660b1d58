"""Loops of others: the same amounts, the same zeros, and checkpoints that bring the pruner back."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.errors import FileRefusedError, InputError, RecipeError, UnsupportedError
from secateur.files.states import load_state, save_state
from secateur.training import MovementPruner, Pruner
from secateur.training.adapters.times import check_settings, in_steps


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


X, Y = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 3


def test_times_are_steps_or_shares():
    assert in_steps({"begin": 0.1, "end": 0.5, "every": 0.001}, 100) == {"begin": 10, "end": 50, "every": 1}
    assert in_steps({"begin": 3, "end": 7}, -1) == {"begin": 3, "end": 7}
    for wrong, total in (({"end": 0.5}, -1), ({"end": 1.5}, 100)):
        with pytest.raises(RecipeError):
            in_steps(wrong, total)


@pytest.mark.parametrize("kind", [Pruner, MovementPruner])
def test_a_wrong_word_is_said_when_the_callback_is_made(kind):
    check_settings(kind, {"sparsity": 0.5, "begin": 0.1, "end": 0.7, "every": 2, "protect": ["head"]})
    with pytest.raises(RecipeError, match="did you mean sparsity"):
        check_settings(kind, {"sparcity": 0.5})
    with pytest.raises(RecipeError, match="protect"):
        check_settings(kind, {"ignored_layers": []})
    with pytest.raises(RecipeError, match="the loop gives"):
        check_settings(kind, {"sparsity": 0.5, "optimizer": None})
    check_settings(lambda model, example, **settings: kind(model, example, **settings), {"anything": 1})


def test_states_survive_a_file(tmp_path):
    state = {"a": {1: torch.arange(3), "b": [torch.ones(2) > 0, None, 0.5]}, "text": "x", "done": 4}
    save_state(tmp_path / "s.safetensors", state)
    found = load_state(tmp_path / "s.safetensors")
    assert found["done"] == 4
    assert torch.equal(found["a"][1], torch.arange(3))
    assert found["a"]["b"][0].dtype == torch.bool
    assert found["a"]["b"][1:] == [None, 0.5]
    with pytest.raises(UnsupportedError):
        save_state(tmp_path / "t.safetensors", {"a": object()})
    from secateur.files import save_tensors

    save_tensors(tmp_path / "u.safetensors", {"a": torch.ones(1)})
    with pytest.raises(FileRefusedError):
        load_state(tmp_path / "u.safetensors")


# -- transformers ----------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = net()

    def forward(self, x, labels=None):
        logits = self.body(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(X)

    def __getitem__(self, at):
        return {"x": X[at], "labels": Y[at]}


def trainer(model, folder, callback, steps, **options):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=8, use_cpu=True, report_to=[],
        disable_tqdm=True, logging_strategy="no", save_strategy="steps", save_steps=5, **options,
        learning_rate=1e-2, weight_decay=0.1,
    )  # fmt: skip
    return transformers.Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[callback])


KINDS = {
    "element": {"sparsity": 0.75},
    "channel": {"sparsity": 0.5, "granularity": "channel", "example": {"x": X[:2], "labels": Y[:2]}},
    "movement": {"kind": MovementPruner, "sparsity": 0.5},
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_trainer_prunes_and_resumes_to_the_same_bytes(kind, tmp_path):
    pytest.importorskip("accelerate")
    from secateur.training.adapters.transformers import TrainerPruningCallback

    def callback():
        return TrainerPruningCallback(begin=2, end=0.8, every=2, **KINDS[kind])

    first = callback()
    whole = trainer(Classifier(), tmp_path / "a", first, 10, gradient_accumulation_steps=2)
    whole.train()
    assert first.pruner.done == 10
    removed, total = (first.pruner._removal if kind != "movement" else first.pruner._held).removed()
    assert removed == int(KINDS[kind]["sparsity"] * total + 0.5)

    second, model = callback(), Classifier()
    checkpoint = tmp_path / "a" / "checkpoint-5"
    if kind == "channel":
        second.restore(model, checkpoint)
    again = trainer(model, tmp_path / "a", second, 10, gradient_accumulation_steps=2)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert second.pruner.done == 10
    for one, two in zip(whole.model.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_without_a_pruner_is_refused(tmp_path):
    pytest.importorskip("accelerate")
    from secateur.training.adapters.transformers import TrainerPruningCallback

    with pytest.raises(InputError, match="no state"):
        TrainerPruningCallback(sparsity=0.5, end=2).restore(net(), tmp_path)


# -- accelerate ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_accelerate_counts_real_steps_and_its_checkpoints_hold_the_pruner(tmp_path):
    accelerate = pytest.importorskip("accelerate")

    def start():
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = net()
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
        pruner = Pruner(model, sparsity=0.8, end=6, optimizer=optimizer)
        accelerator.register_for_checkpointing(pruner)
        return accelerator, model, optimizer, pruner

    def train(accelerator, model, optimizer, pruner, batches):
        for at in range(batches):
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(X[at % 8 :: 8]), Y[at % 8 :: 8]))
                optimizer.step()
                optimizer.zero_grad()
                pruner.step()

    loop = start()
    train(*loop, 8)
    assert loop[3].done == 4
    loop[0].save_state(str(tmp_path / "here"))
    train(*loop, 8)
    again = start()
    again[0].load_state(str(tmp_path / "here"))
    assert again[3].done == 4
    train(*again, 8)
    assert again[3].sparsity == loop[3].sparsity == pytest.approx(0.8, abs=0.01)
    for one, two in zip(loop[1].state_dict().values(), again[1].state_dict().values(), strict=True):
        assert torch.equal(one, two)


# -- Lightning -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["element", "channel"])
def test_lightning_prunes_and_resumes_to_the_same_bytes(kind, tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    from secateur.training.adapters.lightning import LightningPruningCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.body = net()

        def forward(self, x):
            return self.body(x)

        def training_step(self, batch, index):
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)

    settings = {"element": {"sparsity": 0.75}, "channel": {
        "sparsity": 0.5, "granularity": "channel", "example": X[:2]}}[kind]  # fmt: skip

    def fit(module, steps, checkpoint=None):
        callback = LightningPruningCallback(begin=1, end=13, every=3, **settings)
        saver = lightning.callbacks.ModelCheckpoint(dirpath=tmp_path / "saved", every_n_train_steps=8, save_top_k=-1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runner = lightning.Trainer(
                max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False,
                callbacks=[callback, saver], enable_model_summary=False, default_root_dir=tmp_path,
                accumulate_grad_batches=2,
            )  # fmt: skip
            loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=4)
            runner.fit(module, loader, ckpt_path=checkpoint)
        return callback

    module = Module()
    callback = fit(module, 16)
    assert callback.pruner.done == 16
    removed, total = callback.pruner._removal.removed()
    assert removed == int(settings["sparsity"] * total + 0.5)
    other = Module()
    [checkpoint] = [
        path for path in (tmp_path / "saved").iterdir() if "step=8" in path.name
    ]  # the end of an epoch: Lightning begins the data anew
    if kind == "channel":
        states = torch.load(checkpoint, weights_only=False)["callbacks"]
        Pruner.restore_shapes(other, next(state for key, state in states.items() if "Pruning" in key))
    resumed = fit(other, 16, str(checkpoint))
    assert resumed.pruner.done == 16
    for one, two in zip(module.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two)


def test_a_copy_of_a_state_is_not_tied_to_the_loop():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = MovementPruner(model, sparsity=0.5, end=3, optimizer=optimizer)
    state = pruner.state_dict()
    before = copy.deepcopy(state["scores"])
    for _ in range(3):
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        pruner.step()
    assert all(torch.equal(before[name], score) for name, score in state["scores"].items())
