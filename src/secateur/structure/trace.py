"""What one run of the model leaves behind: steps, axes, uses of sizes, outputs. Plain records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor
from torch._ops import OpOverload

from secateur.structure.axes import Axis, Space
from secateur.structure.provenance import Attribute, Expr
from secateur.types import Condition, Lock

Axes: TypeAlias = tuple[Axis, ...]
Op: TypeAlias = OpOverload  # one ATen operator with its overload, for example aten.add.Tensor
Args: TypeAlias = tuple[object, ...]  # as a call passes them: tensors, numbers, lists of either
Kwargs: TypeAlias = dict[str, object]
PLAIN = frozenset([bool, int, float, str, type(None)])  # arguments that hold no tensor


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor of the run, by number."""

    number: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where in the model and in the user's code something happened."""

    op: str = ""
    module: str = ""
    where: str = ""


@dataclass(eq=False, slots=True)
class Restrict:
    """How an operation that mixes a dimension (a norm, a softmax, a mean) is replayed on kept coordinates.

    Args:
        inputs: (tensor number, dimension, axis) of everything that is cut before the operation.
        outputs: (position among the tensor results, dimension, axis) of what is spread out again.
        sizes: positional argument -> axis or axes whose kept size replaces the integer(s) there.
        aligned: positions in `inputs` of dimensions that meet index by index: they must keep the same coordinates.
    """

    inputs: list[tuple[int, int, Axis]]
    outputs: list[tuple[int, int, Axis]] = field(default_factory=list)
    sizes: dict[int, Axis | tuple[Axis, ...]] = field(default_factory=dict)
    aligned: list[tuple[int, ...]] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Step:
    """One executed ATen call.

    Args:
        func: the operator overload; args and kwargs hold `Ref` in place of tensors.
        outputs: numbers of the tensor results, in order.
        contracted: (tensor number, dimension, axis) summed over by this call.
        restrict: how to replay a call that mixes a dimension, if it does.
        cost: each entry is a product of dimensions; the sum of the products is the multiply-accumulates.
        place: where it happened.
    """

    func: Op
    args: Args
    kwargs: Kwargs
    outputs: list[int]
    contracted: list[tuple[int, int, Axis]]
    restrict: Restrict | None
    cost: list[Axes]
    place: Place


@dataclass(eq=False, slots=True)
class SizeUse:
    """An integer that the user's code passed as the size of `axis` (`expr` says how it came about).

    Where `axis` is a plain integer, the value went into arithmetic and must stay what it was.
    """

    expr: Expr
    axis: Axis | int
    place: Place


@dataclass(frozen=True, eq=False)
class Chosen:
    """A number that chooses what an operator does.

    Args:
        condition: what is said where a dimension of it is cut.
        axes: of the tensors that the operator is applied to.
    """

    condition: Condition
    axes: Sequence[Axis]


@dataclass(frozen=True, eq=False)
class Front:
    """A call that counts dimensions of data from the front.

    Args:
        name: of the function.
        place: where it stands.
        dims: those that it names.
        axes: of the tensor.
        thin: those that a squeeze before would have dropped, were they of size one.
    """

    name: str
    place: Place
    dims: tuple[int, ...]
    axes: Axes
    thin: Axes = ()


@dataclass(eq=False)
class Trace:
    """Everything that one execution taught us about a model.

    Args:
        space: the atoms.
        steps: the executed calls, in order.
        names: tensor number -> name, for parameters and buffers.
        constants: tensor number -> tensor, for inputs and tensors that the model holds elsewhere.
        axes: tensor number -> dimensions, of every tensor of the run.
        roles: (name, dimension) -> "in" or "out", from the contractions in which a parameter took part.
        size_uses: integers to watch.
        inputs, outputs: tensor numbers.
        left: those of what else is still there after the run.
        heads, inner: ids of atoms seen as batch, and as inner, dimension of products of two activations.
        widths: dimensions of weights in products, and the widths of tables: what makes units of their atoms.
        parallel: dimensions over which products with weights run side by side (blocks, experts).
        rows: dimensions that a product with a weight goes along without summing over them: each position for itself.
        summed: dimensions that products with weights sum over.
        made, consumed: dimensions of weights that layers (linear, convolutions) make, and those that they sum over.
        competing: dimensions that a softmax runs over, and the reason to lock them if they are no hidden units.
        aliases: every other name of a tied tensor -> its first name.
        values: attributes as they were during the run.
        conditions: what the run depended on.
        rounded: lines that round numbers in which sizes meet: conditions where one of these sizes is cut.
        reckoned: whole numbers that the code made of sizes.
        scales: expressions of sizes that went into fractions: those are tried as scales.
        chosen: numbers that choose what an operator does, and that another run may bring otherwise.
        fronts: dimensions that the code counts from the front.
        factors: sizes, by themselves or in fractions, by which tensors were multiplied or divided.
        further: runs on further examples, which the plan has to hold for as well.
        beside: runs that were made to see what else constrains the model: in train mode, or along another branch.
            They share atoms and uses of sizes with this run, but are replayed by nobody.
    """

    space: Space = field(default_factory=Space)
    steps: list[Step] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    constants: dict[int, Tensor] = field(default_factory=dict)
    axes: dict[int, Axes] = field(default_factory=dict)
    roles: dict[tuple[str, int], str] = field(default_factory=dict)
    size_uses: list[SizeUse] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    left: list[int] = field(default_factory=list)
    heads: list[Axis] = field(default_factory=list)
    inner: list[Axis] = field(default_factory=list)
    widths: list[Axis] = field(default_factory=list)
    parallel: list[Axis] = field(default_factory=list)
    rows: list[Axis] = field(default_factory=list)
    summed: list[Axis] = field(default_factory=list)
    made: list[Axis] = field(default_factory=list)
    consumed: list[Axis] = field(default_factory=list)
    competing: list[tuple[Axis, Lock]] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    values: dict[Attribute, int] = field(default_factory=dict)
    conditions: list[Condition] = field(default_factory=list)
    rounded: list[Condition] = field(default_factory=list)
    reckoned: list[SizeUse] = field(default_factory=list)
    scales: list[Expr] = field(default_factory=list)
    factors: list[SizeUse] = field(default_factory=list)
    chosen: list[Chosen] = field(default_factory=list)
    fronts: list[Front] = field(default_factory=list)
    further: list[Trace] = field(default_factory=list)
    beside: list[Trace] = field(default_factory=list)

    def another(self) -> Trace:
        """A trace of another run of the same model: what holds for one holds for both."""
        shared: tuple[str, ...] = ("space", "roles", "size_uses", "heads", "inner", "widths", "parallel", "rows")
        shared += ("summed", "made", "consumed", "competing", "aliases", "values", "reckoned", "scales")
        shared += ("factors", "chosen", "fronts")
        return Trace(**{name: getattr(self, name) for name in shared})

    def tensors(self) -> dict[str, Axes]:
        """Name -> dimensions of every parameter and buffer that the run used, or another run beside it."""
        found: dict[str, Axes] = {}
        for run in (self, *self.further, *self.beside):
            for number, name in run.names.items():
                found.setdefault(name, run.axes[number])
        return found


def tensors_of(tree: object) -> list[Tensor]:
    """Tensors in nested lists, tuples and dicts, in order."""
    found: list[Tensor] = []
    _gather(tree, found)
    return found


def _gather(tree: object, found: list[Tensor]) -> None:
    if type(tree) in PLAIN:  # most are, and of a number it takes long to hear that it is no tensor
        return
    if isinstance(tree, Tensor):
        found.append(tree)
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            _gather(item, found)
    elif isinstance(tree, dict):
        for item in tree.values():
            _gather(item, found)


def with_refs(tree: object, numbers: dict[int, int]) -> object:
    """The arguments with a number in place of every tensor: a trace keeps no activation alive."""
    if type(tree) in PLAIN:
        return tree
    if isinstance(tree, Tensor):
        return Ref(numbers[id(tree)])
    if isinstance(tree, (list, tuple)):
        items = [with_refs(item, numbers) for item in tree]
        return items if isinstance(tree, list) else tuple(items)
    if isinstance(tree, dict):
        return {key: with_refs(item, numbers) for key, item in tree.items()}
    return tree


def numbers_in(value: object) -> Sequence[int]:
    """Tensor numbers in an argument tree."""
    if isinstance(value, Ref):
        return [value.number]
    if isinstance(value, (list, tuple)):
        return [n for item in value for n in numbers_in(item)]
    if isinstance(value, dict):
        return [n for item in value.values() for n in numbers_in(item)]
    return []
