"""Reading the derivative of a gate on a unit off the layers, without forming a gradient of the weights.

Of a layer y = W x + b, with d = dl/dy and x' = dl/dx through this layer alone, the sum of g w over row c of W
is sum (y_c - b_c) d_c and over column j it is sum x_j x'_j, both over the positions and apart for every sample.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from secateur.types import Group

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PER_CHANNEL = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm)
_OVER_CHANNELS = (nn.LayerNorm, nn.RMSNorm)
Sums = dict[tuple[nn.Module, str], Tensor]


@dataclass(frozen=True, eq=False)
class Tap:
    """Where in a layer the derivative of a span can be read off.

    Args:
        tensor: name of the parameter.
        module: the layer.
        side: "weight" and "bias" are read at the output, "input" at the input.
        channel: dimension of the output or input that holds the channels.
        group: name of the group.
        unit: unit of every channel of that side, -1 for none.
    """

    tensor: str
    module: nn.Module
    side: str
    channel: int
    group: str
    unit: Tensor


def find_taps(model: nn.Module, groups: Sequence[Group]) -> tuple[list[Tap], list[str]]:
    """Taps for the parameters that have them in all their uses, and the names of the others.

    Args:
        model: the model.
        groups: units with the spans that count.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            owners[id(parameter)].append((module, key))
    taps: list[Tap] = []
    rest: set[str] = set()
    for group in groups:
        for span in group.spans:
            for module, key in owners[id(model.get_parameter(span.tensor))]:
                found = _side(module, key, span.index)
                if found is None or span.index is None:
                    rest.add(span.tensor)
                    continue
                width = int(model.get_parameter(span.tensor).shape[found[2]])
                unit = span.index.flatten().cpu().expand(width)
                taps.append(Tap(span.tensor, module, found[0], found[1], group.name, unit))
    return [tap for tap in taps if tap.tensor not in rest], sorted(rest)


def _side(module: nn.Module, key: str, index: Tensor | None) -> tuple[str, int, int] | None:
    """(side, dimension of the channels there, dimension of the parameter), if units vary along one only."""
    if index is None:
        return None
    varying = [d for d in range(index.dim()) if index.shape[d] != 1] or [0]
    known = _sides(module)
    if len(varying) != 1 or (key, varying[0]) not in known:
        return None
    return (*known[key, varying[0]], varying[0])


def _sides(module: nn.Module) -> dict[tuple[str, int], tuple[str, int]]:
    """(parameter, its dimension) -> (side, dimension of the channels there)."""
    kind = type(module)  # not isinstance: a subclass may compute something else
    if kind is nn.Linear:
        return {("weight", 0): ("weight", -1), ("weight", 1): ("input", -1), ("bias", 0): ("bias", -1)}
    if kind in _CONVS:
        rows = {("weight", 0): ("weight", 1), ("bias", 0): ("bias", 1)}
        return rows if module.groups != 1 else {**rows, ("weight", 1): ("input", 1)}
    if kind in _TRANSPOSED:
        columns = {("weight", 0): ("input", 1), ("bias", 0): ("bias", 1)}
        return columns if module.groups != 1 else {**columns, ("weight", 1): ("weight", 1)}
    if kind in _PER_CHANNEL:
        return {("weight", 0): ("weight", 1), ("bias", 0): ("bias", 1)}
    if kind in _OVER_CHANNELS:
        one = len(module.normalized_shape) == 1  # type: ignore[arg-type]
        return {("weight", 0): ("weight", -1), ("bias", 0): ("bias", -1)} if one else {}
    return {}


class Listener:
    """Sums over positions of value times gradient, per sample and channel, at both sides of tapped layers.

    Args:
        taps: where to listen.
        samples: size of the first dimension that every value must have.
    """

    def __init__(self, taps: Sequence[Tap], samples: int) -> None:
        self.sums: Sums = {}
        self.fits = True
        self._samples = samples
        self._taps = taps

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hooks are on the layers inside, and off afterwards."""
        outputs = {tap.module: tap.channel for tap in self._taps if tap.side != "input"}
        inputs = {tap.module: tap.channel for tap in self._taps if tap.side == "input"}
        handles = [module.register_forward_hook(self._after(c)) for module, c in outputs.items()]
        handles += [module.register_forward_pre_hook(self._before(c)) for module, c in inputs.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def units(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        """What was heard, summed per unit: group name -> float64 [samples, units]."""
        sizes = {group.name: group.size for group in groups}
        names = dict.fromkeys(tap.group for tap in self._taps)
        total = {name: torch.zeros(self._samples, sizes[name], dtype=torch.float64) for name in names}
        for tap in self._taps:
            value = _value(tap, self.sums)
            if value is not None:
                owned = tap.unit >= 0
                total[tap.group].index_add_(1, tap.unit[owned], value.cpu().double()[:, owned])
        return total

    def _after(self, channel: int) -> Callable[[nn.Module, object, Tensor], Tensor]:
        def hook(module: nn.Module, _: object, output: Tensor) -> Tensor:
            own = output if output.requires_grad else output.detach().requires_grad_()
            self._attach(own, module, "output", channel)
            return own.clone()  # what follows may work in place, and the sum needs the value

        return hook

    def _before(self, channel: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            first = args[0]
            own = first.view_as(first) if first.requires_grad else first.detach().requires_grad_()
            self._attach(own, module, "input", channel)
            return (own, *args[1:])

        return hook

    def _attach(self, value: Tensor, module: nn.Module, side: str, channel: int) -> None:
        hear = partial(self._hear, module, side, channel, value.detach())  # no cycle: hook -> tensor -> hook
        value.register_hook(hear)  # type: ignore[no-untyped-call]

    def _hear(self, module: nn.Module, side: str, channel: int, value: Tensor, gradient: Tensor) -> None:
        if value.dim() < 2 or value.shape[0] != self._samples:
            self.fits = False
            return
        gradient = gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32))
        self._add(module, side, _positions(gradient * value, channel))
        if side == "output" and module._parameters.get("bias") is not None:
            self._add(module, "bias", _positions(gradient, channel) * module._parameters["bias"].detach())  # type: ignore[union-attr]

    def _add(self, module: nn.Module, side: str, value: Tensor) -> None:
        key = (module, side)
        self.sums[key] = self.sums[key] + value if key in self.sums else value


def _positions(value: Tensor, channel: int) -> Tensor:
    """Sum over everything but the sample and the channel."""
    if value.dim() == 2:
        return value
    return value.flatten(2).sum(2) if channel == 1 else value.flatten(1, -2).sum(1)


def _value(tap: Tap, sums: Mapping[tuple[nn.Module, str], Tensor]) -> Tensor | None:
    """Sums over the rows without bias, over the bias, or over the columns; None where the layer did not run."""
    if tap.side != "weight":
        return sums.get((tap.module, tap.side))
    whole, bias = sums.get((tap.module, "output")), sums.get((tap.module, "bias"))
    return whole if whole is None or bias is None else whole - bias
