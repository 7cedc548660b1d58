"""Which way the code went: every jump that the user's code decides while a model runs, whatever decides it.

A plain number, a random draw, a text or an iterator tells nobody what is done with it. That a decision was made, and
which way, the interpreter tells: by `sys.monitoring` from Python 3.12 on, by tracing the user's own frames before.
"""

from __future__ import annotations

import dis
import gc
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import CodeType, FrameType
from typing import Any

from secateur.model.place import is_engines, is_users
from secateur.structure.remembered import is_remembered

EXTENDED = dis.opmap["EXTENDED_ARG"]
HANDLER = "PUSH_EXC_INFO"  # stands where an exception is handled
# What decides: conditional jumps, the next step of a loop, and that an exception is handled.
DECIDES = frozenset(
    number
    for name, number in dis.opmap.items()
    if number < 256 and ("_IF_" in name or name in ("FOR_ITER", HANDLER)) and "INSTRUMENTED" not in name
)
STANDARD = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib")})
PACKAGES = ("site-packages", "dist-packages")
IMPORTS = "<frozen importlib._bootstrap>"  # the file whose code loads modules
# Libraries that hold no models: what they decide by are the forms of what they are given.
HELPERS = ("numpy", "scipy", "pandas", "packaging", "typing_extensions", "einops", "tokenizers", "huggingface_hub")
Trace = Callable[[FrameType, str, Any], Any]


@cache
def is_watched(filename: str) -> bool:
    """Whether decisions in a file are those of a model: not torch's, this package's, Python's own or a helper's."""
    if filename.startswith("<"):
        return not filename.startswith(("<frozen", "<__array_function__", "<attrs", "<eval_with_key>"))
    inside = next((filename.rpartition(f"/{name}/")[2] for name in PACKAGES if f"/{name}/" in filename), "")
    if inside:
        return inside.split("/")[0].removesuffix(".py") not in HELPERS and is_users(filename)
    return is_users(filename) and not filename.startswith(STANDARD)


def is_installed(filename: str) -> bool:
    """Whether a file belongs to a library."""
    return any(f"/{name}/" in filename for name in PACKAGES)


class Ran:
    """A piece of code that ran.

    Args:
        code: what ran; held, so that its id stays its own.
        module: qualified name of the module that ran it first.
        space: its global variables.
        points: where it decides: place of the event -> place of the instruction.
        edges: (place of an instruction that decides, place where the code went on).
    """

    __slots__ = ("code", "edges", "module", "points", "space")

    def __init__(self, code: CodeType, module: str, space: dict[str, Any]) -> None:
        self.code, self.module, self.space = code, module, space
        self.points = _points(code)
        self.edges: set[tuple[int, int]] = set()


def decides(code: CodeType) -> bool:
    """Whether a piece of code that may be a model's decides anything."""
    return is_watched(code.co_filename) and bool(_points(code))


def _points(code: CodeType) -> dict[int, int]:
    """An instruction with a long argument is announced by the prefix in front of it."""
    points: dict[int, int] = {}
    raw, first = code.co_code, -1
    for place in range(0, len(raw), 2):
        op = raw[place]
        if op == EXTENDED:
            first = place if first < 0 else first
            continue
        if op in DECIDES:
            points[place] = place
            if first >= 0:
                points[first] = place
        first = -1
    return points


class Ways:
    """What the runs of one capture have shown of the ways through the user's code.

    Args:
        ran: id of a piece of code -> what was seen of it, in the order in which they first ran; None = not watched.
        called: names of torch's functions that were called, without the underscores around them.
        modules: qualified names of the modules that ran.
    """

    def __init__(self) -> None:
        self.called: set[str] = set()
        self.modules: set[str] = set()
        self.ran: dict[int, Ran | None] = {}
        self._others: dict[int, CodeType] = {}  # keeps the ids of what is not watched
        self._module: Callable[[], str] = str
        self._collecting = 0  # the thread in which garbage is collected now
        # Not to watch code that is known to be none of the user's, where watching costs something.
        self.go_on = self.pause = _nothing

    @property
    def pieces(self) -> list[Ran]:
        """Pieces of code that ran and are watched."""
        return [ran for ran in self.ran.values() if ran is not None]

    @contextmanager
    def watching(self, module: Callable[[], str]) -> Iterator[None]:
        """Watch while the body runs; other tools that watch are back in their places afterwards.

        Args:
            module: says the qualified name of the module that runs now.
        """
        self._module = module
        with self._collections(), _monitored(self) if hasattr(sys, "monitoring") else _traced(self):
            yield

    def entered(self, code: CodeType, frame: FrameType | None) -> Ran | None:
        """A piece of code begins to run; None where it is not watched, or not this time."""
        key = id(code)
        if key not in self.ran:
            if not is_watched(code.co_filename):
                self.ran[key], self._others[key] = None, code
            elif frame is None or _is_imported(frame) or is_remembered(frame, _is_capture):
                return None  # once in a process: the next plan would not see it
            else:
                self.ran[key] = Ran(code, self._module(), frame.f_globals)
        return self.ran[key]

    def is_aside(self) -> bool:
        """Whether what runs was called by the interpreter, at a moment that no code has chosen."""
        return self._collecting == threading.get_ident()

    @contextmanager
    def _collections(self) -> Iterator[None]:
        """Know when garbage is collected: tools and finalisers have code of theirs run then."""

        def begins(phase: str, info: object) -> None:
            if phase == "start":
                self._collecting = threading.get_ident()

        def ends(phase: str, info: object) -> None:
            if phase == "stop":
                self._collecting = 0

        gc.callbacks.insert(0, begins)  # around those of others
        gc.callbacks.append(ends)
        try:
            yield
        finally:
            gc.callbacks.remove(begins)
            gc.callbacks.remove(ends)


def _nothing() -> None:
    pass


@cache
def _is_capture(filename: str) -> bool:
    return is_engines(filename, ("capture.py",))


def _is_imported(frame: FrameType | None) -> bool:
    """Whether a module is being loaded, to which this code belongs or which calls it."""
    while frame is not None and not _is_capture(frame.f_code.co_filename):
        if frame.f_code.co_filename == IMPORTS:
            return True
        frame = frame.f_back
    return False


# -- Python 3.11: tracing --------------------------------------------------------------------------------------------


@contextmanager
def _traced(ways: Ways) -> Iterator[None]:
    ran = ways.ran

    def enter(frame: FrameType, event: str, arg: object) -> Trace | None:
        try:
            piece = ran[id(frame.f_code)]
        except KeyError:
            piece = None if ways.is_aside() else ways.entered(frame.f_code, frame)
        if piece is None or len(piece.edges) >= 2 * len(piece.points) or ways.is_aside():
            return None  # not the user's, or everything was seen both ways
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return _follower(piece)

    before, of_threads = sys.gettrace(), threading.gettrace()
    ways.go_on, ways.pause = lambda: sys.settrace(enter), lambda: sys.settrace(before)
    threading.settrace(enter)
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)
        threading.settrace(of_threads)
        ways.go_on = ways.pause = _nothing


def _follower(piece: Ran) -> Trace:
    """Follows one frame: writes down where it went on after each instruction that decides."""
    last, points, edges = -1, piece.points.get, piece.edges

    def follow(frame: FrameType, event: str, arg: object) -> Trace:
        nonlocal last
        if event == "opcode":
            place = frame.f_lasti
            if last >= 0:
                edges.add((last, place))
            last = points(place, -1)
        return follow

    return follow


# -- Python 3.12 and later: monitoring -------------------------------------------------------------------------------

TOOLS = (3, 4, 2, 5, 1, 0)  # numbers that a tool may have; those without a custom first


@contextmanager
def _monitored(ways: Ways) -> Iterator[None]:
    """Watch by `sys.monitoring`: code that begins to run, its branches, and where exceptions are handled."""
    monitoring: Any = sys.monitoring  # type: ignore[attr-defined,unused-ignore]
    tool = next((number for number in TOOLS if monitoring.get_tool(number) is None), None)
    if tool is None:
        with _traced(ways):
            yield
        return
    events, off = monitoring.events, monitoring.DISABLE
    sides = [getattr(events, name) for name in ("BRANCH_LEFT", "BRANCH_RIGHT") if hasattr(events, name)]
    branches = sides or [events.BRANCH]
    local = sum(branches)
    # Threads that ran before are somebody else's: what they do says nothing of this run.
    foreign = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
    told: list[CodeType] = []

    def start(code: CodeType, place: int) -> object:
        if threading.get_ident() in foreign or ways.is_aside():
            return None
        if id(code) not in ways.ran or id(code) not in armed:
            piece = ways.entered(code, sys._getframe(1))
            if id(code) not in ways.ran:
                return None
            armed.add(id(code))
            if piece is not None and piece.points:
                told.append(code)
                monitoring.set_local_events(tool, code, local)
        return off

    def branch(code: CodeType, place: int, to: int) -> object:
        if threading.get_ident() in foreign or ways.is_aside():
            return None
        piece = ways.ran.get(id(code))
        if piece is None:
            return off
        place = piece.points.get(place, place)
        before = len(piece.edges)
        piece.edges.add((place, to))
        if sides:
            return off  # each side is told by an event of its own
        new = len(piece.edges) > before
        return off if new and sum(one == place for one, _ in piece.edges) > 1 else None

    def handled(code: CodeType, place: int, error: BaseException) -> None:
        piece = ways.ran.get(id(code))
        if piece is not None and threading.get_ident() not in foreign and not ways.is_aside():
            piece.edges.add((place, place))

    armed: set[int] = set()
    calls: dict[int, Callable[..., object]] = {
        events.PY_START: start,
        events.PY_RESUME: start,
        events.EXCEPTION_HANDLED: handled,
    }
    calls.update(dict.fromkeys(branches, branch))
    with _calling(monitoring, tool, calls, events.PY_START | events.PY_RESUME | events.EXCEPTION_HANDLED, told):
        yield


@contextmanager
def _calling(
    monitoring: Any, tool: int, calls: dict[int, Callable[..., object]], everywhere: int, told: list[CodeType]
) -> Iterator[None]:
    """Have functions called at events while the body runs; the number of the tool is free again afterwards.

    Args:
        monitoring: `sys.monitoring`.
        tool: number.
        calls: event -> what it calls.
        everywhere: events of all code, as one set.
        told: code with events of its own by the end of the body, which end as well.
    """
    monitoring.use_tool_id(tool, "secateur")
    try:
        for event, function in calls.items():
            monitoring.register_callback(tool, event, function)
        monitoring.set_events(tool, everywhere)
        monitoring.restart_events()
        yield
    finally:
        monitoring.set_events(tool, 0)
        for code in told:
            monitoring.set_local_events(tool, code, 0)
        for event in calls:
            monitoring.register_callback(tool, event, None)
        monitoring.free_tool_id(tool)
