"""What is held fixed in a comparison, as data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypedDict, Unpack

import torch

from secateur.comparison.levels import (
    CUT_LEVELS,
    MATCHES,
    GranularityChoice,
    among,
    check_level,
    make_levels,
    make_match,
    middle_of,
    plain_granularity,
)
from secateur.comparison.recoveries import NO_RECOVERY, CheckedSteps, Steps, check_steps, make_recoveries, trains
from secateur.errors import InputError, RecipeError
from secateur.measure.quality import higher_is_better
from secateur.request import require_patterns
from secateur.types import Json
from secateur.version import __version__

SCHEMA = 1


class ProtocolOptions(TypedDict, total=False):
    """What `Protocol.of` and `compare` take; `compare` says what each of them means."""

    granularity: GranularityChoice
    levels: Sequence[float] | None
    match: str
    seeds: int | Sequence[int]
    recover: Steps | Mapping[str, Steps] | None
    recover_levels: Sequence[float] | None
    ablation_levels: Sequence[float] | None
    scratch: Steps
    scope: str
    allocation: str
    protect: Sequence[str]
    metric: str | None
    maximize: bool | None
    rounds: int
    probes: int
    confidence: float
    tag: str


@dataclass(frozen=True)
class Protocol:
    """Everything that is the same for all criteria; what decides about single runs goes into their addresses.

    `Protocol.of` fills in the defaults that depend on each other; a protocol that is built by hand is checked alike.

    Args:
        granularity: what is removed, as in a recipe.
        match: what the levels count: "units" (exact counts), "macs" or "params".
        levels: fractions removed of what is matched, ascending.
        recoveries: name -> steps; "none" is always there.
        recover_levels: levels at which recovery is run.
        ablation_levels: levels at which every criterion's scores are also shuffled within layers and inverted.
        scope: where units compete.
        allocation: how a global amount is spread.
        protect: what stays whole.
        seeds: of base models, scores and recovery.
        metric: the quality that is compared; None = the first that is measured.
        maximize: whether higher is better; None = by the name of the metric.
        rounds: timed rounds of the latency of cut models; 0 = not timed.
        confidence: of the intervals; 1 - confidence is the level of the tests.
        probes: units per seed that are set to zero one by one, to see what each score tells of the loss; 0 = none.
        scratch: steps with which the equal-size network is trained from new weights; empty = not run.
        tag: free text for what cannot be hashed (the loss and evaluate functions).

    Raises:
        RecipeError: no seed or level, a level that is none, a confidence that is no probability, a negative count.

    Example:
        >>> Protocol.of(granularity="element", levels=[0.9, 0.5], seeds=2).levels
        (0.5, 0.9)
    """

    granularity: str | dict[str, Json] = "channel"
    match: str = "macs"
    levels: tuple[float, ...] = CUT_LEVELS
    recoveries: dict[str, CheckedSteps] = field(default_factory=lambda: {NO_RECOVERY: ()})
    recover_levels: tuple[float, ...] = ()
    ablation_levels: tuple[float, ...] = ()
    scope: str = "global"
    allocation: str = "global"
    protect: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    metric: str | None = None
    maximize: bool | None = None
    rounds: int = 30
    confidence: float = 0.95
    probes: int = 64
    scratch: CheckedSteps = ()
    tag: str = ""

    def __post_init__(self) -> None:
        """Refuse what no comparison can be run by."""
        if not self.seeds:
            raise RecipeError("there is no seed", hint="seeds=3")
        if self.match not in MATCHES:
            raise RecipeError(f"match={self.match!r} is not known", hint=f"known: {', '.join(MATCHES)}")
        for level in self.levels:
            check_level(level)
        # Curves are integrated, and the middle level is taken, in this order.
        if not self.levels or list(self.levels) != sorted(set(self.levels)):
            raise RecipeError(f"levels {[*self.levels]} are not ascending", hint="Protocol.of(levels=...) sorts them")
        among("recover_levels", self.recover_levels, self.levels)
        among("ablation_levels", self.ablation_levels, self.levels)
        # Tables, differences and latencies start from what the cut alone leaves.
        if NO_RECOVERY not in self.recoveries:
            raise RecipeError(f"recoveries lack {NO_RECOVERY!r}", hint=f"add {NO_RECOVERY!r}: ()")
        if not 0 < self.confidence < 1:
            raise RecipeError(f"confidence={self.confidence} is no probability", hint="for example 0.95")
        if self.probes < 0:
            raise RecipeError(f"probes={self.probes} is negative", hint="0 measures no units, 64 is the default")
        if self.rounds < 0:
            raise RecipeError(f"rounds={self.rounds} is negative", hint="0 times nothing, 30 is the default")

    @classmethod
    def of(cls, **options: Unpack[ProtocolOptions]) -> Protocol:
        """A protocol from what was asked for: words and numbers checked, the rest filled in.

        Args:
            **options: as in `compare`; all may be left out.

        Raises:
            RecipeError: an unknown word, a level out of range, a wrong step.
            TypeError: an option that there is not.
        """
        require_patterns(options.get("protect", ()))
        # As a call with a misspelt keyword: mypy sees it before, Python would not.
        unknown = sorted(set(options) - set(ProtocolOptions.__annotations__))
        if unknown:
            raise TypeError(f"a comparison has no option {unknown[0]!r}")
        granularity = plain_granularity(options.get("granularity", "channel"))
        match = make_match(options.get("match", "auto"), granularity)
        levels = make_levels(options.get("levels"), match, granularity)
        recoveries, scratch = make_recoveries(options.get("recover")), options.get("scratch") or ()
        # Without a recovery there is nothing to run there, whatever levels were named.
        trained = (options.get("recover_levels") or levels) if len(recoveries) > 1 or scratch else ()
        ablated = options.get("ablation_levels")
        seeds = options.get("seeds", 3)
        return cls(
            granularity=granularity,
            match=match,
            levels=levels,
            recoveries=recoveries,
            recover_levels=among("recover_levels", trained, levels),
            ablation_levels=among("ablation_levels", [middle_of(levels)] if ablated is None else ablated, levels),
            scope=options.get("scope", "global"),
            allocation=options.get("allocation", "global"),
            protect=tuple(options.get("protect", ())),
            # A seed that is named twice would be counted as two independent observations.
            seeds=tuple(range(seeds)) if isinstance(seeds, int) else tuple(dict.fromkeys(seeds)),
            metric=options.get("metric"),
            maximize=options.get("maximize"),
            rounds=options.get("rounds", 30),
            confidence=options.get("confidence", 0.95),
            probes=options.get("probes", 64),
            scratch=check_steps(scratch) if scratch else (),
            tag=options.get("tag", ""),
        )

    def measuring(self, measured: Iterable[str]) -> Protocol:
        """The same, with the metric and its direction settled.

        Args:
            measured: names of what `evaluate` gives, in its order.

        Raises:
            InputError: it gives nothing.
            RecipeError: it does not give the metric that was asked for.
        """
        names = list(measured)
        if not names:
            raise InputError("evaluate(model) names no quality", hint="return a number, or a mapping of numbers")
        metric = names[0] if self.metric is None else self.metric
        if metric not in names:
            raise RecipeError(f"evaluate(model) has no {metric!r}", hint=f"it has: {', '.join(names)}")
        return replace(self, metric=metric, maximize=Protocol._higher_is_better(metric, self.maximize))

    @staticmethod
    def _higher_is_better(metric: str, said: bool | None) -> bool:
        return higher_is_better(metric) if said is None else said

    @property
    def quality(self) -> str:
        """Name of the metric; it must have been settled by `measuring`."""
        assert self.metric is not None
        return self.metric

    @property
    def sign(self) -> int:
        """1 where higher is better, -1 where lower is: sign times quality is what should be large."""
        return 1 if Protocol._higher_is_better(self.quality, self.maximize) else -1

    @property
    def trains(self) -> bool:
        """Whether any run reads training batches."""
        return trains([*self.scratch, *(step for steps in self.recoveries.values() for step in steps)])

    def of_cell(self) -> dict[str, Json]:
        """The part that decides about a single cell: levels and seeds may be added later without losing cells."""
        return {
            "schema": SCHEMA,
            "secateur": __version__,
            # A local build ("+cpu", "+cu128") computes the same; the device is part of the address anyway.
            "torch": str(torch.__version__).partition("+")[0],
            "granularity": self.granularity,
            "match": self.match,
            "scope": self.scope,
            "allocation": self.allocation,
            "protect": list(self.protect),
            # Not levels, seeds or probes: those say which cells there are, and not what one of them finds.
            "rounds": self.rounds,
            "tag": self.tag,
        }

    def target(self, level: float) -> dict[str, float]:
        """The plan's target of a level: masks are asked for what goes, cuts for what may stay."""
        return {"sparsity": level} if self.match == "units" else {self.match: 1 - level}
