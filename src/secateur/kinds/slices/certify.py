"""The first proof: the replay of the original's calls, and what the numbers in them mean, against the cut model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor, nn

from secateur.errors import CertificateError
from secateur.kinds.answers import Answer
from secateur.kinds.reference import CHANGES, HINT
from secateur.kinds.slices.fold import Scale, rescaled
from secateur.kinds.slices.meanings import Meanings
from secateur.kinds.slices.number_tape import NumberTape
from secateur.kinds.slices.originals import Originals
from secateur.kinds.slices.replay import Replay
from secateur.kinds.slices.unmade import SameSlices
from secateur.model.agreement import agreement, doubled, run_cut, worst
from secateur.model.call import outputs
from secateur.model.held import HeldRandomness
from secateur.model.tensors import named_tensors
from secateur.structure.axes import Keep
from secateur.structure.capture import capture, quiet
from secateur.structure.groups import structure
from secateur.structure.trace import Trace
from secateur.types import Certificate, Example

MULTIPLES = "Kept counts that are multiples of 8 often help (round_to: 8); else protect the module named above."


class FunctionChangesError(CertificateError):
    """A number that the code takes from a width would be another one, whether or not the example shows it."""


@dataclass(frozen=True, eq=False)
class Numbers:
    """What the numbers of a cut model are judged by.

    Args:
        plain: parameters and buffers of the original, without the factors that the cut model holds.
        scales: these factors.
        follow: whether scales may follow any width.
    """

    plain: Mapping[str, Tensor]
    scales: Sequence[Scale]
    follow: bool

    def followed(self, replay: Replay) -> Meanings | None:
        """What follows the numbers of a replay; None where the cut model runs other calls, so that nobody can."""
        if not replay.tape:
            return None
        scaled = {scale.tensor for scale in self.scales}
        return Meanings(replay, Twin(replay, self.plain, scaled), self.scales)

    def said(self, meanings: Meanings | None) -> Iterator[str]:
        """Notes for the certificate.

        Raises:
            FunctionChangesError: a number has no meaning that the cut keeps.
        """
        if meanings is None:
            yield "the cut model runs other operators than the original, so numbers made from widths were not followed"
            return
        changed = meanings.changed
        if changed and not self.follow:
            why = "; ".join(f"{where} reckons with the width ({how})" for where, how in sorted(changed.items()))
            what = "The function of what is left would change with the cut, also where the example does not show it."
            raise FunctionChangesError(what, why=why, hint=CHANGES)
        for where in changed:
            yield f"the function changes with the cut: {where} scales by the width, which follows"
        for where in meanings.meant:
            yield f"{where} divides by the number of what it sums, in the cut model of what is kept"


class Twin(Replay):
    """A replay with the numbers of the original, run only where another one with those of the cut model differs.

    Args:
        other: that one.
        tensors: the parameters and buffers without the factors that the cut model holds.
        scaled: names of those that have factors.
    """

    def __init__(self, other: Replay, tensors: Mapping[str, Tensor], scaled: Collection[str]) -> None:
        super().__init__(other.trace, tensors, {})
        self.kept, self.other, self.scaled = other.kept, other, scaled
        self.originals = Originals(other.trace, tensors, other.kept)

    def _value(self, number: int) -> Tensor:
        """Its own where it has one, else that of the other: a copy, as the call may write into it."""
        if number in self.values:
            return super()._value(number)
        name, view = self.trace.names.get(number), self.originals.views.get(number)
        if view is not None and view.name in self.scaled:
            return self.originals.whole(view)
        if name is None and number in self.trace.constants and number not in self.other.values:
            return self.trace.constants[number].clone()
        return self.other._value(number).clone()

    def _at(self, number: int, d: int, stay: Tensor) -> Tensor:
        """Part of a value; what is narrow in the other replay stays so."""
        if number not in self.values and number in self.other.values:
            return self.other._at(number, d, stay)
        return super()._at(number, d, stay)


def certify(
    model: nn.Module,
    cut: nn.Module,
    example: Example,
    trace: Trace,
    keep: Keep,
    *,
    scales: Sequence[Scale] = (),
    follow: bool = True,
    dtype: str = "float32",
    tolerance: float | None = None,
    examples: Sequence[Example] = (),
    draws: bool = True,
    runs: Sequence[Answer] = (),
    same: SameSlices | None = None,
) -> Certificate:
    """Prove that `cut` gives the outputs of `model` replayed with the removed parts left out.

    Args:
        model: the original, whole.
        cut: the physically smaller model.
        example: the inputs of the trace.
        trace: from `capture(model, example)`.
        keep: atom id -> bool array of kept indices.
        scales: factors that the cut model holds beside the slices.
        follow: whether numbers of the code may follow any width, which is then said; else only where a meaning of
            theirs is kept (see `secateur.kinds.slices.meanings`).
        dtype: "float32" compares in the models' own precision; "float64" compares double copies of both.
        tolerance: as in `agreement`.
        examples: further ones, of which the trace holds a run each.
        draws: whether the forward may draw random numbers, which are then held at fixed values.
        runs: of the cut model on the example and the further ones, each beside a `NumberTape`; what is not there, or
            was asked twice, is run here.
        same: tensors of the cut model that were seen to hold the slices of the original.

    Returns:
        the certificate with the largest error found.

    Raises:
        UnsupportedError: the cut model does not run.
        CertificateError: shapes differ, a removed part reached an output, or the error is above the tolerance.

    Cost: about one forward pass of the cut model, another one where `runs` does not hold it, and one walk over the
        weights; no copy of the weights.
    """
    if dtype == "float64":
        model, cut, example = (doubled(x) for x in (model, cut, example))
        examples = [doubled(each) for each in examples]
        trace = capture(model, example, examples=examples)  # the same calls in the same order: the same atoms
        structure(model, trace)  # and those that follow each other
        same = None
    plain = named_tensors(model)
    tensors = rescaled(plain, scales)
    numbers_of = Numbers(plain, scales, follow=follow)
    held = HeldRandomness if draws else nullcontext
    each = zip_longest((example, *examples), (trace, *trace.further), runs)
    replay = partial(Replay, tensors=tensors, keep=keep, cut=named_tensors(cut), same=same)
    return worst(_replayed(replay, cut, given, run, tolerance, held, played, numbers_of) for given, run, played in each)


def _replayed(
    make: Callable[..., Replay],
    cut: nn.Module,
    example: Example,
    trace: Trace,
    tolerance: float | None,
    held: Callable[[], AbstractContextManager[object]],
    played: Answer | None,
    numbers_of: Numbers,
) -> Certificate:
    result, tape = (None, None) if played is None else (played.result, played.beside)
    if result is None or not isinstance(tape, NumberTape):
        with quiet(cut), torch.no_grad(), held(), NumberTape() as tape:
            result = run_cut(cut, example, when="after this cut", hint=MULTIPLES)
    found = [t.detach() for t in outputs(result)]
    replay = make(trace, tape=tape.calls)
    meanings = replay.meanings = numbers_of.followed(replay)
    with held():
        expected = replay.run()
    proof = agreement(
        expected,
        found,
        tolerance,
        method="replay",
        differs="is not that of its replayed plan",
        nan="a removed part reaches the output of the replayed plan: the engine's rules for this model are wrong",
        hint=HINT,
    )
    return replace(proof, notes=tuple(numbers_of.said(meanings)))
