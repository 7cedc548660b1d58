"""Protocol, scores and store: what makes a comparison fair, each on its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateur.comparison.contestants import make_contestants
from secateur.comparison.hashes import Watched, hash_batches, hash_model
from secateur.comparison.levels import make_levels, make_match
from secateur.comparison.protocol import Protocol, ProtocolOptions
from secateur.comparison.recoveries import make_recoveries, trains
from secateur.comparison.scoring import epoch_seconds, inverted, metered, shuffled
from secateur.comparison.scratch import reinitialise
from secateur.comparison.store import Scored, Store
from secateur.comparison.study import Limited, parse_criterion, sample
from secateur.criteria import Magnitude
from secateur.errors import FileRefusedError, RecipeError, UnsupportedError
from secateur.kinds.weights.block import Block
from secateur.kinds.weights.nm import NM
from secateur.planning.build import units_of
from secateur.sources import TensorData


def test_magnitude_and_random_are_always_there() -> None:
    found = make_contestants(["taylor", {"name": "magnitude", "norm": "l1"}])
    assert [(one.label, one.control) for one in found] == [
        ("taylor", False), ("magnitude norm=l1", False), ("magnitude", True), ("random", True),
    ]  # fmt: skip
    assert [e.label for e in make_contestants([Magnitude(), "random"])] == ["magnitude", "random"]


@pytest.mark.parametrize("criteria", [[], ["magnitude", Magnitude()], ["taylr"]])
def test_wrong_criteria_are_refused(criteria: list[object]) -> None:
    with pytest.raises(RecipeError):
        make_contestants(criteria)


def test_levels_are_fractions_and_default_to_six() -> None:
    assert len(make_levels(None, "macs", "channel")) == len(make_levels(None, "units", "element")) == 6
    assert make_levels([0.9, 0.5, 0.9], "units", "element") == (0.5, 0.9)
    assert make_levels(None, "units", "2:4") == (0.5,)
    for wrong in ([0.0], [1.0], [50], []):
        with pytest.raises(RecipeError):
            make_levels(wrong, "units", "element")
    with pytest.raises(RecipeError, match=r"one level 0\.5"):
        make_levels([0.7], "units", "2:4")


def test_what_levels_match() -> None:
    assert (make_match("auto", "channel"), make_match("auto", "element")) == ("macs", "units")
    # Experts that go leave the work of every token as it is, whatever they are called.
    assert [make_match("auto", word) for word in ("expert", "experts", {"name": "expert"})] == ["params"] * 3


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("filters", "channel"),
        ("experts", "expert"),
        (["neuron"], "neuron"),
        ({"name": "block", "shape": [4, 4]}, {"name": "block", "shape": [4, 4]}),
        (Block(shape=(4, 4)), {"name": "block", "shape": (4, 4)}),
        (NM(n=1, m=4), "1:4"),
    ],
)
def test_a_protocol_knows_a_granularity_by_one_name(written: Any, name: object) -> None:
    protocol = Protocol.of(granularity=written)
    assert protocol.granularity == name
    assert units_of(protocol.granularity, None)[1] == units_of(written, None)[1]


def test_a_protocol_is_of_one_granularity() -> None:
    several: Any = ["channel", "head"]
    with pytest.raises(RecipeError, match="of one granularity") as caught:
        Protocol.of(granularity=several)
    assert "structured" in str(caught.value)
    with pytest.raises(RecipeError, match="is cut"):
        make_match("macs", "element")
    with pytest.raises(RecipeError):
        make_match("flops", "channel")


def test_recovery_steps_are_checked_like_a_recipe() -> None:
    found = make_recoveries([{"method": "finetune", "steps": 3}])
    assert found["none"] == ()
    assert found["recovered"][0]["optimizer"]["name"] == "sgd"
    with pytest.raises(RecipeError):
        make_recoveries([{"method": "finetune"}])


def test_closed_forms_read_no_training_batches() -> None:
    refit, update, train = ({"method": name} for name in ("refit", "obs_update", "finetune"))
    assert not trains([refit, update])
    assert trains([refit, train])


OPTIONS: dict[str, Any] = {
    "granularity": "element", "levels": [0.5, 0.9], "match": "units", "seeds": [3], "rounds": 1, "probes": 2,
    "recover": [{"method": "refit"}], "recover_levels": [0.5], "ablation_levels": [0.2], "scope": "local",
    "scratch": [{"method": "finetune", "steps": 1}], "allocation": "erk", "protect": ["a"], "metric": "loss",
    "maximize": False, "confidence": 0.9, "tag": "x",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(ProtocolOptions.__annotations__))
def test_every_option_reaches_the_protocol(name: str) -> None:
    # A recovery level means nothing without a recovery.
    shared: ProtocolOptions = {"recover": [{"method": "bn_refresh"}]}
    assert Protocol.of(**{**shared, name: OPTIONS[name]}) != Protocol.of(**shared)


def test_options_that_there_are_not_are_refused() -> None:
    with pytest.raises(TypeError, match="no option 'level'"):
        Protocol.of(level=0.5)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "wrong",
    [
        {"levels": ()}, {"levels": (0.9, 0.5)}, {"levels": (0.5, 0.5)}, {"levels": (0.5, 1.0)}, {"seeds": ()},
        {"match": "flops"}, {"recover_levels": (0.3,)}, {"ablation_levels": (0.3,)}, {"recoveries": {}},
        {"confidence": 0.0}, {"probes": -1}, {"rounds": -1},
    ],
    ids=str,
)  # fmt: skip
def test_a_protocol_by_hand_is_checked_as_well(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        Protocol(**wrong)


def test_the_metric_is_settled_by_what_is_measured() -> None:
    found = Protocol.of().measuring(["accuracy", "loss"])
    assert (found.metric, found.maximize, found.sign) == ("accuracy", True, 1)
    lower = Protocol.of(metric="loss").measuring(["accuracy", "loss"])
    assert (lower.metric, lower.maximize, lower.sign) == ("loss", False, -1)
    assert Protocol.of(metric="loss", maximize=True).measuring(["loss"]).sign == 1
    assert lower.measuring(["loss"]) == lower


@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=20), st.integers(0, 100))
def test_shuffled_and_inverted_scores_keep_their_values(values: list[float], seed: int) -> None:
    scores = {"a": torch.tensor(values)}
    for changed in (shuffled(scores, seed)["a"], inverted(scores)["a"]):
        assert changed.sort().values.tolist() == scores["a"].sort().values.tolist()
    order = scores["a"].argsort(stable=True)
    assert inverted(scores)["a"][order].tolist() == scores["a"][order].flip(0).tolist()
    assert shuffled(scores, seed)["a"].tolist() == shuffled(scores, seed)["a"].tolist()


def test_shuffling_depends_on_seed_and_layer() -> None:
    scores = {name: torch.arange(50.0) for name in "ab"}
    first, other = shuffled(scores, 0), shuffled(scores, 1)
    assert first["a"].tolist() != first["b"].tolist()
    assert first["a"].tolist() != other["a"].tolist()


def test_memory_of_a_call_is_seen() -> None:
    held, cost = metered(lambda: float(torch.ones(16_000_000).sum()), torch.device("cpu"))
    assert held == 16_000_000
    assert cost.seconds > 0
    assert cost.peak_bytes is None or cost.peak_bytes > 32_000_000
    _, small = metered(lambda: 1, torch.device("cpu"))
    assert small.peak_bytes is None or small.peak_bytes < 16_000_000


def test_an_epoch_needs_labels_and_leaves_no_gradient() -> None:
    net, x = nn.Linear(4, 2), torch.rand(8, 4)
    assert epoch_seconds(net, [x], None) is None
    taken = epoch_seconds(net, [(x, torch.zeros(8, dtype=torch.int64))], None)
    assert taken is not None
    assert taken > 0
    assert net.weight.grad is None


def test_hashes_see_every_weight_and_every_batch() -> None:
    net = nn.Linear(3, 2)
    before = hash_model(net)
    assert hash_model(net) == before
    with torch.no_grad():
        net.weight[1, 2] += 1e-6
    assert hash_model(net) != before
    batches = [(torch.ones(2), torch.zeros(2)), (torch.zeros(2), torch.ones(2))]
    assert hash_batches(batches) == hash_batches([tuple(t.clone() for t in batch) for batch in batches])
    assert hash_batches(batches) != hash_batches(batches[::-1])


def test_watched_data_tell_what_was_read(train: TensorData) -> None:
    def read(epochs: list[int]) -> Watched:
        watched = Watched(train)
        for epoch in epochs:
            watched.set_epoch(epoch)
            list(watched)
        train.set_epoch(0)
        return watched

    assert read([0, 1]).seen == read([0, 1]).seen
    assert read([0, 1]).seen != read([1, 0]).seen
    assert read([0]).batches == len(train) == len(Watched(train))


def test_the_store_gives_back_what_was_put(tmp_path: Path) -> None:
    store = Store(tmp_path / "out")
    assert store.cell("k") is None
    assert store.scores("k") is None
    row = {"quality": {"accuracy": 0.1}, "why": "<", "key": "k"}
    store.put_cell(row)
    assert Store(tmp_path / "out").cell("k") == row
    store.put_scores("k", Scored({"w": torch.arange(3.0)}, {"seconds": 0.25}))
    scores, cost = Store(tmp_path / "out").scores("k")
    assert (scores["w"].tolist(), cost) == ([0.0, 1.0, 2.0], {"seconds": 0.25})
    store.put_scores("truth", Scored({"w": torch.arange(3.0)}, None))
    assert store.scores("truth").cost is None
    (tmp_path / "out" / "cells" / "x.json").write_text("{}")
    with pytest.raises(FileRefusedError, match="no result"):
        store.cell("x")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileRefusedError):
        Store(tmp_path / "file")


def test_scratch_weights_are_new_and_unknown_ones_are_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with torch.no_grad():
        net[1].weight.fill_(7.0)
    before = net[0].weight.clone()
    reinitialise(net, 0)
    assert not torch.equal(net[0].weight, before)
    assert net[1].weight.tolist() == [1.0, 1.0, 1.0]
    net.own = nn.Parameter(torch.ones(2))
    with pytest.raises(UnsupportedError, match="'own'"):
        reinitialise(net, 0)


def test_a_sample_of_sorted_data_holds_all_classes() -> None:
    data = TensorData(torch.arange(400.0)[:, None], torch.arange(400) // 100, batch_size=20)
    chosen = sample(data, 3)
    assert sum(len(x) for x, _ in chosen) == 60
    assert {int(v) for _, y in chosen for v in y} == {0, 1, 2, 3}
    first = Limited(list(data), 3)
    assert (len(first), [y[0].item() for _, y in first]) == (3, [0, 0, 0])


def test_criteria_of_the_command_line() -> None:
    assert parse_criterion("magnitude") == "magnitude"
    assert parse_criterion("magnitude:norm=l1:reduce=mean") == {"name": "magnitude", "norm": "l1", "reduce": "mean"}
    assert parse_criterion("random:seed=7") == {"name": "random", "seed": 7}
    for wrong in ("magnitude:l1", "magnitude:norm=l9", "magnitude:size=3", "nothing"):
        with pytest.raises(RecipeError):
            parse_criterion(wrong)
