"""The second proof: the original itself, run eagerly, of which the removed slices are missing.

What the replay of `kinds.slices.replay` and the cut share is the structure engine: a wrong rule would prove itself.
Here no rule of the engine takes part. The kept indices of the plan say which slices of which tensors go; in a copy of
the original they become NaN, and the forward runs as it is, on any input, with `Missing` arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from secateur.kinds.reference import Reference
from secateur.kinds.slices.gaps import NAN, others
from secateur.kinds.slices.missing import Missing
from secateur.kinds.slices.unmade import SameSlices, Unmade, can_wait, nobody
from secateur.kinds.slices.widths import KeptWidths, Width
from secateur.model.copies import copied
from secateur.model.rebound import rebind
from secateur.model.tensors import can_be_nan, computed_tensors, named_tensors
from secateur.structure.provenance import Attribute, held, owner_at
from secateur.types import Cuts


def ablated(model: nn.Module, cuts: Cuts, *, same: SameSlices | None = None) -> Reference:
    """The original without what a plan removes; numbers that the code takes from widths are those of the original.

    Args:
        model: the original; it is not changed, and what the plan leaves whole is shared with it.
        cuts: tensor name -> dimension -> kept indices.
        same: of this model, where a cut one has them already.

    Cost: a copy of the buffers, and of tensors that are cut and do not only serve in products; about one forward pass
        of the original per run.
    """
    twin, missing = _without(model, cuts, same)

    def objection() -> str:
        return "; ".join(filter(None, [_changed(missing), *missing.counted.found(missing.reduced, excused=False)]))

    def notes() -> list[str]:
        return list(_counts(missing, follow=False))

    return Reference(twin, "ablation", lambda: missing, fitted, notes=notes, objection=objection)


def weights_changed(model: nn.Module, cuts: Cuts) -> tuple[nn.Module, Missing]:
    """A copy without what a plan removes, and what is to stand around a run of it: its `changed` then names lines."""
    return _without(model, cuts, None)


def ablated_with_widths(
    model: nn.Module,
    cuts: Cuts,
    attributes: Mapping[Attribute, int],
    *,
    follow: bool = False,
    same: SameSlices | None = None,
) -> Reference:
    """As `ablated`, where widths that the code reckons with are those of the cut model.

    Args:
        model: the original.
        cuts: tensor name -> dimension -> kept indices.
        attributes: integers of the model -> their value in the cut model.
        follow: whether scales may follow any width; else only numbers of what is summed up may: a norm or a mean that
            is written by hand divides by as many as it sums.
        same: as for `ablated`.
    """
    twin, missing = _without(model, cuts, same)
    widths = KeptWidths(missing)
    for attribute, kept in attributes.items():
        owner = owner_at(twin, attribute.owner)
        whole = held(owner, attribute.name)
        if attribute.item is None and type(whole) is int:
            vars(owner)[attribute.name] = Width(whole, kept, widths.note)

    @contextmanager
    def around() -> Iterator[None]:
        with missing, widths:
            yield

    def scaled() -> list[str]:
        """Lines that scale by a width of which nothing is summed up there: a sum elsewhere excuses no scale."""
        by = widths.used.items()
        return sorted({where for (where, width), inside in by if not inside <= missing.reduced.get(width, set())})

    def objection() -> str:
        counts = missing.counted.found(missing.reduced, excused=False)
        by_width = [] if follow else [*(f"{where} scales by the width" for where in scaled()), *counts]
        return "; ".join([*filter(None, [_changed(missing)]), *by_width])

    def notes() -> list[str]:
        """What follows a width, and what is a mean over what is kept."""
        summed = sorted({where for where, _ in widths.used} - set(scaled()))
        return [
            *(f"the function changes with the cut: {where} scales by the width, which follows" for where in scaled()),
            *(f"{where} divides by the number of what it sums, in the cut model of what is kept" for where in summed),
            *_counts(missing, follow=follow),
        ]

    return Reference(twin, "ablation with kept widths", around, fitted, notes=notes, objection=objection)


def _counts(missing: Missing, *, follow: bool) -> Iterator[str]:
    """What is to be said of sums that count units."""
    for said in missing.counted.found(missing.reduced, excused=False) if follow else ():
        yield f"the function changes with the cut: {said}"
    for said in missing.counted.found(missing.reduced, excused=True):
        yield f"{said}, beside a sum over them, in the cut model over what is kept"
    for where in missing.counted.of_truths():
        yield f"{where} sums up what is true of units, in the cut model of those that are kept"


def _changed(missing: Missing) -> str:
    return "; ".join(
        f"the weight used {f'at {where}' if where else 'by a layer of torch'} is computed anew from what is left"
        for where in sorted(missing.changed)
    )


def _without(model: nn.Module, cuts: Cuts, same: SameSlices | None) -> tuple[nn.Module, Missing]:
    """A copy of which the removed slices are NaN."""
    tensors = named_tensors(model)
    memo = computed_tensors(model)
    memo.update((id(t), t) for n, t in tensors.items() if isinstance(t, nn.Parameter) and n not in cuts)
    known: dict[int, Tensor] = {}
    gone = {name: _gone(tensors[name], dims, known) for name, dims in cuts.items()}
    later = frozenset(can_wait(tensors, cuts))
    poisoned = {
        name: _stand_in(tensors[name]) if name in later else _poisoned(tensors[name], dims)
        for name, dims in gone.items()
    }
    memo.update((id(tensors[name]), tensor) for name, tensor in poisoned.items())
    twin = copied(model, memo)
    rebind(twin, memo)
    # By name, as buffers that the plan leaves whole were copied with the model.
    pairs = [(t, tensors[n] if n in poisoned else t) for n, t in named_tensors(twin).items()]
    pairs += [(t, t) for module in twin.modules() for t in vars(module).values() if isinstance(t, Tensor)]
    shared = same if same is not None and same.model is model else None
    unmade = [
        Unmade(
            poisoned[name],
            partial(_poisoned, tensors[name], gone[name]),
            cuts[name],
            nobody if shared is None else partial(shared.small, name),
        )
        for name in later
    ]
    places = [(tensor, gone[name]) for name, tensor in poisoned.items() if can_be_nan(tensor)]
    return twin, Missing(pairs, places, unmade, *([] if shared is None else [shared.drop]))


def _stand_in(weight: Tensor) -> nn.Parameter:
    """Another parameter in the same memory, for `Unmade`."""
    return nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)


def _gone(tensor: Tensor, dims: Mapping[int, Tensor], known: dict[int, Tensor]) -> dict[int, Tensor]:
    """Dimension -> removed positions; dimensions that keep the same (by id) are looked at once."""
    for d, kept in dims.items():
        if id(kept) not in known:
            known[id(kept)] = others(tensor.shape[d], kept.to(tensor.device))
    return {d: known[id(kept)] for d, kept in dims.items()}


def _poisoned(tensor: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    """A copy whose slices at these positions are NaN; integers, which know no NaN, stay as they are."""
    result = tensor.detach()
    if not can_be_nan(result):
        result = result.clone()
    elif result.is_complex():
        for d, gone in dims.items():
            result = result.index_fill(d, gone, NAN)
    else:
        # Times one is the same number, and one walk in the order of memory takes half as long as filling columns.
        row = torch.ones(result.shape[1:], dtype=result.dtype, device=result.device)
        for d, gone in dims.items():
            if d > 0:
                row.index_fill_(d - 1, gone, NAN)
        result = result * row if dims.keys() - {0} else result.clone()
        if 0 in dims:
            result.index_fill_(0, dims[0], NAN)
    return nn.Parameter(result, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else result


def fitted(expected: Sequence[Tensor], found: Sequence[Tensor]) -> list[Tensor]:
    """Outputs of the ablated original at the sizes of the cut model's: missing slices are left out.

    Where the cut model has another size than what is left, nothing is taken out, so that the shapes differ.
    """
    if len(expected) != len(found):
        return list(expected)
    return [_fit(a, tuple(b.shape)) for a, b in zip(expected, found, strict=True)]


def _fit(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tensor.dim() != len(shape) or not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    for d, size in enumerate(shape):
        if size < tensor.shape[d]:
            there = ~torch.isnan(tensor.movedim(d, 0).flatten(1)).all(1)
            if int(there.sum()) == size:
                tensor = tensor.index_select(d, there.nonzero().flatten())
    return tensor
