"""Give every layer the form that is fastest on this machine, and leave it alone where that is the one it has."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.deployment import native, on_gpu
from secateur.deployment.contest import (
    TOO_LARGE,
    Contender,
    Contest,
    clock,
    contenders,
    contenders_on_gpu,
    zero_share,
)
from secateur.deployment.convolving import Decided, decide_convolutions
from secateur.deployment.decisions import Deployment, LayerDecision
from secateur.deployment.decoding import step_of
from secateur.deployment.lookup import Table, default_path
from secateur.deployment.packed import PackedLayer, in_places, install
from secateur.deployment.reaching import is_hooked, places_of, shapes_reaching
from secateur.errors import RecipeError
from secateur.measure import latency
from secateur.model.call import call, device_of, outputs
from secateur.model.guard import evaluating
from secateur.model.samples import batch_size_of, with_batch_size
from secateur.planning.history import origin_of
from secateur.registry import one_of
from secateur.types import Example, Latency, Progress

WEIGHTS = ("same", "bfloat16", "int8")
ROUNDING = 1e-3  # of the largest output: float32 sums in another order, through many layers
_SMALL = 4 << 20  # bytes: about what the second-level caches of a few cores hold


def deploy(
    model: nn.Module,
    example: Example,
    *,
    weights: str = "same",
    batch_sizes: Sequence[int] | None = None,
    formats: Sequence[str] | None = None,
    margin: float = 0.05,
    rounds: int = 9,
    table: Path | bool = True,
    untie: bool = True,
    convolutions: bool = False,
    inplace: bool = False,
    progress: Progress | None = None,
) -> Deployment:
    """Measure every linear layer in every format on this machine, and swap in what is faster than dense.

    Of a language model that writes (`generate`) a step with one token per text is measured; a prompt, of which
    hundreds of tokens are multiplied at once, runs through dense products anyway.

    A layer is swapped only if the packed form beats the best dense one at every batch size by more than `margin`. At
    the end both whole models are timed against each other: is the deployed one not faster at every batch size,
    everything is undone and said.

    On a GPU the format `bitmask` (with Triton) and the 2:4 tensors of PyTorch compete; other formats have no kernel
    there.

    Args:
        model: on the CPU or one GPU, with zeros where it was pruned; on the CPU a dense one may gain too.
        example: what `secateur.model.call.call` takes.
        weights: how far weights may be rounded: "same" (not at all), "bfloat16", or "int8" (8 bits with a scale per
            output). Whatever is allowed is tried beside what is finer.
        batch_sizes: first dimensions of the example to be fast at; default that of the example.
        formats: names of formats to try, on a GPU "2:4" too; default all that can be faster.
        margin: how much faster a layer must be, as a fraction.
        rounds: timed rounds per layer and batch size.
        table: where measurements are kept for the next time; True = the user's cache folder, False = nowhere.
        untie: a layer whose weight an embedding looks rows up in may get a packed copy, which then takes at most half
            of the bytes besides; False = such layers stay.
        convolutions: try `secateur.deployment.SparseConv2d` in the place of convolutions too. A norm that directly and
            solely follows one goes into its numbers, rounded once, and a ReLU behind it is computed with it; where
            that cannot be known of the model they stay.
        inplace: change the model itself.
        progress: told (stage, number, of how many).

    Returns:
        the model and what was decided.

    Raises:
        RecipeError: an unknown word or number.
        ForwardError: the forward fails on the example.

    Cost: packing and a few dozen products per distinct layer, and as many forward passes as `secateur.measure.latency`
    takes. A copy of the model unless it is changed in place.
    """
    one_of("weights", weights, WEIGHTS)
    if not 0 <= margin < 1 or rounds < 1:
        raise RecipeError(f"margin={margin}, rounds={rounds}", hint="margin is from 0 to below 1, rounds at least 1")
    known = Table(table if isinstance(table, Path) else default_path() if table else None)
    sizes = list(batch_sizes or [batch_size_of(example)])
    step = step_of(model, example)
    examples = {size: with_batch_size(step, size) if batch_sizes else step for size in sizes}
    linear = {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear}
    inputs = shapes_reaching(model, linear, list(examples.values()))
    cold = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    contest = Contest(known, cold=cold, rounds=rounds, bfloat16=weights != "same", device=device_of(model))
    planner = _Planner(contest, weights, formats, margin, inputs, _ties(model, untie))
    # Of exactly this class: a subclass may have a forward of its own, which a packed layer would not repeat.
    layers = [(name, layer) for name, layer in model.named_modules() if type(layer) is nn.Linear]
    decided: list[Decided] = [
        planner.decide(name, layer, progress, at, len(layers)) for at, (name, layer) in enumerate(layers)
    ]
    if convolutions:
        decided += decide_convolutions(model, list(examples.values()), contest, margin)
    known.save()
    plan = origin_of(model)  # asked before layers change: it knows the model by its parameters
    done = _swap(model, example, examples, decided, inplace=inplace)
    done.plan = plan
    return done


class _Planner:
    def __init__(
        self,
        contest: Contest,
        weights: str,
        formats: Sequence[str] | None,
        margin: float,
        inputs: Mapping[str, list[torch.Size]],
        ties: Mapping[str, bool],
    ) -> None:
        self.contest, self.weights, self.formats, self.margin = contest, weights, formats, margin
        self.inputs, self.ties = inputs, ties
        self.device, self.gpu = contest.device, on_gpu.is_gpu(contest.device)

    def decide(
        self, name: str, layer: nn.Linear, progress: Progress | None, at: int, of: int
    ) -> tuple[LayerDecision, PackedLayer | None]:
        """The fastest form of a layer, or why it stays."""
        if progress is not None:
            progress("layers", at, of)
        problem = self._problem(name, layer)
        if problem:
            return _left(name, layer, problem), None
        dtypes = [
            layer.weight.dtype,
            *({"bfloat16": [torch.bfloat16], "int8": [torch.bfloat16, torch.int8]}.get(self.weights, [])),
        ]
        if name in self.ties:  # a copy besides the table is worth half of its bytes, not all of them
            dtypes = [dtype for dtype in dtypes if 2 * dtype.itemsize <= layer.weight.element_size()]
        dtypes, left = list(dict.fromkeys(dtypes)), list[str]()
        if self.gpu and dtypes:
            found, left = contenders_on_gpu(layer, dtypes, self.formats)
        else:
            found = contenders(layer, dtypes, self.formats)
        if not found:
            return _left(name, layer, "; ".join(left) or "no format that was asked for may be faster"), None
        rows = sorted({rows for rows in self._rows(name)})
        ratios = {count: self.contest.ratios(layer, found, count) for count in rows}
        best = min(found, key=lambda one: max(ratios[count][one.name] for count in rows))
        mine = {count: ratios[count][best.name] for count in rows}
        if max(mine.values()) >= TOO_LARGE:
            return _left(name, layer, "no format holds it in fewer bytes"), None
        # The slowest number of rows decides, or the layer would be a gain at one batch size and a loss at another.
        if max(mine.values()) > 1 - self.margin:
            return _left(name, layer, "; ".join([_explain(layer, best, mine), *left]), mine), None
        said = ", ".join(f"{ratio:.2f}x of dense at {count} rows" for count, ratio in mine.items())
        return _decision(name, layer, best.format, best.name.split()[1], mine, said), best.layer

    def _rows(self, name: str) -> list[int]:
        return [shape.numel() // shape[-1] for shape in self.inputs[name]]

    def _problem(self, name: str, layer: nn.Linear) -> str:
        if not self.gpu and native.isa() == native.WITHOUT:
            return f"there are no compiled kernels ({native.why_not() or 'not wanted'})"
        if not self.inputs.get(name):
            return "the example does not call it"
        if name in self.ties and not (self.ties[name] and self.weights != "same"):
            return "its weight is shared with another module"
        if layer.weight.device != self.device:
            return f"it is on {layer.weight.device}, and the model's first tensor on {self.device}"
        if not self.gpu and self.device.type != "cpu":
            return "it is not on the CPU"
        if layer.weight.dtype not in (torch.float32, torch.bfloat16, *([torch.float16] if self.gpu else [])):
            return f"no kernel takes {str(layer.weight.dtype).removeprefix('torch.')}"
        if is_hooked(layer):
            return "hooks are registered on it"
        return ""


def _decision(
    name: str, layer: nn.Linear, format: str, dtype: str, ratio: Mapping[int, float], why: str
) -> LayerDecision:
    return LayerDecision(
        name, (layer.out_features, layer.in_features), zero_share(layer.weight), format, dtype, ratio, why
    )


def _left(name: str, layer: nn.Linear, why: str, ratio: Mapping[int, float] | None = None) -> LayerDecision:
    return _decision(name, layer, "", str(layer.weight.dtype).removeprefix("torch."), ratio or {}, why)


def _explain(layer: nn.Linear, best: Contender, ratios: Mapping[int, float]) -> str:
    """Why the best form is no gain, as far as size, zeros and rows tell."""
    said = ", ".join(f"{ratio:.2f}x at {count} rows" for count, ratio in ratios.items())
    why = []
    if layer.weight.numel() * layer.weight.element_size() <= _SMALL:
        why.append("it is small enough to stay in the caches")
    if zero_share(layer.weight) < 0.4:
        why.append(f"{zero_share(layer.weight):.0%} zeros are few")
    if min(ratios.values()) < 1 < max(ratios.values()):
        why.append(f"{max(ratios)} rows at once are too many")
    return f"the best form, {best.name}, takes {said} of dense" + (f": {'; '.join(why)}" if why else "")


def _ties(model: nn.Module, untie: bool) -> dict[str, bool]:
    """Linear layers whose weight another module has too, or that stand in two places: whether a copy may part them.

    A table that only looks rows up goes on as it is when the layer has a copy of its own.
    """
    return {
        name: untie and all(isinstance(each, nn.Embedding) for other, each in places if other != name)
        for places in places_of(model).values()
        if len(places) > 1
        for name, _ in places
    }


def _swap(
    model: nn.Module,
    example: Example,
    examples: Mapping[int, Example],
    decided: Sequence[Decided],
    *,
    inplace: bool,
) -> Deployment:
    decisions = tuple(decision for decision, _ in decided)
    layers = {decision.name: layer for decision, layer in decided if layer is not None}
    before, device = size_of(model), device_of(model)
    isa = on_gpu.described(device) if on_gpu.is_gpu(device) else native.isa()
    own = model if inplace else copy.deepcopy(model)
    if not layers:
        return Deployment(own, decisions, {}, (before, before), 0.0, isa, "nothing was faster than it is")
    packed = in_places(layers)
    with _swapped(model, packed):
        after, found = size_of(model), _outputs(model, example)
    times = _race(model, packed, examples)
    error = _difference(_outputs(model, example), found)
    # The 90th percentile and not the median: a gain that many rounds do not show may be no gain tomorrow.
    slower = [size for size, both in times.items() if (both["deployed"].ratio or (1.0,))[-1] >= 1]
    note = f"undone: the whole model is not faster at batch size {', '.join(map(str, slower))}" if slower else ""
    exact = all(d.dtype == _dtype(model, d.name) == "float32" for d in decisions if d.format)
    if exact and error > ROUNDING:
        note = f"undone: outputs differ by {error:.1e} of the largest, which is more than rounding: please report it"
    if note:
        left = tuple(
            LayerDecision(d.name, d.shape, d.zeros, "", d.dtype, d.ratio, note if d.format else d.why)
            for d in decisions
        )
        return Deployment(own, left, times, (before, before), 0.0, isa, note)
    install(own, dict(packed) if inplace else copy.deepcopy(packed))
    return Deployment(own, decisions, times, (before, after), error, isa)


def _dtype(model: nn.Module, name: str) -> str:
    return str(model.get_parameter(f"{name}.weight").dtype).removeprefix("torch.")


def _race(
    model: nn.Module, packed: Mapping[str, nn.Module], examples: Mapping[int, Example]
) -> dict[int, dict[str, Latency]]:
    rival = _shallow(model)
    install(rival, packed)
    return {
        size: latency(
            {"dense": model, "deployed": rival}, example, seconds=6.0, spread=0.1, timer=clock(device_of(model))
        )
        for size, example in examples.items()
    }


def _shallow(model: nn.Module) -> nn.Module:
    """Modules of their own around the same tensors: a second model without a second copy of the weights."""
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


@contextmanager
def _swapped(model: nn.Module, packed: Mapping[str, nn.Module]) -> Iterator[None]:
    originals = install(model, packed)
    try:
        yield
    finally:
        install(model, originals)


def size_of(model: nn.Module) -> int:
    """Bytes of all tensors, each counted once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _outputs(model: nn.Module, example: Example) -> list[Tensor]:
    with evaluating(model, example=example):
        return [tensor.detach().double() for tensor in outputs(call(model, example)) if tensor.is_floating_point()]


def _difference(wanted: list[Tensor], found: list[Tensor]) -> float:
    """The largest gap between two lists of outputs, relative to the largest number; infinite where one alone is NaN."""
    worst = 0.0
    for mine, other in zip(wanted, found, strict=True):
        same = (mine == other) | (mine.isnan() & other.isnan())
        if not bool(same.all()):
            largest = mine[mine.isfinite()].abs().max() if bool(mine.isfinite().any()) else torch.zeros(())
            gap = ((mine - other)[~same].abs().max() / largest.clamp(min=1e-30)).nan_to_num(
                nan=torch.inf, posinf=torch.inf
            )
            worst = max(worst, float(gap))
    return worst
