"""Options that decide what goes, in every command that decides: each is a key of the recipe, and stands over it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from secateur.cli import options

if TYPE_CHECKING:
    from secateur.recipe import Setting

TARGETS = {"macs": "macs", "params": "params", "sparsity": "sparsity", "latency": "latency_ms"}
Word = Optional[str]  # noqa: UP045
OPTIONS: dict[str, object] = {
    # As text: "50%" and "50" should be answered by the recipe's own sentence, and not by the parser's.
    "macs": Annotated[Word, typer.Option("--macs", metavar="FRACTION", help="Multiply-accumulates kept at most.")],
    "params": Annotated[Word, typer.Option("--params", metavar="FRACTION", help="Parameters kept at most.")],
    "sparsity": Annotated[
        Word, typer.Option("--sparsity", metavar="FRACTION", help="Units removed, as a fraction of all.")
    ],
    "latency": Annotated[Word, typer.Option("--latency", metavar="MS", help="Milliseconds of one forward at most.")],
    "criterion": Annotated[
        Word,
        typer.Option("--criterion", metavar="NAME[:OPTION=VALUE]", help="The rule that scores; see criteria list."),
    ],
    "granularity": Annotated[
        Word,
        typer.Option(
            "--granularity",
            metavar="A[,B]",
            help="What goes: channel, head, neuron, layer, sub_block, expert, element, 2:4, ...",
            autocompletion=options.complete(*options.GRANULARITIES),
        ),
    ],
    "protect": options.Protect,
    "recover": Annotated[
        Word,
        typer.Option(
            "--recover", metavar="none|STEP,..|RECIPE", help="none, steps as in finetune:epochs=3, or a recipe's."
        ),
    ],
    "expressible": Annotated[
        bool, typer.Option("--expressible", help="Hugging Face: cut so that from_pretrained loads the result.")
    ],
    "proof": Annotated[
        Word,
        typer.Option(
            "--proof",
            metavar="EFFORT",
            help="Inputs that a cut is proved on: example, default or full.",
            autocompletion=options.complete("example", "default", "full"),
        ),
    ],
    "device": options.Device,
}


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """What the command line decides; None, False and nothing leave it to the recipe.

    Args: those of `OPTIONS`, as text.
    """

    macs: str | None = None
    params: str | None = None
    sparsity: str | None = None
    latency: str | None = None
    criterion: str | None = None
    granularity: str | None = None
    protect: Sequence[str] | None = None
    recover: str | None = None
    expressible: bool = False
    proof: str | None = None
    device: str | None = None

    def settings(self) -> list[Setting]:
        """The same as settings of a recipe; targets take the place of the recipe's target."""
        from secateur.recipe.load import steps_of
        from secateur.recipe.overrides import Setting, choice_of, value_of

        targets = [(key, getattr(self, name), f"--{name}") for name, key in TARGETS.items()]
        found = [
            Setting(("target", key), value_of(text), f"{option} {text}", replaces="target")
            for key, text, option in targets
            if text is not None
        ]
        if self.criterion is not None:
            found.append(Setting(("criterion",), choice_of(self.criterion), f"--criterion {self.criterion}"))
        if self.granularity is not None:
            kinds = [choice_of(word) for word in self.granularity.split(",")]
            label = f"--granularity {self.granularity}"
            found.append(Setting(("granularity",), kinds if len(kinds) > 1 else kinds[0], label))
        if self.protect:
            found.append(Setting(("protect",), list(self.protect), f"--protect {' '.join(self.protect)}", adds=True))
        if self.recover is not None:
            found.append(Setting(("recover",), steps_of(self.recover), f"--recover {self.recover}"))
        if self.expressible:
            found.append(Setting(("expressible",), True, "--expressible"))
        if self.proof is not None:
            found.append(Setting(("verify", "proof"), self.proof, f"--proof {self.proof}"))
        return found

    def words(self) -> list[str]:
        """The same as words of a command line."""
        said: list[str] = []
        for one in fields(self):
            value = getattr(self, one.name)
            several = value if isinstance(value, (list, tuple)) else [value]
            if value is True:
                said.append(f"--{one.name}")
            elif value not in (None, False):
                said += [word for each in several for word in (f"--{one.name}", str(each))]
        return said


def decides(*, without: Collection[str] = ()) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorator of a command with an argument ``decided``: gives it the options instead, and it gets `Decisions`.

    Args:
        without: names of options that the command has by itself, or that mean nothing there.
    """
    taken = {name: kind for name, kind in OPTIONS.items() if name not in without}

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(command)
        def run(**given: Any) -> int:
            return command(decided=Decisions(**{name: given.pop(name) for name in taken}), **given)

        signature = inspect.signature(command, eval_str=True)
        own = list(signature.parameters.values())
        place = next(number for number, one in enumerate(own) if one.name == "decided")
        made = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=False if name == "expressible" else None
            )
            for name, kind in taken.items()
        ]
        plain = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own]
        signed = [*plain[:place], *made, *plain[place + 1 :]]
        run.__signature__ = signature.replace(parameters=signed)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in signed}
        del run.__wrapped__
        return run

    return decorate
