"""After a cut, refit the layers that lost inputs so that they give the outputs of the original again.

Legend: N rows (samples and positions), k columns of the cut weight, n outputs that are kept. X is what the cut model
feeds the layer, Y what the original's layer returns, so errors of earlier cuts are corrected too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from itertools import count
from typing import Literal

import torch
from torch import Tensor, nn

from secateur.errors import ForwardError, RecipeError
from secateur.model.call import call, outputs, require_reiterable, to_example
from secateur.model.guard import guard
from secateur.model.padding import real_tokens
from secateur.model.samples import pick_sample
from secateur.solve.refit_blocks import blocks_alone
from secateur.solve.refit_layers import RefitRule, layers_of
from secateur.solve.refit_seen import RefitBatch
from secateur.solve.refit_solve import fit_layers
from secateur.solve.ridge import warn_of_left, warn_of_outputs, warn_of_unfitted
from secateur.statistics.activations.streams import few_samples
from secateur.statistics.gradients.functional import batches
from secateur.structure.capture import capture, quiet
from secateur.types import Cuts, Data, Example

JUDGED = 8  # samples at most, one at a time: whole batches of logits may be as large as the model


def refit_consumers(
    original: nn.Module,
    cut: nn.Module,
    data: Data,
    *,
    cuts: Cuts,
    masks: Mapping[str, Tensor] | None = None,
    zeros: Mapping[str, Tensor] | None = None,
    what: Literal["weights", "bias"] = "weights",
    names: Iterable[str] | None = None,
    ridge: float | None = None,
    positions: int | None = 16,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Refit the weights and biases of layers that lost inputs, in closed form; changes `cut` in place.

    The idea: min over W', b' of ||Y - X W'^T - b'||^2 + ridge ||W' - W||^2, layer by layer from the input to
    the output, each behind layers that are refitted already. Where the layer's output is added to a shortcut
    (directly or behind a batch norm), what the cut changed in the shortcut is made good as well. A bad choice
    with fewer rows of data than columns of the weight: it then fits the sample; give more data. A weight that is
    used several times is fitted on all uses at once, each for its own output, and the fit is kept if it is better
    with the inputs that it then has. A bias that others add too stays. What should be fitted and has no closed form
    (a transposed convolution, a head that is the embedding) is left as it is and named in a `RefitWarning`. Layers
    that are nearer one by one need not make the outputs nearer (a recurrent layer): where they do not, it is said.

    Args:
        original: the whole model.
        cut: the cut model; its weights are replaced, everything else stays as it is.
        data: unlabelled batches, read once per layer, or once in all where all layers lie in one stack of blocks.
        cuts: tensor name -> dimension -> kept indices, as in a plan.
        masks: parameter name -> bool, True = keep: zeros that stay. Each output is fitted on the weights it has left.
        zeros: as `masks`, of earlier rounds: they stay as well, and are no reason for a fit.
        what: "weights" (and biases), or "bias" alone: only the mean output of each unit is made good.
        names: weights to refit; default is every linear layer and convolution that lost inputs or has a mask.
        ridge: pull towards the cut weights, relative to the mean square of the inputs; 0 is plain least squares
            (of least change, where the inputs are dependent). None: layer by layer the one of 1e-4, 1e-3 ... 1 with
            which every fourth batch, held out, is met best, and then all batches are fitted; a layer that no fit
            makes better there stays as it is. With fewer than four batches 1e-4.
        positions: places in space taken per image and convolution; None takes all.
        seed: of the places.
        progress: called as ``progress(done, total)`` after every batch.

    Returns:
        Name of every changed weight and bias -> its new value.

    Raises:
        RecipeError: a name that is no weight of a linear layer or convolution of the cut model, or a bad number.
        UnsupportedError: a named layer that cannot be refitted, batches that differ in the calls that the models make
            in more than eight ways, or rows that the cut model sends to other layers than the original (experts).
        NonFiniteError: an activation is NaN or Inf.

    Cost:
        Per layer N k^2 + N k n and k^3 multiplications; with masks k^3 for each of the n outputs, since each has other
        weights left; twice the memory and six times k^3 where the ridge is chosen (with masks by 32 outputs at most).
        Where all layers lie in one stack of blocks (a transformer), a forward pass of its block of both models per
        layer, and the hidden states of all batches (beyond 1 GiB on disk); else one of both models up to it, to
        the end for the first, and twice for a weight that is used several times. Eight samples are run three times
        more, to see whether the outputs have come nearer.

    Source:
        He, Zhang, Sun, "Channel Pruning for Accelerating Very Deep Neural Networks", 2017, equation 2 and
        section 3.2 (shortcuts).
    """
    if what not in ("weights", "bias"):
        raise RecipeError(f"what={what!r} is not known", hint="weights or bias")
    if not (ridge is None or ridge >= 0) or (positions is not None and positions < 1):
        raise RecipeError(f"ridge={ridge!r}, positions={positions!r}: ridge must be >= 0, positions above 0 or None")
    require_reiterable(data, "the refit, one pass for every layer,")
    models, rule = (original, cut), RefitRule(cuts, masks or {}, zeros or {}, what, ridge, positions, seed)
    with guard(cut, rollback=True), quiet(original), quiet(cut):
        batch, size = next(batches(original, data))
        example = few_samples(to_example(batch), size)
        judged = [pick_sample(to_example(batch), number) for number in range(min(size, JUDGED))]
        try:
            goals = [_given(original, one) for one in judged]
        except ForwardError:  # a model that takes no batch of one
            judged, goals = [example], [_given(original, example)]
        before = _missed(goals, cut, judged)
        traces = capture(original, example), capture(cut, example)
        layers, left = layers_of(cut, traces, rule, None if names is None else list(names))
        done = count()

        def tell() -> None:
            if progress is not None and isinstance(data, Sized):
                progress(next(done) + 1, len(layers) * len(data))

        def anew() -> Iterator[RefitBatch]:
            for batch, _ in batches(original, data):
                example = to_example(batch)
                yield RefitBatch(example, example, real_tokens(example))

        # What several blocks use is fitted on what it reads in all of them.
        shared = any(layer.shared for layer in layers)
        alone = None if shared else blocks_alone(models, example, [layer.weight for layer in layers], anew)
        changed = fit_layers(models, traces, layers, anew, rule, tell) if alone is None else alone.fit(rule, tell)
        warn_of_outputs(before, _missed(goals, cut, judged))
    warn_of_left(left | {layer.weight: layer.left for layer in layers if layer.left})
    if what == "weights":
        unfitted = [layer.weight for layer in layers if layer.weight not in changed and not layer.left]
        warn_of_unfitted(unfitted, len(layers))
    return changed


def _given(model: nn.Module, example: Example) -> list[Tensor]:
    with torch.no_grad():
        return [one.detach() for one in outputs(call(model, example))]


def _missed(goals: Sequence[list[Tensor]], cut: nn.Module, examples: Sequence[Example]) -> float:
    """Mean square by which outputs miss the original's, relative to these; of outputs that a cut leaves as wide."""
    lost, whole = 0.0, 0.0
    for goal, example in zip(goals, examples, strict=True):
        for a, b in zip(goal, _given(cut, example), strict=False):
            if a.shape == b.shape and a.is_floating_point():
                lost += float((a.double() - b.double()).square().sum())
                whole += float(a.double().square().sum())
    return lost / max(whole, 1e-300)
