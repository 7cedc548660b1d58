"""``py:package.module:factory``: the one word that runs the user's code, on the command line only."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from secateur.errors import InputError, RecipeError


def call_factory(target: str) -> object:
    """Import ``package.module`` (from the current folder too) and call ``factory()``.

    The current folder joins the front of ``sys.path`` and stays there, as for ``python -m``, since the module
    may import more later.

    Args:
        target: ``package.module:factory``; dots in the factory are attributes.

    Returns:
        What the factory returns.

    Raises:
        RecipeError: malformed, or no such module or factory.
        InputError: the user's code raised; the message has its error and file:line.
    """
    module_name, colon, attribute = target.partition(":")
    if not (module_name and colon and attribute):
        raise RecipeError(f"py:{target} is malformed", hint="write py:package.module:factory")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    factory = _find(module_name, attribute)
    try:
        return factory()
    except Exception as error:
        raise InputError(f"{attribute}() of {module_name} failed", why=_text(error)) from error


def _find(module_name: str, attribute: str) -> Callable[[], object]:
    # A module that was written a moment ago (by a test, by a notebook) is not seen without it.
    importlib.invalidate_caches()
    try:
        found: object = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # Only where this very module is missing: an import inside it that fails is the user's to mend.
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise RecipeError(
                f"there is no module {module_name!r}", hint=f"looked on sys.path and in {Path.cwd()}"
            ) from error
        raise InputError(f"importing {module_name} failed", why=_text(error)) from error
    except Exception as error:
        raise InputError(f"importing {module_name} failed", why=_text(error)) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = ", ".join(name for name in dir(found) if not name.startswith("_"))
            raise RecipeError(f"{module_name} has no {attribute!r}", hint=f"it has: {names}")
        found = getattr(found, part)
    if not callable(found):
        raise RecipeError(f"{attribute!r} of {module_name} is a {type(found).__name__}, not a function")
    return found


def _text(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {error}{where}"
