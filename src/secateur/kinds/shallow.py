"""Some of many alike blocks: what a deep model does on further inputs, at a part of the time.

A stack of a dozen blocks of one class, each cut in the same dimensions, is one piece of code with a dozen weights. On
the example all of them run. On further inputs, which look for other branches of that code, one of each kind will do,
and the last, where the others hand on what they are given: in the original and in the cut model alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from secateur.model.bypass import first_tensor, hidden_of

STACK = 4  # blocks that a container has at least
EACH = 1  # blocks of a kind that run, beside the last of the stack


def repeated(model: nn.Module, cuts: Mapping[str, Mapping[int, object]]) -> tuple[str, ...]:
    """Names of blocks of which another of the same kind stands before them in the same container.

    Of a kind are blocks of the same classes, with the same sizes, the same numbers and words in their attributes but
    for the block's place, and cuts in the same dimensions of the same tensors. The last block of a container always
    runs.

    Args:
        model: the original.
        cuts: tensor name -> dimension -> whatever.
    """
    found: list[str] = []
    for path, container in model.named_modules():
        inside = any(path == name or path.startswith(f"{name}.") for name in found)
        if inside or not isinstance(container, (nn.ModuleList, nn.Sequential)) or len(container) < STACK:
            continue
        known: dict[object, int] = {}
        children = list(container.named_children())
        places = _places([block for _, block in children])
        for name, block in children[:-1]:
            full = f"{path}.{name}" if path else name
            kind = _kind(block, places, {n[len(full) + 1 :]: d for n, d in cuts.items() if n.startswith(f"{full}.")})
            known[kind] = known.get(kind, 0) + 1
            if known[kind] > EACH:
                found.append(full)
    return tuple(found)


def _places(blocks: Sequence[nn.Module]) -> frozenset[tuple[str, str]]:
    """Attributes that hold the place of their block, in all of them: (name of the module in the block, attribute)."""
    held = (
        {
            (name, k)
            for name, module in block.named_modules()
            for k, v in vars(module).items()
            if type(v) is int and v == i
        }
        for i, block in enumerate(blocks)
    )
    return frozenset(set.intersection(*held))


def _kind(block: nn.Module, places: frozenset[tuple[str, str]], cuts: Mapping[str, Mapping[int, object]]) -> object:
    def plain(path: str, module: nn.Module) -> list[tuple[str, object]]:
        held = sorted((k, v) for k, v in vars(module).items() if type(v) in (int, bool, float, str))
        return [(k, v) for k, v in held if (path, k) not in places]

    classes = tuple((name, type(module), repr(plain(name, module))) for name, module in block.named_modules())
    tensors = tuple((name, tuple(p.shape)) for name, p in (*block.named_parameters(), *block.named_buffers()))
    return classes, tensors, tuple(sorted((name, tuple(sorted(dims))) for name, dims in cuts.items()))


class PassedBlocks:
    """Repeated blocks that can be passed by: they run once, take a hidden state and return another of its form.

    Args:
        names: of the blocks, as `repeated` gives them.

    Attributes:
        passed: those of them that can be, once a run was watched.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.passed: tuple[str, ...] = ()

    @contextmanager
    def watched(self, model: nn.Module) -> Iterator[None]:
        """Find out during a run of the model which blocks can be passed by."""
        runs: dict[str, list[bool]] = {name: [] for name in self.names}

        def look(name: str, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
            hidden = hidden_of(args, kwargs)
            # The hidden state comes first and goes alone: nothing else that a later block might need is lost.
            alike = isinstance(output, Tensor) and hidden is not None and first_tensor(args[:1]) is hidden
            runs[name].append(alike and isinstance(output, Tensor) and _form(output) == _form(hidden))

        hooks = [
            model.get_submodule(name).register_forward_hook(
                lambda _, args, kwargs, output, name=name: look(name, args, kwargs, output), with_kwargs=True
            )
            for name in self.names
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self.passed = tuple(name for name, alike in runs.items() if alike == [True])


@contextmanager
def passing(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Inside, these blocks hand on what they are given."""
    blocks = [model.get_submodule(name) for name in names]
    before = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = _hand_on
    try:
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            del block.forward
            if own is not None:  # someone else's wrapper
                block.forward = own


def _hand_on(hidden: Tensor, *others: object, **named: object) -> Tensor:
    return hidden.clone()  # the next block may write into its input


def _form(tensor: Tensor | None) -> object:
    return None if tensor is None else (tensor.shape, tensor.dtype)
