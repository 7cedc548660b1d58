"""What was typed on a command line: nothing twice, and nothing beside what does not read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import typer
from typer.core import TyperCommand

from secateur.errors import RecipeError

EVERYWHERE = frozenset({"json", "verbose"})  # read by the entry point, whatever a command does
_KEY = "secateur.typed"
_TYPED: ContextVar[Mapping[str, str]] = ContextVar("typed", default=MappingProxyType({}))


class Command(TyperCommand):
    """A command that knows what was typed, and refuses an option that is given twice.

    The parser would drop all but the last of them in silence.
    """

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """As the parser does, once nothing is given twice."""
        if not ctx.resilient_parsing:
            # On a copy: the parser takes words off the list that it is given.
            values, _, order = self.make_parser(ctx).parse_args(args=list(args))
            given: Counter[Any] = Counter(one for one in order if one.param_type_name == "option")
            for option, times in given.items():
                # A switch that is turned on twice is on; one that can be turned off may have been meant either way.
                same = option.multiple or (option.is_flag and not option.secondary_opts)
                if times > 1 and not same:
                    raise RecipeError(
                        f"{option.opts[0]} is given {times} times.", why="it holds one value", hint="Write it once."
                    )
            off = {option.name for option in given if option.secondary_opts and values[option.name] is False}
            ctx.meta[_KEY] = {
                option.name: (option.secondary_opts if option.name in off else option.opts)[0] for option in given
            }
        return super().parse_args(ctx, args)

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]
        """Run the command, which can ask what was typed."""
        token = _TYPED.set(ctx.meta.get(_KEY, {}))
        try:
            return super().invoke(ctx)
        finally:
            _TYPED.reset(token)


def typed() -> Mapping[str, str]:
    """The options that were typed for the command that runs: name of the parameter -> how it is written."""
    return _TYPED.get()


def only(mode: str, reads: Collection[str], *, why: str = "", hint: str = "Leave one of them out.") -> None:
    """Refuse whatever was typed and is not read in one mode of the command that runs.

    What a mode reads is listed, and not what it leaves out: a new option is refused until a mode says that it reads it.
    Where a command is called as a function nothing was typed.

    Args:
        mode: how messages call it: "--task perplexity".
        reads: names of the parameters that it reads.
        why: the reason.
        hint: what to do.

    Raises:
        RecipeError: names the first option that the mode does not read.
    """
    for name, option in typed().items():
        if name not in EVERYWHERE and name not in reads:
            raise RecipeError(f"{mode} and {option} do not go together.", why=why, hint=hint)
