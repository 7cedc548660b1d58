"""Checkpoints of masks and numbers, written here by numpy alone, come in as the dense weights that they stand for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from secateur.errors import FileRefusedError, InputError
from secateur.sources import resolve_model
from secateur.sources.sparse_bitmask import is_sparse_bitmask, read_sparse_bitmask


def packed(name: str, dense: np.ndarray) -> dict[str, np.ndarray]:
    """The layout, bit by bit and independent of any packing function."""
    rows, columns = dense.shape
    mask = np.zeros((rows, (columns + 7) // 8), np.uint8)
    values, starts = [], []
    for row in range(rows):
        starts.append(len(values))
        for column in range(columns):
            if dense[row, column] != 0:
                mask[row, column // 8] |= 1 << (column % 8)
                values.append(dense[row, column])
    return {
        f"{name}.shape": np.array(dense.shape, np.int64), f"{name}.compressed": np.array(values, dense.dtype),
        f"{name}.bitmask": mask, f"{name}.row_offsets": np.array(starts, np.int64),
    }  # fmt: skip


def thinned(rows: int, columns: int, share: float, seed: int = 0, dtype: type = np.float32) -> np.ndarray:
    chance = np.random.default_rng(seed)
    return (chance.normal(size=(rows, columns)) * (chance.random((rows, columns)) < share)).astype(dtype)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 19), st.sampled_from([0.0, 0.4, 1.0]), st.sampled_from([np.float32, np.float16])
)
def test_any_shape_and_share_comes_back(rows: int, columns: int, share: float, dtype: type) -> None:
    import tempfile

    dense = thinned(rows, columns, share, rows * 31 + columns, dtype)
    with tempfile.TemporaryDirectory() as folder:
        save_file(packed("a.weight", dense), f"{folder}/model.safetensors")
        found = read_sparse_bitmask(folder)
    assert list(found) == ["a.weight"]
    assert np.array_equal(found["a.weight"].numpy(), dense)
    assert found["a.weight"].numpy().dtype == dense.dtype


def test_shards_and_dense_tensors_go_together(tmp_path: Path) -> None:
    first, second, bias = thinned(3, 9, 0.5), thinned(4, 8, 0.3, 1), np.arange(3, dtype=np.float32)
    save_file({**packed("x.weight", first), "x.bias": bias}, tmp_path / "model-1.safetensors")
    save_file(packed("y.weight", second), tmp_path / "model-2.safetensors")
    found = read_sparse_bitmask(tmp_path)
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        "x.bias": bias.tolist(), "x.weight": first.tolist(), "y.weight": second.tolist(),
    }  # fmt: skip
    save_file(packed("y.weight", second), tmp_path / "model-3.safetensors")
    with pytest.raises(FileRefusedError, match="another file"):
        read_sparse_bitmask(tmp_path)


BROKEN = {
    "numbers": ("compressed", lambda v: v[:-1], "counts"),
    "mask": ("bitmask", lambda v: v ^ np.array([[1] + [0] * (v.shape[1] - 1)] * len(v), np.uint8), "counts|offsets"),
    "mask beyond the row": ("bitmask", lambda v: v | np.array([[0] * (v.shape[1] - 1) + [128]], np.uint8), "behind"),
    "mask of another size": ("bitmask", lambda v: v[:-1], "shape"),
    "offsets": ("row_offsets", lambda v: v[::-1].copy(), "offsets"),
    "shape": ("shape", lambda v: v * 1_000_000, "shape"),
    "negative shape": ("shape", lambda v: -v, "shapes"),
    "no numbers": ("compressed", None, "compressed"),
    "no shape": ("shape", None, "shape"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_parts_that_do_not_fit_are_refused(name: str, tmp_path: Path) -> None:
    part, change, said = BROKEN[name]
    tensors = packed("w", thinned(4, 12, 0.5))
    old = tensors.pop(f"w.{part}")
    if change is not None:
        tensors[f"w.{part}"] = change(old)
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(FileRefusedError, match=said):
        read_sparse_bitmask(tmp_path)


def test_quantised_ones_are_refused(tmp_path: Path) -> None:
    tensors = packed("w.weight", thinned(4, 12, 0.5)) | {"w.weight_scale": np.ones(4, np.float32)}
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(FileRefusedError, match="quantised"):
        read_sparse_bitmask(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_of_such_a_folder_is_the_model(tmp_path: Path, tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=2, max_position_embeddings=32, tie_word_embeddings=tied
    )
    model = transformers.LlamaForCausalLM(config).eval()
    stored = {}
    for name, tensor in model.state_dict().items():
        if "_proj" in name:
            tensor.masked_fill_(tensor.abs() < tensor.abs().median(), 0)
            stored |= packed(name, tensor.numpy())
        elif not (tied and name == "lm_head.weight"):
            stored[name] = tensor.numpy()
    save_file(stored, tmp_path / "model.safetensors")
    said = json.loads(config.to_json_string())
    said |= {
        "architectures": ["LlamaForCausalLM"],
        "quantization_config": {
            "quant_method": "compressed-tensors", "format": "dense",
            "sparsity_config": {"format": "sparse-bitmask", "global_sparsity": 40.0},
        },
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(said))
    assert is_sparse_bitmask(tmp_path)
    source = resolve_model(f"hf:{tmp_path}")
    ids = torch.arange(10).reshape(2, 5)
    with torch.no_grad():
        assert torch.equal(source.model(ids).logits, model(ids).logits)
    assert (source.model.lm_head.weight is source.model.model.embed_tokens.weight) == tied
    del stored["model.norm.weight"]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.norm"):
        resolve_model(f"hf:{tmp_path}")
