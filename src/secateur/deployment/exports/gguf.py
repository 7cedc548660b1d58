"""A GGUF file for llama.cpp and its kin, of causal language models whose cut shapes they can express.

Three architectures are written: Llama, Mistral without a sliding window (which llama.cpp runs as Llama) and Qwen2. All
of them hold one width for all layers alike there, so what no config can express is refused, and so is everything that
the architecture has no key for: nothing is left out in silence. After writing the file is read back and every tensor
compared.

Source: GGUF specification, version 3 (names of keys and tensors come from the package gguf).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from secateur.deployment.exports.base import EXPORTERS, Exported, Exporter, publish
from secateur.deployment.exports.hugging_face import some_tokens
from secateur.deployment.exports.tokenizer import Vocabulary, vocabulary_of
from secateur.errors import CertificateError, ResourceError, UnsupportedError
from secateur.integrations.transformers import express, is_transformers
from secateur.registry import one_of
from secateur.types import Example

if TYPE_CHECKING:
    from types import ModuleType

    from gguf import GGUFWriter

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
TORCH = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
BLOCK = 32  # numbers that share a scale in Q8_0


class Config(Protocol):
    """What is read of a config of transformers; fields that only some have are asked for by `getattr`."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    vocab_size: int
    rms_norm_eps: float
    hidden_act: str
    tie_word_embeddings: bool


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp knows a class of transformers.

    Args:
        name: in the file.
        interleaved: whether queries and keys lie there with the two numbers that are rotated together side by side;
            transformers keeps them half a head apart.
        free_heads: whether the heads together may be narrower than the hidden size.
    """

    name: str
    interleaved: bool
    free_heads: bool


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", interleaved=True, free_heads=True),
    "MistralForCausalLM": Architecture("llama", interleaved=True, free_heads=True),
    "Qwen2ForCausalLM": Architecture("qwen2", interleaved=False, free_heads=False),
}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_INNER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


@EXPORTERS.register("gguf")
class GgufExporter(Exporter):
    """One file with weights, sizes and the tokenizer.

    Args:
        dtype: "same" (as the model), "float32", "float16", "bfloat16" or "q8_0" (8 bits, a scale per 32 numbers; rows
            that are no multiple of 32 wide stay in float16). Norms and biases are always float32.
    """

    name = "gguf"
    uses = "smaller shapes (heads, neurons, layers, uniform over the layers), with every quantisation of llama.cpp"
    loses = "zeros: it has no sparse type, and stores and multiplies them like other numbers"

    def __init__(self, *, dtype: str = "same") -> None:
        one_of("dtype", dtype, ["same", *DTYPES])
        self.dtype = dtype

    def write(self, model: nn.Module, path: Path, example: Example, *, force: bool) -> Exported:
        """The file, once every tensor was read back."""
        gguf = _package()
        architecture = _architecture(model)
        config = express(model, model, some_tokens(model) if example is None else example)
        if config is None:
            raise _cannot(
                model,
                "no config says these widths: they differ from layer to layer, and GGUF holds one number for all",
                "plan with expressible=True (--expressible)",
            )
        _require_expressible(model, config, architecture)
        dtype = TORCH.get(next(model.parameters()).dtype, "float32") if self.dtype == "same" else self.dtype
        vocabulary = vocabulary_of(model, config.vocab_size)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".gguf-", dir=path.parent) as folder:
            draft = Path(folder) / path.name
            written = list(_arrays(gguf, model, config, architecture, dtype))
            try:
                _write(gguf, draft, config, architecture, vocabulary, written, dtype)
            except OSError as error:
                raise ResourceError(f"{path.name} could not be written", why=str(error)) from error
            _check(gguf, draft, written)
            size = publish(draft, path)
        kept = sum(one.kind == "F16" for one in written) if dtype == "q8_0" else 0
        facts = {
            "architecture": architecture.name, "dtype": dtype, "tensors": len(written), "tokenizer": vocabulary.said,
            **({"left_in_float16": kept} if dtype == "q8_0" else {}),
        }  # fmt: skip
        return Exported(self.name, path, size, "read back, every tensor is the one that was written", facts)


@dataclass(frozen=True)
class Stored:
    """One tensor as it stands in the file: bytes, and how they are to be read."""

    name: str
    data: npt.NDArray[np.generic]
    kind: str


def _package() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise UnsupportedError("GGUF export needs the package gguf", hint="pip install 'secateur[gguf]'") from error
    return gguf


def _cannot(model: nn.Module, why: str, hint: str = "export it as hf, onnx or pt2") -> UnsupportedError:
    return UnsupportedError(f"GGUF cannot express this {type(model).__name__}", why=why, hint=hint)


def _architecture(model: nn.Module) -> Architecture:
    kind = type(model).__name__
    if not is_transformers(model) or kind not in ARCHITECTURES:
        raise _cannot(model, f"only these are written: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[kind]


def _require_expressible(model: nn.Module, config: Config, architecture: Architecture) -> None:
    """Everything in a config that changes what the model computes, and has no key in the file."""
    rope = _rope(config)
    problems = {
        f"the activation {config.hidden_act!r}": config.hidden_act != "silu",
        f"positions of the kind {rope.get('rope_type')!r}": rope.get("rope_type", "default") != "default",
        "positions in a part of each head": rope.get("partial_rotary_factor", 1) not in (None, 1),
        "biases in the attention": bool(getattr(config, "attention_bias", False)),
        "biases in the MLP": bool(getattr(config, "mlp_bias", False)),
        "a sliding window": _slides(config),
        "heads that are together narrower or wider than the hidden size": not architecture.free_heads
        and _head_dim(config) * config.num_attention_heads != config.hidden_size,
        "heads of an odd size": _head_dim(config) % 2 == 1,
    }
    found = [what for what, there in problems.items() if there]
    if found:
        raise _cannot(model, f"there is no key for {found[0]} in the architecture {architecture.name!r}")
    unknown = [name for name in model.state_dict() if _name(name) is None]
    if unknown:
        raise _cannot(model, f"there is no place for the tensor {unknown[0]!r}")


def _slides(config: Config) -> bool:
    """Whether some layer looks back a limited way; a window that is unused, or never full, changes nothing."""
    window = getattr(config, "sliding_window", None)
    if window is None or window >= config.max_position_embeddings:
        return False
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return any(kind != "full_attention" for kind in kinds)
    return bool(getattr(config, "use_sliding_window", True))


def _rope(config: Config) -> dict[str, object]:
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return {"rope_theta": getattr(config, "rope_theta", 10000.0), **found}


def _head_dim(config: Config) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _name(name: str) -> str | None:
    """The tensor's name in the file; None where the file has no place for it."""
    stem, _, last = name.rpartition(".")
    if last not in ("weight", "bias"):
        return None
    if stem in _OUTER:
        return f"{_OUTER[stem]}.{last}"
    parts = stem.split(".", 3)
    if len(parts) == 4 and parts[:2] == ["model", "layers"] and parts[2].isdigit() and parts[3] in _INNER:
        return f"blk.{parts[2]}.{_INNER[parts[3]]}.{last}"
    return None


def _arrays(
    gguf: ModuleType, model: nn.Module, config: Config, architecture: Architecture, dtype: str
) -> Iterator[Stored]:
    tied = bool(config.tie_word_embeddings)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        place = _name(name)
        # A file without an output takes the table of tokens for it.
        if place is None or (tied and place.startswith("output.")):
            continue
        part = place.split(".")[-2]
        if architecture.interleaved and part in heads:
            tensor = interleave(tensor, heads[part])
        yield _stored(gguf, place, tensor, dtype)


def interleave(weight: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys with the two that are rotated together side by side.

    Args:
        weight: (heads * size, ...), the second half of every head's rows belonging to the first.
        heads: how many there are.

    Example:
        >>> interleave(torch.arange(8), 2).tolist()
        [0, 2, 1, 3, 4, 6, 5, 7]
    """
    rest = weight.shape[1:]
    return weight.reshape(heads, 2, -1, *rest).transpose(1, 2).reshape(weight.shape)


def _stored(gguf: ModuleType, name: str, tensor: Tensor, dtype: str) -> Stored:
    plain = tensor.detach().cpu().contiguous()
    if plain.dim() < 2 or dtype == "float32":
        return Stored(name, plain.float().numpy(), "F32")
    if dtype == "bfloat16":
        # numpy has no bfloat16; the writer takes its bytes.
        return Stored(name, plain.bfloat16().view(torch.uint8).numpy(), "BF16")
    if dtype == "q8_0" and plain.shape[-1] % BLOCK == 0:
        kind = gguf.GGMLQuantizationType.Q8_0
        return Stored(name, gguf.quants.quantize(plain.float().numpy(), kind), "Q8_0")
    if float(plain.abs().max()) > torch.finfo(torch.float16).max:
        raise UnsupportedError(f"{name} does not fit into float16", hint="dtype=bfloat16 or float32")
    return Stored(name, plain.half().numpy(), "F16")


def _write(
    gguf: ModuleType,
    path: Path,
    config: Config,
    architecture: Architecture,
    vocabulary: Vocabulary,
    written: list[Stored],
    dtype: str,
) -> None:
    writer = gguf.GGUFWriter(path, architecture.name)
    try:
        writer.add_name("secateur")
        writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES[dtype]))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _sizes(writer, config)
        vocabulary.write(writer)
        for one in written:
            writer.add_tensor(one.name, one.data, raw_dtype=getattr(gguf.GGMLQuantizationType, one.kind))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


_FILE_TYPES = {
    "float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0",
}  # fmt: skip


def _sizes(writer: GGUFWriter, config: Config) -> None:
    """What the architecture reads instead of a config; widths are those of the cut model."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(str(_rope(config)["rope_theta"])))
    writer.add_rope_dimension_count(_head_dim(config))
    # Said even where they follow from the others: after heads were removed they do not.
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_vocab_size(config.vocab_size)


def _check(gguf: ModuleType, path: Path, written: list[Stored]) -> None:
    """Every tensor of the file is the one that was meant: name, type and bytes."""
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for one in written:
        there = found.pop(one.name, None)
        if there is None or there.tensor_type.name != one.kind or there.data.tobytes() != one.data.tobytes():
            raise CertificateError(f"{one.name} is not in the file as it was written", hint="is the disk sound?")
    if found:
        raise CertificateError(f"the file holds {next(iter(found))}, which nobody wrote")
