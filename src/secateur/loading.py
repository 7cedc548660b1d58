"""Load a pruned model again: rebuild, replay the plan, fill in the weights. No code comes from a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.errors import PlanMismatchError, RecipeError
from secateur.files.safe import load_json, load_tensors
from secateur.planning.history import remember
from secateur.planning.plan import Plan

PLAN, WEIGHTS, MANIFEST = "plan.json", "model.safetensors", "manifest.json"


def load(path: str | Path, model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """Load what `Result.save` wrote.

    Args:
        path: the output folder.
        model: a freshly built model of the original architecture, or a function that builds one. A module is cut
            in place and returned.

    Returns:
        the pruned model with its weights, ordinary and ready to run.

    Raises:
        FileRefusedError: a file is missing, unsafe or damaged (checked against the manifest).
        PlanMismatchError: the plan or the weights belong to another model.

    Cost: reading the weights once; no forward pass.
    """
    folder = Path(path)
    plan = Plan.load(folder / PLAN)
    hashes = load_json(folder / MANIFEST)
    tensors = load_tensors(folder / WEIGHTS, sha256=hashes.get(WEIGHTS) if isinstance(hashes, dict) else None)
    fresh = model if isinstance(model, nn.Module) else model()
    if not isinstance(fresh, nn.Module):
        raise RecipeError(f"load() needs a module or a function that returns one, not {type(fresh).__name__}.")
    plan.validate(fresh)
    plan.replay(fresh)
    fill(fresh, tensors)
    remember(fresh, plan)  # a second round then saves one folder for the original architecture
    return fresh


def fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put weights into a model; names and shapes must agree exactly, ties stay tied.

    Raises:
        PlanMismatchError: names the first tensor that is missing, left over or of another shape.
    """
    own = model.state_dict(keep_vars=True)
    for name in sorted({*own, *tensors}):
        if name not in own or name not in tensors:
            side = "the file" if name in tensors else "the model"
            raise PlanMismatchError(
                f"Only {side} has the tensor {name!r}.", hint="Pass the architecture that the weights were saved from."
            )
        if own[name].shape != tensors[name].shape:
            raise PlanMismatchError(
                f"The tensor {name!r} has shape {tuple(tensors[name].shape)} in the file and "
                f"{tuple(own[name].shape)} in the model."
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].data = tensor.to(own[name].device)
