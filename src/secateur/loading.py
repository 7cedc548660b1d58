"""Load a pruned model again: rebuild, replay the plan, fill in the weights. No code comes from a file.

A folder is believed as far as its hashes reach: that its files are those that were written together. What its plan says
of a proof stays a record, unless an example is at hand to prove the cut anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.errors import FileRefusedError, PlanMismatchError, RecipeError
from secateur.files.manifest import MANIFEST, read_manifest, require_files
from secateur.files.safe import load_json, load_tensors
from secateur.integrations.transformers import watch_saving
from secateur.planning.beside import load_beside
from secateur.planning.explain import not_proved
from secateur.planning.files import MAX_BYTES
from secateur.planning.history import origin_of, remember
from secateur.planning.plan import Plan
from secateur.types import Example
from secateur.words import spoken

PLAN, WEIGHTS, BUFFERS = "plan.json", "model.safetensors", "buffers.safetensors"
WIDEST = 16  # bytes of one element of the widest dtype
ROOM = 1 << 20  # bytes for the names of buffers
STORED = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
          torch.int8, torch.uint8, torch.bool)  # fmt: skip


@spoken()
def load(
    path: str | Path, model: nn.Module | Callable[[], nn.Module | tuple[nn.Module, Example]], *, example: Example = None
) -> nn.Module:
    """Load what `Result.save` wrote.

    Args:
        path: the output folder.
        model: a freshly built model of the original architecture, or a function that builds one. A module is cut
            in place and returned. A function may return (model, example), as those of the command line may.
        example: what one forward takes. With it the cut is proved anew on `model` before anything is changed; without
            it the folder's certificate is a record and no proof.

    Returns:
        the pruned model with its weights, ordinary and ready to run.

    Raises:
        FileRefusedError: a file is missing, unsafe, damaged, or not the one whose hash the manifest records.
        PlanMismatchError: the plan or the weights belong to another model.
        CertificateError: with an example: the cut is not what the plan says.

    Cost: every file is read once; no forward pass. With an example, that of `Plan.prove` too.

    Example:
        >>> import tempfile, torch, secateur
        >>> def build():
        ...     return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> x = torch.ones(1, 8)
        >>> result = secateur.prune(build(), x, target={"sparsity": 0.5}, overrides=["measure.latency=false"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = result.save(f"{folder}/pruned")
        ...     loaded = load(f"{folder}/pruned", build, example=x)
        >>> torch.equal(loaded(x), result.model(x))
        True
    """
    folder = Path(path)
    hashes = read_manifest(folder)
    for name in (PLAN, WEIGHTS):
        if name not in hashes:
            raise FileRefusedError(
                f"{folder / MANIFEST} records no hash of {name}",
                why="without it nobody can tell whether the file is the one that was written",
                hint="get the folder again",
            )
    require_files(folder, {name: digest for name, digest in hashes.items() if name not in (PLAN, WEIGHTS, BUFFERS)})
    said = load_json(PLAN, within=folder, max_bytes=MAX_BYTES, sha256=hashes[PLAN])
    plan = Plan.from_data(said, str(folder / PLAN), load_beside(said, folder))
    fresh = model if isinstance(model, nn.Module) else model()
    if isinstance(fresh, tuple):  # the command line's factories give an example as well
        fresh, brought = (*fresh, None)[:2]
        example = brought if example is None else example
    if not isinstance(fresh, nn.Module):
        raise RecipeError(f"load() needs a module or a function that returns one, not {type(fresh).__name__}.")
    plan.validate(fresh)
    # Asked of the whole model before a byte of weights is read: what is cut off only makes it less.
    room = WIDEST * sum(tensor.numel() for tensor in fresh.state_dict().values() if isinstance(tensor, Tensor))
    tensors = load_tensors(WEIGHTS, within=folder, sha256=hashes[WEIGHTS], max_bytes=room)
    if example is not None:
        plan.prove(fresh, example)
    plan.replay(fresh)
    fill(fresh, tensors)
    if BUFFERS in hashes:
        room = WIDEST * sum(tensor.numel() for tensor in beside_state(fresh).values())
        fill_buffers(fresh, load_tensors(BUFFERS, within=folder, sha256=hashes[BUFFERS], max_bytes=room + ROOM))
    watch_saving(fresh)
    remember(fresh, plan)  # a second round then saves one folder for the original architecture
    return fresh


def doubt(model: nn.Module) -> str:
    """What is not proved about a model that was loaded here, in words; "" where nothing is open.

    Example:
        >>> doubt(nn.Linear(2, 2))
        ''
    """
    plan = origin_of(model)
    if plan is None or not plan.removes or plan.certificate is not None:
        return ""
    return f"the cut of {plan.model} is {not_proved(plan.recorded)}"


def fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put weights into a model; names and shapes must agree exactly, ties stay tied.

    Raises:
        PlanMismatchError: names the first tensor that is missing, left over, of another shape or no such number.
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
        if _sort(own[name]) != _sort(tensors[name]):
            raise PlanMismatchError(
                f"The tensor {name!r} is {tensors[name].dtype} in the file and {own[name].dtype} in the model."
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].data = tensor.to(own[name].device)


def beside_state(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that a model's state does not hold (`persistent=False`); a constructor may make others.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> layer.register_buffer("scale", torch.ones(1), persistent=False)
        >>> list(beside_state(layer))
        ['scale']
    """
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        for name in sorted(module._non_persistent_buffers_set):
            tensor = module._buffers.get(name)
            plain = tensor is not None and tensor.layout == torch.strided and tensor.dtype in STORED
            if tensor is not None and plain and tensor.device.type != "meta":
                found[f"{path}.{name}" if path else name] = tensor.detach()
    return found


def fill_buffers(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put buffers into a model that its state does not hold; those of the file that it has otherwise are refused.

    Raises:
        PlanMismatchError: names the first that the model lacks, or has in another shape or of other numbers.
    """
    own = beside_state(model)
    for name, tensor in sorted(tensors.items()):
        there = own.get(name)
        if there is None or there.shape != tensor.shape or _sort(there) != _sort(tensor):
            why = "has no such buffer" if there is None else f"has one of {tuple(there.shape)}, {there.dtype}"
            raise PlanMismatchError(
                f"The buffer {name!r} of the file, {tuple(tensor.shape)}, {tensor.dtype}, does not fit.",
                why=f"the model {why}",
                hint="Pass the architecture that the weights were saved from.",
            )
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        buffers = model.get_submodule(path)._buffers
        before = own[name]
        # Another tensor, not another value: what the constructor shares with other models stays theirs.
        buffers[last] = tensor.to(device=before.device, dtype=before.dtype)


def _sort(tensor: Tensor) -> str:
    """Whether a tensor holds fractions, complex numbers or whole ones: a model may change its precision, not this."""
    return "real" if tensor.is_floating_point() else "complex" if tensor.is_complex() else str(tensor.dtype)
