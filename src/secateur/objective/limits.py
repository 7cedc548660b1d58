"""At most this loss, as it is asked for: checked once for Python and the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypedDict, cast, get_args

from secateur.errors import RecipeError
from secateur.registry import suggestion

Smallest = Literal["macs", "params", "sparsity", "latency_ms"]
CONFIDENCE = 0.95
FIGURES_ALONE = 0.5  # the confidence at which a bound is the figure itself


class AtMostWords(TypedDict):
    """The keywords of `prune` that belong together."""

    max_drop: float | None
    smallest: Smallest | None
    confidence: float


NO_LIMIT: AtMostWords = {"max_drop": None, "smallest": None, "confidence": CONFIDENCE}


@dataclass(frozen=True)
class AtMost:
    """What may be lost, and by which word the model is to be as small as that allows.

    Args:
        max_drop: points of a share (1.0 = one hundredth), or percent of any other figure.
        smallest: the target whose amount is found; None: macs of what is cut, params of experts, sparsity of masks.
        confidence: with which the limit is to hold on other samples than those that the amount is chosen by.

    Raises:
        RecipeError: no number above 0, another word, or a confidence out of range.
    """

    max_drop: float
    smallest: Smallest | None = None
    confidence: float = CONFIDENCE

    def __post_init__(self) -> None:
        number = isinstance(self.max_drop, (int, float)) and not isinstance(self.max_drop, bool)
        if not number or not 0 < self.max_drop < 100:
            hint = "1.0 is one point of an accuracy (97.5 % -> 96.5 %), or one percent of a loss"
            raise RecipeError(f"max_drop={self.max_drop!r} is not a number above 0 and below 100.", hint=hint)
        if self.smallest is not None and self.smallest not in get_args(Smallest):
            raise RecipeError(
                f"smallest={self.smallest!r} is not known.", hint=suggestion(str(self.smallest), get_args(Smallest))
            )
        share = self.confidence
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0.5 <= share < 1:
            raise RecipeError(f"confidence={share!r} is not in [0.5, 1).", hint="0.95; 0.5 goes by the figures alone")

    def each(self, looks: int) -> float:
        """The confidence of the bound of each of several amounts, so that all of them together have the asked one.

        Of several amounts that are read on the same samples the one that is taken may be a lucky one. At 0.5 there is
        nothing to share out: figures alone decide.

        Source: Dunn, "Multiple comparisons among means", 1961 (Bonferroni's inequality).
        """
        return self.confidence if self.confidence == FIGURES_ALONE else 1 - (1 - self.confidence) / looks

    def to_data(self) -> AtMostWords:
        """As a run that goes on finds it again."""
        return {"max_drop": self.max_drop, "smallest": self.smallest, "confidence": self.confidence}


def at_most_asked(
    max_drop: float | None, smallest: Smallest | None, confidence: float, decision: Mapping[str, object]
) -> AtMost | None:
    """The keywords of `prune` as one object; None where no limit is given.

    Raises:
        RecipeError: a word of the limit without it, or a target beside it.
    """
    if max_drop is None:
        if smallest is not None or confidence != CONFIDENCE:
            raise RecipeError("smallest= and confidence= belong to max_drop=.", hint="give max_drop, or leave them out")
        return None
    if "target" in decision:
        raise RecipeError(
            "max_drop= and target= both say how much goes.",
            hint='Leave out target; smallest="macs", "params", "sparsity" or "latency_ms" says what is to be small.',
        )
    return AtMost(max_drop, smallest, confidence)


def require_data(max_drop: float | None, *parts: object) -> None:
    """Refuse a limit where there is nothing to choose an amount by.

    Args:
        max_drop: the limit, or None.
        parts: the data to choose by, each None where there are none.

    Raises:
        RecipeError: a limit, and no part.
    """
    if max_drop is not None and all(part is None for part in parts):
        raise RecipeError(
            f"max_drop={max_drop!r} needs data with labels.",
            why="amounts are recovered, and chosen by what they lose on samples that nothing trains on",
            hint="Pass data= (training batches) and test=; on the command line --data DATA.",
        )


def limit_words_of(max_drop: float | None, smallest: str | None, confidence: float | None) -> AtMostWords | None:
    """The same from the command line.

    Raises:
        RecipeError: a word of the limit without it, or a value that no entry may ask for.
    """
    if max_drop is None and confidence is not None:
        raise RecipeError("--confidence belongs to --max-drop.", hint="Give --max-drop, or leave it out.")
    asked = at_most_asked(
        max_drop, cast(Smallest | None, smallest), CONFIDENCE if confidence is None else confidence, {}
    )
    return None if asked is None else asked.to_data()
