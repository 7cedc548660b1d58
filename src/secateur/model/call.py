"""How secateur calls a model: example inputs, data batches, outputs, and the loss where none is given.

Two conventions that look alike and are not:

* an *example* is exactly what the forward takes: a tensor is ``model(x)``, a tuple or list is
  ``model(*x)``, a mapping is ``model(**x)``;
* a *data batch* may carry a target: a tuple or list is ``(input, target)``, a mapping may hold a label key.

`to_example` turns the second into the first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import chain
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from secateur.errors import InputError, SecateurError, UnsupportedError
from secateur.model.failure import fail
from secateur.model.forms import map_tensors
from secateur.model.labels import ANY_NAME, LABEL_KEYS, argument_names, own_loss, takes_labels, with_labels
from secateur.types import Batch, Example, Loss


def call(model: nn.Module, example: Example) -> object:
    """Run the model on an example, and say where it failed if it fails.

    Args:
        model: any module.
        example: a tensor (``model(x)``), a tuple or list (``model(*x)``) or a mapping (``model(**x)``).

    Returns:
        Whatever the forward returns.

    Raises:
        ForwardError: the forward raised; the message has the user's own error, the module and file:line.
        InputError: the example is a loader, an iterator or a shape, and no input.
        ResourceError: memory ran out.
        SecateurError: raised inside the forward; passed on as it is.

    Example:
        >>> call(nn.Flatten(), torch.zeros(2, 3, 4)).shape
        torch.Size([2, 12])
    """
    require_input(example)
    try:
        if isinstance(example, Mapping):
            return model(**example)
        if isinstance(example, (tuple, list)):
            return model(*example)
        return model(example)
    # Raised by a check of ours inside the forward, and says more than that the forward failed.
    except SecateurError:
        raise
    except Exception as error:
        fail(error, model, f"{type(model).__name__} failed on the input {describe(example)}", _advice(model, example))


def require_input(example: Example) -> None:
    """Refuse what is taken for an input so often that a forward's own error about it would only mislead."""
    if isinstance(example, (Iterator, DataLoader)):
        raise InputError(
            f"the example is a {type(example).__name__}",
            why="an example is what one forward takes, not what hands out batches",
            hint="give it as data=, or the input of its first batch: next(iter(loader))[0]",
        )
    # A single number may be an input; several in a tuple, and nothing else, are a shape.
    if isinstance(example, (tuple, list)) and len(example) > 1 and all(type(size) is int for size in example):
        sizes = ", ".join(map(str, example))
        raise InputError(
            f"the example is a tuple of integers, ({sizes})",
            why="an example is what one forward takes: a tuple is its positional arguments",
            hint=f"where this is the shape of the input, give torch.zeros({sizes})",
        )


def _advice(model: nn.Module, example: Example) -> str:
    """What to do about a mapping that the forward cannot take as keywords; "" where that is not the fault."""
    names = argument_names(model)
    if not isinstance(example, Mapping) or ANY_NAME in names or set(example) <= names:
        return ""
    extra = [key for key in example if key not in names]
    if set(extra) <= set(LABEL_KEYS):
        return f"leave {', '.join(map(repr, extra))} out of the example: labels belong to data="
    # None of its keys is an argument: the forward is likely to take the mapping itself.
    if len(extra) == len(example):
        return (
            "a mapping gives keyword arguments; where the forward takes the mapping itself, put it in a tuple: "
            "example=(mapping,), and batches ((mapping,), target)"
        )
    return f"the forward takes {', '.join(sorted(names))}; leave {', '.join(map(repr, extra))} out"


def describe(value: object) -> str:
    """Short text of shapes and dtypes, for error messages.

    Example:
        >>> describe({"x": torch.zeros(2, 3), "n": 4})
        '{x: float32[2, 3], n: 4}'
    """
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {describe(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(describe(item) for item in value) + ")"
    return str(value)[:40]


def to_example(batch: Batch) -> Example:
    """Take the model input out of a data batch.

    Not for an example: there a tuple means positional arguments, here it means ``(input, target)``.

    Args:
        batch: a tensor (all input), ``(input,)``, ``(input, target)``, ``(input, ..., target)`` (the inputs
            then become positional arguments) or a mapping (label keys are left out).

    Returns:
        What `call` takes.

    Raises:
        InputError: the batch is of no such form.

    Example:
        >>> to_example((torch.zeros(2, 3), torch.zeros(2))).shape
        torch.Size([2, 3])
    """
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key not in LABEL_KEYS}
    if isinstance(batch, (tuple, list)) and batch:
        inputs = batch[:-1] if len(batch) > 1 else batch
        return inputs[0] if len(inputs) == 1 else tuple(inputs)
    raise InputError(
        f"a data batch is a {type(batch).__name__}",
        hint="give batches that are a tensor, (input, target) or a mapping of tensors",
    )


def to_target(batch: Batch) -> Tensor | None:
    """Take the target out of a data batch: the last of a tuple, or the label key of a mapping; else None."""
    if isinstance(batch, Mapping):
        return next((batch[key] for key in LABEL_KEYS if isinstance(batch.get(key), Tensor)), None)
    if isinstance(batch, (tuple, list)) and len(batch) > 1 and isinstance(batch[-1], Tensor):
        return batch[-1]
    return None


def outputs(value: object) -> list[Tensor]:
    """Flatten what a forward returned into its tensors, in a stable order.

    Mappings (Hugging Face outputs too), tuples, lists and dataclasses are walked; what holds no tensor
    (None, numbers, cache objects) is left out.

    Returns:
        The tensors.

    Raises:
        UnsupportedError: there is no tensor in it.

    Example:
        >>> len(outputs({"logits": torch.zeros(1), "hidden": (torch.zeros(2), None)}))
        2
    """
    found = list(tensors_in(value))
    if not found:
        raise UnsupportedError(
            f"the forward returned {type(value).__name__}, with no tensor in it",
            hint="wrap the model so that it returns a tensor, or a tuple or mapping of tensors",
        )
    return found


def tensors_in(value: object) -> Iterator[Tensor]:
    """Tensors of an output, example or batch, in a stable order; see `outputs` for what is walked."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for entry in fields(value):
            yield from tensors_in(getattr(value, entry.name))


def fresh(example: Example) -> Example:
    """An example of its own for a run: a forward may write into its input, and the next one wants it as it was.

    Args:
        example: what `call` takes.

    Returns:
        A copy of the same form; what cannot be copied is the same object.

    Example:
        >>> given = {"x": torch.ones(2)}
        >>> fresh(given)["x"].zero_().sum().item(), given["x"].sum().item()
        (0.0, 2.0)
    """
    # Tensors by themselves: deepcopy refuses those that a graph has made.
    memo: dict[int, object] = {id(tensor): tensor.detach().clone() for tensor in tensors_in(example)}
    try:
        return copy.deepcopy(example, memo)
    except Exception:
        return example


def inputs(example: Example) -> list[Tensor]:
    """Flatten an example into its tensors, in a stable order.

    Raises:
        InputError: there is no tensor in it, or it is no example at all.

    Example:
        >>> [tensor.shape[0] for tensor in inputs((torch.zeros(2), {"mask": torch.ones(3)}))]
        [2, 3]
    """
    require_input(example)
    found = list(tensors_in(example))
    if not found:
        raise InputError(
            f"the example is {describe(example)}, with no tensor in it",
            hint="give what one forward takes: a tensor, a tuple of positional or a mapping of keyword arguments",
        )
    return found


def prediction(output: object) -> Tensor:
    """The tensor to compare with a target: ``logits`` where the output names them, else the first tensor."""
    # By its name first: an output that brings a loss has it in front of the logits.
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else outputs(output)[0]


def default_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Loss where the user gave none; give your own wherever the task is not one of these.

    ``output.loss`` for a mapping with labels, where the forward takes them and returns one (Hugging Face models);
    else cross entropy for integer targets, and mean squared error for float targets of the output's shape.

    Args:
        model: any module.
        batch: a data batch with a target.

    Returns:
        A scalar.

    Raises:
        InputError: no target, or target and output do not fit; the message has both shapes.
        ForwardError: the forward failed.
    """
    target = to_target(batch)
    if target is None:
        raise InputError(
            f"the batch {describe(batch)} holds no target",
            hint="give batches of (input, target), mappings with labels, or your own loss(model, batch)",
        )
    predicted, left_out = None, ""
    if takes_labels(model, batch):
        output = call(model, with_labels(model, batch))
        loss = own_loss(output)
        if loss is not None:
            return loss
        if argument_names(model) & set(batch) & set(LABEL_KEYS):
            raise InputError(
                f"the model returned no loss for the batch {describe(batch)}",
                why="its forward takes the labels, so what they mean is for the model to say",
                hint="give batches with the labels that its forward takes, or your own loss(model, batch)",
            )
        # A forward with **kwargs may swallow any name: that says nothing about labels.
        predicted = prediction(output)
    elif isinstance(batch, Mapping):
        left_out = f"the forward of {type(model).__name__} takes no labels, so they are compared with its output"
    if predicted is None:
        predicted = prediction(call(model, to_example(batch)))
    return _loss_between(predicted, target, left_out)


def as_loss(loss: Loss | nn.Module | None) -> Loss | None:
    """A loss as secateur calls it, where the user gave one of PyTorch's criteria, which take outputs and targets.

    Args:
        loss: ``loss(model, batch) -> scalar``, which comes back as it is; a loss module (`nn.CrossEntropyLoss()`) or a
            function of `torch.nn.functional`, which gets the prediction (logits, else the first tensor of the output)
            and the target of the batch.

    Returns:
        ``loss(model, batch)``, or None.

    Raises:
        InputError: neither; or, when it is called, the batch holds no target.

    Example:
        >>> batch = (torch.zeros(2, 4), torch.tensor([0, 1]))
        >>> round(as_loss(nn.CrossEntropyLoss())(nn.Linear(4, 3, bias=False), batch).item(), 4)
        1.0986
    """
    if loss is None or not (isinstance(loss, nn.Module) or getattr(loss, "__module__", "") == functional.__name__):
        if loss is not None and not callable(loss):
            raise InputError(f"loss is {describe(loss)}", hint="give a function: loss(model, batch) -> scalar")
        return loss
    criterion = cast("Callable[[Tensor, Tensor], Tensor]", loss)

    def of_batch(model: nn.Module, batch: Batch) -> Tensor:
        target = to_target(batch)
        if target is None:
            raise InputError(
                f"the batch {describe(batch)} holds no target for the loss {_name_of(criterion)}",
                hint="give batches of (input, target), mappings with labels, or your own loss(model, batch)",
            )
        return criterion(prediction(call(model, to_example(batch))), target)

    return of_batch


def _name_of(criterion: object) -> str:
    return type(criterion).__name__ if isinstance(criterion, nn.Module) else getattr(criterion, "__name__", "given")


def _loss_between(predicted: Tensor, target: Tensor, why: str) -> Tensor:
    if target.is_floating_point():
        if target.shape != predicted.shape:
            raise InputError(
                f"the target {describe(target)} has not the shape of the output {describe(predicted)}",
                why=why,
                hint="mean squared error needs equal shapes; reshape the target or give your own loss",
            )
        return functional.mse_loss(predicted, target)
    try:
        return functional.cross_entropy(predicted, target.long())
    except (RuntimeError, ValueError, IndexError) as error:
        raise InputError(
            f"the target {describe(target)} does not fit the output {describe(predicted)}",
            why="; ".join(part for part in (why, str(error)) if part),
            hint="cross entropy needs an output [batch, classes, ...] and targets [batch, ...] below classes",
        ) from error


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter or buffer; the CPU where there is none."""
    # A chain, and no list: every forward pass asks, and only the first tensor is looked at.
    for tensor in chain(model.parameters(), model.buffers()):
        return tensor.device
    return torch.device("cpu")


def to_device(value: Example, device: torch.device) -> Example:
    """Move every tensor of an example or batch to a device; the form is kept."""
    return map_tensors(value, lambda tensor: tensor.to(device))


def several(example: Example, examples: Sequence[Example]) -> tuple[Example, tuple[Example, ...]]:
    """The first example and the further ones, where ``examples=[...]`` may stand in the place of ``example``."""
    return (example, tuple(examples)) if example is not None or not examples else (examples[0], tuple(examples[1:]))


def require_reiterable(data: object, why: str) -> None:
    """Refuse a one-shot iterator where the data is read more than once.

    Args:
        data: any iterable of batches.
        why: what needs the second reading, for example "3 epochs".

    Raises:
        InputError: the data is a generator or another iterator that can be read only once.
    """
    if isinstance(data, Iterator):
        raise InputError(
            f"the data is a {type(data).__name__} that can be read only once",
            why=f"{why} needs to read it again",
            hint="give a list of batches, a DataLoader or an object whose __iter__ starts anew",
        )
