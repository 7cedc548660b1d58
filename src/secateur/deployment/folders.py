"""Deployed models on the disk, rebuilt without code from a file: packed as they run, or as small as they get.

`runtime` holds the packed layers as the kernels read them, and loading maps the file. `archive` holds dense weights,
coded (`archive.py`), and loading packs them anew. Both give the same model, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Literal, get_args

from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from secateur.deployment.archive import load_archive, save_archive
from secateur.deployment.convolution import ConvolutionRecord
from secateur.deployment.decisions import Deployment
from secateur.deployment.linear import LinearRecord
from secateur.deployment.packed import (
    PackedLayer,
    PackedRecord,
    in_places,
    install,
    joined,
    packed_layers,
    place_of,
    require_absorbed,
)
from secateur.errors import FileRefusedError, PlanMismatchError, RecipeError
from secateur.files import canonical_json, load_json, load_tensors, publish_dir, save_tensors
from secateur.files.manifest import MANIFEST, read_manifest, require_files
from secateur.files.mapped import map_file
from secateur.integrations.transformers import watch_saving
from secateur.loading import PLAN, WEIGHTS, WIDEST, fill
from secateur.planning.decision import PlanData
from secateur.planning.files import MAX_BYTES, to_json
from secateur.planning.history import origin_of, remember
from secateur.planning.plan import Plan
from secateur.registry import one_of

Profile = Literal["runtime", "archive"]
PROFILES: tuple[Profile, ...] = get_args(Profile)
RUNTIME, ARCHIVE = PROFILES
PACKED_WEIGHT = "weight"  # what a packed layer's dense weight is called in an archive
LAYERS, SCHEMA = "deployed.json", 1
_RECORDS: TypeAdapter[dict[str, ConvolutionRecord | LinearRecord]] = TypeAdapter(
    dict[str, ConvolutionRecord | LinearRecord]
)


def save_deployed(
    deployment: Deployment | nn.Module,
    path: str | Path,
    *,
    profile: Profile = RUNTIME,
    plan: PlanData | None = None,
    force: bool = False,
) -> Path:
    """Write the folder, whole or not at all.

    It holds deployed.json (the packed layers and their formats), model.safetensors, manifest.json (SHA-256 of every
    file) and, for a model that was cut, plan.json.

    Args:
        deployment: what `deploy` returned, or any model, with packed layers or without.
        path: the folder.
        profile: "runtime": layers as they run, loaded without a copy; "archive": the smallest file, decoded and packed
            anew by loading. Both lose nothing.
        plan: of the cut; default the one that `deploy` found, or that the model remembers.
        force: replace an output folder that is there.

    Raises:
        UnsupportedError: the model is a part of one that was deployed, and lacks places of modules that its packed
            layers have taken in.
        FileRefusedError: the folder exists, or is no output folder of secateur.
        ResourceError: the disk is full; nothing is left behind.
        RecipeError: an unknown profile.

    Cost: one pass over the weights; an archive some 20 MB/s and thread.
    """
    one_of("profile", profile, PROFILES)
    if isinstance(deployment, nn.Module):
        model, plan = deployment, plan or origin_of(deployment)
    else:
        model, plan = deployment.model, plan or deployment.plan
    require_absorbed(model)
    layers = packed_layers(model)
    listed = {name: layer.record().model_dump() for name, layer in layers.items()}
    texts = {LAYERS: canonical_json({"schema": SCHEMA, "profile": profile, "layers": listed})}
    if plan is not None:
        texts[PLAN] = to_json(plan)
    with publish_dir(path, force=force) as folder:
        hashes = {name: sha256(text.encode()).hexdigest() for name, text in texts.items()}
        for name, text in texts.items():
            (folder / name).write_bytes(text.encode())
        tensors = {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}
        if profile == ARCHIVE:
            hashes[WEIGHTS] = save_archive(folder / WEIGHTS, _dense(tensors, layers))
        else:
            hashes[WEIGHTS] = save_tensors(folder / WEIGHTS, tensors)
        (folder / MANIFEST).write_text(canonical_json(hashes))
    return Path(path)


def _dense(tensors: dict[str, Tensor], layers: dict[str, PackedLayer]) -> dict[str, Tensor]:
    """Packed parts back as one tensor: offsets and padding say nothing that the weight does not, and code badly."""
    found = dict(tensors)
    for name, layer in layers.items():
        for part in layer.record().parts:
            del found[joined(name, part)]
        found[joined(name, PACKED_WEIGHT)] = layer.unpacked
    return found


def load_deployed(path: str | Path, model: nn.Module | Callable[[], nn.Module], *, mapped: bool = True) -> nn.Module:
    """Load what `save_deployed` wrote; it runs on any machine, fast where the kernels are.

    Args:
        path: the folder.
        model: a freshly built model of the original architecture, or a function that builds one. A module is changed in
            place and returned.
        mapped: of the profile "runtime": the tensors are pages of the file and no copy of it. Several processes share
            them, and the file must not be written to in place meanwhile (`secateur.files.mapped`).

    Raises:
        FileRefusedError: a file is missing, unsafe, damaged, or not the one whose hash the manifest records.
        PlanMismatchError: the layers or the weights belong to another model.
        InputError: packed tensors are not what their format writes.

    Cost: every file is read once; every packed layer is unpacked and packed once, to check it. An archive is decoded,
        some 100 MB/s and thread, and packed once.
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
    plan = None
    if PLAN in hashes:
        plan = Plan.from_data(
            load_json(PLAN, within=folder, max_bytes=MAX_BYTES, sha256=hashes[PLAN]), str(folder / PLAN)
        )
        plan.validate(fresh)
        plan.replay(fresh)
    # After the cut: layers and weights are those of the smaller model.
    said = load_json(LAYERS, within=folder, max_bytes=MAX_BYTES, sha256=hashes[LAYERS])
    profile, records = _records(said, folder / LAYERS)
    read = load_archive if profile == ARCHIVE else map_file if mapped else load_tensors
    tensors = read(WEIGHTS, within=folder, sha256=hashes[WEIGHTS], max_bytes=room)
    if profile == ARCHIVE:
        tensors = _packed(tensors, records)
    layers = {name: _layer(fresh, name, record, tensors) for name, record in records.items()}
    _require_once(layers)
    install(fresh, in_places(layers))
    fill(fresh, tensors)
    if plan is not None:
        # Last, as a model is known by its parameters: saved again, the folder is for the first architecture as well.
        remember(fresh, plan)
        watch_saving(fresh)
    return fresh


def _packed(tensors: dict[str, Tensor], records: Mapping[str, PackedRecord]) -> dict[str, Tensor]:
    """Weights of an archive in the formats that its layers run in."""
    found = dict(tensors)
    for name, record in records.items():
        weight = found.pop(joined(name, PACKED_WEIGHT), None)
        if weight is not None:
            found |= {joined(name, part): made for part, made in record.pack(weight).items()}
    return found


def _records(said: object, origin: Path) -> tuple[str, Mapping[str, PackedRecord]]:
    """The profile, and what stands of every packed layer."""
    layers = said.get("layers") if isinstance(said, dict) and said.get("schema") == SCHEMA else None
    if not isinstance(said, dict) or not isinstance(layers, dict):
        raise FileRefusedError(f"{origin} is refused: it is no list of deployed layers of schema {SCHEMA}")
    profile = said.get("profile", RUNTIME)
    if profile not in PROFILES:
        raise FileRefusedError(f"{origin} is refused: the profile {str(profile)[:80]!a} is not known")
    try:
        return profile, _RECORDS.validate_python(layers)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(each)[:80] for each in first["loc"])
        raise FileRefusedError(f"{origin} is refused: a layer is not said as it must be ({where})") from error


def _layer(model: nn.Module, name: str, record: PackedRecord, tensors: dict[str, Tensor]) -> PackedLayer:
    if place_of(model, name) is None:
        raise PlanMismatchError(f"The model has no layer {name!a}.", hint="Pass the architecture it was made from.")
    record.require(model, name)
    return record.layer(name, tensors)


def _require_once(layers: Mapping[str, PackedLayer]) -> None:
    """Refuse a list of which two layers do the work of one module."""
    taken = [name for layer in layers.values() for name in layer.absorbed()]
    for name in taken:
        if taken.count(name) > 1 or name in layers:
            raise PlanMismatchError(f"The module {name!a} is taken in by two layers.")
