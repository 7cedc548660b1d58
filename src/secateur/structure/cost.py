"""What a network costs after a cut, from the trace alone: no model is built to price a plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from math import prod

from torch import nn

from secateur.model.tensors import named_tensors
from secateur.structure.axes import Atom, Axis, Prod, Space, leaves, resolve, size_after
from secateur.structure.trace import Axes, Trace

Form = tuple[object, ...]  # what tells two dimensions apart: the atoms below them and how they are put together


class PricedSum:
    """A sum of products of dimensions that remembers its last value.

    A search asks for hundreds of nearly equal counts. Only the dimensions whose atoms changed since the last question
    are sized anew, and only the products in which they occur.

    Args:
        terms: (dimensions, weight) of every product.
        space: the atoms; where they are united later, the sum finds its dimensions anew.
        fixed: what no cut changes.

    Cost: one walk over the terms; then, per question, what depends on changed atoms.
    """

    def __init__(self, terms: Iterable[tuple[Axes, int]], space: Space, fixed: int = 0) -> None:
        self._terms, self._space, self._fixed = list(terms), space, fixed
        self._version = -1  # of the space when the sum was indexed: a cost that nobody asks for is not

    def _index(self) -> None:
        """Number the distinct dimensions; note where each atom, and each dimension, occurs."""
        self._version = self._space.version
        known: dict[Form, int] = {}
        same: dict[int, int] = {}  # id of an axis -> its number: most products name the very same objects
        self._axes: list[Axis] = []
        # Blocks of one shape share most of their dimensions: equal products are merged, whatever their order.
        products: Counter[tuple[int, ...]] = Counter()
        for axes, weight in self._terms:
            places: list[int] = []
            for axis in axes:
                if id(axis) not in same:
                    same[id(axis)] = known.setdefault(_form(axis), len(self._axes))
                    if same[id(axis)] == len(self._axes):
                        self._axes.append(axis)
                places.append(same[id(axis)])
            products[tuple(sorted(places))] += weight
        self._products = list(products.items())
        self._uses: list[list[int]] = [[] for _ in self._axes]  # dimension -> the products that it occurs in
        for i, (numbers, _) in enumerate(self._products):
            for number in dict.fromkeys(numbers):
                self._uses[number].append(i)
        self._by_atom: dict[int, list[int]] = {}  # atom -> the dimensions that it stands below
        self._atoms: dict[int, Atom] = {}
        for number, axis in enumerate(self._axes):
            for atom in {a.id: a for a in leaves(axis)}.values():
                self._atoms[atom.id] = atom
                self._by_atom.setdefault(atom.id, []).append(number)
        self._counts: dict[int, int] = {}
        self._sizes = [axis.size for axis in self._axes]
        self._values = [weight * prod(self._sizes[n] for n in numbers) for numbers, weight in self._products]
        self._total = self._fixed + sum(self._values)

    def value(self, counts: Mapping[int, int]) -> int:
        """The sum when atom `i` keeps `counts[i]` indices (absent = all)."""
        if self._version != self._space.version:
            self._index()
        stale = {number for i in self._changed(counts) for number in self._by_atom[i]}
        touched = set()
        for number in stale:
            size = size_after(self._axes[number], counts)
            if size != self._sizes[number]:
                self._sizes[number] = size
                touched.update(self._uses[number])
        for i in touched:
            numbers, weight = self._products[i]
            value = weight * prod(self._sizes[n] for n in numbers)
            self._total += value - self._values[i]
            self._values[i] = value
        self._counts = dict(counts)
        return self._total

    def _changed(self, counts: Mapping[int, int]) -> Iterator[int]:
        for i in {**self._counts, **counts}:
            atom = self._atoms.get(i)  # the counts of a plan name atoms that occur in no product, too
            if atom is not None and counts.get(i, atom.size) != self._counts.get(i, atom.size):
                yield i


def _form(axis: Axis) -> Form:
    node = resolve(axis)
    if isinstance(node, Atom):
        return (node.id,)
    return ("x" if isinstance(node, Prod) else "+", *map(_form, node.parts))


class CostModel:
    """Multiply-accumulates and parameters as functions of how many indices every atom keeps.

    Args:
        model: the captured model.
        trace: its trace.
        samples: samples in the example, by which multiply-accumulates are divided: `secateur.measure.macs.samples_in`.

    Cost: one walk over the products and tensors; each further question costs what depends on the changed atoms.
    """

    def __init__(self, model: nn.Module, trace: Trace, samples: int = 1) -> None:
        self.samples = samples
        tensors, whole = trace.tensors(), named_tensors(model)
        named = {name: tensor for name, tensor in whole.items() if isinstance(tensor, nn.Parameter)}
        # What the forward never touched has no dimensions in the trace: it is there before and after.
        fixed = sum(p.numel() for name, p in named.items() if name not in tensors)
        fixed_bytes = sum(t.numel() * t.element_size() for name, t in whole.items() if name not in tensors)
        self._macs = PricedSum(((axes, 1) for step in trace.steps for axes in step.cost), trace.space)
        self._params = PricedSum(((axes, 1) for name, axes in tensors.items() if name in named), trace.space, fixed)
        self._bytes = PricedSum(
            ((axes, whole[name].element_size()) for name, axes in tensors.items()), trace.space, fixed_bytes
        )

    def macs(self, counts: Mapping[int, int]) -> int:
        """Multiply-accumulates of one forward pass for one sample (of the whole example where `samples` is 1)."""
        return self._macs.value(counts) // self.samples

    def params(self, counts: Mapping[int, int]) -> int:
        """Number of parameters, tied ones once."""
        return self._params.value(counts)

    def bytes(self, counts: Mapping[int, int]) -> int:
        """Bytes of all parameters and buffers."""
        return self._bytes.value(counts)
