"""Capture by execution: run the user's model once and write down what happens to every dimension.

A dispatch mode sees each ATen call (after autograd has decomposed composite ones) and asks the rule of that
operator how its dimensions relate; a function mode above it sees the Python integers before they are parsed. Both leave
the model, its modes, buffers and hooks and the random state as they were.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from secateur.errors import ForwardError
from secateur.model.call import call, outputs
from secateur.structure import rules, size_uses
from secateur.structure.axes import Axis, Conflict, lock
from secateur.structure.provenance import Dim, Expr, TrackedInt, is_literal, tracked_attributes
from secateur.structure.trace import Axes, Place, Ref, Restrict, SizeUse, Step, Trace
from secateur.types import Example, Lock

COUNTED = ("one_hot", "bincount", "histc")  # results whose size is a number of the code, not of a tensor
TORCH = str(Path(torch.__file__).parent)
HERE = str(Path(__file__).parent.parent)


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
        stack.enter_context(quiet(model))
        stack.enter_context(tracked_attributes(model, recorder.trace.values, recorder.equality))
        stack.enter_context(recorder.modules_named(model))
        stack.enter_context(recorder.buffers_kept())
        stack.enter_context(torch.no_grad())
        stack.enter_context(_Dispatch(recorder))
        stack.enter_context(_Functions(recorder))
        result = _forward(model, example)
    recorder.add_outputs(result)
    return recorder.trace


def _forward(model: nn.Module, example: Example) -> Any:
    try:
        return call(model, example)
    except ForwardError:
        raise
    except Exception as error:
        raise ForwardError(
            f"The forward of {type(model).__name__} fails on the example.",
            why=f"{type(error).__name__}: {error}",
            hint="Check that model(example) runs on its own: shapes, dtypes, devices, argument names.",
        ) from error


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode, slow path of attention, no oneDNN fusion of recurrent layers; all restored."""
    training = [module for module in model.modules() if module.training]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    onednn = torch._C._get_mkldnn_enabled()  # the public switch warns about TF32 on some machines
    try:
        for module in training:
            module.training = False
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.random.fork_rng(devices=[]):
            if recurrent:
                torch._C._set_mkldnn_enabled(False)
            yield
    finally:
        torch._C._set_mkldnn_enabled(onednn)
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module in training:
            module.training = True


class Recorder:
    """Holds the trace while the run goes on; rules talk to it."""

    def __init__(self, model: nn.Module) -> None:
        self.trace = Trace()
        self.modules = dict(model.named_modules())
        self.space = self.trace.space
        self.numbers: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.live: dict[int, Axes] = self.trace.axes
        self.sources: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.positions: dict[int, list[Axis]] = {}
        self.named: dict[int, str] = {}
        self.stored: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
        self.originals: dict[str, Tensor] = {}
        self.by_name: dict[str, int] = {}
        self.changed: dict[int, tuple[Tensor, Tensor]] = {}
        self.module_stack: list[str] = []
        self.function = ""
        self.op = ""
        self.made: list[Axes] = []
        self.count = 0
        named = [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
        for name, tensor in named:
            if id(tensor) in self.named:
                self.trace.aliases[name] = self.named[id(tensor)]
                continue
            self.named[id(tensor)] = name
            self.originals[name] = tensor
            if not tensor.is_meta:
                self.stored.setdefault(_storage_key(tensor), name)

    # -- tensors and their axes -------------------------------------------------------------------------

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor; one that was never seen is a parameter, a buffer or a constant."""
        found = self.numbers.get(tensor)  # type: ignore[no-untyped-call]
        if found is not None:
            return cast(int, found)
        name = self.named.get(id(tensor))
        if name is None and not tensor.is_meta and tensor.numel() > 0:
            name = self.stored.get(_storage_key(tensor))
        if name is None:
            return self._add_constant(tensor)
        return self._add_named(tensor, name)

    def _add_named(self, tensor: Tensor, name: str) -> int:
        known = self.by_name.get(name)
        if known is not None:
            self.numbers[tensor] = known
            return known
        number = self.by_name[name] = self.assign(tensor, tuple(self.space.fresh(n) for n in tensor.shape))
        self.trace.names[number] = name
        self.sources[number] = (name, tuple(range(tensor.dim())))
        return number

    def _add_constant(self, tensor: Tensor) -> int:
        reason = Lock("a tensor that is neither parameter nor buffer has this size", module=self.module)
        number = self.assign(tensor, tuple(self.space.fresh(n, reason) for n in tensor.shape))
        self.trace.constants[number] = tensor
        return number

    def assign(self, tensor: Tensor, axes: Axes) -> int:
        """Give a new tensor its number and axes."""
        number, self.count = self.count, self.count + 1
        self.numbers[tensor] = number
        self.live[number] = axes
        return number

    def axes(self, tensor: Tensor) -> Axes:
        """Dimensions of a tensor."""
        return self.live[self.number(tensor)]

    def add_inputs(self, example: Example) -> None:
        """Inputs are data: their dimensions are never cut."""
        for tensor in outputs(example):
            if id(tensor) in self.named or tensor in self.numbers:
                continue
            reason = Lock("a dimension of the model's input")
            number = self.assign(tensor, tuple(self.space.fresh(n, reason) for n in tensor.shape))
            self.trace.constants[number] = tensor
            self.trace.inputs.append(number)

    def add_outputs(self, result: Any) -> None:
        """Outputs are what the user relies on: protected."""
        for tensor in outputs(result):
            number = self.number(tensor)
            self.trace.outputs.append(number)
            for axis in (*self.live[number], *self.positions.get(number, ())):
                lock(axis, Lock("a dimension of the model's output", hint="outputs are protected by default"))

    # -- where we are ------------------------------------------------------------------------------------

    @property
    def module(self) -> str:
        """Qualified name of the module that runs now."""
        return self.module_stack[-1] if self.module_stack else ""

    def place(self) -> Place:
        """The operation, the module and the user's source line."""
        return Place(self.op or self.function, self.module, user_line())

    def reason(self, text: str, hint: str = "") -> Lock:
        """A lock that points to the present place."""
        here = self.place()
        return Lock(text, here.op, here.module, here.where, hint)

    @contextmanager
    def modules_named(self, model: nn.Module) -> Iterator[None]:
        """Keep track of which module runs."""
        paths = {id(module): name for name, module in model.named_modules()}

        def enter(module: nn.Module, _: Any) -> None:
            self.module_stack.append(paths.get(id(module), self.module))

        def leave(*_: Any) -> None:
            if self.module_stack:
                self.module_stack.pop()

        handles = [
            nn.modules.module.register_module_forward_pre_hook(enter),
            nn.modules.module.register_module_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def buffers_kept(self) -> Iterator[None]:
        """Undo in-place changes of parameters, buffers and inputs."""
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, before in self.changed.values():
                    tensor.copy_(before)

    def before_mutation(self, tensor: Tensor) -> None:
        """Keep a copy of an external tensor that an in-place call is about to change."""
        number = self.number(tensor)
        external = number in self.trace.names or number in self.trace.constants
        if external and number not in self.changed and not tensor.is_meta:
            self.changed[number] = (tensor, tensor.clone())

    def equality(self, expr: Expr) -> None:
        """The code compared two sizes, found them equal and went on accordingly."""
        if self.function:  # inside torch, where sizes are plain numbers; the function's handler knows better
            return
        here = self.place()
        if not is_literal(expr):
            self.trace.size_uses.append(SizeUse(expr, 1, Place("==", here.module, here.where)))

    def settle_made(self) -> None:
        """Lock the dimensions of tensors made in this call whose sizes no handler could account for."""
        for axes in self.made:
            for axis in axes:
                lock(axis, self.reason("a tensor is made here with a size from the code"))
        self.made.clear()

    # -- what rules use ----------------------------------------------------------------------------------

    def unify(self, a: Axis, b: Axis) -> None:
        """Two dimensions are indexed alike; where that has no common structure, both are locked."""
        try:
            self.space.unify(a, b)
        except Conflict:
            reason = self.reason("two dimensions meet here whose structures do not line up")
            lock(a, reason)
            lock(b, reason)


class _Dispatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every ATen call."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not rules.known(func) and func._can_decompose():
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return self._execute(func, args, kwargs)

    def _execute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        recorder = self.recorder
        recorder.op = str(func)
        tensors_in = tensors_of((args, kwargs))
        numbers = {id(t): recorder.number(t) for t in tensors_in}
        if func._schema.is_mutable:
            for tensor in tensors_in:
                recorder.before_mutation(tensor)
        result = func(*args, **kwargs)
        results = tensors_of(result)
        matched = rules.Call(recorder, func, args, kwargs, results)
        axes = rules.apply(matched)
        produced = []
        for tensor, dims in zip(results, axes, strict=True):
            number = numbers.get(id(tensor))
            if number is None:
                number = recorder.assign(tensor, dims)
            produced.append(number)
        rules.follow_source(matched, produced)
        recorder.trace.steps.append(
            Step(
                func,
                cast(tuple[Any, ...], _with_refs(args, numbers)),
                cast(dict[str, Any], _with_refs(kwargs, numbers)),
                produced,
                matched.contracted,
                matched.restricted,
                matched.cost,
                recorder.place(),
            )
        )
        recorder.op = ""
        return result


class _Functions(TorchFunctionMode):
    """Sees Python-level calls: gives sizes a provenance and reports integers that fix a dimension."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        recorder = self.recorder
        name = getattr(func, "__name__", "")
        if func is torch.Tensor.size or getattr(func, "__self__", None) is torch.Tensor.shape:
            return self._sizes(func(*args, **kwargs), args, kwargs)
        outer, recorder.function = recorder.function, name
        try:
            result = func(*args, **kwargs)
            handler = size_uses.HANDLERS.get(name)
            if handler is not None:
                handler(recorder, args, kwargs, result)
            if name not in COUNTED and tensors_of((args, kwargs)):
                recorder.made.clear()  # sizes that torch itself computed from its arguments follow them
            recorder.settle_made()
        finally:
            recorder.function = outer
        return result

    def _sizes(self, plain: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        axes = self.recorder.axes(args[0])
        if isinstance(plain, int):
            dim = args[1] if len(args) > 1 else kwargs["dim"]
            return TrackedInt(plain, Dim(axes[dim]), self.recorder.equality)
        return torch.Size(
            [TrackedInt(n, Dim(axis), self.recorder.equality) for n, axis in zip(plain, axes, strict=True)]
        )


def tensors_of(tree: Any) -> list[Tensor]:
    """Tensors in nested lists, tuples and dicts, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, (list, tuple)):
        return [tensor for item in tree for tensor in tensors_of(item)]
    if isinstance(tree, dict):
        return [tensor for item in tree.values() for tensor in tensors_of(item)]
    return []


def _with_refs(tree: Any, numbers: dict[int, int]) -> Any:
    if isinstance(tree, Tensor):
        return Ref(numbers[id(tree)])
    if isinstance(tree, (list, tuple)):
        items = [_with_refs(item, numbers) for item in tree]
        return items if isinstance(tree, list) else tuple(items)
    if isinstance(tree, dict):
        return {key: _with_refs(item, numbers) for key, item in tree.items()}
    return tree


def _storage_key(tensor: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    return tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride())


_INTERNAL: dict[CodeType, bool] = {}


@cache
def _short(filename: str) -> str:
    path = Path(filename)
    return f"{path.parent.name}/{path.name}"


def user_line() -> str:
    """`file:line` of the innermost frame outside torch and secateur's engine."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        internal = _INTERNAL.get(code)
        if internal is None:
            internal = code.co_filename.startswith((TORCH, HERE)) or code.co_filename.startswith("<")
            _INTERNAL[code] = internal
        if not internal:
            return f"{_short(code.co_filename)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


__all__ = ["Callable", "Recorder", "Restrict", "capture", "tensors_of", "user_line"]
