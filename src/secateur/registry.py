"""Names of things with options, and the one way to say that a word is not known.

Criteria, granularities and allocations are chosen by name, from a recipe or from Python. An unknown name, option or
word is refused in one spelling, with the nearest known words as hint.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

from secateur.errors import RecipeError

T = TypeVar("T")
A = TypeVar("A")
SHOWN = 12  # known words that a hint lists; more would hide the message that they belong to


class Registry(Generic[T]):
    """Things known by a name.

    Args:
        kind: what one of them is, for messages: "criterion".
        plural: what several are: "criteria".

    Example:
        >>> animals = Registry[type]("animal", "animals")
        >>> animals.register("int")(int)
        <class 'int'>
        >>> animals.names(), animals.find("int")
        (['int'], <class 'int'>)
    """

    def __init__(self, kind: str, plural: str) -> None:
        self.kind, self.plural = kind, plural
        self._things: dict[str, T] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._things

    def __iter__(self) -> Iterator[str]:
        return iter(self._things)

    def register(self, name: str) -> Callable[[A], A]:
        """Decorator: make a class or function known under a name.

        Raises:
            TypeError: another one has this name.
        """

        def add(thing: A) -> A:
            # By qualified name, not by identity: a module that is imported anew (a notebook cell, a reload) brings
            # the same thing again as another object.
            if name in self._things and _qualname(self._things[name]) != _qualname(thing):
                raise TypeError(f"two {self.plural} are called {name!r}")
            self._things[name] = thing  # type: ignore[assignment]
            return thing

        return add

    def remove(self, name: str) -> None:
        """Forget a name; one that is not known is no error."""
        self._things.pop(name, None)

    def names(self) -> list[str]:
        """All known names, sorted."""
        return sorted(self._things)

    def find(self, name: str, *, also: Iterable[str] = ()) -> T:
        """What is known under a name.

        Args:
            name: the name.
            also: further words that the hint may name, for example those that another door takes.

        Raises:
            RecipeError: unknown; the hint names the nearest known words.
        """
        if name not in self._things:
            raise RecipeError(f"unknown {self.kind} {name!r}", hint=suggestion(str(name), [*self.names(), *also]))
        return self._things[name]

    def build(
        self: Registry[type[A]], name: str, options: Mapping[str, object] | None = None, *, also: Iterable[str] = ()
    ) -> A:
        """The class of that name, made with options.

        Raises:
            RecipeError: unknown name or option; the hint names the nearest known words.
        """
        return build(self.find(name, also=also), f"{self.kind} {name!r}", options or {})


def _qualname(thing: object) -> str:
    return getattr(thing, "__qualname__", repr(thing))


def build(cls: type[A], what: str, options: Mapping[str, object]) -> A:
    """``cls(**options)``, with unknown options refused.

    Args:
        cls: a class whose options are arguments of its constructor.
        what: what it is called in the message, for example "criterion 'taylor'".
        options: argument name -> value.

    Raises:
        RecipeError: an option that the constructor does not take (the hint names the nearest one), or that it needs
            and is not there.
    """
    known = option_names(cls)
    for name in options:
        if name not in known:
            raise RecipeError(f"{what} has no option {name!r}", hint=suggestion(name, known))
    wanted = inspect.signature(cls).parameters.values()
    missing = [p.name for p in wanted if p.name in known and p.default is p.empty and p.name not in options]
    if missing:
        raise RecipeError(f"{what} needs the option {missing[0]!r}", hint=f'for example {{..., "{missing[0]}": ...}}')
    return cls(**options)


def option_names(cls: type) -> list[str]:
    """Names of the constructor's arguments that can be written down.

    Those that a class names in a class variable `live` are objects of a running program, and no options.
    """
    parameters = inspect.signature(cls).parameters.values()
    live: frozenset[str] = getattr(cls, "live", frozenset())
    return [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name not in live]


def one_of(option: str, value: object, allowed: Sequence[str]) -> None:
    """Refuse a value that is not among the allowed words.

    Raises:
        RecipeError: names the option and the nearest allowed word.
    """
    if value not in allowed:
        raise RecipeError(f"{option}={value!r} is not known", hint=suggestion(str(value), allowed))


def whole_number(option: str, value: object, *, least: int = 0) -> int:
    """A whole number of at least so much.

    Raises:
        RecipeError: anything else; True is no number.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise RecipeError(f"{option}={value!r} is not a whole number of at least {least}")
    return value


def real_number(option: str, value: object, *, least: float = 0.0) -> float:
    """A finite number of at least so much.

    Raises:
        RecipeError: anything else; True is no number, and a text with digits is none either.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < float("inf"):
        raise RecipeError(f"{option}={value!r} is not a finite number of at least {least:g}")
    return float(value)


def listed(names: Sequence[str], *, most: int = 5, form: str = "{!r}") -> str:
    """Some names, and how many more there are.

    Example:
        >>> listed(["a", "b", "c"], most=2)
        "'a', 'b' and 1 more"
    """
    shown = ", ".join(form.format(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def suggestion(word: str, known: Iterable[str], *, form: str = "{!r}", otherwise: str | None = None) -> str:
    """Hint for a misspelt word: the nearest known words, or all of them when they are few.

    Args:
        word: what was written.
        known: what could have been meant.
        form: how a known word is shown, for example "demo:{}".
        otherwise: what to say where nothing is near, instead of the list of known words.

    Returns:
        A question or a list; "" where nothing is known.

    Example:
        >>> suggestion("magnitud", ["magnitude", "random"])
        "did you mean 'magnitude'?"
        >>> suggestion("x", ["lenet", "convnet"], form="demo:{}")
        'known: demo:lenet, demo:convnet'
    """
    known = list(known)
    # Half of the letters in common: a lower bound proposes words that nobody meant, a higher one misses two typos.
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    # Those that are much further off than the best only blur the question.
    near = [each for each in near if _likeness(word, each) > _likeness(word, near[0]) - 0.05]
    if near:
        return "did you mean " + " or ".join(form.format(each) for each in near) + "?"
    if otherwise is not None:
        return otherwise
    if not known:
        return ""
    return f"known: {listed(known, most=SHOWN, form=form)}"


def _likeness(word: str, known: str) -> float:
    return difflib.SequenceMatcher(None, known, word).ratio()
