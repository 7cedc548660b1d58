"""Everything about a model at one moment."""

from __future__ import annotations

from torch import nn

from secateur.errors import NonFiniteError
from secateur.measure.counts import num_nonzero, num_params, size_bytes
from secateur.measure.macs import count
from secateur.measure.quality import quality
from secateur.model.call import describe, outputs
from secateur.types import Evaluate, Example, Latency, Snapshot


def snapshot(
    model: nn.Module,
    example: Example = None,
    *,
    evaluate: Evaluate | None = None,
    latency_ms: Latency | None = None,
) -> Snapshot:
    """Count and evaluate a model; the ``before`` and ``after`` of a report.

    Latency is handed in, as before and after must be timed interleaved, in one call of `latency`.

    Args:
        model: any module; left as it is.
        example: what `secateur.model.call.call` takes; None = the forward is not run and ``macs`` is None.
        evaluate: ``evaluate(model)`` -> number or mapping of numbers; None = no quality.
        latency_ms: what `latency` measured for this model.

    Returns:
        The snapshot.

    Raises:
        NonFiniteError: an output on the example is NaN or infinite, or a quality is not finite.
        ForwardError: the forward fails on the example.

    Cost: a forward pass on the example, one write of the weights, and what ``evaluate`` takes.

    Example:
        >>> import torch
        >>> snapshot(nn.Linear(3, 4), torch.zeros(1, 3)).macs
        12
    """
    multiplications = None
    if example is not None:
        # The pass that counts shows the outputs, too: a broken model is refused before the long work begins.
        multiplications, _, output = count(model, example)
        for number, tensor in enumerate(outputs(output)):
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                found = "NaN" if bool(tensor.isnan().any()) else "Inf"
                raise NonFiniteError(
                    f"output {number} of the model, {describe(tensor)}, has {found} on the example",
                    hint="check the weights and the example for NaN, Inf and values that overflow",
                )
    return Snapshot(
        params=num_params(model),
        nonzero=num_nonzero(model),
        macs=multiplications,
        size_bytes=size_bytes(model),
        latency_ms=latency_ms,
        quality=quality(model, evaluate) if evaluate is not None else {},
    )
