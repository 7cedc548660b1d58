"""A model whose parameters are sharded (`fully_shard`): gradients where the shards are, the decision on one process.

Forward and backward passes run as the model was sharded, each process on its share of the batches. Weights and mean
gradients are then gathered onto the first process, one parameter at a time, into the memory of its CPU, where an
unsharded model of the same names is planned for as always. Masks go back to the shards; what is cut for real is cut
from the gathered model, since a shard has no rows to take out that the others do not have as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Unpack, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from secateur.asking import Decided
from secateur.criteria.gradients.loss_gradient import MeanGradients
from secateur.errors import InputError, RecipeError
from secateur.model.call import as_loss, default_loss, device_of, to_device
from secateur.model.samples import batch_size_of
from secateur.planning.build import criterion_of, make_plan
from secateur.planning.plan import Plan
from secateur.processes import Processes
from secateur.request import CRITERION
from secateur.types import Batch, Data, Example, Loss


def plan_sharded(
    model: nn.Module,
    whole: nn.Module,
    example: Example = None,
    *,
    data: Data | None = None,
    loss: Loss | None = None,
    **decision: Unpack[Decided],
) -> Plan | None:
    """The plan for a sharded model, decided by the first process. All processes call it.

    Args:
        model: sharded by `torch.distributed.fsdp.fully_shard`; left as it is.
        whole: the same model, not sharded, on the CPU or on the meta device; on the first process it gets the weights
            of `model`, and is what the plan belongs to: `plan.apply(whole)` cuts it. Others leave it alone.
        example: what one forward of `whole` takes; masks need none.
        data: batches, the same in all processes; each runs every n-th.
        loss: ``loss(model, batch) -> scalar``, as for `plan`.
        **decision: what goes, as for `plan`. The criterion reads weights alone, or the mean gradient: "gradient",
            "snip", or "taylor" with `reduce` signed, abs, mean or squared.

    Returns:
        The plan on the first process, None on the others; `mask_shards` takes either.

    Raises:
        InputError: nothing of the model is sharded, or the two models have other parameters.
        RecipeError: no group of processes, or no data where the criterion needs them.
        UnsupportedError: a criterion that needs more of the data than the mean gradient.
        ProcessError: the first process could not plan; it says why.

    Cost:
        A forward and backward pass over the data, shared; on the first process the memory of the weights, and of the
        gradients once more, on the CPU.
    """
    processes = Processes.of_group()
    require_sharded(model)
    rule = criterion_of(decision.get("criterion", CRITERION))
    known = None
    if rule.needs:
        if data is None:
            raise RecipeError(f"criterion {rule.name!r} needs data", hint="pass data=, an iterable of batches")
        known = MeanGradients(_mean_gradients(model, data, as_loss(loss) or default_loss, processes))
    gather(model, whole, processes)
    decision["criterion"] = rule
    plan = None
    with processes.working():
        if processes.rank == 0:
            plan = make_plan(whole, example, data=known, **decision)
    processes.gathered(None)  # none goes on where the first has failed
    return plan


def gather(model: nn.Module, whole: nn.Module, processes: Processes) -> None:
    """Give the first process's `whole` the weights and buffers of a sharded model, one at a time.

    Args:
        model: sharded; left as it is.
        whole: changed in place, on the first process alone.
        processes: all that hold a shard.

    Raises:
        InputError: other names or shapes.
    """
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    wrong = [name for name, own in whole.named_parameters() if shapes.get(name) != tuple(own.shape)]
    if wrong or len(dict(whole.named_parameters())) != len(shapes):
        missing = wrong or sorted(set(shapes) - set(dict(whole.named_parameters())))
        raise InputError(
            f"the unsharded model is another one: parameter {missing[0]!r} differs",
            hint="make it by the same code as the sharded one, for example under torch.device('meta')",
        )
    for name, tensor in parameters.items():
        full = _full(tensor)
        if processes.rank == 0:
            _place(whole, name, nn.Parameter(full.cpu(), requires_grad=tensor.requires_grad))
    for name, buffer in model.named_buffers():
        if processes.rank == 0:
            _place(whole, name, _full(buffer).cpu().clone())


def mask_shards(model: nn.Module, plan: Plan | None) -> dict[str, Tensor]:
    """Write the zeros of a plan into the shards. All processes call it.

    Args:
        model: sharded; changed in place.
        plan: of masks, on the first process; None on the others.

    Returns:
        Parameter name -> the mask of this process's shard, to be held in a loop of your own.

    Raises:
        ProcessError: the plan cuts, which shards cannot; said by the first process.
    """
    processes, masks = Processes.of_group(), {} if plan is None else plan.masks
    with processes.working():
        if plan is not None and not masks:
            raise InputError(
                "the plan cuts, and a sharded parameter cannot be cut where it lies",
                hint="plan.apply(whole) on the first process gives the smaller model; save it, and shard that",
            )
    parameters, found = dict(model.named_parameters()), {}
    for name in processes.gathered(sorted(masks))[0]:
        tensor = parameters[name]
        local, keep = tensor.detach(), processes.decided(lambda: masks, {name: tensor})[name].to(device_of(model))
        if isinstance(tensor, DTensor):
            sent = distribute_tensor(keep.to(torch.uint8), tensor.device_mesh, tensor.placements)
            local, keep = cast(DTensor, local).to_local(), sent.to_local().bool()
        local.masked_fill_(~keep, 0)  # a product would leave -0.0, and NaN
        found[name] = keep
    return found


def require_sharded(model: nn.Module) -> None:
    """Refuse a model that is whole in every process.

    Raises:
        InputError: no parameter is sharded.
    """
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise InputError(
            f"no parameter of {type(model).__name__} is sharded",
            hint="call torch.distributed.fsdp.fully_shard first; for whole models plan(data=secateur.shared(data))",
        )


def _full(tensor: Tensor) -> Tensor:
    return cast(DTensor, tensor.detach()).full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def _place(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    store = module._parameters if isinstance(tensor, nn.Parameter) else module._buffers
    store[own] = tensor  # type: ignore[assignment]


def _mean_gradients(model: nn.Module, data: Data, loss: Loss, processes: Processes) -> dict[str, Tensor]:
    """Gradient of the mean loss over all batches, whole and on the CPU of the first process; {} elsewhere."""
    samples = 0
    with _differentiable(model):
        for batches in _rounds(data, processes.world):
            # The last round may be short. All have to run, as shards are exchanged, so the others run one for nothing.
            mine = processes.rank < len(batches)
            batch = to_device(batches[processes.rank if mine else 0], device_of(model))
            value = loss(model, batch) * (batch_size_of(batch) if mine else 0.0)
            value.backward()  # type: ignore[no-untyped-call]
            samples += sum(batch_size_of(one) for one in batches)
        found = {}
        for name, parameter in model.named_parameters():
            if parameter.grad is None:
                continue
            if isinstance(parameter.grad, DTensor):  # the mean over the processes of what each has added up
                total = _full(parameter.grad) * (processes.world / samples)
            else:  # a parameter that is not sharded: what this process has added up
                total = processes.summed(parameter.grad) / samples
            if processes.rank == 0:
                found[name] = total.to("cpu", torch.promote_types(total.dtype, torch.float32))
            parameter.grad = None
    return found


def _rounds(data: Data, world: int) -> Iterator[list[Batch]]:
    """The batches, as many at a time as there are processes."""
    some: list[Batch] = []
    for batch in data:
        some.append(batch)
        if len(some) == world:
            yield some
            some = []
    if some:
        yield some


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, with gradients of its own; as it was afterwards."""
    modes = {module: module.training for module in model.modules()}
    kept = {parameter: parameter.grad for parameter in model.parameters()}
    try:
        model.eval()
        for parameter in kept:
            parameter.grad = None
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, gradient in kept.items():
            parameter.grad = gradient
