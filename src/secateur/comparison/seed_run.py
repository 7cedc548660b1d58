"""The runs of a comparison for one seed: score once, then prune, recover and measure for every level."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from secateur.comparison.cells import AS_IS, DENSE, INVERTED, SCRATCH, SHUFFLED, Cell, cells_of
from secateur.comparison.contestants import REFERENCE, Contestant
from secateur.comparison.fidelity import loss_changes, pick, score_fidelity
from secateur.comparison.hashes import Watched, hash_batches, hash_model, key_of
from secateur.comparison.protocol import Protocol
from secateur.comparison.recoveries import NO_RECOVERY
from secateur.comparison.scoring import epoch_seconds, fixed, inverted, measure_scores, shuffled
from secateur.comparison.scratch import reinitialise
from secateur.comparison.store import Store
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
from secateur.recover.steps import Damage, recover
from secateur.types import Batch, Data, Evaluate, Example, Loss

Row = dict[str, Any]


class SeedRun:
    """All runs that share a base model.

    Args:
        protocol: what is the same for all criteria.
        contestants: the criteria.
        seed: of scores and recovery.
        base: the model that every run starts from; never changed.
        batches: what is scored with: the same objects in the same order for every criterion.
        train: what is recovered with, or None.
        example: forward inputs.
        evaluate: quality.
        loss: of scoring and recovery, or None for the default.
        store: where results are kept.
    """

    def __init__(
        self,
        protocol: Protocol,
        contestants: Sequence[Contestant],
        *,
        seed: int,
        base: nn.Module,
        batches: Sequence[Batch],
        train: Data | None,
        example: Example,
        evaluate: Evaluate,
        loss: Loss | None,
        store: Store,
    ) -> None:
        self.protocol, self.contestants, self.seed = protocol, {e.label: e for e in contestants}, seed
        self.base, self.batches, self.train = base, batches, train
        self.example, self.evaluate, self.loss, self.store = example, evaluate, loss, store
        self.base_hash = hash_model(base)
        self._common = {**protocol.of_cell(), "base": self.base_hash, "seed": seed, "device": str(device_of(base))}
        self._data_hash = hash_batches(batches)
        self._scored: dict[str, tuple[dict[str, Tensor], dict[str, Any]] | SecateurError] = {}
        self._epoch: list[float | None] = []
        self._plan: tuple[tuple[str, str, float], Plan, nn.Module] | None = None

    def cells(self) -> list[Cell]:
        """The runs of this seed, with their addresses."""
        found = cells_of(self.protocol, list(self.contestants.values()), self.seed)
        return [Cell(c.seed, c.label, c.variant, c.level, c.recovery, self._key(c)) for c in found]

    def result(self, cell: Cell) -> tuple[Row, bool]:
        """The result of a run, and whether it was there already."""
        known = self.store.cell(cell.key)
        if known is not None:
            return known, True
        with seed_everything(self.seed):
            row = self._attempt(cell)
        return self.store.put_cell(cell.key, row), False

    def fidelity(self) -> dict[str, dict[str, float | None]]:
        """How well every criterion's scores rank the measured changes of the loss; empty where they cannot be had.

        Leaving an expert out is more than zeros in its weights, since the router then chooses others: not measured.
        """
        wanted = self.protocol
        if not wanted.probes or wanted.granularity == "expert":
            return {}
        groups, _ = grouped(self.base, self.example, wanted.granularity, wanted.protect)
        picks = pick(groups, wanted.probes, self.seed)
        key = key_of(common=self._common, data=self._data_hash, what="changes of the loss", probes=wanted.probes)
        found = self.store.scores(key)
        truth = loss_changes(self.base, groups, picks, self.batches, self.loss) if found is None else found[0]
        if truth is None:
            return {}
        if found is None:
            self.store.put_scores(key, {name: truth[name] for name in picks}, {})
        told = {}
        for label in self.contestants:
            with suppress(SecateurError):
                told[label] = score_fidelity(self._scores(label)[0], picks, truth)
        return told

    # -- addresses ------------------------------------------------------------------------------------------------

    def _key(self, cell: Cell) -> str:
        steps = self.protocol.scratch if cell.recovery == SCRATCH else self.protocol.recoveries[cell.recovery]
        return key_of(
            common=self._common,
            data=self._data_hash,
            criterion=self._identity(cell.label),
            variant=cell.variant,
            level=cell.level,
            steps=list(steps),
        )

    def _identity(self, label: str) -> dict[str, Any]:
        return (
            {"name": label} if label == DENSE else self.contestants[REFERENCE if label == SCRATCH else label].identity
        )

    # -- one run --------------------------------------------------------------------------------------------------

    def _attempt(self, cell: Cell) -> Row:
        entry = self.contestants.get(cell.label)
        row: Row = {
            "seed": cell.seed, "criterion": cell.label, "variant": cell.variant, "level": cell.level,
            "recovery": cell.recovery, "control": entry is None or entry.control,
            "options": {} if entry is None else entry.rule.options(), "base": self.base_hash,
        }  # fmt: skip
        try:
            return {**row, "status": "ok", "why": "", **self._run(cell)}
        except NonFiniteError as error:
            return {**row, "status": "diverged", "why": error.what}
        except FileRefusedError:
            raise
        except (InputError, RecipeError, TargetError, UnsupportedError) as error:
            return {**row, "status": "refused", "why": f"{error.what} {error.why}".strip()}

    def _run(self, cell: Cell) -> Row:
        if cell.label == DENSE:
            model = copy.deepcopy(self.base)
            facts: Row = {"scoring": None, "least_kept": 1.0, "units_removed": 0, "sparsity": 0.0}
            damage = Damage(self.base, {}, {})
        else:
            plan, pruned, scoring = self._pruned(cell)
            model, damage = copy.deepcopy(pruned), Damage(self.base, plan.cuts, plan.masks, plan.layers)
            facts = {"scoring": scoring, **_decision(plan)}
        if cell.label == SCRATCH:
            reinitialise(model, self.seed)
        facts |= self._recover(model, cell, damage)
        facts |= {"params": num_params(model), "nonzero": num_nonzero(model), "macs": macs(model, self.example)}
        facts["quality"] = quality(model, self.evaluate)
        if cell.recovery == NO_RECOVERY and cell.variant == AS_IS and not damage.masks and cell.label != DENSE:
            facts |= self._latency(model)
        return facts

    def _pruned(self, cell: Cell) -> tuple[Plan, nn.Module, dict[str, Any]]:
        label = REFERENCE if cell.label == SCRATCH else cell.label
        scores, cost = self._scores(label)
        address = (label, cell.variant, cell.level)
        if self._plan is None or self._plan[0] != address:
            changed = {
                AS_IS: lambda: scores,
                SHUFFLED: lambda: shuffled(scores, self.seed),
                INVERTED: lambda: inverted(scores),
            }
            rule = fixed(self.contestants[label].rule, changed[cell.variant]())
            wanted = self.protocol
            plan = make_plan(
                self.base,
                self.example,
                target=wanted.target(cell.level),
                criterion=rule,
                granularity=wanted.granularity,
                scope=wanted.scope,
                allocation=wanted.allocation,
                protect=wanted.protect,
                seed=self.seed,
            )
            self._plan = (address, plan, plan.apply(self.base))
        return self._plan[1], self._plan[2], cost

    def _scores(self, label: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Scores from memory, from the store, or computed: once per seed and criterion, whatever the levels."""
        if label not in self._scored:
            self._scored = {}  # one criterion at a time: element scores are as large as the model
            key = key_of(common=self._common, data=self._data_hash, criterion=self._identity(label))
            found = self.store.scores(key)
            if found is None:
                try:
                    found = self._compute(label)
                    self.store.put_scores(key, *found)
                except SecateurError as error:
                    self._scored[label] = error
                    raise
            self._scored[label] = found
        kept = self._scored[label]
        if isinstance(kept, SecateurError):
            raise kept
        return kept

    def _compute(self, label: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if not self._epoch:
            self._epoch.append(epoch_seconds(self.base, self.batches, self.loss))
        wanted, rule = self.protocol, self.contestants[label].rule
        groups, record = grouped(self.base, self.example, wanted.granularity, wanted.protect)
        if not groups:
            raise UnsupportedError(
                f"nothing of {type(self.base).__name__} can be pruned at granularity {wanted.granularity!r}"
            )
        context = Context(
            self.base,
            groups,
            data=self.batches,
            loss=self.loss,
            example=self.example,
            seed=self.seed,
            capture=record,
        )
        scores, cost = measure_scores(rule, context)
        unit = self._epoch[0]
        epochs = None if not unit else cost.work_seconds / unit
        return scores, {**asdict(cost), "epochs": epochs}

    def _recover(self, model: nn.Module, cell: Cell, damage: Damage) -> Row:
        steps = self.protocol.scratch if cell.recovery == SCRATCH else self.protocol.recoveries[cell.recovery]
        if not steps:
            return {"recovery_seconds": 0.0, "recovery_batches": 0, "recovery_hash": ""}
        # A refit reads the scoring samples alone, so it needs no training data.
        watched, started = Watched(() if self.train is None else self.train), time.perf_counter()
        for step in steps:
            recover(model, step, damage, train=watched, scoring=self.batches, loss=self.loss, seed=self.seed)
        seconds = time.perf_counter() - started
        return {"recovery_seconds": seconds, "recovery_batches": watched.batches, "recovery_hash": watched.seen}

    def _latency(self, model: nn.Module) -> Row:
        if not self.protocol.rounds or not is_structured(self.protocol.granularity):
            return {}
        timed = latency({"dense": self.base, "cut": model}, self.example, rounds=self.protocol.rounds)
        return {"latency_ms": asdict(timed["cut"]), "dense_latency_ms": asdict(timed["dense"])}


def _decision(plan: Plan) -> Row:
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
