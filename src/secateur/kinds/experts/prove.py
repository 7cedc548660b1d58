"""The proof of a cut of whole experts: the original with the removed experts out of reach of its router."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from secateur.errors import CertificateError, UnsupportedError
from secateur.kinds.experts.find import Mixture
from secateur.kinds.experts.numbers import same_numbers
from secateur.kinds.experts.values import values_of
from secateur.kinds.numbers_used import NumbersUsed
from secateur.kinds.reference import Reference, certified
from secateur.kinds.trials import tried
from secateur.model.agreement import require_kept
from secateur.model.tensors import cut_tensor, named_tensors
from secateur.request import PROOF, Efforts
from secateur.structure.axes import Keep, kept
from secateur.structure.rules.base import base_name
from secateur.structure.trace import Args, Kwargs, Op, Trace
from secateur.types import Certificate, Cuts, Example

SAME = ("t", "transpose", "permute", "view", "_unsafe_view", "reshape", "unsqueeze", "expand", "detach", "alias",
        "clone", "_to_copy", "to", "contiguous")  # fmt: skip
METHOD = "masked-router"
CHANNELS = "Cut channels inside the experts instead (granularity: channel)."
FIRST = {"mm": 0, "bmm": 0, "matmul": 0, "mv": 0, "addmm": 1, "baddbmm": 1, "linear": -1}  # place of the left factor


def certify_experts(
    model: nn.Module,
    cut: nn.Module,
    example: Example,
    record: Trace,
    mixtures: Sequence[Mixture],
    keep: Keep,
    cuts: Cuts,
    *,
    dtype: str = "float32",
    tolerance: float | None = None,
    effort: Efforts = PROOF,
) -> Certificate:
    """Prove that `cut` gives the outputs of `model` whose routers cannot choose the removed experts.

    Args:
        model: the original, whole; the router's biases change while it runs, then are as before.
        cut: the model without the experts.
        example: what `secateur.model.call.call` takes.
        record: from `capture(model, example)`.
        mixtures: the blocks of experts.
        keep: atom id -> bool array of kept experts.
        cuts: tensor name -> dimension -> kept indices.
        dtype: "float32" compares in the models' own precision; "float64" compares double copies of both.
        tolerance: as in `secateur.model.agreement.agreement`.
        effort: as in `secateur.kinds.trials.tried`.

    Returns:
        the certificate; outputs that list experts (the router's logits) are compared on those that stay.

    Raises:
        UnsupportedError: the cut model does not run, or the router is no product with its weight.
        CertificateError: a tensor of the cut model is not what the plan keeps, or outputs differ.

    Cost: that of `secateur.kinds.trials.tried`, and one walk over the weights.
    """
    _same_slices(model, cut, cuts)
    make = partial(with_masked_routers, record=record, mixtures=mixtures, keep=keep)
    found = tried([make], model, cut, example, dtype=dtype, tolerance=tolerance, effort=effort)
    return certified(found, METHOD, dtype=dtype)


def with_masked_routers(model: nn.Module, record: Trace, mixtures: Sequence[Mixture], keep: Keep) -> Reference:
    """The whole model whose routers cannot choose the removed experts; their biases change while it runs."""
    less = [(m, torch.from_numpy(~keep[m.atom.id])) for m in mixtures if m.atom.id in keep]
    gone = {name: removed for m, removed in less for name in m.routers}
    added = {name: removed for m, removed in less for name in m.biases}
    tensors = named_tensors(model)

    @contextmanager
    def around() -> Iterator[None]:
        with _without(tensors, added), _Masked(tensors, gone) as mode:
            yield
        if mode.missed:
            raise UnsupportedError(
                f"{sorted(mode.missed)[0]!r} is used in a way that cannot be masked, so the cut cannot be proved.",
                why="the router's logits are not a matrix product with this weight",
                hint=CHANNELS,
            )

    def fit(expected: Sequence[Tensor], found: Sequence[Tensor]) -> list[Tensor]:
        left = _kept_only(expected, record, keep)
        if any(t.is_floating_point() and bool(torch.isnan(t).any()) for t in left):
            raise CertificateError(
                "An output of the original is no number once the router leaves experts out.",
                why="the router needs all of its experts",
                hint=CHANNELS,
            )
        return left

    pairs = {m.size: int((~removed).sum()) for m, removed in less}
    values = values_of({size: [~removed for m, removed in less if m.size == size] for size in pairs})

    def numbers(before: NumbersUsed, after: NumbersUsed) -> Iterator[str]:
        """Plain numbers first: they say more about what is counted than what came of them."""
        yield from same_numbers(before, after, pairs)
        values.require_same(before, after)

    return Reference(
        model,
        METHOD,
        around,
        fit,
        differs="is not that of the original without the removed experts",
        hint="The router may depend on experts in another way; nothing was changed or saved.",
        numbers=numbers,
        results=values.part,
    )


def _same_slices(model: nn.Module, cut: nn.Module, cuts: Cuts) -> None:
    """Every expert of the cut model is the one that the plan keeps: also those that the example does not reach."""
    small = named_tensors(cut)
    for name, tensor in named_tensors(model).items():
        require_kept(name, tensor, cuts.get(name, {}), small.get(name))


@contextmanager
def _without(tensors: Mapping[str, Tensor], gone: Mapping[str, Tensor]) -> Iterator[None]:
    """What is added to the choice of removed experts is minus infinity for a while."""
    before = {name: tensors[name].detach().clone() for name in gone if tensors[name].is_floating_point()}
    try:
        for name in before:
            if "bias" in name.rpartition(".")[2]:
                tensor = tensors[name].data
                tensor.masked_fill_(gone[name].to(tensor.device).view(tensor.shape), -torch.inf)
        yield
    finally:
        for name, value in before.items():
            tensors[name].data.copy_(value)


class _Masked(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Products with a router's weight give minus infinity for the experts that are gone."""

    def __init__(self, tensors: Mapping[str, Tensor], gone: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.gone = gone
        self.missed = set(gone)
        self.weights: WeakIdKeyDictionary = WeakIdKeyDictionary()
        for name in gone:
            self.weights[tensors[name]] = name

    def __torch_dispatch__(self, func: Op, types: object, args: Args = (), kwargs: Kwargs | None = None) -> object:
        result = func(*args, **(kwargs or {}))
        named = [(i, self._name(a)) for i, a in enumerate(args)]
        hits = [(i, name) for i, name in named if name is not None]
        if not hits or not isinstance(result, Tensor):
            return result
        i, name = hits[0]
        kind = base_name(func)
        if kind in SAME:
            self.weights[result] = name
        elif kind in FIRST:
            result = self._mask(result, name, -2 if i == FIRST[kind] and result.dim() > 1 else -1)
        return result

    def _name(self, value: object) -> str | None:
        found: str | None = self.weights.get(value) if isinstance(value, Tensor) else None  # type: ignore[no-untyped-call]
        return found

    def _mask(self, result: Tensor, name: str, d: int) -> Tensor:
        gone = self.gone[name].to(result.device)
        if result.shape[d] != len(gone):
            return result
        self.missed.discard(name)
        return result.masked_fill(gone.view([-1] + [1] * (-d - 1)), -torch.inf)


def _kept_only(expected: Sequence[Tensor], record: Trace, keep: Keep) -> list[Tensor]:
    """Outputs without the experts that are gone; what the forward leaves on the model, behind them, as it is."""
    cut = []
    for tensor, number in zip(expected, record.outputs, strict=False):
        dims = {d: kept(axis, keep) for d, axis in enumerate(record.axes[number])}
        chosen = {d: torch.from_numpy(k.nonzero()[0]) for d, k in dims.items() if not k.all()}
        cut.append(cut_tensor(tensor, chosen))
    return [*cut, *expected[len(cut) :]]
