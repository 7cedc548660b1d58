"""Deployed models on the disk: packed as they run, rebuilt without code from a file."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur.deployment.convolution import SparseConv2d
from secateur.deployment.decisions import Deployment
from secateur.deployment.formats import format_of
from secateur.deployment.linear import SparseLinear
from secateur.deployment.planner import install
from secateur.errors import FileRefusedError, InputError, PlanMismatchError, RecipeError, UnsupportedError
from secateur.files import canonical_json, load_json, load_tensors, publish_dir, save_tensors
from secateur.files.manifest import MANIFEST, read_manifest, require_files
from secateur.loading import PLAN, WEIGHTS, WIDEST, fill
from secateur.planning.decision import PlanData
from secateur.planning.files import MAX_BYTES, to_json
from secateur.planning.plan import Plan

LAYERS, SCHEMA = "deployed.json", 1
_FIELDS = {"format", "rows", "columns", "scale", "bias"}


def save_deployed(
    deployment: Deployment, path: str | Path, *, plan: PlanData | None = None, force: bool = False
) -> Path:
    """Write the folder, whole or not at all.

    It holds deployed.json (the packed layers and their formats), model.safetensors, manifest.json (SHA-256 of every
    file) and, for a model that was cut, plan.json.

    Args:
        deployment: what `deploy` returned.
        path: the folder.
        plan: of the cut; default the one that `deploy` found.
        force: replace an output folder that is there.

    Raises:
        UnsupportedError: the model has packed convolutions.
        FileRefusedError: the folder exists, or is no output folder of secateur.
        ResourceError: the disk is full; nothing is left behind.
    """
    model = deployment.model
    convolutions = [name for name, module in model.named_modules() if isinstance(module, SparseConv2d)]
    if convolutions:
        raise UnsupportedError(
            "packed convolutions are not written yet",
            why=f"{convolutions[0]!a} is one",
            hint="deploy without convolutions=True, or make the model dense by secateur.deployment.densify",
        )
    plan = plan or deployment.plan
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    texts = {
        LAYERS: canonical_json({"schema": SCHEMA, "layers": {name: _record(layer) for name, layer in layers.items()}})
    }
    if plan is not None:
        texts[PLAN] = to_json(plan)
    with publish_dir(path, force=force) as folder:
        hashes = {name: sha256(text.encode()).hexdigest() for name, text in texts.items()}
        for name, text in texts.items():
            (folder / name).write_bytes(text.encode())
        tensors = {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}
        hashes[WEIGHTS] = save_tensors(folder / WEIGHTS, tensors)
        (folder / MANIFEST).write_text(canonical_json(hashes))
    return Path(path)


def _record(layer: SparseLinear) -> dict[str, object]:
    return {
        "format": layer.format, "rows": layer.out_features, "columns": layer.in_features,
        "scale": layer.scale is not None, "bias": layer.bias is not None,
    }  # fmt: skip


def load_deployed(path: str | Path, model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """Load what `save_deployed` wrote; it runs on any machine, fast where the kernels are.

    Args:
        path: the folder.
        model: a freshly built model of the original architecture, or a function that builds one. A module is changed in
            place and returned.

    Raises:
        FileRefusedError: a file is missing, unsafe, damaged, or not the one whose hash the manifest records.
        PlanMismatchError: the layers or the weights belong to another model.
        InputError: packed tensors are not what their format writes.

    Cost: every file is read once; every packed layer is unpacked and packed once, to check it.
    """
    folder = Path(path)
    hashes = read_manifest(folder)
    for name in (LAYERS, WEIGHTS):
        if name not in hashes:
            raise FileRefusedError(f"{folder / MANIFEST} records no hash of {name}", hint="is it a folder of `deploy`?")
    require_files(folder, {name: digest for name, digest in hashes.items() if name not in (PLAN, WEIGHTS, LAYERS)})
    fresh = model() if callable(model) and not isinstance(model, nn.Module) else model
    if not isinstance(fresh, nn.Module):
        raise RecipeError(f"load_deployed() needs a module or a function that returns one, not {type(fresh).__name__}")
    # As much as this model can need at most, so that a file cannot ask for all memory.
    room = WIDEST * sum(tensor.numel() for tensor in fresh.state_dict().values() if isinstance(tensor, Tensor)) + (
        1 << 20
    )
    if PLAN in hashes:
        plan = Plan.from_data(
            load_json(PLAN, within=folder, max_bytes=MAX_BYTES, sha256=hashes[PLAN]), str(folder / PLAN)
        )
        plan.validate(fresh)
        plan.replay(fresh)
    # After the cut: layers and weights are those of the smaller model.
    said = load_json(LAYERS, within=folder, max_bytes=MAX_BYTES, sha256=hashes[LAYERS])
    records = _records(said, folder / LAYERS)
    tensors = load_tensors(WEIGHTS, within=folder, sha256=hashes[WEIGHTS], max_bytes=room)
    install(fresh, {name: _layer(fresh, name, record, tensors) for name, record in records.items()})
    fill(fresh, tensors)
    return fresh


def _records(said: object, origin: Path) -> dict[str, dict[str, object]]:
    layers = said.get("layers") if isinstance(said, dict) and said.get("schema") == SCHEMA else None
    if not isinstance(layers, dict):
        raise FileRefusedError(f"{origin} is refused: it is no list of deployed layers of schema {SCHEMA}")
    for name, record in layers.items():
        if not isinstance(record, dict) or set(record) != _FIELDS:
            raise FileRefusedError(f"{origin} is refused: the layer {name[:80]!a} does not have {sorted(_FIELDS)}")
        numbers = [record["rows"], record["columns"]]
        flags = [record["scale"], record["bias"]]
        if not all(type(each) is int for each in numbers) or not all(type(each) is bool for each in flags):
            raise FileRefusedError(f"{origin} is refused: the layer {name[:80]!a} has values of other types")
        if not isinstance(record["format"], str):
            raise FileRefusedError(f"{origin} is refused: the layer {name[:80]!a} has no name of a format")
    return layers


def _layer(model: nn.Module, name: str, record: dict[str, Any], tensors: dict[str, Tensor]) -> SparseLinear:
    try:
        place = model.get_submodule(name)
    except AttributeError as error:
        raise PlanMismatchError(
            f"The model has no layer {name!a}.", hint="Pass the architecture it was made from."
        ) from error
    shape = (record["rows"], record["columns"])
    if type(place) is not nn.Linear or (place.out_features, place.in_features) != shape:
        raise PlanMismatchError(f"The layer {name!a} is no linear layer of {shape[0]} x {shape[1]}.")
    if (place.bias is not None) != record["bias"]:
        raise PlanMismatchError(f"The layer {name!a} has {'no' if record['bias'] else 'a'} bias in the model.")
    optional = [word for word in ("scale", "bias") if record[word]]
    wanted = [f"{name}.{part}" for part in (*format_of(record["format"]).parts, *optional)]
    missing = [each for each in wanted if each not in tensors]
    if missing:
        raise InputError(
            f"the file has no tensor {missing[0]!a}", why=f"the layer {name!a} is packed as {record['format']}"
        )
    parts = [tensors[f"{name}.{part}"] for part in format_of(record["format"]).parts]
    scale, bias = (tensors.get(f"{name}.{word}") if record[word] else None for word in ("scale", "bias"))
    layer = SparseLinear(record["format"], *shape, parts, scale, bias)
    layer.check()
    return layer
