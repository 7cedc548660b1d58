"""The proof of a removal of blocks or branches: the original with identity in their place.

Of branches the original computes all and adds nothing where they end, which shares no module with what is removed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from secateur.errors import CertificateError
from secateur.kinds.layers.drop import Layers, block_names, new_names, staying
from secateur.kinds.layers.handed import Handed, require_alike
from secateur.kinds.layers.numbers import same_numbers, which_stay
from secateur.kinds.reference import Reference, certified
from secateur.kinds.trials import tried
from secateur.model.agreement import agreement
from secateur.model.bypass import bypassed
from secateur.model.call import call, fresh, outputs
from secateur.request import PROOF, Efforts
from secateur.structure.branches import ResidualBranch
from secateur.structure.capture import quiet
from secateur.structure.left_out import added, left_out
from secateur.types import Certificate, Example

METHOD = "identity"
METHOD_OF_BRANCHES = "nothing added"
DIFFERS = "without the blocks is not that of the model with identity in their place"
BRANCH_DIFFERS = "without the branches is not that of the model in which they are computed and not added"
BRANCH_HINT = "Other code uses what a branch computes: protect its modules, or remove whole layers."
HINT = (
    "Other code may count the blocks or return something of each: protect the special ones, or call the model so that "
    "it returns the result only. Nothing was changed or saved."
)


def certify_layers(
    model: nn.Module,
    cut: nn.Module,
    example: Example,
    layers: Layers,
    *,
    dtype: str = "float32",
    tolerance: float | None = None,
    effort: Efforts = PROOF,
) -> Certificate:
    """Prove that `cut` gives the outputs of `model` with the removed blocks as identity.

    Args:
        model: the original, whole; patched while it runs, then as before.
        cut: the model without the blocks.
        example: what `secateur.model.call.call` takes.
        layers: container path -> {"size", "removed", "lists"}.
        dtype: "float32" compares in the models' own precision; "float64" compares double copies of both.
        tolerance: as in `secateur.model.agreement.agreement`.
        effort: as in `secateur.kinds.trials.tried`.

    Returns:
        the certificate with the largest error found.

    Raises:
        CertificateError: shapes differ, the error is above the tolerance, or a block that stays is handed something
            else than in the original.
        UnsupportedError: the cut model does not run.

    Cost: that of `secateur.kinds.trials.tried`.
    """
    seen: list[Handed] = []
    make = partial(with_identity, layers=layers, seen=seen)
    names, places = staying(model, layers)
    after = Handed()
    found = tried(
        [make],
        model,
        cut,
        example,
        dtype=dtype,
        tolerance=tolerance,
        effort=effort,
        beside=lambda: nullcontext() if after.blocks else after.watching(cut, list(names.values())),
    )
    if seen:
        require_alike(seen[0], after, names, places)
    return certified(found, METHOD, dtype=dtype)


def with_identity(model: nn.Module, layers: Layers, seen: list[Handed]) -> Reference:
    """The whole model with the removed blocks as identity; what blocks are handed in its first run is kept."""
    names = list(staying(model, layers)[0])

    @contextmanager
    def around() -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(bypassed(model, block_names(model, layers)))
            if not seen:
                seen.append(stack.enter_context(Handed().watching(model, names)))
            yield

    return Reference(
        model,
        METHOD,
        around,
        renamed=new_names(model, layers),
        differs=DIFFERS,
        hint=HINT,
        numbers=partial(same_numbers, stays=which_stay(layers)),
        apart=list(block_names(model, layers)),
    )


def identity_outputs(model: nn.Module, example: Example, layers: Layers) -> list[Tensor]:
    """Outputs of the whole model with the removed blocks as identity."""
    with bypassed(model, block_names(model, layers)), quiet(model), torch.no_grad():
        return [t.detach() for t in outputs(call(model, fresh(example)))]


def identity_agreement(expected: Sequence[Tensor], found: Sequence[Tensor], tolerance: float | None) -> Certificate:
    """The certificate that outputs without the blocks are those with identity in their place.

    Raises:
        CertificateError: they differ.
    """
    return agreement(expected, found, tolerance, method=METHOD, differs=DIFFERS, hint=HINT)


# -- branches --------------------------------------------------------------------------------------------------


def certify_branches(
    model: nn.Module,
    cut: nn.Module,
    example: Example,
    gone: Sequence[ResidualBranch],
    layers: Layers,
    *,
    dtype: str = "float32",
    tolerance: float | None = None,
    effort: Efforts = PROOF,
) -> Certificate:
    """Prove that `cut` gives the outputs of `model` in which some branches are computed and not added.

    Args:
        model: the original, whole; patched while it runs, then as before.
        cut: the model without the branches.
        example: what `secateur.model.call.call` takes.
        gone: the branches.
        layers: the same in plan form.
        dtype: as in `certify_layers`.
        tolerance: as in `certify_layers`.
        effort: as in `certify_layers`.

    Raises:
        CertificateError: shapes differ, or the error is above the tolerance.
        UnsupportedError: the cut model does not run.

    Cost: that of `secateur.kinds.trials.tried`.
    """

    def make(whole: nn.Module) -> Reference:
        around = partial(left_out, whole, gone)
        renamed = new_names(model, layers)
        return Reference(whole, METHOD_OF_BRANCHES, around, renamed=renamed, differs=BRANCH_DIFFERS, hint=BRANCH_HINT)

    found = tried([make], model, cut, example, dtype=dtype, tolerance=tolerance, effort=effort)
    return certified(found, METHOD_OF_BRANCHES, dtype=dtype)


def branch_outputs(model: nn.Module, example: Example, gone: Sequence[ResidualBranch]) -> list[Tensor]:
    """Outputs of the whole model in which some branches are computed and not added."""
    with left_out(model, gone), quiet(model), torch.no_grad():
        return [t.detach() for t in outputs(call(model, fresh(example)))]


def require_silent(cut: nn.Module, example: Example, gone: Sequence[ResidualBranch]) -> None:
    """Refuse a cut model in which a removed branch still adds something, also where a norm behind it hides that.

    Raises:
        CertificateError: names the block.
    """
    found = added(cut, example, gone)
    loud = next((branch for branch in gone if found.get(branch.place, 1.0) != 0.0), None)
    if loud is not None:
        how = f"adds numbers up to {found[loud.place]:.3g}" if loud.place in found else "ends in another sum"
        raise CertificateError(f"A branch of {loud.block} that is gone {how}.", hint=BRANCH_HINT)


def branch_agreement(expected: Sequence[Tensor], found: Sequence[Tensor], tolerance: float | None) -> Certificate:
    """The certificate that outputs without some branches are those in which these are not added.

    Raises:
        CertificateError: they differ.
    """
    return agreement(expected, found, tolerance, method=METHOD_OF_BRANCHES, differs=BRANCH_DIFFERS, hint=BRANCH_HINT)
