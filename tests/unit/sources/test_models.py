import os
import sys
import types

import pytest
import torch
from torch import nn

from secateur.errors import InputError, RecipeError, UnsupportedError
from secateur.measure import accuracy, num_params
from secateur.model.call import call
from secateur.sources import build_convnet, resolve_data, resolve_model, train_demo


@pytest.fixture
def cwd(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.startswith("my_model")]:
        monkeypatch.delitem(sys.modules, name)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("my_model")]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["lenet", "convnet"])
def test_demo_models_run_and_depend_on_the_seed_alone(name):
    one, two, other = (resolve_model(f"demo:{name}", seed=seed) for seed in (0, 0, 1))
    first, second = (call(source.model.eval(), source.example) for source in (one, two))
    assert first.shape == (1, 10)
    assert torch.equal(first, second)
    assert not torch.equal(next(one.model.parameters()), next(other.model.parameters()))
    assert one.data == "demo:mnist"
    assert not one.trained
    assert 100_000 < num_params(one.model) < 500_000


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_convnet_learns_real_digits_within_one_pass():
    data = resolve_data("demo:mnist", batch_size=64)
    model = build_convnet()
    losses = train_demo(model, data.train, epochs=1).losses
    assert accuracy(model, data.test) > 0.9
    assert losses[-1] < 0.3 * losses[0]


def test_example_file_is_a_factory(monkeypatch):
    import importlib
    from pathlib import Path

    root = Path(__file__).parents[3]
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "path", list(sys.path))
    importlib.invalidate_caches()
    source = resolve_model("py:examples.lenet:build")
    assert call(source.model, source.example).shape == (1, 10)
    assert source.example.shape == (1, 1, 28, 28)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in source.model.modules())


def test_factory_from_the_current_folder(cwd):
    (cwd / "my_model.py").write_text(
        "import torch\nclass Box:\n    @staticmethod\n    def make():\n        return torch.nn.Linear(2, 3)\n"
    )
    source = resolve_model("py:my_model:Box.make")
    assert source.model.weight.shape == (3, 2)
    assert source.example is None


@pytest.mark.parametrize(
    ("code", "word", "error", "text"),
    [
        ("", "py:my_model_nowhere:build", RecipeError, "no module 'my_model_nowhere'"),
        ("", "py:my_model", RecipeError, "malformed"),
        ("def build(): pass", "py:my_model:built", RecipeError, "it has: build"),
        ("build = 3", "py:my_model:build", RecipeError, "not a function"),
        ("def build(): return 3", "py:my_model:build", InputError, "returned a int"),
        ("def build():\n    return 1 / 0", "py:my_model:build", InputError, r"ZeroDivisionError.*my_model.py:2"),
        ("import nothing_like_it", "py:my_model:build", InputError, "nothing_like_it"),
        ("x = (", "py:my_model:build", InputError, "SyntaxError"),
    ],
)
def test_factories_that_fail(cwd, code, word, error, text):
    (cwd / "my_model.py").write_text(code + "\n")
    with pytest.raises(error, match=text):
        resolve_model(word)


def test_data_factories(cwd):
    (cwd / "my_model.py").write_text(
        "import torch\n"
        "batch = (torch.ones(2, 3), torch.zeros(2))\n"
        "def loaders(): return {'train': [batch], 'test': [batch, batch]}\n"
        "def stream(): return (b for b in [batch])\n"
        "def wrong(): return {'a': 1}\n"
        "def number(): return 3\n"
    )
    data = resolve_data("py:my_model:loaders")
    assert len(data.test) == 2
    assert data.example.shape == (2, 3)
    assert data.calibration is data.train
    with pytest.raises(InputError, match=r"py:my_model:stream .* only once"):
        resolve_data("py:my_model:stream")
    for name in ("wrong", "number"):
        with pytest.raises(InputError):
            resolve_data(f"py:my_model:{name}")


@pytest.mark.parametrize("word", ["lenet", "demo:", "onnx:x", ""])
def test_unknown_words(word):
    with pytest.raises(RecipeError, match="unknown model"):
        resolve_model(word)


def test_unknown_demo_has_a_suggestion():
    with pytest.raises(RecipeError, match="did you mean demo:lenet"):
        resolve_model("demo:lenett")


@pytest.mark.parametrize(
    ("package", "word", "text"),
    [
        ("transformers", "hf:x", r"secateur\[hf\]"),
        ("timm", "timm:resnet18", "pip install timm"),
        ("torchvision", "torchvision:resnet18", "pip install torchvision"),
    ],
)
def test_missing_packages_say_what_to_install(monkeypatch, package, word, text):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UnsupportedError, match=text):
        resolve_model(word)


def fake_package(create):
    models = types.SimpleNamespace(list_models=lambda: ["resnet18"], get_model=create)
    return types.SimpleNamespace(models=models, list_models=models.list_models, create_model=create)


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_zoos_that_are_not_reached_or_know_no_such_model(monkeypatch, package):
    def unreachable(name, **options):
        raise OSError("no network")

    monkeypatch.setitem(sys.modules, package, fake_package(unreachable))
    with pytest.raises(InputError, match="no network"):
        resolve_model(f"{package}:resnet18")
    with pytest.raises(RecipeError, match="did you mean 'resnet18'"):
        resolve_model(f"{package}:resnet8")


class Bomb:
    def __reduce__(self):
        return (sys.exit, ("code of the file was run",))


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_zoo_weights_that_run_code_are_refused(monkeypatch, tmp_path, package):
    torch.save({"weight": Bomb()}, tmp_path / "weights.pth")

    def load(name, **options):
        return torch.load(tmp_path / "weights.pth", weights_only=False)

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setitem(sys.modules, package, fake_package(load))
    with pytest.raises(InputError, match="Weights only load failed"):
        resolve_model(f"{package}:resnet18")
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_zoo_models_bring_an_example(monkeypatch):
    model = nn.Identity()
    model.pretrained_cfg = {"input_size": (3, 32, 32)}
    for package, shape in (("timm", (1, 3, 32, 32)), ("torchvision", (1, 3, 224, 224))):
        monkeypatch.setitem(sys.modules, package, fake_package(lambda name, **options: model))
        source = resolve_model(f"{package}:resnet18")
        assert source.model is model
        assert source.example.shape == shape


def test_hugging_face_models_from_a_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    made = transformers.LlamaForCausalLM(config)
    made.save_pretrained(tmp_path / "llama")
    source = resolve_model(f"hf:{tmp_path / 'llama'}")
    assert type(source.model) is type(made)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), source.model.parameters(), strict=True))
    assert call(source.model, source.example).logits.shape == (2, 16, 31)
    with pytest.raises(InputError, match="there is no folder"):
        resolve_model(f"hf:{tmp_path / 'nothing'}")
    (tmp_path / "llama" / "config.json").write_text("no json")
    with pytest.raises(InputError, match="not plain JSON"):
        resolve_model(f"hf:{tmp_path / 'llama'}")


def test_hugging_face_weights_as_pickle_are_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    torch.save(transformers.LlamaForCausalLM(config).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="safetensors"):
        resolve_model(f"hf:{tmp_path}")


def test_an_encoder_and_decoder_are_given_tokens_each_where_the_decoder_makes_none(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 16, "vocab_size": 40, "decoder_start_token_id": 0}
    t5 = transformers.T5Config(d_kv=8, d_ff=24, num_layers=1, num_heads=2, **sizes)
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    bart = transformers.BartConfig(encoder_layers=1, decoder_layers=1, pad_token_id=1, **heads, **sizes)
    for name, made, keys in (
        ("t5", transformers.T5ForConditionalGeneration(t5), {"input_ids", "decoder_input_ids"}),
        ("bart", transformers.BartForConditionalGeneration(bart), {"input_ids"}),
    ):
        made.save_pretrained(tmp_path / name)
        source = resolve_model(f"hf:{tmp_path / name}")
        assert set(source.example) == keys
        call(source.model, source.example)
