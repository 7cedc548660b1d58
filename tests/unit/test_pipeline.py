import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import FileRefusedError, InputError, NonFiniteError, PlanMismatchError, RecipeError
from secateur.measure import accuracy_on, macs, size_bytes
from secateur.recipe import bundled
from secateur.recover import finetune, refresh_batchnorm
from secateur.report.verdict import rows, verdict

sys.path.insert(0, str(Path(__file__).parent / "planning"))
from nets import Net, example, net

QUICK = {"measure": {"rounds": 2, "warmup": 0}}


def batches(seed=0, count=4, size=16):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, size, 1, 12, 12, generator=g)
    y = torch.randint(0, 10, (count, size), generator=g)
    return list(zip(x, y, strict=True))


FOR_TRANSFORMERS = ("transformer", "language-model-")


@pytest.mark.sampled(3)
# Those for transformers run on one: test_hugging_face_at_home.py, cli/test_cli_language_models.py.
@pytest.mark.parametrize("name", [name for name in bundled() if not name.startswith(FOR_TRANSFORMERS)])
def test_every_bundled_recipe_runs_saves_and_loads(name, tmp_path):
    model, data = net(), batches()
    before = copy.deepcopy(model.state_dict())
    result = sc.prune(model, data=data, recipe=name, overrides=["measure.rounds=2"], evaluate=accuracy_on(data))
    assert result.report.status == "ok"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    folder = result.save(tmp_path / "out")
    loaded = sc.load(folder, model=Net).eval()
    x = data[0][0]
    torch.testing.assert_close(loaded(x), result.model.eval()(x), atol=0, rtol=0)
    assert result.report.after.size_bytes == (folder / "model.safetensors").stat().st_size == size_bytes(loaded)
    assert result.report.after.macs == macs(loaded, x)
    for parameter, mask in result.plan.masks.items():
        assert not torch.any(loaded.get_parameter(parameter)[~mask]), "masks are held through fine-tuning"


def test_the_report_says_what_happened(tmp_path):
    data = batches()
    recipe = {
        "target": {"macs": 0.5},
        "recover": [{"method": "bn_refresh", "batches": 2}, {"method": "finetune", "steps": 3}],
        **QUICK,
    }
    result = sc.prune(net(), data=data, recipe=recipe, evaluate=accuracy_on(data))
    record = result.report
    assert record.before.macs == result.plan.cost["macs"][0]
    assert record.achieved["macs"] == pytest.approx(record.after.macs / record.before.macs)
    assert record.certificate.max_abs_error <= record.certificate.tolerance
    assert len(record.training) == 3
    assert record.after_cut_quality.keys() == record.after.quality.keys() == {"accuracy"}
    assert {layer.name for layer in record.layers} == set(result.plan.groups)
    assert "out" in {locked.name for locked in record.locked}
    masked = sc.prune(net(), data=data, recipe={"granularity": "element", "target": {"sparsity": 0.5}, **QUICK})
    assert any("no speed expected" in warning for warning in masked.report.warnings)
    assert masked.report.certificate is None
    assert masked.report.certificate_reason


def test_latency_is_timed_until_a_rule_ends_it_and_zeros_five_times():
    cut = sc.prune(net(), data=batches(), recipe={"target": {"macs": 0.5}}).report
    assert 6 <= cut.after.latency_ms.rounds <= 30
    assert cut.after.latency_ms.stopped in {"rounds", "spread", "time"}
    assert cut.before.latency_ms.rounds == cut.after.latency_ms.rounds
    masked = sc.prune(net(), data=batches(), recipe={"granularity": "element", "target": {"sparsity": 0.5}}).report
    assert (masked.after.latency_ms.rounds, masked.after.latency_ms.stopped) == (5, "rounds")


def test_locked_parameters_are_those_of_the_tensors_that_make_the_units():
    """Not the bias beside the weight, and not the layers that read it."""
    recipe = {"target": {"sparsity": 0.2}, "protect": ["fc"], **QUICK}
    report = sc.prune(net(), example(), recipe=recipe).report
    locked = {one.name: one.params for one in report.locked}
    assert locked["fc"] == 20 * 48
    assert locked["out"] == 10 * 20


def test_rows_of_tensors_hold_what_stays_of_them():
    model = net()
    result = sc.prune(model, example(), recipe={"target": {"macs": 0.5}, **QUICK})
    left = dict(result.model.named_parameters())
    for row in result.report.layers:
        name = f"{row.name}.weight"
        assert row.params_before == model.get_parameter(name).numel()
        assert row.params_after == left[name].numel(), row.name
        assert row.params_after < row.params_before or not row.removed


def test_an_estimate_says_what_prune_then_does():
    model = net()
    before = copy.deepcopy(model.state_dict())
    recipe = {"target": {"macs": 0.5}, **QUICK}
    stages = []
    told = sc.estimate(model, example(), recipe=recipe, progress=lambda stage, *_: stages.append(stage), title="net")
    done = sc.prune(model, example(), recipe=recipe)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert told.plan.diff(done.plan) == ""
    assert told.report.title == "net"
    for figure in ("params", "nonzero", "macs", "size_bytes"):
        assert getattr(told.report.before, figure) == getattr(done.report.before, figure)
        assert getattr(told.report.after, figure) == getattr(done.report.after, figure)
    assert told.report.units == done.report.units
    assert told.report.certificate == told.plan.certificate
    assert told.report.target == {"macs": 0.5}
    assert (told.report.achieved, told.report.layers) == ({}, ())
    assert told.report.after.latency_ms.rounds == 2
    assert stages == ["plan", "apply to a copy", "measure"]


def test_an_estimate_takes_its_example_from_the_data_and_needs_one():
    told = sc.estimate(
        net(), data=batches(), recipe={"target": {"macs": 0.5}, "recover": [{"method": "refit"}], **QUICK}
    )
    assert told.report.after.macs < told.report.before.macs
    with pytest.raises(InputError, match="example"):
        sc.estimate(net(), recipe={"target": {"macs": 0.5}})
    with pytest.raises(NonFiniteError, match=r"block\.c1\.weight"):
        sc.estimate(nan_weight(net()), example())


def test_two_runs_give_the_same_weights_and_plan(tmp_path):
    recipe = {"target": {"macs": 0.5}, "recover": [{"method": "finetune", "steps": 4}], "seed": 3, **QUICK}
    for name in "ab":
        sc.prune(net(), data=batches(), recipe=recipe).save(tmp_path / name)
    for file in ("plan.json", "model.safetensors", "recipe.yaml"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def nan_weight(model):
    model.block.c1.weight.data[1, 2, 0, 0] = float("nan")
    return model


def infinite_activation(model):
    model.out.register_forward_hook(lambda *_: torch.full((16, 10), float("inf")))
    return model


def nan_activation(model):
    model.out.register_forward_hook(lambda *_: torch.full((16, 10), float("nan")))
    return model


@pytest.mark.parametrize(
    ("model", "arguments", "error", "text"),
    [
        (nan_weight, {"data": batches()}, NonFiniteError, "block.c1.weight"),
        (nan_activation, {"data": batches()}, NonFiniteError, "NaN"),
        (infinite_activation, {"data": batches()}, NonFiniteError, "Inf"),
        (None, {"data": []}, InputError, "no batch"),
        (None, {"data": iter(batches())}, InputError, "once"),
        (None, {"recipe": "channel-half-macs"}, RecipeError, "needs data"),
        (None, {"data": batches(), "recipe": {"target": {"sparsity": 50}}}, RecipeError, "0.5"),
        (
            None,
            {"data": batches(), "recipe": {"target": {"sparsity": 0.5}, "criterium": "x"}},
            RecipeError,
            "criterion",
        ),
        (None, {"data": batches(), "overrides": ["granularity=chanel"]}, RecipeError, "chanel"),
        (None, {"data": batches(), "loss": lambda m, b: m(b[0]).sum() * float("inf")}, NonFiniteError, "loss"),
    ],
)
def test_bad_input_is_one_clear_error_and_changes_nothing(model, arguments, error, text):
    subject = net() if model is None else model(net())
    before = {k: v.clone() for k, v in subject.state_dict().items()}
    with pytest.raises(error, match=text):
        sc.prune(subject, **arguments)
    for name, value in subject.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=0, rtol=0, equal_nan=True)


def test_loading_refuses_another_model_and_damaged_weights(tmp_path):
    folder = sc.prune(net(), data=batches(), recipe={"target": {"macs": 0.5}, **QUICK}).save(tmp_path / "out")
    with pytest.raises(PlanMismatchError):
        sc.load(folder, model=nn.Linear(3, 3))
    with pytest.raises(RecipeError):
        sc.load(folder, model=lambda: 3)
    weights = folder / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-5] + bytes([good[-5] ^ 1]) + good[-4:])
    with pytest.raises(FileRefusedError):
        sc.load(folder, model=Net)
    weights.write_bytes(good[: len(good) // 2])
    with pytest.raises(FileRefusedError):
        sc.load(folder, model=Net)
    (folder / "plan.json").unlink()
    with pytest.raises(FileRefusedError):
        sc.load(folder, model=Net)


def test_saving_refuses_to_overwrite(tmp_path):
    result = sc.prune(net(), data=batches(), recipe={"target": {"macs": 0.5}, **QUICK})
    result.save(tmp_path / "out")
    with pytest.raises(FileRefusedError, match="force"):
        result.save(tmp_path / "out")
    result.save(tmp_path / "out", force=True)


def test_fallbacks_of_a_criterion_degrade_the_run_and_doubts_are_repeated(monkeypatch):
    import warnings

    from secateur.criteria import Magnitude, StationaryWarning
    from secateur.statistics.notes import CurvatureWarning

    real = Magnitude.score

    def noisy(self, context):
        warnings.warn("damping was raised to 0.1", CurvatureWarning, stacklevel=1)
        warnings.warn("first-order scores are magnitudes here", StationaryWarning, stacklevel=1)
        return real(self, context)

    monkeypatch.setattr(Magnitude, "score", noisy)
    result = sc.prune(net(), data=batches(), recipe={"target": {"macs": 0.5}, **QUICK})
    assert result.report.status == "degraded"
    assert [d.what for d in result.degradations] == ["damping was raised to 0.1"]
    assert "first-order scores are magnitudes here" in result.report.warnings


def test_refit_brings_the_outputs_back_towards_the_original():
    model, data = net(), batches()
    cut = {"target": {"macs": 0.6}, "criterion": "structured-obs", **QUICK}
    outputs = []
    for steps in ([], [{"method": "refit"}]):
        result = sc.prune(model, data=data, recipe={**cut, "recover": steps})
        with torch.no_grad():
            outputs.append(sum(float((result.model(x) - model(x)).square().sum()) for x, _ in data))
    assert outputs[1] < 0.7 * outputs[0]


def test_refit_of_masks_brings_the_outputs_back_and_keeps_the_zeros():
    model, data = net(), batches()
    masks = {"target": {"sparsity": 0.7}, "granularity": "element", **QUICK}
    outputs = []
    for steps in ([], [{"method": "refit", "what": "bias"}], [{"method": "refit"}]):
        result = sc.prune(model, data=data, recipe={**masks, "recover": steps})
        with torch.no_grad():
            outputs.append(sum(float((result.model(x) - model(x)).square().sum()) for x, _ in data))
        for name, mask in result.plan.masks.items():
            assert not result.model.get_parameter(name)[~mask].any()
    assert outputs[2] < outputs[1] < outputs[0]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def forward(self, x):
        return x + self.inner(x)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(12, 8)
        self.blocks = nn.ModuleList([Residual() for _ in range(4)])
        self.out = nn.Linear(8, 10)

    def forward(self, x):
        x = self.stem(x.mean((1, 2)))
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def test_layers_are_removed_reported_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    recipe = {"granularity": "layer", "criterion": "block-influence", "target": {"count": 1}, **QUICK}

    result = sc.prune(Stack(), data=batches(), recipe=recipe)
    assert len(result.model.blocks) == 3
    (row,) = result.report.layers
    assert (row.name, row.removed, row.total) == ("blocks", 1, 4)
    assert row.params_after * 4 == row.params_before * 3
    loaded = sc.load(result.save(tmp_path / "out"), model=Stack)
    x = batches()[0][0]
    torch.testing.assert_close(loaded.eval()(x), result.model.eval()(x), atol=0, rtol=0)


def test_a_latency_that_does_not_hold_at_the_end_is_a_missed_target(monkeypatch):
    """The plan met it; a machine that is slower when the report measures must be said to have missed it."""
    from secateur import pipeline
    from secateur.planning import timed
    from secateur.types import Latency

    quick = Latency(1, 1, 1, 30, ratio=(1.0, 1.0, 1.0))
    monkeypatch.setattr(timed, "latency", lambda models, x, **_: dict.fromkeys(models, quick))
    slow = Latency(5, 5, 5, 30), Latency(4, 4, 4, 30)
    monkeypatch.setattr(pipeline, "time_pair", lambda *_, **__: slow)
    recipe = {"target": {"latency_ms": 2.0, "macs": 0.9}}
    report = sc.prune(net(), example(), recipe=recipe).report
    assert (report.status, report.exit_code) == ("target_missed", 5)
    assert report.achieved["latency_ms"] == 4


FREE = {"target": {"macs": 0.6}, "measure": {"latency": False}}
TRAINED = {**FREE, "recover": [{"method": "bn_refresh", "batches": 2}, {"method": "finetune", "steps": 5}]}


def test_quality_is_measured_by_default_on_the_test_part_and_by_the_same_function_for_all():
    test = batches(seed=1)
    result = sc.prune(net(), data=batches(), test=test, recipe=FREE)
    report = result.report
    assert (report.quality_on, report.quality_missing) == ("the test part", "")
    assert report.before.quality == accuracy_on(test)(net())
    assert report.after.quality == accuracy_on(test)(result.model)
    named = sc.prune(net(), data={"train": batches(), "test": test}, recipe=FREE)
    assert named.report.after.quality == report.after.quality


def test_training_data_are_called_so_and_no_figure_has_a_reason():
    report = sc.prune(net(), data=batches(), recipe=FREE).report
    assert report.quality_on.startswith("training data")
    assert report.before.quality == accuracy_on(batches())(net())
    assert "accuracy on training data" in str(verdict(report))
    for data, why in (([batches()[0][0]], "hold no target"), (None, "no data")):
        silent = sc.prune(net(), example(), data=data, recipe=FREE).report
        assert silent.before.quality == {}
        assert why in silent.quality_missing
        assert f"quality not measured ({silent.quality_missing})" in str(verdict(silent))
    off = sc.prune(net(), data=batches(), recipe=FREE, overrides=["measure.quality=false"]).report
    assert "measure.quality" in off.quality_missing


def test_metrics_and_several_figures_are_accepted():
    class Hits:
        def reset(self):
            self.hits = self.count = 0

        def update(self, prediction, target):
            self.hits += int((prediction.argmax(1) == target).sum())
            self.count += len(target)

        def compute(self):
            return self.hits / self.count

    judge = {"hits": Hits(), "size": lambda model: sum(p.numel() for p in model.parameters())}
    result = sc.prune(net(), data=batches(), test=batches(1), recipe=FREE, evaluate=judge)
    assert result.report.after.quality["hits"] == accuracy_on(batches(1))(result.model)["accuracy"]
    assert result.report.after.quality["size"] == result.report.after.params


class Counted:
    """Batches that say how often they were begun; falsy, as a loader without a length of its own may be."""

    def __init__(self, batches):
        self.batches, self.begun = batches, 0

    def __len__(self):
        return 0

    def __iter__(self):
        self.begun += 1
        return iter(self.batches)


def test_scores_and_closed_forms_read_the_calibration_data_however_they_look():
    """One default for both: data that are falsy are given all the same."""
    calibration = Counted(batches(2, count=1))
    recipe = {**FREE, "recover": [{"method": "refit"}]}
    falsy = sc.prune(net(), data=batches(), calibration=calibration, recipe=recipe)
    assert calibration.begun > 0
    plain = sc.prune(net(), data=batches(), calibration=batches(2, count=1), recipe=recipe)
    other = sc.prune(net(), data=batches(), recipe=recipe)
    states = [[*result.model.state_dict().values()] for result in (falsy, plain, other)]
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(states[0], states[2], strict=True))
    with pytest.raises(InputError, match="holds no batch"):
        sc.prune(net(), data=batches(), calibration=[], recipe=recipe)


def test_the_dense_control_is_the_original_after_the_same_steps():
    model, data, test = net(), batches(), batches(1)
    result = sc.prune(model, data=data, test=test, recipe={**TRAINED, "control": "dense"})
    by_hand = copy.deepcopy(model)
    refresh_batchnorm(by_hand, data, 2)
    finetune(by_hand, data, optimizer={"name": "sgd", "lr": 0.01}, steps=5, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in (model, net())), strict=True))
    control = result.report.control
    assert control.steps == ("bn_refresh", "finetune")
    assert control.quality == accuracy_on(test)(by_hand)
    reached = f"the dense model with the same steps reaches {control.quality['accuracy']:.1%}".replace("%", " %")
    assert reached in str(verdict(result.report))
    assert any(row.label == "accuracy, dense control" for row in rows(result.report))
    # The pruned model and the original are what they are without it.
    plain = sc.prune(net(), data=data, test=test, recipe=TRAINED)
    assert all(
        torch.equal(a, b) for a, b in zip(*(r.model.state_dict().values() for r in (result, plain)), strict=True)
    )
    assert plain.report.control is None


def test_the_control_sees_the_batches_that_the_pruned_model_saw():
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8, shuffle=True)
    seen = {}

    def watched(model, batch):
        name = "pruned" if model.block.c1.out_channels < net().block.c1.out_channels else "dense"
        seen.setdefault(name, []).append(batch[1].tolist())
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    recipe = {**FREE, "recover": [{"method": "finetune", "steps": 12}], "control": "dense", "seed": 5}
    sc.prune(net(), data=loader, recipe=recipe, loss=watched, evaluate=lambda model: 1.0)
    assert seen["dense"] == seen["pruned"]
    assert len(seen["dense"]) == 12


def test_a_refresh_sees_the_same_batches_whatever_was_drawn_before():
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8, shuffle=True)
    recipe = {**FREE, "recover": [{"method": "bn_refresh", "batches": 1}]}
    states, model = [], net()
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(sc.prune(model, x[:1], data=loader, recipe=recipe).model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))


def test_a_control_that_cannot_say_anything_is_refused_before_the_work():
    calls = []
    for recipe, data, text in (
        ({**TRAINED, "control": "dense"}, [batches()[0][0]], "figure of quality"),
        ({**FREE, "control": "dense"}, batches(), "recover has neither"),
        ({**FREE, "control": "dense", "recover": [{"method": "refit"}]}, batches(), "recover has neither"),
    ):
        with pytest.raises(RecipeError, match=text):
            sc.prune(net(), data=data, recipe=recipe, progress=lambda *told: calls.append(told[0]))
    assert set(calls) <= {"plan"}


def test_figures_do_not_depend_on_the_batch_of_the_loader():
    reports = [sc.prune(net(), data=batches(size=size), recipe=FREE).report for size in (1, 16)]
    assert reports[0].before.macs == reports[1].before.macs == macs(net(), example())
    assert reports[0].after.macs == reports[1].after.macs


def test_hugging_face_batches_with_labels_are_measured():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, num_labels=3
    )
    model = transformers.BertForSequenceClassification(config).eval()
    ids, labels = torch.randint(0, 20, (6, 5)), torch.tensor([0, 1, 2, 0, 1, 2])
    data = [{"input_ids": i, "labels": y} for i, y in zip(ids.split(3), labels.split(3), strict=True)]
    recipe = {"granularity": "neuron", "target": {"sparsity": 0.3}, "measure": {"latency": False}}
    result = sc.prune(model, data=data, test=data, recipe=recipe)
    with torch.no_grad():
        hits = (model(ids).logits.argmax(1) == labels).double().mean()
    assert result.report.before.quality == {"accuracy": float(hits)}


def test_prune_takes_the_keywords_of_plan():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3)).eval(), torch.randn(4, 6)
    asked = {"target": {"sparsity": 0.3}, "granularity": "neuron", "criterion": {"name": "magnitude", "norm": "l1"}}
    plan = sc.plan(model, x, **asked)
    result = sc.prune(model, x, recipe={"target": {"macs": 0.9}, "measure": {"latency": False}}, **asked)
    assert plan.diff(result.plan) == ""
    assert result.recipe.target.given() == {"sparsity": 0.3}  # not both: the keyword takes the recipe's place
    with pytest.raises(RecipeError, match="did you mean target"):
        sc.prune(model, x, targt={"macs": 0.5})
    with pytest.raises(RecipeError, match="percentage"):
        sc.prune(model, x, target={"macs": 50})


def test_without_data_the_default_recovery_is_left_out_and_said():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3)).eval(), torch.randn(4, 6)
    result = sc.prune(model, x, target={"macs": 0.5}, granularity="neuron")
    assert any("Nothing was recovered" in warning for warning in result.report.warnings)
    with pytest.raises(RecipeError, match="recovers"):
        sc.prune(model, x, recipe="channel-half-macs")


def test_a_criterion_object_scores_as_it_is():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3)).eval(), torch.randn(4, 6)
    seen = []

    class Watched(sc.criteria.Magnitude):
        def score(self, context):
            seen.append(context)
            return super().score(context)

    sc.prune(model, x, target={"sparsity": 0.5}, granularity="neuron", criterion=Watched())
    assert len(seen) == 1
