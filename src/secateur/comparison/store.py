"""Where the results of a comparison lie: one small file per run, named by the hash of what decides about it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.errors import FileRefusedError
from secateur.files.atomic import atomic_write
from secateur.files.safe import load_json, load_metadata, load_tensors, save_tensors
from secateur.files.seeds import canonical_json

_FACTS = "facts"


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

    def cell(self, key: str) -> dict[str, Any] | None:
        """The result of a run, or None where it has not been run."""
        path = self.folder / "cells" / f"{key}.json"
        if not path.exists():
            return None
        found = load_json(path)
        if not isinstance(found, dict) or found.get("key") != key:
            raise FileRefusedError(f"{path} is no result of a comparison", hint="remove it; the run is done again")
        return found

    def put_cell(self, key: str, result: Mapping[str, Any]) -> dict[str, Any]:
        """Keep the result of a run."""
        whole = {**result, "key": key}
        atomic_write(self.folder / "cells" / f"{key}.json", canonical_json(whole))
        return whole

    def scores(self, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Scores and what they cost, or None where they have not been computed."""
        path = self.folder / "scores" / f"{key}.safetensors"
        if not path.exists():
            return None
        return load_tensors(path), dict(json.loads(load_metadata(path)[_FACTS]))

    def put_scores(self, key: str, scores: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Keep scores: a later level does not pay for them again."""
        path = self.folder / "scores" / f"{key}.safetensors"
        save_tensors(path, scores, {_FACTS: canonical_json(facts).strip()})
