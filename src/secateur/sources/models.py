"""MODEL words: ``demo:convnet``, ``hf:PATH``, ``py:module:factory``... -> a model and an example input."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import ForwardError, InputError, RecipeError, SecateurError, UnsupportedError
from secateur.model.call import call, to_device
from secateur.model.guard import evaluating
from secateur.model.longest import context_length
from secateur.registry import suggestion
from secateur.sources.data import resolve_data
from secateur.sources.demo import build_convnet, build_lenet
from secateur.sources.gguf import gguf_file, load_gguf
from secateur.sources.hugging_face import check_config, check_folder, class_of
from secateur.sources.in_memory import DataSet
from secateur.sources.prose import NAME as PROSE
from secateur.sources.smollm2 import smollm2_file
from secateur.sources.sparse_bitmask import is_sparse_bitmask, read_sparse_bitmask
from secateur.sources.text import Tokenizer
from secateur.sources.words import call_factory, is_python, which_factory
from secateur.types import Example

DECODED = 12  # tokens of a decoder's example: fewer than the encoder's, so that the two are told apart
MODEL_KINDS = ("demo", "hf", "py", "timm", "torchvision")
SMOLLM2 = "smollm2"
_DEMOS = {"convnet": build_convnet, "lenet": build_lenet}


@dataclass(frozen=True, eq=False)
class Source:
    """A model as a MODEL word gives it.

    Args:
        name: the word.
        model: the module.
        example: an input for `secateur.model.call.call`, or None where the word does not say.
        data: DATA word that fits the model, or "".
        trained: whether the weights are more than a random start.
        tokenizer: tokenizer of an hf: model, or None.
    """

    name: str
    model: nn.Module
    example: Example = None
    data: str = ""
    trained: bool = True
    tokenizer: Tokenizer | None = None

    @property
    def numbers(self) -> dict[str, int] | None:
        """Label -> class number, as the config of an hf: model has it; None where it names no labels."""
        found = getattr(getattr(self.model, "config", None), "label2id", None)
        return dict(found) if isinstance(found, dict) and found else None

    @property
    def longest(self) -> int | None:
        """Tokens at most that an hf: model was made for; None where its config does not say."""
        return context_length(getattr(self.model, "config", None))

    def read(self, word: str, *, seed: int = 0, text: Mapping[str, int | None] | None = None) -> DataSet:
        """The data of a DATA word as this model takes them; see `resolve_data`."""
        return resolve_data(
            word, seed=seed, text=text, tokenizer=self.tokenizer, numbers=self.numbers, longest=self.longest
        )


def resolve_model(word: str, *, seed: int = 0) -> Source:
    """Turn a MODEL word into a model and an example input.

    Args:
        word: ``demo:lenet``, ``demo:convnet``, ``demo:smollm2``, ``hf:PATH_OR_ID``, ``timm:NAME``,
            ``torchvision:NAME``, ``py:package.module:factory`` or ``file.py:factory``, whose ``factory()`` returns
            a model or (model, example).
        seed: of the weights of demo networks and of random example inputs.

    Raises:
        RecipeError: unknown word.
        InputError: the model cannot be loaded, for example as a hub is not reached.
        UnsupportedError: a package is missing; the message says how to install it.
    """
    kind, colon, rest = word.partition(":")
    if kind not in MODEL_KINDS and is_python(word):
        kind, colon, rest = "py", ":", word
    if not colon or not rest or kind not in MODEL_KINDS:
        raise RecipeError(f"unknown model {word!r}", hint=_meant(word, kind if colon else ""))
    if kind == "demo":
        return _demo(word, rest, seed)
    if kind == "py":
        return _from_factory(word, call_factory(rest))
    if kind == "hf":
        return _hugging_face(word, rest, seed)
    if kind == "timm":
        return _timm(word, rest, seed)
    return _torchvision(word, rest, seed)


def _meant(word: str, kind: str) -> str:
    """What a MODEL word that is none may have been: a folder, a module, a known name, another kind."""
    if (Path(word) / "config.json").is_file():
        return f"did you mean hf:{word}?"
    if (Path(word) / "plan.json").is_file():
        return f"{word} is an output folder: MODEL is what it was made from"
    factory = which_factory(word)
    if factory:
        return factory
    listed = f"write KIND:WHAT, with KIND one of {', '.join(MODEL_KINDS)}, or FILE.py:factory"
    if kind:
        rest = word.partition(":")[2].replace("{", "{{").replace("}", "}}")
        return suggestion(kind, MODEL_KINDS, form=f"{{}}:{rest}", otherwise=listed)
    return suggestion(word, _DEMOS, form="demo:{}", otherwise=listed)


def on_device(source: Source, device: str | None) -> Source:
    """The model, and its example, on another device; None leaves them where they are.

    Raises:
        RecipeError: no device of torch, or one that this machine has not.
    """
    if device is None:
        return source
    try:
        torch.zeros(1, device=device)
        model = source.model.to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).strip().splitlines()[0][:200]
        there = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        raise RecipeError(
            f"device {device!r} cannot be used", why=first, hint=f"this machine has: {', '.join(there)}"
        ) from error
    return replace(source, model=model, example=to_device(source.example, torch.device(device)))


def _demo(word: str, name: str, seed: int) -> Source:
    if name == SMOLLM2:
        return replace(_hugging_face(word, str(smollm2_file()), seed), data=PROSE)
    if name not in _DEMOS:
        names = [*_DEMOS, SMOLLM2]
        raise RecipeError(f"there is no demo model {name!r}", hint=suggestion(name, names, form="demo:{}"))
    example = _normal((1, 1, 28, 28), seed)
    return Source(word, _DEMOS[name](seed), example, data="demo:mnist", trained=False)


def _from_factory(word: str, made: object) -> Source:
    model, example = made, None
    # A module is no tuple, so a pair can only be the model and its example.
    if isinstance(made, (tuple, list)) and len(made) == 2:
        model, example = made
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{word} returned a {type(model).__name__}", hint="return a torch module, or (module, example)"
        )
    return Source(word, model, example)


def _normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _package(name: str, word: str, install: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise UnsupportedError(
            f"{word} needs the package {name}", why=str(error), hint=f"pip install {install}"
        ) from error
    except Exception as error:
        # A torchvision built for another torch fails on import with a RuntimeError.
        raise UnsupportedError(
            f"{word} needs the package {name}, whose import fails",
            why=f"{type(error).__name__}: {error}",
            hint=f"install the build that fits torch {torch.__version__}",
        ) from error


def _failed(word: str, error: Exception) -> InputError:
    return InputError(
        f"{word} could not be loaded",
        why=f"{type(error).__name__}: {str(error).strip()[:400]}",
        hint="is the name right and the hub reachable? A local model goes by hf:FOLDER or py:module:factory",
    )


def _hugging_face(word: str, name: str, seed: int) -> Source:
    transformers = _package("transformers", word, "'secateur[hf]'")
    # Without this a mistyped folder is looked for on the hub, for half a minute where there is no network.
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().exists():
        raise InputError(f"there is no folder {name}", hint="hf: takes a local folder, a GGUF file or a hub ID")
    name = str(Path(name).expanduser()) if name.startswith("~") else name
    if Path(name).is_dir():
        check_folder(Path(name))
    packed = gguf_file(Path(name))
    try:
        if packed is not None:
            model, tokenizer = load_gguf(transformers, packed, word)
            return Source(word, model, _hugging_face_example(word, model, seed), tokenizer=tokenizer)
        # The plain text first: transformers acts on some keys while it reads them.
        plain, _ = transformers.PreTrainedConfig.get_config_dict(name, trust_remote_code=False)
        check_config(plain, f"the config of {word}")
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        known = class_of(transformers, config, word)
        if Path(name).is_dir() and is_sparse_bitmask(name):
            model = _from_bitmasks(known, config, name)
        else:
            # Only safetensors: the other weight format is pickle.
            model = known.from_pretrained(name, use_safetensors=True, trust_remote_code=False)
    except SecateurError:
        raise
    except Exception as error:
        raise _failed(word, error) from error
    example = _hugging_face_example(word, model, seed)
    return Source(word, model, example, tokenizer=_tokenizer(transformers, name))


def _from_bitmasks(known: Any, config: Any, name: str) -> nn.Module:
    """A model whose checkpoint has the layout `sparse-bitmask`, which transformers no longer reads."""
    for field in ("quantization_config", "compression_config"):
        vars(config).pop(field, None)  # they name the layout, and only what was left behind could act on it
    tensors = read_sparse_bitmask(name)
    model: nn.Module = known(config)
    lost = model.load_state_dict(tensors, strict=False, assign=True)
    vars(model)["name_or_path"] = vars(config)["_name_or_path"] = name
    known.tie_weights(model)
    own = dict(model.named_parameters())
    lacking = [each for each in lost.missing_keys if each in own]
    if lacking or lost.unexpected_keys:
        what = f"there is no {lacking[0]!a}" if lacking else f"nothing takes {lost.unexpected_keys[0]!a}"
        raise InputError(f"the weights in {name} are not those of {known.__name__}", why=what)
    return model.eval()


def text_of(folder: Path) -> tuple[Tokenizer | None, int | None]:
    """The tokenizer of a local folder, None where it has none, and the tokens at most that its model was made for.

    Raises:
        InputError: there is no such folder.
        FileRefusedError: its files ask for code, or lie.
        UnsupportedError: transformers is missing.
    """
    word = f"hf:{folder}"
    transformers = _package("transformers", word, "'secateur[hf]'")
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}", hint="weights that stay on disk have to be local")
    check_folder(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:
        raise _failed(word, error) from error
    return _tokenizer(transformers, str(folder)), context_length(config)


def _tokenizer(transformers: Any, name: str) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception:
        # Vision models have none, and whoever needs one (text:) says so.
        return None


def _hugging_face_example(word: str, model: Any, seed: int) -> dict[str, Tensor]:
    wanted = getattr(model, "main_input_name", "input_ids")
    config = model.config
    vision = getattr(config, "vision_config", config)
    if wanted == "input_ids":
        text = config.get_text_config()
        generator = torch.Generator().manual_seed(seed)
        found = {"input_ids": torch.randint(0, int(text.vocab_size), (2, 16), generator=generator)}
        # Some decoders make their tokens of the encoder's, others have to be given theirs.
        if getattr(config, "is_encoder_decoder", False) and not _runs(model, found):
            whole = {**found, "decoder_input_ids": found["input_ids"][:, :DECODED]}
            return whole if _runs(model, whole) else found
        return found
    size = getattr(vision, "image_size", None)
    if wanted == "pixel_values" and size is not None:
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        return {"pixel_values": _normal((1, int(getattr(vision, "num_channels", 3)), height, width), seed)}
    raise UnsupportedError(
        f"{word}: no example input is known for a model that takes {wanted!r}",
        hint="write a factory that returns (model, example) and use py:module:factory",
    )


def _runs(model: nn.Module, example: Example) -> bool:
    try:
        with evaluating(model):
            call(model, example)
    except ForwardError:
        return False
    return True


def _timm(word: str, name: str, seed: int) -> Source:
    timm = _package("timm", word, "timm")
    _check_name(word, name, timm.list_models())
    try:
        with _weights_only():
            model = timm.create_model(name, pretrained=True)
    except Exception as error:
        raise _failed(word, error) from error
    size = tuple(int(value) for value in model.pretrained_cfg["input_size"])
    return Source(word, model, _normal((1, *size), seed))


def _torchvision(word: str, name: str, seed: int) -> Source:
    models = _package("torchvision", word, "torchvision").models
    _check_name(word, name, models.list_models())
    try:
        with _weights_only():
            model = models.get_model(name, weights="DEFAULT")
    except Exception as error:
        raise _failed(word, error) from error
    return Source(word, model, _normal((1, 3, 224, 224), seed))


@contextmanager
def _weights_only() -> Iterator[None]:
    """Make every ``torch.load`` in here read weights only: torchvision asks for whole pickles by default."""
    changed = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _check_name(word: str, name: str, known: list[str]) -> None:
    # timm names carry the weights after a dot: resnet18.a1_in1k
    if name.split(".")[0] not in known:
        raise RecipeError(f"there is no model {word}", hint=suggestion(name, known, otherwise="see its list_models()"))
