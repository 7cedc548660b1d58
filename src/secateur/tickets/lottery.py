"""The search for lottery tickets: train, prune, rewind, train again; and the controls that a ticket must beat."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from secateur.comparison.hashes import hash_batch, key_of
from secateur.errors import FileRefusedError, RecipeError
from secateur.files.atomic import atomic_write
from secateur.files.checkpoint import EVERY, PAGE, Checkpoint
from secateur.files.disk import disk_errors
from secateur.files.safe import load_json
from secateur.files.seeds import canonical_json
from secateur.masks.units import Masks
from secateur.measure import Yardstick, yardstick
from secateur.model.admit import admit
from secateur.model.door import Given, Parts, enter
from secateur.model.guard import generators
from secateur.model.hashing import hash_model
from secateur.model.protect import patterns_of, protected
from secateur.model.tensors import named_tensors
from secateur.planning.build import CriterionLike, criterion_of
from secateur.recover.loop import TrainStep, write_tensors
from secateur.recover.own import require_loop
from secateur.registry import real_number, whole_number
from secateur.report.journal import point
from secateur.report.record import TrainingPoint
from secateur.report.watch import LivePage
from secateur.tickets.masks import drawn_masks, levels, next_masks, shuffled
from secateur.tickets.result import CONTROLS, DENSE, TICKET, Row, Tickets
from secateur.tickets.training import Builtin, Bundle, Own, OwnTrain
from secateur.types import Judge, Loss, Progress, Protect, StateDict

Rewind = str | Mapping[str, int]
Protected = Protect | Callable[[nn.Module], Protect]
_PATIENCE = 5.0  # seconds without a page: a search that is over by then needs none
_OTHER = 1_000_003  # other initial weights, and other draws, than those of any seed that somebody asks for


def lottery(
    build: Callable[[int], nn.Module],
    data: Given | None = None,
    *,
    folder: str | Path,
    sparsity: float = 0.9,
    rate: float = 0.2,
    scope: str = "global",
    rewind: Rewind = "init",
    seeds: Sequence[int] = (0, 1, 2),
    controls: Sequence[str] = tuple(CONTROLS),
    control_rounds: Sequence[int] | None = None,
    training: Mapping[str, object] | None = None,
    train: OwnTrain | None = None,
    steps: int | None = None,
    criterion: CriterionLike = "magnitude",
    protect: Protected = (),
    loss: Loss | None = None,
    evaluate: Judge | None = None,
    name: str = "",
    every: float = EVERY,
    progress: Progress | None = None,
) -> Tickets:
    """Find lottery tickets by iterative pruning with rewinding, and train the controls beside them.

    For each seed the dense network is trained, and the state at the rewinding point is kept: weights, buffers,
    optimizer, schedule, random generators and place in the data. Each round masks the lowest of the weights that are
    left, rewinds what remains to that state, and trains to the end. A bad choice for large networks trained at high
    rates with ``rewind="init"``: there only an early step works, or the rates alone.

    Args:
        build: ``build(seed) -> model``, freshly initialised; the seed decides the weights, and the global generators
            are seeded with it as well.
        data: training batches, or a mapping of train and test, or a `DataSet`.
        folder: every network gets a folder named by the hash of what decides about it. What is there is not done
            again, and a training that was interrupted goes on where it was. Of a search that takes more than some
            seconds it holds progress.html, which draws the training that goes on.
        sparsity: of the last round.
        rate: share of the remaining weights that each round masks.
        scope: "global", or "local" for the same share of every layer.
        rewind: "init"; {"step": k} or {"epoch": e} of the dense training; or "rates": weights stay as they were
            trained, and only the learning rates start again.
        seeds: of weights, data order and everything random.
        controls: any of "reinit", "random" and "shuffled".
        control_rounds: rounds that get controls, from 1; all by default.
        training: keywords of `secateur.recover.finetune`: epochs or steps, optimizer, schedule, warmup_steps,
            accumulate, amp.
        train: a loop of your own in its place, ``train(model, span) -> state``; masks are held through every step of
            whatever optimizers it makes. See `secateur.tickets.Span`.
        steps: of `train` in all.
        criterion: scores single weights.
        protect: what stays whole, as for `secateur.plan`: names, patterns, classes of modules; or, since `build` makes
            every model anew, a function of the model that returns these or modules and parameters of it.
        loss: ``loss(model, batch) -> scalar``.
        evaluate: as for `secateur.prune`; the test part is what it measures on by default.
        name: distinguishes trainings that differ by their code (`loss`, `train`) and not by their data.
        every: seconds between two states of a training.
        progress: called as ``progress(what, done, total)``.

    Returns:
        The rows, with table and plot; rows.csv, table.md and plot.svg are in the folder.

    Raises:
        RecipeError: an option that is unknown or out of range.
        InputError: no data where they are needed; NaN or Inf.
        FileRefusedError: a damaged file, or a folder that another process works on.

    Cost: one training per seed and round, and one more per control.

    Source: Frankle and Carbin, "The Lottery Ticket Hypothesis", 2019, section 1; Frankle et al., "Linear Mode
        Connectivity and the Lottery Ticket Hypothesis", 2020, section 2 (rewinding to an early step); Renda, Frankle,
        Carbin, "Comparing Rewinding and Fine-tuning", 2020 (rates).
    """
    _check(sparsity, rate, scope, rewind, seeds, controls, control_rounds)
    if not callable(build) or isinstance(build, nn.Module):
        raise RecipeError(f"build= is a {type(build).__name__}", hint="a function: build(seed) -> a new model")
    given = enter(data)
    trainer = _trainer(given, loss, training, train, steps)
    step = 0 if rewind == "init" else None if rewind == "rates" else trainer.step_of(cast(Mapping[str, int], rewind))
    rule = criterion_of(criterion)
    whole = _protected(build, seeds[0], protect)
    config: dict[str, Any] = {
        "format": 1,
        "rate": rate,
        "scope": scope,
        "rewind": "rates" if step is None else step,
        "criterion": {"name": rule.name, **rule.options()},
        "protect": list(whole),
        "training": dict(training or {"epochs": 1}) if train is None else {"own": True, "steps": steps},
        "name": name,
        "data": "" if given.train is None else hash_batch(given.first()),
    }
    search = _Search(build, given, Path(folder), trainer, step, config, rule, whole, loss, evaluate, every, progress)
    targets = levels(sparsity, rate)
    wanted = range(1, len(targets) + 1) if control_rounds is None else control_rounds
    if max(wanted, default=0) > len(targets):
        raise RecipeError(
            f"control_rounds={list(wanted)}, and there are {len(targets)} rounds",
            hint=f"{rate:g} of the rest in each round reaches {sparsity:g} by then",
        )
    search.page = LivePage(Path(folder) / PAGE, "lottery tickets", after=_PATIENCE)
    try:
        rows = [row for seed in seeds for row in search.rows(seed, targets, controls, set(wanted))]
    finally:
        search.page.close()
    found = Tickets(tuple(rows), Path(folder), config)
    found.write()
    return found


@dataclass
class _Search:
    """One search: everything that its networks share."""

    build: Callable[[int], nn.Module]
    given: Parts
    folder: Path
    trainer: Builtin | Own
    step: int | None
    config: dict[str, Any]
    rule: CriterionLike
    protect: tuple[str, ...]
    loss: Loss | None
    evaluate: Judge | None
    every: float
    progress: Progress | None
    judged: Yardstick | None = None
    page: LivePage | None = None

    def rows(self, seed: int, targets: Sequence[float], controls: Sequence[str], wanted: set[int]) -> Iterator[Row]:
        """The dense network of a seed, its tickets, and their controls."""
        model = self.fresh(seed)
        weights = hash_model(model)
        row, end = self.network(seed, DENSE, 0, {}, weights, None, capture=self.step)
        yield row
        start: Bundle | None = end["bundle"]
        masks: Masks = {}
        for number, target in enumerate(targets, start=1):
            # A round is masked by the weights that the round before has trained, and trained from the start again.
            write_tensors(model, end["model"])
            masks = self.masks(model, masks, target, seed)
            row, end = self.network(seed, TICKET, number, masks, weights, start, weights_of=end["model"])
            yield row
            for control in controls if number in wanted else ():
                yield self.control(control, seed, number, masks, weights, start, end)

    def control(
        self,
        what: str,
        seed: int,
        number: int,
        masks: Masks,
        weights: str,
        start: Bundle | None,
        end: StateDict,
    ) -> Row:
        """A network that differs from the ticket in one thing."""
        if what == "reinit":
            # From the beginning, as no other state belongs to weights that were never trained.
            return self.network(seed, what, number, masks, weights, None, reinit=True)[0]
        other = shuffled(masks, seed + _OTHER) if what == "shuffled" else drawn_masks(masks, seed + _OTHER)
        return self.network(seed, what, number, other, weights, start, weights_of=end["before"])[0]

    def network(
        self,
        seed: int,
        variant: str,
        number: int,
        masks: Masks,
        weights: str,
        start: Bundle | None,
        *,
        capture: int | None = None,
        reinit: bool = False,
        weights_of: Mapping[str, Tensor] | None = None,
    ) -> tuple[Row, StateDict]:
        """Train one network, or find it."""
        hashed = {name: _mask_hash(mask) for name, mask in sorted(masks.items())}
        key = key_of(config=self.config, seed=seed, variant=variant, round=number, weights=weights, masks=hashed)
        place = self.folder / "cells" / key
        with disk_errors(place):
            place.mkdir(parents=True, exist_ok=True)
        kept = Checkpoint(place, about={"what": "ticket", "key": key}, every=self.every)
        try:
            if kept.get("end") is None:
                self._train(kept, key, seed, variant, number, masks, start, capture, reinit, weights_of)
            end = kept.get("end")
            if not (place / "row.json").exists():
                atomic_write(place / "row.json", canonical_json(end["row"]))
                kept.drop("training")
        finally:
            kept.close()
        row = load_json(place / "row.json")
        if row.get("key") != key:
            raise FileRefusedError(f"{place / 'row.json'} is of another network", hint="remove its folder")
        return cast(Row, row), end

    def _train(
        self,
        kept: Checkpoint,
        key: str,
        seed: int,
        variant: str,
        number: int,
        masks: Masks,
        start: Bundle | None,
        capture: int | None,
        reinit: bool,
        weights_of: Mapping[str, Tensor] | None,
    ) -> None:
        began = time.perf_counter()
        model = self.fresh(seed + _OTHER if reinit else seed)
        if self.step is None and weights_of is not None and not reinit:
            write_tensors(model, weights_of)  # rates alone are rewound
        what = f"seed {seed}, {variant}" + (f" {number}" if number else "")
        zeros, total = sum(int((~m).sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
        sparsity = zeros / total if total else 0.0
        tell = _Telling(what, sparsity, self.progress, self.page)
        bundle = self.trainer.run(model, masks, seed=seed, start=start, capture=capture, kept=kept, progress=tell)
        if self.judged is None:
            self.judged = yardstick(model, self.given, self.evaluate, loss=self.loss)
        if self.judged.evaluate is None:
            raise RecipeError("there is no figure of quality", why=self.judged.why, hint="pass evaluate=")
        figures = dict(self.judged.evaluate(model))
        seconds = round(time.perf_counter() - began, 3)
        row = Row(
            key=key, seed=seed, variant=variant, round=number, sparsity=sparsity,
            kept=total - zeros, total=total, figures=figures, seconds=seconds,
        )  # fmt: skip
        before = {} if self.step is not None or weights_of is None else dict(weights_of)
        state = {"row": dict(row), "model": named_tensors(model), "masks": masks, "bundle": bundle, "before": before}
        kept.put("end", state)

    def masks(self, model: nn.Module, before: Masks, target: float, seed: int) -> Masks:
        """The next masks, from trained weights."""
        return next_masks(
            model, before, target, criterion=self.rule, scope=str(self.config["scope"]), protect=self.protect,
            data=self.given.scoring, loss=self.loss, seed=seed,
        )  # fmt: skip

    def fresh(self, seed: int) -> nn.Module:
        """A freshly initialised network."""
        return _built(self.build, seed)


class _Telling:
    """Tells of the training of one network: the caller how far it is, and the page its curve."""

    def __init__(self, what: str, sparsity: float, progress: Progress | None, page: LivePage | None) -> None:
        self._what, self._sparsity, self._progress, self._page = what, sparsity, progress, page
        self._points: list[TrainingPoint] = []

    @property
    def takes_note(self) -> bool:
        """Whether the caller's progress shows loss and sparsity, as bars and lines of ours do."""
        return bool(getattr(self._progress, "takes_note", False))

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Called after every step."""
        if self._progress is not None:
            self._progress(self._what, done, total, *([note] if note and self.takes_note else []))

    def watch(self, records: Sequence[TrainStep]) -> None:
        """Called after every step with all of them, those of an earlier process included."""
        # Masks do not change while a ticket is trained, so the loop itself knows no sparsity.
        fresh = (replace(record, sparsity=self._sparsity) for record in records[len(self._points) :])
        self._points += [point(0, record) for record in fresh]
        if self._page is not None and self._points:
            self._page.step(self._what, self._points)

    def quality(self, model: nn.Module) -> None:
        """Nothing: networks are judged at their end, so that nothing is chosen by the test part."""


def _built(build: Callable[[int], nn.Module], seed: int) -> nn.Module:
    with generators(seed):
        return admit(build(seed))


def _protected(build: Callable[[int], nn.Module], seed: int, protect: Protected) -> tuple[str, ...]:
    """What stays whole, as names that hold in every model that is built."""
    model = _built(build, seed)
    named = callable(protect) and not isinstance(protect, (type, nn.Module))
    chosen: Protect = protect(model) if named else protect  # type: ignore[operator, assignment]
    mine = {id(one) for one in (*model.modules(), *model.parameters())}
    objects = [one for one in chosen if isinstance(one, (nn.Module, Tensor))] if isinstance(chosen, Sequence) else []
    if any(id(one) not in mine for one in objects):
        raise RecipeError(
            f"protect holds a {type(objects[0]).__name__} that is in no model of build",
            why="build makes every model anew",
            hint="give names, or a function: protect=lambda model: [model.head]",
        )
    patterns = patterns_of(model, chosen)
    protected(model, patterns)  # a misspelt name is said now, and not behind the first training
    return patterns


def _trainer(
    given: Parts, loss: Loss | None, training: Mapping[str, object] | None, train: OwnTrain | None, steps: int | None
) -> Builtin | Own:
    if train is not None:
        require_loop(train)
        if training is not None or steps is None:
            raise RecipeError("a loop of your own needs steps=, and training= is for the built-in one")
        return Own(train, whole_number("steps", steps, least=1))
    if given.train is None:
        raise RecipeError("there are no data to train with", hint="pass data, or a loop of your own as train=")
    return Builtin(given.train, loss, training or {"epochs": 1})


def _check(
    sparsity: float,
    rate: float,
    scope: str,
    rewind: Rewind,
    seeds: Sequence[int],
    controls: Sequence[str],
    control_rounds: Sequence[int] | None,
) -> None:
    if not 0 < real_number("sparsity", sparsity) < 1 or not 0 < real_number("rate", rate) < 1:
        raise RecipeError(f"sparsity {sparsity}, rate {rate}", hint="both are between 0 and 1")
    if scope not in ("global", "local"):
        raise RecipeError(f"scope={scope!r} is not known", hint='"global" or "local"')
    places = isinstance(rewind, Mapping) and len(rewind) == 1 and next(iter(rewind)) in ("step", "epoch")
    if rewind not in ("init", "rates") and not (places and all(type(v) is int and v >= 0 for v in rewind.values())):  # type: ignore[union-attr]
        raise RecipeError(f"rewind={rewind!r} is not known", hint='"init", {"step": 500}, {"epoch": 1} or "rates"')
    for option, value, example in (("seeds", seeds, "(0, 1, 2)"), ("controls", controls, '("reinit",)')):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise RecipeError(f"{option}={value!r} is no list", hint=f"for example {option}={example}")
    unknown = [control for control in controls if control not in CONTROLS]
    if unknown:
        raise RecipeError(f"there is no control {unknown[0]!r}", hint=", ".join(CONTROLS))
    if not seeds or len(set(seeds)) != len(seeds) or any(type(s) is not int or not 0 <= s < 2**31 for s in seeds):
        raise RecipeError(f"seeds={list(seeds)}", hint="at least one, each once, from 0")
    if any(type(number) is not int or number < 1 for number in control_rounds or ()):
        raise RecipeError(f"control_rounds={list(control_rounds or ())}", hint="rounds count from 1")


def _mask_hash(mask: Tensor) -> str:
    return hash_batch(mask.to(torch.uint8))
