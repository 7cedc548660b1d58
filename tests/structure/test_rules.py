"""Every operator that has a rule, between two layers that are cut: along every dimension, on live and on empty data.

The truth is reckoned by hand (`rules_net.truth`): the original with zeros where something was removed. No rule may be
wrong on any input, lock where nothing speaks against a cut, or let one through that the proofs then refuse.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import rules_table
import torch
from rules_net import Cut, build, cut, degenerate, differs, inputs, operators, places, run
from rules_table import ANY, ELSEWHERE, ROWS, UNITS, Row

from secateur.errors import CertificateError
from secateur.structure import rules
from secateur.structure.rules import base


@cache
def live_cut(row: Row, at: int) -> Cut:
    """A cut of the row's model on a live example."""
    return cut(build(row, at), inputs(row)[0])


NAMES = [f"{i}-{row.name}" for i, row in enumerate(ROWS)]


@pytest.mark.sampled(14)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_what_a_rule_says_holds_on_other_inputs(row: Row) -> None:
    seen: set[str] = set()
    for at in places(row):
        live, made = inputs(row), live_cut(row, at)
        seen |= operators(made)
        assert (made.units is not None) == (str(at) in row.free), f"units along {at}: {_locks(made)}"
        if made.cuts:
            assert differs(made, row, live) == "" or str(at) in row.refused, f"units along {at}"
    assert set(row.ops.split()) <= seen


@pytest.mark.sampled(14)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_what_it_says_of_an_empty_example_holds_on_live_inputs(row: Row) -> None:
    at = _place(row)
    model = live_cut(row, at).model
    for example in degenerate(row):
        try:
            run(model, example)
        except (RuntimeError, IndexError, ValueError):
            continue  # the original does not take it
        made = cut(model, example)
        assert str(at) in row.free or made.units is None, "free where a live example locks"
        if made.cuts:
            assert differs(made, row, inputs(row)) == "" or str(at) in row.refused


@pytest.mark.sampled(3)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", ANY, ids=[row.note for row in ANY])
def test_what_has_no_rule_of_its_own_is_right_or_locked(row: Row) -> None:
    for at in places(row):
        model, live = build(row, at), inputs(row)
        for example in (live[0], *degenerate(row)[:1]):
            try:
                run(model, example)
            except (RuntimeError, IndexError, ValueError):
                continue  # the original does not take it
            made = cut(model, example)
            if made.cuts:
                assert differs(made, row, live) == "", f"units along {at}"


@pytest.mark.sampled(14)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", [row for row in ROWS if row.free], ids=[row.name for row in ROWS if row.free])
def test_both_proofs_accept_what_is_right(row: Row) -> None:
    at = _place(row)
    made = live_cut(row, at)
    made.replayed()
    if str(at) in row.refused:
        with pytest.raises(CertificateError):
            made.second("example")
    else:
        assert made.second("example").trials


def _place(row: Row) -> int:
    return int(row.free[-1]) if row.free else places(row)[-1]


def _locks(made) -> list[tuple[str, list[str]]]:
    return [(g.name, [lock.reason for lock in g.locks]) for g in made.found.groups]


def test_every_rule_has_a_row() -> None:
    named = {name for row in ROWS for name in row.ops.split()}
    missing = set(base._RULES) - named - set(ELSEWHERE)
    if not rules_table.PLAYED:
        missing -= {name for name in missing if name.startswith("torchvision::")}
    assert missing == set(), "write a row for them in rules_table.py"


def test_rules_of_other_devices_are_those_that_are_tried_here() -> None:
    for name, beside in ELSEWHERE.items():
        assert base._RULES[name] is base._RULES[beside], name


def test_every_rule_is_of_an_operator() -> None:
    names = [name for name in base._RULES if "::" not in name]
    assert [name for name in names if not hasattr(torch.ops.aten, name)] == []


def test_rows_have_different_sizes_so_that_no_two_dimensions_are_taken_for_each_other() -> None:
    assert all(UNITS not in row.sizes for row in ROWS if "turned round" not in row.note)


def test_an_operator_without_a_rule_locks_and_says_so() -> None:
    row = Row("_linalg_det", lambda h, m: torch.renorm(h, 2, 0, 1.0), "")
    made = cut(build(row, 2), inputs(row)[0])
    assert made.units is None
    assert any("no rule for the operator renorm" in reason for _, reasons in _locks(made) for reason in reasons)


def test_two_tensors_compared_as_a_whole_are_locked() -> None:
    row = Row("equal", lambda h, m: h * 2 if torch.equal(h, h.sin()) else h, "")
    assert cut(build(row, 2), inputs(row)[0]).units is None


def test_dropout_in_inference_mode_is_no_chance() -> None:
    """Whole in inference mode, it draws nothing outside of training."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.drop = torch.nn.Linear(8, 12), torch.nn.Linear(12, 4), torch.nn.Dropout()

        @torch.inference_mode()
        def forward(self, x):
            return self.b(self.drop(self.a(x)))

    import secateur as sc

    plan = sc.plan(Model().eval(), torch.randn(2, 8), target={"sparsity": 0.3})
    assert plan.cuts["a.weight"]


def registered(path: Path) -> Iterator[str]:
    """Operators that a file of rules registers."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "register":
            yield from (part.value for name in node.args for part in ast.walk(name) if isinstance(part, ast.Constant))


def test_every_operator_has_one_rule() -> None:
    # The second one would take the first one's place, which then looks alive and is read by nobody.
    names = [name for path in sorted(Path(rules.__file__).parent.glob("*.py")) for name in registered(path)]
    assert len(names) > 200
    assert {name for name in names if names.count(name) > 1} == set()
