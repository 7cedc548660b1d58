"""One layer against its packed forms: interleaved, with weights that come from memory."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor, nn

from secateur.deployment import on_gpu
from secateur.deployment.formats import FORMATS, Bitmask, format_of
from secateur.deployment.formats.base import padded
from secateur.deployment.linear import SparseLinear
from secateur.deployment.lookup import Table, key
from secateur.deployment.packed import PackedLayer
from secateur.deployment.semi_structured import SEMI, SemiStructuredLinear
from secateur.deployment.semi_structured import why_not as why_no_semi
from secateur.measure.latency import synchronize

CPU = torch.device("cpu")
WARMUP = 2
TOO_LARGE = 1e6  # a ratio that says that a form was not timed, because it takes more bytes than the dense weight
MOST_BYTES = 96 << 20  # read between two calls to push weights out of the caches; more would only take longer
# Shares of zeros below which a format is not tried: it would store as much as the dense layer, or work as much.
LEAST_ZEROS = {"bitmask": 0.3, "slide16": 0.35, "slide32": 0.5, "delta": 0.7, "block": 0.2}


@dataclass
class Contender:
    """A packed form of a layer, packed when it is first needed: the table may know already that it is slow."""

    format: str
    dtype: torch.dtype
    source: nn.Linear

    @property
    def name(self) -> str:
        """Format and dtype: "bitmask bfloat16"."""
        return f"{self.format} {str(self.dtype).removeprefix('torch.')}"

    @cached_property
    def layer(self) -> PackedLayer:
        """The packed layer."""
        if self.format == SEMI:
            return SemiStructuredLinear.of(self.source)
        return SparseLinear.of(self.source, self.format, self.dtype)

    def too_large(self) -> bool:
        """Whether it takes more bytes than the dense weight of its dtype."""
        # Padding to whole panels makes small layers a little larger than they are.
        wide = 1.25 if self.format == "dense" else 1.0
        limit = self.source.weight.numel() * self.dtype.itemsize * wide
        return self.layer.size_bytes() > limit + 64 * self.source.out_features


def contenders(layer: nn.Linear, dtypes: Sequence[torch.dtype], formats: Sequence[str] | None) -> list[Contender]:
    """Every packed form that may be faster: one with a kernel, and with enough zeros to be worth a try."""
    zeros = zero_share(layer.weight)
    found = []
    for name in formats or FORMATS.names():
        layout = format_of(name)
        if layout.kernel is None or (formats is None and zeros < LEAST_ZEROS.get(name, 0.0)):
            continue
        if not layout.why_not(layer.weight.detach()):
            found += [Contender(name, dtype, layer) for dtype in dtypes]
    return found


def contenders_on_gpu(
    layer: nn.Linear, dtypes: Sequence[torch.dtype], formats: Sequence[str] | None
) -> tuple[list[Contender], list[str]]:
    """Every form of a layer on a GPU that may be faster and runs there, and why the others are none, in words."""
    weight, zeros = layer.weight.detach(), zero_share(layer.weight)
    found: list[Contender] = []
    left: list[str] = []
    for name in formats or (Bitmask.name, SEMI):
        if name == SEMI:
            some = [Contender(SEMI, weight.dtype, layer)] if weight.dtype in dtypes else []
            problem = why_no_semi(weight)
        else:
            some = [Contender(name, dtype, layer) for dtype in dtypes]
            few = formats is None and zeros < LEAST_ZEROS.get(name, 0.0)
            problem = (
                f"{name}: {zeros:.0%} zeros are few"
                if few
                else on_gpu.problem(format_of(name), weight.dtype, weight.dtype)
            )
        problems = [problem or _trial(one) for one in some]
        found += [one for one, why in zip(some, problems, strict=True) if not why]
        left += [why for why in dict.fromkeys(problems) if why]
    return found, left


def _trial(one: Contender) -> str:
    """Why a form does not run on this GPU, in words: whether it does depends on more than can be asked."""
    try:
        with torch.inference_mode():
            one.layer(one.source.weight.new_zeros(1, one.source.in_features))
    except Exception as error:  # Triton, the compilers it calls and the libraries of the GPU have errors of their own
        return f"{one.name} does not run here: {getattr(error, 'why', '') or str(error) or type(error).__name__}"
    return ""


def zero_share(weight: Tensor) -> float:
    """Share of zeros."""
    return 1 - int(weight.count_nonzero()) / max(1, weight.numel())


def clock(device: torch.device) -> Callable[[], float]:
    """What to measure with: with one thread the processor's time, which others on the machine cannot lengthen.

    A GPU's time is none of the processor's.
    """
    alone = torch.get_num_threads() == 1 and not on_gpu.is_gpu(device)
    return time.thread_time if alone else time.perf_counter


def block_share(weight: Tensor) -> float:
    """Share of blocks of 16 rows and one column with a number in them: tells masks of blocks from scattered ones."""
    there = padded(weight.detach(), 16, 1) != 0
    return float(there.view(-1, 16, there.shape[1]).any(1).float().mean()) if there.numel() else 0.0


class Contest:
    """Measures ratios to the dense layer.

    Args:
        table: what is known already; it learns what is measured here.
        cold: bytes of the other weights of the model, which pass through the caches between two calls of a layer.
        rounds: timed rounds.
        bfloat16: the dense layer may also be run in bfloat16, and the faster of both is the one to beat.
        timer: a clock; by default what `clock` says.
        device: where the layers are.
    """

    def __init__(
        self,
        table: Table,
        *,
        cold: int,
        rounds: int,
        bfloat16: bool,
        timer: Callable[[], float] | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.table, self.rounds, self.bfloat16, self.timer = table, rounds, bfloat16, timer or clock(device)
        self.measured, self.device = 0, device
        self._other = torch.ones(max(1, min(cold, MOST_BYTES) // 4), device=device)

    def ratios(self, layer: nn.Linear, found: Sequence[Contender], rows: int) -> dict[str, float]:
        """Time over that of the best dense form, by name of the contender; median over interleaved rounds."""
        keys = {one.name: self._key(layer, one, rows) for one in found}
        known = {name: self.table.get(each) for name, each in keys.items()}
        if any(ratio is None for ratio in known.values()):
            fit = [one for one in found if not one.too_large()]
            told = {one.name: TOO_LARGE for one in found} | (self._measure(layer, fit, rows) if fit else {})
            for name, ratio in told.items():
                self.table.put(keys[name], ratio or 1.0)
            return told
        return {name: ratio for name, ratio in known.items() if ratio is not None}

    def _key(self, layer: nn.Linear, one: Contender, rows: int) -> str:
        said = f"{one.name}{' or dense bfloat16' if self.bfloat16 else ''}"
        zeros, shape = zero_share(layer.weight), (layer.out_features, layer.in_features)
        blocks = block_share(layer.weight)
        return key(shape, layer.weight.dtype, said, zeros=zeros, blocks=blocks, rows=rows, device=self.device)

    def _measure(self, layer: nn.Linear, found: Sequence[Contender], rows: int) -> dict[str, float]:
        self.measured += 1
        x = torch.randn(rows, layer.in_features, device=self.device).to(layer.weight.dtype)
        calls: dict[str, Callable[[], object]] = {"": lambda: layer(x)}
        if self.bfloat16 and layer.weight.dtype != torch.bfloat16:
            half, narrow = layer.weight.detach().bfloat16(), x.bfloat16()
            calls["torch bfloat16"] = lambda: torch.nn.functional.linear(narrow, half)
        calls |= {one.name: partial(one.layer, x) for one in found}
        small = nn.Linear(16, 16, dtype=layer.weight.dtype, device=self.device)
        little = small.weight.new_ones(1, 16)
        own = [one for one in found if one.format != SEMI]  # so small a layer has no such form
        twins = {one.name: partial(SparseLinear.of(small, one.format, one.dtype), little) for one in own}
        taken = self.times(calls, {name: twins.get(name, partial(small, little)) for name in calls})
        bar = taken[""]
        if "torch bfloat16" in taken and np.median(taken["torch bfloat16"]) < np.median(bar):
            bar = taken["torch bfloat16"]
        return {one.name: float(np.median(taken[one.name] / bar)) for one in found}

    def times(
        self, calls: Mapping[str, Callable[[], object]], twins: Mapping[str, Callable[[], object]]
    ) -> dict[str, np.ndarray]:
        """Seconds of every call in every round, in random order, with weights that come from memory.

        Args:
            calls: what is compared.
            twins: small calls of the same code: in a model the layer before has just run it.
        """
        taken: dict[str, list[float]] = {name: [] for name in calls}
        waits = on_gpu.is_gpu(self.device)
        order, chance = list(calls), random.Random(0)  # noqa: S311 - an order of measurement, and no secret
        with torch.inference_mode():
            for number in range(WARMUP + self.rounds):
                chance.shuffle(order)
                for name in order:
                    self._other.sum()
                    twins[name]()
                    if waits:
                        synchronize(self.device)
                    start = self.timer()
                    calls[name]()
                    if waits:
                        synchronize(self.device)
                    if number >= WARMUP:
                        taken[name].append(self.timer() - start)
        return {name: np.array(values) for name, values in taken.items()}
