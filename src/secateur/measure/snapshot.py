"""Everything about a model at one moment."""

from __future__ import annotations

from torch import nn

from secateur.errors import NonFiniteError
from secateur.measure.counts import num_nonzero, num_params, size_bytes
from secateur.measure.macs import count, samples_in
from secateur.measure.quality import quality
from secateur.model.call import describe, outputs
from secateur.model.samples import batch_size_of
from secateur.types import Evaluate, Example, Latency, MacsPer, Snapshot


def snapshot(
    model: nn.Module,
    example: Example = None,
    *,
    evaluate: Evaluate | None = None,
    latency_ms: Latency | None = None,
    samples: int | None = None,
) -> Snapshot:
    """Count and evaluate a model; the ``before`` and ``after`` of a report.

    Latency is handed in, as before and after must be timed interleaved, in one call of `latency`.

    Args:
        model: any module; left as it is.
        example: what `secateur.model.call.call` takes; None = the forward is not run and ``macs`` is None.
        evaluate: ``evaluate(model)`` -> number or mapping of numbers; None = no quality.
        latency_ms: what `latency` measured for this model.
        samples: samples in the example, from `secateur.measure.macs.samples_in`; None = found out here. Give it where
            two models are compared, so that both counts are divided alike.

    Returns:
        The snapshot.

    Raises:
        NonFiniteError: an output on the example is NaN or infinite, or a quality is not finite.
        ForwardError: the forward fails on the example.

    Cost: a forward pass on the example, one on a single sample where `samples` is left out, a look at
        every weight, and what ``evaluate`` takes.

    Example:
        >>> import torch
        >>> snapshot(nn.Linear(3, 4), torch.zeros(2, 3)).macs
        12
    """
    multiplications: int | None = None
    per: MacsPer = "sample"
    if example is not None:
        whole = count(model, example)
        # Looked at before anything is compared with it: NaN would make every comparison fail, and hide its cause.
        for number, tensor in enumerate(outputs(whole.output)):
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                found = "NaN" if bool(tensor.isnan().any()) else "Inf"
                raise NonFiniteError(
                    f"output {number} of the model, {describe(tensor)}, has {found} on the example",
                    hint="check the weights and the example for NaN, Inf and values that overflow",
                )
        # The model's own batch where the caller has no other model to compare with.
        samples = samples_in(model, example, whole) if samples is None else samples
        multiplications = whole.total // samples
        per = "example" if samples == 1 < batch_size_of(example) else "sample"
    return Snapshot(
        params=num_params(model),
        nonzero=num_nonzero(model),
        macs=multiplications,
        size_bytes=size_bytes(model),
        latency_ms=latency_ms,
        quality=quality(model, evaluate) if evaluate is not None else {},
        macs_per=per,
    )
