"""Trials: a cut model beside its reference, on the example and on inputs made anew.

A reference is the original, run eagerly, with what is removed out of the way; how that is done is the affair of the
kind of removal. All kinds share what is tried: the example, other values, another batch, shorter and longer inputs, and
training mode. Random operators are held, so that models of different widths see the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from secateur.errors import CertificateError, ForwardError, SecateurError, UnsupportedError
from secateur.kinds.absorbed import Absorbed
from secateur.kinds.answers import Answer, Lent, answer, first_difference, real_values
from secateur.kinds.reference import CHANGES, THE_EXAMPLE, Reference, Tried
from secateur.kinds.shallow import PassedBlocks, passing
from secateur.model.agreement import agreement, doubled
from secateur.model.behaviour import behaviour
from secateur.model.call import tensors_in
from secateur.model.evidence import Input, each_alone, inputs_beside
from secateur.model.guard import Mode, generators
from secateur.model.rebound import reading_its_own
from secateur.request import PROOF, Efforts
from secateur.types import Example, Trial

LEFT = "on the example itself the cut was held against the replay alone; the second proof ran all blocks on {}"
WITHOUT = ", without {} blocks that are like others"
FEW = 4  # so many times smaller than the example is an input on which a large model runs whole beside the replay
LARGE = 5_000_000  # parameters: from here on further inputs are chosen by what they cost


def tried(
    alternatives: Sequence[Callable[[nn.Module], Reference]],
    model: nn.Module,
    cut: nn.Module,
    example: Example,
    *,
    examples: Sequence[Example] = (),
    dtype: str = "float32",
    tolerance: float | None = None,
    effort: Efforts = PROOF,
    beside: Callable[[], AbstractContextManager[object]] = nullcontext,
    blocks: Sequence[str] = (),
    replayed: bool = False,
) -> Tried:
    """Hold a cut model against its reference.

    Args:
        alternatives: make references of the original (or a double copy of it): the first that the cut model agrees
            with on the example is the one that it is held against everywhere.
        model: the original.
        cut: the smaller model.
        example: what one forward takes.
        examples: further ones.
        dtype: "float64" compares double copies of both.
        tolerance: as in `secateur.model.agreement.agreement`.
        effort: "example" tries the examples only; "default" other inputs too, as small as they come of large models;
            "full" whole models of any size, and more inputs.
        beside: stands around the runs of the cut model on the example and on further ones, for who wants to know more
            about them than their answers.
        blocks: names of blocks that others stand for on further inputs of a large model, as
            `secateur.kinds.shallow.repeated` gives them.
        replayed: whether the caller proves the cut on the example by other means as well, for which its run is kept.
            The reference of a large model then runs on a far smaller input and a longer one in the place of the
            example, if the original takes such.

    Raises:
        CertificateError: they differ, or no output of any input says anything.
        UnsupportedError: the cut model fails on an input that the original takes, or in training mode.

    Cost: with the default effort about one pass on the example for each of the two, one on a longer input, and two on
        a shorter one; with "full" several times that. Of models of `LARGE` parameters further inputs are by default as
        small as the original takes them, and go through one block of each kind, and the last.
    """
    if dtype == "float64":
        model, cut, example = (doubled(x) for x in (model, cut, example))
        examples = [doubled(each) for each in examples]
    found = Tried()
    lent = Lent()
    trial = _Trials(model, cut, tolerance, found, beside, PassedBlocks(blocks if effort == "default" else ()), lent)
    trial.large = trial.large and effort != "full"
    trial.left = replayed and effort == "default" and trial.large and not examples
    with generators(), closing(lent):
        if not trial.choose(alternatives, example):
            return found
        for number, other in enumerate(examples, 2):
            trial.given(Input(f"example {number}", other))
        if effort != "example":
            trial.elsewhere(example, thorough=effort == "full")
    trial.require_live()
    found.notes += trial.reference.notes()
    return found


class _Trials:
    """The trials of one cut model."""

    def __init__(
        self,
        model: nn.Module,
        cut: nn.Module,
        tolerance: float | None,
        found: Tried,
        beside: Callable[[], AbstractContextManager[object]],
        blocks: PassedBlocks,
        lent: Lent,
    ) -> None:
        self.model, self.cut, self.tolerance, self.found = model, cut, tolerance, found
        self.beside = partial(reading_its_own, beside, model, cut)
        self.large = sum(p.numel() for p in model.parameters()) >= LARGE
        self.blocks, self.lent = blocks, lent
        self.left = False  # whether the example is left to others
        self.first = Input(THE_EXAMPLE, None)  # on which all blocks run
        self.others: Iterator[tuple[Input, Answer]] = iter(())
        self.looked: set[Mode] = set()  # in which the lines of both runs were held against each other
        self.live: set[float] = set()  # different numbers in outputs, as far as they show that something is seen

    def choose(self, alternatives: Sequence[Callable[[nn.Module], Reference]], example: Example) -> bool:
        """Find the reference that the cut model agrees with on the example; False where none can be run."""
        differs: CertificateError | None = None
        for make in alternatives:
            self.make, self.reference = make, make(self.model)
            self.lent.state(self.reference.model)  # without the hooks of the watch
            try:
                given, expected = self._first(example)
            except ForwardError as error:
                self.found.notes.append(f"{self.reference.method} could not be run: {error.why}"[:300])
                continue
            try:
                self._begin(given, expected, example)
            except CertificateError as error:
                # That the function changes says more than that the outputs differ.
                differs = error if differs is None or self.reference.objection() else differs
                continue
            return True
        if differs is not None:
            raise differs
        return False

    def _begin(self, given: Input, expected: Answer, example: Example) -> None:
        if self.left:
            self.hold(given, expected)
            self.left = bool(self.found.trials)  # else the original answers differently each time: see the example
        if not self.left:
            alone = given.what == THE_EXAMPLE
            self.given(Input(THE_EXAMPLE, example), expected if alone else None)

    def _first(self, example: Example) -> tuple[Input, Answer]:
        """The input on which all blocks run: the example, or a far smaller one where the example is left to others."""
        whole = Input(THE_EXAMPLE, example)
        if self.left and not self.found.runs:
            self.found.runs.append(self._answer_of_cut(whole, "eval", self.beside, twice=False))
            self.found.draws = bool(self.found.runs[0].held)
            self.left = not self.found.runs[0].twice
        if self.left:
            self.others = self._others(example)
            first = next(self.others, None)
            if first is not None:
                self.first = first[0]
                return first
            self.left = False
        with self.blocks.watched(self.reference.model) if self.large else nullcontext():
            expected = self._expected(whole)
        self.found.draws = bool(expected.held)  # what is drawn elsewhere only is a branch that was not seen
        return whole, expected

    def _others(self, example: Example) -> Iterator[tuple[Input, Answer]]:
        """Inputs beside the example with what is expected there; where the example is left out, a small one first."""
        known: dict[int, tuple[Input, Answer]] = {}
        few = _elements(example) // FEW
        whole = self.left  # until the first was found

        def ways(given: Input) -> list[Input]:
            nonlocal few
            if not whole:
                return self._ways(given)
            if _elements(given.example) > few:
                few = 0  # nothing that differs less from the example takes its place
            return [given] if few else []

        def accepts(given: Input) -> bool:
            for way in ways(given):
                try:
                    with self.blocks.watched(self.reference.model) if whole else nullcontext():
                        known[id(given)] = (way, self._expected(way))
                except (SecateurError, IndexError):
                    continue
                return True
            return False

        for given in inputs_beside(example, self.model, accepts, sparing=self.large):
            whole = False
            yield known[id(given)]

    def elsewhere(self, example: Example, *, thorough: bool = False) -> None:
        """Other inputs, and training mode on the smallest; `thorough` adds each change alone, and more training."""
        held = [self.first] if self.left else []
        for given, expected in self.others if self.left else self._others(example):
            self.hold(given, expected)
            held.append(given)
        whole = Input(THE_EXAMPLE, example)
        if not held:
            self.found.notes.append("the original takes no other values, sizes or batches of the example's form")
        if self.left:
            self.found.notes.append(LEFT.format(held[0].what))
            if len(held) == 1:  # nothing longer: what the code does at the example's own size
                self.hold(self._ways(whole)[0])
        if thorough:
            self._each_alone(example, {given.what for given in held})
            for given in [whole, *held[1:]]:
                self._training(given)
        small = held[0] if held else whole
        if self.blocks.passed and _elements(small.example) > _elements(example):
            small = whole
        self._training(small if small.passed else self._ways(small)[0])

    def _each_alone(self, example: Example, known: set[str]) -> None:
        """Inputs that differ from the example in one size, in the batch or in the values only, where they are taken."""
        for given in each_alone(example, self.model):
            if given.what in known:
                continue
            try:
                expected = self._expected(given)
            except (SecateurError, IndexError):
                continue
            self.hold(given, expected)

    def _ways(self, given: Input) -> list[Input]:
        """How an input goes through the model: a large one is first asked without its repeated blocks."""
        passed = self.blocks.passed
        if not passed:
            return [given]
        return [Input(given.what + WITHOUT.format(len(passed)), given.example, passed), given]

    def _training(self, given: Input) -> None:
        where = replace(given, what=f"{given.what}, in training mode")
        try:
            expected = self._expected(where, "train")
        except (SecateurError, ValueError) as error:
            self.found.notes.append(f"training mode was not tried: the original fails there ({error.args[0]})"[:300])
            return
        self.hold(where, expected, "train")

    def given(self, given: Input, expected: Answer | None = None) -> None:
        """A trial on an example, of which the run is kept.

        Raises:
            CertificateError: as `hold`.
        """
        expected = expected or self._expected(given)
        if given.what != THE_EXAMPLE or not self.found.runs:
            self.found.runs.append(self._answer_of_cut(given, "eval", self.beside, twice=expected.twice))
        self.hold(given, expected, found=self.found.runs[-1])

    def hold(
        self, given: Input, expected: Answer | None = None, mode: Mode = "eval", *, found: Answer | None = None
    ) -> None:
        """One trial; one that fails where blocks are passed by is made again with all of them, and that one counts.

        Raises:
            CertificateError: the answers differ, also in double precision.
        """
        try:
            self._hold(given, expected, mode, found)
        except (CertificateError, UnsupportedError) as error:
            if not given.passed:
                raise
            # What a block hands on may have lost other units than what it takes, though the original's have one form:
            # such blocks cannot be passed by, neither here nor on other inputs.
            self.blocks.passed = ()
            whole = Input(given.what.replace(WITHOUT.format(len(given.passed)), ""), given.example)
            try:
                expected = self._expected(whole, mode)
            except SecateurError:
                raise error from None
            self._hold(whole, expected, mode, None)

    def _hold(self, given: Input, expected: Answer | None, mode: Mode, found: Answer | None) -> None:
        expected = expected or self._expected(given, mode)
        found = found or self._answer_of_cut(given, mode, twice=expected.twice)
        if found.twice and not expected.twice:  # what the original leaves behind was there already: a width, say
            expected = self._expected(given, mode, twice=True)
        try:
            self._compare(self.reference, given, expected, found)
        except CertificateError as error:
            if given.what != THE_EXAMPLE and behaviour(self.model, given.example).restless:
                self.found.notes.append(f"on {given.what} the original itself answers differently each time")
                return
            self._in_double(given, mode, error, calls=expected.twice)
        said = list(self.reference.said(expected, found))
        if mode == "eval":
            said += [f"numbers drawn at random were held at fixed values: {name}" for name in sorted(expected.held)]
        self.found.notes += [note for note in said if note not in self.found.notes]
        self.looked.add(mode)
        if self.reference.objection():
            what = "The function of what is left would change with the cut."
            raise CertificateError(what, why=self.reference.objection(), hint=CHANGES)
        for tensor in found.tensors:
            self._see(tensor)

    def _expected(self, given: Input, mode: Mode = "eval", *, twice: bool = False) -> Answer:
        reference, draws = self.reference, self.found.draws or mode == "train"
        with passing(reference.model, given.passed):
            state = self.lent.state(reference.model, given.passed)
            return answer(
                reference.model, given.example, mode, reference.around, lines=self._lines(mode),
                draws=draws, state=state, twice=twice, numbers=reference.counting(mode, reference.apart),
            )  # fmt: skip

    def _answer_of_cut(
        self,
        given: Input,
        mode: Mode,
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
        *,
        twice: bool,
    ) -> Answer:
        draws = self.found.draws or mode == "train"
        try:
            with passing(self.cut, given.passed):
                state = self.lent.state(self.cut, given.passed)
                return answer(
                    self.cut, given.example, mode, around, lines=self._lines(mode),
                    draws=draws, state=state, twice=twice, numbers=self.reference.counting(mode),
                )  # fmt: skip
        except ForwardError as error:
            raise UnsupportedError(
                f"{type(self.cut).__name__} does not run after this cut on an input that the original takes.",
                why=f"on {given.what}: {error.why}",
                hint="Kept counts that are multiples of 8 often help (round_to: 8); else protect the module named "
                "above. Nothing was changed or saved.",
            ) from error

    def _lines(self, mode: Mode) -> Absorbed | None:
        return None if mode in self.looked else Absorbed()  # a line does the same on every input

    def _in_double(self, given: Input, mode: Mode, rounded: CertificateError, *, calls: bool) -> None:
        """An error may be rounding; in double precision a mistake stays as large as it was."""
        reference, cut = self.make(doubled(self.model)), doubled(self.cut)
        twice = Input(given.what, doubled(given.example))
        try:
            with passing(reference.model, given.passed), passing(cut, given.passed):
                expected = answer(reference.model, twice.example, mode, reference.around, twice=calls)
                found = answer(cut, twice.example, mode, twice=calls)
        except SecateurError:
            raise rounded from None  # some operators know single precision only
        error = self._compare(reference, twice, expected, found)
        self.found.notes.append(
            f"on {given.what} single precision rounds more than the tolerance; in double the error is {error:.1e}"
        )

    def _compare(self, reference: Reference, given: Input, expected: Answer, found: Answer) -> float:
        hint, differs = reference.hint, f"{reference.differs} (on {given.what})"
        if expected.words != found.words:
            raise CertificateError(
                f"What the cut model returns {differs}.", why=first_difference(expected, found), hint=hint
            )
        proof = agreement(
            reference.fit(expected.tensors, found.tensors),
            found.tensors,
            self.tolerance,
            method=reference.method,
            differs=differs,
            hint=hint,
            nan="a removed part reaches the output",
        )
        if expected.parameters or found.parameters:
            reference.require_same_parameters(expected, found, self.cut, given.what)
        self.found.trials.append(Trial(given.what, reference.method, proof.max_abs_error))
        self.found.proof = self.found.proof or proof
        return proof.max_abs_error

    def _see(self, tensor: Tensor) -> None:
        if tensor.numel() and len(self.live) < 2:
            ends = torch.stack(torch.aminmax(real_values(tensor))).double().tolist()
            self.live.update(end for end in ends if end == end and abs(end) != float("inf"))

    def require_live(self) -> None:
        """Refuse outputs that are the same whatever goes in: they agree with anything.

        Raises:
            CertificateError: all numbers of all outputs were alike, or none was finite.
        """
        if len(self.live) < 2:
            said = f"every finite number in them is {min(self.live):g}" if self.live else "no number in them is finite"
            raise CertificateError(
                "The outputs say nothing, so no cut can be proved.",
                why=f"on {len(self.found.trials)} inputs {said}",
                hint="Give an example on which the model answers with different numbers.",
            )


def _elements(example: Example) -> int:
    return sum(tensor.numel() for tensor in tensors_in(example))
