"""What blocks are handed beside their hidden state: those that stay must be handed what they were in the original."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from secateur.errors import CertificateError
from secateur.model.bypass import hidden_of

PLAIN = (bool, int, float, complex, str, bytes, type(None))
DEEPEST = 3  # of lists and mappings in arguments
HINT = (
    "The code chooses it by the place of the block. Remove blocks so that those that stay keep it, for example as many "
    "as its pattern is long, or protect the stack. Nothing was changed or saved."
)


@dataclass
class Handed:
    """What was seen of one run.

    Args:
        blocks: name of a block -> what it was first called with, by the name of each part.
    """

    blocks: dict[str, dict[str, object]] = field(default_factory=dict)

    @contextmanager
    def watching(self, model: nn.Module, names: Sequence[str]) -> Iterator[Handed]:
        """Watch the first call of each of these modules."""
        handles = [model.get_submodule(n).register_forward_pre_hook(self._see(n), with_kwargs=True) for n in names]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _see(self, name: str) -> Callable[[nn.Module, Sequence[object], Mapping[str, object]], None]:
        def see(_: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
            if name not in self.blocks:
                hidden = hidden_of(args, kwargs)
                given = {**{f"argument {i}": v for i, v in enumerate(args, 1)}, **kwargs}
                self.blocks[name] = {n: v for n, v in _parts(given, "") if v is not hidden}

        return see


def _parts(value: object, name: str, depth: int = DEEPEST) -> Iterator[tuple[str, object]]:
    if type(value) is dict and depth:
        for key, item in value.items():
            yield from _parts(item, f"{name}[{key!r}]" if name else str(key), depth - 1)
    elif type(value) in (list, tuple) and depth:
        for i, item in enumerate(value):  # type: ignore[arg-type]
            yield from _parts(item, f"{name}[{i}]", depth - 1)
    else:
        yield name, value


def require_alike(
    before: Handed, after: Handed, names: Mapping[str, str], places: Mapping[str, tuple[int, int]]
) -> None:
    """Refuse a cut in which a block that stays is handed something else.

    Args:
        before: what was seen of the original with identity in the place of what goes.
        after: what was seen of the model without it.
        names: name of a block that stays -> its name in the smaller model.
        places: name of a block -> its places in the original and in the smaller model.

    Raises:
        CertificateError: names the block and what differs.
    """
    stay = [name for name in names if name in before.blocks and names[name] in after.blocks]
    for name in stay:
        old, new = before.blocks[name], after.blocks[names[name]]
        what = "" if old.keys() != new.keys() else None
        what = what if what is not None else next((p for p in old if not _alike(old[p], new[p], places[name])), None)
        if what is not None:
            raise _refused(name, what or "the number of its arguments", "is another")
    for part in dict.fromkeys(part for name in stay for part in before.blocks[name]):
        shared = [[run.blocks[key].get(part) for key in keys] for run, keys in _runs(before, after, stay, names)]
        first, second = (_pattern(values) for values in shared)
        for name, a, b in zip(stay, first, second, strict=True):
            if a != b:
                raise _refused(name, part, "is shared with other blocks")


def _runs(before: Handed, after: Handed, stay: list[str], names: Mapping[str, str]) -> list[tuple[Handed, list[str]]]:
    return [(before, stay), (after, [names[name] for name in stay])]


def _refused(name: str, part: str, how: str) -> CertificateError:
    return CertificateError(
        f"The block {name} would be handed something else than in the original.",
        why=f"on the example {part} {how} than with identity in the place of the removed blocks",
        hint=HINT,
    )


def _alike(a: object, b: object, places: tuple[int, int]) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return _same_tensor(a, b)
    if type(a) is int and type(b) is int:
        return a == b or (a - places[0]) == (b - places[1])  # its place is handed on, of which the plan says more
    if isinstance(a, PLAIN) or isinstance(b, PLAIN):
        return type(a) is type(b) and a == b
    return type(a) is type(b)


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_meta or b.is_meta or a.layout != torch.strided or b.layout != torch.strided:
        return True
    if a.dtype.is_floating_point or a.dtype.is_complex:
        return bool(torch.isclose(a, b, rtol=1e-2, atol=1e-3, equal_nan=True).all())
    return torch.equal(a, b)


def _pattern(values: Sequence[object]) -> list[int]:
    """Which of these are one object: the number of the first that is the same, plain values aside."""
    first: dict[int, int] = {}
    return [-1 if isinstance(value, PLAIN) else first.setdefault(id(value), n) for n, value in enumerate(values)]
