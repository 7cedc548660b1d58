"""||x_j||_2 of the input that every weight is multiplied with, laid out like the weight.

Legend: j an input feature or channel, k its position along the contracted dimension of the activation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from secateur.errors import UnsupportedError
from secateur.statistics.activations.observe import Flow, Site, argument, weight_sites
from secateur.statistics.activations.streams import Norms, gather
from secateur.structure.rules.base import base_name
from secateur.structure.trace import Step, Trace, tensors_of
from secateur.types import Data

CONVOLUTIONS = ("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution")
_TURNS = ("t", "transpose", "permute", "alias", "detach", "numpy_T")


@dataclass(frozen=True, eq=False)
class Inputs:
    """Inputs of a weight.

    Args:
        squares: sums of the squared inputs; float64, broadcasts to the weight.
        outputs: dimension of the weight along which the outputs lie.
        groups: groups of the convolution, else 1.
    """

    squares: Tensor
    outputs: int = 0
    groups: int = 1

    @property
    def norm(self) -> Tensor:
        """||x_j||_2, float64, broadcasts to the weight."""
        return self.squares.sqrt()


def input_norms(
    model: nn.Module,
    data: Data,
    names: Iterable[str],
    *,
    trace: Trace | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Inputs]:
    """L2 norms over all samples, positions and uses of the inputs of weights.

    Args:
        model: in eval mode; left as it is.
        data: batches.
        names: weights of linear layers, convolutions and everything else that multiplies an activation.
        trace: a whole trace of this model, where there is one.
        progress: called as ``progress(done, total)``.

    Returns:
        Parameter name -> its inputs. A convolution has one norm per input channel, over batch and space, for
        all positions of its kernel.

    Raises:
        UnsupportedError: a weight that is never multiplied with an activation (an embedding, an unused
            layer); names it.
        NonFiniteError: an activation is NaN or Inf.

    Cost:
        One forward pass over the data; one number per input channel.
    """
    names = list(dict.fromkeys(names))

    def find(trace: Trace) -> list[Site]:
        sites = weight_sites(trace, names)
        missing = [name for name in names if name not in {site.weight for site in sites}]
        # Refused, not scored 0: a score of 0 would put the weight first in line.
        if missing:
            raise UnsupportedError(
                f"{missing[0]!r} is not multiplied with an activation on this data",
                why="embeddings and layers that do not run have no input norm",
                hint="protect it, or choose a criterion that looks at weights alone",
            )
        return sites

    trace, found = gather(model, data, find, lambda _: Norms(2), trace=trace, progress=progress)
    flow = Flow(trace)
    total: dict[str, Inputs] = {}
    for site, statistic in found.items():
        shape = model.get_parameter(site.weight).shape
        more = _like_weight(flow, site, cast(Norms, statistic).sums(), shape)
        known = total.get(site.weight)
        # A weight that is used twice (tied layers) has read both inputs.
        total[site.weight] = more if known is None else replace(known, squares=known.squares + more.squares)
    return {name: total[name] for name in names}


def _like_weight(flow: Flow, site: Site, sums_k: Tensor, shape: torch.Size) -> Inputs:
    step = flow.trace.steps[site.step]
    operand, dim = next((n, d) for n, d, _ in step.contracted if n not in flow.activations and flow.source(n)[0])
    sizes = [axis.size for axis in flow.trace.axes[operand]]
    _, chain = flow.source(operand)
    # Other products name their dimensions themselves; a convolution has groups besides.
    if base_name(step.func) in CONVOLUTIONS:
        found = _of_convolution(step, sums_k, shape, dim)
    else:
        sums = sums_k.view([-1 if d == dim else 1 for d in range(len(sizes))])
        found = Inputs(sums, outputs=len(sizes) - 1 if dim < len(sizes) - 1 else dim - 1)
    # A turned weight is turned back exactly; after slices and splits the elements have to be traced one by one.
    if all(base_name(call.func) in _TURNS for call, _ in chain):
        order = _turned_back(chain, len(shape))
        return replace(found, squares=found.squares.permute(order), outputs=order.index(found.outputs))
    return Inputs(_scattered(found.squares.expand(sizes), chain, shape))


def _of_convolution(step: Step, sums_k: Tensor, shape: torch.Size, dim: int) -> Inputs:
    groups, spatial = int(argument(step, "groups", 1)), [1] * (len(shape) - 2)
    if dim == 0:  # transposed: dimension 0 of the weight counts all input channels
        return Inputs(sums_k.view(-1, 1, *spatial), outputs=1, groups=groups)
    per_group = sums_k.view(groups, -1)
    if groups > 1:
        # Outputs of a group read the channels of their group only.
        per_group = per_group.repeat_interleave(shape[0] // groups, 0)
    return Inputs(per_group.reshape(-1, shape[1], *spatial), groups=groups)


def _turned_back(chain: Sequence[tuple[Step, int]], rank: int) -> list[int]:
    """Where the dimensions of the weight are after transposes, read off a tensor whose sizes name them."""
    # Dimension d gets the size d + 1, so that the same calls on this tensor say where each has gone.
    names = torch.empty([d + 1 for d in range(rank)])
    for call, _ in chain:
        names = call.func(names, *call.args[1:], **call.kwargs)
    return [list(names.shape).index(d + 1) for d in range(rank)]


def _scattered(values: Tensor, chain: Sequence[tuple[Step, int]], shape: torch.Size) -> Tensor:
    """Into a tensor like the weight, along the numbers that its elements have after slices and splits."""
    # Every element carries its number through the same calls.
    numbers = torch.arange(shape.numel()).view(shape)
    for call, position in chain:
        numbers = tensors_of(call.func(numbers, *call.args[1:], **call.kwargs))[position]
    out = torch.zeros(shape.numel(), dtype=torch.float64)
    return out.index_add_(0, numbers.flatten(), values.cpu().flatten()).view(shape)
