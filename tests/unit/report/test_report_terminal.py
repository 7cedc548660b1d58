import io

import pytest
from rich.console import Console

from secateur import report as R
from secateur import types as T


def shown(record, **options):
    stream = io.StringIO()
    console = Console(file=stream, width=100, **options)
    R.render(record, console=console, files={"report": "out/report.html"})
    return stream.getvalue()


@pytest.fixture
def record(make, hostile):
    return make(
        name=hostile,
        locked=[
            R.Locked.of(hostile, T.Lock(f"unknown {hostile}", "aten.view", hostile, "m.py:3", "add a rule"), params=9)
        ],
        degradations=[T.Degradation("solve", "damping raised", hostile)],
        warnings=[hostile],
    )


def test_the_verdict_is_the_first_line_and_facts_follow(record):
    lines = shown(record).splitlines()
    assert lines[0] == str(R.verdict(record))
    text = "\n".join(lines)
    for part in (
        "damping raised",
        "warnings",
        "locked, not cut (9 parameters)",
        "report: out/report.html",
        "1.5",
    ):
        assert part in text


def test_without_a_terminal_there_is_no_colour_no_box_and_no_wrapping(record):
    text = shown(record)
    assert "\x1b" not in text
    assert not set(text) & set("─━│┃╭")
    assert text.splitlines() == R.plain_lines(record, files={"report": "out/report.html"})


def test_names_cannot_drive_a_terminal(record, hostile):
    colourless = shown(record, force_terminal=True, no_color=True, color_system=None)
    coloured = shown(record, force_terminal=True, color_system="standard")
    assert "\x1b[31m" not in colourless + coloured
    assert "\u202e" not in colourless + coloured
    assert "\\x1b[31m" in colourless.replace("\n", "").replace(" ", "")
    assert "[red]" in colourless


def test_no_color_is_respected(record, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    text = shown(record, force_terminal=True)
    assert "\x1b[3" not in text
    assert "\x1b[1;3" not in text


def test_a_stream_that_knows_ascii_only_does_not_fail(make):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    for options in ({}, {"force_terminal": True}):
        R.render(make(name="模型", warnings=["模型"]), console=Console(file=stream, width=100, **options))
    stream.flush()
    assert b"\\u6a21" in raw.getvalue()


def test_only_the_largest_locked_parts_are_listed(make):
    locked = [R.Locked.of(f"part{number}", T.Lock("why"), params=number) for number in range(20)]
    text = "\n".join(R.plain_lines(make(locked=locked)))
    assert "part19: why" in text
    assert "part3:" not in text
    assert "and 12 more" in text


def test_a_missing_certificate_is_explained(make):
    text = "\n".join(R.plain_lines(make(certificate=None, certificate_reason="nothing was cut")))
    assert "no certificate: nothing was cut" in text


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_progress_prints_a_line_every_few_seconds():
    stream, clock = io.StringIO(), Clock()
    with R.progress("score\x1b", 10, console=Console(file=stream), interval=5.0, clock=clock) as step:
        for done in range(11):
            clock.now = 2.0 * done
            step(done, 10)
    assert stream.getvalue().splitlines() == [
        "score\\x1b: 3/10 (30 %), 6.00 s so far, about 14 s left",
        "score\\x1b: 6/10 (60 %), 12 s so far, about 8.00 s left",
        "score\\x1b: 9/10 (90 %), 18 s so far, about 2.00 s left",
        "score\\x1b: done in 20 s",
    ]


def test_progress_is_silent_where_it_is_quick_and_counts_where_the_end_is_unknown():
    stream, clock = io.StringIO(), Clock()
    with R.progress("quick", 2, console=Console(file=stream), clock=clock) as step:
        step(1, 2)
    assert stream.getvalue() == ""
    with R.progress("open", console=Console(file=stream), clock=clock) as step:
        clock.now = 9.0
        step(7, 0)
    assert stream.getvalue().startswith("open: 7, 9.00 s so far\n")


def test_progress_says_nothing_of_done_after_an_error():
    stream, clock = io.StringIO(), Clock()

    def fail():
        with R.progress("x", 2, console=Console(file=stream), clock=clock) as step:
            clock.now = 9.0
            step(1, 2)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert "x: 1/2" in stream.getvalue()
    assert "done" not in stream.getvalue()


def test_progress_on_a_terminal_is_a_bar_with_the_plain_name():
    stream = io.StringIO()
    with R.progress("[red]a\x1b", 3, console=Console(file=stream, force_terminal=True, width=120)) as step:
        step(3, 3)
    assert "[red]a\\x1b" in stream.getvalue()
    assert "3/3" in stream.getvalue()
