"""A truth that does not come from the engine: the original with every removed slice set to zero, on other inputs."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import secateur as sc
from secateur.model.call import call, outputs


def zeroed(model: nn.Module, plan: sc.Plan) -> nn.Module:
    """The original, zero wherever the plan removes something."""
    masked = copy.deepcopy(model)
    tensors = {**dict(masked.named_parameters()), **dict(masked.named_buffers())}
    with torch.no_grad():
        for name, dims in plan.cuts.items():
            for d, kept in dims.items():
                gone = torch.ones(tensors[name].shape[d], dtype=torch.bool)
                gone[kept] = False
                tensors[name].index_fill_(d, gone.nonzero().flatten(), 0)
    return masked


def locked(model: nn.Module, example: Any, **options: Any) -> dict[str, list[str]]:
    """Group name -> why it stays, with the line."""
    found = sc.inspect(model, example, **options).locked
    return {g.name: [f"{lock.reason} ({lock.where})" for lock in g.locks] for g in found}


def cut_or_refused(model: nn.Module, example: Any, **asked: Any) -> tuple[sc.Plan, nn.Module] | sc.SecateurError:
    """The plan and the cut model, or the refusal in words."""
    options = {"target": {"sparsity": 0.4}, "scope": "local", "criterion": "random", **asked}
    try:
        plan = sc.plan(model, example, **options)
        return plan, plan.apply(model)
    except (sc.errors.UnsupportedError, sc.errors.TargetError) as error:
        return error


def holds(
    model: nn.Module, example: Any, others: Iterable[Any] = (), *, train: bool = False, **asked: Any
) -> sc.Plan | None:
    """The plan, after its result was found right on the example and on other inputs; None where it was refused."""
    found = cut_or_refused(model.eval(), example, **asked)
    if isinstance(found, sc.SecateurError):
        return None
    plan, cut = found
    for one in (*([] if example is None else [example]), *others):
        for mode in (False, True) if train else (False,):
            wanted, got = (_run(m.train(mode), one) for m in (zeroed(model, plan), copy.deepcopy(cut)))
            for a, b in zip(wanted, got, strict=True):
                torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    return plan


def _run(model: nn.Module, example: Any) -> list[Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        return [t.detach() for t in outputs(call(model, example))]


def left(model: nn.Module, plan: sc.Plan) -> float:
    """Share of the parameters that stays."""
    return sum(p.numel() for p in plan.apply(model).parameters()) / sum(p.numel() for p in model.parameters())


def whole(plan: sc.Plan | None, names: Mapping[str, Iterable[int]]) -> bool:
    """Whether no plan was made, or one that leaves these dimensions of these tensors alone."""
    return plan is None or not any(d in plan.cuts.get(name, {}) for name, dims in names.items() for d in dims)
