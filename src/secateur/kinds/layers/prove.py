"""The proof of a removal of whole blocks: the original with identity in their place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from secateur.kinds.layers.drop import Layers, block_names
from secateur.model.agreement import agreement, doubled
from secateur.model.bypass import bypassed
from secateur.model.call import call, fresh, outputs
from secateur.structure.capture import quiet
from secateur.types import Certificate, Example


def certify_layers(
    model: nn.Module,
    cut: nn.Module,
    example: Example,
    layers: Layers,
    *,
    dtype: str = "float32",
    tolerance: float | None = None,
) -> Certificate:
    """Prove that `cut` gives the outputs of `model` with the removed blocks as identity.

    Args:
        model: the original, whole; patched while it runs, then as before.
        cut: the model without the blocks.
        example: what `secateur.model.call.call` takes.
        layers: container path -> {"size", "removed", "lists"}.
        dtype: "float32" compares in the models' own precision; "float64" compares double copies of both.
        tolerance: as in `secateur.model.agreement.agreement`.

    Returns:
        the certificate with the largest error found.

    Raises:
        CertificateError: shapes differ or the error is above the tolerance.
        ForwardError: the cut model does not run.

    Cost: one forward pass of each.
    """
    if dtype == "float64":
        model, cut, example = (doubled(x) for x in (model, cut, example))
    expected = identity_outputs(model, example, layers)
    with quiet(cut), torch.no_grad():
        found = [t.detach() for t in outputs(call(cut, fresh(example)))]
    return identity_agreement(expected, found, tolerance)


def identity_outputs(model: nn.Module, example: Example, layers: Layers) -> list[Tensor]:
    """Outputs of the whole model with the removed blocks as identity."""
    with bypassed(model, block_names(model, layers)), quiet(model), torch.no_grad():
        return [t.detach() for t in outputs(call(model, fresh(example)))]


def identity_agreement(expected: Sequence[Tensor], found: Sequence[Tensor], tolerance: float | None) -> Certificate:
    """The certificate that outputs without the blocks are those with identity in their place.

    Raises:
        CertificateError: they differ.
    """
    return agreement(
        expected,
        found,
        tolerance,
        method="identity",
        differs="without the blocks is not that of the model with identity in their place",
        hint="Other code may count the blocks or return something of each: protect the special ones, or call the "
        "model so that it returns the result only. Nothing was changed or saved.",
    )
