"""The tensors of a model by name, and what is refused about their values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from secateur.errors import InputError, NonFiniteError, UnsupportedError
from secateur.model.modules import named_modules


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by qualified name; tied ones once, under their first name.

    Example:
        >>> list(named_tensors(nn.BatchNorm1d(2, affine=False)))
        ['running_mean', 'running_var', 'num_batches_tracked']
    """
    parameters: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    seen: tuple[set[int], set[int]] = set(), set()
    for path, module in named_modules(model):
        if module._parameters:
            _add(path, module._parameters, parameters, seen[0])
        if module._buffers:
            _add(path, module._buffers, buffers, seen[1])
    return {**parameters, **buffers}


def _add(path: str, held: Mapping[str, Tensor | None], found: dict[str, Tensor], seen: set[int]) -> None:
    start = f"{path}." if path else ""
    for name, tensor in held.items():
        if tensor is not None and id(tensor) not in seen:
            seen.add(id(tensor))
            found[start + name] = tensor


def can_be_nan(tensor: Tensor) -> bool:
    """Whether a tensor knows NaN, so that removed parts of it can be marked."""
    return tensor.is_floating_point() or tensor.is_complex()


def require_shapes(model: nn.Module) -> None:
    """Refuse weights of lazy modules, which have no shape before the first forward pass.

    Raises:
        InputError: names the first.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise InputError(f"{name!r} has no shape yet", hint="run one forward pass before pruning")


def computed_tensors(model: nn.Module) -> dict[int, object]:
    """Copies of weights that old-style hooks compute before each forward: deepcopy refuses such tensors."""
    kept = (value for module in model.modules() for value in vars(module).values())
    return {id(t): t.detach().clone() for t in kept if isinstance(t, Tensor) and not t.is_leaf}


def has_values(tensor: Tensor) -> bool:
    """Whether there are numbers in it: not on the meta device, and not waiting for a first forward pass."""
    return not (tensor.is_meta or isinstance(tensor, (UninitializedParameter, UninitializedBuffer)))


def require_values(tensor: Tensor, name: str, *, what: str = "tensor") -> None:
    """Refuse a tensor that holds no numbers.

    Raises:
        InputError: meta device or lazy module; names the tensor.
    """
    if not has_values(tensor):
        raise InputError(f"{what} {name!r} has no values yet", hint="load the weights, or run one forward pass")


def require_storable(model: nn.Module) -> None:
    """Refuse a state that no file of tensors can hold: what modules return from ``get_extra_state``.

    Raises:
        UnsupportedError: names the entry. To be asked before long work, by whoever will save the result.
    """
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise UnsupportedError(
                f"{name!r} of the model's state is a {type(value).__name__}, which an output folder cannot hold",
                why="folders hold tensors and text, so that loading them runs no code",
                hint="keep it in a buffer, or save the result yourself: torch.save(result.model.state_dict(), file)",
            )


def require_finite(tensor: Tensor, name: str, *, what: str = "tensor") -> None:
    """Refuse NaN and Inf.

    Args:
        tensor: any tensor; integers and booleans always pass.
        name: its name, for the message.
        what: what it is, for the message.

    Raises:
        NonFiniteError: names the tensor and the first index.
        InputError: the tensor has no values yet.

    Cost:
        One pass over the values; nothing of their size is allocated unless one is refused.
    """
    require_values(tensor, name, what=what)
    if tensor.numel() == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
        return
    values = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    if values.dtype.itemsize == 1:  # the eight-bit formats have no kernel for the minimum
        values = values.to(torch.float32)
    # A minimum and a maximum hand NaN on and need no mask of the tensor's size, which isfinite would make.
    low, high = torch.aminmax(values)
    if bool(torch.isfinite(low) & torch.isfinite(high)):
        return
    index = tuple(torch.nonzero(~torch.isfinite(values))[0].tolist())[: tensor.dim()]
    raise NonFiniteError(
        f"{what} {name!r} holds {tensor.detach()[index].item()} at index {index}",
        hint="repair or reload the weights before pruning",
    )


def dense(tensor: Tensor) -> Tensor:
    """A tensor in the ordinary layout, which can be compared with others; sparse ones are filled up with zeros."""
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def cut_tensor(tensor: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    """The kept slices of a tensor as new storage, same dtype, device and memory format."""
    out = tensor.detach()
    for d, indices in sorted(dims.items()):
        out = out.index_select(d, indices.to(out.device))
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        out = out.contiguous(memory_format=torch.channels_last)
    return out


def require_finite_weights(model: nn.Module) -> None:
    """Refuse a model with NaN or Inf in a parameter or buffer.

    Raises:
        InputError: names the first.
    """
    # A NaN would be pruned or kept by chance: comparisons with it are false whichever way they are written.
    for name, tensor in named_tensors(model).items():
        if tensor.is_floating_point():
            require_finite(tensor, name, what="parameter")
