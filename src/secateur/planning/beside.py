"""The file beside a plan: masks as bits and new weights as the values that stay, in safetensors and not in JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.errors import FileRefusedError
from secateur.files.safe import load_tensors, save_tensors
from secateur.planning.decision import PlanData

LARGEST_INSIDE = 1 << 23  # masked weights that a JSON file holds itself: a megabyte of bits
_MASK, _WEIGHT = "mask.", "weight."


@dataclass(frozen=True)
class Beside:
    """A file of tensors as a plan names it.

    Args:
        file: its name; it lies in the folder of the plan. "" where there is none.
        sha256: of the file, or of the values where there is none.
    """

    file: str
    sha256: str


def save_beside(plan: PlanData, path: Path) -> Beside | None:
    """Write the tensors of a plan that is saved at a path; None where they have room in its JSON.

    Raises:
        ResourceError: the disk is full.
    """
    if not plan.weights and sum(mask.numel() for mask in plan.masks.values()) <= LARGEST_INSIDE:
        return None
    target = path.with_suffix(".safetensors")
    return Beside(target.name, save_tensors(target, packed(plan)))


def load_beside(data: object, folder: Path) -> dict[str, Tensor] | None:
    """The tensors that the JSON of a plan names; None where it names none.

    Raises:
        FileRefusedError: the file is missing, unsafe, or not the one whose hash the plan records.
    """
    named = data.get("tensors") if isinstance(data, Mapping) else None
    if not isinstance(named, Mapping) or not isinstance(named.get("file"), str):
        return None
    if not named["file"] or not isinstance(named.get("sha256"), str):
        raise FileRefusedError("the plan was written without its weights.", hint="Save it with plan.save(path).")
    return load_tensors(named["file"], within=folder, sha256=named["sha256"])


def packed(plan: PlanData) -> dict[str, Tensor]:
    """Masks as bits (row-major, first element in the high bit), new weights as the values that their masks keep."""
    found = {}
    for name, mask in plan.masks.items():
        found[_MASK + name] = torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))
    for name, value in plan.weights.items():
        whole = value.detach().cpu()
        found[_WEIGHT + name] = whole[plan.masks[name].cpu()] if name in plan.masks else whole.contiguous()
    return found


def unpacked(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Masks and new weights out of a file; shapes and counts are those that the plan names.

    Raises:
        ValueError: the file holds something else.
    """
    masks, weights = {}, {}
    for name, said in data["masks"].items():
        shape = said["shape"]
        bits = tensors.get(_MASK + name)
        if bits is None or bits.dtype != torch.uint8 or bits.numel() != -(-prod(shape) // 8):
            raise ValueError(f"the mask of {name!r} is missing or of another size")
        flat = np.unpackbits(bits.numpy())[: prod(shape)].astype(bool)
        if int(flat.sum()) != said["kept"]:
            raise ValueError(f"the mask of {name!r} keeps {int(flat.sum())} elements, not {said['kept']}")
        masks[name] = torch.from_numpy(flat).reshape(shape)
    for name in data["weights"]:
        value = tensors.get(_WEIGHT + name)
        if value is None or not value.is_floating_point():
            raise ValueError(f"the weight {name!r} is missing or no floating-point tensor")
        if name not in masks:
            weights[name] = value
            continue
        if value.numel() != int(masks[name].sum()):
            raise ValueError(f"the weight {name!r} has {value.numel()} values, and its mask keeps another number")
        whole = torch.zeros(masks[name].shape, dtype=value.dtype)
        whole[masks[name]] = value.reshape(-1)
        weights[name] = whole
    return masks, weights


def described(mask: Tensor) -> dict[str, object]:
    """A mask whose bits lie elsewhere."""
    return {"shape": list(mask.shape), "kept": int(mask.sum()), "bits": ""}


def hash_of(plan: PlanData) -> str:
    """SHA-256 of the tensors of a plan, by their names and bytes."""
    digest = sha256()
    for name, value in sorted(packed(plan).items()):
        digest.update(name.encode() + b"\0" + value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
