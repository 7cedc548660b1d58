"""From what is asked to a plan: find, score, decide, write (`written.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from secateur import criteria
from secateur.amounts.allocate.sensitivity import Curves, Spread, spread_of
from secateur.criteria.base import Context, Criterion
from secateur.errors import RecipeError
from secateur.kinds.base import Candidates, Keep
from secateur.kinds.find import find, is_physical, kind_of, spelt_out
from secateur.kinds.weights.granularity import Granularity, parse
from secateur.kinds.weights.kind import Weights
from secateur.kinds.weights.nm import NM
from secateur.measure.staircase import width_grid
from secateur.model.admit import admit
from secateur.model.call import as_loss, device_of, several
from secateur.model.protect import patterns_of
from secateur.model.share import Share
from secateur.model.written import weights_kept
from secateur.planning.by_hand import given_keep, given_scores
from secateur.planning.decide import decide
from secateur.planning.decision import GIVEN
from secateur.planning.plan import Plan
from secateur.planning.solved import Blocks, recorded_settings, solved_plan, solver_of
from secateur.planning.unread import refuse_unread
from secateur.planning.written import plan_of, plan_of_masks
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
    Target,
    default_granularity,
    granularities,
)
from secateur.solve.base import Solver
from secateur.structure.trace import Trace
from secateur.types import Data, Example, Group, Loss, Protect
from secateur.words import spoken

CriterionLike = str | Criterion | Mapping[str, object]
GranularityLike = str | Mapping[str, object] | Granularity | Sequence[str | Mapping[str, object]]


@torch.inference_mode(False)  # what is made in it could not be trained afterwards
@spoken()
def make_plan(
    model: nn.Module,
    example: Example = None,
    *,
    target: Target | Mapping[str, Amount] | None = None,
    criterion: CriterionLike = CRITERION,
    granularity: GranularityLike | None = None,
    data: Data | None = None,
    loss: Loss | None = None,
    scope: str = SCOPE,
    allocation: Spread = ALLOCATION,
    protect: Protect = (),
    min_keep: int = MIN_KEEP,
    min_keep_fraction: float = MIN_KEEP_FRACTION,
    round_to: int | Literal["auto"] | None = None,
    seed: int = 0,
    dtype: str = "float32",
    tolerance: float | None = None,
    expressible: bool = False,
    scales: str = SCALES,
    proof: str = PROOF,
    scores: Mapping[str, Tensor] | None = None,
    comparable: bool = True,
    keep: Mapping[str, Tensor] | None = None,
    remove: Mapping[str, Sequence[int]] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    examples: Sequence[Example] = (),
    blocks: Blocks = None,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Decide what goes. Nothing is changed; `Plan.apply` does it.

    Args:
        model: any module that runs on `example`.
        example: a tensor, a tuple of positional or a mapping of keyword arguments; masks need none.
        target: one or several of sparsity, count, threshold (what goes, in units of the granularity; one number, or
            name pattern -> number, the first that matches a group counts) and params, macs (fraction kept at most),
            memory_bytes (weights at most), latency_ms (one forward pass at most). May be left out for n:m patterns.
        criterion: name, {"name": ..., options} or object.
        granularity: channel, neuron, head, head_dim, conv_group, expert, layer (removed physically), or element,
            vector, kernel, block, "2:4" (masks); default channel, without an example element. A list of slices
            (["channel", "head", "neuron"]), or "structured" (all but head_dim), is one ranking: of scores that estimate
            the loss per multiply-accumulate (or parameter) saved, of others relative to their group's mean.
            Of experts every block loses equally many.
        data: batches, where the criterion needs them.
        loss: ``loss(model, batch) -> scalar``, where the criterion needs one and the batches do not imply it.
        scope: "global" (all units compete) or "local" (every group shrinks alike); masks also know "row".
        allocation: "global", "uniform", "erk" or "lamp": how a global amount is spread; or by measured curves, what
            `secateur.sensitivity` returns.
        protect: what stays whole: names or patterns, "type:ClassName", or modules and parameters of the model.
        min_keep: units that every group keeps at least.
        min_keep_fraction: share of each group that a global ranking of slices keeps in any case.
        round_to: kept counts of structured groups are multiples of this; "auto" takes the width grid that is
            measured on the model's device. Default: multiples of 8 for channels and neurons in groups of 64 or more
            under a bound (params, macs, bytes, latency), none where the target says exactly how much goes.
        seed: of everything random.
        dtype: precision of the certificate, "float32" or "float64".
        tolerance: of the certificate; default by dtype.
        expressible: for Hugging Face models: cut so that a config describes the result, which `save_pretrained` and
            `from_pretrained` then handle without secateur. Groups of one config field keep equal counts, amounts are
            met to within one unit of each of them, and groups without a field stay whole.
        scales: what becomes of a scale that the code takes from a width that is cut, as 1 / sqrt(width) in attention:
            "keep" holds it at what it was, by a factor in the weights in front of it, and refuses the cut where there
            is no place for one; "follow" lets it change, which the certificate then says.
        proof: on which inputs the cut is proved, as the certificate then says: "example" (the examples alone),
            "default" (other values, batches and sizes too, and training mode; of large models as small as they come),
            or "full" (the whole model at any size, each change alone, and training mode on all).
        scores: group name -> scores, in the place of `criterion`; units of groups that are left out stay.
        comparable: whether given `scores` of different groups share one scale, for example a change of the loss; if
            not, one ranking of slices takes them relative to their group's mean, as it takes those of criteria.
        keep: group name -> bool tensor, True = the unit stays, in the place of `target` and `criterion`.
        remove: group name -> numbers of the units that go, likewise.
        masks: parameter name -> bool tensor, True = keep: a plan of exactly these masks.
        examples: several examples, in the place of `example` or beside it: other lengths, sizes, modes of the call.
            What any of them needs stays, and the certificate holds for all of them. Costs are those of the first.
        blocks: how a solver (criterion "admm", "sparsegpt", "least_squares" or "swap") prunes block by block: a mapping
            of `secateur.solve.blocks.run.Settings`. True lets "wanda", "ria" and "magnitude" do so, too.
        progress: of a solver, called as ``progress(done, total)`` with matrices.

    Returns:
        the plan, not yet certified.

    Raises:
        RecipeError: an unknown name or a contradiction.
        InputError: given scores, masks or indices that do not fit the groups.
        TargetError: the target cannot be reached.
        UnsupportedError: nothing of the model can be cut at this granularity; says what is locked. Or the model is of a
            kind that cannot be pruned.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> make_plan(net, torch.zeros(1, 4), remove={"0": [1, 5]}).groups["0"]["removed"]
        [1, 5]
    """
    example, examples = several(example, examples)
    if masks is not None:
        return plan_of_masks(admit(model, copied=False), masks, target, scores, keep, remove)
    unit, choices = units_of(granularity, example)
    spread, curves = spread_of(allocation)
    model = admit(model, copied=is_physical(choices))
    given = keep is not None or remove is not None
    if target is None and not given:
        target = implied_target(granularity)
    _one_way(target, scores, given=given, both=keep is not None and remove is not None)
    by = _Decider.of(None if given or scores is not None else criterion, blocks)
    request = Request(
        target=None if given else Target.of(target), criterion=by.named, granularity=spelt_out(choices), scope=scope,
        allocation=spread, protect=patterns_of(model, protect), min_keep=min_keep,
        min_keep_fraction=min_keep_fraction, seed=seed, expressible=expressible, scales=scales, proof=proof,
        round_to=width_grid(str(device_of(model))) if round_to == "auto" else round_to,
        blocks=None if by.solver is None else recorded_settings(blocks),
    )  # fmt: skip
    # Of units that were decided already a recipe's solver has nothing left to do.
    apart = blocks if isinstance(blocks, Mapping) and not given and scores is None else None
    refuse_unread(choices, {**vars(request), "dtype": dtype, "tolerance": tolerance}, solver=by.solver, blocks=apart)
    if by.solver is not None:
        return solved_plan(model, example, request, by.solver, data, blocks=blocks, progress=progress)
    candidates = candidates_of(model, example, request, unit, examples)
    if given:
        return plan_of(candidates, request, {}, given_keep(candidates, keep, remove), dtype=dtype, tolerance=tolerance)
    values = _scores(candidates, by.rule, scores, data=data, loss=as_loss(loss), seed=seed)
    same_scale = comparable if by.rule is None else by.rule.comparable
    chosen = _chosen(candidates, values, request, data, comparable=same_scale, curves=curves)
    return plan_of(candidates, request, values, chosen, dtype=dtype, tolerance=tolerance)


def _chosen(
    candidates: Candidates,
    values: Mapping[str, Tensor],
    request: Request,
    data: Data | None,
    *,
    comparable: bool,
    curves: Curves | None,
) -> Keep:
    """The decision; of several processes that of the first, which alone measures where a latency is asked for."""
    decision = partial(decide, candidates, values, request, comparable=comparable, curves=curves)
    return data.processes.decided(decision, values) if isinstance(data, Share) else decision()


class _Decider(NamedTuple):
    """Who decides: a criterion by its scores, a solver, or (both None) the caller; and the name for the plan.

    A solver chooses what stays and computes its weights in one go, block by block: there are no scores to rank.
    """

    rule: Criterion | None
    solver: Solver | None
    named: Named

    @classmethod
    def of(cls, criterion: CriterionLike | None, blocks: Blocks) -> _Decider:
        if criterion is None:
            return cls(None, None, Named(GIVEN))
        solver = solver_of(criterion, blocks)
        if solver is not None:
            return cls(None, solver, Named(solver.name, solver.options()))
        rule = criterion_of(criterion)
        return cls(rule, None, Named(rule.name, rule.options()))


def candidates_of(
    model: nn.Module,
    example: Example,
    request: Request,
    unit: Granularity | None = None,
    examples: Sequence[Example] = (),
) -> Candidates:
    """What may go from a model.

    Args:
        model: left as it is.
        example: what one forward takes.
        request: what was asked.
        unit: a granularity object in the place of the request's words.
        examples: further ones.

    Raises:
        UnsupportedError: nothing of the kind may go, or the forward writes to its own weights.
    """
    # The forward is run here for the first time, and a guard copies no weights: they are watched instead.
    with weights_kept(model):
        return Weights(model, example, request, unit) if unit is not None else find(model, example, request, examples)


def _one_way(target: object, scores: Mapping[str, Tensor] | None, *, given: bool, both: bool) -> None:
    if both:
        raise RecipeError("keep= and remove= both say which units go.", hint="Give one of them.")
    if given and (target is not None or scores is not None):
        raise RecipeError("keep= or remove= say exactly which units go.", hint="Leave out target and scores.")
    if not given and target is None:
        raise RecipeError("There is no target.", hint='for example target={"macs": 0.5}, or give keep= or remove=')


def _scores(
    candidates: Candidates,
    criterion: Criterion | None,
    scores: Mapping[str, Tensor] | None,
    *,
    data: Data | None,
    loss: Loss | None,
    seed: int,
) -> Mapping[str, Tensor]:
    if scores is None:
        assert criterion is not None
        context = Context(
            candidates.model,
            candidates.groups,
            data=data,
            loss=loss,
            example=candidates.example,
            seed=seed,
            capture=candidates.trace,
        )
        return criterion.score(context)
    return given_scores(candidates, scores)


# -- words -----------------------------------------------------------------------------------------------------


def units_of(granularity: GranularityLike | None, example: Example) -> tuple[Granularity | None, tuple[Named, ...]]:
    """The granularity object where one was given, and the choices that a file can hold."""
    if isinstance(granularity, Granularity):
        if isinstance(granularity, NM):
            also = {"embeddings": True} if granularity.embeddings else {}
            return granularity, (Named(f"{granularity.n}:{granularity.m}", also),)
        return granularity, (Named(granularity.name, granularity.options()),)
    return None, granularities(default_granularity(example) if granularity is None else granularity)


def implied_target(granularity: GranularityLike | None) -> Target | None:
    """What goes where a granularity says so itself: an n:m pattern; None for all others.

    Example:
        >>> implied_target("1:4").sparsity, implied_target("channel")
        (0.75, None)
    """
    choices = () if granularity is None else units_of(granularity, None)[1]
    if len(choices) != 1 or is_physical(choices):
        return None
    unit = parse(choices[0].spec())
    return Target(sparsity=1 - unit.n / unit.m) if isinstance(unit, NM) else None


def is_structured(granularity: GranularityLike) -> bool:
    """Whether units of this granularity are removed physically."""
    return not isinstance(granularity, Granularity) and is_physical(granularities(granularity))


def what_it_saves(granularity: GranularityLike) -> Literal["macs", "params"] | None:
    """The cost that units of this granularity take with them; None for masks, which leave all costs as they are.

    Raises:
        RecipeError: granularities that cannot be ranked in one plan.

    Example:
        >>> what_it_saves("channel"), what_it_saves("experts"), what_it_saves("element")
        ('macs', 'params', None)
    """
    if isinstance(granularity, Granularity):
        return None
    kind = kind_of(granularities(granularity))
    return kind.saves if kind.physical else None


def grouped(
    model: nn.Module, example: Example, granularity: GranularityLike | None, protect: Protect = ()
) -> tuple[Sequence[Group], Trace | None]:
    """The groups of a granularity, and the trace that they were found in (None for masks)."""
    unit, kinds = units_of(granularity, example)
    request = Request(target=None, granularity=spelt_out(kinds), protect=patterns_of(model, protect))
    candidates = candidates_of(model, example, request, unit)
    return candidates.groups, candidates.trace


def criterion_of(criterion: CriterionLike) -> Criterion:
    """A criterion by name, by {"name": ..., options}, or as it is."""
    if not isinstance(criterion, Mapping):
        return criteria.get(criterion)
    choice = Named.of(criterion)
    return criteria.get(choice.name, choice.options)
