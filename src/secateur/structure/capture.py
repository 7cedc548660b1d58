"""Capture by execution: run the user's model once and write down what happens to every dimension.

A dispatch mode sees each ATen call (after autograd has decomposed composite ones) and asks the rule of that
operator how its dimensions relate; a function mode above it sees the Python integers before they are parsed. Both leave
the model, its modes, buffers and hooks and the random state as they were.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import cache
from io import StringIO
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.errors import ForwardError, SecateurError
from secateur.model.call import call, inputs
from secateur.model.failure import nested
from secateur.model.guard import Mode, guard
from secateur.model.kernels import unfused
from secateur.model.memory import OPENINGS, written
from secateur.model.state import State
from secateur.structure import doors, rules, size_uses
from secateur.structure.around import surroundings
from secateur.structure.chosen import watch_choices
from secateur.structure.conditions import SEEN, Branch, unreached
from secateur.structure.fronts import watch_fronts
from secateur.structure.function_call import FunctionCall
from secateur.structure.given import arguments, followed
from secateur.structure.memos import memos
from secateur.structure.provenance import Dim, TrackedFlag, TrackedInt, tracked_attributes
from secateur.structure.read import renew
from secateur.structure.recorder import Recorder, Rejoined
from secateur.structure.rounded import rounded
from secateur.structure.switches import forwards, switches
from secateur.structure.trace import Args, Kwargs, Op, Step, Trace, tensors_of, with_refs
from secateur.structure.untaken import untaken
from secateur.structure.value_uses import watch_values
from secateur.structure.watched import watched
from secateur.types import Example

MAX_BRANCHES = 4  # other branches that are looked at, beside train mode
RANDOM = frozenset(["aten.rand.default", "aten.randn.default", "aten.randint.default", "aten.randint.low"])
SCALAR = "aten._local_scalar_dense.default"  # how torch takes the value of a tensor, in item() and for itself
BRANCHES = ("size", "value", "mode", "argument")  # conditions whose other side can be taken
COUNTED = ("one_hot", "bincount", "histc")  # results whose size is a number of the code, not of a tensor
PICKLING = torch.Tensor._reduce_ex_internal.__code__  # torch's own; the storage that it asks for is a door


def capture(model: nn.Module, example: Example, *, examples: Sequence[Example] = ()) -> Trace:
    """Run `model` on `example` and return the trace of its dimensions.

    The run is in eval mode without gradients. On meta tensors nothing is computed, which is how models larger
    than memory are planned. Where the code asks for train mode, compares a size of the data or reads a value of it, or
    has a switch among its arguments, the model runs once more along the other branch (`MAX_BRANCHES` times at most):
    what that branch does to a dimension constrains the plan as well, and the trace says where it was not seen.

    Args:
        model: any module whose forward runs on the example.
        example: a tensor, a tuple of positional or a mapping of keyword arguments.
        examples: further ones, which the plan has to hold for as well.

    Returns:
        the trace, with one trace per further example in it; the model is left as it was.

    Raises:
        ForwardError: the forward fails on an example.
        UnsupportedError: an example holds nested tensors, or the forward makes some and computes with them.

    Cost: per example one forward pass plus about 0.1 ms per operation; no copy of the weights.
    """
    renew()
    for each in (example, *examples):
        if any(tensor.is_nested for tensor in inputs(each)):
            raise nested(f"the example of {type(model).__name__} holds a nested tensor")
    first = _first(model, example)
    trace, runs = first.trace, [(example, first)]
    for other in examples:
        runs.append((other, _run(model, other, first)))
        trace.further.append(runs[-1][1].trace)
    _look_beside(model, runs)
    return trace


def _first(model: nn.Module, example: Example) -> Recorder:
    """The run that all others share their atoms with."""
    try:
        return _run(model, example)
    except ForwardError as error:
        # Functions that torch does not let anybody watch take a plain bool for `training`, and nothing else.
        if TrackedFlag.__name__ not in error.why:
            raise
    recorder = _run(model, example, flags=False)
    recorder.watch.given_mode()
    return recorder


def _run(
    model: nn.Module,
    example: Example,
    after: Recorder | None = None,
    *,
    mode: Mode = "eval",
    turned: str = "",
    switched: str = "",
    flags: bool = True,
) -> Recorder:
    """One run, of which atoms and uses of sizes are those of an earlier one.

    Args:
        model: what runs.
        example: what it runs on.
        after: the first run.
        mode: "train" takes the branches of training.
        turned: line at which the other branch is taken.
        switched: argument that is given the opposite of its default.
        flags: whether branches on `training` are watched.
    """
    recorder = Recorder(model, after, turned)
    recorder.add_inputs(example)
    beside = mode == "train" or bool(turned or switched)
    flags = flags and not beside
    with ExitStack() as stack:
        # The recorder keeps what a call is about to change, so no copies are needed.
        again = after.lent if after is not None and after.example is example else None
        recorder.example, recorder.lent = example, stack.enter_context(_calm(model, example, mode, again))
        found = recorder.integers
        stack.enter_context(tracked_attributes(model, recorder.trace.values, recorder.watch, found, flags=flags))
        stack.enter_context(recorder.here.followed(recorder.modules, recorder.leave))
        stack.enter_context(recorder.buffers_kept())
        stack.enter_context(watched(lambda tensor: doors.exported(recorder, tensor)))
        if beside:  # what it prints or warns of is none of the user's business
            stack.enter_context(redirect_stdout(StringIO()))
            stack.enter_context(warnings.catch_warnings(action="ignore"))
        # The function mode stands on top: a call passes it first, with the integers as the user's code wrote them.
        stack.enter_context(_Dispatch(recorder))
        stack.enter_context(_Functions(recorder))
        stack.enter_context(recorder.ways.watching(lambda: recorder.here.module))
        try:
            result = _forward(model, followed(recorder, model, _switched(model, example, switched)))
            doors.given_out(recorder, result)
            recorder.add_outputs(result)
            recorder.add_left()
        except Rejoined:
            pass
        except (Exception, SystemExit) as error:
            if not beside:
                raise
            recorder.failed = f"{type(error.__cause__ or error).__name__}"
    recorder.watch.settle()
    return recorder


def _switched(model: nn.Module, example: Example, name: str) -> Example:
    """The example as keyword arguments, with one switch turned."""
    if not name:
        return example
    parameters = inspect.signature(model.forward).parameters
    positional = example if isinstance(example, tuple) else (example,)
    named = example if isinstance(example, Mapping) else dict(zip(parameters, positional, strict=False))
    return {**named, name: not parameters[name].default}


def _look_beside(model: nn.Module, runs: Sequence[tuple[Example, Recorder]]) -> None:
    """Take the other branches, and note what the runs depended on."""
    first = runs[0][1]
    trace = first.trace
    found: dict[tuple[str, str, str], tuple[Example, Recorder, Branch]] = {}
    for example, recorder in runs:
        for branch in (*recorder.watch.branches(recorder.input_names), *arguments(model, example)):
            found.setdefault((branch.kind, branch.condition.where, branch.argument), (example, recorder, branch))
    tried: dict[str, str] = {}
    for example, recorder, branch in found.values():
        if branch.kind not in BRANCHES:
            trace.conditions.append(branch.condition)
            continue
        # One run in train mode takes all the branches of it.
        name = "mode" if branch.kind == "mode" else f"{branch.condition.where} {branch.argument}"
        if name not in tried and (branch.kind == "mode" or len(tried.keys() - {"mode"}) < MAX_BRANCHES):
            other = _taken(model, example, recorder, branch)
            trace.beside.append(other.trace)
            tried[name] = f"the other branch was seen up to its {other.failed}" if other.failed else SEEN
        trace.conditions.append(branch.told(tried.get(name, "the other branch was not seen")))
    own = forwards(model)
    trace.conditions.extend(branch.condition for branch in (*switches(own), *surroundings(own)))
    trace.conditions.extend(memos(own))
    trace.conditions.extend(untaken(model, first.ways, trace.conditions))
    trace.rounded.extend(rounded(first.ways.pieces))
    trace.conditions.extend(unreached(model, trace.tensors(), trace.aliases))


def _taken(model: nn.Module, example: Example, recorder: Recorder, branch: Branch) -> Recorder:
    """A run along the other side of a branch."""
    if branch.kind == "mode":
        return _run(model, example, recorder, mode="train")
    if branch.kind == "argument":
        return _run(model, example, recorder, switched=branch.argument)
    return _run(model, example, recorder, turned=branch.condition.where)


def _forward(model: nn.Module, example: Example) -> object:
    try:
        return call(model, example)
    except SecateurError:
        raise
    except Exception as error:
        raise ForwardError(
            f"The forward of {type(model).__name__} fails on the example.",
            why=f"{type(error).__name__}: {error}",
            hint="Check that model(example) runs on its own: shapes, dtypes, devices, argument names.",
        ) from error


@contextmanager
def quiet(model: nn.Module, example: Example = None, *, copies: bool = True) -> Iterator[None]:
    """A `guard` in eval mode without gradients, where no kernel hides the calls that it stands for.

    Args:
        model: what is run.
        example: what it is run on.
        copies: as for `guard`.
    """
    with guard(model, mode="eval", gradients=False, example=example, copies=copies), unfused(model):
        yield


@contextmanager
def _calm(model: nn.Module, example: Example, mode: Mode, lent: State | None) -> Iterator[State]:
    with (
        guard(model, mode=mode, gradients=False, example=example, copies=False, state=lent) as state,
        unfused(model),
    ):
        yield state


class _Dispatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every ATen call."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder

    def __torch_dispatch__(self, func: Op, types: object, args: Args = (), kwargs: Kwargs | None = None) -> object:
        kwargs = kwargs or {}
        # An operator without a rule may be made of operators that have one: its parts come here one by one.
        result = rules.by_parts(self, func, args, kwargs)
        if result is not NotImplemented:
            return result
        # Scripted code comes here past the function mode, which would take the engine's own questions for the user's.
        with torch._C.DisableTorchFunction():
            return self._execute(func, args, kwargs)

    def _execute(self, func: Op, args: Args, kwargs: Kwargs) -> object:
        recorder = self.recorder
        recorder.here.op = name = _name(func)
        tensors_in = tensors_of((args, kwargs))
        # Numbered before the call: a new constant must be known as it was before an in-place operator writes into it.
        numbers = {id(t): recorder.number(t) for t in tensors_in}
        for tensor in written(func, args, kwargs):
            recorder.kept.before(tensor)
        if name == SCALAR:
            doors.scalar(recorder, tensors_in[0])
        result = func(*args, **kwargs)
        results = tensors_of(result)
        matched = rules.Call(recorder, func, args, kwargs, results)
        axes = rules.apply(matched)
        produced = []
        for tensor, dims in zip(results, axes, strict=True):
            number = numbers.get(id(tensor))
            # An in-place call hands back its operand, which keeps its number, unless its dimensions changed places.
            if number is None or torch.Tag.inplace_view in func.tags:
                number = recorder.assign(tensor, dims)
            produced.append(number)
        rules.follow_source(matched, produced)
        if name in RANDOM or not recorder.data.isdisjoint(numbers.values()):
            recorder.data.update(produced)
            recorder.follow_thin(tensors_in, produced)
        else:
            rules.follow_weights(matched, numbers.values(), produced)
        recorder.trace.steps.append(
            Step(
                func,
                cast(Args, with_refs(args, numbers)),
                cast(Kwargs, with_refs(kwargs, numbers)),
                produced,
                matched.contracted,
                matched.restricted,
                matched.cost,
                recorder.here.place(),
            )
        )
        if not recorder.here.function:  # `torch.Tensor(2, 3)` is no function, and its sizes come without provenance
            recorder.settle_made()
        recorder.here.op = ""
        return result


# Asked for at every call, and slow to make: operators are few and live as long as the process.
@cache
def _name(func: Op) -> str:
    return str(func)


class _Functions(TorchFunctionMode):
    """Sees Python-level calls: gives sizes a provenance and reports integers that fix a dimension."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        kwargs = kwargs or {}
        recorder = self.recorder
        name = getattr(func, "__name__", "")
        # `x.shape` arrives as the getter of the property, whose owner is the descriptor itself.
        if (
            sys._getframe(1).f_code is PICKLING and name not in doors.READS
        ):  # a file that is written while the run goes on holds plain numbers
            return func(*args, **kwargs)
        if func is torch.Tensor.size or getattr(func, "__self__", None) is torch.Tensor.shape:
            return self._sizes(func(*args, **kwargs), args, kwargs)
        if getattr(func, "__self__", None) is torch.Tensor.nbytes:
            return doors.counted(recorder, "nbytes", args, func(*args))
        if name == "__get__" and getattr(func, "__self__", None) in doors.FACTS:
            result = func(*args, **kwargs)
            doors.told(recorder, doors.FACTS[func.__self__], args, result)  # type: ignore[attr-defined]
            return result
        if name in doors.RANKS or getattr(func, "__self__", None) is torch.Tensor.ndim:
            return doors.ranked(recorder, name, args, func(*args, **kwargs))
        outer, recorder.here.function = recorder.here.function, name
        recorder.ways.called.add(name.strip("_"))
        recorder.ways.pause()
        try:
            result = func(*_without_flags(args), **_without_flags(kwargs))
            if name in doors.READS:
                if name in OPENINGS:  # what is written from there on no mode sees
                    recorder.kept.before(cast(Tensor, args[0]))
                return doors.read(recorder, name, args, result)
            if name in doors.FACT_METHODS:
                doors.told(recorder, name, args, result)
            if name == "stride":
                return doors.strides(recorder, args, result)
            if name in doors.COUNTS:
                return doors.counted(recorder, name, args, result)
            if name in doors.MAKERS:
                doors.watched_numbers(recorder, args[:1])
            if not outer:  # what torch's own functions reckon with is what they were given
                watch_values(recorder, name, args, kwargs)
                watch_choices(recorder, func, args, kwargs)
                watch_fronts(recorder, name, args, kwargs, result)
            handler = size_uses.HANDLERS.get(name)
            if handler is not None:
                handler(FunctionCall(recorder, name, args, kwargs, result))
            recorder.opened.clear()
            if recorder.made:
                if name not in COUNTED and tensors_of((args, kwargs)):
                    recorder.made.clear()  # sizes that torch itself computed from its arguments follow them
                recorder.settle_made()
        finally:
            recorder.here.function = outer
            if not outer:
                recorder.ways.go_on()
        return result

    def _sizes(self, plain: object, args: Args, kwargs: Kwargs) -> object:
        axes = self.recorder.axes(cast(Tensor, args[0]))
        if isinstance(plain, int):
            dim = cast(int, args[1] if len(args) > 1 else kwargs["dim"])
            return TrackedInt(plain, Dim(axes[dim]), self.recorder.watch)
        if self.recorder.number(cast(Tensor, args[0])) in self.recorder.data:
            self.recorder.watch.length(len(axes), "dimensions")
        sizes = zip(cast(torch.Size, plain), axes, strict=True)
        return torch.Size([TrackedInt(n, Dim(axis), self.recorder.watch) for n, axis in sizes])


def _without_flags(given: Any) -> Any:
    """Arguments with plain bools: torch takes nothing else for a flag."""
    values = given.values() if isinstance(given, dict) else given
    if not any(type(value) is TrackedFlag for value in values):
        return given
    if isinstance(given, dict):
        return {key: int(value) == 1 if type(value) is TrackedFlag else value for key, value in given.items()}
    return tuple(int(value) == 1 if type(value) is TrackedFlag else value for value in given)
