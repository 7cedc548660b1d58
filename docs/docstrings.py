"""Docstrings as the site reads them: the heading "Example:" of this project is griffe's section of examples."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object


class Examples(Extension):
    """Show doctests as code; as plain text their brackets would be taken for links."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Rename the section before it is parsed."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
