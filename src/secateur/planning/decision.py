"""A plan as data: what was asked, what was decided, the edit that follows, and the proof."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from secateur.files.seeds import stable_hash
from secateur.kinds.edit import Edit
from secateur.kinds.layers.drop import Layers
from secateur.kinds.slices.fold import Scale
from secateur.model.tensors import named_tensors
from secateur.request import Efforts, Request
from secateur.structure.groups import Structure
from secateur.structure.provenance import Attribute
from secateur.types import Certificate, Condition, Cuts, Example, Group, LeftOut, Removal, Units

GIVEN = "given"  # in the place of a criterion, where the caller said which units go


@dataclass(frozen=True, eq=False, repr=False)
class Evidence:
    """What a plan that was made in this process still knows; never saved.

    Args:
        model: the model that it was made for.
        groups: the groups that competed.
        scores: group name -> scores; empty where the units were given.
        keep: group name -> bool, True = keep.
        structure: what the engine found, for cuts.
        certify: (original, cut model, on which inputs; None: as was asked) -> certificate, where something is removed.
        example: the forward inputs that the plan was made with.
        dtype: precision that the cut is proved in, on this model and on others.
        tolerance: of that proof; None: by dtype.
        examples: further inputs that the plan was made with.
        conditions: what the proof on `model` depends on.
        settings: how `model` was set then, see `secateur.planning.unchanged`.
    """

    model: nn.Module
    groups: Sequence[Group]
    scores: Mapping[str, Tensor]
    keep: Mapping[str, Tensor]
    structure: Structure | None = None
    certify: Callable[[nn.Module, nn.Module, Efforts | None], Certificate] | None = None
    example: Example = None
    dtype: str = "float32"
    tolerance: float | None = None
    examples: Sequence[Example] = ()
    conditions: tuple[Condition, ...] = ()
    settings: Hashable = None


@dataclass(eq=False)
class PlanData:
    """A decision: units to remove, the slices and attributes that follow, masks, and the proof.

    Args:
        fingerprint: hash of the names, shapes and dtypes of the model that it was made for.
        model: class name of that model.
        request: what was asked.
        groups: group name -> what goes from it.
        cuts: tensor name -> dimension -> kept indices, int64.
        attributes: integers on modules and configs that follow the cut.
        masks: parameter name -> bool mask, True = keep (element-like granularities).
        units: how many units go.
        cost: {"params": [before, after], "macs": [before, after]} where something is removed; macs for one sample.
        certificate: the proof, once made.
        evidence: scores and groups, while the process that made the plan lives.
        layers: path of a stack -> what goes from it.
        left_out: weights that the masks do not cover, or branches that may not go, each with its reason.
        scales: factors on what is left, as in `secateur.kinds.edit.Edit`.
        sizes: integers on modules and configs that the decision relies on -> their value before it.
        recorded: what the file that the plan was read from says of a proof. Anybody can write that into a file: it is
            shown as a record, and never taken for a certificate.
        conditions: what the proof depends on: of the run that the plan was learned from, and of another model or input
            once it is proved anew there.
        weights: parameter name -> new values of weights that stay, where a solver has moved them.
        notes: what of the making a reader should know; never saved.
    """

    fingerprint: str
    model: str
    request: Request
    groups: Mapping[str, Removal]
    cuts: Cuts
    attributes: Mapping[Attribute, int]
    masks: Mapping[str, Tensor]
    units: Units
    cost: Mapping[str, list[int]]
    certificate: Certificate | None = None
    evidence: Evidence | None = field(default=None, repr=False)
    layers: Layers = field(default_factory=dict)
    left_out: Sequence[LeftOut] = ()
    sizes: Mapping[Attribute, int] = field(default_factory=dict)
    scales: Sequence[Scale] = ()
    recorded: Certificate | None = None
    conditions: tuple[Condition, ...] = ()
    weights: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()

    @property
    def edit(self) -> Edit:
        """What is done to the model."""
        return Edit(self.cuts, self.attributes, self.layers, self.masks, self.sizes, tuple(self.scales), self.weights)

    @property
    def removes(self) -> bool:
        """Whether something goes physically, which needs a certificate."""
        return bool(self.cuts or self.layers)


def removals(groups: Sequence[Group], keep: Mapping[str, Tensor]) -> dict[str, Removal]:
    """What goes of every group."""
    return {
        g.name: Removal(
            granularity=g.granularity,
            size=g.size,
            removed=(~keep[g.name].flatten()).nonzero().flatten().tolist(),
        )
        for g in groups
    }


def counted(what: str, keep: Mapping[str, Tensor]) -> Units:
    """How many units go."""
    total = sum(mask.numel() for mask in keep.values())
    gone = total - sum(int(mask.sum()) for mask in keep.values())
    return Units(what=what, removed=gone, total=total, sparsity=gone / max(total, 1))


def fingerprint(model: nn.Module) -> str:
    """Hash of the names, shapes and dtypes of all parameters and buffers."""
    # No values: a plan fits the same network however long it was trained.
    tensors = sorted((n, list(t.shape), str(t.dtype)) for n, t in named_tensors(model).items())
    return stable_hash([list(entry) for entry in tensors])
