"""The recipes of a search: a base, and what of it may be chosen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.errors import FileRefusedError, RecipeError
from secateur.files.seeds import canonical_json
from secateur.files.sniff import open_regular
from secateur.recipe import Recipe, load_recipe
from secateur.recipe.load import bundled
from secateur.recipe.overrides import Setting
from secateur.recipe.reader import MAX_BYTES, read_yaml
from secateur.types import Json

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import Trial

MOST_KEYS = 50
HINT = 'for example "criterion: [magnitude, taylor]" and "target.macs: {low: 0.2, high: 0.8}"'
SENSITIVITY = "sensitivity"
PLAIN_ALLOCATIONS = frozenset({"global", "uniform", "erk"})  # these look at weights and shapes only
Params = Mapping[str, object]  # key of the space -> what was chosen, as Optuna keeps it: a number or a text


@dataclass(frozen=True)
class Options:
    """One of several values.

    Args:
        values: as a recipe writes them.
    """

    values: tuple[Json, ...]

    @property
    def words(self) -> tuple[str, ...]:
        """The values as text: storages of studies hold texts and numbers, and a value may be a mapping."""
        return tuple(value if isinstance(value, str) else canonical_json(value).strip() for value in self.values)

    def distribution(self) -> BaseDistribution:
        """As Optuna has it."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.words)

    def suggest(self, trial: Trial, key: str) -> str:
        """Let a trial choose."""
        return str(trial.suggest_categorical(key, self.words))

    def value(self, chosen: object) -> Json:
        """What a text stands for."""
        return self.values[self.words.index(str(chosen))]

    def chosen(self, value: object) -> str | None:
        """The text of a value; None where it is none of them."""
        same = [word for word, own in zip(self.words, self.values, strict=True) if own == value]
        return same[0] if same else None


@dataclass(frozen=True)
class NumberRange:
    """A number between two.

    Args:
        low: the lowest.
        high: the highest; both may be chosen.
        log: whether tenfold steps count alike.
        whole: whether only whole numbers are meant.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def distribution(self) -> BaseDistribution:
        """As Optuna has it."""
        from optuna.distributions import FloatDistribution, IntDistribution

        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log)
        return FloatDistribution(self.low, self.high, log=self.log)

    def suggest(self, trial: Trial, key: str) -> float:
        """Let a trial choose."""
        if self.whole:
            return trial.suggest_int(key, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(key, self.low, self.high, log=self.log)

    def three(self, *, removed: bool) -> tuple[float, float, float]:
        """The lowest, the geometric middle and the highest; of what is left, where these are shares that go."""
        if removed:
            middle = 1 - math.sqrt((1 - self.low) * (1 - self.high))
        else:
            middle = math.sqrt(self.low * self.high) if self.low > 0 else (self.low + self.high) / 2
        return self.low, round(middle) if self.whole else middle, self.high

    def value(self, chosen: object) -> Json:
        """The number, with no more digits than a recipe needs to be read."""
        number = float(chosen)  # type: ignore[arg-type]
        return int(number) if self.whole else float(f"{number:.4g}")

    def chosen(self, value: object) -> float | None:
        """The number itself; None where it lies outside."""
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        inside = number and self.low <= value <= self.high  # type: ignore[operator]
        return float(value) if inside else None  # type: ignore[arg-type]


@dataclass(frozen=True)
class RecipeSpace:
    """What a search may choose from.

    Args:
        base: the recipe that every other one comes from.
        keys: dotted key of a recipe -> what it may be.
    """

    base: Recipe
    keys: Mapping[str, Options | NumberRange]

    @property
    def spreads_by_curves(self) -> bool:
        """Whether allocation "sensitivity" may be chosen."""
        choice = self.keys.get("allocation")
        return isinstance(choice, Options) and SENSITIVITY in choice.words

    def recipe(self, params: Params, curves: Json = None) -> Recipe:
        """The recipe of a choice.

        Args:
            params: what was chosen.
            curves: of allocation "sensitivity", where that was chosen.

        Raises:
            RecipeError: no recipe has these values together.
        """
        settings = []
        for key, choice in self.keys.items():
            value = choice.value(params[key])
            if key == "allocation" and value == SENSITIVITY:
                value = curves
            parts = tuple(key.split("."))
            settings.append(Setting(parts, value, f"space {key}", replaces="target" if parts[0] == "target" else ""))
        return load_recipe(self.base, settings)

    def projected(self, recipe: Recipe) -> dict[str, object]:
        """What of a recipe can be chosen here: where a search may start."""
        plain = recipe.model_dump(mode="json", by_alias=True)
        found = {key: choice.chosen(_at(plain, key.split("."))) for key, choice in self.keys.items()}
        return {key: value for key, value in found.items() if value is not None}

    def starts(self) -> Iterator[dict[str, object]]:
        """Choices that are known to be sound: the base, what bundled ones have of these keys, and `over_the_range`."""
        seen = []
        for found in chain(self._bundled(), self.over_the_range()):
            if found and found not in seen:
                seen.append(found)
                yield found

    def _bundled(self) -> Iterator[dict[str, object]]:
        for recipe in (self.base, *map(load_recipe, bundled())):
            found = self.projected(recipe)
            # Of a recipe of another granularity the amounts mean something else.
            if recipe.granularity == self.base.granularity or "granularity" in found:
                yield found

    def over_the_range(self) -> Iterator[dict[str, object]]:
        """The base at both ends and the middle of its amounts, spread in each way that needs no measurement.

        The middle is the geometric mean of what the ends leave. Nothing where no amount, or more than one, is a range.
        """
        amounts = {key: one for key, one in self.keys.items() if key.startswith("target.")}
        if len(amounts) != 1 or not isinstance(only := next(iter(amounts.values())), NumberRange):
            return
        (key,) = amounts
        spread = self.keys.get("allocation")
        words = [word for word in spread.words if word in PLAIN_ALLOCATIONS] if isinstance(spread, Options) else []
        ways: list[dict[str, object]] = [{"allocation": word} for word in words]
        start = self.projected(self.base)
        for amount in only.three(removed=key == "target.sparsity"):
            yield from ({**start, key: amount, **way} for way in ways or [{}])

    def to_data(self) -> dict[str, Json]:
        """What decides about the recipes, as plain data."""
        keys: dict[str, Json] = {
            key: list(one.words) if isinstance(one, Options) else [one.low, one.high, one.log, one.whole]
            for key, one in self.keys.items()
        }
        return {"base": self.base.model_dump(mode="json", by_alias=True, exclude_none=True), "keys": keys}


def load_space(source: str | Path | Mapping[str, object]) -> RecipeSpace:
    """Read a space: a YAML file, or a mapping.

    The key ``base`` is a recipe: the name of a bundled one, a file beside this one, or written out; every other key is
    a dotted key of a recipe with a list of values or with {low, high}, and log: true where steps are tenfold.

    Raises:
        RecipeError: no key to choose, a range that is none, or a value that no recipe may have.
        FileRefusedError: the file cannot be read.
    """
    origin, data = ("space", source) if isinstance(source, Mapping) else (str(source), _read(Path(source)))
    if not isinstance(data, Mapping) or not data:
        raise RecipeError(f"{origin}: a space is a mapping of keys to choices", hint=HINT)
    given = dict(data)
    base = given.pop("base", "channel-half-macs")
    if not isinstance(base, (str, Mapping)):
        raise RecipeError(f"{origin}: base: a recipe is needed, not {base!r}", hint="write the name of one")
    beside = None if isinstance(source, Mapping) else Path(source).parent / str(base)
    recipe = load_recipe(beside if isinstance(base, str) and beside is not None and beside.is_file() else base)
    if not given or len(given) > MOST_KEYS:
        raise RecipeError(f"{origin}: there are {len(given)} keys to choose, not 1 to {MOST_KEYS}", hint=HINT)
    space = RecipeSpace(recipe, {str(key): _choice(origin, str(key), value) for key, value in given.items()})
    _try_every(origin, space)
    return space


def _read(path: Path) -> object:
    with open_regular(path) as stream:
        data = stream.read(MAX_BYTES + 1)
    try:
        return read_yaml(data.decode("utf-8-sig"), str(path)).data
    except UnicodeDecodeError as error:
        raise FileRefusedError(f"{path} is no text", hint=HINT) from error


def _choice(origin: str, key: str, value: object) -> Options | NumberRange:
    if isinstance(value, list) and value:
        return Options(tuple(value))
    if not isinstance(value, Mapping) or not {"low", "high"} <= set(value) <= {"low", "high", "log"}:
        raise RecipeError(f"{origin}: {key}: write a list of values, or {{low, high}}", hint=HINT)
    low, high, log = value["low"], value["high"], value.get("log", False)
    numbers = all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in (low, high))
    if not numbers or not low < high or not isinstance(log, bool) or (log and low <= 0):
        raise RecipeError(f"{origin}: {key}: {dict(value)} is no range", hint="low is below high, and above 0 with log")
    return NumberRange(float(low), float(high), log, isinstance(low, int) and isinstance(high, int))


def _try_every(origin: str, space: RecipeSpace) -> None:
    """Refuse values that no recipe may have now, and not in the middle of a night."""
    first = {key: _ends(choice)[0] for key, choice in space.keys.items()}
    curves: Json = {"name": SENSITIVITY, "curves": [{"group": "any", "ratios": [0.5], "falls": [1.0]}]}
    for key, choice in space.keys.items():
        for end in _ends(choice):
            try:
                space.recipe({**first, key: end}, curves)
            except RecipeError as error:
                raise RecipeError(f"{origin}: {error.what}", why=error.why, hint=error.hint) from error


def _ends(choice: Options | NumberRange) -> Sequence[object]:
    return choice.words if isinstance(choice, Options) else (choice.low, choice.high)


def _at(plain: object, keys: Sequence[str]) -> object:
    for key in keys:
        if isinstance(plain, Mapping):
            plain = plain.get(key)
        elif isinstance(plain, Sequence) and not isinstance(plain, str) and key.isdigit() and int(key) < len(plain):
            plain = plain[int(key)]
        else:
            return None
    return plain
