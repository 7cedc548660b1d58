"""Two proofs of one cut: the ablated original, run eagerly, and the replay of its calls. Both have to hold."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from secateur.errors import CertificateError, SecateurError
from secateur.kinds.reference import HINT, Tried, certified, with_trials
from secateur.kinds.slices.certify import FunctionChangesError
from secateur.types import Certificate

ABLATION = "ablation"
ALONE = 'Protect the layers around that line, or accept the replay alone: proof="example", and the certificate says so.'


def with_replay(
    trials: Callable[[bool], Tried],
    replay: Callable[..., Certificate],
    *,
    dtype: str,
    tolerance: float | None,
    alone: bool = False,
) -> Certificate:
    """The certificate of both proofs.

    Args:
        trials: runs those of the second proof; told True, it may leave the example to the replay.
        replay: makes the first proof, given a dtype, a tolerance, and runs of the cut model in single precision.
        dtype: in which outputs are compared.
        tolerance: as in `secateur.model.agreement.agreement`.
        alone: whether the first proof suffices where the second could not be run, which the certificate then says.

    Raises:
        CertificateError: the replay differs from the cut model, also in double precision; or the second proof could not
            be run: what the replay and the cut share would prove itself.
    """
    found = trials(True)
    if found.proof is None and not found.trials and not alone:
        raise CertificateError(
            "Only one of the two proofs of this cut could be run, so it is not made.",
            why="; ".join(found.notes) or "the original does not run without what is removed",
            hint=ALONE,
        )
    try:
        return with_trials(_replayed(partial(replay, draws=found.draws), found, dtype, tolerance), found)
    except FunctionChangesError:
        raise
    except CertificateError as error:
        if found.proof is None:
            raise
        raise CertificateError(
            "Two proofs of this cut disagree, so it is not made.",
            why=f"the original without these parts gives the same, the replay of its calls does not: {error.why}",
            hint=HINT,
        ) from error
    except SecateurError:
        raise
    except Exception as error:  # an operator that cannot take NaN or kept counts, which only the replay gives it
        if found.proof is None:
            raise
        if not found.on_example:
            found = trials(False)
        found.notes.append(f"the replay could not be run ({type(error).__name__}: {error})"[:300])
        return certified(found, ABLATION, dtype=dtype)


def _replayed(replay: Callable[..., Certificate], found: Tried, dtype: str, tolerance: float | None) -> Certificate:
    try:
        return replay(dtype=dtype, tolerance=tolerance, runs=() if dtype == "float64" else found.runs)
    except FunctionChangesError:
        raise  # a number is another one in every precision
    except CertificateError as rounded:
        if dtype == "float64":
            raise
        try:  # an error may be rounding; in double precision a mistake stays as large as it was
            proof = replay(dtype="float64", tolerance=None)
        except Exception:
            raise rounded from None
        note = f"in single precision the replay rounds more than the tolerance: {rounded.why}"
        return Certificate(
            proof.max_abs_error, proof.tolerance, proof.dtype, proof.method, proof.outputs, notes=(note,)
        )
