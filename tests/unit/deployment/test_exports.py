"""Every way out: what is written runs there with the same outputs; what a target cannot express is refused by name."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.cli.export import FORMATS
from secateur.deployment import EXPORTERS, SparseLinear, export
from secateur.deployment.exports import gguf as gguf_files
from secateur.deployment.exports.base import publish
from secateur.deployment.exports.checks import compare
from secateur.deployment.packed import packed_layers
from secateur.errors import CertificateError, FileRefusedError, InputError, RecipeError, UnsupportedError
from secateur.files import load_tensors


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(64, 96), nn.BatchNorm1d(96), nn.Linear(96, 5)
        for layer in (self.first, self.last):
            layer.weight.data[torch.rand_like(layer.weight) < 0.6] = 0

    def forward(self, x: Tensor, shift: Tensor) -> dict[str, Tensor]:
        hidden = self.norm(self.first(x)).relu() + shift
        return {"out": self.last(hidden), "hidden": hidden}


def example(size: int = 2) -> dict[str, Tensor]:
    return {"x": torch.randn(size, 64), "shift": torch.randn(size, 96)}


def test_the_command_line_names_every_way_out_and_each_says_what_its_target_can_use() -> None:
    assert sorted(FORMATS) == EXPORTERS.names()
    for name in FORMATS:
        kind = EXPORTERS.find(name)
        assert kind.name == name
        assert "zeros" in kind.uses + kind.loses
        assert "shapes" in kind.uses
        assert kind.writes in ("file", "folder")


@pytest.mark.parametrize("format", ["safetensors", "archive", "pt2"])
def test_what_is_there_stays_unless_it_may_go(format: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("mine")
    with pytest.raises(FileRefusedError, match="exists"):
        export(Net(), path, format=format, example=example())
    assert path.read_text() == "mine"
    folder = EXPORTERS.find(format).writes == "folder"
    other = tmp_path / "other"
    if folder:
        other.write_text("mine")
    else:
        other.mkdir()
    with pytest.raises(FileRefusedError, match="writes a fold" if folder else "writes a file"):
        export(Net(), other, format=format, example=example(), force=True)


def test_unknown_words_and_missing_examples_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="onnx"):
        export(Net(), tmp_path / "m", format="onx")
    with pytest.raises(RecipeError, match="dynamic_batch"):
        export(Net(), tmp_path / "m", format="onnx", dtyp="float32")
    with pytest.raises(RecipeError, match="weights"):
        export(Net(), tmp_path / "m", format="archive", weights="int4")
    with pytest.raises(InputError, match="example"):
        export(Net(), tmp_path / "m", format="pt2")
    assert list(tmp_path.iterdir()) == []


def test_safetensors_of_packed_layers_are_dense(tmp_path: Path) -> None:
    net = Net()
    wanted = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net.first = SparseLinear.of(net.first, "slide16")
    done = export(net, tmp_path / "m")
    found = load_tensors(tmp_path / "m", sha256=str(done.facts["sha256"]))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert isinstance(net.first, SparseLinear)


@pytest.mark.parametrize(
    ("dynamic", "packed"),
    [
        (True, True),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((True, False), (False, True), (False, False))),
    ],
)
def test_programs_run_without_the_code_of_the_model(dynamic: bool, packed: bool, tmp_path: Path) -> None:
    net = Net().train()
    if packed:
        net.first = SparseLinear.of(net.first, "bitmask")
    done = export(net, tmp_path / "m.pt2", format="pt2", example=example(), dynamic_batch=dynamic)
    assert net.training
    assert done.size_bytes == (tmp_path / "m.pt2").stat().st_size
    assert [each.name for each in tmp_path.iterdir()] == ["m.pt2"]
    again = torch.export.load(tmp_path / "m.pt2").module()
    for size in (2, 5, 1) if dynamic else (2,):
        given = example(size)
        with torch.no_grad():
            wanted, found = net.eval()(**given), again(**given)
        assert torch.allclose(found["out"], wanted["out"], atol=1e-5)
        assert torch.allclose(found["hidden"], wanted["hidden"], atol=1e-5)
    if not dynamic:
        with pytest.raises(Exception, match=r"(?i)shape|size|guard"):
            again(**example(3))


def test_programs_that_give_something_else_or_cannot_be_made_leave_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if float(x.sum()) > 0 else x

    with pytest.raises(UnsupportedError, match="Branch"):
        export(Branch(), tmp_path / "m.pt2", format="pt2", example=torch.ones(2, 2))
    read = torch.export.load

    def shifted(path: Path) -> torch.export.ExportedProgram:
        program = read(path)
        program.state_dict["weight"] = nn.Parameter(program.state_dict["weight"] + 1)
        return program

    monkeypatch.setattr(torch.export, "load", shifted)
    with pytest.raises(CertificateError, match="differs"):
        export(nn.Linear(2, 2), tmp_path / "m.pt2", format="pt2", example=torch.ones(2, 2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("found", [[float("nan"), 4.0], [1.0, 4.0005], [float("inf"), 4.0], [[1.0, 4.0]]], ids=str)
def test_outputs_of_another_runtime_that_differ_or_are_no_numbers_are_refused(found: list[float]) -> None:
    wanted = torch.tensor([1.0, 4.0])
    assert compare([wanted + 3e-4], [wanted], 1e-4, runtime="there") == pytest.approx((3e-4, 4e-4), rel=0.01)
    with pytest.raises(CertificateError, match="there"):
        compare([torch.tensor(found)], [wanted], 1e-4, runtime="there")


def test_a_file_appears_after_what_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "draft").mkdir()
    for name in ("a.data", "m.onnx", "z.data"):
        (tmp_path / "draft" / name).write_bytes(b"123")
    order, move = [], Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: (order.append(self.name), move(self, to))[1])
    assert publish(tmp_path / "draft" / "m.onnx", tmp_path / "m.onnx") == 9
    assert order == ["a.data", "z.data", "m.onnx"]


def test_a_weight_that_two_layers_have_is_not_packed_twice(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 64))
        net[2].weight = net[0].weight
        return net

    export(tied(), tmp_path / "a", format="archive", weights="int8")
    again = sc.load_deployed(tmp_path / "a", tied)
    assert list(packed_layers(again)) == ["3"]
    assert again[0].weight is again[2].weight


@pytest.mark.parametrize("weights", ["same", "bfloat16", "int8"])
def test_archives_are_smaller_and_load_again(weights: str, tmp_path: Path) -> None:
    net, given = Net().eval(), example()
    done = export(net, tmp_path / "a", format="archive", weights=weights)
    again = sc.load_deployed(tmp_path / "a", Net).eval()
    assert done.facts["times_smaller"] > {"same": 1.4, "bfloat16": 2.5, "int8": 2.5}[weights]
    if weights == "bfloat16":
        assert {tensor.dtype for tensor in again.parameters()} == {torch.bfloat16}
        given = {name: tensor.bfloat16() for name, tensor in given.items()}
    assert bool(packed_layers(again)) == (weights == "int8")
    with torch.no_grad():
        wanted, found = net(**{name: t.float() for name, t in given.items()})["out"], again(**given)["out"].float()
    room = {"same": 0.0, "bfloat16": 0.05, "int8": 0.02}[weights] * float(wanted.abs().max())
    assert float((wanted - found).abs().max()) <= room


transformers = pytest.importorskip("transformers")
SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def language_model(kind: str = "Llama", **changed: object) -> nn.Module:
    torch.manual_seed(0)
    cls = getattr(transformers, f"{kind}ForCausalLM")
    model = cls(cls.config_class(**{**SIZES, **changed})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2).add_(0.05 * torch.randn_like(parameter))
    return model


IDS = torch.arange(14).reshape(2, 7) * 5 + 3


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def cut(kind: str, granularity: str) -> nn.Module:
    model = language_model(kind)
    plan = sc.plan(model, {"input_ids": IDS}, granularity=granularity, target={"sparsity": 0.5}, expressible=True)
    return plan.apply(model)


SLOW = [("Llama", "neuron"), ("Llama", "head"), ("Llama", "layer"), ("Qwen2", "neuron"), ("Mistral", "neuron")]


def same_from_gguf(model: nn.Module, folder: Path) -> None:
    export(model, folder / "m.gguf", format="gguf")
    again = type(model).from_pretrained(folder, gguf_file="m.gguf").eval()
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())
    wanted = logits(model)
    assert torch.allclose(logits(again), wanted, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "granularity"), SLOW)
def test_cut_models_come_back_from_gguf_with_equal_outputs(kind: str, granularity: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model = cut(kind, granularity)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in language_model(kind).parameters())
    same_from_gguf(model, tmp_path)


# As cuts leave them: fewer heads than the hidden size would hold, one head of keys, widths that nobody would choose.
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("Llama", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 37}),
        ("Llama", {"hidden_size": 52, "head_dim": 6, "tie_word_embeddings": True, "num_hidden_layers": 1}),
        ("Mistral", {"num_attention_heads": 2, "head_dim": 16, "sliding_window": None, "rms_norm_eps": 1e-3}),
        ("Qwen2", {"intermediate_size": 41, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    ],
)
def test_widths_of_cut_models_come_back_from_gguf_with_equal_outputs(
    kind: str, sizes: dict[str, object], tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    same_from_gguf(language_model(kind, **sizes), tmp_path)


@pytest.mark.parametrize(("dtype", "room"), [("float16", 0.01), ("bfloat16", 0.05), ("q8_0", 0.1)])
@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_rounding_is_that_of_the_type_asked_for(dtype: str, room: float, tied: bool, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    model = language_model(tie_word_embeddings=tied)
    export(model, tmp_path / "m.gguf", format="gguf", dtype=dtype)
    again = type(model).from_pretrained(tmp_path, gguf_file="m.gguf").eval()
    wanted = logits(model)
    assert 0 < float((logits(again) - wanted).abs().max()) <= room * float(wanted.abs().max())
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert ("output.weight" in kinds) != tied
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["blk.0.ffn_up.weight"] == {"float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[dtype]


REFUSED = {
    "class": (lambda: nn.Linear(2, 2), "LlamaForCausalLM"),
    "other architecture": (lambda: language_model("Gemma", head_dim=16), "LlamaForCausalLM"),
    "attention bias": (lambda: language_model(attention_bias=True), "biases in the attention"),
    "mlp bias": (lambda: language_model(mlp_bias=True), "biases in the MLP"),
    "rope": (
        lambda: language_model(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}), "linear",
    ),
    "activation": (lambda: language_model(hidden_act="gelu"), "gelu"),
    "window": (lambda: language_model("Mistral", sliding_window=4), "sliding window"),
    "narrow heads": (lambda: language_model("Qwen2", num_attention_heads=2, head_dim=16), "narrower"),
    "uneven widths": (lambda: uneven(), "layer to layer"),
}  # fmt: skip


def uneven() -> nn.Module:
    model = language_model()
    mlp = model.model.layers[0].mlp
    for name in ("gate_proj", "up_proj"):
        getattr(mlp, name).weight = nn.Parameter(getattr(mlp, name).weight[:50].clone())
    mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight[:, :50].clone())
    return model


@pytest.mark.parametrize("name", REFUSED)
def test_what_gguf_has_no_key_for_is_refused_by_name(name: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    make, said = REFUSED[name]
    with pytest.raises(UnsupportedError, match=said):
        export(make(), tmp_path / "m.gguf", format="gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["other bytes", "one too few", "one too many"])
def test_a_gguf_file_that_reads_back_otherwise_is_not_published(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    write = gguf_files._write

    def damaged(*given: object) -> None:
        *before, written, dtype = given
        first, *rest = written  # type: ignore[misc]
        wrong = {
            "other bytes": [replace(first, data=first.data + 1), *rest],
            "one too few": rest,
            "one too many": [*written, replace(first, name="more")],  # type: ignore[misc]
        }
        write(*before, wrong[damage], dtype)  # type: ignore[arg-type]

    monkeypatch.setattr(gguf_files, "_write", damaged)
    with pytest.raises(CertificateError):
        export(language_model(), tmp_path / "m.gguf", format="gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model = language_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = -1e6
    with pytest.raises(UnsupportedError, match="float16"):
        export(model, tmp_path / "m.gguf", format="gguf", dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_without_its_package_gguf_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UnsupportedError, match=r"secateur\[gguf\]"):
        export(language_model(), tmp_path / "m.gguf", format="gguf")


def test_the_tokenizer_goes_along_where_llama_cpp_has_its_rules(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    tokenizers = pytest.importorskip("tokenizers")
    home = tmp_path / "home"
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<s>", "</s>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(["the cut of the rose", "the rose of the garden"] * 3, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{{ messages }}"
    model = language_model(vocab_size=300)
    model.save_pretrained(home)
    fast.save_pretrained(home)
    model = type(model).from_pretrained(home)
    done = export(model, tmp_path / "m.gguf", format="gguf")
    assert "gpt-2" in str(done.facts["tokenizer"])
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == fast.eos_token_id
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 300
    again = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in ("the rose", "a garden of cuts\n  42", "<s>the</s>"):
        assert again(text, add_special_tokens=False).input_ids == fast(text, add_special_tokens=False).input_ids

    # Other rules: no tokenizer is better than one that is nearly right.
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(home / "tokenizer.json"))
    assert str(export(model, tmp_path / "n.gguf", format="gguf").facts["tokenizer"]).startswith("none")


def test_folders_for_from_pretrained(tmp_path: Path) -> None:
    model = language_model(num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=37)
    export(model, tmp_path / "h", format="hf", example={"input_ids": IDS})
    again = type(model).from_pretrained(tmp_path / "h").eval()
    assert torch.equal(logits(again), logits(model))
    assert "from_pretrained" in (tmp_path / "h" / "README.md").read_text()
    with pytest.raises(UnsupportedError, match="config"):
        export(uneven(), tmp_path / "u", format="hf")
    with pytest.raises(UnsupportedError, match="no model of transformers"):
        export(Net(), tmp_path / "n", format="hf")
    assert not (tmp_path / "u").exists()


@pytest.mark.slow
def test_language_models_go_to_programs(tmp_path: Path) -> None:
    model = cut("Llama", "neuron")
    model.config.use_cache = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export(model, tmp_path / "m.pt2", format="pt2", example={"input_ids": IDS})
        again = torch.export.load(tmp_path / "m.pt2").module()
    assert np.allclose(again(input_ids=IDS).logits.detach(), logits(model), atol=1e-5)
