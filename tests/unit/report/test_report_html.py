import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import plotly.graph_objects as go
import pytest

from secateur import report as R
from secateur import types as T
from secateur.report.charts import figures


class Page(HTMLParser):
    """What a browser would find: elements, attributes, and the text of scripts and of everything else."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.scripts, self.text = [], [], [], []
        self.inside = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data
        else:
            self.text.append(data)


@pytest.fixture
def record(make, snapshot, hostile):
    return make(
        before=snapshot(latency=(2.0, 1.9, 2.1, 20), quality={hostile: 0.5, "accuracy": 0.9}),
        after=snapshot(500, latency=(1.0, 0.9, 1.1, 20), quality={hostile: 0.4, "accuracy": 0.8}),
        name=hostile,
        units=R.UnitCount(removed=4, total=8, what=hostile),
        criterion=R.Choice(name=hostile, options={hostile: hostile}),
        granularity=R.Choice(name=hostile, options={hostile: [hostile]}),
        allocation=R.Choice(name=hostile),
        scope=hostile,
        fingerprint=hostile,
        certificate=None,
        certificate_reason=hostile,
        target={hostile: 0.5},
        achieved={hostile: 0.5},
        after_cut_quality={hostile: 0.1},
        degradations=[T.Degradation(hostile, hostile, hostile)],
        seconds={hostile: 1.0},
        locked=[R.Locked.of(hostile, T.Lock(hostile, hostile, hostile, hostile, hostile), params=1)],
        training=[
            R.TrainingPoint(step=1, loss=None, lr=0.1),
            R.TrainingPoint(step=2, loss=1.0, lr=0.1, quality=0.3),
        ],
        warnings=[hostile],
        command=hostile,
        recipe={hostile: hostile},
        environment=R.environment().model_copy(update={"cpu": hostile, "device": hostile}),
    )


@pytest.fixture
def text(record):
    return R.render_html(record)


def test_a_hostile_name_makes_no_element_anywhere(text, make, hostile):
    page, plain = Page(text), Page(R.render_html(make(training=[R.TrainingPoint(step=1, loss=1.0, lr=0.1)])))
    assert not {"img", "b", "iframe", "object", "link"} & set(page.tags)
    assert page.tags.count("script") == plain.tags.count("script") == 3
    assert all(value.startswith("#") for tag, name, value in page.attributes if name == "href")
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "".join(page.text).count("<img src=x onerror=\"alert('1')\">") > 20
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_nothing_is_fetched(text):
    page = Page(text)
    loaded = [value for _, name, value in page.attributes if name in {"src", "srcset", "data", "action", "poster"}]
    assert loaded == []
    assert "link" not in page.tags
    style = re.search(r"<style>(.*?)</style>", text, re.S)
    assert style
    assert "url(" not in style.group(1)
    assert "@import" not in style.group(1)


def test_the_policy_names_exactly_the_scripts_of_the_page(text):
    page = Page(text)
    policy = next(value for tag, name, value in page.attributes if tag == "meta" and "default-src" in value)
    assert policy.startswith("default-src 'none'; ")
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert set(rules) == {"default-src", "script-src", "style-src", "img-src", "base-uri", "form-action"}
    assert not any("http" in rule or "*" in rule for rule in rules.values())
    run = [script for script in page.scripts if not script.lstrip().startswith("{")]
    hashes = {f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'" for one in run}
    assert hashes == set(rules["script-src"].split())
    assert "unsafe" not in rules["script-src"]


def test_plotly_is_there_once_and_the_data_block_is_inert_json(text, record, hostile):
    page = Page(text)
    assert sum("plotly.js v" in script for script in page.scripts) == 1
    block = next(script for script in page.scripts if script.lstrip().startswith("{"))
    assert not set("<>&") & set(block)
    assert json.loads(block) == json.loads(json.dumps(figures(record)))


def strings(value):
    if isinstance(value, dict):
        return [text for inner in value.values() for text in strings(inner)]
    if isinstance(value, list):
        return [text for inner in value for text in strings(inner)]
    return [value] if isinstance(value, str) else []


def test_labels_and_hovers_carry_no_markup_of_strangers(record):
    drawn = {name: figure for name, figure in figures(record).items() if name != "histograms"}
    found = strings(drawn)
    assert any("&lt;img" in one for one in found)
    for one in found:
        assert not set(re.findall(r"<[^>]*>?", one)) - {"<br>", "<extra>", "</extra>"}
    templates = {trace["hovertemplate"] for figure in drawn.values() for trace in figure["data"]}
    assert templates == {"%{customdata}<extra></extra>"}


def test_plotly_itself_accepts_the_figures(record):
    for name in ("before_after", "layers", "training"):
        go.Figure(figures(record)[name])


def test_the_figures_draw_what_was_measured(record):
    drawn = figures(record)
    assert drawn["layers"]["data"][0]["x"] == [50.0]
    assert drawn["layers"]["data"][1]["x"] == [100 * record.layers[0].near_zero]
    labels = drawn["before_after"]["layout"]["yaxis"]["ticktext"]
    after = drawn["before_after"]["data"][1]
    place = labels.index("latency (p10-p90)")
    assert after["x"][place] == pytest.approx(50)
    assert after["error_x"]["arrayminus"][place] == pytest.approx(5)
    assert after["x"][labels.index("parameters")] == 50
    assert drawn["histograms"][0]["weights"]["counts"] == list(record.layers[0].weight_histogram.counts)
    assert drawn["histograms"][0]["cut"] == 3.0
    losses = next(trace for trace in drawn["training"]["data"] if trace["name"] == "loss")
    assert losses["y"] == [None, 1.0]


def test_every_section_is_there_and_readable_by_machines(text):
    page = Page(text)
    assert ("html", "lang", "en") in page.attributes
    assert "viewport" in [value for tag, name, value in page.attributes if tag == "meta" and name == "name"]
    identifiers = {value for _, name, value in page.attributes if name == "id"}
    assert {
        "figures",
        "layers",
        "histograms",
        "locked",
        "training",
        "reproduce",
        "environment",
        "cautions",
    } <= identifiers
    assert {value[1:] for _, name, value in page.attributes if name == "href"} <= identifiers
    assert page.tags.count("table") == page.tags.count("caption") == 4
    assert page.tags.count("h1") == 1
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_the_verdict_and_the_reasons_are_in_the_text(make):
    record = make(
        locked=[
            R.Locked.of("head", T.Lock("the size 10 is written in the code", "aten.view", "net", "m.py:9"), params=3)
        ],
        command="secateur prune demo:digits --out out",
    )
    words = " ".join("".join(Page(R.render_html(record)).text).split())
    assert "2.00x fewer MACs" in words
    assert "the size 10 is written in the code" in words
    assert "m.py:9" in words
    assert "secateur prune demo:digits --out out" in words
    assert "magnitude, p = 2" in words


def test_without_charts_the_page_is_small_and_runs_nothing(record):
    text = R.render_html(record, charts=False)
    page = Page(text)
    assert "script" not in page.tags
    assert any("script-src 'none'" in value for _, name, value in page.attributes if name == "content")
    assert len(text) < 100_000
    assert page.tags.count("table") == 4


def test_a_bare_record_renders(make):
    text = R.render_html(make(layers=[], seconds={}))
    assert "Nothing is locked." in text
    assert 'id="layer"' not in text


def test_a_library_that_would_end_the_script_is_refused(make, monkeypatch):
    import plotly.offline

    from secateur.errors import RecipeError

    monkeypatch.setattr(plotly.offline, "get_plotlyjs", lambda: "x = '</SCRIPT>'")
    with pytest.raises(RecipeError, match="plotly"):
        R.render_html(make())
