"""The site builds without a dead link, holds every page, and is found by its own search."""

from __future__ import annotations

import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from e2e_tools import ROOT

import secateur

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for library in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(library)
    out = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-f", str(ROOT / "mkdocs.yml"), "-d", str(out)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=280)
    assert done.returncode == 0, done.stderr
    return out


def test_every_page_is_there_and_in_the_navigation(site: Path) -> None:
    home = (site / "index.html").read_text("utf-8")
    pages = [path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")]
    pages += [
        Path("examples") / path.stem for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".ipynb")
    ]
    pages += [Path("project") / name for name in ("contributing", "changelog", "security", "code-of-conduct")]
    for page in pages:
        if page.name != "README":
            assert (site / page / "index.html").exists(), page
            assert f'href="{page.as_posix()}/"' in home, page


def test_the_reference_shows_every_public_name(site: Path) -> None:
    text = "".join(path.read_text("utf-8") for path in (site / "reference/api").rglob("index.html"))
    for name in set(secateur.__all__) - {"__version__", "criteria"}:
        where = "secateur.errors.SecateurError" if name == "SecateurError" else f"secateur.{name}"
        assert f'id="{where}"' in text, name


def test_no_page_asks_another_host_for_anything(site: Path) -> None:
    for path in site.rglob("*.html"):
        for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", path.read_text("utf-8")):
            assert not re.search(r"(?:src|href)=\"?(?:https?:)?//", tag), (path, tag)


def test_links_lead_to_places_that_exist(site: Path) -> None:
    """mkdocs checks what it reads; this checks what it wrote, anchors too."""
    names = {path: set(re.findall(r'\bid="([^"]+)"', path.read_text("utf-8"))) for path in site.rglob("*.html")}
    for path, text in ((path, path.read_text("utf-8")) for path in names if path.name != "404.html"):
        for link in re.findall(r'<a\b[^>]*\bhref="([^"]*)"', text):
            target, _, anchor = html.unescape(link).partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            file = (path.parent / target).resolve() if target else path
            file = file / "index.html" if file.is_dir() else file
            assert file.exists(), (path, link)
            assert not anchor or file not in names or anchor in names[file] or anchor == "__toc", (path, link)


def test_the_index_of_the_search_knows_words_and_names(site: Path) -> None:
    found = json.loads((site / "search/search_index.json").read_text("utf-8"))["docs"]
    for word, place in (
        ("GGUF", "faq/"),
        ("pruning_ratio", "migrate/torch-pruning/"),
        ("mask_model", "reference/api/"),
    ):
        assert any(place in entry["location"] and word in entry["title"] + entry["text"] for entry in found), word


class Patient(http.server.SimpleHTTPRequestHandler):
    """Serves the site; its first page loads until the search has had time: a browser prints what is there by then."""

    def do_GET(self) -> None:
        if self.path == "/wait.png":
            time.sleep(8)
        if not self.path.startswith("/?"):
            return super().do_GET()
        page = (Path(self.directory) / "index.html").read_bytes().replace(b"</body>", b'<img src="/wait.png"></body>')
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(page)
        return None

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_the_search_finds_in_a_browser(site: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser")
    handler = functools.partial(Patient, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/?q=pruning_ratio"
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
        done = subprocess.run([browser, *options, address], capture_output=True, text=True, timeout=120)
        server.shutdown()
    assert 'class="md-search-result__item"' in done.stdout
    assert "migrate/torch-pruning/" in done.stdout[done.stdout.index("md-search-result__list") :]
