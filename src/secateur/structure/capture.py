"""Capture by execution: run the user's model once and write down what happens to every dimension.

A dispatch mode sees each ATen call (after autograd has decomposed composite ones) and asks the rule of that
operator how its dimensions relate; a function mode above it sees the Python integers before they are parsed. Both leave
the model, its modes, buffers and hooks and the random state as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.errors import ForwardError, SecateurError
from secateur.model.call import call
from secateur.model.guard import guard
from secateur.model.kernels import unfused
from secateur.structure import rules, size_uses
from secateur.structure.provenance import Dim, TrackedInt, tracked_attributes
from secateur.structure.recorder import Recorder
from secateur.structure.trace import Args, Kwargs, Op, Ref, Step, Trace, tensors_of
from secateur.types import Example

COUNTED = ("one_hot", "bincount", "histc")  # results whose size is a number of the code, not of a tensor
# These write their running statistics in training mode, and their signatures do not say so.
UNDECLARED = frozenset(
    getattr(torch.ops.aten, name).default for name in ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm")
)


def capture(model: nn.Module, example: Example) -> Trace:
    """Run `model` once on `example` and return the trace of its dimensions.

    The run is in eval mode without gradients. On meta tensors nothing is computed, which is how models larger
    than memory are planned.

    Args:
        model: any module whose forward runs on the example.
        example: a tensor, a tuple of positional or a mapping of keyword arguments.

    Returns:
        the trace; the model is left as it was.

    Raises:
        ForwardError: the forward fails on the example.

    Cost: one forward pass plus about 0.1 ms per operation; no copy of the weights.
    """
    recorder = Recorder(model)
    recorder.add_inputs(example)
    with ExitStack() as stack:
        stack.enter_context(quiet(model, example, copies=False))  # the recorder keeps what a call is about to change
        stack.enter_context(tracked_attributes(model, recorder.trace.values, recorder.equality))
        stack.enter_context(recorder.here.followed(recorder.modules))
        stack.enter_context(recorder.buffers_kept())
        # The function mode stands on top: a call passes it first, with the integers as the user's code wrote them.
        stack.enter_context(_Dispatch(recorder))
        stack.enter_context(_Functions(recorder))
        result = _forward(model, example)
    recorder.add_outputs(result)
    return recorder.trace


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


class _Dispatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every ATen call."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder

    def __torch_dispatch__(self, func: Op, types: object, args: Args = (), kwargs: Kwargs | None = None) -> object:
        kwargs = kwargs or {}
        # An operator without a rule may be made of operators that have one: its parts come here one by one.
        if not rules.known(func) and func._can_decompose():
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return self._execute(func, args, kwargs)

    def _execute(self, func: Op, args: Args, kwargs: Kwargs) -> object:
        recorder = self.recorder
        recorder.here.op = _name(func)
        tensors_in = tensors_of((args, kwargs))
        # Numbered before the call: a new constant must be known as it was before an in-place operator writes into it.
        numbers = {id(t): recorder.number(t) for t in tensors_in}
        if func in UNDECLARED or _mutates(func):
            for tensor in tensors_in:
                recorder.before_mutation(tensor)
        result = func(*args, **kwargs)
        results = tensors_of(result)
        matched = rules.Call(recorder, func, args, kwargs, results)
        axes = rules.apply(matched)
        produced = []
        for tensor, dims in zip(results, axes, strict=True):
            number = numbers.get(id(tensor))
            if number is None:  # else an in-place call handed back its operand, which keeps its number
                number = recorder.assign(tensor, dims)
            produced.append(number)
        rules.follow_source(matched, produced)
        recorder.trace.steps.append(
            Step(
                func,
                cast(Args, _with_refs(args, numbers)),
                cast(Kwargs, _with_refs(kwargs, numbers)),
                produced,
                matched.contracted,
                matched.restricted,
                matched.cost,
                recorder.here.place(),
            )
        )
        recorder.here.op = ""
        return result


# Asked for at every call, and slow to make: operators are few and live as long as the process.
@cache
def _name(func: Op) -> str:
    return str(func)


@cache
def _mutates(func: Op) -> bool:
    return bool(func._schema.is_mutable)


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
        if func is torch.Tensor.size or getattr(func, "__self__", None) is torch.Tensor.shape:
            return self._sizes(func(*args, **kwargs), args, kwargs)
        outer, recorder.here.function = recorder.here.function, name
        try:
            result = func(*args, **kwargs)
            handler = size_uses.HANDLERS.get(name)
            if handler is not None:
                handler(size_uses.FunctionCall(recorder, name, args, kwargs, result))
            if recorder.made:
                if name not in COUNTED and tensors_of((args, kwargs)):
                    recorder.made.clear()  # sizes that torch itself computed from its arguments follow them
                recorder.settle_made()
        finally:
            recorder.here.function = outer
        return result

    def _sizes(self, plain: object, args: Args, kwargs: Kwargs) -> object:
        axes = self.recorder.axes(cast(Tensor, args[0]))
        if isinstance(plain, int):
            dim = cast(int, args[1] if len(args) > 1 else kwargs["dim"])
            return TrackedInt(plain, Dim(axes[dim]), self.recorder.equality)
        sizes = zip(cast(torch.Size, plain), axes, strict=True)
        return torch.Size([TrackedInt(n, Dim(axis), self.recorder.equality) for n, axis in sizes])


def _with_refs(tree: object, numbers: dict[int, int]) -> object:
    """The arguments with a number in place of every tensor: a trace keeps no activation alive."""
    if isinstance(tree, Tensor):
        return Ref(numbers[id(tree)])
    if isinstance(tree, (list, tuple)):
        items = [_with_refs(item, numbers) for item in tree]
        return items if isinstance(tree, list) else tuple(items)
    if isinstance(tree, dict):
        return {key: _with_refs(item, numbers) for key, item in tree.items()}
    return tree
