"""Hugging Face models: find the config that describes a cut model, so that `from_pretrained` builds it natively.

Nothing is known here about any architecture. The integers of the config are edited until a model that is freshly built
from it has exactly the shapes of the cut one; then it must give the same outputs.
"""

from __future__ import annotations

import copy
import logging
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import combinations
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import CertificateError, ForwardError, UnsupportedError
from secateur.model.agreement import agreement
from secateur.model.call import call, device_of, outputs
from secateur.structure.capture import quiet
from secateur.types import Example

Shapes = Mapping[str, tuple[int, ...]]
Field = tuple[str | int, ...]  # attribute names from the config inwards; an int is a place in a list
Edits = dict[Field, int]
SIZE = re.compile(r"size|dim|inner|head|channel|width|depth|layer|expert|n_embd|d_model|d_ff|d_kv")
STEPS = 8  # fields that one search changes at most
TOKENIZER = re.compile(
    r"tokenizer.*\.(json|model)|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|sentencepiece.*\.model|spiece\.model|chat_template\.jinja|(pre)?processor_config\.json|preprocessor_config\.json"
)


def is_transformers(model: nn.Module) -> bool:
    """Whether a model was built from a Hugging Face config and can be built anew from it."""
    config = getattr(model, "config", None)
    return callable(getattr(config, "to_json_string", None)) and callable(getattr(model, "save_pretrained", None))


def express(model: nn.Module, cut: nn.Module, example: Example = None) -> Any | None:
    """The config from which `type(model)(config)` is the cut model, or None where there is none.

    Args:
        model: the original, whole.
        cut: the cut model.
        example: what `secateur.model.call.call` takes: the rebuilt model must give the outputs of the cut one on it.
            Without it all numbers and buffers that the two models hold must agree, which refuses some that would do.

    Returns:
        a new config object, or None: widths that differ from layer to layer, or sizes that no config field sets.

    Cost: one model on the meta device per field that is tried, then one real one and two forward passes.
    """
    if not is_transformers(model):
        return None
    for edits in solutions(model, shapes_of(cut), start=cut.config):
        config = edited(cut.config, edits)
        if is_native(cut, config, example):
            return config
    return None


def solutions(model: nn.Module, wanted: Shapes, *, start: object = None) -> Iterator[Edits]:
    """Edits of integers in the config that give a freshly built model the wanted shapes.

    Shapes alone can be ambiguous (half the heads, or half of every head): all solutions of the last step are given.

    Args:
        model: gives the class.
        wanted: state dict name -> shape.
        start: the config to edit; default that of the model.
    """
    origin = model.config if start is None else start
    edits: Edits = {}
    have = build_shapes(model, origin)
    distance, pairs = _distance(have, wanted)
    if distance == 0:
        yield edits
    if have is None or (_uneven(have, wanted) and not any(isinstance(f[-1], int) for f, _ in fields_of(origin))):
        return
    for _ in range(STEPS if distance else 0):
        options = list(_proposals(edited(origin, edits), pairs))
        best, solved = (distance, pairs, edits), False
        for width in (1, 2):
            for trial in combinations(options, width):
                new = {**edits, **dict(trial)}
                now, left = _distance(build_shapes(model, edited(origin, new)), wanted)
                if now == 0:
                    solved = True
                    yield new
                elif now < best[0]:
                    best = (now, left, new)
            if best[0] < distance and not solved:
                break
        if solved or best[0] >= distance:
            return
        distance, pairs, edits = best


def _distance(have: Shapes | None, wanted: Shapes) -> tuple[float, list[tuple[int, int]]]:
    """How many dimensions and names differ, and which sizes stand against each other, the most frequent first."""
    if have is None:
        return float("inf"), []
    lost = len(set(have) ^ set(wanted))
    pairs = Counter(
        pair
        for name in set(have) & set(wanted)
        for pair in zip(have[name], wanted[name], strict=False)
        if pair[0] != pair[1]
    )
    ranks = sum(len(have[name]) != len(wanted[name]) for name in set(have) & set(wanted))
    counts = Counter(pair for pair in _lengths(have, wanted) if pair[0] != pair[1])
    return lost + ranks + sum(pairs.values()), [pair for pair, _ in (counts + pairs).most_common()]


def _uneven(have: Shapes, wanted: Shapes) -> bool:
    """Whether layers that the config makes alike differ in the cut model: only a list in the config could say that."""
    before: dict[str, set[tuple[int, ...]]] = {}
    after: dict[str, set[tuple[int, ...]]] = {}
    for name in have.keys() & wanted.keys():
        family = re.sub(r"\d+", "#", name)
        before.setdefault(family, set()).add(have[name])
        after.setdefault(family, set()).add(wanted[name])
    return any(len(before[family]) < len(after[family]) for family in before)


def _lengths(have: Shapes, wanted: Shapes) -> Iterator[tuple[int, int]]:
    """Numbers of elements of every numbered container, before and after."""
    before, after = _numbered(have), _numbered(wanted)
    for prefix in before.keys() & after.keys():
        yield len(before[prefix]), len(after[prefix])


def _numbered(shapes: Shapes) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name in shapes:
        parts = name.split(".")
        for i, part in enumerate(parts):
            if part.isdigit():
                found.setdefault(".".join(parts[:i]), set()).add(part)
    return found


def _proposals(config: object, pairs: Sequence[tuple[int, int]]) -> Iterator[tuple[Field, int]]:
    """New values of fields that would turn the sizes found into the wanted ones."""
    seen = set()
    for old, new in pairs:
        for field, value in fields_of(config):
            scaled = scaled_value(field, value, old, new)
            if scaled is not None and scaled != value and (field, scaled) not in seen:
                seen.add((field, scaled))
                yield field, scaled


def scaled_value(field: Field, value: int | None, old: int, new: int) -> int | None:
    """What a field becomes when a size goes from `old` to `new`; None where the two have nothing to do."""
    if value is None:
        return new if any(isinstance(part, str) and SIZE.search(part) for part in field) else None
    if value < 1 or not (value % old == 0 or old % value == 0):
        return None
    return value * new // old if value * new % old == 0 and value * new >= old else None


def fields_of(config: object, prefix: Field = ()) -> Iterator[tuple[Field, int | None]]:
    """Integers of a config and of the configs in it; names that speak of sizes first. None stands for a default."""
    own = sorted(vars(config).items(), key=lambda item: (not SIZE.search(item[0]), item[0]))
    for name, value in own:
        if name.startswith("_") or name.endswith(("_id", "_ids", "_index")):
            continue
        if type(value) is int or (value is None and SIZE.search(name)):
            yield (*prefix, name), value
        elif type(value) in (list, tuple):
            yield from (((*prefix, name, i), item) for i, item in enumerate(value) if type(item) is int)
        elif callable(getattr(value, "to_json_string", None)):
            yield from fields_of(value, (*prefix, name))


def edited(config: object, edits: Mapping[Field, int]) -> object:
    """A copy of a config with some integers changed."""
    result = copy.deepcopy(config)
    for field, value in edits.items():
        target, path = result, list(field)
        if isinstance(path[-1], int):
            place, name = path.pop(), path.pop()
            for part in path:
                target = getattr(target, str(part))
            old = getattr(target, str(name))
            setattr(target, str(name), type(old)(value if i == place else item for i, item in enumerate(old)))
            continue
        for part in path[:-1]:
            target = getattr(target, str(part))
        vars(target)[str(path[-1])] = value
    return result


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of everything in the state dict."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def build_shapes(model: nn.Module, config: Any) -> dict[str, tuple[int, ...]] | None:
    """Shapes of a model freshly built from a config; None where it cannot be built."""
    try:
        with _silent(), torch.device("meta"):
            type(config).from_dict(config.to_dict())  # the checks that from_pretrained will make
            return shapes_of(type(model)(copy.deepcopy(config)))
    except Exception:  # any size may be refused by the architecture's own checks, in its own way
        return None


@contextmanager
def _silent() -> Iterator[None]:
    """No random numbers used up, no warnings of configs that are only tried."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def is_native(cut: nn.Module, config: object, example: Example = None) -> bool:
    """Whether a model that is built from the config and loaded with the weights of `cut` is the same function."""
    try:
        with _silent():
            fresh = type(cut)(copy.deepcopy(config))
            fresh.to(device=device_of(cut))
            for ours, theirs in zip(fresh.parameters(), cut.parameters(), strict=True):
                ours.data = ours.data.to(theirs.dtype)
            fresh.load_state_dict(cut.state_dict(), strict=True)
    except (RuntimeError, ValueError, TypeError, KeyError, ZeroDivisionError):
        return False
    # Small effects can hide in the outputs of an untrained model: scales and tables must agree as well.
    if not _same_numbers(cut, fresh, kinds=(float,) if example is not None else (int, float, bool, str)):
        return False
    if example is None:
        return True
    try:
        with torch.no_grad(), quiet(cut), quiet(fresh):
            agreement(
                [t.detach() for t in outputs(call(cut, example))],
                outputs(call(fresh, example)),
                None,
                method="native",
                differs="is not that of a model built from its config",
                hint="Load it with secateur.load().",
            )
    except (CertificateError, ForwardError):
        return False
    return True


def _same_numbers(cut: nn.Module, fresh: nn.Module, *, kinds: tuple[type, ...]) -> bool:
    if [name for name, _ in cut.named_modules()] != [name for name, _ in fresh.named_modules()]:
        return False
    buffers = dict(fresh.named_buffers())
    if not all(n in buffers and _equal(b, buffers[n]) for n, b in cut.named_buffers()):
        return False
    return all(
        vars(b).get(name) == value
        for a, b in zip(cut.modules(), fresh.modules(), strict=True)
        for name, value in vars(a).items()
        if type(value) in kinds and name != "training" and "drop" not in name
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.equal(a, b))


def loads_again(model: nn.Module) -> bool:
    """Whether a model built from its own config has the shapes of its weights, so that `from_pretrained` can load it.

    Cost: one model on the meta device.
    """
    return build_shapes(model, model.config) == shapes_of(model)


def watch_saving(model: nn.Module) -> None:
    """Let a cut model of transformers refuse `save_pretrained` and `push_to_hub` where nothing could load the result.

    Args:
        model: one that was cut; what is no `PreTrainedModel` (adapters save themselves) is left alone.
    """
    if is_transformers(model) and any(base.__name__ == "PreTrainedModel" for base in type(model).__mro__):
        # Bound, and under the methods' own names: copies then watch themselves, and a pickle falls back to the class.
        for method in (save_pretrained, push_to_hub):
            vars(model)[method.__name__] = MethodType(method, model)


def save_pretrained(self: nn.Module, *args: object, **options: object) -> object:
    """`PreTrainedModel.save_pretrained` of a cut model.

    Raises:
        UnsupportedError: no config describes the widths of this model, so `from_pretrained` could not load the folder.
    """
    _require_loadable(self, "save_pretrained")
    kind: Any = type(self)
    return kind.save_pretrained(self, *args, **options)


def push_to_hub(self: nn.Module, *args: object, **options: object) -> object:
    """`PreTrainedModel.push_to_hub` of a cut model, refused before a repository is made for it.

    Raises:
        UnsupportedError: as for `save_pretrained`.
    """
    _require_loadable(self, "push_to_hub")
    kind: Any = type(self)
    return kind.push_to_hub(self, *args, **options)


def _require_loadable(model: nn.Module, method: str) -> None:
    # A model with adapters writes these alone, and they fit the cut model.
    if getattr(model, "_hf_peft_config_loaded", False) or loads_again(model):
        return
    raise UnsupportedError(
        f"{method} of this {type(model).__name__} would write a folder that from_pretrained cannot load",
        why="its widths or parts are not those of its config, and a config holds one number for all layers alike",
        hint="plan with expressible=True (--expressible); or keep it: result.save(folder), and secateur.load",
    )


def config_files(model: nn.Module, config: Any) -> dict[str, str]:
    """Texts of config.json and, for models that generate, generation_config.json."""
    config = copy.deepcopy(config)
    generation: Any = getattr(model, "generation_config", None)
    config.architectures = [type(model).__name__]
    files = {"config.json": str(config.to_json_string())}
    if callable(getattr(generation, "to_json_string", None)):
        files["generation_config.json"] = str(generation.to_json_string())
    return files


def tokenizer_folder(model: nn.Module) -> Path | None:
    """The local folder that a model was loaded from, where its tokenizer lies as well; None where there is none."""
    source = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    return Path(source) if source and Path(source).is_dir() else None


def copy_tokenizer(model: nn.Module, folder: Path) -> list[str]:
    """Copy tokenizer and processor files from the folder that the model was loaded from; returns their names.

    Only files of the known names are read, and only from a local folder. A link is followed where it stays in the
    folder or leads to the blobs of a hub's cache: any other could bring a private file into a folder that is shared.
    """
    named = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    if named.endswith(".gguf") and Path(named).is_file():
        return _unpacked_tokenizer(Path(named), folder)
    source = tokenizer_folder(model)
    if source is None:
        return []
    names = sorted(f.name for f in source.iterdir() if f.is_file() and TOKENIZER.fullmatch(f.name))
    home = source.resolve()
    inside = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    kept = [name for name in names if any((home / name).resolve().is_relative_to(place) for place in inside)]
    for name in kept:
        shutil.copyfile((home / name).resolve(), folder / name)
    return kept


def _unpacked_tokenizer(source: Path, folder: Path) -> list[str]:
    """Write the tokenizer that a GGUF file holds as the files that transformers reads; returns their names."""
    import transformers

    there = {path.name for path in folder.iterdir()}
    # A file without a vocabulary is a good model all the same.
    with suppress(Exception):
        found = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
        found.save_pretrained(folder)
    return sorted(path.name for path in folder.iterdir() if path.name not in there)
