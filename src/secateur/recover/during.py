"""The training stage of a recipe: the model is trained before or while it is pruned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.model.call import default_loss, device_of
from secateur.model.guard import generators, guard
from secateur.model.protect import patterns_of
from secateur.model.tensors import named_tensors
from secateur.planning.build import CriterionLike, criterion_of
from secateur.planning.history import copy_to_go_on_with
from secateur.planning.plan import Plan
from secateur.recipe import Recipe
from secateur.recipe.training import GradualTraining, Lessons, MovementTraining, SlimmingTraining
from secateur.recover.damage import warn_of_lost_zeros, zero_shares
from secateur.recover.distil import Distil, taught
from secateur.recover.finetune import check_weights, total_steps
from secateur.recover.loop import Keeper, Loop, TrainStep, write_tensors
from secateur.recover.optimizers import build_optimizer
from secateur.recover.precision import in_precision
from secateur.recover.rates import Rates
from secateur.recover.reader import Apart, Reader
from secateur.recover.steps import optimizer_of
from secateur.request import Named, Target
from secateur.training import MovementPruner, Pruner, penalty
from secateur.training.earlier import EarlierZeros
from secateur.training.penalties import GatePenalty, Growing, Penalty
from secateur.types import Data, Example, Loss, StateDict

Follow = Callable[[Optimizer, int], "Finishing | None"]


class Charged:
    """A penalty as one who follows a loop: it joins the steps by itself, and has a state and an end."""

    sparsity = None

    def __init__(self, paid: Penalty) -> None:
        self._paid = paid
        self.keep: Mapping[str, Tensor] = paid.keep if isinstance(paid, Growing) else {}
        self.scores: dict[str, Tensor] = {}

    def step(self) -> bool:
        """Nothing is removed while it is paid."""
        return False

    def finish(self) -> None:
        """Fold gates into the weights, whose sizes are the scores then; let the optimizer go."""
        if isinstance(self._paid, GatePenalty):
            self.scores = dict(self._paid.finish())
        self._paid.remove()

    def state_dict(self) -> StateDict:
        """How far a penalty that grows has come; gates are parameters of the model."""
        return self._paid.state_dict() if isinstance(self._paid, Growing) else {}

    def load_state_dict(self, state: StateDict) -> None:
        """Go on."""
        if isinstance(self._paid, Growing):
            self._paid.load_state_dict(state)


Finishing = Pruner | MovementPruner | Charged


@dataclass(frozen=True, eq=False)
class Trained:
    """What a training has left.

    Args:
        tensors: parameters and buffers by name; of the shapes that the cuts have left.
        keep: group name -> bool, True = the unit stays, counted as in the model before; empty where nothing is decided.
            A training under a penalty decides nothing, but of "growing", whose units were chosen at the beginning.
        masks: parameter name -> bool, where masks are not made of such units any more.
        records: one for each optimizer step.
        scores: group name -> scores, where gates were trained; empty where a criterion scores.
    """

    tensors: dict[str, Tensor]
    keep: dict[str, Tensor]
    masks: dict[str, Tensor]
    records: tuple[TrainStep, ...]
    scores: dict[str, Tensor] = field(default_factory=dict)


def train_stage(
    original: nn.Module,
    example: Example,
    recipe: Recipe,
    *,
    train: Data,
    scoring: Data | None,
    loss: Loss | None,
    criterion: CriterionLike | None = None,
    progress: Callable[[int, int], None] | None = None,
    keeper: Keeper | None = None,
) -> Trained:
    """Run the training of a recipe on a copy of a model.

    Args:
        original: left as it is; the teacher, where the recipe asks for one.
        example: what one forward takes.
        recipe: with a training.
        train: batches to train with.
        scoring: batches for criteria that need them.
        loss: of the batches.
        criterion: in the place of the recipe's.
        progress: called as ``progress(done, total)``.
        keeper: keeps states, and may have one to go on from.

    Returns:
        weights, and which units are gone.

    Raises:
        RecipeError: an unknown name, or an amount that cannot be walked to.
        NonFiniteError: the loss or a weight is NaN or infinite.

    Cost: the training, and what the criterion costs at every update; memory for a copy of the model.
    """
    step = recipe.training
    assert step is not None
    model = copy_to_go_on_with(original)
    choose = criterion if criterion is not None else recipe.model_dump()["criterion"]
    # Read in the middle of a pass, they must not take anything from the order of the batches.
    scored = None if scoring is None else Apart(scoring, recipe.seed)

    def follow(optimizer: Optimizer, total: int) -> Finishing:
        if isinstance(step, SlimmingTraining):
            return Charged(_penalty(step, model, example, recipe, optimizer))
        if isinstance(step, MovementTraining):
            return _movement(step, model, example, recipe, optimizer, total)
        return _pruner(step, model, example, recipe, optimizer, total, choose, scored, loss)

    follower, records = _train(
        model,
        step,
        follow,
        teacher=original,
        train=train,
        loss=loss,
        seed=recipe.seed,
        progress=progress,
        keeper=keeper,
    )
    assert follower is not None
    tensors = dict(named_tensors(model))
    if isinstance(step, MovementTraining) and step.fill is not None and isinstance(follower, MovementPruner):
        return Trained(tensors, {}, dict(follower.masks), records)
    scores = follower.scores if isinstance(follower, Charged) else {}
    return Trained(tensors, dict(follower.keep), {}, records, scores)


def give(model: nn.Module, trained: Trained, method: str) -> None:
    """Write the tensors of a training into a model of their shapes, and say where it has filled zeros.

    Told here, beside the cut alone: zeros that went with what was cut are not filled.

    Args:
        model: cut as the training has cut; changed in place.
        trained: what it has left.
        method: of the training.
    """
    zeros = zero_shares(model)
    write_tensors(model, trained.tensors)
    warn_of_lost_zeros(model, zeros, f"training: {method}")


def dense_training(
    model: nn.Module,
    original: nn.Module,
    recipe: Recipe,
    *,
    train: Data,
    loss: Loss | None,
    progress: Callable[[int, int], None] | None = None,
    keeper: Keeper | None = None,
) -> None:
    """The same training of a model that is not pruned meanwhile, in place: the control.

    Args:
        model: trained in place.
        original: the teacher, where the recipe asks for one.
        recipe: with a training.
        train: batches to train with.
        loss: of the batches.
        progress: called as ``progress(done, total)``.
        keeper: keeps states.
    """
    assert recipe.training is not None
    _train(
        model, recipe.training, lambda optimizer, total: None, teacher=original, train=train, loss=loss,
        seed=recipe.seed, progress=progress, keeper=keeper,
    )  # fmt: skip


def as_asked(plan: Plan, recipe: Recipe, criterion: CriterionLike | None) -> Plan:
    """A plan of units that a training has decided, with what was asked for in the place of "these units"."""
    rule = criterion_of(recipe.model_dump()["criterion"] if criterion is None else criterion)
    named, target = Named(rule.name, rule.options()), Target.of(recipe.target.given())
    return replace(plan, request=replace(plan.request, criterion=named, target=target))


def check_lessons(step: Lessons) -> None:
    """Look up optimizer and rates before anything long starts.

    Raises:
        RecipeError: an unknown name or option.
    """
    built = build_optimizer(optimizer_of(step), [nn.Parameter(torch.zeros(2, 2))])
    Rates(built, step.rates, total=100, passes=10, warmup=step.warmup_steps)


def _train(
    model: nn.Module,
    step: Lessons,
    follow: Follow,
    *,
    teacher: nn.Module,
    train: Data,
    loss: Loss | None,
    seed: int,
    progress: Callable[[int, int], None] | None,
    keeper: Keeper | None,
) -> tuple[Finishing | None, tuple[TrainStep, ...]]:
    # A walk has to know its end, as a schedule of rates has: "cosine" asks for the number of steps.
    rates = step.rates if not step.prunes else "cosine"
    total = total_steps(
        train, steps=step.steps, epochs=step.epochs, schedule=rates, warmup=step.warmup_steps,
        accumulate=step.accumulate,
    )  # fmt: skip
    with ExitStack() as stack:
        if step.distil is not None:
            stack.enter_context(guard(teacher, mode="eval"))
        stack.enter_context(_training(model, seed))
        if step.distil is not None:
            loss = taught(loss, teacher, Distil(**step.distil.model_dump()), model, {})
        built = build_optimizer(optimizer_of(step), [p for p in model.parameters() if p.requires_grad])
        passes = None if step.steps is not None else step.epochs
        reader = Reader(train, passes)
        stack.callback(reader.close)
        earlier = EarlierZeros(model)  # asked before gates give the weights other names
        follower = follow(built, total)
        if not isinstance(follower, (Pruner, MovementPruner)):  # these two hold zeros of earlier rounds themselves
            earlier.hold([built])
        loop = Loop(
            model, in_precision(loss or default_loss, step.amp, device_of(model)), built,
            Rates(built, step.rates, total=total, passes=passes or 0, warmup=step.warmup_steps), reader,
            accumulate=step.accumulate, follower=follower,
        )  # fmt: skip
        found = None if keeper is None else keeper.found()
        if found is not None:
            loop.load_state_dict(found)
        loop.run(step.steps, keeper, progress, total)
        if follower is not None:
            follower.finish()
        check_weights(model)
    return follower, tuple(loop.records)


@contextmanager
def _training(model: nn.Module, seed: int) -> Iterator[None]:
    """Train mode, gradients and a seed; no `guard`, which would put cut parameters back. The model is a copy."""
    modes = [(module, module.training) for module in model.modules()]
    with generators(seed), torch.enable_grad():
        model.train()
        yield
    for parameter in model.parameters():
        parameter.grad = None
    for module, mode in modes:
        module.training = mode


def _pruner(
    step: GradualTraining,
    model: nn.Module,
    example: Example,
    recipe: Recipe,
    optimizer: Optimizer,
    total: int,
    criterion: CriterionLike,
    data: Data | None,
    loss: Loss | None,
) -> Pruner:
    rule = criterion_of(criterion)
    return Pruner(
        model,
        example,
        target=recipe.target.given(),
        **_times(step, total),
        schedule=step.schedule,
        optimizer=optimizer,
        criterion=rule,
        regrow=step.regrow,
        # Movement sums up the gradients of the loop itself.
        data=None if rule.name == "movement" else data,
        loss=loss,
        protect=list(patterns_of(model, recipe.protect)),
        distributed=False,
        **recipe.choices(),
    )


def _movement(
    step: MovementTraining, model: nn.Module, example: Example, recipe: Recipe, optimizer: Optimizer, total: int
) -> MovementPruner:
    plain = recipe.model_dump(by_alias=True)
    assert isinstance(recipe.target.sparsity, float)
    return MovementPruner(
        model,
        example,
        sparsity=recipe.target.sparsity,
        **_times(step, total),
        schedule=step.schedule,
        optimizer=optimizer,
        granularity=plain["granularity"],
        form=step.form,
        threshold=step.threshold,
        strength=step.strength,
        scope=recipe.scope,
        scores=step.scores,
        start=step.start,
        freeze=step.freeze,
        fill=step.fill,
        protect=list(patterns_of(model, recipe.protect)),
        seed=recipe.seed,
        distributed=False,
    )


def _times(step: GradualTraining | MovementTraining, total: int) -> dict[str, Any]:
    begin = int(step.begin * total)
    # A span without a step in it would be one shot under another name.
    end = min(max(int(step.end * total), begin + 1), total)
    return {"begin": min(begin, end), "end": end, "every": step.every, "initial": step.initial}


def _penalty(
    step: SlimmingTraining, model: nn.Module, example: Example, recipe: Recipe, optimizer: Optimizer
) -> Penalty:
    told = dict(step.penalty) if isinstance(step.penalty, dict) else {"name": step.penalty}
    name = str(told.pop("name"))
    plain = recipe.model_dump(by_alias=True)
    if step.decides:
        told["granularity"] = plain["granularity"]
    if name == "growing":
        told |= {"sparsity": recipe.target.sparsity, "criterion": plain["criterion"]}
    return penalty(name, model, example, optimizer=optimizer, protect=list(patterns_of(model, recipe.protect)), **told)
