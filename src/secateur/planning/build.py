"""From what is asked to a plan: find, score, decide, write. The only place that builds a `Plan` from a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from secateur import criteria
from secateur.criteria.base import Context, Criterion
from secateur.errors import InputError, RecipeError
from secateur.kinds.base import Candidates, Keep, Left
from secateur.kinds.find import find, is_physical, spelt_out
from secateur.kinds.weights.granularity import Granularity, parse
from secateur.kinds.weights.kind import Weights
from secateur.kinds.weights.nm import NM
from secateur.measure.staircase import width_grid
from secateur.model.admit import admit
from secateur.model.behaviour import unprovable, weights_kept
from secateur.model.call import as_loss, device_of, several
from secateur.model.guard import guard
from secateur.model.protect import patterns_of
from secateur.planning.by_hand import given_keep, given_scores
from secateur.planning.decide import decide
from secateur.planning.decision import Evidence, counted, fingerprint, removals
from secateur.planning.plan import Plan
from secateur.planning.solved import Blocks, recorded_settings, solved_plan, solver_of
from secateur.registry import suggestion
from secateur.request import (
    ALLOCATION,
    CRITERION,
    MIN_KEEP,
    MIN_KEEP_FRACTION,
    SCALES,
    SCOPE,
    Amount,
    Named,
    Request,
    Target,
    default_granularity,
    granularities,
)
from secateur.structure.elsewhere import left_behind
from secateur.structure.provenance import read
from secateur.structure.trace import Trace
from secateur.types import Certificate, Data, Example, Group, Loss, Protect
from secateur.words import spoken

CriterionLike = str | Criterion | Mapping[str, object]
GranularityLike = str | Mapping[str, object] | Granularity | Sequence[str | Mapping[str, object]]
GIVEN = "given"  # in the place of a criterion, where the caller said which units go


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
    allocation: str = ALLOCATION,
    protect: Protect = (),
    min_keep: int = MIN_KEEP,
    min_keep_fraction: float = MIN_KEEP_FRACTION,
    round_to: int | Literal["auto"] | None = None,
    seed: int = 0,
    dtype: str = "float32",
    tolerance: float | None = None,
    expressible: bool = False,
    scales: str = SCALES,
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
        allocation: "global", "uniform", "erk" or "lamp": how a global amount is spread.
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
    kinds = None if masks is not None else units_of(granularity, example)
    model = admit(model, copied=kinds is not None and is_physical(kinds[1]))
    if kinds is None:
        assert masks is not None
        return plan_of_masks(model, masks, target, scores, keep, remove)
    given = keep is not None or remove is not None
    if target is None and scores is None and not given:
        target = implied_target(granularity)
    _one_way(target, scores, given=given, both=keep is not None and remove is not None)
    solver = None if given or scores is not None else solver_of(criterion, blocks)
    rule = None if given or scores is not None or solver is not None else criterion_of(criterion)
    chosen = Named(GIVEN) if rule is None else Named(rule.name, rule.options())
    chosen = chosen if solver is None else Named(solver.name, solver.options())
    unit, choices = kinds
    request = Request(
        target=None if given else Target.of(target),
        criterion=chosen,
        granularity=spelt_out(choices),
        scope=scope,
        allocation=allocation,
        protect=patterns_of(model, protect),
        min_keep=min_keep,
        min_keep_fraction=min_keep_fraction,
        round_to=width_grid(str(device_of(model))) if round_to == "auto" else round_to,
        seed=seed,
        expressible=expressible,
        scales=scales,
        blocks=None if solver is None else recorded_settings(blocks),
    )
    if solver is not None:
        return solved_plan(model, example, request, solver, data, blocks=blocks, progress=progress)
    with weights_kept(model):
        if unit is not None:
            candidates: Candidates = Weights(model, example, request, unit)
        else:
            candidates = find(model, example, request, examples)
    if given:
        values: Mapping[str, Tensor] = {}
        chosen_keep = given_keep(candidates, keep, remove)
    else:
        values = _scores(candidates, rule, scores, data=data, loss=as_loss(loss), seed=seed)
        alike = comparable if rule is None else rule.comparable
        chosen_keep = decide(candidates, values, request, comparable=alike)
    return plan_of(candidates, request, values, chosen_keep, dtype=dtype, tolerance=tolerance)


def plan_of(
    candidates: Candidates,
    request: Request,
    scores: Mapping[str, Tensor],
    keep: Keep,
    *,
    dtype: str,
    tolerance: float | None,
) -> Plan:
    """The plan of a decision, not yet certified.

    Args:
        candidates: what competed, with the model.
        request: what was asked.
        scores: group name -> scores; empty where the units were given.
        keep: group name -> bool, True = the unit stays.
        dtype: precision of the certificate.
        tolerance: of the certificate; None: by dtype.
    """
    model, edit = candidates.model, candidates.write(keep)
    groups = [group for group in candidates.groups if group.name in keep]
    cost: dict[str, list[int]] = {}
    if candidates.physical:
        whole, left = Left.of({n: torch.ones_like(mask) for n, mask in keep.items()}), Left.of(keep)
        cost = {what: [candidates.price(what, whole), candidates.price(what, left)] for what in ("params", "macs")}

    def prove(original: nn.Module, cut: nn.Module) -> Certificate:
        example = candidates.example
        try:
            with guard(original, cut, example=example):
                return candidates.prove(original, cut, keep, dtype=dtype, tolerance=tolerance)
        except Exception as error:
            other = unprovable(error, original, example)
            if other is error:
                raise
            raise other from error

    return Plan(
        fingerprint=fingerprint(model),
        model=type(model).__name__,
        request=request,
        groups=removals(groups, keep) if candidates.physical else {},
        cuts=edit.cuts,
        attributes=edit.attributes,
        masks=edit.masks,
        units=counted(request.what, keep),
        cost=cost,
        evidence=Evidence(
            model,
            groups,
            scores,
            keep,
            candidates.structure,
            prove if candidates.physical else None,
            candidates.example,
            dtype,
            tolerance,
        ),
        layers=edit.layers,
        scales=edit.scales,
        left_out=tuple(candidates.left_out),
        sizes={**{attribute: read(model, attribute) for attribute in edit.attributes}, **edit.sizes},
        conditions=(
            *(() if candidates.trace is None else candidates.trace.conditions),
            *candidates.conditions,
            *left_behind(model, edit.cuts, edit.attributes),
        ),
    )


def plan_of_masks(model: nn.Module, masks: Mapping[str, Tensor], *others: Mapping[str, object] | Target | None) -> Plan:
    """A plan of exactly these masks.

    Raises:
        RecipeError: something else is given that decides.
        InputError: an unknown parameter, or a mask of another shape or dtype.
    """
    if any(other is not None for other in others):
        raise RecipeError("masks= says exactly what goes.", hint="Leave out target, scores, keep and remove.")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    full = {}
    for name, mask in masks.items():
        if name not in parameters:
            raise InputError(f"the model has no parameter {name!r}", hint=suggestion(name, parameters))
        shape = parameters[name].shape
        if mask.dtype != torch.bool or mask.shape != shape:
            raise InputError(
                f"the mask of {name!r} is {mask.dtype} {tuple(mask.shape)}, not bool {tuple(shape)}",
                hint="True = keep, False = remove",
            )
        full[name] = mask.clone()
    request = Request(target=None, criterion=Named(GIVEN), granularity=(Named("element"),))
    return Plan(
        fingerprint=fingerprint(model),
        model=type(model).__name__,
        request=request,
        groups={},
        cuts={},
        attributes={},
        masks=full,
        units=counted("element", full),
        cost={},
        evidence=Evidence(model, [], {}, full),
    )


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


def grouped(
    model: nn.Module, example: Example, granularity: GranularityLike | None, protect: Protect = ()
) -> tuple[Sequence[Group], Trace | None]:
    """The groups of a granularity, and the trace that they were found in (None for masks)."""
    unit, kinds = units_of(granularity, example)
    request = Request(target=None, granularity=spelt_out(kinds), protect=patterns_of(model, protect))
    with weights_kept(model):
        candidates = Weights(model, example, request, unit) if unit is not None else find(model, example, request)
    return candidates.groups, candidates.trace


def criterion_of(criterion: CriterionLike) -> Criterion:
    """A criterion by name, by {"name": ..., options}, or as it is."""
    if not isinstance(criterion, Mapping):
        return criteria.get(criterion)
    choice = Named.of(criterion)
    return criteria.get(choice.name, choice.options)
