import math

import pytest

from secateur import types as T
from secateur.measure.latency import FEWEST_ROUNDS
from secateur.report import Control, TrainingPoint, UnitCount, verdict
from secateur.report.safe_text import clean, count, percent, seconds, significant, size, writable
from secateur.report.verdict import rows, score, speed

SLOW, FAST, BETWEEN = (1.9, 1.85, 1.98, 50), (1.1, 1.07, 1.15, 50), (1.88, 1.80, 1.90, 50)


def pair(snapshot, before, after, *, quality=(None, None)):
    old, new = ({} if value is None else {"accuracy": value} for value in quality)
    return {
        "before": snapshot(2_000_000, macs=4_200_000, size=8_000_000, latency=before, quality=old),
        "after": snapshot(1_000_000, macs=2_000_000, size=4_000_000, latency=after, quality=new),
    }


def test_faster(make, snapshot):
    record = make(**pair(snapshot, SLOW, FAST, quality=(0.981, 0.976)), after_cut_quality={"accuracy": 0.91})
    assert str(verdict(record)) == (
        "Pruned, 50.0 % of the channels removed: 2.10x fewer MACs; 2.00x fewer parameters; "
        "latency 1.90 -> 1.10 ms (p10-p90 1.85-1.98 -> 1.07-1.15, 1 thread, batch 1, 50 rounds), "
        "1.73x faster; "
        "size 8.00 MB -> 4.00 MB; accuracy 98.1 % -> 97.6 % (-0.5 points, 91.0 % before recovery)."
    )


def test_slower(make, snapshot):
    text = str(verdict(make(**pair(snapshot, FAST, SLOW))))
    assert "50 rounds), 1.73x slower;" in text
    assert "faster" not in text


def test_overlapping_intervals_are_no_difference(make, snapshot):
    for before, after in [(SLOW, BETWEEN), (BETWEEN, SLOW)]:
        text = str(verdict(make(**pair(snapshot, before, after))))
        assert "50 rounds), no measurable difference;" in text
        assert "faster" not in text
        assert "slower" not in text


def test_intervals_that_touch_are_no_difference(make, snapshot):
    touching = (1.8, 1.7, SLOW[1], 50)
    assert speed(make(**pair(snapshot, SLOW, touching))).kind == "same"


@pytest.mark.parametrize(
    ("ratio", "kind"),
    [((0.7, 0.6, 0.95), "faster"), ((0.7, 0.6, 1.01), "same"), ((1.3, 1.02, 1.6), "slower"), ((1.1, 0.9, 1.2), "same")],
)
def test_paired_rounds_decide_where_there_are_any(make, snapshot, ratio, kind):
    """On a busy machine the intervals overlap, and yet nine of ten rounds can agree."""
    claim = speed(make(**pair(snapshot, (*SLOW, 1, 1), (*BETWEEN, 1, 1, ratio))))
    assert claim.kind == kind


def test_too_few_rounds_are_no_difference(make, snapshot):
    for ratio in (None, (0.6, 0.5, 0.7)):
        record = make(**pair(snapshot, (*SLOW[:3], 50), (*FAST[:3], 5, 1, 1, ratio)))
        words = "not distinguishable (5 rounds, a difference needs 6 that agree)"
        assert (speed(record).kind, speed(record).words) == ("same", words)
        record = make(**pair(snapshot, (*FAST[:3], 5), (*SLOW[:3], 5, 1, 1, ratio and (1.7, 1.4, 2.0))))
        assert speed(record).kind == "same"
    assert speed(make(**pair(snapshot, (*SLOW[:3], 6), (*FAST[:3], 6, 1, 1, (0.6, 0.5, 0.7))))).kind == "faster"


def by_chance(rounds, agreeing):
    """Two-sided sign test: how often so many of the rounds agree where both models are equally fast."""
    return 2 * sum(math.comb(rounds, k) for k in range(agreeing, rounds + 1)) / 2**rounds


def test_six_is_the_fewest_rounds_and_nine_of_ten_are_always_enough():
    assert by_chance(FEWEST_ROUNDS - 1, FEWEST_ROUNDS - 1) > 0.05
    for rounds in range(FEWEST_ROUNDS, 300):
        # p90 of the ratio is the round at this place, so below 1 it leaves at most the ones above it.
        agreeing = math.ceil(9 * (rounds - 1) / 10) + 1
        assert agreeing >= 0.9 * rounds
        assert by_chance(rounds, agreeing) <= 0.05


def test_words_follow_the_rounds_where_the_medians_were_swapped(make, snapshot):
    before, after = (1.0, 0.9, 2.0, 9), (1.1, 0.8, 1.2, 9, 1, 1, (0.8, 0.7, 0.95))
    assert speed(make(**pair(snapshot, before, after))).words == "1.25x faster"


@pytest.mark.parametrize(
    ("stopped", "words"),
    [
        (None, "9 rounds)"),
        ("rounds", "9 rounds)"),
        ("spread", "9 rounds, enough for its spread)"),
        ("time", "9 rounds, all that the time budget allowed)"),
    ],
)
def test_the_verdict_says_why_the_rounds_ended(make, snapshot, stopped, words):
    after = (*FAST[:3], 9, 1, 1, (0.6, 0.5, 0.7), stopped)
    assert words in str(verdict(make(**pair(snapshot, (*SLOW[:3], 9), after))))


def test_different_settings_are_not_compared(make, snapshot):
    claim = speed(make(**pair(snapshot, (*SLOW, 1, 1), (*FAST, 2, 1))))
    assert claim.kind == "incomparable"


def test_a_small_gain_is_a_percentage(make, snapshot):
    claim = speed(make(**pair(snapshot, (2.0, 1.99, 2.01, 9), (1.9, 1.89, 1.91, 9))))
    assert claim.words == "5.0 % faster"


def masked(make, snapshot, after):
    sizes = {"macs": 10, "size": 8_000_000}
    return make(
        applied="mask",
        certificate=None,
        certificate_reason="nothing was cut",
        units=UnitCount(removed=1, total=2, what="elements"),
        before=snapshot(2_000_000, latency=SLOW, **sizes),
        after=snapshot(2_000_000, latency=after, nonzero=1_000_000, **sizes),
    )


def test_zeros_alone_are_never_fast(make, snapshot):
    text = str(verdict(masked(make, snapshot, FAST)))
    assert text == (
        "Masked, 50.0 % of the elements set to zero: 2.00 M -> 1.00 M non-zero parameters; "
        "nothing was cut, so the dense model keeps its 2.00 M parameters; "
        "latency 1.90 -> 1.10 ms (p10-p90 1.85-1.98 -> 1.07-1.15, 1 thread, batch 1, 50 rounds), "
        "zeros only, no speed expected; quality not measured."
    )
    assert speed(masked(make, snapshot, None)).words == "zeros only, no speed expected"


def test_zeros_that_made_it_slower_say_so(make, snapshot):
    assert speed(masked(make, snapshot, (4.0, 3.9, 4.1, 50))).words == "2.11x slower"


def test_target_missed(make):
    record = make(target={"macs": 0.5, "latency_ms": 3.0}, achieved={"macs": 0.61}, missed=True)
    assert verdict(record).lead == (
        "Target missed (latency_ms 3.00 was asked, nothing measured; macs 0.500 was asked, 0.610 reached), "
        "50.0 % of the channels removed"
    )


def test_degraded(make):
    assert verdict(make(degradations=[T.Degradation("a", "b")])).lead == (
        "Finished but degraded (1 fallback), 50.0 % of the channels removed"
    )
    two = make(degradations=[T.Degradation("a", "b")] * 2)
    assert "(2 fallbacks)" in verdict(two).lead


def test_what_was_not_measured_is_said(make, snapshot):
    record = make(before=snapshot(macs=None), after=snapshot(500, macs=None))
    assert str(verdict(record)).endswith(
        "MACs not counted; 2.00x fewer parameters; latency not measured; size 4.00 kB -> 4.00 kB; quality not measured."
    )
    half = make(**pair(snapshot, None, None, quality=(0.9, None)))
    assert "accuracy 90.0 % -> not measured." in str(verdict(half))


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("accuracy", 0.9, 0.9, "accuracy 90.0 % -> 90.0 % (unchanged)"),
        ("accuracy", 0.9, 0.9001, "accuracy 90.0 % -> 90.0 % (+0.01 points)"),
        ("eval top1", 0.5, 0.75, "eval top1 50.0 % -> 75.0 % (+25.0 points)"),
        ("accuracy", 91.0, 90.0, "accuracy 91.00 -> 90.00 (-1.00)"),
        ("perplexity", 12.0, 15.5, "perplexity 12.00 -> 15.50 (+3.50)"),
        ("loss", 0.5, 0.25, "loss 0.5000 -> 0.2500 (-0.250)"),
    ],
)
def test_quality_is_a_percentage_only_where_it_is_a_share(make, snapshot, name, old, new, words):
    record = make(before=snapshot(quality={name: old}), after=snapshot(quality={name: new}))
    assert verdict(record).parts[-1] == words


def test_rows_hold_the_shares_that_the_bars_draw(make, snapshot):
    found = {row.label: row for row in rows(make(**pair(snapshot, SLOW, FAST)))}
    assert found["MACs per sample"].share == pytest.approx(2 / 4.2)
    assert found["size"].change == "2.00x smaller"
    assert found["latency (p10-p90)"].after == "1.10 ms (1.07-1.15)"


def test_growth_and_nothing_left_are_told_plainly(make, snapshot):
    found = {row.label: row.change for row in rows(make(before=snapshot(100, macs=5), after=snapshot(103, macs=0)))}
    assert (found["parameters"], found["MACs per sample"], found["size"]) == ("3.0 % more", "5 -> 0", "unchanged")


def test_numbers_in_words():
    assert [significant(value) for value in (0, 999.6, -0.00123, 3e-9, 2e20)] == [
        "0",
        "1,000",
        "-0.00123",
        "3.00e-09",
        "2.00e+20",
    ]
    assert [count(value) for value in (0, 99_999, 999_999, 1_500_000_000)] == [
        "0",
        "99,999",
        "1.00 M",
        "1.50 G",
    ]
    assert [size(value) for value in (0, 999, 1000, 999_999)] == ["0 B", "999 B", "1.00 kB", "1.00 MB"]
    assert [percent(value) for value in (0, 1, 1e-9, 0.99999)] == [
        "0.0 %",
        "100.0 %",
        "1.0e-07 %",
        "99.999 %",
    ]
    assert [seconds(value) for value in (59.9, 3599.9)] == ["60 s", "1 h 00 min"]


def test_text_from_strangers_becomes_visible():
    assert clean("a\u202eb\x9b\n\u2028") == "a\\u202eb\\x9b\\n\\u2028"
    assert clean("a\nb\r", lines=True) == "a\nb\\r"
    assert clean("größe-模型") == "größe-模型"
    assert len(clean("x" * 500, limit=40)) == 40
    assert writable("模", "ascii") == "\\u6a21"


def test_quality_names_its_data_or_the_reason_why_there_is_none(make, snapshot):
    before, after = snapshot(quality={"accuracy": 0.9}), snapshot(500, quality={"accuracy": 0.8})
    words = str(verdict(make(before=before, after=after, quality_on="the test part")))
    assert "accuracy on the test part 90.0 % -> 80.0 % (-10.0 points)" in words
    assert "quality not measured (no data)." in str(verdict(make(quality_missing="no data")))


@pytest.mark.parametrize(
    ("name", "old", "new", "trained", "said"),
    [
        ("accuracy", 0.6, 0.7, True, True),
        ("accuracy", 0.6, 0.7, False, False),
        ("accuracy", 0.7, 0.6, True, False),
        ("mse", 0.6, 0.5, True, True),
        ("mse", 0.5, 0.6, True, False),
    ],
)
def test_a_gain_after_training_is_not_left_to_pruning(make, snapshot, name, old, new, trained, said):
    training = [TrainingPoint(step=0, loss=1.0, lr=0.1)] if trained else []
    record = make(before=snapshot(quality={name: old}), after=snapshot(quality={name: new}), training=training)
    assert ("the dense model was not given the same steps" in str(verdict(record))) == said


def test_the_dense_control_stands_beside_the_pruned_model(make, snapshot):
    record = make(
        before=snapshot(quality={"accuracy": 0.6, "loss": 2.0}),
        after=snapshot(quality={"accuracy": 0.7, "loss": 1.5}),
        control=Control(steps=("finetune",), quality={"accuracy": 0.75}),
        training=[TrainingPoint(step=0, loss=1.0, lr=0.1)],
    )
    words = str(verdict(record))
    assert "accuracy 60.0 % -> 70.0 % (+10.0 points; the dense model with the same steps reaches 75.0 %)" in words
    assert "loss 2.000 -> 1.500 (-0.500; the dense model was not given the same steps)" in words
    found = {row.label: row for row in rows(record)}
    control = found["accuracy, dense control"]
    assert (control.before, control.after, control.change) == ("60.0 %", "75.0 %", "+15.0 points")
    assert control.share == pytest.approx(0.75 / 0.6)
    assert "loss, dense control" not in found


@pytest.mark.parametrize(
    ("name", "text"), [("top3", "50.0 %"), ("val_top10", "50.0 %"), ("stop3", "0.5000"), ("f1", "50.0 %")]
)
def test_the_best_k_are_a_share(name, text):
    assert score(name, 0.5) == text
