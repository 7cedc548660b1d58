"""What the blocks of a stack are called with, found by running the model up to them once per batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import UnsupportedError
from secateur.model.bypass import first_tensor, replaced
from secateur.model.call import call
from secateur.types import Example


@dataclass(frozen=True, eq=False)
class BlockCall:
    """How one block is called for one batch, but for the hidden state.

    Args:
        args, kwargs: as captured.
        place: where the hidden state stands among them: a number in args or a name in kwargs.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    place: int | str

    def run(self, block: Callable[..., object], hidden: Tensor) -> Tensor:
        """The hidden state that the block hands on."""
        args, kwargs = list(self.args), dict(self.kwargs)
        if isinstance(self.place, int):
            args[self.place] = hidden
        else:
            kwargs[self.place] = hidden
        found = first_tensor(block(*args, **kwargs))
        assert found is not None
        return found


@dataclass(eq=False)
class CapturedEntry:
    """One batch at the entrance of a stack.

    Args:
        hidden: the hidden state that goes into the first block.
        calls: block name -> how it is called.
    """

    hidden: Tensor | None = None
    calls: dict[str, BlockCall] = field(default_factory=dict)


class _ReachedError(Exception):
    """The last block was reached; nothing behind it is of interest."""


def returns_tensors(model: nn.Module, example: Example, names: Sequence[str]) -> frozenset[str]:
    """The modules that return a tensor and nothing beside it, told by one run."""
    found: set[str] = set()
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: found.add(name) if isinstance(output, Tensor) else None
        )
        for name in names
    ]
    try:
        with torch.no_grad():
            call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return frozenset(found)


class _SeenError(BaseException):
    """The block has run; nothing behind it is of interest. No handler of a model's code catches it."""


def handed_on(model: nn.Module, name: str, example: Example) -> Tensor:
    """The hidden state that a block hands on; what stands behind the block is not computed.

    Raises:
        UnsupportedError: the block does not run, or hands on no tensor.
    """
    found = list[Tensor]()

    def see(_: nn.Module, __: object, output: object) -> None:
        hidden = first_tensor(output)
        if hidden is not None:
            found.append(hidden.detach().clone())
            raise _SeenError

    handle = model.get_submodule(name).register_forward_hook(see)
    try:
        with torch.no_grad():
            call(model, example)
    except _SeenError:
        pass
    finally:
        handle.remove()
    if not found:
        raise UnsupportedError(f"the block {name!r} hands on no tensor on every batch", hint="use finetune")
    return found[0]


def enter_stack(
    model: nn.Module, example: Example, names: Sequence[str], plain: Collection[str] = frozenset()
) -> CapturedEntry:
    """Run a model to the end of a stack, with its blocks as identities, and keep what they are called with.

    Args:
        model: left as it is.
        example: one batch.
        names: the blocks, in the order in which they run.
        plain: those that return a tensor and nothing beside it: they need not be computed.

    Returns:
        the hidden state in front of the first block, and the other arguments of every block.

    Raises:
        UnsupportedError: a block without a tensor among its arguments, or that does not run.

    Cost:
        the parts of the model in front of the stack. Blocks that are not plain are computed too.
    """
    entry = CapturedEntry()
    with torch.no_grad(), ExitStack() as stack:
        for name in names:
            stack.enter_context(
                _listening(model.get_submodule(name), name, entry, last=name == names[-1], plain=name in plain)
            )
        try:
            call(model, example)
        except _ReachedError:
            pass
        except Exception as error:
            # The door of the forward wraps what it does not know.
            if not _caused_by(error, _ReachedError):
                raise
    missing = [name for name in names if name not in entry.calls]
    if missing:
        raise UnsupportedError(f"the block {missing[0]!r} does not run", hint="protect it, or give other data")
    return entry


def _caused_by(error: BaseException | None, kind: type[BaseException]) -> bool:
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def _listening(block: nn.Module, name: str, entry: CapturedEntry, *, last: bool, plain: bool) -> Iterator[None]:
    original, own = block.forward, vars(block).get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        place, hidden = _hidden(args, kwargs, name)
        if entry.hidden is None:
            entry.hidden = hidden.clone()
        entry.calls[name] = BlockCall(_without(args, place), _without_name(kwargs, place), place)
        if last:
            raise _ReachedError
        if plain:
            return hidden
        # What stands beside the hidden state, a bias of positions for example, is computed as ever.
        before = hidden.clone()
        return replaced(original(*args, **kwargs), before)

    block.forward = forward
    try:
        yield
    finally:
        del block.forward
        if own is not None:
            block.forward = own


def _hidden(args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> tuple[int | str, Tensor]:
    places: list[tuple[int | str, object]] = [*enumerate(args), *kwargs.items()]
    for place, value in places:
        if isinstance(value, Tensor) and value.is_floating_point():
            return place, value
    raise UnsupportedError(f"the block {name!r} is given no tensor", hint="protect it")


def _without(args: tuple[Any, ...], place: int | str) -> tuple[Any, ...]:
    # The hidden state of the identity run is of no use later, and would be kept alive.
    return tuple(None if i == place else value for i, value in enumerate(args))


def _without_name(kwargs: Mapping[str, Any], place: int | str) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key != place}
