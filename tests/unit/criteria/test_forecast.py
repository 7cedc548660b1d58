"""What takes long says so before it begins, with the time that a batch makes of it; what takes far too long ends."""

import warnings

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.criteria import CostWarning, forecast, get
from secateur.errors import InputError, ResourceError

WIDTH = 6


@pytest.fixture(autouse=True)
def everything_is_long(monkeypatch):
    monkeypatch.setattr(forecast, "SECONDS", 0)


class Batches(list):
    """Batches that count how many were handed out."""

    handed = 0

    def __iter__(self):
        for batch in super().__iter__():
            self.handed += 1
            yield batch


def net(outputs):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, WIDTH), nn.ReLU(), nn.Linear(WIDTH, outputs)).eval()


def batches(outputs, count=3):
    generator = torch.Generator().manual_seed(1)
    return Batches(
        (torch.randn(4, 3, generator=generator), torch.randint(outputs, (4,), generator=generator))
        for _ in range(count)
    )


def scored(criterion, outputs=7, data=None, **options):
    data = batches(outputs) if data is None else data
    return sc.score(
        net(outputs), torch.zeros(1, 3), criterion={"name": criterion, **options}, granularity="channel", data=data
    )


# Criterion, options, outputs, and the epochs that follow from what its docstring says it does.
CASES = [
    ("kfac", {}, 7, 7),
    ("kfac", {"form": "ekfac"}, 7, 14),
    ("kfac", {"slopes": "sampled"}, 7, None),
    ("kfac", {}, 5, None),
    ("kfac", {}, 6, 6),
    ("gauss-newton", {}, 7, 9.8),
    ("gauss-newton", {"draws": 1}, 7, None),
    ("gauss-newton", {"draws": 3}, 7, 5.8),
    ("obd", {}, 7, 10.5),
    ("obd", {"method": "hutchinson", "probes": 8}, 7, 20),
    ("obd", {"method": "exact"}, 3, 3 * (3 * WIDTH + WIDTH + 3 * WIDTH)),
    ("obd", {"joint": True}, 7, 3 * WIDTH),
    ("integrated", {}, 7, 8),
    ("integrated", {"path": "unit"}, 7, 8 * WIDTH),
    ("integrated", {"steps": 5}, 7, None),
    ("taylor", {}, 7, None),
]


@pytest.mark.parametrize(("criterion", "options", "outputs", "epochs"), CASES)
def test_many_epochs_are_said_and_few_are_not(criterion, options, outputs, epochs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scored(criterion, outputs, **options)
    said = [str(one.message) for one in caught if issubclass(one.category, CostWarning)]
    assert len(said) == (epochs is not None)
    if epochs is not None:
        assert f"{criterion!r} takes about {epochs:,.0f} epochs" in said[0]
        assert "minutes on this machine" in said[0]


def test_it_is_said_before_the_second_batch_is_read():
    data = batches(7)

    def heard(*_):
        assert data.handed <= 2, "one batch for the outputs and the same for the time"
        raise InterruptedError

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = heard
        with pytest.raises(InterruptedError):
            scored("kfac", data=data)


def test_what_takes_too_long_is_refused_before_it_begins(monkeypatch):
    monkeypatch.setattr(forecast, "_seconds", lambda context: 12 * 3600 / 7 * 1.1)
    data = batches(7)
    with pytest.raises(ResourceError, match=r"7 epochs .*for each of 7 outputs.* 13\.2 hours") as caught:
        scored("kfac", data=data)
    assert "sampled" in caught.value.hint
    assert data.handed == 1
    monkeypatch.setattr(forecast, "_seconds", lambda context: 12 * 3600 / 7 * 0.9)
    with pytest.warns(CostWarning, match=r"10\.8 hours"):
        scored("kfac")


def test_what_takes_less_than_a_minute_is_not_worth_a_word(monkeypatch):
    monkeypatch.setattr(forecast, "SECONDS", 60)
    monkeypatch.setattr(forecast, "_seconds", lambda context: 60 / 7 * 0.9)
    scored("kfac")  # warnings are errors here
    monkeypatch.setattr(forecast, "_seconds", lambda context: 60 / 7 * 1.1)
    with pytest.warns(CostWarning, match=r"1\.1 minutes"):
        scored("kfac")


def test_the_time_is_that_of_all_batches(monkeypatch):
    clock = iter([10.0, 10.5])
    monkeypatch.setattr(forecast.time, "perf_counter", lambda: next(clock))
    with pytest.warns(CostWarning, match="takes about 7 epochs .* 0.4 minutes"):  # 7 epochs of 6 batches of 0.5 s
        scored("kfac", data=batches(7, count=6))


def test_looking_ahead_changes_neither_scores_nor_the_model(monkeypatch):
    def run():
        model = net(7).train()
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CostWarning)
            found = sc.score(model, torch.zeros(1, 3), criterion="obd", granularity="channel", data=batches(7))
        assert model.training
        assert all(weight.grad is None for weight in model.parameters())
        return found, torch.rand(1)

    ahead, drawn = run()
    monkeypatch.setattr(forecast, "EPOCHS", 1e9)
    plain, also = run()
    assert torch.equal(drawn, also)
    assert all(torch.equal(ahead[name], plain[name]) for name in plain)


def test_data_without_a_length_are_said_without_a_time():
    class Endless:
        def __iter__(self):
            return iter(list(batches(7)))

    with pytest.warns(
        CostWarning, match=r"7 epochs over the scoring data \(one backward pass for each of 7 outputs\); take"
    ):
        scored("kfac", data=Endless())
    with pytest.raises(InputError, match="only once"):
        scored("kfac", data=iter(list(batches(7))))


def test_a_run_says_it_at_once_and_in_its_report():
    told = []

    class Shown:
        takes_note = True

        def __call__(self, stage, done, total, note=""):
            told.append((stage, note))

    result = sc.prune(
        net(7), data=list(batches(7)), criterion="kfac", recover=[], target={"sparsity": 0.3}, granularity="channel",
        overrides=["measure.latency=false"], progress=Shown(),
    )  # fmt: skip
    (said,) = [(stage, note) for stage, note in told if note]
    assert said[0] == "plan"
    assert "7 epochs" in said[1]
    assert said[1] in result.report.warnings
    assert result.report.status == "ok"
    stages = [stage for stage, _ in told]
    assert stages.index("plan") < told.index(said) < stages.index("apply")


def test_criteria_can_be_asked_themselves():
    assert get("magnitude").forecast(None) is None
