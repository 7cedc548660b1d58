"""What a model answers on an input, with its randomness held: tensors, words, and the parameters that took part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, is_dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from secateur.kinds.absorbed import Absorbed
from secateur.kinds.numbers_used import NumbersUsed
from secateur.model.call import call, fresh
from secateur.model.guard import Mode, enter, guard
from secateur.model.held import HeldRandomness
from secateur.model.kernels import unfused
from secateur.model.state import State
from secateur.model.tensors import dense
from secateur.types import Example


@dataclass(frozen=True, eq=False)
class Answer:
    """What a run gave.

    Args:
        tensors: of the output, numbers and arrays among them, in a stable order.
        words: what else stands in the output: keys, texts, the names of its classes.
        parameters: those that took part, in training mode.
        held: random operators that gave fixed numbers, with their lines.
        result: what the forward returned; None where it had to be called twice.
        beside: what stood around the run.
        twice: whether it is the answer of two calls.
        numbers: the plain numbers that the run used, where somebody asked for them.
        lines: what the lines of the run were given and gave, likewise.
    """

    tensors: list[Tensor]
    words: list[str]
    parameters: frozenset[str] = frozenset()
    held: frozenset[str] = frozenset()
    result: object = None
    beside: object = None
    twice: bool = False
    numbers: NumbersUsed | None = None
    lines: Absorbed | None = None


class Lent:
    """Models that many runs share: looked at once, and put back after each run as a guard would.

    To be closed; the models then have the training flags again that they came with.
    """

    def __init__(self) -> None:
        self._states: dict[tuple[int, tuple[str, ...]], tuple[nn.Module, State]] = {}
        self._flags: dict[int, list[tuple[nn.Module, bool]]] = {}

    def state(self, model: nn.Module, passed: tuple[str, ...] = ()) -> State:
        """What the model is in eval mode, which is set; `passed` are names of blocks that are passed by for now."""
        if id(model) not in self._flags:
            self._flags[id(model)] = [(module, module.training) for module in model.modules()]
        for module, _ in self._flags[id(model)]:
            if module.training:
                module.training = False
        key = (id(model), passed)
        if key not in self._states:
            known = self._states.get((id(model), ()))
            if known is None:
                state = State([model], None, copies=True, weights=False)
            else:
                state = known[1].renewed(model.get_submodule(name) for name in passed)
            self._states[key] = (model, state)
        return self._states[key][1]

    def close(self) -> None:
        """Put the training flags back."""
        for module, training in (flag for flags in self._flags.values() for flag in flags):
            if module.training != training:
                module.training = training


def answer(
    model: nn.Module,
    example: Example,
    mode: Mode = "eval",
    around: Callable[[], AbstractContextManager[object]] = nullcontext,
    *,
    draws: bool = True,
    twice: bool = False,
    state: State | None = None,
    numbers: NumbersUsed | None = None,
    lines: Absorbed | None = None,
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
        state: of the model in eval mode, where the caller keeps it, and the random generators, for many runs.
        numbers: is told which plain numbers the run uses.
        lines: is told what the lines of the run are given and give.

    Raises:
        ForwardError: its forward fails.
    """
    train, held = mode == "train", HeldRandomness()
    with (
        _guarded(model, example, mode, state) as before,
        unfused(model),
        held if draws else nullcontext(),
        around() as beside,
    ):
        if not (train or around is nullcontext or isinstance(beside, TorchDispatchMode)) and _moved(before):
            # By what stands around the run; a mode changes nothing in a model.
            before = State([model], example, copies=True, weights=False)
        following = None if train else fresh(example)
        with (
            nullcontext() if numbers is None else numbers.watching(model),
            nullcontext() if lines is None else lines.watching(),
        ):
            once = call(model, example)
        result = once
        twice = not train and (twice or _moved(before))
        if twice:
            result, once = (once, call(model, following)), None
        with _disable_current_modes():  # a number that comes out becomes a tensor here: no call of the model's
            tensors, words = _parts(result)
        taking_part = _taking_part(model, tensors) if train else frozenset()
    held_lines = frozenset(held.seen)
    return Answer([t.detach() for t in tensors], words, taking_part, held_lines, once, beside, twice, numbers, lines)


@contextmanager
def _guarded(model: nn.Module, example: Example, mode: Mode, state: State | None) -> Iterator[State]:
    train = mode == "train"
    if state is None:
        with guard(model, mode=mode, gradients=train, example=example, seed=0) as found:
            yield found
        return
    with guard(gradients=train, example=example, seed=0, chance=False):
        try:
            state.put_aside()
            if mode == "train":
                enter([model], mode)
            yield state
        finally:
            state.put_back(everything=True)


def _moved(state: State) -> bool:
    with _disable_current_modes():  # looking is no part of the run
        return state.moved()


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


def _parts(value: object) -> tuple[list[Tensor], list[str]]:
    tensors: list[Tensor] = []
    words: list[str] = []
    for part in _leaves(value, depth=0):
        (words if isinstance(part, str) else tensors).append(part)  # type: ignore[arg-type]
    return tensors, words


def _leaves(value: object, depth: int) -> Iterator[Tensor | str]:
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


def first_difference(expected: Answer, found: Answer) -> str:
    """Of two answers of different forms, the first part that is another, in words."""
    pairs = zip([*expected.words, "nothing"], [*found.words, "nothing"], strict=False)
    a, b = next((a, b) for a, b in pairs if a != b)
    return f"{b} in the place of {a}"


def real_values(tensor: Tensor) -> Tensor:
    """The numbers of a tensor as real ones that can be ordered: both parts of complex ones, at least float32."""
    values = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return values.to(torch.float32) if values.dtype in (torch.bool, torch.float16, torch.bfloat16) else values
