"""Errors as people and programs read them: what, why, do, code."""

from __future__ import annotations

import json
import re
import sys
import traceback
from collections.abc import Sequence
from itertools import pairwise

from rich.console import Console
from rich.text import Text

from secateur.cli.console import err, tell
from secateur.errors import EXIT_BUG, EXIT_INTERRUPTED, RecipeError, ResourceError, SecateurError
from secateur.words import about_key

BUG = "SEC001"


def told(error: Exception, args: Sequence[str], *, as_json: bool, verbose: bool) -> int:
    """Tell the user about an error, on standard error.

    Args:
        error: what was raised.
        args: the arguments of the call, for the hint where usage is wrong.
        as_json: as one JSON object instead of lines.
        verbose: with the traceback.

    Returns:
        the exit code.
    """
    known = _known(error, args)
    if verbose:
        sys.stderr.write("".join(traceback.format_exception(error)))
    if known is None:
        name = type(error).__name__
        hint = "please report it with the lines above" if verbose else "run it again with -v, and report what it prints"
        show(f"unexpected {name}: {error}", hint=hint, code=BUG, exit_code=EXIT_BUG, as_json=as_json)
        return EXIT_BUG
    show(known.what, why=known.why, hint=known.hint, code=known.code, exit_code=known.exit_code, as_json=as_json)
    return known.exit_code


def unfinished_of(args: Sequence[str]) -> str:
    """The output folder of an interrupted `prune` or `resume` that left something to go on from, or nothing."""
    from pathlib import Path

    if not args or args[0] not in ("prune", "resume"):
        return ""
    named = [after for before, after in pairwise(args) if before == "--out"]
    named += [word.removeprefix("--out=") for word in args if word.startswith("--out=")]
    named += [word for word in args[1:] if args[0] == "resume" and not word.startswith("-")]
    found = [name for name in named if Path(f"{name.rstrip('/')}.unfinished").is_dir()]
    return found[0] if found else ""


def interrupted(console: Console, *, as_json: bool, unfinished: str = "") -> None:
    """Say that Ctrl-C was heard, and what that means."""
    import shlex

    show(
        "interrupted",
        why="no output was written: an output folder appears whole, at the end, or not at all",
        hint=f"secateur resume {shlex.quote(unfinished)}" if unfinished else "run the same command again",
        code="SEC130",
        exit_code=EXIT_INTERRUPTED,
        as_json=as_json,
        console=console,
    )


def show(
    what: str,
    *,
    why: str = "",
    hint: str = "",
    code: str,
    exit_code: int,
    as_json: bool,
    console: Console | None = None,
) -> None:
    """Print one error: as lines, or as a JSON object."""
    from secateur.report.safe_text import clean, writable

    if as_json:
        fields = {"what": what, "why": why, "do": hint, "code": code, "exit_code": exit_code}
        sys.stderr.write(json.dumps({"error": fields}) + "\n")
        return
    console = console or err()
    lines = [("error", what), ("  why", why), ("  do", hint), ("  code", f"{code}, exit {exit_code}")]
    for label, text in lines:
        if text:
            words = writable(clean(text, lines=True), console.encoding).replace("\n", "\n    ")
            style = "bold red" if label == "error" else "bold"
            tell(console, Text.assemble((f"{label}: ", style), words))


def _known(error: Exception, args: Sequence[str]) -> SecateurError | None:
    if isinstance(error, SecateurError):
        return error
    # Usage errors of typer carry their message so; their class is not the same in all versions of it.
    message = getattr(error, "format_message", None)
    if callable(message):
        words = [word for word in args[:2] if not word.startswith("-")][:1]
        text = (
            re.sub(r"[.?]+$", lambda end: end[0][0] if "?" in end[0] else "", str(message()).strip()) or "wrong usage"
        )
        text = text.replace("Value error, ", "")  # pydantic's own words, which name nothing of the user's
        meant = _right_option(text)
        see = f"See: {' '.join(['secateur', *(words if _is_command(text) else []), '--help'])}"
        return RecipeError(text if text.endswith("?") else text + ".", hint=f"{meant}. {see}" if meant else see)
    if isinstance(error, MemoryError) or _allocation_failed(error):
        return ResourceError(
            "memory ran out", why=str(error)[:400], hint="use smaller batches or a machine with more memory"
        )
    if isinstance(error, OSError):
        from pathlib import Path

        from secateur.files.disk import disk_error

        refused = disk_error(error, Path(error.filename or "the output"))
        return refused if isinstance(refused, ResourceError) else None
    return None


def _right_option(text: str) -> str:
    """What to write instead of an option of other tools; "" where nothing is known of it."""
    found = re.search(r"No such option:? '?(--[\w-]+)", text)
    return about_key(found[1]) if found and "Did you mean" not in text else ""


def _is_command(text: str) -> bool:
    """Whether the first word of the call is a command: its help does not exist where it is not."""
    return not text.startswith("No such command")


def _allocation_failed(error: Exception) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
