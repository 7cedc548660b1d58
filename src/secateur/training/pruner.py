"""Pruning inside anybody's training loop: one call after the optimizer's step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from secateur.amounts.allocate.sensitivity import word_of
from secateur.criteria.base import Criterion
from secateur.criteria.gradients.movement import Movement, MovementAccumulator
from secateur.errors import InputError
from secateur.kinds.base import Candidates
from secateur.kinds.find import spelt_out
from secateur.kinds.weights.kind import Weights
from secateur.masks import MaskHandle
from secateur.model.admit import admit
from secateur.model.call import as_loss, device_of
from secateur.model.protect import patterns_of
from secateur.planning.averages import Averages
from secateur.planning.build import CriterionLike, GranularityLike, candidates_of, criterion_of, units_of
from secateur.planning.plan import Plan
from secateur.planning.unread import refuse_unread
from secateur.request import (
    ALLOCATION,
    CRITERION,
    MIN_KEEP,
    MIN_KEEP_FRACTION,
    PROOF,
    SCALES,
    SCOPE,
    Amount,
    Named,
    Request,
)
from secateur.request import Target as Goal
from secateur.training.course import Course
from secateur.training.cutting import Cutting, cut_again
from secateur.training.earlier import EarlierZeros
from secateur.training.masking import Masking
from secateur.training.regrowth import Regrowth, regrowth_of
from secateur.training.removal import PruningJob, Remover
from secateur.training.schedules import Schedule
from secateur.training.settings import Optimizers, ScheduleLike, asks, clock, goal_of, listed_optimizers
from secateur.training.together import Together
from secateur.types import Data, Example, Loss, Protect, StateDict
from secateur.words import spoken


class Pruner:
    """Prunes a model while your loop trains it, along a schedule, to an exact amount.

    Call `step` after every step of the optimizer. Masked weights are exactly +0.0 between all steps, whatever momentum,
    weight decay, scaled or accumulated gradients and averages do; units that are cut for real go with their optimizer
    state, and every cut is certified. Weights under a mask stay gone unless `regrow` brings others back. Zeros of
    earlier rounds stay too, in a model that was pruned in this process or read by `secateur.load`.

    Args:
        model: trained by your loop, pruned in place. A `DistributedDataParallel` is taken off; its processes then
            decide as one.
        example: what one forward takes; needed for channels, neurons, heads, experts and layers.
        sparsity: share of the units that goes in the end, or name pattern -> share (masks only).
        target: instead of it, any target of `secateur.plan` but threshold and latency_ms.
        end: optimizer step at which the amount is reached. May be left out for schedule "one_shot".
        begin: optimizer step of the first update.
        every: optimizer steps between updates.
        initial: share that goes at `begin`.
        schedule: "cubic", "linear", "exponential", "steps", "cycles", "one_shot", {"name": ..., options}, a `Schedule`,
            or a callable: share of the time -> share of the way.
        optimizer: what moves the weights, or several of them (masks only). Masks of weights that none of them moves are
            written again by `step`, and momentum of masked weights lives on there.
        criterion: name, {"name": ..., options} or object; asked anew at every update. "movement" without `data` sums up
            the gradients of your loop.
        granularity: as for `secateur.plan`.
        regrow: "set" or "rigl" exchange masked for kept units at every update, {"name": ..., "fraction": ...}, or a
            `Regrowth`.
        data: batches for criteria that need them; read at every update.
        loss: ``loss(model, batch) -> scalar`` of these batches.
        scope: as for `secateur.plan`.
        allocation: as for `secateur.plan`.
        protect: as for `secateur.plan`.
        min_keep: as for `secateur.plan`.
        min_keep_fraction: as for `secateur.plan`; of the model as it is at the beginning.
        round_to: as for `secateur.plan`.
        scales: as for `secateur.plan`.
        seed: of everything random.
        ema: averaged weights (`AveragedModel`, a copy of the model, a dict of names to tensors), which follow.
        dtype: of certificates.
        tolerance: of certificates.
        proof: on which inputs, as for `secateur.plan`.
        distributed: whether the processes of the default group train this one model; None: where it came in a
            `DistributedDataParallel`.
        state: of a checkpoint (`state_dict`), to go on from it at once: nothing is pruned before. For loops that have
            loaded the weights already; else `load_state_dict` does as well where nothing goes at step 0.

    Attributes:
        model: the model.
        done: optimizer steps so far.

    Raises:
        RecipeError: an unknown name, a contradiction, or no amount.
        InputError: the optimizer moves no parameter of the model.
        UnsupportedError: a kind of model that cannot be pruned, or nothing of the granularity in it.

    Cost:
        Between updates: one pass over masked weights per step. An update costs what the criterion costs, and for cuts a
        run of the engine and about three forward passes.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> pruner = Pruner(model, sparsity=0.75, end=10, optimizer=optimizer)
        >>> for _ in range(20):
        ...     model(torch.randn(3, 4)).square().sum().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     changed = pruner.step()
        >>> sum(int((p == 0).sum()) for p in (model[0].weight, model[2].weight)), pruner.sparsity
        (36, 0.75)
    """

    @spoken()
    def __init__(
        self,
        model: nn.Module,
        example: Example = None,
        *,
        sparsity: float | Mapping[str, float] | None = None,
        target: Goal | Mapping[str, Amount] | None = None,
        end: int | None = None,
        begin: int = 0,
        every: int = 1,
        initial: float = 0.0,
        schedule: ScheduleLike = "cubic",
        optimizer: Optimizers = None,
        criterion: CriterionLike = CRITERION,
        granularity: GranularityLike | None = None,
        regrow: str | Mapping[str, object] | Regrowth | None = None,
        data: Data | None = None,
        loss: Loss | None = None,
        scope: str = SCOPE,
        allocation: str = ALLOCATION,
        protect: Protect = (),
        min_keep: int = MIN_KEEP,
        min_keep_fraction: float = MIN_KEEP_FRACTION,
        round_to: int | Literal["auto"] | None = None,
        scales: str = SCALES,
        seed: int = 0,
        ema: Averages | None = None,
        dtype: str = "float32",
        tolerance: float | None = None,
        proof: str = PROOF,
        distributed: bool | None = None,
        state: StateDict | None = None,
    ) -> None:
        came, self.model = model, admit(model)
        unit, choices = units_of(granularity, example)
        optimizers, rule, loss = listed_optimizers(optimizer), self._watch(criterion, data), as_loss(loss)
        request = Request(
            target=None, criterion=Named(rule.name, rule.options()), granularity=spelt_out(choices), scope=scope,
            allocation=word_of(allocation), protect=patterns_of(self.model, protect), min_keep=min_keep,
            min_keep_fraction=min_keep_fraction, round_to=round_to, seed=seed, scales=scales, proof=proof,
        )  # fmt: skip
        refuse_unread(choices, {**vars(request), "dtype": dtype, "tolerance": tolerance})
        self._job = PruningJob(
            self.model, example, request, rule, data, loss, optimizers, ema,
            Together.of(came, distributed, device_of(self.model)), dtype=dtype, tolerance=tolerance,
        )  # fmt: skip
        self._earlier = EarlierZeros(self.model)
        self._regrowth, self.done, self._moved = None if regrow is None else regrowth_of(regrow), 0, False
        self._gradients: dict[str, Tensor] = {}
        candidates = candidates_of(self.model, example, request, unit)
        self._goal = goal_of(sparsity, target, candidates)
        # What the bounds of the target ask for takes the place of this final value.
        self._shape = clock(schedule, final=initial, begin=begin, end=end, every=every, initial=initial)
        self._span = (begin, self._shape.end if end is None else end, every)
        self._start(candidates, state)

    def _start(self, candidates: Candidates, state: StateDict | None) -> None:
        """Listen to the optimizers, and begin; one that cannot begin leaves them as they were."""
        # In this order: what the loop's gradients are asked for is read before the masks are laid over them.
        self._hooks = [hook for each in self._job.optimizers for hook in self._listen(each)]
        try:
            self._begin(candidates, state)
        except BaseException:
            self._deafen()
            raise
        self._earlier.hold(self._job.optimizers)

    def _begin(self, candidates: Candidates, state: StateDict | None) -> None:
        """Prune what is due before the first step, or go on from a checkpoint."""
        self._removal: Remover
        if isinstance(candidates, Weights):
            self._removal = Masking(self._job, candidates)
        else:
            self._removal = Cutting(self._job, candidates)
        self._course = Course.of(self._goal, self._shape, self._removal.whole)
        if self._regrowth is not None:
            self._regrowth.check(candidates, earlier=bool(self._earlier))
        self._exchanged = {span.tensor for group in candidates.groups for span in group.spans}
        if state is None:
            self._reach()
        else:
            self.load_state_dict(state)

    # -- in the loop ------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """To be called after the optimizer's step.

        Calls without a step of the optimizer since the last one do not count (batches whose gradients add up, steps
        that `GradScaler` skips), where the pruner knows the optimizer.

        Returns:
            whether masks or shapes changed.
        """
        if self._hooks:
            if not self._moved:
                return False
            self._moved = False
            self._removal.enforce_unheld()
        else:
            self._observe()
            self._removal.enforce()
        self._earlier.write()
        self.done += 1
        return self._reach()

    @property
    def sparsity(self) -> float:
        """Share of the units that is gone now."""
        removed, total = self._removal.removed()
        return removed / total

    @property
    def handle(self) -> MaskHandle:
        """The owner of the masks.

        Raises:
            InputError: the units are cut, not masked.
        """
        if not isinstance(self._removal, Masking):
            raise InputError("these units are cut, there are no masks")
        return self._removal.held.handle

    @property
    def masks(self) -> dict[str, Tensor]:
        """Parameter name -> bool tensor, True = keep; empty where units are cut."""
        return self.handle.masks if isinstance(self._removal, Masking) else {}

    @property
    def keep(self) -> dict[str, Tensor]:
        """Group name -> bool tensor, True = the unit stays, counted as in the model at the beginning."""
        if isinstance(self._removal, Masking):
            return {name: mask.cpu() for name, mask in self._removal.keep.items()}
        made = self._removal.plan()
        result = {}
        for name, group in ({} if made is None else made.groups).items():
            result[name] = torch.ones(group["size"], dtype=torch.bool)
            result[name][list(group["removed"])] = False
        return result

    @property
    def schedule(self) -> Schedule:
        """Share that goes, step by step; of several bounds the first."""
        return self._course.clock

    @property
    def plan(self) -> Plan | None:
        """What leads from the model at the beginning to the one now, as a plan that can be saved."""
        return self._removal.plan()

    def finish(self) -> nn.Module:
        """Reach the amount now if it is not reached yet, and let the loop go.

        Masks stay held by the optimizers that they were held by.

        Returns:
            the model, masked or cut.
        """
        if self.done < self._span[1]:
            self.done = self._span[1]
            self._prune(self._course.target, last=True)
        self._removal.enforce()
        self._earlier.write()
        self._deafen()
        return self.model

    # -- checkpoints ------------------------------------------------------------------------------------------

    def state_dict(self) -> StateDict:
        """Everything that a checkpoint needs beside the model's and the optimizer's own state; plain and tensors."""
        state: StateDict = {"done": self.done, "removal": self._removal.state_dict()}
        if self._accumulator is not None:
            state["accumulator"] = self._accumulator.state_dict()
        return state

    def load_state_dict(self, state: StateDict) -> None:
        """Go on from a checkpoint: load this first, then the model's state, then the optimizer's.

        Units that were cut are cut again, so that the shapes are those of the checkpoint.

        Args:
            state: from `state_dict` of a pruner with the same settings.

        Raises:
            InputError: it is no state of such a pruner.
        """
        done, removal = state.get("done"), state.get("removal")
        if not isinstance(done, int) or not isinstance(removal, Mapping):
            raise InputError("this is no state of a pruner", hint="give what pruner.state_dict() returned")
        self._removal.load_state_dict(removal)
        # Amounts are counted from the model as it first came, which the state knows.
        self._course = Course.of(self._goal, self._shape, self._removal.whole)
        if self._accumulator is not None and "accumulator" in state:
            self._accumulator.load_state_dict(state["accumulator"])
        self.done, self._moved = done, False

    @staticmethod
    def restore_shapes(model: nn.Module, state: StateDict) -> None:
        """Cut a model as a checkpoint was cut, for loops that load weights before a pruner can be made.

        Args:
            model: as it came, cut in place.
            state: what `state_dict` gave.

        Raises:
            InputError: it is no state of a pruner.
        """
        removal = state.get("removal", state.get("held"))
        if not isinstance(removal, Mapping):
            raise InputError("this is no state of a pruner", hint="give what pruner.state_dict() returned")
        if "plan" in removal:
            cut_again(admit(model), removal)

    # -- inside -----------------------------------------------------------------------------------------------

    def _reach(self) -> bool:
        """Whatever is due after so many steps."""
        begin, end, every = self._span
        changed = False
        if self._course.clock.due(self.done):
            target, last = self._course.at(self.done), self.done >= self._course.clock.end
            if last or asks(target):
                self._prune(target, last=last)
                changed = True
        exchanging = begin < self.done <= end and (self.done - begin) % every == 0
        if self._regrowth is not None and exchanging and isinstance(self._removal, Masking) and self._removal.keep:
            self._removal.regrow(self._regrowth, (self.done - begin) / (end - begin), self._gradients, self.done)
            changed = True
        self._gradients = {}
        return changed

    def _prune(self, target: Goal, *, last: bool) -> None:
        if self._accumulator is not None and isinstance(self._job.rule, Movement):
            # What no step gave a gradient has not moved.
            self._job.rule = replace(self._job.rule, accumulator=self._accumulator, unused="zero")
        self._removal.prune(target, last=last)

    def _watch(self, criterion: CriterionLike, data: Data | None) -> Criterion:
        """The criterion, and where it lives on the gradients of the loop, what gathers them."""
        rule = criterion_of(criterion)
        self._accumulator: MovementAccumulator | None = None
        if isinstance(rule, Movement) and rule.accumulator is None and data is None:
            self._accumulator = MovementAccumulator(self.model)
        return rule

    def _listen(self, optimizer: Optimizer) -> list[RemovableHandle]:
        def after(*_: object) -> None:
            self._moved = True

        return [optimizer.register_step_pre_hook(lambda *_: self._observe()), optimizer.register_step_post_hook(after)]

    def _deafen(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _observe(self) -> None:
        """Read the gradients of the loop, where somebody asks for them."""
        if self._accumulator is not None:
            self._accumulator.observe()
        if self._regrowth is None or not self._regrowth.needs_gradients:
            return
        begin, end, every = self._span
        if begin <= self.done < end and (self.done + 1 - begin) % every == 0:
            for name in self._exchanged:
                parameter = self.model.get_parameter(name)
                gradient = parameter.grad
                known = torch.zeros_like(parameter) if gradient is None else gradient.detach().abs()
                self._gradients[name] = known.to_dense() if known.layout != torch.strided else known
