"""Block influence: how much repeated blocks (transformer layers) change the hidden state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateur import call
from secateur.calibrate.functional import batches
from secateur.criteria.base import one_of, suggestion, untouched
from secateur.errors import NonFiniteError, RecipeError, UnsupportedError
from secateur.types import Data

TINY = 1e-12


def block_influence(
    model: nn.Module,
    blocks: str | Sequence[str],
    data: Data,
    *,
    measure: Literal["cosine", "angular"] = "cosine",
    span: int = 1,
) -> Tensor:
    """Score repeated blocks by how much each turns the hidden state; blocks that hardly do can be left out.

    The idea: in deep residual networks late blocks add little, and input and output point the same way. A bad
    choice for blocks in series without shortcuts, and for the first and last ones, which change the scale and
    matter more than the angle says: compare with leaving each out. Blocks are scored alone: leaving out several
    neighbours costs more than the sum.

    Args:
        model: any module; left as it is.
        blocks: name of an nn.ModuleList or nn.Sequential whose children are the blocks, or their names in the
            order in which they run. Every block takes its hidden state first and returns one of the same shape
            (alone or first in a tuple).
        data: unlabelled batches.
        measure: "cosine" is 1 - E cos(x_i, x_{i+span}); "angular" is E arccos(cos) / pi. The expectation runs
            over all positions (tokens, pixels) of all samples; the last dimension is the feature of sequences,
            the second that of images.
        span: how many neighbouring blocks are left out together; the score is that of the first of them.

    Returns:
        float32 [number of blocks - span + 1], higher = keep.

    Raises:
        RecipeError: no such blocks, an unknown measure, or a span that does not fit.
        UnsupportedError: a block that does not run exactly once, or changes the shape of its hidden state.
        NonFiniteError: a hidden state is NaN or Inf.
        InputError: the data holds no batch.

    Cost:
        One forward pass over the data; hidden states of one batch are kept.

    Source:
        Men, Xu, Zhang, Wang, Lin, Lu, Han, Chen, "ShortGPT: Layers in Large Language Models are More Redundant
        Than You Expect", 2024, equation 1; Gromov, Tirumala, Shapourian, Glorioso, Roberts, "The Unreasonable
        Ineffectiveness of the Deeper Layers", 2024, equation 4 (angular distance).

    Example:
        The first block turns the plane by 90 degrees, the second does nothing.

        >>> turn, nothing = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        >>> _ = turn.weight.data.copy_(torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
        >>> _ = nothing.weight.data.copy_(torch.eye(2))
        >>> block_influence(nn.Sequential(turn, nothing), ["0", "1"], [torch.tensor([[1.0, 2.0]])]).round(decimals=6)
        tensor([1., 0.])
    """
    one_of("measure", measure, ("cosine", "angular"))
    names = _names(model, blocks)
    if not 1 <= span <= len(names):
        raise RecipeError(f"span={span!r} does not fit {len(names)} blocks")
    total = torch.zeros(len(names) - span + 1, dtype=torch.float64)
    count = torch.zeros_like(total)
    with untouched(model), torch.inference_mode(False), torch.no_grad():
        model.eval()
        for batch, _ in batches(model, data):
            states = _states(model, names, call.to_example(batch))
            for i in range(len(total)):
                distances = _distance(states[i], states[i + span], measure, names[i])
                total[i] += distances.sum()
                count[i] += distances.numel()
    return (total / count).float()


def _names(model: nn.Module, blocks: str | Sequence[str]) -> list[str]:
    modules = dict(model.named_modules())
    if isinstance(blocks, str):
        if blocks not in modules:
            raise RecipeError(f"the model has no module {blocks!r}", hint=suggestion(blocks, modules))
        return [f"{blocks}.{name}".lstrip(".") for name, _ in modules[blocks].named_children()]
    for name in blocks:
        if name not in modules:
            raise RecipeError(f"the model has no module {name!r}", hint=suggestion(name, modules))
    return list(blocks)


def _states(model: nn.Module, names: Sequence[str], example: Any) -> list[Tensor]:
    """Hidden state before every block and after the last."""
    order: list[str] = []
    states: list[Tensor] = []
    last: list[Tensor] = []

    def before(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
            order.append(name)
            states.append(given[0].detach().clone() if given else torch.zeros(0))  # blocks may add in place

        return hook

    def after(_: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        found = call.outputs(result)[0]
        if found.shape != states[-1].shape:
            why = f"{call.describe(states[-1])} -> {call.describe(found)}"
            raise UnsupportedError(f"block {order[-1]!r} changes the shape of its hidden state", why=why)
        last[:] = [found.detach()]

    modules = [(name, model.get_submodule(name)) for name in names]
    handles = [module.register_forward_pre_hook(before(name), with_kwargs=True) for name, module in modules]
    handles += [module.register_forward_hook(after) for _, module in modules]
    try:
        call.call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    if order != list(names):
        raise UnsupportedError(
            "the blocks do not run once each in the given order",
            why=f"they ran as {order[:8]}",
            hint="name the blocks of one stack in the order in which they run",
        )
    return [*states, *last]


def _distance(before: Tensor, after: Tensor, measure: str, name: str) -> Tensor:
    """Distance of the directions at every position, float64."""
    dim = 1 if before.dim() == 4 else -1
    x, y = before.double(), after.double()
    cosine = (x * y).sum(dim) / (x.norm(dim=dim) * y.norm(dim=dim)).clamp(min=TINY)
    if not bool(torch.isfinite(cosine).all()):
        raise NonFiniteError(f"the hidden state at block {name!r} is NaN or Inf", hint="check the data and the weights")
    cosine = cosine.clamp(-1, 1)
    distance: Tensor = 1 - cosine if measure == "cosine" else cosine.arccos() / torch.pi
    return distance.cpu()
