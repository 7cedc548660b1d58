"""The planner swaps winners only, says why, undoes what is slower as a whole, and its folders load again."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.deployment import native, planner
from secateur.deployment.contest import Contender, Contest
from secateur.deployment.linear import SparseLinear
from secateur.deployment.lookup import Table, key
from secateur.errors import FileRefusedError, InputError, PlanMismatchError, RecipeError
from secateur.files import canonical_json
from secateur.types import Latency

needs_kernels = pytest.mark.skipif(bool(native.why_not()), reason=native.why_not())


def net() -> nn.Sequential:
    torch.manual_seed(0)
    found = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 80), nn.ReLU(), nn.Linear(80, 5)).eval()
    for layer in found[:3:2]:
        layer.weight.data.masked_fill_(torch.rand_like(layer.weight) < 0.7, 0)
    return found


def ruled(monkeypatch: pytest.MonkeyPatch, ratios: dict[str, float], whole: float = 0.5) -> None:
    """Measurements as told: by format, then by rows; whatever is not told is slow."""

    def told(self: Contest, layer: nn.Linear, found: Sequence[Contender], rows: int) -> dict[str, float]:
        return {one.name: ratios.get(f"{one.format} {rows}", ratios.get(one.format, 2.0)) for one in found}

    one = Latency(1.0, 1.0, 1.0, 9)
    other = Latency(whole, whole, whole, 9, ratio=(whole, whole, whole))
    monkeypatch.setattr(Contest, "ratios", told)
    monkeypatch.setattr(planner, "latency", lambda *_, **__: {"dense": one, "deployed": other})


@needs_kernels
def test_winners_are_swapped_and_the_rest_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    ruled(monkeypatch, {"bitmask": 0.6, "slide16": 0.5})
    model, x = net(), torch.randn(2, 64)
    done = sc.deploy(model, x, table=False)
    assert done.swapped == ("0", "2")
    assert {type(done.model[at]) for at in (0, 2)} == {SparseLinear}
    assert done.model[0].format == "slide16"
    assert type(done.model[4]) is nn.Linear
    assert type(model[0]) is nn.Linear  # the model itself is as it was
    assert torch.allclose(done.model(x), model(x), atol=1e-5)
    assert done.largest_difference < 1e-5
    assert done.size_bytes[1] < done.size_bytes[0]
    assert f"size {done.size_bytes[1] / done.size_bytes[0]:.2f}x" in str(done)
    assert not any(module.training for module in done.model.modules()), "in the mode of the place"
    assert "80 x 96" in str(done)
    assert "0.50x of dense" in str(done)


@needs_kernels
@pytest.mark.parametrize(
    ("ratios", "word"),
    [({}, "2.00x"), ({"bitmask": 0.99}, "0.99x"), ({"bitmask 1": 0.5, "bitmask 8": 1.3}, "too many")],
    ids=["slower", "within the margin", "slower at one batch size"],
)
def test_what_is_not_faster_everywhere_stays_and_why_is_said(
    monkeypatch: pytest.MonkeyPatch, ratios: dict[str, float], word: str
) -> None:
    ruled(monkeypatch, ratios)
    done = sc.deploy(net(), torch.randn(2, 64), batch_sizes=[1, 8], formats=["bitmask"], table=False)
    assert done.swapped == ()
    assert not [module for module in done.model.modules() if isinstance(module, SparseLinear)]
    assert word in done.decisions[0].why
    assert "cache" in done.decisions[0].why
    assert "few" in done.decisions[2].why


@needs_kernels
def test_a_whole_that_is_slower_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    ruled(monkeypatch, {"bitmask": 0.5}, whole=1.01)
    model = net()
    done = sc.deploy(model, torch.randn(2, 64), table=False, inplace=True)
    assert done.swapped == ()
    assert done.model is model
    assert {type(module) for module in model} == {nn.Linear, nn.ReLU}
    assert "undone" in str(done)


@needs_kernels
@pytest.mark.parametrize(
    ("rounds", "swapped"),
    [((0.8, 0.7, 0.99), ("0", "2")), ((0.8, 0.7, 1.0), ()), ((0.8, 0.7, 1.3), ()), (None, ())],
    ids=["nine of ten are faster", "a tenth is not", "a tenth is slower", "rounds are not told"],
)
def test_a_whole_that_is_not_faster_in_nine_of_ten_rounds_is_undone(
    monkeypatch: pytest.MonkeyPatch, rounds: tuple[float, float, float] | None, swapped: tuple[str, ...]
) -> None:
    """The medians say faster in all cases, and at the other batch size all rounds do."""
    ruled(monkeypatch, {"bitmask": 0.5})

    def told(models: object, example: Tensor, **_: object) -> dict[str, Latency]:
        ratio = rounds if len(example) == 3 else (0.5, 0.4, 0.6)
        return {"dense": Latency(1.0, 1.0, 1.0, 9), "deployed": Latency(0.8, 0.8, 0.8, 9, ratio=ratio)}

    monkeypatch.setattr(planner, "latency", told)
    model = net()
    done = sc.deploy(model, torch.randn(2, 64), batch_sizes=[1, 3], table=False)
    assert done.swapped == swapped
    packed = [name for name, module in done.model.named_modules() if isinstance(module, SparseLinear)]
    assert tuple(packed) == swapped
    assert done.note == ("" if swapped else "undone: the whole model is not faster at batch size 3")
    assert (done.size_bytes[0] == done.size_bytes[1]) == (not swapped)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(32, 32)
        self.two = self.one

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu())


@needs_kernels
def test_a_layer_that_stands_in_two_places_stays_in_both(monkeypatch: pytest.MonkeyPatch) -> None:
    ruled(monkeypatch, {"dense": 0.5})
    done = sc.deploy(Twice(), torch.randn(2, 32), weights="int8", table=False)
    assert done.swapped == ()
    assert "shared" in done.decisions[0].why
    assert done.model.one is done.model.two


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(64, 32), nn.Linear(32, 64, bias=False)
        self.head.weight = self.table.weight
        self.idle, self.wide = nn.Linear(32, 32), nn.Linear(32, 32).double()
        self.hooked, self.plain = nn.Linear(32, 32), nn.Linear(32, 32)
        self.hooked.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.plain(self.hooked(self.wide(self.table(x).double()).float())))


@needs_kernels
def test_layers_that_must_not_be_touched_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    ruled(monkeypatch, {"dense": 0.5})
    done = sc.deploy(Odd(), torch.randint(64, (2, 3)), table=False)
    why = {each.name: each.why for each in done.decisions}
    assert done.swapped == ("plain",)
    assert "shared" in why["head"]
    assert "does not call" in why["idle"]
    assert "float64" in why["wide"]
    assert "hooks" in why["hooked"]


class Tied(nn.Module):
    def __init__(self, places: str) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(64, 32), nn.Linear(32, 64, bias=False)
        self.head.weight = self.table.weight
        if places == "another layer":
            self.more = nn.Linear(32, 64, bias=False)
            self.more.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        found = self.head(self.table(x))
        return found + self.more(self.table(x)) if hasattr(self, "more") else found


@needs_kernels
@pytest.mark.parametrize(
    ("places", "options", "swapped"),
    [
        ("a table", {"weights": "bfloat16"}, ("head",)), ("a table", {"weights": "int8"}, ("head",)),
        ("a table", {"weights": "same"}, ()), ("a table", {"weights": "int8", "untie": False}, ()),
        ("another layer", {"weights": "int8"}, ()),
    ],
)  # fmt: skip
def test_only_a_table_is_parted_from_its_layer_and_only_by_a_copy_of_half_its_bytes(
    monkeypatch: pytest.MonkeyPatch, tmp_path, places: str, options: dict, swapped: tuple[str, ...]
) -> None:
    ruled(monkeypatch, {"dense": 0.5})
    model, x = Tied(places).eval(), torch.randint(64, (2, 3))
    done = sc.deploy(model, x, table=False, **options)
    assert done.swapped == swapped
    assert model.head.weight is model.table.weight
    if swapped:
        assert torch.equal(done.model.table.weight, model.table.weight)
        assert done.model.head.size_bytes() <= model.head.weight.numel() * 2
        again = sc.load_deployed(sc.save_deployed(done, tmp_path / "out"), Tied(places)).eval()
        assert torch.equal(again(x), done.model(x))
        assert torch.allclose(again(x), model(x), atol=0.1)


def test_without_kernels_nothing_is_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, native.WITHOUT)
    done = sc.deploy(net(), torch.randn(2, 64), table=False)
    assert done.swapped == ()
    assert "no compiled kernels" in done.decisions[0].why
    assert "nothing was faster" in str(done)


@needs_kernels
def test_rounding_is_done_only_as_far_as_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[torch.dtype] = set()

    def told(self: Contest, layer: nn.Linear, found: Sequence[Contender], rows: int) -> dict[str, float]:
        seen.update(one.dtype for one in found)
        return {one.name: 2.0 for one in found}

    monkeypatch.setattr(Contest, "ratios", told)
    for weights, wanted in (
        ("same", {torch.float32}), ("bfloat16", {torch.float32, torch.bfloat16}),
        ("int8", {torch.float32, torch.bfloat16, torch.int8}),
    ):  # fmt: skip
        seen.clear()
        sc.deploy(net(), torch.randn(2, 64), weights=weights, table=False)
        assert seen == wanted
    with pytest.raises(RecipeError, match="bfloat16"):
        sc.deploy(net(), torch.randn(2, 64), weights="bfloat61")


@needs_kernels
def test_what_was_measured_is_not_measured_again(tmp_path) -> None:
    layer = net()[0]
    found = planner.contenders(layer, [torch.float32], ["bitmask"])
    first = Contest(Table(tmp_path / "layers.json"), cold=1000, rounds=2, bfloat16=False)
    ratios = first.ratios(layer, found, 3)
    assert first.measured == 1
    first.table.save()
    second = Contest(Table(tmp_path / "layers.json"), cold=1000, rounds=2, bfloat16=False)
    assert second.ratios(layer, found, 3) == ratios
    assert second.measured == 0
    second.ratios(layer, found, 4)
    assert second.measured == 1


def test_a_table_that_cannot_be_read_is_empty(tmp_path) -> None:
    (tmp_path / "layers.json").write_text('{"a": "b", "c": 0.5')
    assert Table(tmp_path / "layers.json").get("c") is None
    (tmp_path / "layers.json").write_text(json.dumps({"a": "b", "c": 0.5, "d": -1.0}))
    table = Table(tmp_path / "layers.json")
    assert (table.get("a"), table.get("c"), table.get("d")) == (None, 0.5, None)


def test_the_key_tells_everything_apart() -> None:
    base = dict(shape=(4, 8), dtype=torch.float32, contender="bitmask float32", zeros=0.5, blocks=0.5, rows=1)
    other = dict(shape=(8, 4), dtype=torch.bfloat16, contender="delta float32", zeros=0.6, blocks=0.6, rows=2)
    keys = {key(**{**base, name: value}) for name, value in other.items()} | {key(**base)}  # type: ignore[arg-type]
    assert len(keys) == 7
    assert torch.__version__ in key(**base)  # type: ignore[arg-type]


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path):
    if native.why_not():
        pytest.skip(native.why_not())
    ruled(monkeypatch, {"slide16": 0.5})
    done = sc.deploy(net(), torch.randn(2, 64), weights="int8", table=False)
    assert done.swapped
    return sc.save_deployed(done, tmp_path / "out"), done.model


def test_a_folder_loads_again(folder) -> None:
    path, model = folder
    again = sc.load_deployed(path, net)
    x = torch.randn(7, 64)
    assert torch.equal(again(x), model(x))
    assert [type(each) for each in again] == [type(each) for each in model]


def test_a_folder_for_another_model_or_with_other_layers_is_refused(folder) -> None:
    path, _ = folder
    with pytest.raises(PlanMismatchError):
        sc.load_deployed(path, nn.Sequential(nn.Linear(64, 95)))
    with pytest.raises(RecipeError):
        sc.load_deployed(path, 3)  # type: ignore[arg-type]


def test_a_changed_folder_is_refused(folder) -> None:
    path, _ = folder
    weights = path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(FileRefusedError):
        sc.load_deployed(path, net)
    weights.write_bytes(whole)
    layers = path / "deployed.json"
    layers.write_text(layers.read_text().replace("slide16", "slide32"))
    with pytest.raises(FileRefusedError):
        sc.load_deployed(path, net)


@pytest.mark.parametrize("wild", ["windows", "offsets", "places"])
def test_wild_tensors_with_right_hashes_are_refused(folder, wild: str) -> None:
    path, model = folder
    part = getattr(model[0], wild)
    part.view(-1)[-1] = 119
    done = planner.Deployment(model, (), {}, (1, 1), 0.0, "")
    other = sc.save_deployed(done, path.parent / "other")
    with pytest.raises(InputError):
        sc.load_deployed(other, net)


@pytest.mark.parametrize(
    "said",
    [{}, {"schema": 1, "layers": []}, {"schema": 2, "layers": {}},
     {"schema": 1, "layers": {"0": {"format": "slide16"}}},
     {"schema": 1, "layers": {"0": {"format": 3, "rows": 96, "columns": 64, "scale": True, "bias": True}}},
     {"schema": 1, "layers": {"0": {"format": "slide16", "rows": True, "columns": 64, "scale": True, "bias": True}}}],
)  # fmt: skip
def test_a_malformed_list_of_layers_is_refused(folder, said) -> None:
    from hashlib import sha256

    path, _ = folder
    text = canonical_json(said)
    (path / "deployed.json").write_text(text)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["deployed.json"] = sha256(text.encode()).hexdigest()
    (path / "manifest.json").write_text(canonical_json(manifest))
    with pytest.raises(FileRefusedError):
        sc.load_deployed(path, net)


@needs_kernels
@pytest.mark.slow
def test_a_real_deployment_of_wide_layers_is_faster(tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 2048)).eval()
    for layer in model[::2]:
        layer.weight.data.masked_fill_(torch.rand_like(layer.weight) < 0.9, 0)
    done = sc.deploy(model, torch.randn(1, 2048), table=tmp_path / "table.json")
    assert len(done.swapped) == 2
    assert (tmp_path / "table.json").is_file()
