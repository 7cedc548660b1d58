"""``py:package.module:factory`` and ``my/net.py:factory``: words that run the user's code, on the command line only."""

from __future__ import annotations

import ast
import importlib
import sys
import traceback
import zlib
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from secateur.errors import InputError, RecipeError
from secateur.registry import suggestion

PYTHON = ".py"
MOST_NAMES = 20  # of a module that are listed in an error


def call_factory(target: str) -> object:
    """Import ``package.module`` (from the current folder too) and call ``factory()``.

    The current folder joins the front of ``sys.path`` and stays there, as for ``python -m``, since the module
    may import more later.

    Args:
        target: ``package.module:factory`` or ``path/to/file.py:factory``; dots in the factory are attributes. A file
            finds its neighbours: its folder joins ``sys.path`` too.

    Returns:
        What the factory returns.

    Raises:
        RecipeError: malformed, or no such module or factory.
        InputError: the user's code raised; the message has its error and file:line.
    """
    factory, (module_name, _, attribute) = named_object(target), target.rpartition(":")
    if not callable(factory):
        raise RecipeError(f"{attribute!r} of {module_name} is a {type(factory).__name__}, not a function")
    try:
        return factory()
    except Exception as error:
        raise InputError(f"{attribute}() of {module_name} failed", why=_text(error)) from error


def named_object(target: str) -> object:
    """Import what a word names, as `call_factory` does, without calling it.

    Raises:
        RecipeError: malformed, or no such module or name.
    """
    module_name, colon, attribute = target.rpartition(":")
    if target.endswith(PYTHON) or not (module_name and colon and attribute):
        raise RecipeError(f"py:{target} is malformed", hint=which_factory(target) or "write py:package.module:factory")
    _join_path(Path.cwd())
    return _find(module_name, attribute)


def is_python(word: str) -> bool:
    """Whether a word is a file of Python code, with a factory behind it or not.

    Example:
        >>> is_python("my/net.py:build"), is_python("net.py"), is_python("npz:net.py.npz")
        (True, True, False)
    """
    return word.endswith(PYTHON) or f"{PYTHON}:" in word


def which_factory(target: str) -> str:
    """The hint for a Python file without a factory: what the file defines, without running it."""
    path = Path(target)
    if not target.endswith(PYTHON):
        module = target.split(":")[0].replace(".", "/") + PYTHON
        return f"write py:{target}:factory" if Path(module).is_file() and ":" not in target else ""
    if not path.is_file():
        return f"there is no file {target}; write FILE{PYTHON}:factory"
    try:
        tree = ast.parse(path.read_text("utf-8"))
    except (SyntaxError, ValueError, OSError):
        return f"write {target}:factory"
    kinds = (ast.FunctionDef, ast.ClassDef)
    names = [node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    meant = " or ".join(f"{target}:{name}" for name in names[:4])
    return f"did you mean {meant}?" if names else f"write {target}:factory, a function that it defines"


def _join_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _import(name: str) -> object:
    """A module by its name, or the file that the name is."""
    if not name.endswith(PYTHON):
        return importlib.import_module(name)
    path = Path(name).expanduser().resolve()
    if not path.is_file():
        raise RecipeError(f"there is no file {name}", hint=f"looked in {Path.cwd()}")
    _join_path(path.parent)
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    # A file may be called like a module that is imported already, and must not take its place.
    title = path.stem if known is None and path.stem.isidentifier() else f"{path.stem}_{zlib.crc32(bytes(path)):08x}"
    if title in sys.modules:
        return sys.modules[title]
    spec = spec_from_file_location(title, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[title] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[title]
        raise
    return module


def _find(module_name: str, attribute: str) -> object:
    # A module that was written a moment ago (by a test, by a notebook) is not seen without it.
    importlib.invalidate_caches()
    try:
        found: object = _import(module_name)
    except RecipeError:
        raise
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
            names = [name for name in dir(found) if not name.startswith("_")]
            near = suggestion(attribute, names, otherwise="")
            more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
            listed = f"it has: {', '.join(names[:MOST_NAMES])}{more}"
            raise RecipeError(f"{module_name} has no {attribute!r}", hint=f"{near} {listed}".strip())
        found = getattr(found, part)
    return found


def _text(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {error}{where}"
