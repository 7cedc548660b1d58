"""Plans that remove whole blocks: which ones under a target, and which integers and lists of the model follow."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import floor
from typing import Any

import torch
from torch import Tensor, nn

from secateur.apply.layers import Layers, block_names, certify_layers, compare, dropped, identity_outputs
from secateur.call import call, outputs
from secateur.criteria.base import Context, Criterion, named_tensors, require_finite
from secateur.errors import CertificateError, ForwardError, RecipeError, TargetError, UnsupportedError
from secateur.integrations.transformers import shapes_of
from secateur.planning.cuts import AMOUNTS, _below, _relative
from secateur.planning.expressible import require_native, require_transformers, searched
from secateur.planning.layer_scores import Rule
from secateur.planning.plan import Evidence, Plan, fingerprint
from secateur.selection.budget import RemovalOrder, removal_order
from secateur.structure.capture import quiet
from secateur.structure.layers import Stack, find_stacks
from secateur.structure.provenance import Attribute, owners
from secateur.types import Certificate, Group, Lock, Span

TARGETS = (*AMOUNTS, "params", "macs", "memory_bytes")
INDEX = re.compile(r"(^|_)(idx|index|id|layer|block|number|num|no|i|depth)s?($|_)")
LENGTH = re.compile(r"(^|_)(n_?)?(layers?|blocks?|depths?)$")
PER_LAYER = re.compile(r"(^|_)(layers?|blocks?|attention_window)(_|$)")
SIDES = ("encoder", "decoder")


def layer_plan(
    model: nn.Module,
    example: Any,
    rule: Criterion | Rule,
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
    scores = _scores(model, rule, used, groups, context)
    relative = isinstance(rule, Criterion) and request["scope"] == "global" and not rule.comparable
    costs = _Costs(model, used, depth.macs)
    choice = _Choice(used, costs, request)
    keep = choice.choose({n: _relative(s) if relative else s for n, s in scores.items()}, scores)
    layers, attributes = decision(model, example, used, keep)
    decided = copy.deepcopy(layers)
    if request.get("expressible"):
        attributes = {**attributes, **_native(model, layers, attributes)}
    total, gone = sum(g.size for g in groups), sum(int((~mask).sum()) for mask in keep.values())

    def prove(whole: nn.Module, cut: nn.Module) -> Certificate:
        proof = certify_layers(whole, cut, example, decided, dtype=dtype, tolerance=tolerance)
        if request.get("expressible"):
            require_native(cut, example)
        return proof

    return Plan(
        fingerprint=fingerprint(model),
        model=type(model).__name__,
        request=request,
        groups={
            g.name: {
                "granularity": "layer",
                "size": g.size,
                "removed": torch.nonzero(~keep[g.name]).flatten().tolist(),
            }
            for g in groups
        },
        cuts={},
        attributes=attributes,
        masks={},
        units={"what": "layer", "removed": gone, "total": total, "sparsity": gone / max(total, 1)},
        cost={what: [costs.of(what, {}), costs.of(what, keep)] for what in ("params", "macs")},
        evidence=Evidence(
            model,
            groups,
            scores,
            keep,
            None,
            prove,
            example,
        ),
        layers=layers,
    )


def _native(model: nn.Module, layers: Layers, attributes: Mapping[Attribute, int]) -> dict[Attribute, int]:
    require_transformers(model)
    with dropped(model, layers, attributes):
        shapes, start = shapes_of(model), copy.deepcopy(model.config)
    return searched(model, shapes, start)


def layer_groups(model: nn.Module, example: Any, protect: Sequence[str] = ()) -> list[Group]:
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
    """Blocks as units: every weight of a block belongs to its unit."""
    tensors = dict(model.named_parameters())
    spans = [
        Span(name, torch.full([1] * tensors[name].dim(), block.index), "self")
        for block in stack.blocks
        for name in block.parameters
    ]
    return Group(stack.path or type(model).__name__, "layer", (stack.size,), tuple(spans))


def _scores(
    model: nn.Module,
    rule: Criterion | Rule,
    stacks: Sequence[Stack],
    groups: Sequence[Group],
    context: Mapping[str, Any],
) -> dict[str, Tensor]:
    if isinstance(rule, Criterion):
        return rule.score(Context(model, groups, **context))
    found = rule.score(model, stacks, context["example"], context["data"], context["loss"])
    return {group.name: found[stack.path].float() for group, stack in zip(groups, stacks, strict=True)}


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
            return _below(order, scores, limit)
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


# -- what follows ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Followers:
    """Integers and lists that follow the blocks of one stack.

    Args:
        index: attribute names, relative to the block, that hold its place -> offset of the place.
        length: integers that hold the number of blocks.
        lists: (owner, name) of lists with one item per block.
    """

    index: Mapping[tuple[str, str], int]
    length: tuple[Attribute, ...]
    lists: tuple[tuple[str, str], ...]


def followers(model: nn.Module, stack: Stack) -> Followers:
    """Find what counts or numbers the blocks of a stack, by value and name; `probe` puts it to the test."""
    return Followers(_index(model, stack), tuple(_lengths(model, stack)), tuple(_lists(model, stack)))


def _index(model: nn.Module, stack: Stack) -> dict[tuple[str, str], int]:
    found: dict[tuple[str, str], int] | None = None
    for block in stack.blocks:
        here = {
            (path, name): value - block.index
            for path, module in model.get_submodule(block.name).named_modules()
            for name, value in vars(module).items()
            if type(value) is int and INDEX.search(name)
        }
        found = here if found is None else {k: v for k, v in found.items() if here.get(k) == v}
    return {k: v for k, v in (found or {}).items() if v in (0, 1)}


def _around(model: nn.Module, stack: Stack) -> Iterator[tuple[str, Any]]:
    """Modules around the stack and the configs that they hold."""
    for path, owner in owners(model):
        holder = path if isinstance(owner, nn.Module) else path.rpartition(".")[0]
        if holder == "" or (stack.path + ".").startswith(f"{holder}."):
            yield path, owner


def _of_this_side(stack: Stack, path: str, name: str, names: Sequence[str]) -> bool:
    """Whether a name means this stack, in models that have an encoder and a decoder."""
    mine = [side for side in SIDES if side in stack.path]
    if len(mine) != 1 or mine[0] in name:
        return not any(side in name for side in SIDES if side not in mine) or bool(mine and mine[0] in name)
    if any(side in name for side in SIDES):
        return False
    own_name_exists = any(mine[0] in other and LENGTH.search(other) for other in names)
    return mine[0] in path or not own_name_exists


def _lengths(model: nn.Module, stack: Stack) -> Iterator[Attribute]:
    stages = [int(part) for part in stack.path.split(".") if part.isdigit()]
    for path, owner in _around(model, stack):
        names = list(vars(owner))
        for name, value in vars(owner).items():
            if not LENGTH.search(name) or not _of_this_side(stack, path, name, names):
                continue
            # Of a stage of several, a number outside it would count the stages.
            if type(value) is int and value == stack.size and (not stages or _digits(path) == len(stages)):
                yield Attribute(path, name)
            if type(value) in (list, tuple) and stages and stages[-1] < len(value):
                item = value[stages[-1]]
                if type(item) is int and item == stack.size:
                    yield Attribute(path, name, stages[-1])


def _digits(path: str) -> int:
    return sum(part.isdigit() for part in path.split("."))


def _lists(model: nn.Module, stack: Stack) -> Iterator[tuple[str, str]]:
    staged = any(part.isdigit() for part in stack.path.split("."))
    for path, owner in _around(model, stack):
        names = list(vars(owner))
        for name, value in vars(owner).items():
            fits = type(value) in (list, tuple) and len(value) == stack.size and PER_LAYER.search(name)
            if fits and not staged and _of_this_side(stack, path, name, names):
                yield path, name


def edits_of(
    model: nn.Module, stacks: Sequence[Stack], keep: Mapping[str, Tensor], *, renumber: bool
) -> tuple[Layers, dict[Attribute, int]]:
    """The removals in plan form and the integers that follow; where two stacks disagree the integer stays."""
    layers: dict[str, dict[str, Any]] = {}
    attributes: dict[Attribute, int] = {}
    disputed: set[Attribute] = set()
    for stack in stacks:
        stays = keep[stack.path or type(model).__name__]
        left = [block for block, k in zip(stack.blocks, stays, strict=True) if k]
        if len(left) == stack.size:
            continue
        found = followers(model, stack)
        removed = torch.nonzero(~stays).flatten().tolist()
        layers[stack.path] = {"size": stack.size, "removed": removed, "lists": [list(pair) for pair in found.lists]}
        for attribute in found.length:
            if attributes.setdefault(attribute, len(left)) != len(left):
                disputed.add(attribute)
        for (path, name), offset in found.index.items() if renumber else ():
            for place, block in enumerate(left):
                owner = f"{block.name}.{path}" if path else block.name
                if place != block.index:
                    attributes[Attribute(owner, name)] = place + offset
    return layers, {a: v for a, v in attributes.items() if a not in disputed}


def decision(
    model: nn.Module, example: Any, stacks: Sequence[Stack], keep: Mapping[str, Tensor]
) -> tuple[Layers, dict[Attribute, int]]:
    """The removals and what follows them; the place numbers of the blocks stay where the forward computes with them.

    Raises:
        UnsupportedError: either way the result is not the model with identity blocks.
    """
    layers, attributes = edits_of(model, stacks, keep, renumber=True)
    if not layers or _fault(model, example, layers, attributes) is None:
        return layers, attributes
    kept_numbers = edits_of(model, stacks, keep, renumber=False)
    fault = _fault(model, example, *kept_numbers)
    if fault is not None:
        raise UnsupportedError(
            "The model without these blocks is not the model with identity in their place.",
            why=f"{', '.join(block_names(model, layers))}: {fault.why or fault.what}",
            hint="Each of them can go by itself; ask for less, or protect the ones that other code depends on.",
        )
    return kept_numbers


def probe(model: nn.Module, example: Any, stacks: Sequence[Stack]) -> list[Stack]:
    """Try to take blocks out, one at a time, and lock those whose absence is not the same as an identity.

    Tried are the first, the middle and the last free block of every stack and those whose parameters are unlike most;
    where the middle one fails all are tried. The certificate of a plan holds for its choice as a whole.

    Cost: two forward passes per trial; the model is patched meanwhile and restored.
    """
    result = []
    for stack in stacks:
        free = stack.free
        if not free:
            result.append(stack)
            continue
        middle = free[len(free) // 2]
        odd = {i for i in free if _signature(model, stack, i) != _signature(model, stack, middle)}
        reasons = {
            i: lock for i in sorted({free[0], middle, free[-1], *odd}) if (lock := _trial(model, example, stack, i))
        }
        if middle in reasons:
            rest = {i: lock for i in free if i not in reasons and (lock := _trial(model, example, stack, i))}
            reasons = {**reasons, **rest}
        result.append(stack.locked(reasons))
    return result


def _signature(model: nn.Module, stack: Stack, index: int) -> list[tuple[str, torch.Size]]:
    return [(name, p.shape) for name, p in model.get_submodule(stack.blocks[index].name).named_parameters()]


def _trial(model: nn.Module, example: Any, stack: Stack, index: int) -> Lock | None:
    stays = torch.ones(stack.size, dtype=torch.bool)
    stays[index] = False
    name = stack.path or type(model).__name__
    try:
        decision(model, example, [stack], {name: stays})
    except UnsupportedError as error:
        reason = f"other code depends on the block; without it: {error.why.partition(': ')[2]}"
        return Lock(reason, module=stack.blocks[index].name)
    return None


def _fault(
    model: nn.Module, example: Any, layers: Layers, attributes: Mapping[Attribute, int]
) -> CertificateError | ForwardError | None:
    """Why the model without the blocks is not the model with identity in their place; None if it is."""
    expected = identity_outputs(model, example, layers)
    try:
        with dropped(model, layers, attributes), quiet(model), torch.no_grad():
            found = [t.detach() for t in outputs(call(model, example))]
        compare(expected, found, None)
    except (CertificateError, ForwardError) as error:
        return error
    return None
