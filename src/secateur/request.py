"""What is asked for, checked once for every way in: Python, recipe and command line. Needs no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, cast, get_args

from secateur.errors import RecipeError
from secateur.words import ABOUT_TARGETS, GRANULARITIES, right_word, translated

Plain = str | int | float | bool | None | Sequence["Plain"] | Mapping[str, "Plain"]  # what a file can hold
Amount = float | Mapping[str, float]  # one number, or name pattern -> number

AMOUNTS = ("sparsity", "count", "threshold")  # how much goes, in units of the granularity
BOUNDS = ("params", "macs", "memory_bytes", "latency_ms")  # what is left at most
TARGETS = (*AMOUNTS, *BOUNDS)
REMOVED = "is a fraction in [0, 1)"
KEPT = "is the fraction kept, in (0, 1]"
_PERCENT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*")

# One set of defaults for all entries.
CRITERION = "magnitude"
SCOPE = "global"
ALLOCATION = "global"
SCALES = "keep"
Efforts = Literal["example", "default", "full"]
PROOF: Efforts = "default"  # on which inputs a cut is proved
MIN_KEEP = 1  # units that every group keeps
MIN_KEEP_FRACTION = 0.1  # of each group stays under a global ranking of cuts, so that no layer is emptied by its scale
# Widths that are multiples of 8 cost nothing in quality and take ViT-B/16 at batch 8 from 0.65 to 0.50 of the time
# (docs/benchmarks); below 64 units one step would be more than an eighth of the group.
GRID = 8
GRID_FROM = 64


def default_granularity(example: object) -> str:
    """Channels, which become speed; single weights where there is no example to find channels with."""
    return "element" if example is None else "channel"


def check_target(name: str, value: object) -> str:
    """What is wrong with one number of a target; "" if nothing is.

    Args:
        name: sparsity, count, threshold, params, macs, memory_bytes or latency_ms.
        value: what was given for it.

    Returns:
        one sentence that says what to write instead.
    """
    percent = _PERCENT.fullmatch(value) if isinstance(value, str) else None
    text = {"sparsity": REMOVED, "params": KEPT, "macs": KEPT}.get(name, "")
    if percent and text:
        share = float(percent[1])
        return f"{name} {text}: {share:g}% is a percentage, write {share / 100:g}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"{name} should be a valid number, not {value!r}"
    if not math.isfinite(value):
        return f"{name} should be a finite number, not {value:g}"
    if text:
        if 1 < value <= 100:
            return f"{name} {text}: {value:g} looks like a percentage, write {value / 100:g}"
        inside = 0 < value < 1 or (name == "sparsity" and value == 0) or (name != "sparsity" and value == 1)
        return "" if inside else f"{name} {text}, not {value:g}"
    if name in ("count", "memory_bytes"):
        whole = isinstance(value, int) or value.is_integer()
        least = 0 if name == "count" else 1
        return "" if whole and value >= least else f"{name} is a whole number of at least {least}, not {value:g}"
    if name == "threshold":
        return "" if value >= 0 else f"threshold is at least 0, not {value:g}"
    return "" if value > 0 else f"{name} is above 0, not {value:g}"


def check_amount(name: str, value: object) -> str:
    """As `check_target`, where amounts may also be given per name pattern."""
    if not isinstance(value, Mapping):
        return check_target(name, value)
    if name not in AMOUNTS:
        return f"{name} is one number; only {', '.join(AMOUNTS)} can be given per name pattern"
    if not value:
        return f"{name} holds no pattern"
    for pattern, amount in value.items():
        if not isinstance(pattern, str) or not pattern:
            return f"{name}: {pattern!r} is no name pattern"
        wrong = check_target(name, amount)
        if wrong:
            return f"{name} of {pattern!r}: {wrong}"
    return ""


def check_together(given: Sequence[str]) -> str:
    """What is wrong with the names of a target taken together; "" if nothing is."""
    if not given:
        return "a target needs at least one of " + ", ".join(TARGETS)
    amounts = [name for name in AMOUNTS if name in given]
    if len(amounts) > 1:
        return f"{' and '.join(amounts)} exclude each other: each says how much is removed"
    return ""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What must be reached; where several are given, all of them hold.

    Args:
        sparsity: fraction of the units that goes, in [0, 1); or name pattern -> fraction.
        count: units that go; or name pattern -> units.
        threshold: units with a score below it go; or name pattern -> score.
        params: fraction of the parameters that stays at most, in (0, 1].
        macs: fraction of the multiply-accumulates that stays at most, in (0, 1].
        memory_bytes: bytes of the weights at most.
        latency_ms: median milliseconds of one forward pass at most.

    Raises:
        RecipeError: a number out of range, a percentage, amounts that exclude each other, or nothing at all.
    """

    sparsity: Amount | None = None
    count: Amount | None = None
    threshold: Amount | None = None
    params: float | None = None
    macs: float | None = None
    memory_bytes: int | None = None
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        """Refuse whatever no entry may ask for."""
        given = self.given()
        for name, value in given.items():
            wrong = check_amount(name, value)
            if wrong:
                raise RecipeError(f"target: {wrong}.", hint=_example_of(name))
        wrong = check_together(list(given))
        if wrong:
            raise RecipeError(f"target: {wrong}.", hint='for example target={"macs": 0.5}')

    @classmethod
    def of(cls, value: Target | Mapping[str, Amount] | None) -> Target:
        """A target from what users write.

        Raises:
            RecipeError: not a mapping, or an unknown name in it.
        """
        if isinstance(value, Target):
            return value
        if not isinstance(value, Mapping):
            hint = f'write {{"sparsity": {value}}} or {{"macs": {value}}}' if isinstance(value, (int, float)) else ""
            raise RecipeError(
                f"target={value!r} is not a mapping of names to numbers.", hint=hint or 'for example {"macs": 0.5}'
            )
        known = [entry.name for entry in fields(cls)]
        for name in value:
            if name not in known:
                listed = f"targets: {', '.join(known)}"
                raise RecipeError(
                    f"unknown target {name!r}", hint=right_word(str(name), known, ABOUT_TARGETS, more=listed)
                )
        return cls(**{name: number for name, number in value.items() if number is not None})  # type: ignore[arg-type]

    def given(self) -> dict[str, Amount]:
        """The bounds that were set: name -> number, or name pattern -> number."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def numbers(self) -> dict[str, float]:
        """The bounds that are one number each."""
        return {name: float(value) for name, value in self.given().items() if not isinstance(value, Mapping)}

    def flat(self) -> dict[str, float]:
        """As `given`, with one entry per pattern: "sparsity of encoder.*" -> number."""
        shown: dict[str, float] = {}
        for name, value in self.given().items():
            several = value.items() if isinstance(value, Mapping) else ()
            shown.update({f"{name} of {pattern}": float(amount) for pattern, amount in several})
            if not isinstance(value, Mapping):
                shown[name] = value
        return shown

    def per_pattern(self) -> tuple[str, Mapping[str, float]] | None:
        """(name, name pattern -> number) where the amount is given per pattern."""
        return next(((name, v) for name, v in self.given().items() if isinstance(v, Mapping)), None)


def _example_of(name: str) -> str:
    examples = {"sparsity": 0.3, "count": 12, "threshold": 0.01, "params": 0.5, "macs": 0.5, "memory_bytes": 1_000_000}
    return f'for example target={{"{name}": {examples.get(name, 5)}}}'


@dataclass(frozen=True)
class Named:
    """A registered name with its options, as a file can hold it."""

    name: str
    options: Mapping[str, Plain] = field(default_factory=dict)

    @classmethod
    def of(cls, value: str | Mapping[str, object] | Named) -> Named:
        """From a name or from {"name": ..., options}."""
        if isinstance(value, Named):
            return value
        if isinstance(value, str):
            return cls(value)
        if isinstance(value, Mapping) and isinstance(value.get("name"), str):
            return cls(str(value["name"]), {k: cast(Plain, option) for k, option in value.items() if k != "name"})
        raise RecipeError(f"{value!r} is no choice.", hint='write a name, or {"name": ..., option: value}')

    def spec(self) -> str | dict[str, Plain]:
        """A name, or a mapping where there are options."""
        return {"name": self.name, **self.options} if self.options else self.name


@dataclass(frozen=True, kw_only=True)
class Request:
    """One decision that is asked for: what goes, by which score, how much, from where.

    Args:
        target: what must be reached; None where the units themselves were given.
        criterion: name and options of the score.
        granularity: what a unit is; several are ranked together.
        scope: "global" (all units compete), "local" (every group shrinks alike), "row" (masks only).
        allocation: how an amount is spread: "global", "uniform", or for masks "erk" or "lamp".
        protect: name patterns, "type:Class" or "tag:word" that stay whole.
        min_keep: units that every group keeps at least.
        min_keep_fraction: share of every group that stays under a global ranking of cuts.
        round_to: kept counts are multiples of it; None: of 8 in groups of 64 units or more, unless the target says
            exactly how much goes (sparsity, count, threshold) or the units are no widths (heads, experts, layers).
        seed: of everything random.
        expressible: whether a Hugging Face config must describe the result.
        scales: "keep" = scales that the code takes from a width that is cut stay what they were; "follow" = they
            follow the cut.
        proof: on which inputs the cut is proved: "example", "default" (others, as small as they come) or "full".
        blocks: how a solver went about it, block by block; None where scores decided.
        earlier: the requests that were met before this one, where plans were composed.

    Raises:
        RecipeError: a value that no entry may ask for.
    """

    target: Target | None
    criterion: Named = Named(CRITERION)
    granularity: tuple[Named, ...] = (Named("channel"),)
    scope: str = SCOPE
    allocation: str = ALLOCATION
    protect: tuple[str, ...] = ()
    min_keep: int = MIN_KEEP
    min_keep_fraction: float = MIN_KEEP_FRACTION
    round_to: int | Literal["auto"] | None = None
    seed: int = 0
    expressible: bool = False
    scales: str = SCALES
    proof: str = PROOF
    blocks: Mapping[str, Plain] | None = None
    earlier: tuple[Request, ...] = ()

    def __post_init__(self) -> None:
        """Refuse contradictions that need no model to be seen."""
        if self.scope not in ("global", "local", "row"):
            raise RecipeError(f"scope {self.scope!r} is not known.", hint="Use global, local or (for masks) row.")
        if self.scales not in ("keep", "follow"):
            raise RecipeError(f"scales {self.scales!r} is not known.", hint="Use keep or follow.")
        effort_of(self.proof)
        for name in ("min_keep", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise RecipeError(f"{name}={value!r} is not a whole number of at least 0.")
        share = self.min_keep_fraction
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
            raise RecipeError(f"min_keep_fraction={share!r} is not a fraction in [0, 1).", hint="0.1 keeps a tenth")
        grid = self.round_to
        if grid not in (None, "auto") and (isinstance(grid, bool) or not isinstance(grid, int) or grid < 1):
            raise RecipeError(f"round_to={grid!r} is not a whole number of at least 1.", hint='or "auto"')
        if not self.granularity:
            raise RecipeError("granularity is empty.", hint="for example channel, or [channel, head, neuron]")
        require_patterns(self.protect)

    def grid(self, size: int, granularity: str) -> int:
        """Multiple that the kept count of a group is rounded up to."""
        if isinstance(self.round_to, int):
            return self.round_to
        exact = self.target is None or any(name in AMOUNTS for name in self.target.given())
        width = granularity in ("channel", "neuron")
        return GRID if width and size >= GRID_FROM and not exact else 1

    @property
    def what(self) -> str:
        """The granularities in words."""
        return "+".join(choice.name for choice in self.granularity)

    def to_data(self) -> dict[str, Plain]:
        """As a plan's file holds it; `from_data` gives an equal request."""
        kinds = [choice.spec() for choice in self.granularity]
        data: dict[str, Plain] = {
            "criterion": {"name": self.criterion.name, **self.criterion.options},
            "granularity": kinds[0] if len(kinds) == 1 else kinds,
            "scope": self.scope,
            "allocation": self.allocation,
            "target": {} if self.target is None else self.target.given(),
            "protect": list(self.protect),
            "min_keep": self.min_keep,
            "min_keep_fraction": self.min_keep_fraction,
            "round_to": self.round_to,
            "seed": self.seed,
        }
        if self.expressible:
            data["expressible"] = True
        if self.scales != SCALES:
            data["scales"] = self.scales
        if self.proof != PROOF:
            data["proof"] = self.proof
        if self.blocks is not None:
            data["blocks"] = dict(self.blocks)
        if self.earlier:
            data["steps"] = [request.to_data() for request in self.earlier]
        return data

    @classmethod
    def from_data(cls, data: Mapping[str, object]) -> Request:
        """The request of a plan's file.

        Raises:
            RecipeError: a value that no entry may ask for.
            TypeError, KeyError: the data is malformed.
        """
        known = {"target", "criterion", "granularity", "steps", *(entry.name for entry in fields(cls))}
        strange = sorted(set(data) - known)
        if strange:
            raise KeyError(f"unknown key {strange[0]!r} of a request")
        target, kinds, steps = data["target"], data["granularity"], data.get("steps", [])
        rest = {name: data[name] for name in _PASSED if name in data}
        if not isinstance(target, Mapping) or not isinstance(steps, list):
            raise TypeError("the target or the steps of a request are malformed")
        return cls(
            target=Target.of(target) if target else None,
            criterion=Named.of(data["criterion"]),  # type: ignore[arg-type]
            granularity=granularities(kinds),  # type: ignore[arg-type]
            protect=_listed(data.get("protect", ())),
            earlier=tuple(cls.from_data(step) for step in steps),
            **rest,  # type: ignore[arg-type]
        )


def effort_of(proof: object) -> Efforts:
    """On which inputs a cut is proved, as `Request.proof` says.

    Raises:
        RecipeError: no word for it.
    """
    if not isinstance(proof, str) or proof not in get_args(Efforts):
        raise RecipeError(f"proof {proof!r} is not known.", hint="Use example, default or full.")
    return cast(Efforts, proof)


def require_patterns(protect: object) -> None:
    """Refuse a `protect` that is no list of name patterns.

    Raises:
        RecipeError: one word, or something in the list that is no name.
    """
    if isinstance(protect, str):
        raise RecipeError(f"protect={protect!r} is one word", hint=f"write a list: [{protect!r}]")
    if not isinstance(protect, Iterable) or not all(isinstance(pattern, str) for pattern in protect):
        shown = ", ".join(type(one).__name__ for one in protect) if isinstance(protect, Iterable) else protect
        raise RecipeError(
            f"protect holds something that is no name: {str(shown)[:80]}.",
            hint='write names as in model.named_modules(), for example ["fc1"], or "type:Linear"',
        )


def _listed(patterns: object) -> tuple[str, ...]:
    # A single word would fall into its letters.
    if not isinstance(patterns, (list, tuple)):
        raise TypeError("protect is not a list")
    return tuple(patterns)


_PASSED = (
    "scope", "allocation", "min_keep", "min_keep_fraction", "round_to", "seed", "expressible", "scales", "proof",
    "blocks",
)  # fmt: skip


def granularities(
    value: str | Mapping[str, object] | Sequence[str | Mapping[str, object]],
) -> tuple[Named, ...]:
    """One or several granularities as choices; each counts once.

    Example:
        >>> [choice.name for choice in granularities(["channel", "head", "channel"])]
        ['channel', 'head']
    """
    several = [value] if isinstance(value, (str, Mapping, Named)) else list(value)
    found: dict[str, Named] = {}
    for one in several:
        choice = Named.of(translated(one, GRANULARITIES))  # type: ignore[arg-type]
        found.setdefault(str(choice.spec()), choice)
    return tuple(found.values())
