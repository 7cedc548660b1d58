"""After a cut, refit the layers that lost inputs so that they give the outputs of the original again.

Legend: N rows (samples and positions), k columns of the cut weight, n outputs that are kept. X is what the cut model
feeds the layer, Y what the original's layer returns, so errors of earlier cuts are corrected too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Literal

from torch import Tensor, nn

from secateur.errors import RecipeError
from secateur.model.call import require_reiterable, to_example
from secateur.model.guard import guard
from secateur.solve.refit_layers import RefitLayer, add_batch, layers_of, shift, solved, with_bias
from secateur.statistics.activations.gram import Sampler
from secateur.statistics.activations.streams import few_samples, finite
from secateur.statistics.gradients.functional import batches
from secateur.structure.capture import capture, quiet
from secateur.structure.trace import Trace
from secateur.types import Cuts, Data


def refit_consumers(
    original: nn.Module,
    cut: nn.Module,
    data: Data,
    *,
    cuts: Cuts,
    masks: Mapping[str, Tensor] | None = None,
    what: Literal["weights", "bias"] = "weights",
    names: Iterable[str] | None = None,
    ridge: float = 1e-4,
    positions: int | None = 16,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Refit the weights and biases of layers that lost inputs, in closed form; changes `cut` in place.

    The idea: min over W', b' of ||Y - X W'^T - b'||^2 + ridge ||W' - W||^2, layer by layer from the input to
    the output, each behind layers that are refitted already. Where the layer's output is added to a shortcut
    (directly or behind a batch norm), what the cut changed in the shortcut is made good as well. A bad choice
    with fewer rows of data than columns of the weight: it then fits the sample; give more data or more ridge.

    Args:
        original: the whole model.
        cut: the cut model; its weights are replaced, everything else stays as it is.
        data: unlabelled batches, read once per layer.
        cuts: tensor name -> dimension -> kept indices, as in a plan.
        masks: parameter name -> bool, True = keep: zeros that stay. Each output is fitted on the weights it has left.
        what: "weights" (and biases), or "bias" alone: only the mean output of each unit is made good.
        names: weights to refit; default is every linear layer and convolution that lost inputs or has a mask.
        ridge: pull towards the cut weights, relative to the mean square of the inputs; 0 is plain least squares
            (of least change, where the inputs are dependent).
        positions: places in space taken per image and convolution; None takes all.
        seed: of the places.
        progress: called as ``progress(done, total)`` after every batch.

    Returns:
        Name of every changed weight and bias -> its new value.

    Raises:
        RecipeError: a name that is no weight of a linear layer or convolution of the cut model, or a bad number.
        UnsupportedError: a named layer that cannot be refitted, or batches on which the models do other things.
        NonFiniteError: an activation is NaN or Inf.

    Cost:
        Per layer one forward pass of both models up to it, N k^2 + N k n and k^3 multiplications; with masks k^3 for
        each of the n outputs, since each has other weights left.

    Source:
        He, Zhang, Sun, "Channel Pruning for Accelerating Very Deep Neural Networks", 2017, equation 2 and
        section 3.2 (shortcuts).
    """
    if what not in ("weights", "bias"):
        raise RecipeError(f"what={what!r} is not known", hint="weights or bias")
    if not ridge >= 0 or (positions is not None and positions < 1):
        raise RecipeError(f"ridge={ridge!r}, positions={positions!r}: ridge must be >= 0, positions above 0 or None")
    wanted = None if names is None else list(names)
    require_reiterable(data, "the refit, one pass for every layer,")
    layers: list[RefitLayer] | None = None
    traces: tuple[Trace, Trace] | None = None
    changed: dict[str, Tensor] = {}
    with guard(cut, rollback=True), quiet(original), quiet(cut):
        done = 0
        while layers is None or done < len(layers):
            sampler = Sampler(positions, seed)
            for number, (batch, size) in enumerate(batches(original, data), start=1):
                if layers is None or traces is None:
                    example = few_samples(to_example(batch), size)
                    traces = capture(original, example), capture(cut, example)
                    layers = layers_of(cut, traces, cuts, wanted, masks or {})
                    if what == "bias":
                        layers = with_bias(layers, wanted)
                    if not layers:
                        return {}
                add_batch((original, cut), traces, layers[done], sampler, to_example(batch))
                if progress is not None:
                    total = len(data) if isinstance(data, Sized) else number
                    progress(done * total + number, len(layers) * total)
            assert layers is not None
            layer = layers[done]
            finite(layer.gram.diagonal(dim1=-2, dim2=-1).flatten())
            finite(layer.cross.flatten())
            mask = (masks or {}).get(layer.weight)
            changed.update(shift(cut, layer) if what == "bias" else solved(cut, layer, ridge, mask))
            done += 1
    return changed
