"""What is held fixed in a comparison, as data: criteria, controls, levels, recoveries, seeds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import secateur
from secateur.criteria.base import Criterion
from secateur.errors import RecipeError
from secateur.files.seeds import canonical_json, stable_hash
from secateur.kinds.weights.granularity import Granularity, parse
from secateur.kinds.weights.nm import NM
from secateur.model.tensors import named_tensors
from secateur.planning.build import criterion_of, is_structured
from secateur.recipe import load_recipe
from secateur.types import Batch, Data

SCHEMA = 1
REFERENCE = "magnitude"
DENSE, SCRATCH, RANDOM = "dense", "scratch", "random"
NO_RECOVERY = "none"
ELEMENT_LEVELS = (0.5, 0.67, 0.8, 0.9, 0.95, 0.98)  # geometric in what is left
CUT_LEVELS = (0.2, 0.35, 0.5, 0.65, 0.75, 0.85)  # of the multiply-accumulates
MATCHES = ("macs", "params", "units")

Choice = str | Mapping[str, Any] | Criterion
Steps = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Entry:
    """One criterion of a comparison.

    Args:
        label: how the tables call it; unique.
        rule: the criterion.
        control: whether it was added by the protocol and not asked for.
    """

    label: str
    rule: Criterion
    control: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        """Name and options, as they go into hashes."""
        return {"name": self.rule.name, **self.rule.options()}


@dataclass(frozen=True)
class Protocol:
    """Everything that is the same for all criteria; its hash goes into every cell.

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
        metric: the quality that is compared.
        maximize: whether higher is better.
        rounds: timed rounds of the latency of cut models; 0 = not timed.
        confidence: of the intervals; 1 - confidence is the level of the tests.
        probes: units per seed that are set to zero one by one, to see what each score tells of the loss; 0 = none.
        scratch: steps with which the equal-size network is trained from new weights; empty = not run.
        tag: free text for what cannot be hashed (the loss and evaluate functions).

    Raises:
        RecipeError: a confidence that is no probability, or a negative number of probes.
    """

    granularity: str | dict[str, Any]
    match: str
    levels: tuple[float, ...]
    recoveries: dict[str, tuple[dict[str, Any], ...]]
    recover_levels: tuple[float, ...]
    ablation_levels: tuple[float, ...]
    scope: str
    allocation: str
    protect: tuple[str, ...]
    seeds: tuple[int, ...]
    metric: str
    maximize: bool
    rounds: int
    confidence: float
    probes: int = 0
    scratch: tuple[dict[str, Any], ...] = ()
    tag: str = ""

    def __post_init__(self) -> None:
        """Refuse a confidence that is none, and a negative count."""
        if not 0 < self.confidence < 1:
            raise RecipeError(f"confidence={self.confidence} is no probability", hint="for example 0.95")
        if self.probes < 0:
            raise RecipeError(f"probes={self.probes} is negative", hint="0 measures no units, 64 is the default")

    def of_cell(self) -> dict[str, Any]:
        """The part that decides about a single cell: levels and seeds may be added later without losing cells."""
        return {
            "schema": SCHEMA,
            "secateur": secateur.__version__,
            "torch": str(torch.__version__).partition("+")[0],
            "granularity": self.granularity,
            "match": self.match,
            "scope": self.scope,
            "allocation": self.allocation,
            "protect": list(self.protect),
            "rounds": self.rounds,
            "tag": self.tag,
        }

    def target(self, level: float) -> dict[str, float]:
        """The plan's target of a level."""
        return {"sparsity": level} if self.match == "units" else {self.match: 1 - level}


def make_entries(criteria: Iterable[Choice]) -> list[Entry]:
    """The criteria with unique labels, the reference and the random control added where they are missing.

    Raises:
        RecipeError: an unknown name, or the same criterion twice.
    """
    # Registered on import; the package's own list may be read later than this module.
    from secateur.criteria.weights.random_control import Random

    asked = [criterion_of(choice) for choice in criteria]
    if not asked:
        raise RecipeError("there is no criterion to compare", hint="for example criteria=['taylor', 'magnitude']")
    entries: list[Entry] = []
    for rule in asked:
        options = _options(rule)
        label = f"{rule.name} {options}" if options else rule.name
        if any(label == entry.label for entry in entries):
            raise RecipeError(f"the criterion {label!r} is named twice", hint="name each one once")
        entries.append(Entry(label, rule, control=rule.name == RANDOM))
    if not any(entry.label == REFERENCE for entry in entries):
        entries.append(Entry(REFERENCE, criterion_of(REFERENCE), control=True))
    if not any(entry.rule.name == RANDOM for entry in entries):
        entries.append(Entry(RANDOM, Random(), control=True))
    return entries


def _options(rule: Criterion) -> str:
    """The options that are not the defaults, shortly."""
    try:
        usual = type(rule)().options()
    except TypeError:
        usual = {}
    return ",".join(f"{key}={value}" for key, value in rule.options().items() if usual.get(key, ...) != value)


def make_levels(
    levels: Sequence[float] | None, match: str, granularity: str | Mapping[str, Any] | Granularity
) -> tuple[float, ...]:
    """The levels in ascending order, checked; an n:m pattern has the one that it implies.

    Raises:
        RecipeError: a level outside (0, 1), none, or one that the pattern cannot have.
    """
    pattern = None if is_structured(granularity) else parse(granularity)
    if isinstance(pattern, NM):
        implied = 1 - pattern.n / pattern.m
        if levels is not None and any(abs(level - implied) > 1e-9 for level in levels):
            raise RecipeError(f"granularity {pattern.name!r} has the one level {implied:g}", hint="leave levels out")
        return (implied,)
    found = sorted(set(levels)) if levels is not None else [*(ELEMENT_LEVELS if match == "units" else CUT_LEVELS)]
    for level in found:
        if isinstance(level, bool) or not 0 < level < 1:
            hint = f"write {level / 100:g}" if 1 <= level < 100 else "for example 0.5"
            raise RecipeError(f"level {level!r} is no fraction removed, between 0 and 1", hint=hint)
    if not found:
        raise RecipeError("there is no level", hint="leave levels out for the default of six")
    return tuple(float(level) for level in found)


def among(name: str, chosen: Sequence[float], levels: Sequence[float]) -> tuple[float, ...]:
    """Levels that were chosen out of all levels.

    Raises:
        RecipeError: one that is not among them.
    """
    for level in chosen:
        if level not in levels:
            raise RecipeError(f"{name}: {level:g} is not among the levels {[*levels]}")
    return tuple(sorted({float(level) for level in chosen}))


def make_match(match: str, granularity: str | Mapping[str, Any] | Granularity) -> str:
    """What levels count: "auto" is macs for cuts (params for experts, which leave the work as it is), units for masks.

    Raises:
        RecipeError: an unknown word, or costs that masks do not change.
    """
    cuts = is_structured(granularity)
    if not cuts:
        parse(granularity)
    if match == "auto":
        return "params" if granularity == "expert" else "macs" if cuts else "units"
    if match not in MATCHES:
        raise RecipeError(f"match={match!r} is not known", hint=f"known: auto, {', '.join(MATCHES)}")
    if match != "units" and not cuts:
        raise RecipeError(f"match={match!r} needs a granularity that is cut", hint="masks remove no MACs: use units")
    return match


def make_recoveries(
    recover: Steps | Mapping[str, Steps] | None,
) -> dict[str, tuple[dict[str, Any], ...]]:
    """Named recoveries with every default filled in; "none" comes first.

    Raises:
        RecipeError: a step that no recipe would take.
    """
    named = recover if isinstance(recover, Mapping) else {"recovered": recover} if recover else {}
    found: dict[str, tuple[dict[str, Any], ...]] = {NO_RECOVERY: ()}
    for name, steps in named.items():
        if name != NO_RECOVERY:
            found[name] = check_steps(steps)
    return found


def check_steps(steps: Steps) -> tuple[dict[str, Any], ...]:
    """Recovery steps as a recipe reads them, with defaults.

    Raises:
        RecipeError: says what is wrong, as for a recipe.
    """
    recipe = load_recipe({"target": {"sparsity": 0.5}, "recover": [dict(step) for step in steps]})
    return tuple(step.model_dump(mode="json", exclude_none=True) for step in recipe.recover)


def plain_granularity(granularity: str | Mapping[str, Any] | Granularity) -> str | dict[str, Any]:
    """As a recipe writes it."""
    if isinstance(granularity, str):
        return granularity
    return dict(granularity) if isinstance(granularity, Mapping) else granularity.options()


# -- hashes of what is compared ------------------------------------------------------------------------------------


def hash_model(model: nn.Module) -> str:
    """SHA-256 over names and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named_tensors(model).items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(_raw(tensor))
    return digest.hexdigest()


def hash_batch(batch: Batch) -> str:
    """SHA-256 over the tensors of a batch, in order."""
    digest = hashlib.sha256()
    for tensor in _tensors(batch):
        digest.update(f"{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(_raw(tensor))
    return digest.hexdigest()


def hash_batches(batches: Iterable[Batch]) -> str:
    """One hash of a sequence of batches; order counts."""
    return stable_hash([hash_batch(batch) for batch in batches])


class Watched:
    """Data that keeps a running hash of every batch it hands out: the proof that two recoveries saw the same.

    Args:
        data: batches; `set_epoch` is passed on where it is there.
    """

    def __init__(self, data: Data) -> None:
        self._data, self._digest = data, hashlib.sha256()
        self.batches = 0

    @property
    def epoch(self) -> int:
        """The epoch that is set."""
        return int(getattr(self._data, "epoch", 0))

    @property
    def seen(self) -> str:
        """Hash of all batches so far."""
        return self._digest.hexdigest()

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on."""
        setter = getattr(self._data, "set_epoch", None)
        if callable(setter):
            setter(epoch)

    def __len__(self) -> int:
        return len(self._data)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._data:
            self.batches += 1
            self._digest.update(hash_batch(batch).encode())
            yield batch


def _raw(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return np.ascontiguousarray(flat.view(torch.uint8).numpy()).tobytes() if flat.numel() else b""


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _tensors(value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


@dataclass(frozen=True)
class Cell:
    """One run: the address under which its result is kept.

    Args:
        seed: of base model, scores and recovery.
        label: the criterion.
        variant: "as is", "shuffled" or "inverted".
        level: fraction removed.
        recovery: name of the recovery.
        key: hash of everything that decides about the result.
    """

    seed: int
    label: str
    variant: str
    level: float
    recovery: str
    key: str = field(compare=False, default="")


def key_of(**parts: Any) -> str:
    """Content address of plain parts."""
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:32]
