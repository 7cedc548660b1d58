"""What all pages share: templates, the style, one small script, and a policy that lets nothing else run."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from secateur.errors import visible

_HERE = Path(__file__).parent


def environment_of_pages(folder: Path, filters: Mapping[str, Callable[..., str]] | None = None) -> Environment:
    """Where templates come from, and what they may do to a text.

    Args:
        folder: of the templates; they are read from the package, never looked up by a name from outside. Pages extend
            ``frame.html``, which has the policy, the style and the script of `page_parts`.
        filters: by name, besides ``clean``, which makes control characters visible.
    """
    environment = Environment(
        loader=FileSystemLoader([folder, _HERE]),
        autoescape=True,
        # A misspelt name in a template would otherwise render as nothing, which in a report reads as "none".
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update({"clean": visible, **(filters or {})})
    return environment


def page_parts() -> dict[str, Markup | str]:
    """``style``, ``script`` and ``policy`` of a page, for its template.

    The policy forbids the network, and every script but the one of this package, which it names by its hash: a name
    that slipped through the escaping could still not run.
    """
    script = _read("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {
        # Both are files of this package, and the only texts of a page that are not escaped.
        "style": Markup(_read("page.css")),  # noqa: S704
        "script": Markup(script),  # noqa: S704
        "policy": f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'",
    }


@cache
def _read(name: str) -> str:
    # Browsers hash a script after they made all line ends "\n", so that is how it is written down.
    return (_HERE / name).read_text(encoding="utf-8").replace("\r\n", "\n")
