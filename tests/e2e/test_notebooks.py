"""Every notebook runs from its first to its last cell, and what lies in it is small."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from e2e_tools import ROOT

NEEDS = {"cnn": (), "hugging_face_encoder": ("transformers",), "language_model": ("transformers",)}
BOOKS = {path.stem: path for path in (ROOT / "examples").glob("*.ipynb")}


def test_notebooks_are_small_and_listed() -> None:
    assert set(BOOKS) == set(NEEDS)
    listed = (ROOT / "examples/README.md").read_text("utf-8")
    for name, path in BOOKS.items():
        assert f"({name}.ipynb)" in listed
        assert path.stat().st_size < 20_000
        cells = [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
        printed = [output for cell in cells for output in cell["outputs"]]
        # What is printed stays readable in a diff; tables and pictures are made anew by whoever runs it.
        assert printed
        assert {output["output_type"] for output in printed} == {"stream"}
        assert str(ROOT) not in json.dumps(printed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BOOKS)
def test_the_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("nbclient", "nbformat", "ipykernel", *NEEDS[name]):
        pytest.importorskip(library)
    import nbformat
    from nbclient import NotebookClient

    paths = (str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    for variable in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    book = nbformat.read(BOOKS[name], as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(book, timeout=280, kernel_name="python3", resources=resources).execute()  # raises at a cell's error
    assert all(cell.execution_count for cell in book.cells if cell.cell_type == "code")
