"""The one exception tree of secateur. Every error says what, where, why and what to do next.

SecateurError (exit 1)
    RecipeError        2  a recipe, key, option or argument is wrong
    InputError         3  data, weights or a file is refused
        NonFiniteError     NaN or Inf in a tensor, activation, gradient or loss
        FileRefusedError   unsafe, corrupt or truncated file
        PlanMismatchError  a plan that belongs to another model
    UnsupportedError   4  the model cannot be captured or cut
        ForwardError       the user's forward fails on the example
        CertificateError   the cut model does not equal its replayed plan
    TargetError        5  the target cannot be reached
    ResourceError      6  memory or disk ran out
        ProcessError       another process of the same run ended
"""

from __future__ import annotations

import unicodedata
from typing import ClassVar

# Categories of Unicode that are not seen: control, format (among them the direction marks), surrogates, unassigned,
# private, and the two separators that some viewers break lines at.
_UNSEEN = {"Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp"}


def visible(text: str, *, lines: bool = False) -> str:
    r"""Make control, direction and unassigned characters visible as escapes.

    Names come from files that others wrote. A raw ESC in one of them would drive the reader's terminal, a direction
    override would reorder the sentence around it.

    Args:
        text: any string.
        lines: keep line feeds (for a sentence of several lines), else they are escaped too.

    Returns:
        Printable text without control characters.

    Example:
        >>> visible("conv\x1b[31m1")
        'conv\\x1b[31m1'
    """
    if text.isascii() and text.replace("\n", "").isprintable() and (lines or "\n" not in text):
        return text
    return "".join(
        char.encode("unicode_escape").decode("ascii")
        if unicodedata.category(char) in _UNSEEN and not (lines and char == "\n")
        else char
        for char in text
    )


class SecateurError(Exception):
    """Base of every error that secateur raises on purpose.

    Args:
        what: one sentence: what failed, and where.
        why: the cause, if the sentence does not already hold it.
        hint: what the user can do next.
    """

    code: ClassVar[str] = "SEC000"
    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, why: str = "", hint: str = "") -> None:
        # Here and not where messages are made: no name of a tensor, key or file can slip past.
        self.what, self.why, self.hint = (visible(str(text), lines=True) for text in (what, why, hint))
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.what}"
        if self.why:
            text += f"\n  why: {self.why}"
        if self.hint:
            text += f"\n  do:  {self.hint}"
        return text


class RecipeError(SecateurError):
    """A recipe, key, option or argument is wrong."""

    code, exit_code = "SEC200", 2


class InputError(SecateurError):
    """Data, weights or a file is refused."""

    code, exit_code = "SEC300", 3


class NonFiniteError(InputError):
    """NaN or Inf in a tensor, activation, gradient or loss."""

    code = "SEC310"


class FileRefusedError(InputError):
    """A file that is unsafe (pickle), corrupt, truncated, or in the way."""

    code = "SEC320"


class PlanMismatchError(InputError):
    """A plan or weight file that belongs to another model."""

    code = "SEC330"


class UnsupportedError(SecateurError):
    """The model cannot be captured, or the wanted cut cannot be made."""

    code, exit_code = "SEC400", 4


class ForwardError(UnsupportedError):
    """The user's forward fails on the example."""

    code = "SEC410"


class CertificateError(UnsupportedError):
    """The cut model does not give the outputs of its replayed plan."""

    code = "SEC420"


class TargetError(SecateurError):
    """The target cannot be reached; the message names the reachable range."""

    code, exit_code = "SEC500", 5


class ResourceError(SecateurError):
    """Memory or disk ran out."""

    code, exit_code = "SEC600", 6


class ProcessError(ResourceError):
    """Another process of the same run failed, ended or was killed."""

    code = "SEC610"


EXIT_OK, EXIT_BUG, EXIT_DEGRADED, EXIT_INTERRUPTED = 0, 1, 7, 130
