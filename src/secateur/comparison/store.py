"""Where the results of a comparison lie: one small file per run, named by the hash of what decides about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple, cast

from torch import Tensor

from secateur.comparison.records import RunRow, ScoringCost
from secateur.errors import FileRefusedError
from secateur.files.atomic import atomic_write
from secateur.files.safe import load_json, load_metadata, load_tensors, save_tensors
from secateur.files.seeds import canonical_json

_FACTS = "facts"


class Scored(NamedTuple):
    """Scores and what they cost; None for tensors that are no scores of a criterion."""

    scores: dict[str, Tensor]
    cost: ScoringCost | None


class Store:
    """The folders ``cells/`` and ``scores/`` of a comparison.

    Every file is written whole or not at all and never changed, so a comparison that was killed goes on where it
    stopped, and two comparisons may share a folder.

    Args:
        folder: made where it is missing.

    Raises:
        FileRefusedError: it exists and is no folder, or may not be written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            for name in ("cells", "scores"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileRefusedError(f"{self.folder} cannot hold a comparison", why=str(error)) from error

    def cell(self, key: str) -> RunRow | None:
        """The result of a run, or None where it has not been run.

        Raises:
            FileRefusedError: the file is no JSON, or another result than its name says.
        """
        path = self.folder / "cells" / f"{key}.json"
        # What exists is whole: it was written under another name, and renamed at the end.
        if not path.exists():
            return None
        found = load_json(path)
        # The key stands inside as well: a file that was copied under another name is not believed.
        if not isinstance(found, dict) or found.get("key") != key:
            raise FileRefusedError(f"{path} is no result of a comparison", hint="remove it; the run is done again")
        return cast(RunRow, found)

    def put_cell(self, row: RunRow) -> None:
        """Keep the result of a run under its key."""
        atomic_write(self.folder / "cells" / f"{row['key']}.json", canonical_json(row))

    def scores(self, key: str) -> Scored | None:
        """Scores and what they cost, or None where they have not been computed."""
        path = self.folder / "scores" / f"{key}.safetensors"
        if not path.exists():
            return None
        cost = json.loads(load_metadata(path)[_FACTS])
        return Scored(load_tensors(path), cast(ScoringCost, cost) if cost else None)

    def put_scores(self, key: str, found: Scored) -> None:
        """Keep scores: a later level does not pay for them again."""
        path = self.folder / "scores" / f"{key}.safetensors"
        # The cost rides in the header of the scores, so that one cannot be there without the other.
        save_tensors(path, found.scores, {_FACTS: canonical_json(found.cost or {}).strip()})
