"""Inputs made anew in the form of an example: other values, another batch, shorter and longer.

A proof on the example alone sees what the example reaches: some positions, one length, one branch. What is made here
keeps the form (masks stay masks, numbers of tokens stay numbers of tokens) and changes the rest. Which sizes a model
takes nobody knows but the model: callers try, and what it refuses is not part of any promise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.model.call import tensors_in
from secateur.model.forms import map_tensors
from secateur.types import Example

SEED = 20  # of the values; any number
BRIEF = 8  # tokens that are enough to see what many do
FEW = 3  # samples that are enough to see what many do
GRID = 32  # the largest power of two that a new size is a multiple of, where the old one is


@dataclass(frozen=True, eq=False)
class Input:
    """An input and what is said about it.

    Args:
        what: for the certificate, for example "other values, batch 3, length 96 for 128".
        example: what one forward takes.
        passed: names of blocks that hand on what they are given.
    """

    what: str
    example: Example
    passed: tuple[str, ...] = ()


class Form:
    """The tensors of an example, of which others of the same form are made.

    Args:
        example: what one forward takes.
        model: its largest table of embeddings says which numbers of tokens there are, where the example holds one only.

    Attributes:
        batch: size of the first dimension, where all tensors share it; else None.
        sizes: other sizes that occur, ascending, but for 1.
        ones: whether a dimension of size 1 occurs among them.
        blank: numbers of integer tensors that hold one number only, which says nothing about the others.
        drawn: those of them that are drawn anew from the whole table all the same.
    """

    def __init__(self, example: Example, model: nn.Module) -> None:
        self.example = example
        held = list(tensors_in(example))
        # Looked at without the graph that an example may hang on; whether they ask for gradients is part of the form.
        self.gradients = [tensor.requires_grad for tensor in held]
        self.tensors = [tensor.detach() for tensor in held]
        first = {t.shape[0] for t in self.tensors if t.dim() > 0}
        self.batch = first.pop() if len(first) == 1 else None
        start = 0 if self.batch is None else 1
        found = {size for t in self.tensors for size in t.shape[start:]}
        self.sizes = sorted(found - {0, 1})
        self.ones = 1 in found
        tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
        self.vocabulary = max(tables, default=0)
        self.blank = [i for i, tensor in enumerate(self.tensors) if _is_blank(tensor)]
        self.drawn: frozenset[int] = frozenset()
        self._ranges: dict[int, tuple[Range, ...]] = {}  # of tensors, once they were asked about

    def anew(
        self,
        *,
        batch: int | None = None,
        sizes: Mapping[int, int] | None = None,
        wide: Mapping[int, int] | None = None,
    ) -> Example:
        """The example with other values, at other sizes.

        Args:
            batch: of the first dimension; None = as it is.
            sizes: old size -> new size, of all other dimensions that have the old one.
            wide: the same of last dimensions that are as long as the one before, as in square images.
        """
        generator = torch.Generator().manual_seed(SEED)

        def make(i: int, tensor: Tensor) -> Tensor:
            resized = self._resized(tensor, batch, sizes or {}, wide or {})
            if i in self.blank:
                return _numbers(0, self.vocabulary - 1, resized, generator) if i in self.drawn else resized
            if i not in self._ranges:
                self._ranges[i] = ranges_of(tensor)
            return _drawn(self._ranges[i], resized, generator).requires_grad_(self.gradients[i])

        each = enumerate(self.tensors)  # in the order in which they are met again
        return map_tensors(self.example, lambda _: make(*next(each)))

    def _resized(self, tensor: Tensor, batch: int | None, sizes: Mapping[int, int], wide: Mapping[int, int]) -> Tensor:
        square = _is_square(tensor)
        for d, old in enumerate(tuple(tensor.shape)):
            first = d == 0 and self.batch is not None
            new = (old if batch is None else batch) if first else sizes.get(old, old)
            if square and d == tensor.dim() - 1:
                new = wide.get(old, new)
            if new != old and old == 0:
                tensor = tensor.new_zeros([*tensor.shape[:d], new, *tensor.shape[d + 1 :]])
            elif new != old:
                # Repeated from the start, so that masks of ones stay such and positions stay in their range.
                tensor = tensor.index_select(d, torch.arange(new, device=tensor.device) % old)
        return tensor.clone()

    def brief(self, size: int) -> int:
        """Far shorter than a size where only tokens have it, and their masks; else as `shorter`."""
        return BRIEF if self._are_tokens(size) and size > 4 * BRIEF else shorter(size)

    def little(self, size: int) -> int:
        """A little longer than a size where only tokens have it; else as `longer`."""
        return size + BRIEF if self._are_tokens(size) and size > 4 * BRIEF else longer(size)

    def colours(self) -> set[int]:
        """Sizes that are nothing but the few channels of an image."""
        places = {(size, t.dim() == 4 and d == 1) for t in self.tensors for d, size in enumerate(t.shape)}
        return {size for size, channels in places if channels and size <= 4 and (size, False) not in places}

    def another(self, *, sparing: bool) -> list[int | None]:
        """Other batches to be tried, and None for none; of a large one a small one says as much."""
        if self.batch is None:
            return [None]
        return [FEW if sparing and self.batch > FEW else self.batch + 1, None]

    def _are_tokens(self, size: int) -> bool:
        held = [t for t in self.tensors if size in t.shape[1:]]
        return any(not t.is_floating_point() for t in held) and all(t.dim() == 2 for t in held)


def _is_square(tensor: Tensor) -> bool:
    return tensor.dim() > 2 and tensor.shape[-1] == tensor.shape[-2]


def _is_blank(tensor: Tensor) -> bool:
    whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    return whole and tensor.numel() > 1 and not _is_mask(tensor) and bool((tensor == tensor.flatten()[0]).all())


def _numbers(low: int, high: int, like: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randint(low, high + 1, tuple(like.shape), generator=generator)
    return drawn.to(dtype=like.dtype, device=like.device)


@dataclass(frozen=True)
class Range:
    """What the numbers of a tensor are like.

    Args:
        mask: whether they are zeros and ones, which must not become anything else.
        low: the least.
        high: the largest.
        mean: of those that are finite.
        std: likewise.
    """

    mask: bool
    low: float = 0.0
    high: float = 0.0
    mean: float = 0.0
    std: float = 0.0

    @classmethod
    def of(cls, tensor: Tensor) -> Range:
        """Of a tensor of real numbers."""
        if tensor.dtype == torch.bool or _is_mask(tensor):
            return cls(True)
        if not tensor.is_floating_point():
            return cls(False, int(tensor.min()), int(tensor.max())) if tensor.numel() else cls(True)
        finite = tensor.double()[torch.isfinite(tensor)]
        if not finite.numel():
            return cls(False)
        ends = float(finite.min()), float(finite.max())
        return cls(False, *ends, float(finite.mean()), float(finite.std(correction=0)))


def ranges_of(tensor: Tensor) -> tuple[Range, ...]:
    """Of a tensor, or of the real and the imaginary part of one."""
    return tuple(map(Range.of, _parts(tensor) if tensor.is_complex() else (tensor,)))


def _drawn(known: tuple[Range, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Other values from a tensor's range, in the shape of another."""
    if like.is_complex():
        parts = (_drawn((one,), other, generator) for one, other in zip(known, _parts(like), strict=True))
        return torch.complex(*parts)
    (seen,) = known
    if seen.mask:
        return like
    if not like.is_floating_point():
        return _numbers(int(seen.low), int(seen.high), like, generator)
    precision = torch.float64 if like.dtype == torch.float64 else torch.float32
    drawn = torch.randn(tuple(like.shape), generator=generator, dtype=precision)
    if seen.std > 0:
        drawn = drawn.mul_(seen.std).add_(seen.mean).clamp_(seen.low, seen.high)
    elif seen.mean != 0:  # blank: around the one number that it holds
        drawn = seen.mean * (1 + 0.5 * drawn)
    return drawn.to(dtype=like.dtype, device=like.device)


def _parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
    return tensor.real, tensor.imag


def _is_mask(tensor: Tensor) -> bool:
    """Zeros and ones, both or ones only: what stands in a mask, and what must not become anything else."""
    if tensor.is_complex() or tensor.numel() == 0:
        return False
    low, high = float(tensor.min()), float(tensor.max())
    return low >= 0 and high == 1 and bool(((tensor == 0) | (tensor == 1)).all())


def shorter(size: int) -> int:
    """A quarter of a size, on the same grid."""
    step = _step(size)
    return max(step, step * round(size / 4 / step)) if size > step else max(1, size // 2)


def longer(size: int) -> int:
    """An eighth more, or the next on the same grid."""
    step = _step(size)
    return size + step * max(1, round(size / 8 / step))


def _step(size: int) -> int:
    return min(size & -size, GRID) if size & -size < size else min(max(size // 4, 1), GRID)


def inputs_beside(
    example: Example, model: nn.Module, accepts: Callable[[Input], bool], *, sparing: bool = False
) -> Iterator[Input]:
    """Inputs beside an example that the model takes: small ones first.

    Args:
        example: what one forward takes.
        model: whose input it is.
        accepts: runs the original on an input, and says whether it takes it.
        sparing: a small batch, as short as tokens can be, longer images in one direction only, and with the colours
            that they have.

    Yields:
        at most two: other values with another batch at shorter sizes, and other values at longer ones.

    Cost: one run per size that occurs in the example, mostly far shorter than the example.
    """
    form = Form(example, model)
    batches = form.another(sparing=sparing)
    small: Input | None = None
    taken: dict[int, int] = {}
    # The largest first: what is tried after it is already smaller.
    colours = form.colours() if sparing else set()
    for size in reversed([size for size in form.sizes if shorter(size) < size and size not in colours]):
        for new in dict.fromkeys((form.brief(size), shorter(size)) if sparing else (shorter(size),)):
            for batch in batches if size not in taken else ():
                given = _input(form, batch, {**taken, size: new})
                if accepts(given):
                    small, batches, taken = given, [batch], {**taken, size: new}
                    break
    if small is None:
        small = next((given for given in (_input(form, batch, {}) for batch in batches) if accepts(given)), None)
    # Numbers beyond a table cannot be tried on a GPU: the error would end the process's use of it.
    for place in form.blank if form.vocabulary > 1 and not form.tensors[0].is_cuda else ():
        before, form.drawn = form.drawn, form.drawn | {place}
        given = _input(form, batches[0], taken)
        if accepts(given):
            small = given
        else:
            form.drawn = before
    if small is not None:
        yield small
    more = {size: form.little(size) if sparing else longer(size) for size in taken}
    # A large batch at larger sizes would cost more than the example: a small one, if it was taken before.
    batch = FEW if form.batch is not None and form.batch > FEW and batches[0] == FEW else None
    if form.ones and accepts(_input(form, batch, {**taken, 1: 4})):
        more[1] = 4
    squares = {t.shape[-1] for t in form.tensors if _is_square(t)} & more.keys() if sparing else set()
    if squares:
        oblong = _input(form, batch, {**more, **taken}, {size: more[size] for size in squares})
        if accepts(oblong):
            yield oblong
            return
    large = _input(form, batch, more)
    if more and accepts(large):
        yield large


def each_alone(example: Example, model: nn.Module) -> Iterator[Input]:
    """Inputs that differ from an example in one thing each, beside their values: for who asks for more.

    Yields:
        other values alone, a batch of one, the next larger batch, and each size shorter, longer and twice as long;
        whether the model takes them is to be tried.
    """
    form = Form(example, model)
    yield _input(form, None, {})
    if form.batch is not None:
        for batch in {1, form.batch + 1} - {form.batch}:
            yield _input(form, batch, {})
    for size in form.sizes:
        for new in dict.fromkeys((shorter(size), longer(size), 2 * size)):
            if new != size:
                yield _input(form, None, {size: new})


def _input(form: Form, batch: int | None, sizes: Mapping[int, int], wide: Mapping[int, int] | None = None) -> Input:
    words = ["other values"]
    if batch is not None:
        words.append(f"batch {batch} for {form.batch}")
    words += [f"size {new} for {old}" for old, new in sizes.items()]
    words += [f"the last of two equal ones {new} for {old}" for old, new in (wide or {}).items()]
    return Input(", ".join(words), form.anew(batch=batch, sizes=sizes, wide=wide))
