"""What the site shows besides docs/: pages of the root, benchmarks and examples, each link led to where its page went.

mkdocs calls these functions by their names. Nothing is written into docs/: such pages live for the length of one build.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
PAGES = {
    "CONTRIBUTING.md": "project/contributing.md",
    "CODE_OF_CONDUCT.md": "project/code-of-conduct.md",
    "SECURITY.md": "project/security.md",
    "CHANGELOG.md": "project/changelog.md",
    "benchmarks/README.md": "benchmarks/figures.md",
    "examples/README.md": "examples/README.md",
}


def code_page(path: Path) -> str:
    """A file of Python: its docstring as text, the rest as code."""
    _, said, code = path.read_text("utf-8").split('"""', 2)
    first, _, rest = said.strip().partition("\n")
    # Usage lines of a docstring stand in columns, which only a code block keeps.
    usage = f"\n```\n{rest.strip()}\n```\n" if rest.strip() else ""
    return f"# {path.name}\n\n{first}\n{usage}\n`examples/{path.name}`:\n\n```python\n{code.strip()}\n```\n"


def notebook_page(path: Path) -> str:
    """A notebook: its texts, its code, and what it printed."""
    parts = []
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        printed = "".join("".join(one.get("text", ())) for one in cell["outputs"])
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join([*parts, f"This page is the notebook `examples/{path.name}`."])


def made() -> dict[str, tuple[str, str]]:
    """Where a page comes from -> its place on the site, and its text."""
    found = {
        source: (to, (ROOT / source).read_text("utf-8")) for source, to in PAGES.items() if (ROOT / source).exists()
    }
    for path in sorted((ROOT / "examples").iterdir()):
        write = {".py": code_page, ".ipynb": notebook_page}.get(path.suffix)
        if write and not path.name.startswith("_"):
            found[f"examples/{path.name}"] = (f"examples/{path.stem}.md", write(path))
    return found


def relink(text: str, source: str, place: str, moved: dict[str, str]) -> str:
    """Lead each relative link of a text to where the site has its target."""

    def led(match: re.Match[str]) -> str:
        target, hash_, anchor = match[2].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        to = moved.get(file, file.removeprefix("docs/"))
        return f"{match[1]}{posixpath.relpath(to, posixpath.dirname(place) or '.')}{hash_}{anchor}{match[3]}"

    return LINK.sub(led, text)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Every page is in the navigation: what it does not name stands at the end of the section of its folder."""
    titles = {"Tutorial": "tutorials", "How to": "how-to", "Examples": "examples", "Explanation": "explanation"}
    titles |= {"Coming from": "migrate", "Reference": "reference", "Benchmarks": "benchmarks", "Project": "project"}
    own = [path.relative_to(config.docs_dir).as_posix() for path in sorted(Path(config.docs_dir).rglob("*.md"))]
    places = [*(to for to, _ in made().values()), *own]
    named = set(re.findall(r"[\w/.-]+\.md", repr(config.nav)))
    for section in config.nav or []:
        ((title, pages),) = section.items()
        if isinstance(pages, list):
            folder = titles[title]
            rest = (one for one in places if one.startswith(f"{folder}/") and one not in named)
            pages.extend(sorted(rest, key=lambda one: (not one.endswith("README.md"), one)))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that do not lie in docs/."""
    found = made()
    moved = {source: to for source, (to, _) in found.items()}
    for source, (to, text) in found.items():
        files.append(File.generated(config, to, content=relink(text, source, to, moved)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Pages of docs/ may point out of it."""
    place = page.file.src_uri
    moved = {source: to for source, (to, _) in made().items()}
    return relink(markdown, f"docs/{place}", place, moved) if page.file.generated_by is None else markdown


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Code that scrolls can be reached by keyboard, and the search tells its name to screen readers."""
    output = output.replace("<pre>", '<pre tabindex="0">')
    return output.replace(
        'data-md-component="search" role="dialog"', 'data-md-component="search" role="dialog" aria-label="Search"'
    )
