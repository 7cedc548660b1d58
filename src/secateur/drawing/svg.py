"""Elements of SVG and HTML as text. Whatever is put into one is escaped, so that a layer's name is never markup."""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup, escape

from secateur.errors import visible

Attribute = str | float | None


def element(tag: str, *inside: str | Markup, **attributes: Attribute) -> Markup:
    """One element with what stands in it.

    Args:
        tag: its name, a word of this package.
        inside: texts, which are escaped, and elements, which stay as they are.
        attributes: by name, with ``_`` for ``-`` and a last ``_`` for Python's own words; None leaves one out.

    Example:
        >>> element("text", "a < b", x="50%", text_anchor="middle", class_="tick")
        Markup('<text x="50%" text-anchor="middle" class="tick">a &lt; b</text>')
    """
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{_safe(_written(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    body = "".join(one if isinstance(one, Markup) else _safe(one) for one in inside)
    # Every part of the text is a word of this package or was escaped above.
    return Markup(f"<{tag}{given}>{body}</{tag}>")  # noqa: S704


def joined(parts: Iterable[Markup]) -> Markup:
    """Elements one after the other."""
    return Markup("").join(parts)


def share(value: float) -> str:
    """A place or a length as a share of the whole width: so a drawing fits a telephone and its letters stay whole.

    Example:
        >>> share(0.25)
        '25%'
    """
    return f"{100 * value:.4g}%"


def stretched(height: float, *paths: Markup) -> Markup:
    """Paths in a square of 1000 by 1000 that is drawn over the whole width: a path knows no percent.

    Args:
        height: in pixels.
        paths: with ``vector-effect`` in the style sheet, so that lines keep their thickness.
    """
    return element(
        "svg", *paths, viewBox="0 0 1000 1000", preserveAspectRatio="none", width="100%", height=height, class_="paths"
    )


def _written(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"


def _safe(text: str) -> str:
    return str(escape(visible(text)))
