"""The files of a comparison: nothing in a name can leave its place."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
from html import unescape
from typing import Any

import pytest

from secateur.comparison.markdown import markdown, number, signed, words
from secateur.comparison.page import to_html
from secateur.comparison.protocol import Protocol
from secateur.comparison.publish import to_csv
from secateur.comparison.summary import summarise

EVIL = "</script><script>alert(1)</script>|<b>\"'`[x](y)\x1b[31m"


def protocol(**changes: Any) -> Protocol:
    plain: dict[str, Any] = {
        "granularity": "channel", "match": "macs", "levels": (0.5, 0.8), "recoveries": {"none": (), EVIL: ({},)},
        "recover_levels": (0.5,), "ablation_levels": (0.5,), "scope": "global", "allocation": "global", "protect": (),
        "seeds": (0, 1, 2), "metric": "accuracy", "maximize": True, "rounds": 1, "confidence": 0.95,
    }  # fmt: skip
    return Protocol(**{**plain, **changes})


def row(label: str, seed: int, level: float, value: float, **changes: Any) -> dict[str, Any]:
    plain = {
        "seed": seed, "criterion": label, "variant": "as is", "level": level, "recovery": "none", "status": "ok",
        "why": "", "control": label == "random", "options": {"norm": EVIL}, "base": f"b{seed}",
        "key": f"{label}{seed}{level}",
        "quality": {"accuracy": value}, "params": 10, "nonzero": 9, "macs": 100, "sparsity": level, "least_kept": 0.25,
        "units_removed": 1, "units_total": 2, "emptied": 0, "certificate": None, "kept": {"a": 0.5},
        "scoring": {"seconds": 0.1, "epochs": None, "peak_bytes": 4096}, "recovery_seconds": 0.0,
        "recovery_batches": 0, "recovery_hash": "",
    }  # fmt: skip
    return {**plain, **changes}


def rows() -> list[dict[str, Any]]:
    found = []
    for seed in (0, 1, 2):
        for level in (0.5, 0.8):
            found.append(row("magnitude", seed, level, 0.8 - level / 4 + seed / 100))
            found.append(row(EVIL, seed, level, 0.9 - level / 4 + seed / 90))
            found.append(row("random", seed, level, 0.3 + ((seed * 7 + int(level * 10)) % 5) / 10))
        found.append(row(EVIL, seed, 0.5, 0.4, variant="shuffled"))
        found.append(row(EVIL, seed, 0.5, 0.2, variant="inverted"))
        for label in ("magnitude", EVIL):
            shared = {
                "recovery": EVIL,
                "recovery_hash": "h" if label == EVIL else f"h{seed // 2}",
                "recovery_batches": 4,
            }
            found.append(row(label, seed, 0.5, 0.9, **shared))
        found.append(row("dense", seed, 0.0, 0.95, scoring=None, control=True))
    found.append(row("broken", 0, 0.5, 0.0, status="refused", why=EVIL))
    return found


def manifest() -> dict[str, Any]:
    return {
        "title": EVIL, "command": EVIL, "model": EVIL,
        "protocol": {"match": "macs", "seeds": [0, 1, 2], "granularity": EVIL, "scope": EVIL, "probes": 9},
        "criteria": [{"label": EVIL, "control": False}, {"label": "random", "control": True}],
        "scoring": {"batches": 1, "samples": 8, "hash": "0"}, "bases": {}, "runs": {"total": 3, "ok": 2},
        "environment": {"cpu": EVIL, "threads": 1, "device": EVIL, "torch": EVIL, "secateur": EVIL},
    }  # fmt: skip


@pytest.fixture(scope="module")
def page() -> str:
    return to_html(summarise(rows(), protocol(), told()), manifest())


def told() -> list[dict[str, Any]]:
    known = {"magnitude": {"all": 0.25, "within": None}, EVIL: {"all": None, "within": -0.5}}
    return [known, {"magnitude": {"all": 0.75, "within": None}}]


def test_the_page_asks_the_network_for_nothing(page: str) -> None:
    head, body = page.split("<body>")
    assert "default-src 'none'" in unescape(head)
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", body)


def test_the_only_script_is_named_by_its_hash(page: str) -> None:
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.S)
    assert policy is not None
    allowed = re.findall(r"sha256-([^&']*)", policy[1].replace("&#39;", "'"))
    assert allowed == [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    assert len(allowed) == 1


def test_names_stay_in_their_place(page: str) -> None:
    assert "alert(1)</script>" not in page
    assert "<script>alert" not in page
    assert "\x1b" not in page


def test_the_curves_stand_where_the_means_are(page: str) -> None:
    said = unescape(" ".join(re.findall(r'data-tip="([^"]*)"', page)))
    assert "magnitude, 0.5 removed: 0.685" in said
    assert "magnitude, 0.8 removed: 0.61" in said
    # Of two curves with the same strengths, the better one is drawn higher.
    found = {
        unescape(tip): float(top)
        for top, tip in re.findall(r'<circle[^>]*?data-tip="([^"]*)"[^>]*?cy="([^"]*)"', page)
        for top, tip in [(tip, top)]
    }
    better = next(top for tip, top in found.items() if tip.startswith("</script>") and "0.5 removed" in tip)
    worse = next(top for tip, top in found.items() if tip.startswith("magnitude, 0.5"))
    assert better < worse


def test_one_strength_is_drawn_as_bars_in_order() -> None:
    two = [row(label, s, 0.5, mean + s / 100) for s in (0, 1) for label, mean in (("magnitude", 0.2), ("taylor", 0.9))]
    page = to_html(summarise(two, protocol()), manifest())
    assert page.index(">taylor</text>") < page.index(">magnitude</text>")


def test_a_page_without_charts_is_small_and_holds_the_tables() -> None:
    text = to_html(summarise(rows(), protocol()), manifest(), charts=False)
    assert len(text) < 60_000
    assert "<svg" not in text
    assert "not distinguishable" in text


def test_agreement_with_the_loss_is_the_mean_of_the_seeds_that_know_it() -> None:
    found = summarise(rows(), protocol(), told())["fidelity"]
    assert found[0] == {"criterion": "magnitude", "seeds": 2, "all": 0.5, "within": None}
    assert found[1] == {"criterion": EVIL, "seeds": 1, "all": None, "within": -0.5}


def test_layers_are_shown_in_the_order_of_their_numbers() -> None:
    kept = {"b.10": 0.5, "b.2": 1.0, "a": 0.25}
    two = [row("magnitude", s, 0.5, 0.8, kept={**kept, "a": 0.25 + s / 4}) for s in (0, 1)]
    found = summarise(two, protocol())
    assert summarise(two, protocol(), (), ["b", "b.2", "b.10", "a"])["layers"]["groups"] == ["b.2", "b.10", "a"]
    assert found["layers"] == {"level": 0.5, "groups": ["a", "b.2", "b.10"], "kept": {"magnitude": [0.375, 1.0, 0.5]}}


def test_markdown_cannot_be_broken_by_a_name() -> None:
    text = markdown(summarise(rows(), protocol()), manifest())
    lines = [line for line in text.splitlines() if line.startswith("|")]
    blocks = re.findall(r"(?:^\|.*\n?)+", text, flags=re.M)
    assert lines
    for block in blocks:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.strip().splitlines()}
        assert len(widths) == 1
    assert "<svg" not in text
    assert "\x1b" not in text


def test_csv_runs_nothing_and_holds_every_row() -> None:
    wanted = [*rows(), row("=HYPERLINK(1)", 0, 0.5, 0.5), row("-x", 0, 0.5, 0.5)]
    lines = list(csv.DictReader(io.StringIO(to_csv(wanted))))
    assert len(lines) == len(wanted)
    assert [line["criterion"] for line in lines[-2:]] == ["'=HYPERLINK(1)", "'-x"]
    assert "kept" not in lines[0]
    assert lines[0]["scoring.peak_bytes"] == "4096"


def test_unpaired_recoveries_are_said_aloud() -> None:
    summary = summarise(rows(), protocol())
    assert summary["pairing"]["checked"] == 3
    assert len(summary["pairing"]["broken"]) == 3
    assert any(line.startswith("NOT PAIRED") for line in words(summary))


def test_rank_agreement_and_medians_are_those_of_the_rows() -> None:
    summary = summarise(rows(), protocol())
    (pair,) = summary["rank_agreement"]["none"]
    assert (pair["levels"], pair["criteria"], pair["tau"]) == ([0.5, 0.8], 3, 1.0)
    assert summary["dense"]["none"]["mean"] == pytest.approx(0.95)
    assert {line["criterion"] for line in summary["scoring"]} == {"magnitude", EVIL, "random"}
    assert summary["refused"][0]["runs"] == 1


def test_numbers_read_well() -> None:
    assert (number(0.61234), number(None), number(float("nan"))) == ("0.6123", "-", "-")
    assert (signed(0.01234), signed(-2.0), signed(0.0), signed(None)) == ("+0.0123", "-2.00", "+0", "-")
