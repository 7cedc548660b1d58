"""The runs of a comparison for one seed: score once, then prune, recover and measure for every level."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import cast

from torch import nn

from secateur.comparison.cells import AS_IS, DENSE, INVERTED, SCRATCH, SHUFFLED, Cell, cells_of
from secateur.comparison.contestants import REFERENCE, Contestant
from secateur.comparison.fidelity import loss_changes, pick, score_fidelity
from secateur.comparison.hashes import Watched, hash_batches, hash_model, key_of
from secateur.comparison.protocol import Protocol
from secateur.comparison.records import Outcome, RowLatency, RunRow, ScoreFidelity, ScoringCost
from secateur.comparison.recoveries import NO_RECOVERY, CheckedSteps
from secateur.comparison.scoring import epoch_seconds, inverted, measure_scores, shuffled
from secateur.comparison.scratch import reinitialise
from secateur.comparison.store import Scored, Store
from secateur.criteria.base import Context
from secateur.errors import (
    FileRefusedError,
    InputError,
    NonFiniteError,
    RecipeError,
    SecateurError,
    TargetError,
    UnsupportedError,
)
from secateur.files.seeds import seed_everything
from secateur.measure import latency, macs, num_nonzero, num_params, quality
from secateur.model.call import device_of
from secateur.planning import Plan, make_plan
from secateur.planning.build import grouped, is_structured
from secateur.recover.damage import Damage, damage_of, untouched
from secateur.recover.steps import recover
from secateur.types import Batch, Data, Evaluate, Example, Json, Latency, Loss


@dataclass(frozen=True, eq=False)
class Material:
    """What all runs of a comparison work with.

    Args:
        batches: what is scored with: the same objects in the same order for every criterion.
        train: what is recovered with, or None.
        example: forward inputs.
        evaluate: quality.
        loss: of scoring and recovery, or None for the default.
        store: where results are kept.
    """

    batches: Sequence[Batch]
    train: Data | None
    example: Example
    evaluate: Evaluate
    loss: Loss | None
    store: Store


@dataclass(frozen=True, eq=False)
class _Pruned:
    """The plan of one criterion, variant and level, and the model that it leaves."""

    address: tuple[str, str, float]
    plan: Plan
    model: nn.Module


class SeedRun:
    """All runs that share a base model.

    Args:
        protocol: what is the same for all criteria.
        contestants: the criteria.
        material: what is scored, recovered and measured with.
        seed: of scores and recovery.
        base: the model that every run starts from; never changed.
    """

    def __init__(
        self, protocol: Protocol, contestants: Sequence[Contestant], material: Material, *, seed: int, base: nn.Module
    ) -> None:
        self.protocol, self.contestants, self.seed = protocol, {one.label: one for one in contestants}, seed
        self.base, self.material = base, material
        self.base_hash = hash_model(base)
        self._common: dict[str, Json] = {
            **protocol.of_cell(), "base": self.base_hash, "seed": seed, "device": str(device_of(base))
        }  # fmt: skip
        self._data_hash = hash_batches(material.batches)
        self._scored: dict[str, Scored | SecateurError] = {}
        # None is an answer (there is no loss to pass with), so "not measured yet" is the empty list.
        self._epoch: list[float | None] = []
        self._pruned: _Pruned | None = None

    def cells(self) -> list[Cell]:
        """The runs of this seed, with their addresses."""
        found = cells_of(self.protocol, list(self.contestants.values()), self.seed)
        return [replace(cell, key=self._key(cell)) for cell in found]

    def result(self, cell: Cell) -> tuple[RunRow, bool]:
        """The result of a run, and whether it was there already."""
        known = self.material.store.cell(cell.key)
        if known is not None:
            return known, True
        # Seeded run by run: what a run draws must not depend on which runs were there already.
        with seed_everything(self.seed):
            row = self._attempt(cell)
        self.material.store.put_cell(row)
        return row, False

    def fidelity(self) -> dict[str, ScoreFidelity]:
        """How well every criterion's scores rank the measured changes of the loss; empty where they cannot be had.

        Leaving an expert out is more than zeros in its weights, since the router then chooses others: not measured.
        """
        wanted, material = self.protocol, self.material
        if not wanted.probes or wanted.granularity == "expert":
            return {}
        groups, _ = grouped(self.base, material.example, wanted.granularity, wanted.protect)
        picks = pick(groups, wanted.probes, self.seed)
        key = key_of(common=self._common, data=self._data_hash, what="changes of the loss", probes=wanted.probes)
        found = material.store.scores(key)
        if found is None:
            truth = loss_changes(self.base, groups, picks, material.batches, material.loss)
            if truth is None:
                return {}
            material.store.put_scores(key, Scored({name: truth[name] for name in picks}, None))
        else:
            truth = found.scores
        told = {}
        for label in self.contestants:
            # A criterion that cannot score these units is among the refused runs already.
            with suppress(SecateurError):
                told[label] = score_fidelity(self._scores(label).scores, picks, truth)
        return told

    # -- addresses ------------------------------------------------------------------------------------------------

    def _key(self, cell: Cell) -> str:
        return key_of(
            common=self._common,
            data=self._data_hash,
            criterion=self._identity(cell.label),
            variant=cell.variant,
            level=cell.level,
            # The steps and not their name: a recovery that is called otherwise is the same recovery.
            steps=list(self._steps(cell)),
        )

    def _steps(self, cell: Cell) -> CheckedSteps:
        return self.protocol.scratch if cell.recovery == SCRATCH else self.protocol.recoveries[cell.recovery]

    def _identity(self, label: str) -> dict[str, Json]:
        return {"name": label} if label == DENSE else self.contestants[_chooser(label)].identity

    # -- one run --------------------------------------------------------------------------------------------------

    def _attempt(self, cell: Cell) -> RunRow:
        one = self.contestants.get(cell.label)
        row: RunRow = {
            "seed": cell.seed, "criterion": cell.label, "variant": cell.variant, "level": cell.level,
            "recovery": cell.recovery, "control": one is None or one.control,
            "options": {} if one is None else one.criterion.options(), "base": self.base_hash,
            "status": "ok", "why": "", "key": cell.key,
        }  # fmt: skip
        try:
            return {**row, **self._run(cell)}
        except NonFiniteError as error:
            return {**row, "status": "diverged", "why": error.what}
        except FileRefusedError:
            raise  # a full disk says nothing about the criterion
        except (InputError, RecipeError, TargetError, UnsupportedError) as error:
            return {**row, "status": "refused", "why": f"{error.what} {error.why}".strip()}

    def _run(self, cell: Cell) -> Outcome:
        facts: Outcome
        if cell.label == DENSE:
            model = copy.deepcopy(self.base)
            facts = {"scoring": None, "least_kept": 1.0, "units_removed": 0, "sparsity": 0.0}
            damage = untouched(self.base)
        else:
            cost = self._scores(_chooser(cell.label)).cost
            found = self._prune(cell)
            # A copy: the next recovery starts from the same cut model.
            model = copy.deepcopy(found.model)
            damage = damage_of(self.base, found.plan, found.model)
            facts = {"scoring": cost, **_decision(found.plan)}
        if cell.label == SCRATCH:
            reinitialise(model, self.seed)
        facts = {**facts, **self._recover(model, cell, damage)}
        facts["params"], facts["nonzero"] = num_params(model), num_nonzero(model)
        facts["macs"] = macs(model, self.material.example)
        facts["quality"] = quality(model, self.material.evaluate)
        # Zeros and training change no speed, and shuffled or inverted scores leave layers of the same sizes.
        if cell.recovery == NO_RECOVERY and cell.variant == AS_IS and not damage.masks and cell.label != DENSE:
            facts = {**facts, **self._latency(model)}
        return facts

    def _prune(self, cell: Cell) -> _Pruned:
        """The plan of a cell and the model that it leaves; kept for the recoveries that follow."""
        label = _chooser(cell.label)
        address = (label, cell.variant, cell.level)
        if self._pruned is None or self._pruned.address != address:
            scores = self._scores(label).scores
            if cell.variant == SHUFFLED:
                scores = shuffled(scores, self.seed)
            elif cell.variant == INVERTED:
                scores = inverted(scores)
            wanted = self.protocol
            plan = make_plan(
                self.base,
                self.material.example,
                target=wanted.target(cell.level),
                scores={name: score.to(device_of(self.base)) for name, score in scores.items()},
                comparable=self.contestants[label].criterion.comparable,
                granularity=wanted.granularity,
                scope=wanted.scope,
                allocation=wanted.allocation,
                protect=wanted.protect,
                round_to=1,  # a grid would make every criterion miss its level by another amount
                seed=self.seed,
            )
            self._pruned = _Pruned(address, plan, plan.apply(self.base))
        return self._pruned

    def _scores(self, label: str) -> Scored:
        """Scores from memory, from the store, or computed: once per seed and criterion, whatever the levels."""
        if label not in self._scored:
            self._scored = {}  # one criterion at a time: element scores are as large as the model
            key = key_of(common=self._common, data=self._data_hash, criterion=self._identity(label))
            found = self.material.store.scores(key)
            if found is None:
                try:
                    found = self._compute(label)
                except SecateurError as error:
                    # Kept as well: every level would pay for the same refusal again.
                    self._scored[label] = error
                    raise
                self.material.store.put_scores(key, found)
            self._scored[label] = found
        kept = self._scored[label]
        if isinstance(kept, SecateurError):
            raise kept
        return kept

    def _compute(self, label: str) -> Scored:
        material, wanted = self.material, self.protocol
        if not self._epoch:
            self._epoch.append(epoch_seconds(self.base, material.batches, material.loss))
        groups, trace = grouped(self.base, material.example, wanted.granularity, wanted.protect)
        if not groups:
            raise UnsupportedError(
                f"nothing of {type(self.base).__name__} can be pruned at granularity {wanted.granularity!r}"
            )
        context = Context(
            self.base,
            groups,
            data=material.batches,
            loss=material.loss,
            example=material.example,
            seed=self.seed,
            capture=trace,
        )
        scores, cost = measure_scores(self.contestants[label].criterion, context)
        unit = self._epoch[0]
        told: ScoringCost = {
            "seconds": cost.seconds,
            "work_seconds": cost.work_seconds,
            "peak_bytes": cost.peak_bytes,
            "epochs": cost.work_seconds / unit if unit else None,
        }
        return Scored(scores, told)

    def _recover(self, model: nn.Module, cell: Cell, damage: Damage) -> Outcome:
        steps = self._steps(cell)
        if not steps:
            return {"recovery_seconds": 0.0, "recovery_batches": 0, "recovery_hash": ""}
        material = self.material
        # A refit reads the scoring samples alone, so it needs no training data.
        watched, started = Watched(() if material.train is None else material.train), time.perf_counter()
        for step in steps:
            recover(
                model, step, damage, train=watched, scoring=material.batches, loss=material.loss, seed=self.seed
            )  # fmt: skip
        seconds = time.perf_counter() - started
        return {"recovery_seconds": seconds, "recovery_batches": watched.batches, "recovery_hash": watched.seen}

    def _latency(self, model: nn.Module) -> Outcome:
        if not self.protocol.rounds or not is_structured(self.protocol.granularity):
            return {}
        # In turns with the dense model: what a busy machine does to one of them it does to both.
        timed = latency({"dense": self.base, "cut": model}, self.material.example, rounds=self.protocol.rounds)
        return {"latency_ms": _row_latency(timed["cut"]), "dense_latency_ms": _row_latency(timed["dense"])}


def _chooser(label: str) -> str:
    """The criterion that decides what goes: the scratch control is trained in the reference's shape."""
    return REFERENCE if label == SCRATCH else label


def _row_latency(found: Latency) -> RowLatency:
    # A list, which is what JSON gives back: a row must be the same whether it was measured now or read.
    plain = {**asdict(found), "ratio": None if found.ratio is None else list(found.ratio)}
    return cast(RowLatency, plain)


def _decision(plan: Plan) -> Outcome:
    units, known = plan.units, plan.evidence
    shares = {} if known is None else {name: float(kept.float().mean()) for name, kept in known.keep.items()}
    return {
        "units_removed": units["removed"],
        "units_total": units["total"],
        "sparsity": units["sparsity"],
        "certificate": None if plan.certificate is None else plan.certificate.max_abs_error,
        "least_kept": min(shares.values(), default=1.0),
        "emptied": sum(share == 0 for share in shares.values()),
        "kept": shares,
    }
