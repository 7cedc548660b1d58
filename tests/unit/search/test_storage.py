"""Where the trials of a search lie: each study is of one thing, and its directions are those of its goals."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.errors import RecipeError
from secateur.search.front import Goals
from secateur.search.storage import opened

pytest.importorskip("optuna")

GOALS = Goals(("accuracy", "macs"), frozenset({"accuracy"}))


def test_more_of_the_quality_is_better_and_less_of_a_cost() -> None:
    assert [one.name for one in opened("", GOALS, "this").directions] == ["MAXIMIZE", "MINIMIZE"]
    loss = Goals(("loss", "macs"), frozenset())
    assert [one.name for one in opened("", loss, "this").directions] == ["MINIMIZE", "MINIMIZE"]


def test_a_storage_takes_one_search_and_goes_on_with_that_alone(tmp_path: Path) -> None:
    opened(tmp_path / "s.db", GOALS, "this").set_user_attr("begun", True)
    assert opened(tmp_path / "s.db", GOALS, "this").user_attrs["begun"]
    with pytest.raises(RecipeError, match="something else"):
        opened(tmp_path / "s.db", GOALS, "another model")
