"""What is lost when one group alone gets smaller: few evaluations along one removal order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from secateur import shown
from secateur.comparison.hashes import hash_batches, key_of
from secateur.criteria.base import Context
from secateur.errors import InputError, RecipeError
from secateur.files.atomic import atomic_write
from secateur.files.safe import load_json
from secateur.files.seeds import canonical_json
from secateur.kinds.base import Candidates
from secateur.kinds.find import spelt_out
from secateur.kinds.weights.kind import Weights
from secateur.kinds.weights.nm import NM
from secateur.masks import mask_model
from secateur.model.admit import admit
from secateur.model.call import as_loss, default_loss
from secateur.model.door import Given, Parts, enter
from secateur.model.hashing import hash_model
from secateur.model.protect import patterns_of
from secateur.objective.gauge import Gauge, GaugeReading, gauge_of, loss_gauge
from secateur.planning.build import CriterionLike, GranularityLike, candidates_of, criterion_of, units_of
from secateur.request import CRITERION, Request
from secateur.search.picture import heat
from secateur.types import Advance, Data, Example, Json, Judge, Loss, Protect
from secateur.words import spoken

LEVELS = (0.25, 0.5, 0.75)
BATCHES = 8  # of the data, where no more are asked for: a fall of one group is large or does not matter


@dataclass(frozen=True)
class SensitivityPoint:
    """One measurement.

    Args:
        group: the group, or the pattern of several that lose alike.
        ratio: the fraction of its units that was asked to go.
        removed: units that went.
        total: units that there are.
        figure: the quality without them.
        fall: of it, in points or percent.
        loss: fall of the loss in percent; None where the data give none.
    """

    group: str
    ratio: float
    removed: int
    total: int
    figure: float
    fall: float
    loss: float | None


@dataclass(frozen=True, eq=False, repr=False)
class Sensitivity:
    """Curves of quality against ratio, one per group.

    Args:
        name: of the figure of quality.
        unit: of the falls: "points" or "percent".
        before: the figure of the model as it came.
        points: all measurements, group by group, ratios ascending.
        members: group or pattern -> the groups that it stands for, and the units of each.
        measured: points that were measured now, and not found in `cache`.
    """

    name: str
    unit: str
    before: float
    points: tuple[SensitivityPoint, ...]
    members: Mapping[str, Mapping[str, int]]
    measured: int = 0

    def __repr__(self) -> str:
        return shown.line("Sensitivity", f"{len(self.members)} groups", f"{self.name} {self.before:.4g}")

    def _repr_html_(self) -> str:
        rows = [[one.group, f"{one.ratio:g}", f"{one.figure:.4g}", f"{one.fall:.2f}"] for one in self.points]
        return shown.table(repr(self)[1:-1], ("group", "ratio", self.name, f"fall ({self.unit})"), rows)

    def __str__(self) -> str:
        ratios = list(dict.fromkeys(one.ratio for one in self.points))
        width = max(map(len, self.members))
        head = f"{self.name} {self.before:.4g}; fall in {self.unit} where this group alone loses"
        lines = [head, " ".join([" " * width, *(f"{ratio:>8.0%}" for ratio in ratios)])]
        for name in self.most_sensitive():
            falls = [f"{one.fall:>8.2f}" for one in self.curve(name)]
            lines.append(" ".join([name.ljust(width), *falls]))
        return "\n".join(lines)

    def curve(self, group: str) -> list[SensitivityPoint]:
        """The measurements of one group."""
        return [one for one in self.points if one.group == group]

    def most_sensitive(self) -> list[str]:
        """Groups in the order of what they lose in all, the most sensitive first."""
        return sorted(self.members, key=lambda name: -sum(_cost(one) for one in self.curve(name)))

    def allocation(self) -> dict[str, object]:
        """The curves as an allocation that a plan or a recipe takes: ``sc.plan(..., allocation=found)`` does as well.

        The loss serves where there is one: unlike hits it moves with every unit, so few samples are enough.
        """
        curves = []
        for name, members in self.members.items():
            curve, total = _rising(self.curve(name)), sum(members.values())
            for member, size in members.items() if curve else ():
                # Of what several lose together each has the share of its units.
                falls = [_cost(one) * size / total for one in curve]
                curves.append({"group": member, "ratios": [one.removed / one.total for one in curve], "falls": falls})
        return {"name": "sensitivity", "curves": curves}

    def to_dict(self) -> dict[str, object]:
        """As plain data."""
        points = [asdict(one) for one in self.points]
        members = {name: dict(found) for name, found in self.members.items()}
        return {"figure": self.name, "unit": self.unit, "before": self.before, "groups": members, "points": points}

    def to_svg(self) -> str:
        """A picture: one row per group, one cell per ratio, darker where more is lost."""
        rows = {name: [(one.ratio, one.fall) for one in self.curve(name)] for name in self.most_sensitive()}
        return heat(rows, f"{self.name} {self.before:.4g}: fall in {self.unit} where one group alone loses this share")


@spoken()
def sensitivity(
    model: nn.Module,
    example: Example = None,
    *,
    data: Given,
    granularity: GranularityLike | None = None,
    criterion: CriterionLike = CRITERION,
    levels: Sequence[float] = LEVELS,
    patterns: Sequence[str] = (),
    calibration: Data | None = None,
    test: Data | None = None,
    evaluate: Judge | None = None,
    loss: Loss | None = None,
    batches: int = BATCHES,
    protect: Protect = (),
    cache: str | Path | None = None,
    seed: int = 0,
    progress: Advance | None = None,
) -> Sensitivity:
    """Measure what is lost when one group alone loses a share of its units, without recovery.

    Units are scored once, and the model is looked at once; every ratio takes the lowest of a group. A bad guide where
    recovery makes good most of what is lost, or where groups make up for each other.

    Args:
        model: left as it is.
        example: forward inputs; default from the data.
        data: as for `prune`. Measured on the calibration part, else on the training data; never on the test part.
        granularity: what a unit is; default channel.
        criterion: orders the units of each group.
        levels: fractions that go.
        patterns: several groups that lose alike, as one curve: name patterns; a group belongs to the first that
            matches, and one that none matches stands for itself.
        calibration: batches to score and measure with.
        test: not read; taken so that data may be given as for `prune`.
        evaluate: as for `prune`; its first figure counts.
        loss: of the batches.
        batches: read at most; 0 = all.
        protect: what stays whole.
        cache: a folder in which every measurement is kept under a hash of what decides about it.
        seed: of everything random.
        progress: called as ``progress(done, total)``.

    Returns:
        The curves, as data, as text, as a picture (`to_svg`) and as an allocation.

    Raises:
        RecipeError: levels out of range, a pattern that matches nothing, a granularity that fixes the amount.
        InputError: no data, or none with a figure of quality.
        UnsupportedError: nothing of the model can be cut at this granularity.

    Cost: one scoring, and for each group and level one copy of what is kept and one pass over the batches (two where
        the quality is no loss).

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> batches = [(torch.randn(16, 4), torch.arange(16) % 2)]
        >>> found = sensitivity(net, data=batches, granularity="neuron", levels=[0.5])
        >>> [(one.group, one.removed, one.total) for one in found.points]
        [('0', 4, 8)]
    """
    ratios = _levels(levels)
    given = enter(data, calibration=calibration, test=test)
    samples = _samples(given, batches)
    example = given.example() if example is None else example
    model = admit(model, copied=True)
    candidates = _candidates(model, example, granularity, protect, seed)
    members = _members({group.name: group.size for group in candidates.groups}, patterns)
    rule, loss = criterion_of(criterion), as_loss(loss)
    context = Context(
        model, candidates.groups, data=samples, loss=loss, example=example, seed=seed, capture=candidates.trace
    )
    meter = _Meter(candidates, rule.score(context), _gauges(model, samples, evaluate, loss))
    common: dict[str, Json] = {
        "what": "sensitivity", "model": hash_model(model), "data": hash_batches(samples), "seed": seed,
        "criterion": {"name": rule.name, **rule.options()},
        "granularity": [kind.spec() for kind in candidates.request.granularity],
        "figure": meter.gauge.name,
    }  # fmt: skip
    # A function or a loss of the user's has no hash, so what it measured is not found again by another one.
    folder = None if cache is None or evaluate is not None or loss is not None else Path(cache)
    points: list[SensitivityPoint] = []
    measured = 0
    for name, found in members.items():
        for ratio in ratios:
            if progress is not None:
                progress(len(points), len(members) * len(ratios))
            key = key_of(**common, members=list(found), ratio=ratio)
            known = _kept(folder, key)
            points.append(meter.point(name, list(found), ratio) if known is None else known)
            measured += known is None
            if folder is not None and known is None:
                folder.mkdir(parents=True, exist_ok=True)
                atomic_write(folder / f"{key}.json", canonical_json({**asdict(points[-1]), "key": key}))
    return Sensitivity(
        meter.gauge.name, meter.gauge.unit(meter.before), meter.before.figure, tuple(points), members, measured
    )


class _Meter:
    """Measures single groups of one model."""

    def __init__(
        self, candidates: Candidates, scores: Mapping[str, Tensor], gauges: tuple[Gauge, Gauge | None]
    ) -> None:
        self.candidates, self.scores, (self.gauge, self.losses) = candidates, scores, gauges
        self.before: GaugeReading = self.gauge.read(candidates.model)
        self._loss = None if self.losses is None else self.losses.read(candidates.model)

    def point(self, name: str, members: Sequence[str], ratio: float) -> SensitivityPoint:
        """Without the lowest units of some groups."""
        keep, removed, total = {}, 0, 0
        for group in self.candidates.groups:
            keep[group.name] = torch.ones(group.shape, dtype=torch.bool)
            if group.name not in members:
                continue
            total += group.size
            least = self.candidates.least(group, "local")
            gone = min(round(ratio * group.size), group.size - least)
            keep[group.name].view(-1)[self._worst(group.name)[:gone]] = False
            removed += gone
        reading, loss = self.before, self._loss
        if removed:
            model = self._without(keep)
            reading, loss = self.gauge.read(model), None if self.losses is None else self.losses.read(model)
        fall = self.gauge.fall(self.before, reading, confidence=0.95).amount
        worse = None
        if self.losses is not None and self._loss is not None and loss is not None:
            worse = self.losses.fall(self._loss, loss, confidence=0.95).amount
        return SensitivityPoint(name, ratio, removed, total, reading.figure, fall, worse)

    def _worst(self, name: str) -> Tensor:
        group = next(one for one in self.candidates.groups if one.name == name)
        worth, stays = self.scores[name].double().flatten().cpu(), self.candidates.stays(group)
        worth = worth if stays is None else worth.masked_fill(stays.flatten().cpu(), torch.inf)
        return worth.argsort(stable=True)

    def _without(self, keep: Mapping[str, Tensor]) -> nn.Module:
        # Not proved: nothing of it is handed on. Whatever plan comes of it is proved as every plan is.
        model, edit = self.candidates.model, self.candidates.write(keep)
        result = edit.copy(model)
        masks = edit.masks_after(model)
        if masks:
            mask_model(result, masks, keep_originals=False)
        return result


def _levels(levels: Sequence[float]) -> list[float]:
    for level in levels:
        if isinstance(level, bool) or not isinstance(level, (int, float)) or not 0 < level < 1:
            hint = (
                f"write {level / 100:g}" if isinstance(level, (int, float)) and 1 < level < 100 else "for example 0.5"
            )
            raise RecipeError(f"level {level!r} is no fraction that goes, between 0 and 1", hint=hint)
    if not levels:
        raise RecipeError("there is no level", hint=f"leave levels out for {list(LEVELS)}")
    return sorted({float(level) for level in levels})


def _samples(given: Parts, batches: int) -> list[object]:
    if given.scoring is None:
        raise InputError("There are no data to measure on.", hint="Pass data= with batches that have targets.")
    if isinstance(batches, bool) or not isinstance(batches, int) or batches < 0:
        raise RecipeError(f"batches={batches!r} is not a whole number of at least 0", hint="0 reads all of them")
    # Held in memory: all ratios are measured on the very same samples.
    with torch.random.fork_rng(devices=[]):
        found = list(islice(iter(given.scoring), batches or None))
    if not found:
        raise InputError("the data hold no batch", hint="is the loader empty or used up?")
    return found


def _candidates(
    model: nn.Module, example: Example, granularity: GranularityLike | None, protect: Protect, seed: int
) -> Candidates:
    unit, kinds = units_of(granularity, example)
    request = Request(target=None, granularity=spelt_out(kinds), protect=patterns_of(model, protect), seed=seed)
    candidates = candidates_of(model, example, request, unit)
    if isinstance(candidates, Weights) and isinstance(candidates.unit, NM):
        raise RecipeError(f"granularity {candidates.unit.name!r} has no ratios.", why="the pattern fixes how much goes")
    return candidates


def _members(sizes: Mapping[str, int], patterns: Sequence[str]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for group, size in sizes.items():
        first = next((one for one in patterns if fnmatchcase(group, one)), group)
        found.setdefault(first, {})[group] = size
    idle = [one for one in patterns if one not in found]
    if idle:
        raise RecipeError(f"the pattern {idle[0]!r} matches no group", hint=f"groups: {', '.join([*sizes][:12])}")
    return found


def _gauges(
    model: nn.Module, samples: Sequence[object], evaluate: Judge | None, loss: Loss | None
) -> tuple[Gauge, Gauge | None]:
    """How quality is read, and the loss where that is another figure."""
    gauge = gauge_of(model, samples, evaluate, loss)
    return gauge, loss_gauge(samples, loss or default_loss) if gauge.name == "accuracy" else None


def _kept(folder: Path | None, key: str) -> SensitivityPoint | None:
    if folder is None or not (folder / f"{key}.json").exists():
        return None
    found = cast(dict[str, object], load_json(folder / f"{key}.json"))
    # Whatever is not what its name says is measured again.
    if not isinstance(found, dict) or found.pop("key", None) != key:
        return None
    return SensitivityPoint(**found)  # type: ignore[arg-type]


def _cost(one: SensitivityPoint) -> float:
    return one.fall if one.loss is None else one.loss


def _rising(curve: Sequence[SensitivityPoint]) -> list[SensitivityPoint]:
    """The points of a curve at which another number of units went; small groups meet several ratios with one."""
    before = [0, *(one.removed for one in curve)]
    return [one for number, one in enumerate(curve) if one.removed > before[number]]
