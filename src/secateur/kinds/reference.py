"""What a cut model is held against, and what that has shown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from secateur.errors import CertificateError, SecateurError
from secateur.kinds.answers import Answer, answer
from secateur.kinds.hidden import absorbed
from secateur.kinds.numbers_used import NumbersUsed, Results
from secateur.model.agreement import agreement
from secateur.model.call import device_of
from secateur.model.guard import Mode
from secateur.types import Certificate, Example, Trial

THE_EXAMPLE = "the example"
CHANGES = (
    'Protect what is cut there. A scale may follow the width instead (scales="follow"), as the certificate then says; '
    "a weight that is computed anew keeps its value once it is written down (remove_spectral_norm, remove_weight_norm, "
    "parametrize.remove_parametrizations). Nothing was changed or saved."
)
HINT = "Protect what the plan removes, or cut at another granularity. Nothing was changed or saved."


@dataclass(frozen=True, eq=False)
class Reference:
    """What a cut model should do.

    Args:
        model: runs as the original does.
        method: what the certificate calls it.
        around: stands around every run.
        fit: (its outputs, those of the cut model) -> its outputs at the cut model's sizes.
        renamed: name of a parameter in the original -> its name in the cut model, or None where it is gone.
        objection: what speaks against the cut though it agrees; "" if nothing.
        notes: what the runs so far have shown, to be said in the certificate.
        differs: says what an output of the cut model is not.
        hint: what to do then.
        numbers: (plain numbers of its run, those of the cut model) -> notes; refuses those that mean something else.
            None where numbers are nobody's business, or are followed by other means.
        apart: names of modules of the reference whose numbers do not count.
        results: what of the results of operators is written down beside their numbers; None for nothing.
    """

    model: nn.Module
    method: str
    around: Callable[[], AbstractContextManager[object]] = nullcontext
    fit: Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]] = lambda expected, found: list(expected)
    renamed: Callable[[str], str | None] = lambda name: name
    objection: Callable[[], str] = str
    notes: Callable[[], Sequence[str]] = tuple
    differs: str = "is not that of the original without what is removed"
    hint: str = HINT
    numbers: Callable[[NumbersUsed, NumbersUsed], Iterable[str]] | None = None
    apart: Sequence[str] = ()
    results: Results | None = None

    def counting(self, mode: Mode, apart: Sequence[str] = ()) -> NumbersUsed | None:
        """What writes down the numbers of a run; in training they are rates of what is drawn at random."""
        return NumbersUsed(apart, self.results) if self.numbers is not None and mode == "eval" else None

    def said(self, expected: Answer, found: Answer) -> Iterator[str]:
        """What the numbers of both runs say: notes for the certificate; those that mean something else are refused."""
        if self.numbers is not None and expected.numbers is not None and found.numbers is not None:
            yield from self.numbers(expected.numbers, found.numbers)
        if expected.lines is not None and found.lines is not None:
            yield from absorbed(expected.lines, found.lines)

    def require_same_parameters(self, expected: Answer, found: Answer, cut: nn.Module, what: str) -> None:
        """Refuse a cut model of which other parameters take part in an answer than of the original."""
        there = {name for name, _ in cut.named_parameters()}
        # A tied weight whose first holder is gone is called by the next one.
        names = defaultdict[int, list[str]](list)
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names[id(parameter)].append(name)
        taking = [alike for alike in names.values() if alike[0] in expected.parameters]
        wanted = {new for alike in taking for name in alike if (new := self.renamed(name)) is not None and new in there}
        if wanted != found.parameters:
            other = sorted(wanted ^ found.parameters)
            raise CertificateError(
                f"Other parameters of the cut model take part than of the original (on {what}).",
                why=f"for example {other[0]!r}",
                hint=self.hint,
            )


@dataclass
class Tried:
    """What trials have shown.

    Args:
        trials: that held.
        notes: what they do not show, and what was taken for granted.
        proof: of the example; None where no reference could be run.
        draws: whether the forward draws random numbers in eval mode, as far as is known.
        runs: of the cut model, on the example and on further ones.
    """

    trials: list[Trial] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    proof: Certificate | None = None
    draws: bool = True
    runs: list[Answer] = field(default_factory=list)

    @property
    def error(self) -> float:
        """The largest of all."""
        return max((trial.error for trial in self.trials), default=0.0)

    @property
    def on_example(self) -> bool:
        """Whether the example is among them."""
        return any(trial.input == THE_EXAMPLE for trial in self.trials)


def agrees(reference: Reference, example: Example) -> Callable[[nn.Module], bool]:
    """Whether a cut model gives what its reference gives on an example; the reference is run once."""
    # Without autocast, in which the caller may train: its rounding would hide what is looked for.
    device = device_of(reference.model).type
    try:
        with torch.autocast(device, enabled=False):
            expected = answer(reference.model, example, "eval", reference.around)
    except SecateurError:
        return lambda cut: False

    def right(cut: nn.Module) -> bool:
        try:
            with torch.autocast(device, enabled=False):
                found = answer(cut, example, twice=expected.twice)
                known = expected
                if found.twice and not expected.twice:
                    known = answer(reference.model, example, "eval", reference.around, twice=True)
            left = reference.fit(known.tensors, found.tensors)
            agreement(left, found.tensors, None, method=reference.method, differs="", hint="")
        except SecateurError:
            return False
        return known.words == found.words

    return right


def runs(reference: Reference, example: Example) -> bool:
    """Whether a reference runs at all: in double precision code may not that makes tensors of single precision."""
    try:
        answer(reference.model, example, "eval", reference.around)
    except SecateurError:
        return False
    return True


def with_trials(proof: Certificate, found: Tried) -> Certificate:
    """A certificate and what trials have shown beside it."""
    error = max(proof.max_abs_error, found.error)
    return replace(
        proof, max_abs_error=error, trials=tuple(found.trials), notes=tuple(dict.fromkeys((*proof.notes, *found.notes)))
    )


def certified(found: Tried, method: str, *, dtype: str) -> Certificate:
    """A certificate that stands on trials alone.

    Raises:
        CertificateError: the reference could not be run, so there are none.
    """
    if found.proof is None:
        raise CertificateError("The cut could not be proved.", why="; ".join(found.notes), hint=HINT)
    return with_trials(replace(found.proof, method=method, dtype=dtype), found)
