import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest

from secateur import report as R
from secateur import types as T


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
        network=[
            R.NetworkPart(
                name=hostile,
                kind=hostile,
                width_before=8,
                width_after=4,
                kept=0.5,
                params_before=9,
                params_after=5,
                makes=(hostile,),
                reads=(hostile,),
                locked=hostile,
            ),
            R.NetworkPart(
                name="b",
                kind="c",
                width_before=8,
                width_after=8,
                kept=1,
                params_before=9,
                params_after=9,
                reads=(hostile,),
            ),
        ],
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
    assert page.tags.count("script") == plain.tags.count("script") == 1
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
    hashes = {f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'" for one in page.scripts}
    assert hashes == set(rules["script-src"].split())
    assert "unsafe" not in rules["script-src"]


def test_nothing_is_drawn_twice_over(text):
    """All pictures of a page together are lighter than a photograph: no library rides along."""
    assert len(text.encode()) < 100_000


def tips(text):
    return [value for _, name, value in Page(text).attributes if name == "data-tip"]


def test_the_pictures_draw_what_was_measured(make, snapshot):
    record = make(
        before=snapshot(latency=(2.0, 1.9, 2.1, 20), quality={"accuracy": 0.9}),
        after=snapshot(500, latency=(1.0, 0.9, 1.1, 20), quality={"accuracy": 0.8}),
        after_cut_quality={"accuracy": 0.1},
        quality_samples={"accuracy": 100},
        control={"steps": ("finetune",), "quality": {"accuracy": 0.95}},
    )
    text = R.render_html(record)
    said = tips(text)
    assert "parameters after: 500 2.00x fewer" in said
    assert "the result, 50.0 % removed: 80.0 % (71.1 % to 86.7 %, 95 % on 100 samples)" in said
    assert any(one.startswith("right after the cut, 50.0 % removed: 10.0 %") for one in said)
    assert "dense control, the same steps: 95.0 %" in text
    # The bar of the latency is half as long as that before it, and its line goes from 0.9 to 1.1 of 2.0 ms.
    widths = dict(zip(said, re.findall(r'<rect x="0" y="[^"]*" width="([^"]*)%"', text), strict=False))
    before, after = (
        next(float(w) for tip, w in widths.items() if tip.startswith(f"latency (p10-p90) {e}"))
        for e in ("before", "after")
    )
    assert after == pytest.approx(before / 2, rel=1e-3)
    assert "80.0 % (71.1-86.7)" in text


def test_a_figure_that_is_no_share_has_no_interval(make, snapshot):
    quality = {"perplexity": 12.5}
    record = make(
        before=snapshot(quality=quality), after=snapshot(500, quality=quality), quality_samples={"perplexity": 9}
    )
    assert "to" not in next(one for one in tips(R.render_html(record)) if "12.5" in one)


def test_every_section_is_there_and_readable_by_machines(record):
    text = R.render_html(record, folder="runs/mine")
    page = Page(text)
    assert ("html", "lang", "en") in page.attributes
    assert "viewport" in [value for tag, name, value in page.attributes if tag == "meta" and name == "name"]
    identifiers = {value for _, name, value in page.attributes if name == "id"}
    assert {
        "network",
        "figures",
        "quality",
        "next",
        "words",
        "layers",
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


def test_without_charts_the_page_holds_the_tables(record):
    text = R.render_html(record, charts=False)
    page = Page(text)
    assert "svg" not in page.tags
    assert page.tags.count("table") == 4


def test_a_bare_record_renders(make):
    text = R.render_html(make(layers=[], seconds={}))
    assert "Nothing is locked." in text
    assert 'id="network"' not in text


def test_a_page_of_a_thousand_layers_stays_light(make):
    record = make()
    part = R.NetworkPart(
        name="x", kind="Linear", width_before=64, width_after=32, kept=0.5, params_before=9, params_after=4,
        makes=("g",), reads=("h",),
    )  # fmt: skip
    many = [
        part.model_copy(update={"name": f"blocks.{i}.{n}", "makes": (f"{i}.{n}",)}) for i in range(250) for n in "abcd"
    ]
    layers = [record.layers[0].model_copy(update={"name": f"blocks.{i}"}) for i in range(1000)]
    text = R.render_html(record.model_copy(update={"network": tuple(many), "layers": tuple(layers)}))
    assert len(text.encode()) < 1_500_000
    assert "The other 880 layers stand in report.json." in text
    assert "1000 parts in 4 rows" in text
