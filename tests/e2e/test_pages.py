"""Every page with Python on it runs as it is written, from the first block to the last, in an empty folder.

What a page takes for granted (a model, some data) stands in it where readers do not see it: `<!-- runs with ... -->`.
"""

from __future__ import annotations

import importlib
import logging
import re
import warnings
from pathlib import Path

import pytest
from e2e_tools import ROOT
from ruamel.yaml import YAML

from secateur.criteria.base import CRITERIA
from secateur.structure import rules
from secateur.training.schedules.base import SCHEDULES

BLOCKS = re.compile(r"^<!-- runs with\n(.*?)^-->|^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINKS = re.compile(r"\]\(([^)\s]*)\)")
QUICK = {
    "README.md",
    "CONTRIBUTING.md",
    "docs/reference/python.md",
    "docs/how-to/masks-in-your-own-loop.md",
    "docs/how-to/lottery-tickets.md",
    "docs/how-to/distil.md",
    "docs/how-to/resume-a-run.md",
    "docs/migrate/torch-nn-utils-prune.md",
    "docs/reference/report.md",
    "docs/how-to/prune-your-own-model.md",
    "docs/how-to/at-most-this-loss.md",
}
NEEDS = {
    "docs/how-to/hugging-face.md": ["transformers"],
    "docs/how-to/language-models.md": ["transformers"],
    "docs/how-to/deploy.md": ["transformers"],
    "docs/how-to/export-a-pruned-model.md": ["onnx", "onnxscript", "onnxruntime"],
    "docs/how-to/search.md": ["optuna"],
    "docs/how-to/compare-criteria.md": ["scipy"],
    "docs/how-to/measure.md": ["mlxtend"],
    "docs/how-to/prune-in-a-trainer.md": ["transformers", "accelerate"],
    "docs/how-to/prune-in-lightning.md": ["lightning"],
}
# Libraries of training warn of their own settings; our pages must be silent.
LOUD = {"docs/how-to/prune-in-a-trainer.md", "docs/how-to/prune-in-lightning.md"}
ELSEWHERE = {
    "docs/tutorials/first-run.md": "test_documents.py",  # with its commands, from an empty folder
    "docs/how-to/write-a-criterion.md": "../contract/test_criteria.py",  # by the contract suite
    "docs/reference/granularities.md": "../contract/test_criteria.py",
}


def pages() -> list[str]:
    found = [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *ROOT.glob("benchmarks/*.md"),
        *ROOT.glob("examples/*.md"),
    ]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def code(page: str) -> str:
    return "\n".join(hidden or shown for hidden, shown in BLOCKS.findall((ROOT / page).read_text("utf-8")))


WITH_CODE = [page for page in pages() if code(page)]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page, marks=() if page in QUICK else pytest.mark.slow)
        for page in WITH_CODE
        if page not in ELSEWHERE
    ],
)
def test_the_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in NEEDS.get(page, ()):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    assert "secateur" in code(page)
    level = logging.getLogger("lightning.pytorch").level
    registries = [(registry, set(registry)) for registry in (CRITERIA, SCHEDULES)]
    known_rules = dict(rules.base._RULES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if page in LOUD else "error")
        try:
            # As a file of its own: without the future imports of this one.
            exec(compile(code(page), page, "exec", dont_inherit=True), {"__name__": "documents"})
        finally:
            # A page may register something, and other tests walk over all that there is.
            for registry, known in registries:
                for name in set(registry) - known:
                    registry.remove(name)
            for name in set(rules.base._RULES) - set(known_rules):
                del rules.base._RULES[name]
            rules.base._find.cache_clear()
            logging.getLogger("lightning.pytorch").setLevel(level)


@pytest.mark.parametrize("page", [page for page in WITH_CODE if page not in QUICK])
def test_all_code_of_the_page_is_python(page: str) -> None:
    """What runs in the slow suite only is at least no nonsense in the fast one."""
    compile(code(page), page, "exec", dont_inherit=True)


def test_the_tables_above_name_pages_with_code() -> None:
    assert {*QUICK, *NEEDS, *LOUD, *ELSEWHERE} <= set(WITH_CODE)
    for page, test in ELSEWHERE.items():
        assert page in (Path(__file__).parent / test).read_text()


def anchors(path: Path) -> set[str]:
    """Headings as GitHub and the site name them."""
    text = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", title) for title in titles)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", pages())
def test_links_and_named_files_exist(page: str) -> None:
    path = ROOT / page
    text = path.read_text("utf-8")
    for link in LINKS.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        target, _, anchor = link.partition("#")
        if target.startswith("https://"):
            continue
        file = path.parent / target if target else path
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link
    for target in re.findall(r"`((?:docs|examples|benchmarks|tests)/[\w/.-]+\.\w+)`", text):
        assert (ROOT / target).exists(), target


def test_the_reference_has_every_public_name_and_no_other() -> None:
    import secateur

    named = re.findall(
        r"^::: ([\w.]+)$", "\n".join(p.read_text() for p in (ROOT / "docs/reference/api").glob("*.md")), re.M
    )
    assert len(named) == len(set(named))
    for name in named:
        home, _, attribute = name.rpartition(".")
        found = getattr(importlib.import_module(home), attribute, None) or importlib.import_module(name)
        assert found.__doc__, name
    public = {f"secateur.{name}" for name in secateur.__all__} - {"secateur.__version__"}
    assert public - set(named) <= {"secateur.SecateurError"}  # which stands with the other errors
    assert "secateur.errors" in named


def test_the_navigation_names_only_pages_that_exist() -> None:
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    named = re.findall(r"[\w/.-]+\.md", text[text.index("\nnav:") :])
    assert len(named) > 30
    assert all((ROOT / "docs" / page).exists() for page in named)
    assert YAML(typ="safe").load(text)["strict"] is True
