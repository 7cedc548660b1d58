"""Models in GGUF files, read by transformers and made ordinary: whole weights, no trace of the packed ones."""

from __future__ import annotations

from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from secateur.errors import InputError, UnsupportedError
from secateur.files.gguf import check_gguf

ENDING = ".gguf"
NEEDED = ("gguf", "accelerate")
# What transformers leaves on a model that it has unpacked: with it the folder would be saved as a packed one.
TRACES = ("quantization_config", "_pre_quantization_dtype")


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that a path means: itself, or the only one of a folder without other weights; None = none.

    Raises:
        InputError: a folder holds several.
    """
    if path.suffix == ENDING and path.is_file():
        return path
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return None
    found = sorted(path.glob(f"*{ENDING}"))
    if len(found) > 1:
        raise InputError(f"{path} holds {len(found)} GGUF files", hint=f"name one of them: hf:{found[0]}, for example")
    return found[0] if found else None


def load_gguf(transformers: Any, path: Path, word: str) -> tuple[nn.Module, Any]:
    """A causal language model from a GGUF file, in float32, and its tokenizer (None where the file brings none).

    Args:
        transformers: the library.
        path: the file.
        word: the MODEL word, for messages.

    Raises:
        UnsupportedError: a package is missing.
        FileRefusedError: the file is another kind, or lies about its size.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UnsupportedError(
            f"{word} is a GGUF file, and reading it needs {' and '.join(missing)}",
            hint="pip install 'secateur[gguf]'",
        )
    check_gguf(path)
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name, "trust_remote_code": False}
    packed = getattr(transformers, "GgufConfig", None)
    # Newer versions keep weights packed unless they are told otherwise; older ones know no such setting.
    unpack = {} if packed is None else {"quantization_config": packed(dequantize=True)}
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, **unpack).float()
    for name in TRACES:
        if hasattr(model.config, name):
            delattr(model.config, name)
    # What is saved later looks here for the tokenizer; configs do not write it down.
    model.config._name_or_path = str(path)
    model.hf_quantizer, model.is_quantized = None, False
    tokenizer = None
    with suppress(Exception):
        # Files without a vocabulary are good models all the same, and whoever needs a tokenizer says so.
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    return model, tokenizer
