"""Numbers and untrusted names as text that is safe to show."""

from __future__ import annotations

import math

from secateur.errors import visible
from secateur.shown import shortened


def clean(text: str, *, limit: int = 0, lines: bool = False) -> str:
    r"""Make control, direction and unassigned characters visible as escapes.

    Layer names come from files that others wrote. A raw ESC in one of them would drive the reader's terminal,
    a direction override would reorder the sentence around it.

    Args:
        text: any string.
        limit: the longest result in characters; the middle is left out. 0 = no limit.
        lines: keep line feeds (for a command or a recipe), else they are escaped too; not with a limit.

    Returns:
        Printable text without control characters.

    Example:
        >>> clean("conv\x1b[31m1")
        'conv\\x1b[31m1'
        >>> clean("encoder.layer.0.attention", limit=11)
        'enc…tention'
    """
    return shortened(text, limit) if limit else visible(text, lines=lines)


def writable(text: str, encoding: str) -> str:
    r"""Escape what a stream's encoding cannot hold, so that printing never fails.

    Args:
        text: any string.
        encoding: of the stream, for example "utf-8" or "ascii".

    Returns:
        The text with unknown characters as backslash escapes.

    Example:
        >>> writable("Größe", "ascii")
        'Gr\\xf6\\xdfe'
    """
    return text.encode(encoding, "backslashreplace").decode(encoding)


def significant(value: float, digits: int = 3) -> str:
    """Write a number with a fixed count of significant digits and without an exponent where it is readable.

    Args:
        value: any finite number.
        digits: significant digits.

    Returns:
        For example ``"1.90"``, ``"1,230"`` or ``"4.20e-07"``.

    Example:
        >>> significant(1.9), significant(1234.6), significant(4.2e-7)
        ('1.90', '1,235', '4.20e-07')
    """
    if value == 0:
        return "0"
    # Round first: 0.9996 with three digits is 1.00, one place shorter than its exponent says.
    exponent = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    if not -4 < exponent < 15:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def count(value: int) -> str:
    """Write a count with a decimal suffix from a hundred thousand on.

    Args:
        value: a count.

    Returns:
        For example ``"9,408"`` or ``"11.7 M"``.

    Example:
        >>> count(9408), count(11_689_512)
        ('9,408', '11.7 M')
    """
    return _scaled(float(value), (" k", " M", " G", " T", " P")) if abs(value) >= 100_000 else f"{value:,}"


def size(value: int) -> str:
    """Write bytes in decimal units (1 MB = 1,000,000 bytes).

    Args:
        value: bytes.

    Returns:
        For example ``"46.8 MB"``.

    Example:
        >>> size(512), size(46_758_048)
        ('512 B', '46.8 MB')
    """
    return _scaled(float(value), (" kB", " MB", " GB", " TB", " PB")) if abs(value) >= 1000 else f"{value} B"


def percent(fraction: float, decimals: int = 1) -> str:
    """Write a fraction in [0, 1] as a percentage; a share that is not zero never reads as zero.

    Args:
        fraction: 0.5 = half.
        decimals: digits after the point.

    Returns:
        For example ``"50.0 %"``, or ``"0.0032 %"`` where one decimal would hide it.

    Example:
        >>> percent(0.5), percent(0.000032), percent(0.9999)
        ('50.0 %', '0.0032 %', '99.99 %')
    """
    value = 100 * fraction
    step = 10.0**-decimals / 2
    # A share that is not nothing, or not everything, must not be rounded into it: that is what is looked at.
    if 0 < abs(value) < step:
        return f"{significant(value, 2)} %"
    while value < 100 <= value + step and decimals < 6:
        decimals, step = decimals + 1, step / 10
    return f"{value:.{decimals}f} %"


def seconds(value: float) -> str:
    """Write a duration.

    Args:
        value: seconds.

    Returns:
        For example ``"0.42 s"``, ``"3 min 05 s"`` or ``"2 h 07 min"``.

    Example:
        >>> seconds(0.42), seconds(185), seconds(7620)
        ('0.42 s', '3 min 05 s', '2 h 07 min')
    """
    if value < 60:
        return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _scaled(value: float, suffixes: tuple[str, ...]) -> str:
    for suffix in suffixes:
        value /= 1000
        # 999.5 and more would be written with three digits as 1,000.
        if abs(value) < 999.5 or suffix == suffixes[-1]:
            return f"{significant(value)}{suffix}"
    return ""
