"""What was decided about every layer, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from secateur import shown
from secateur.planning.decision import PlanData
from secateur.types import Latency


@dataclass(frozen=True)
class LayerDecision:
    """What became of one layer, and why.

    Args:
        name: of the module.
        shape: outputs and inputs; of a convolution inputs times the places of the kernel.
        zeros: share of zeros in its weight.
        format: name of the format it has now; "" = left as it was.
        dtype: of its weights now.
        ratio: time over that of the best dense form, for each number of inputs at once; of the best contender where
            the layer was left.
        why: in words.
    """

    name: str
    shape: tuple[int, int]
    zeros: float
    format: str
    dtype: str
    ratio: Mapping[int, float]
    why: str


@dataclass(repr=False)
class Deployment:
    """A model whose layers have the forms that were fastest.

    Args:
        model: ready to run; not for training.
        decisions: one per linear layer, and per convolution where those were asked for.
        latency: of the whole model, by batch size: the original ("dense") and this one ("deployed"), interleaved.
        size_bytes: of all tensors before and after.
        largest_difference: between the outputs of both on the example, relative to the largest output.
        isa: instruction set of the kernels, or the GPU and what its kernels are made with.
        note: what was undone, and why; "" where nothing was.
        plan: the cut that leads to the original from the first model, where it was pruned or loaded in this process.
    """

    model: nn.Module
    decisions: tuple[LayerDecision, ...]
    latency: dict[int, dict[str, Latency]]
    size_bytes: tuple[int, int]
    largest_difference: float
    isa: str
    note: str = ""
    plan: PlanData | None = None
    swapped: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.swapped = tuple(each.name for each in self.decisions if each.format)

    def __repr__(self) -> str:
        return shown.line(
            "Deployment", f"{len(self.swapped)} of {len(self.decisions)} layers swapped", self.isa, self.note
        )

    def _repr_html_(self) -> str:
        rows = [(each.name, each.format or "as it was", each.dtype, each.why) for each in self.decisions]
        return shown.table(repr(self)[1:-1], ("layer", "format", "weights", "why"), rows)

    def __str__(self) -> str:
        lines = [_line(each) for each in self.decisions]
        before, after = self.size_bytes
        lines.append(
            f"{len(self.swapped)} of {len(self.decisions)} layers swapped, {self.isa}; size {after / before:.2f}x"
        )
        for batch, both in self.latency.items():
            ratio = both["deployed"].ratio
            said = "" if ratio is None else f", {ratio[0]:.2f}x (p10-p90 {ratio[1]:.2f}-{ratio[2]:.2f})"
            lines.append(f"batch {batch}: {both['dense'].median:.3g} -> {both['deployed'].median:.3g} ms{said}")
        if self.swapped:
            lines.append(f"outputs on the example differ by {self.largest_difference:.1e} of the largest")
        return "\n".join([*lines, *([self.note] if self.note else [])])


def _line(each: LayerDecision) -> str:
    what = f"{each.name} ({each.shape[0]} x {each.shape[1]}, {each.zeros:.0%} zeros)"
    return f"{what}: {f'{each.format} {each.dtype}' if each.format else 'left'}: {each.why}"
