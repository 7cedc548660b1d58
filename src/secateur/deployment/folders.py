"""Deployed models on the disk, rebuilt without code from a file: packed as they run, or as small as they get.

`runtime` holds the packed layers as the kernels read them, and loading maps the file. `archive` holds dense weights,
coded (`archive.py`), and loading packs them anew. Both give the same model, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Literal, TypedDict, get_args

from torch import Tensor, nn

from secateur.deployment.archive import load_archive, save_archive
from secateur.deployment.convolution import SparseConv2d
from secateur.deployment.decisions import Deployment
from secateur.deployment.formats import format_of
from secateur.deployment.linear import SparseLinear
from secateur.deployment.planner import install
from secateur.errors import FileRefusedError, InputError, PlanMismatchError, RecipeError, UnsupportedError
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


class PackedRecord(TypedDict):
    """What deployed.json says of a packed layer."""

    format: str
    rows: int
    columns: int
    scale: bool
    bias: bool


_FIELDS = set(PackedRecord.__annotations__)


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
        UnsupportedError: the model has packed convolutions.
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
    convolutions = [name for name, module in model.named_modules() if isinstance(module, SparseConv2d)]
    if convolutions:
        raise UnsupportedError(
            "packed convolutions are not written yet",
            why=f"{convolutions[0]!a} is one",
            hint="deploy without convolutions=True, or make the model dense by secateur.deployment.densify",
        )
    layers = packed_layers(model)
    listed = {name: _record(layer) for name, layer in layers.items()}
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


def packed_layers(model: nn.Module) -> dict[str, SparseLinear]:
    """The packed layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def _dense(tensors: dict[str, Tensor], layers: dict[str, SparseLinear]) -> dict[str, Tensor]:
    """Packed parts back as matrices: offsets and padding say nothing that the matrix does not, and code badly."""
    found = dict(tensors)
    for name, layer in layers.items():
        layout = format_of(layer.format)
        parts = [found.pop(_at(name, part)) for part in layout.parts]
        found[_at(name, PACKED_WEIGHT)] = layout.unpack(parts, layer.out_features, layer.in_features)
    return found


def _at(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part


def _record(layer: SparseLinear) -> PackedRecord:
    return {
        "format": layer.format, "rows": layer.out_features, "columns": layer.in_features,
        "scale": layer.scale is not None, "bias": layer.bias is not None,
    }  # fmt: skip


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
    install(fresh, {name: _layer(fresh, name, record, tensors) for name, record in records.items()})
    fill(fresh, tensors)
    if plan is not None:
        # Last, as a model is known by its parameters: saved again, the folder is for the first architecture as well.
        remember(fresh, plan)
        watch_saving(fresh)
    return fresh


def _packed(tensors: dict[str, Tensor], records: dict[str, PackedRecord]) -> dict[str, Tensor]:
    """Matrices of an archive in the formats that its layers run in."""
    found = dict(tensors)
    for name, record in records.items():
        weight = found.pop(_at(name, PACKED_WEIGHT), None)
        if weight is not None:
            layout = format_of(record["format"])
            found |= {_at(name, part): made for part, made in zip(layout.parts, layout.pack(weight), strict=True)}
    return found


def _records(said: object, origin: Path) -> tuple[str, dict[str, PackedRecord]]:
    """The profile, and what stands of every packed layer."""
    layers = said.get("layers") if isinstance(said, dict) and said.get("schema") == SCHEMA else None
    if not isinstance(said, dict) or not isinstance(layers, dict):
        raise FileRefusedError(f"{origin} is refused: it is no list of deployed layers of schema {SCHEMA}")
    profile = said.get("profile", RUNTIME)
    if profile not in PROFILES:
        raise FileRefusedError(f"{origin} is refused: the profile {str(profile)[:80]!a} is not known")
    for name, record in layers.items():
        _require_record(name, record, origin)
    return profile, layers


def _require_record(name: str, record: object, origin: Path) -> None:
    if not isinstance(record, dict) or set(record) != _FIELDS:
        raise FileRefusedError(f"{origin} is refused: the layer {name[:80]!a} does not have {sorted(_FIELDS)}")
    numbers, flags = [record["rows"], record["columns"]], [record["scale"], record["bias"]]
    if not all(type(each) is int for each in numbers) or not all(type(each) is bool for each in flags):
        raise FileRefusedError(f"{origin} is refused: the layer {name[:80]!a} has values of other types")
    if not isinstance(record["format"], str):
        raise FileRefusedError(f"{origin} is refused: the layer {name[:80]!a} has no name of a format")


def _layer(model: nn.Module, name: str, record: PackedRecord, tensors: dict[str, Tensor]) -> SparseLinear:
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
    wanted = [_at(name, part) for part in (*format_of(record["format"]).parts, *optional)]
    missing = [each for each in wanted if each not in tensors]
    if missing:
        raise InputError(
            f"the file has no tensor {missing[0]!a}", why=f"the layer {name!a} is packed as {record['format']}"
        )
    parts = [tensors[_at(name, part)] for part in format_of(record["format"]).parts]
    scale, bias = (tensors.get(_at(name, word)) if record[word] else None for word in ("scale", "bias"))
    layer = SparseLinear(record["format"], *shape, parts, scale, bias)
    layer.check()
    return layer
