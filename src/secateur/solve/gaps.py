"""After whole layers are gone, the last product before each gap is fitted anew: the hidden state behind it comes back.

Legend: N tokens, d inputs and n outputs of the product. X are its inputs in the cut model, H what the block it stands
in hands on there, T what the last removed block handed on in the original. Everything in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from secateur.errors import RecipeError, UnsupportedError
from secateur.model.call import call, require_reiterable, to_example
from secateur.model.guard import guard
from secateur.model.padding import real_tokens, without_padding
from secateur.solve.blocks.capture import handed_on
from secateur.solve.blocks.products import WHOLE, Products, Use
from secateur.solve.blocks.sums import rows_of
from secateur.solve.ridge import LEAST, RidgeSolver, gained, is_held, warn_of_unfitted, zeros
from secateur.statistics.activations.streams import finite
from secateur.statistics.gradients.functional import batches
from secateur.structure.capture import quiet
from secateur.types import Data, Example, LayerEntry


@dataclass(frozen=True)
class LayerGap:
    """A run of removed blocks behind one that is left.

    Args:
        block: name of the block before it, in the cut model.
        removed: name of its last block, in the original.
    """

    block: str
    removed: str


@dataclass(frozen=True)
class GapFit:
    """What a fit made of a gap.

    Args:
        weight: name of the weight, in the cut model.
        ridge: that was taken; None: no fit made held-out batches better, and the weight stays as it was.
        before, after: mean square of what is missing behind the gap, relative to the original's hidden state: on
            batches that were held out, or on all where there are too few.
    """

    weight: str
    ridge: float | None
    before: float
    after: float


@dataclass(frozen=True)
class _Writer:
    """The product that a block adds to its hidden state last."""

    weight: str
    bias: str
    turned: bool


@dataclass(eq=False)
class _Sums:
    """X^T X, X^T (T - H) and what errors are relative to, over some batches."""

    gram: Tensor = field(default_factory=zeros)
    cross: Tensor = field(default_factory=zeros)
    missing: float = 0.0
    whole: float = 0.0

    def add(self, rows_Nd: Tensor, now_Nn: Tensor, goal_Nn: Tensor) -> None:
        missing_Nn = goal_Nn - now_Nn
        self.gram = self.gram.to(rows_Nd.device) + rows_Nd.T @ rows_Nd
        self.cross = self.cross.to(rows_Nd.device) + rows_Nd.T @ missing_Nn
        self.missing += float(missing_Nn.square().sum())
        self.whole += float(goal_Nn.square().sum())

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Both as those of one group."""
        return self.gram[None], self.cross[None]

    def error(self, change_dn: Tensor | None = None) -> float:
        """Of T with a change of the weight, relative to T."""
        less = 0.0 if change_dn is None else gained(change_dn, self.gram, self.cross)
        return (self.missing - less) / max(self.whole, 1e-300)


def refit_gaps(
    original: nn.Module,
    cut: nn.Module,
    data: Data,
    *,
    layers: Mapping[str, LayerEntry],
    masks: Mapping[str, Tensor] | None = None,
    ridge: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, GapFit]:
    """Fit the last product before each run of removed blocks, in closed form; changes `cut` in place.

    min over W', b' of ||T - (H - X W^T - b + X W'^T + b')||^2 + ridge ||W' - W||^2, gap by gap from the input to the
    output, each behind those that are fitted already.

    Args:
        original: the whole model.
        cut: the model without the blocks.
        data: unlabelled batches, read once per gap; tokens that `attention_mask` leaves out do not count.
        layers: container path -> what is gone from it, as in a plan.
        masks: parameter name of `cut` -> bool, True = keep: zeros that stay.
        ridge: pull towards the weights that are there, relative to the mean square of the inputs; None: gap by gap the
            one that held-out batches like best, as for `refit_consumers`.
        progress: called as ``progress(done, total)`` after every batch.

    Returns:
        name of the block before a gap -> what the fit made of it.

    Raises:
        RecipeError: blocks at the very start are gone, with none before them.
        UnsupportedError: a block whose last product is not added to the hidden state as it is (a norm behind it, a
            convolution, routed experts), or that does not run once.
        NonFiniteError: an activation is NaN or Inf.

    Cost:
        One forward pass of both models over the data per gap, N d^2 + N d n multiplications and six times d^3; of a
        weight with zeros that stay d^3 for each of its n outputs, and for `CHOOSERS` of them five times more.

    Source:
        Shopkhoev et al., "ReplaceMe: Network Simplification via Depth Pruning and Transformer Block Linearization",
        2025, section 3 (least squares), where a square matrix is put behind the same weight; here the weight is free.
    """
    if not (ridge is None or ridge >= 0):
        raise RecipeError(f"ridge={ridge!r} must be >= 0")
    gaps = list(gaps_of(layers))
    require_reiterable(data, "the refit, one pass for every gap,")
    fits = {}
    with guard(cut, rollback=True), quiet(original), quiet(cut):
        gaps = _as_they_run(cut, gaps, to_example(next(batches(original, data))[0]))
        for number, gap in enumerate(gaps):
            writer: _Writer | None = None
            learn, held = _Sums(), _Sums()
            for place, (batch, _) in enumerate(batches(original, data), start=1):
                example = to_example(batch)
                if writer is None:
                    writer = _writer(cut, gap.block, example)
                seen = _seen(original, cut, gap, writer, example)
                (held if is_held(place, ridge) else learn).add(*seen)
                if progress is not None:
                    total = len(data) if isinstance(data, Sized) else place
                    progress(number * total + place, len(gaps) * total)
            assert writer is not None
            mask = (masks or {}).get(writer.weight)
            fits[gap.block] = _fitted(cut, writer, mask, (learn, held), ridge)
    warn_of_unfitted([fit.weight for fit in fits.values() if fit.ridge is None], len(fits))
    return fits


def gaps_of(layers: Mapping[str, LayerEntry]) -> Iterator[LayerGap]:
    """The runs of blocks that are gone, each with the block before it; those of a container in its order.

    Raises:
        RecipeError: a run at the very start.
    """
    for path, entry in layers.items():
        gone = set(entry["removed"])
        prefix = f"{path}." if path else ""
        if 0 in gone:
            raise RecipeError(
                f"recover: refit has nothing to fit before the first block of {path!r}, which is gone",
                why="it fits the last layer before each gap",
                hint=f"protect {prefix}0, or use finetune",
            )
        place = -1
        for i in range(entry["size"]):
            if i not in gone:
                place += 1
            elif i + 1 == entry["size"] or i + 1 not in gone:
                yield LayerGap(f"{prefix}{place}", f"{prefix}{i}")


def _as_they_run(cut: nn.Module, gaps: Sequence[LayerGap], example: Example) -> list[LayerGap]:
    """From the input to the output: a decoder may stand before its encoder in the model."""
    seen = list[str]()
    handles = [
        cut.get_submodule(gap.block).register_forward_pre_hook(lambda module, _, name=gap.block: seen.append(name))
        for gap in gaps
    ]
    try:
        call(cut, example)
    finally:
        for handle in handles:
            handle.remove()
    return sorted(gaps, key=lambda gap: seen.index(gap.block) if gap.block in seen else len(seen))


def _writer(cut: nn.Module, name: str, example: Example) -> _Writer:
    """The last product of a block, if what it gives is added to the block's hidden state and nothing more is done."""
    block, uses = cut.get_submodule(name), list[Use]()
    if (times := _runs(cut, name, example)) != 1:
        raise UnsupportedError(f"the block {name!r} runs {times} times and not once", hint="use finetune")
    weights = {key: p for key, p in block.named_parameters() if p.dim() >= 2}
    refused = f"recover: refit cannot fit {name!r}, the block before a gap"
    with Products(weights, uses.append):
        whole = handed_on(cut, name, example).double()
    if not uses:
        raise UnsupportedError(refused, why="it multiplies with no weight of its own", hint="use finetune")
    key, part = uses[-1].site
    if part != WHOLE or uses[-1].stacked or uses[-1].geometry is not None or weights[key].dim() != 2:
        raise UnsupportedError(refused, why=f"its last product, {key!r}, is no linear layer", hint="use finetune")
    weight, owner = weights[key], key.rpartition(".")[0]
    bias = block.get_submodule(owner)._parameters.get("bias")
    given = rows_of(uses[-1], None, torch.float64) @ _matrix(weight, uses[-1].turned).T
    given = given if bias is None else given + bias.detach().double()
    if why := _not_alone(cut, weight, bias, key, example):
        raise UnsupportedError(refused, why=why, hint="use finetune")
    if not bool(given.any()):
        raise UnsupportedError(
            refused, why=f"{key!r} gives nothing but zeros, which do not show where they go", hint="use finetune"
        )
    # Seen by taking it away: whatever a norm, a gate or a second use behind it does, the rest would not be all else.
    with _zeroed([weight] if bias is None else [weight, bias]):
        rest = handed_on(cut, name, example).double()
    if not _is_sum(whole, rest, given, torch.finfo(weight.dtype).eps):
        raise UnsupportedError(
            refused, why=f"what {key!r} gives is not added to the hidden state as it is", hint="use finetune"
        )
    return _Writer(f"{name}.{key}", "" if bias is None else f"{name}.{owner}.bias", uses[-1].turned)


def _not_alone(cut: nn.Module, weight: nn.Parameter, bias: Tensor | None, key: str, example: Example) -> str:
    """Why a fit of a product would change more than the product; "" where it does not."""
    uses = list[Use]()
    with Products({"weight": weight}, uses.append):
        call(cut, example)
    if len(uses) > 1:
        return f"the model multiplies with {key!r} {len(uses)} times, in other blocks too"
    sharing = [module for module in cut.modules() if any(p is bias for p in module._parameters.values())]
    return f"the bias beside {key!r} serves {len(sharing)} layers" if bias is not None and len(sharing) > 1 else ""


def _is_sum(whole: Tensor, rest: Tensor, given: Tensor, eps: float) -> bool:
    """Whether a hidden state is the rest and what was given, but for rounding to a precision."""
    if not given.numel() == rest.numel() == whole.numel():
        return False
    given = given.reshape(rest.shape)
    added = whole - rest
    near = float((added - given).abs().max()) <= max(4 * eps, 1e-5) * float(whole.abs().max())
    # Rounding of half precision hides much in single numbers, and little in the factor of all of them.
    power = given.square().sum().clamp(min=1e-300)
    factor = float((added * given).sum() / power)
    noise = 4 * eps * float((whole.square().sum() / power / whole.numel()).sqrt())
    return near and abs(factor - 1) < 1e-2 + noise


@contextmanager
def _zeroed(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    values = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()
        try:
            yield
        finally:
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)


def _seen(
    original: nn.Module, cut: nn.Module, gap: LayerGap, writer: _Writer, example: Example
) -> tuple[Tensor, Tensor, Tensor]:
    """X with a one for the bias, H and T of a batch."""
    uses, tokens = list[Tensor](), real_tokens(example)
    weight = {writer.weight: cut.get_parameter(writer.weight)}
    with Products(weight, lambda use: uses.append(rows_of(use, tokens, torch.float64))):
        now = _rows(handed_on(cut, gap.block, example), tokens)
    goal = _rows(handed_on(original, gap.removed, example), tokens)
    if len(uses) != 1 or not len(uses[0]) == len(now) == len(goal):
        raise UnsupportedError(f"{writer.weight!r} does not run once on every batch", hint="use finetune")
    rows = uses[0] if not writer.bias else torch.cat([uses[0], torch.ones_like(uses[0][:, :1])], 1)
    return rows, now, goal


def _runs(model: nn.Module, name: str, example: Example) -> int:
    """How many times a block runs."""
    seen = list[nn.Module]()
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, _: seen.append(module))
    try:
        call(model, example)
    finally:
        handle.remove()
    return len(seen)


def _rows(hidden: Tensor, tokens: Tensor | None) -> Tensor:
    return without_padding(hidden, tokens).reshape(-1, hidden.shape[-1]).double()


def _matrix(weight: Tensor, turned: bool) -> Tensor:
    weight = weight.detach().double()
    return weight.T if turned else weight


def _fitted(
    cut: nn.Module, writer: _Writer, mask: Tensor | None, found: tuple[_Sums, _Sums], ridge: float | None
) -> GapFit:
    """Choose the ridge, fit, and write the weight."""
    weight, (learn, held) = cut.get_parameter(writer.weight), found
    columns = weight.shape[0 if writer.turned else 1]
    keep = None if mask is None else _matrix(mask.expand(weight.shape).to(weight), writer.turned) > 0
    solver = RidgeSolver(columns, None if keep is None else keep[None])
    for sums in (learn, held):
        finite(sums.gram.diagonal() if sums.gram.dim() else sums.gram[None])
        finite(sums.cross.flatten())
    judge = held if held.gram.dim() else learn
    if ridge is None:
        ridge = solver.best(learn.moments, held.moments) if held.gram.dim() else LEAST
    if ridge is None:
        return GapFit(writer.weight, None, judge.error(), judge.error())
    after = judge.error(solver.solve(*learn.moments, ridge)[0])
    moved = solver.solve(*_Sums(learn.gram + held.gram, learn.cross + held.cross).moments, ridge)[0]
    with torch.no_grad():
        matrix = _matrix(weight, writer.turned) + moved[:columns].T
        weight.copy_(matrix.T if writer.turned else matrix)
        if writer.bias:
            bias = cut.get_parameter(writer.bias)
            bias.copy_(bias.double() + moved[columns])
    return GapFit(writer.weight, ridge, judge.error(), after)
