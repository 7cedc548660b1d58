"""Plans that remove whole blocks: which ones go under a target."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from math import floor
from typing import Any

import torch
from torch import Tensor, nn

from secateur.amounts.order import RemovalOrder, removal_order
from secateur.criteria.base import Context, Criterion
from secateur.errors import RecipeError, TargetError, UnsupportedError
from secateur.integrations.transformers import shapes_of
from secateur.kinds.layers.drop import Layers, dropped
from secateur.kinds.layers.prove import certify_layers
from secateur.model.tensors import named_tensors, require_finite
from secateur.planning.cuts import AMOUNTS, below, relative_scores
from secateur.planning.expressible import require_native, require_transformers, searched
from secateur.planning.followers import decision, probe
from secateur.planning.plan import Evidence, Plan, counted, fingerprint, removals
from secateur.structure.provenance import Attribute
from secateur.structure.stacks import Stack, find_stacks
from secateur.types import Certificate, Example, Group, Span

TARGETS = (*AMOUNTS, "params", "macs", "memory_bytes")


def layer_plan(
    model: nn.Module,
    example: Example,
    rule: Criterion,
    request: Mapping[str, Any],
    context: Mapping[str, Any],
    *,
    dtype: str,
    tolerance: float | None,
) -> Plan:
    """Decide which blocks go; see `make_plan` for the arguments and errors."""
    _check_request(request)
    for name, tensor in named_tensors(model).items():
        require_finite(tensor, name)
    depth = find_stacks(model, example, request["protect"])
    stacks = probe(model, example, depth.stacks)
    used = [stack for stack in stacks if stack.free]
    if not used:
        raise UnsupportedError(
            f"{type(model).__name__} has no blocks that can be removed.",
            why=_locked_summary(stacks),
            hint="Removable are elements of a ModuleList or Sequential with a residual path; else cut channels.",
        )
    groups = [_group(model, stack) for stack in used]
    scores = rule.score(Context(model, groups, **context))
    relative = request["scope"] == "global" and not rule.comparable
    costs = _Costs(model, used, depth.macs)
    choice = _Choice(used, costs, request)
    keep = choice.choose({n: relative_scores(s) if relative else s for n, s in scores.items()}, scores)
    layers, attributes = decision(model, example, used, keep)
    decided = copy.deepcopy(layers)
    if request.get("expressible"):
        attributes = {**attributes, **_native(model, layers, attributes)}

    def prove(whole: nn.Module, cut: nn.Module) -> Certificate:
        proof = certify_layers(whole, cut, example, decided, dtype=dtype, tolerance=tolerance)
        if request.get("expressible"):
            require_native(cut, example)
        return proof

    return Plan(
        fingerprint=fingerprint(model),
        model=type(model).__name__,
        request=request,
        groups=removals(groups, keep),
        cuts={},
        attributes=attributes,
        masks={},
        units=counted("layer", keep),
        cost={what: [costs.of(what, {}), costs.of(what, keep)] for what in ("params", "macs")},
        evidence=Evidence(model, groups, scores, keep, None, prove, example),
        layers=layers,
    )


def _native(model: nn.Module, layers: Layers, attributes: Mapping[Attribute, int]) -> dict[Attribute, int]:
    require_transformers(model)
    with dropped(model, layers, attributes):
        shapes, start = shapes_of(model), copy.deepcopy(model.config)
    return searched(model, shapes, start)


def layer_groups(model: nn.Module, example: Example, protect: Sequence[str] = ()) -> list[Group]:
    """Stacks with free blocks as groups whose units are the blocks."""
    stacks = probe(model, example, find_stacks(model, example, protect).stacks)
    return [_group(model, stack) for stack in stacks if stack.free]


def _check_request(request: Mapping[str, Any]) -> None:
    target = request["target"]
    unknown = sorted(set(target) - set(TARGETS))
    if unknown or not target:
        what = f"target {unknown[0]!r} does not apply to layers." if unknown else "The target is empty."
        raise RecipeError(what, hint=f"say one or several of {', '.join(TARGETS)}")
    if request["scope"] not in ("global", "local") or request["allocation"] not in ("global", "uniform"):
        raise RecipeError(
            f"scope {request['scope']!r} with allocation {request['allocation']!r} does not apply to layers.",
            hint="Use scope global or local, and allocation global or uniform.",
        )


def _locked_summary(stacks: Sequence[Stack]) -> str:
    reasons = [lock.reason for stack in stacks for block in stack.blocks for lock in block.locks]
    return "; ".join(sorted(set(reasons), key=lambda r: (-reasons.count(r), r))[:3]) or "no stack of equal blocks runs"


def _group(model: nn.Module, stack: Stack) -> Group:
    """Blocks as units: every weight of a block belongs to its unit. What runs is named for criteria that watch it."""
    tensors = dict(model.named_parameters())
    spans = [
        Span(name, torch.full([1] * tensors[name].dim(), block.index), "self")
        for block in stack.blocks
        for name in block.parameters
    ]
    known = {
        "blocks": tuple(block.name for block in stack.blocks),
        "free": tuple(not block.locks for block in stack.blocks),
        "channel_dim": tuple(block.channel_dim for block in stack.blocks),
    }
    return Group(stack.path or type(model).__name__, "layer", (stack.size,), tuple(spans), attributes=known)


# -- how many --------------------------------------------------------------------------------------------------


class _Costs:
    """Sizes of the model without some blocks: exact, as nothing counted is shared between what goes and what stays."""

    def __init__(self, model: nn.Module, stacks: Sequence[Stack], macs: int) -> None:
        tensors = named_tensors(model)
        self.whole = {
            "params": sum(p.numel() for p in model.parameters()),
            "memory_bytes": sum(t.numel() * t.element_size() for t in tensors.values()),
            "macs": macs,
        }
        self.parts: dict[str, dict[str, list[int]]] = {"params": {}, "memory_bytes": {}, "macs": {}}
        for stack in stacks:
            name = stack.path or type(model).__name__
            held = [[tensors[p] for p in block.parameters] for block in stack.blocks]
            state = [list(model.get_submodule(block.name).buffers()) for block in stack.blocks]
            self.parts["params"][name] = [sum(p.numel() for p in ps) for ps in held]
            self.parts["memory_bytes"][name] = [
                sum(t.numel() * t.element_size() for t in (*ps, *bs)) for ps, bs in zip(held, state, strict=True)
            ]
            self.parts["macs"][name] = [block.macs for block in stack.blocks]

    def of(self, what: str, keep: Mapping[str, Tensor]) -> int:
        """Parameters, bytes or multiply-accumulates of what is left."""
        parts = (
            (part, stays) for n, mask in keep.items() for part, stays in zip(self.parts[what][n], mask, strict=True)
        )
        return self.whole[what] - sum(part for part, stays in parts if not stays)


class _Choice:
    """The shortest list of removals that meets every target."""

    def __init__(self, stacks: Sequence[Stack], costs: _Costs, request: Mapping[str, Any]) -> None:
        self.costs, self.request = costs, request
        self.stacks = dict(zip(costs.parts["params"], stacks, strict=True))

    def choose(self, ranked: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name of the stack -> bool, True = the block stays."""
        floors, worth = {}, {}
        for name, stack in self.stacks.items():
            stay = torch.tensor([bool(block.locks) for block in stack.blocks])
            worth[name] = ranked[name].double().cpu().masked_fill(stay, torch.inf)
            floors[name] = max(self.request["min_keep"], int(stay.sum()))
        scope = "local" if self.request["allocation"] == "uniform" else self.request["scope"]
        order = removal_order(worth, scope=scope, min_keep=floors, round_to=self.request["round_to"])
        target: Mapping[str, float] = self.request["target"]
        return order.keep(max([0, *(self._removals(order, scores, what, float(v)) for what, v in target.items())]))

    def _removals(self, order: RemovalOrder, scores: Mapping[str, Tensor], what: str, limit: float) -> int:
        most = len(order.group)
        if what == "threshold":
            return below(order, scores, limit)
        if what in ("sparsity", "count"):
            total = int(order.sizes.sum())
            wanted = int(limit) if what == "count" else floor(limit * total + 0.5)
            costs = [float(total - sum(order.kept_counts(n).values())) for n in range(most + 1)]
            enough = [n for n, removed in enumerate(costs) if removed >= wanted]
            reach = f"at most {costs[-1]:g} of {total} blocks can go, sparsity {costs[-1] / total:.3f}"
        else:
            bound = limit if what == "memory_bytes" else floor(limit * self.costs.whole[what])
            costs = [self.costs.of(what, order.keep(n)) for n in range(most + 1)]
            enough = [n for n, cost in enumerate(costs) if cost <= bound]
            reach = f"without its free blocks the model has {costs[-1]:,}; now it has {costs[0]:,}"
        if not enough:
            raise TargetError(
                f"The target {what} {limit:g} cannot be reached.",
                why=reach,
                hint="Ask for less, lower min_keep, protect fewer blocks, or cut channels as well.",
            )
        return enough[0]
