"""Objects in a console and in a notebook: short, without dumps of index tensors, and names are no markup."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import secateur as sc
from secateur import shown
from secateur.comparison.compare import Comparison
from secateur.deployment.planner import Deployment, LayerDecision
from secateur.structure.view import View
from secateur.types import Kept

X = torch.zeros(1, 4)
EVIL = "<img src=x onerror=alert(1)>"


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({EVIL: nn.Linear(4, 500), "b": nn.Linear(500, 500), "c": nn.Linear(500, 2)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts.values():
            x = part(torch.relu(x))
        return x


@pytest.fixture(scope="module")
def objects() -> dict[str, object]:
    torch.manual_seed(0)
    net = Wide()
    plan = sc.plan(net, X, granularity="neuron", target={"sparsity": 0.5})
    scores = sc.score(net, X, granularity="neuron")
    recipe = {"target": {"sparsity": 0.5}, "granularity": "neuron", "measure": {"latency": False}}
    return {
        "view": sc.inspect(net, X),
        "plan": plan,
        "masks": sc.plan(net, granularity="element", target={"sparsity": 0.5}),
        "scores": scores,
        "kept": sc.select(scores, sparsity=0.5),
        "result": sc.prune(net, X, recipe=recipe),
        "estimate": sc.estimate(net, X, recipe=recipe),
        "comparison": Comparison(({"criterion": EVIL},), {}, None, {}, Path("out"), 0),  # type: ignore[arg-type,typeddict-item]
    }


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        assert not attrs
        self.seen.add(tag)
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("name", ["view", "plan", "masks", "scores", "kept", "result", "estimate", "comparison"])
def test_short_in_a_console_and_a_table_in_a_notebook(name: str, objects: dict[str, object]) -> None:
    thing = objects[name]
    text, page = repr(thing), thing._repr_html_()  # type: ignore[attr-defined]
    assert text.startswith("<")
    assert len(text) < 400
    assert "tensor(" not in text + page
    assert "\n" not in text
    assert len(page) < 6000
    parser = Tags()
    parser.feed(page)
    assert parser.open == []
    assert parser.seen <= {"b", "table", "tr", "th", "td", "div"}
    assert "table" in parser.seen
    if name not in ("result", "estimate"):
        assert "onerror" in page  # the name is there, letter by letter


def test_what_objects_are_made_of_is_short_as_well(objects: dict[str, object]) -> None:
    """Whoever looks at one field of an object in a console sees no page of indices either."""
    view, plan, result = objects["view"], objects["plan"], objects["result"]
    assert isinstance(view, View)
    assert isinstance(plan, sc.Plan)
    assert isinstance(result, sc.Result)
    for thing in (view.groups[0], view.groups[0].spans[0], view.parts[0], plan.edit, plan.evidence, result.report):
        assert "tensor(" not in repr(thing)
        assert len(repr(thing)) < 600
    assert str(result.report) == repr(result.report)
    assert repr(view.locked[0]).endswith(f"locked: {view.locked[0].locks[0].reason}>")


def test_a_deployment_shows_its_layers() -> None:
    net = nn.Sequential(nn.Linear(8, 8))
    deployed = Deployment(
        net, (LayerDecision(EVIL, (8, 8), 0.5, "", "float32", {}, "dense is faster"),), {}, (1, 1), 0.0, "none"
    )
    assert repr(deployed) == "<Deployment: 0 of 1 layers swapped, none>"
    parser = Tags()
    parser.feed(deployed._repr_html_())
    assert parser.seen == {"b", "table", "tr", "th", "td"}


def test_a_long_table_says_what_it_leaves_out() -> None:
    page = shown.table("t", ["a"], [[str(i)] for i in range(100)])
    assert page.count("<td>") == shown.MOST_ROWS
    assert "and 60 more" in page


def test_nothing_kept_is_shown_too() -> None:
    assert repr(Kept({})) == "<Kept: 0 of 0 units in 0 groups>"
