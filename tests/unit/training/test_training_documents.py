"""The pages about pruning while training run as they are written, and so do the examples."""

from __future__ import annotations

import importlib.util
import logging
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SLOW = {"prune-in-a-trainer": ("transformers", "accelerate"), "prune-in-lightning": ("lightning",)}
PAGES = ["prune-gradually", "prune-in-your-own-loop", "network-slimming", "movement-pruning"]


def run(page: str) -> None:
    text = (ROOT / "docs/how-to" / f"{page}.md").read_text("utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    assert "secateur" in code
    exec(compile(code, page, "exec"), {"__name__": "documents"})
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (ROOT / "docs/how-to" / target).exists(), target


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_page_runs(page):
    run(page)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", SLOW)
def test_the_page_about_a_trainer_runs(page):
    for library in SLOW[page]:
        pytest.importorskip(library)
    level = logging.getLogger("lightning.pytorch").level
    try:
        run(page)
    finally:
        logging.getLogger("lightning.pytorch").setLevel(level)


EXAMPLES = {
    "gradual": ({"epochs": 1, "sparsity": 0.8}, ("mlxtend",), lambda found: found > 0.5),
    "trainer": ({"steps": 6}, ("transformers", "accelerate"), lambda found: abs(found - 0.5) < 1e-3),
    "lightning_loop": ({"epochs": 1}, ("mlxtend", "lightning"), lambda found: abs(found - 0.5) < 5e-3),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_runs(name, tmp_path, monkeypatch):
    options, libraries, holds = EXAMPLES[name]
    for library in libraries:
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert holds(module.main(**options))


def test_the_plain_loop_takes_twenty_lines():
    _, _, code = (ROOT / "examples/gradual.py").read_text("utf-8").split('"""')
    assert len([line for line in code.splitlines() if line.strip()]) == 20
