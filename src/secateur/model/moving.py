"""Iterators and streams that a model holds: reading from them moves them on, and no iterator can be moved back.

A run is therefore given a twin of each iterator, which stands in its place meanwhile. Streams in memory and files know
where they are, and are set back.
"""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Callable, Iterable
from operator import length_hint
from types import GeneratorType
from typing import Any, NoReturn

from secateur.errors import UnsupportedError

Put = Callable[[object], None]
HINT = "Keep a list and the number of the place in it, or make the iterator in the forward."


def is_moving(value: object) -> bool:
    """Whether a value is an iterator of Python's own, or a stream."""
    kind = type(value)
    own = kind.__module__.partition(".")[0] in sys.stdlib_module_names
    return isinstance(value, io.IOBase) or (own and hasattr(kind, "__next__"))


def undo_stream(stream: Any) -> Callable[[], None]:
    """How a stream becomes what it was; one that cannot be read again is nobody's data."""
    if isinstance(stream, (io.StringIO, io.BytesIO)) and not stream.closed:
        place, held = stream.tell(), stream.getvalue()

        def put_back() -> None:
            if not stream.closed and stream.getvalue() != held:
                stream.seek(0)
                stream.truncate()
                stream.write(held)  # type: ignore[arg-type]
            if not stream.closed:
                stream.seek(place)

        return put_back
    if stream.closed or not (stream.readable() and stream.seekable()):
        return lambda: None
    at = stream.tell()
    return lambda: None if stream.closed else stream.seek(at)


class Moving:
    """The iterators that models hold, each with what puts another object in its place."""

    def __init__(self) -> None:
        self.held: list[tuple[Put, object, str]] = []
        self._met: list[object] = []  # of which no place is known yet
        self._apart: set[int] = set()  # held by other objects than modules
        self._watched: list[tuple[GeneratorType[Any, Any, Any], object]] = []

    def met(self, value: object) -> None:
        """An iterator was found; who holds it claims it."""
        self._met.append(value)

    @property
    def waits(self) -> bool:
        """Whether an iterator was met that nobody has claimed."""
        return bool(self._met)

    def claim(
        self, entries: Iterable[tuple[Any, object]], put: Callable[[Any, object], None], *, apart: bool = False
    ) -> None:
        """Say where iterators stand that were met: `put` gives the entry of a key another value.

        Args:
            entries: keys and values of who holds them.
            put: see above.
            apart: the holder is no module, class or closure, but an object or a container.
        """
        if not self.waits:
            return
        for key, value in list(entries):
            if any(value is each for each in self._met):
                if apart:
                    self._apart.add(id(value))
                self.held.append((lambda other, key=key: put(key, other), value, str(key)))  # type: ignore[misc]
        claimed = {id(value) for _, value, _ in self.held}
        self._met = [value for value in self._met if id(value) not in claimed]

    def put_aside(self) -> None:
        """Put a twin in the place of each; who holds it is put back as anything that a run has changed.

        A generator has none. Of those that the model reaches through other objects most belong to a training loop that
        runs just now (a context that it has opened, its batches): they are let be, and looked at again in `check`.

        Raises:
            UnsupportedError: an iterator has none, or stands where nothing can be put in its place.
        """
        twins: dict[int, object] = {}
        self._watched = []
        for value in self._met:
            self._watch_or_refuse(value, "a place that cannot be changed", apart=True)
        made: list[tuple[Put, object]] = []
        for put, value, name in self.held:
            try:
                made.append((put, _twin(value, twins)))
            except (TypeError, ValueError, AttributeError, NotImplementedError):
                self._watch_or_refuse(value, repr(name), apart=id(value) in self._apart)
        for put, twin in made:
            put(twin)

    def check(self) -> None:
        """Whether the run has moved a generator that it could only be trusted with.

        Raises:
            UnsupportedError: it has.
        """
        watched, self._watched = self._watched, []
        for generator, place in watched:
            if _place(generator) != place:
                raise UnsupportedError(
                    f"A run has moved on a generator that the model reaches ({generator.__qualname__}).",
                    why="a generator can be neither copied nor moved back, so the model goes on from a later place",
                    hint=HINT,
                )

    def _watch_or_refuse(self, value: object, place: str, *, apart: bool) -> None:
        if not (apart and isinstance(value, GeneratorType)):
            _refuse(value, place)
        self._watched.append((value, _place(value)))


def _place(generator: GeneratorType[Any, Any, Any]) -> object:
    """Where a generator is, as far as can be seen from outside: its line, its variables, what it hands on from."""
    frame = generator.gi_frame
    if frame is None:
        return None
    variables = tuple(map(id, frame.f_locals.values()))
    return frame.f_lasti, variables, length_hint(generator.gi_yieldfrom, -1)


def _refuse(value: object, place: str) -> NoReturn:
    raise UnsupportedError(
        f"The model or its example holds a {type(value).__name__} ({place}), which every run moves on.",
        why="an iterator of this kind can be neither copied nor moved back, so the original would not stay as it is",
        hint=HINT,
    )


def _twin(value: Any, known: dict[int, object]) -> object:
    """Another iterator at the same place; what it goes through is shared."""
    if id(value) not in known:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # a later Python has no way for some, which are refused
            make, parts, *state = value.__reduce__()
        twin = make(*(_part(part, known) for part in parts))
        if state and state[0] is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                twin.__setstate__(_part(state[0], known))
        known[id(value)] = twin
    return known[id(value)]


def _part(part: Any, known: dict[int, object]) -> Any:
    """What an iterator is made of: those behind it are twins as well, and what it fills itself is a copy."""
    if type(part) is tuple:
        return tuple(list(each) if type(each) is list else _part(each, known) for each in part)
    return _twin(part, known) if is_moving(part) and not isinstance(part, io.IOBase) else part
