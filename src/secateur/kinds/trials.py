"""Trials: a cut model beside its reference, on the example and on inputs made anew.

A reference is the original, run eagerly, with what is removed out of the way; how that is done is the affair of the
kind of removal. All kinds share what is tried: the example, other values, another batch, shorter and longer inputs, and
training mode. Random operators are held, so that models of different widths see the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import CertificateError, ForwardError, SecateurError, UnsupportedError
from secateur.model.agreement import agreement, doubled
from secateur.model.behaviour import behaviour
from secateur.model.call import call, device_of, fresh
from secateur.model.evidence import Input, inputs_beside
from secateur.model.guard import Mode, guard
from secateur.model.held import HeldRandomness
from secateur.model.kernels import unfused
from secateur.model.state import State
from secateur.model.tensors import dense
from secateur.types import Certificate, Example, Trial

Effort = Literal["example", "default"]
THE_EXAMPLE = "the example"
CHANGES = (
    'Protect what is cut there, or let the scale follow the width (scales="follow"), which the certificate then says. '
    "Nothing was changed or saved."
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


@dataclass(frozen=True, eq=False)
class Answer:
    """What a run gave.

    Args:
        tensors: of the output, numbers and arrays among them, in a stable order.
        words: what else stands in the output: keys, texts, the names of its classes.
        parameters: those that took part, in training mode.
        held: random operators that gave fixed numbers, with their lines.
        twice: whether it is the answer of two calls.
    """

    tensors: list[Tensor]
    words: list[str]
    parameters: frozenset[str] = frozenset()
    held: frozenset[str] = frozenset()
    twice: bool = False


@dataclass
class Tried:
    """What trials have shown.

    Args:
        trials: that held.
        notes: what they do not show, and what was taken for granted.
        proof: of the example; None where no reference could be run.
        draws: whether the forward draws random numbers in eval mode, as far as is known.
    """

    trials: list[Trial] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    proof: Certificate | None = None
    draws: bool = True

    @property
    def error(self) -> float:
        """The largest of all."""
        return max((trial.error for trial in self.trials), default=0.0)


def answer(
    model: nn.Module,
    example: Example,
    mode: Mode = "eval",
    around: Callable[[], AbstractContextManager[object]] = nullcontext,
    *,
    draws: bool = True,
    twice: bool = False,
) -> Answer:
    """Run a model with its randomness held, and leave it as it was.

    A forward that leaves something behind (a count, a cache) may answer otherwise the next time: it is run twice, and
    the answer is that of both calls.

    Args:
        model: any module.
        example: what one forward takes.
        mode: "eval" or "train"; in training the parameters that take part are found too.
        around: stands around the run.
        draws: False where it is known that nothing is drawn at random, which saves the watch.
        twice: it is run twice in any case, as what it is compared with was.

    Raises:
        ForwardError: its forward fails.
    """
    train, held = mode == "train", HeldRandomness()
    lent = guard(model, mode=mode, gradients=train, example=example, seed=0)
    with lent as state, unfused(model), held if draws else nullcontext(), around():
        if state.moved(model):  # by what stands around the run
            state = State([model], example, copies=True, weights=False)
        following = fresh(example)
        result: Any = call(model, example)
        twice = not train and (twice or state.moved(model))
        if twice:
            result = (result, call(model, following))
        tensors, words = _parts(result)
        taking_part = _taking_part(model, tensors) if train else frozenset()
    return Answer([t.detach() for t in tensors], words, taking_part, frozenset(held.seen), twice)


def tried(
    alternatives: Sequence[Callable[[nn.Module], Reference]],
    model: nn.Module,
    cut: nn.Module,
    example: Example,
    *,
    examples: Sequence[Example] = (),
    dtype: str = "float32",
    tolerance: float | None = None,
    effort: Effort = "default",
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
        effort: "example" tries the example only.

    Raises:
        CertificateError: they differ, or no output of any input says anything.
        UnsupportedError: the cut model fails on an input that the original takes, or in training mode.

    Cost: with the default effort about one pass on the example for each of the two, one on a longer input, and two on
        a shorter one.
    """
    if dtype == "float64":
        model, cut, example = (doubled(x) for x in (model, cut, example))
        examples = [doubled(each) for each in examples]
    found = Tried()
    trial = _Trials(model, cut, tolerance, found)
    if not trial.choose(alternatives, example):
        return found
    for number, other in enumerate(examples, 2):
        trial.hold(Input(f"example {number}", other))
    if effort == "default":
        trial.elsewhere(example)
    trial.require_live()
    found.notes += trial.reference.notes()
    return found


def agrees(reference: Reference, example: Example) -> Callable[[nn.Module], bool]:
    """Whether a cut model gives what its reference gives on an example; the reference is run once."""
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


def with_trials(proof: Certificate, found: Tried) -> Certificate:
    """A certificate and what trials have shown beside it."""
    error = max(proof.max_abs_error, found.error)
    return replace(proof, max_abs_error=error, trials=tuple(found.trials), notes=(*proof.notes, *found.notes))


def certified(found: Tried, method: str, *, dtype: str) -> Certificate:
    """A certificate that stands on trials alone.

    Raises:
        CertificateError: the reference could not be run, so there are none.
    """
    if found.proof is None:
        raise CertificateError("The cut could not be proved.", why="; ".join(found.notes), hint=HINT)
    return with_trials(replace(found.proof, method=method, dtype=dtype), found)


class _Trials:
    """The trials of one cut model."""

    def __init__(self, model: nn.Module, cut: nn.Module, tolerance: float | None, found: Tried) -> None:
        self.model, self.cut, self.tolerance, self.found = model, cut, tolerance, found
        self.live: set[float] = set()  # different numbers in outputs, as far as they show that something is seen

    def choose(self, alternatives: Sequence[Callable[[nn.Module], Reference]], example: Example) -> bool:
        """Find the reference that the cut model agrees with on the example; False where none can be run."""
        differs: CertificateError | None = None
        for make in alternatives:
            self.make, self.reference = make, make(self.model)
            given = Input(THE_EXAMPLE, example)
            try:
                expected = self._expected(given)
            except ForwardError as error:
                self.found.notes.append(f"{self.reference.method} could not be run: {error.why}"[:300])
                continue
            self.found.draws = bool(expected.held)  # what is drawn elsewhere only is a branch that was not seen
            try:
                self.hold(given, expected)
            except CertificateError as error:
                # That the function changes says more than that the outputs differ.
                differs = error if differs is None or self.reference.objection() else differs
                continue
            return True
        if differs is not None:
            raise differs
        return False

    def elsewhere(self, example: Example) -> None:
        """Other inputs, and training mode on the smallest of them."""
        known: dict[int, Answer] = {}

        def accepts(given: Input) -> bool:
            try:
                known[id(given)] = self._expected(given)
            except (SecateurError, IndexError):
                return False
            return True

        small: Input | None = None
        for given in inputs_beside(example, self.model, accepts):
            self.hold(given, known[id(given)])
            small = small or given
        if small is None:
            self.found.notes.append("the original takes no other values, sizes or batches of the example's form")
        self._training(small or Input(THE_EXAMPLE, example))

    def _training(self, given: Input) -> None:
        where = Input(f"{given.what}, in training mode", given.example)
        try:
            expected = self._expected(where, "train")
        except (SecateurError, ValueError) as error:
            self.found.notes.append(f"training mode was not tried: the original fails there ({error.args[0]})"[:300])
            return
        self.hold(where, expected, "train")

    def hold(self, given: Input, expected: Answer | None = None, mode: Mode = "eval") -> None:
        """One trial.

        Raises:
            CertificateError: the answers differ, also in double precision.
        """
        expected = expected or self._expected(given, mode)
        found = self._answer_of_cut(self.cut, given, mode, twice=expected.twice)
        if found.twice and not expected.twice:  # what the original leaves behind was there already: a width, say
            expected = self._expected(given, mode, twice=True)
        try:
            self._compare(self.reference, given, expected, found)
        except CertificateError as error:
            if given.what != THE_EXAMPLE and behaviour(self.model, given.example).restless:
                self.found.notes.append(f"on {given.what} the original itself answers differently each time")
                return
            self._in_double(given, mode, error, calls=expected.twice)
        if mode == "eval":
            held = (f"numbers drawn at random were held at fixed values: {name}" for name in sorted(expected.held))
            self.found.notes += [note for note in held if note not in self.found.notes]
        if self.reference.objection():
            what = "The function of what is left would change with the cut."
            raise CertificateError(what, why=self.reference.objection(), hint=CHANGES)
        for tensor in found.tensors:
            self._see(tensor)

    def _expected(self, given: Input, mode: Mode = "eval", *, twice: bool = False) -> Answer:
        draws = self.found.draws or mode == "train"
        return answer(self.reference.model, given.example, mode, self.reference.around, draws=draws, twice=twice)

    def _answer_of_cut(self, cut: nn.Module, given: Input, mode: Mode, *, twice: bool) -> Answer:
        try:
            return answer(cut, given.example, mode, draws=self.found.draws or mode == "train", twice=twice)
        except ForwardError as error:
            raise UnsupportedError(
                f"{type(self.cut).__name__} does not run after this cut on an input that the original takes.",
                why=f"on {given.what}: {error.why}",
                hint="Kept counts that are multiples of 8 often help (round_to: 8); else protect the module named "
                "above. Nothing was changed or saved.",
            ) from error

    def _in_double(self, given: Input, mode: Mode, rounded: CertificateError, *, calls: bool) -> None:
        """An error may be rounding; in double precision a mistake stays as large as it was."""
        reference, cut = self.make(doubled(self.model)), doubled(self.cut)
        twice = Input(given.what, doubled(given.example))
        try:
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
            raise CertificateError(f"What the cut model returns {differs}.", why=_first(expected, found), hint=hint)
        proof = agreement(
            reference.fit(expected.tensors, found.tensors),
            found.tensors,
            self.tolerance,
            method=reference.method,
            differs=differs,
            hint=hint,
            nan="a removed part reaches the output",
        )
        wanted = {name for name in map(reference.renamed, expected.parameters) if name is not None}
        there = {name for name, _ in self.cut.named_parameters()}
        if (wanted & there) != found.parameters:
            other = sorted((wanted & there) ^ found.parameters)
            raise CertificateError(
                f"Other parameters of the cut model take part than of the original (on {given.what}).",
                why=f"for example {other[0]!r}",
                hint=hint,
            )
        self.found.trials.append(Trial(given.what, reference.method, proof.max_abs_error))
        self.found.proof = self.found.proof or proof
        return proof.max_abs_error

    def _see(self, tensor: Tensor) -> None:
        if tensor.numel() and len(self.live) < 2:
            ends = torch.stack(torch.aminmax(_real(tensor))).double().tolist()
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


def _first(expected: Answer, found: Answer) -> str:
    pairs = zip([*expected.words, "nothing"], [*found.words, "nothing"], strict=False)
    a, b = next((a, b) for a, b in pairs if a != b)
    return f"{b} in the place of {a}"


def _real(tensor: Tensor) -> Tensor:
    values = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return values.to(torch.float32) if values.dtype in (torch.bool, torch.float16, torch.bfloat16) else values


def _taking_part(model: nn.Module, tensors: Sequence[Tensor]) -> frozenset[str]:
    """Names of the parameters that a backward pass from the outputs would reach; none is run."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: set[str] = set()
    todo = [t.grad_fn for t in tensors if t.grad_fn is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) in names:
            found.add(names[id(variable)])
        following = [n for n, _ in node.next_functions if n is not None and n not in seen]
        seen.update(following)
        todo += following
    return frozenset(found)


def _parts(value: Any) -> tuple[list[Tensor], list[str]]:
    tensors: list[Tensor] = []
    words: list[str] = []
    for part in _leaves(value, depth=0):
        (words if isinstance(part, str) else tensors).append(part)  # type: ignore[arg-type]
    return tensors, words


def _leaves(value: Any, depth: int) -> Iterator[Tensor | str]:
    """Everything in an output that can be compared; objects of other classes count as their class."""
    if isinstance(value, Tensor):
        yield dense(value)
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        yield torch.as_tensor(np.ascontiguousarray(value))
    elif isinstance(value, (bool, int, float, complex, np.generic)):
        yield torch.as_tensor(value if isinstance(value, (bool, int)) else np.asarray(value).astype(np.float32)[()])
    elif isinstance(value, Mapping) and depth < 20:
        for key, item in value.items():
            yield f"key {key!r}"
            yield from _leaves(item, depth + 1)
    elif isinstance(value, (list, tuple, set, frozenset)) and depth < 20:
        yield f"{len(value)} items"
        for item in value:
            yield from _leaves(item, depth + 1)
    elif is_dataclass(value) and not isinstance(value, type) and depth < 20:
        for name, item in vars(value).items():
            yield f"key {name!r}"
            yield from _leaves(item, depth + 1)
    else:
        yield repr(value) if isinstance(value, (str, bytes)) or value is None else type(value).__name__
