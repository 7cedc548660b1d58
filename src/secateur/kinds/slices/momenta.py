"""The state of an optimizer follows a cut in place, or the cut is refused before anything has changed.

State of a weight's shape is cut like the weight, in lists and mappings too, and so are statistics of its rows or
columns that kept their dimension. What has another form (a flat vector, the weight turned, a history of all weights in
one) cannot be cut without knowing what it means, and the optimizer would fail on it, or misread it, at its next step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import UnsupportedError
from secateur.model.call import describe
from secateur.model.forms import rebuilt
from secateur.model.tensors import cut_tensor, named_tensors
from secateur.types import Cuts


def require_own_state(model: nn.Module, optimizer: Optimizer, cuts: Cuts) -> None:
    """Refuse an optimizer whose state cannot follow.

    Args:
        model: before the removal.
        optimizer: left as it is.
        cuts: tensor name -> dimension -> kept indices; empty where whole layers go.

    Raises:
        UnsupportedError: names the entry, the weight and both shapes.
    """
    tensors = named_tensors(model)
    names = {id(tensor): name for name, tensor in tensors.items()}
    of_cut = {key for name in cuts for key in optimizer.state.get(tensors[name], {})}
    for parameter, state in optimizer.state.items():
        for key, value in state.items() if isinstance(state, dict) else ():
            stuck = next(_stuck(value, parameter), None)
            spread = isinstance(stuck, Tensor) and stuck.numel() > parameter.numel()
            # Where all weights are square, only those of other layers show that the state is turned.
            if stuck is not None and (key in of_cut or spread):
                name = names.get(id(parameter), "a weight")
                raise UnsupportedError(
                    f"The state of {type(optimizer).__name__} cannot follow the cut.",
                    why=f"{key!r} of {name!r} holds {describe(stuck)}, the weight is {describe(parameter.detach())}",
                    hint="Clear it first (optimizer.state.clear()), or make a new optimizer for the smaller model. "
                    "Nothing was changed.",
                )


def cut_states(tensors: Mapping[str, Tensor], cuts: Cuts, optimizer: Optimizer | None) -> list[Callable[[], None]]:
    """What has to be done to the state of cut weights once they are cut; `require_own_state` has let it pass.

    Args:
        tensors: of the model, before the cut.
        cuts: tensor name -> dimension -> kept indices.
        optimizer: left as it is until the functions run.
    """
    found: list[Callable[[], None]] = []
    for name, dims in cuts.items() if optimizer is not None else ():
        assert optimizer is not None
        state = optimizer.state.get(tensors[name], {})
        found.append(_later(state, {key: _cut(value, tensors[name], dims) for key, value in state.items()}))
    return found


def _later(state: dict[str, object], new: dict[str, object]) -> Callable[[], None]:
    return lambda: state.update(new)


def _cut(value: object, weight: Tensor, dims: Mapping[int, Tensor]) -> object:
    if isinstance(value, Tensor):
        alike = value.dim() == weight.dim()
        here = {d: kept for d, kept in dims.items() if alike and value.shape[d] == weight.shape[d]}
        return cut_tensor(value, here) if here else value
    if isinstance(value, dict):
        return type(value)((key, _cut(item, weight, dims)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return rebuilt(value, [_cut(item, weight, dims) for item in value])
    return value


def _stuck(value: object, weight: Tensor) -> Iterator[object]:
    """What is neither of the weight's shape, nor a statistic along some of its dimensions, nor a single number."""
    if isinstance(value, Tensor):
        alike = value.dim() == weight.dim() and all(n in (1, m) for n, m in zip(value.shape, weight.shape, strict=True))
        if value.numel() > 1 and not alike:
            yield value
    elif isinstance(value, (list, tuple)) and value and all(type(n) is int for n in value):
        if tuple(value) == tuple(weight.shape):
            yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _stuck(item, weight)
