"""Wrong variants of every rule: the second proof, which knows no rule, has to refuse what they bring about.

A variant counts where the cut that follows from it is wrong, as reckoned by hand: its outputs differ from those of the
original with zeros, or it does not run. A variant that only makes the engine more cautious, or that changes nothing of
the cut, proves nothing about the proofs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice

import pytest
from mutants import MUTATIONS, RULES_OWN, Mutant, corrupted, rule_of
from rules_net import Between, Cut, build, cut, differs, inputs, places
from rules_table import ROWS, Row
from torch import Tensor

from secateur.structure.rules import base

pytestmark = pytest.mark.filterwarnings("ignore")

KINDS = (*RULES_OWN, *MUTATIONS)
ROWS_PER_VARIANT = 4


@dataclass(frozen=True)
class Found:
    """A wrong cut, and what noticed it."""

    rule: str
    kind: str
    where: str
    wrong: str
    second: str
    replay: str

    @property
    def noticed(self) -> bool:
        """Whether the second proof refuses it, or the cut model does not run."""
        return self.wrong.startswith("the cut model fails on input 0") or self.second not in ("", "no trial")


@cache
def sound(row: Row, at: int) -> tuple[Between, list[Tensor], frozenset[str], dict[str, list[list[int]]]]:
    """A model, its inputs, the rules that take part, and the cut that follows from the right rules."""
    model, live = build(row, at), inputs(row)
    made = cut(model, live[0])
    rules = {rule.__name__ for step in made.trace.steps if (rule := rule_of(step.func)) is not None}
    return model, live, frozenset(rules), indices(made)


def indices(made: Cut) -> dict[str, list[list[int]]]:
    return {name: [[d, *kept.tolist()] for d, kept in sorted(dims.items())] for name, dims in made.cuts.items()}


def refusal(proof: object) -> str:
    """The class of the error in which a proof ends; "" = it accepts."""
    try:
        found = proof()  # type: ignore[operator]
    except Exception as error:
        return type(error).__name__
    return "" if found is None or found.trials else "no trial"


def tried(mutant: Mutant, row: Row, at: int) -> Found | None:
    """A wrong cut that follows from a variant, if one does."""
    model, live, _, right = sound(row, at)
    where = f"{row.name}, units along {at}"
    with corrupted(mutant):
        try:
            made = cut(model, live[0])
        except Exception:
            return None  # no cut: nothing that could be wrong
        if not made.cuts or indices(made) == right:
            return None
        try:
            made.small()
        except Exception as error:
            return Found(mutant.rule, mutant.kind, where, "cannot be made", type(error).__name__, type(error).__name__)
        wrong = differs(made, row, live)
        if wrong in ("", "no input was compared"):
            return None
        return Found(mutant.rule, mutant.kind, where, wrong, refusal(made.second), refusal(made.replayed))


def rows_of(rule: str) -> Iterator[tuple[Row, int]]:
    """Those that a rule is written for come first."""
    own = {name for name, function in base._RULES.items() if function.__name__ == rule}
    for row in sorted(ROWS, key=lambda row: not own & set(row.ops.split())):
        for at in reversed(places(row)):
            if rule in sound(row, at)[2]:
                yield row, at


def variants(rule: str, *, wide: bool = True) -> Iterator[Found]:
    """One wrong cut of every variant that brings one about within a few models, of all rows or of the rule's first."""
    candidates = list(dict.fromkeys(rows_of(rule) if wide else islice(rows_of(rule), 2)))
    own = candidates[:: max(1, len(candidates) // ROWS_PER_VARIANT)][: ROWS_PER_VARIANT + 1]
    for kind in KINDS:
        for row, at in dict.fromkeys((*candidates[:ROWS_PER_VARIANT], *own)):
            found = tried(Mutant(rule, kind), row, at)
            if found is not None:
                yield found
                break


def rules() -> list[str]:
    return sorted({function.__name__ for function in base._RULES.values()} | {"pointwise"})


def test_a_wrong_variant_of_one_rule_in_twelve_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    judge({rule: list(islice(variants(rule, wide=False), 1)) for rule in rules()[::12]}, capsys)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_wrong_variants_of_every_rule_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    judge({rule: list(variants(rule)) for rule in rules()}, capsys)


def judge(found: dict[str, list[Found]], capsys: pytest.CaptureFixture[str]) -> None:
    everything = [each for variants in found.values() for each in variants]
    second = sum(each.noticed for each in everything)
    both = sum(each.noticed or bool(each.replay) for each in everything)
    with capsys.disabled():
        print(f"\n{len(everything)} wrong variants of {len(found)} rules:")
        print(f"{second} refused by the second proof alone, {both} by both proofs together")
        for each in everything:
            proofs = f"{each.second or 'ACCEPTED':18} {each.replay or 'accepted':18}"
            print(f"  {each.rule:14} {each.kind:28} {proofs} {each.where}: {each.wrong}")
    assert [rule for rule, variants in found.items() if not variants] == [], "write rows in which these rules matter"
    assert second >= 0.95 * len(everything)
    assert both == len(everything)
