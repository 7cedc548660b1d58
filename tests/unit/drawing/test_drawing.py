"""Pictures: places are where numbers say, names are never markup, nothing is too heavy."""

from __future__ import annotations

import itertools
import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from secateur.drawing import Bar, Curve, DrawnPart, bars, curves, heat, histogram, picture
from secateur.drawing.charts import Axes, Level
from secateur.drawing.network import LANES, folded, lanes_of
from secateur.drawing.scale import Axis

EVIL = "</text><script>alert(1)</script>\"'&\x1b[31m"


def parsed(markup: str) -> ElementTree.Element:
    """A drawing is well-formed, or a browser would repair it in its own way."""
    return ElementTree.fromstring(f"<all>{markup}</all>")


@given(st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=9), st.booleans())
@example([5e-324], True)
@example([0.0, 1e-310], False)
def test_an_axis_holds_every_value_and_its_ticks_in_order(values, zero):
    scale = Axis.over(values, zero=zero)
    assert all(-1e-9 <= scale.place(value) <= 1 + 1e-9 for value in values)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 9
    assert ticks == sorted(ticks)
    assert all(-1e-6 <= scale.place(tick) <= 1 + 1e-6 for tick in ticks)
    if zero and min(values) >= 0:
        assert scale.low == 0


@given(st.lists(st.floats(1e-9, 1e12), min_size=1, max_size=9))
def test_a_logarithmic_axis_makes_equal_factors_equally_long(values):
    scale = Axis.over(values, log=True)
    low, high = scale.low, scale.high
    assert scale.place(math.sqrt(low * high)) == pytest.approx(0.5, abs=1e-6)
    assert len(scale.ticks()) > 1


def test_a_point_stands_where_its_numbers_are():
    drawn = parsed(curves([Curve("a", [(0.0, 1.0, "low"), (1.0, 3.0, "high")])], Axes("x", "y"), "said"))
    low, high = drawn.findall(".//circle")
    assert float(low.get("cx").rstrip("%")) < float(high.get("cx").rstrip("%"))
    assert float(low.get("cy")) > float(high.get("cy")), "up is more"


@settings(max_examples=30)
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=4), st.lists(st.floats(-1e3, 1e3), max_size=2))
def test_no_words_lie_over_what_is_drawn(values, levels):
    points = [Curve(f"curve {n}", [(n, value, "tip")], n, [(value - 1, value + 1)]) for n, value in enumerate(values)]
    lines = [Level(at, f"level {n}") for n, at in enumerate(levels)]
    drawn = parsed(curves(points, Axes("x", "y"), "said", height=260, lines=lines))
    (plot,) = drawn.iterfind(".//svg[@class='plot']")
    for text in plot.iter("text"):
        assert float(text.get("x").rstrip("%")) < 0 or float(text.get("y")) > 260, "numbers stand outside of both axes"
    names = ["".join(row.itertext()).strip() for row in drawn.iter("li")]
    alone = len(points) + len(lines) == 1
    assert names == ([] if alone else [*(one.name for one in points), *(one.said for one in lines)])


def test_what_is_not_finite_interrupts_a_line_and_is_no_point():
    drawn = parsed(curves([Curve("a", [(0, 1.0, ""), (1, None, ""), (2, 2.0, "")])], Axes("x", "y"), "said"))
    assert drawn.find(".//path").get("d").count("M") == 2
    assert len(drawn.findall(".//circle")) == 2


def test_bars_are_as_long_as_their_values():
    drawn = parsed(bars([Bar("a", [100.0, 25.0], ["before", "after"])], "%", "said", whole=100.0))
    before, after = (float(rect.get("width").rstrip("%")) for rect in drawn.iter("rect"))
    assert after == pytest.approx(before / 4, rel=1e-3)


@pytest.mark.parametrize("counts", [(3, 1), (1000, 1), (0, 0)])
def test_a_histogram_is_logarithmic_where_one_bin_holds_most(counts):
    drawn = histogram([0.0, 1.0, 2.0], counts, "x", "said", cut=1.0)
    assert ("count (log)" in drawn) == (max(counts) > sum(counts) / 2)
    parsed(drawn)


def test_a_cell_is_as_full_as_its_share():
    drawn = parsed(heat(["a"], ["l1", "l2"], [[1.0, 0.25]], "said"))
    heights = [float(rect.get("height")) for rect in drawn.iter("rect") if rect.get("class") == "after"]
    assert heights[1] == pytest.approx(heights[0] / 4)


def test_names_are_never_markup():
    part = DrawnPart(EVIL, EVIL, 8, 0.5, 4, (EVIL,), (), EVIL, (EVIL,))
    many = [
        picture([part, DrawnPart("b", "c", 8, reads=(EVIL,))]),
        curves([Curve(EVIL, [(0, 1.0, EVIL)])] * 2, Axes(EVIL, EVIL), EVIL),
        bars([Bar(EVIL, [1.0], [EVIL], mark=(0.5, EVIL))], EVIL, EVIL),
        heat([EVIL], [EVIL], [[0.5]], EVIL),
        histogram([0, 1], [1], EVIL, EVIL, cut=None),
    ]
    for markup in many:
        assert "script" not in {one.tag for one in parsed(markup).iter()}
        assert "\x1b" not in markup


def chain(length):
    return [DrawnPart(f"l{i}", "Linear", 8, makes=(f"g{i}",), reads=(f"g{i - 1}",) if i else ()) for i in range(length)]


def test_lanes_join_who_makes_and_who_reads():
    rows = folded([*chain(4), DrawnPart("head", "Linear", 2, reads=("g0", "g3"))])
    lanes, left = lanes_of(rows)
    assert left == 0
    assert {(lane.first, lane.last) for lane in lanes} == {(0, 4), (1, 2), (2, 3), (3, 4)}
    for one, two in itertools.combinations(lanes, 2):
        apart = one.last < two.first or two.last < one.first
        assert one.number != two.number or apart, "no two couplings in one line"


def test_more_couplings_than_lanes_are_counted():
    parts = [DrawnPart(f"m{i}", "Linear", 8, makes=(f"g{i}",)) for i in range(12)]
    parts += [DrawnPart(f"r{i}", "Linear", 8, reads=(f"g{i}",)) for i in range(12)]
    lanes, left = lanes_of(folded(parts))
    assert len(lanes) == LANES
    assert left == 12 - LANES
    assert f"{left} more couplings" in picture(parts)


def test_repeated_blocks_share_rows_and_lanes():
    parts = []
    for i in range(30):
        parts.append(DrawnPart(f"h.{i}.up", "Linear", 8, 0.5, 4, makes=(f"g{i}",)))
        parts.append(DrawnPart(f"h.{i}.down", "Linear", 8, 1.0, 8, reads=(f"g{i}",)))
    rows = folded(parts)
    assert [(row.name, len(row.parts)) for row in rows] == [("h.*.up", 30), ("h.*.down", 30)]
    lanes, left = lanes_of(rows)
    assert (len(lanes), left, len(lanes[0].groups)) == (1, 0, 30)
    assert picture(parts).count("h.17.up: 8 → 4, -50 %") > 0, "each part is still named"


@pytest.mark.parametrize(
    ("part", "word"),
    [
        (DrawnPart("a", "L", 8, 0.5, 4), "-50 %"),
        (DrawnPart("a", "L", 8, 0.0, 0), "gone"),
        (DrawnPart("a", "L", 8, 1.0, 8), "whole"),
        (DrawnPart("a", "L", 8, 1.0, 8, locked="why"), "locked"),
        (DrawnPart("a", "L", 8), "can be cut"),
        (DrawnPart("a", "L", 8, locked="why"), "locked"),
        (DrawnPart("a", "L", 10_000, 0.9999, 9_999), "-<1 %"),
    ],
)
def test_a_row_says_what_happens_to_its_part(part, word):
    assert re.search(rf'class="state [a-z]+">{re.escape(word.replace("<", "&lt;"))}<', picture([part]))


@pytest.mark.parametrize("kept", [0.25, 0.5, 1.0])
def test_what_stays_fills_the_middle_of_its_outline_by_its_share(kept):
    drawn = parsed(picture([DrawnPart("a", "L", 64, kept, int(64 * kept)), DrawnPart("wide", "L", 256)]))
    (outline, inner), *_ = ([r for r in svg.iter("rect")] for svg in drawn.iter("svg") if svg.get("class") == "bar")
    place = [[float(rect.get(name).rstrip("%")) for name in ("x", "width")] for rect in (outline, inner)]
    assert place[1][1] == pytest.approx(kept * place[0][1], abs=0.01)
    assert place[0][1] == pytest.approx(100 * math.sqrt(64 / 256), abs=0.01)
    assert place[0][0] + place[0][1] / 2 == pytest.approx(place[1][0] + place[1][1] / 2, abs=0.02)


def test_a_row_of_several_says_what_they_lose_on_average_and_the_ends_of_their_widths():
    parts = [DrawnPart(f"h.{i}.up", "L", 10, 0.5 + 0.4 * (i % 2), 5 + 4 * (i % 2)) for i in range(60)]
    drawn = picture(parts)
    assert 'class="state smaller">-30 %<' in drawn
    assert "10 → 5-9" in drawn


def test_no_axis_leaves_the_ends_that_its_values_can_have():
    scale = Axis.over([0.2, 1.0], within=(0.0, 1.0))
    assert (scale.low, scale.high) == (pytest.approx(0.16), 1.0)
    assert Axis.over([0.0, 0.5], within=(0.0, 1.0)).low == 0.0


def test_nothing_is_drawn_of_nothing():
    assert picture([]) == ""
