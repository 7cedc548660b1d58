"""Knowledge distillation: the dense model teaches the pruned one, by its outputs and by what it holds inside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.errors import InputError, RecipeError
from secateur.model.call import call, default_loss, outputs, prediction, to_example, to_target
from secateur.registry import suggestion
from secateur.types import Batch, Cuts, Loss

NO_TARGET = -100  # torch's cross entropy leaves such positions out, and so does a teacher


@dataclass(frozen=True)
class Distil:
    """How much a teacher says, and about what.

    Args:
        temperature: outputs are divided by it before they become probabilities.
        weight: share of the teacher's outputs in the loss; the labels have the rest. 1 needs no labels.
        form: "kl" compares probabilities, "mse" the outputs themselves (regression).
        hidden: patterns of module names whose outputs are compared too.
        hidden_weight: weight of their mean squared error.

    Raises:
        RecipeError: a number out of range, or a teacher that teaches nothing.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2.1 (the factor T^2
        keeps the gradients' size); Romero et al., "FitNets", 2015, equation 3 (hidden states).
    """

    temperature: float = 2.0
    weight: float = 0.5
    form: Literal["kl", "mse"] = "kl"
    hidden: Sequence[str] = ()
    hidden_weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not 0 <= self.weight <= 1 or not self.hidden_weight > 0:
            raise RecipeError(
                f"distil: temperature {self.temperature}, weight {self.weight}, hidden_weight {self.hidden_weight}",
                hint="temperature and hidden_weight are above 0, weight from 0 to 1",
            )
        if self.form not in ("kl", "mse"):
            raise RecipeError(f"distil: the form {self.form!r} is not known", hint="kl or mse")
        if self.weight == 0 and not self.hidden:
            raise RecipeError("distil: weight 0 without hidden teaches nothing", hint="raise it, or leave distil out")


def taught(loss: Loss | None, teacher: nn.Module, spec: Distil, student: nn.Module, cuts: Cuts | None = None) -> Loss:
    """A loss that also compares a model with its teacher.

    Args:
        loss: of the labels; None = `secateur.model.call.default_loss`.
        teacher: in eval mode already; runs without gradients.
        spec: what is compared.
        student: the pruned model.
        cuts: what was cut, so that hidden states of the teacher can be cut alike; None = nothing.

    Returns:
        ``loss(model, batch) -> scalar``.

    Raises:
        RecipeError: a pattern of `hidden` that names no module of both.

    Cost: one forward pass of the teacher per batch.
    """
    names = hidden_names(spec.hidden, student, teacher)

    def together(model: nn.Module, batch: Batch) -> Tensor:
        with _listening(teacher, names) as theirs, torch.no_grad():
            wanted = prediction(call(teacher, to_example(batch))).detach()
        with _listening(model, names) as ours:
            total, found = _labels(loss, model, batch, spec.weight)
        if spec.weight > 0:
            total = total + spec.weight * _outputs(found, wanted, batch, spec)
        for name in names:
            total = total + spec.hidden_weight * _states(name, ours.get(name), theirs.get(name), cuts or {})
        return total

    return together


def hidden_names(patterns: Sequence[str], student: nn.Module, teacher: nn.Module) -> list[str]:
    """Modules of both models that the patterns name, in order.

    Raises:
        RecipeError: a pattern names none.
    """
    there = dict(teacher.named_modules())
    shared = [name for name, _ in student.named_modules() if name and name in there]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in shared):
            raise RecipeError(
                f"distil.hidden: {pattern!r} names no module of the pruned model and its teacher",
                hint=suggestion(pattern, shared),
            )
    return [name for name in shared if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _labels(loss: Loss | None, model: nn.Module, batch: Batch, weight: float) -> tuple[Tensor, Tensor]:
    """The labels' part of the loss, and what the model said on the way."""
    if weight == 1:
        # The labels have no share, so that data without any will do.
        found = prediction(call(model, to_example(batch)))
        return found.new_zeros(()), found
    said: list[object] = []
    hook = model.register_forward_hook(lambda _module, _args, output: said.append(output))
    try:
        value = (loss or default_loss)(model, batch)
    finally:
        hook.remove()
    if not said:
        raise InputError(
            "the loss never called the model, so its outputs cannot be compared with the teacher's",
            hint="call model(...) in it and not model.forward(...), or set distil.weight to 1",
        )
    # The last call: a loss may run the model before, on another view of the batch.
    return (1 - weight) * value, prediction(said[-1])


def _outputs(found: Tensor, wanted: Tensor, batch: Batch, spec: Distil) -> Tensor:
    if found.shape != wanted.shape:
        raise InputError(
            f"the pruned model gives {tuple(found.shape)} and its teacher {tuple(wanted.shape)}",
            hint="distillation needs the same outputs: protect the last layer",
        )
    if spec.form == "mse":
        return functional.mse_loss(found, wanted)
    dim = _class_dim(found, to_target(batch))
    if found.dim() < 2 or found.shape[dim] < 2:
        raise InputError(
            f"distil: outputs {tuple(found.shape)} are no scores of several classes",
            hint="use form: mse for a regression",
        )
    t = spec.temperature
    # In single precision: half precision rounds away the small classes that a teacher is asked for.
    ours, theirs = (functional.log_softmax(one.float() / t, dim) for one in (found, wanted))
    per_place = functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim)
    counted = _counted(batch, per_place)
    if counted is None:
        return t * t * per_place.mean()
    # Without an index of unknown length, for which an accelerator would be waited for.
    return t * t * torch.where(counted, per_place, 0).sum() / counted.sum()


def _class_dim(scores: Tensor, target: Tensor | None) -> int:
    """Where the classes are: last, or second as torch's cross entropy has them where the targets say so."""
    if target is None or scores.dim() == 2:
        return -1
    return 1 if tuple(target.shape) == (*scores.shape[:1], *scores.shape[2:]) else -1


def _counted(batch: Batch, per_place: Tensor) -> Tensor | None:
    """Positions that count: not padding, and not left out by the labels."""
    target, keep = to_target(batch), None
    if target is not None and target.shape == per_place.shape and not target.is_floating_point():
        keep = target != NO_TARGET
    attended = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(attended, Tensor) and attended.shape == per_place.shape:
        keep = attended.bool() if keep is None else keep & attended.bool()
    return keep if keep is None else keep | ~keep.any()  # where none counts, all do


@contextmanager
def _listening(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The outputs of named modules while the block runs the model; the last one of each."""
    heard: dict[str, Tensor] = {}

    def listen(name: str) -> Any:
        return lambda _module, _args, output: heard.__setitem__(name, outputs(output)[0])

    hooks = [model.get_submodule(name).register_forward_hook(listen(name)) for name in names]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def _states(name: str, ours: Tensor | None, theirs: Tensor | None, cuts: Cuts) -> Tensor:
    if ours is None or theirs is None:
        raise RecipeError(f"distil.hidden: {name!r} is not called by the forward", hint="name another module")
    kept = cuts.get(f"{name}.weight", {}).get(0)
    if ours.shape != theirs.shape and kept is not None:
        # Of a layer whose outputs were cut, the teacher's kept ones; convolutions have them at dimension 1.
        dims = [dim for dim in range(ours.dim()) if ours.shape[dim] != theirs.shape[dim]]
        if len(dims) == 1 and ours.shape[dims[0]] == len(kept):
            theirs = theirs.index_select(dims[0], kept.to(theirs.device))
    if ours.shape != theirs.shape:
        raise RecipeError(
            f"distil.hidden: {name!r} gives {tuple(ours.shape)}, the teacher's {tuple(theirs.shape)}",
            hint="name modules whose outputs were not cut, or layers whose own weight was",
        )
    return functional.mse_loss(ours.float(), theirs.float())
