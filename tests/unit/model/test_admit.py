"""Every kind of model at every entry: taken in, or told in one sentence what it is and what to do instead."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
import torch.ao.quantization as quantization
from torch import nn

import secateur as sc
from secateur.errors import InputError, SecateurError, UnsupportedError
from secateur.model import admit as door
from secateur.model.admit import WrapperWarning, admit, require_copyable

# torch warns that its own quantisation is old.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore:Please use quant_min",
    "ignore:torch.quantize",
    "ignore:must run observer",
    "ignore:TypedStorage",
)
X = torch.randn(2, 8)
MASKS = {"target": {"sparsity": 0.5}, "granularity": "element"}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def complex_net():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that complex modules are new
        return net().to(torch.complex64)


class Int8(nn.Module):
    """What other libraries make: whole numbers and a scale, under a class that nobody knows."""

    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.ones(4, 8, dtype=torch.int8))
        self.register_buffer("scales", torch.ones(4))

    def forward(self, x):
        return x @ (self.qweight * self.scales[:, None]).t()


class Shards(torch.Tensor):
    """A tensor made of tensors, as torchao's and DTensor are."""

    @staticmethod
    def __new__(cls, inside):
        return torch.Tensor._make_wrapper_subclass(cls, inside.shape, dtype=inside.dtype)

    def __init__(self, inside):
        self.inside = inside

    def __tensor_flatten__(self):
        return ["inside"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return Shards(inner["inside"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        unpacked = [a.inside if isinstance(a, Shards) else a for a in args]
        found = func(*unpacked, **(kwargs or {}))
        return Shards(found) if func is torch.ops.aten.detach.default else found


def of(name, place, **bases):
    """A class as a library would define it."""
    return type(name, (bases.get("base", nn.Linear),), {"__module__": place})


def with_dtype(dtype):
    layer = nn.Linear(8, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 8).to(dtype) if dtype.is_floating_point else
                                torch.empty(4, 8, dtype=dtype), requires_grad=False)  # fmt: skip
    return nn.Sequential(layer)


def static():
    model = nn.Sequential(quantization.QuantStub(), nn.Linear(8, 4), quantization.DeQuantStub()).eval()
    model.qconfig = quantization.get_default_qconfig("fbgemm")
    quantization.prepare(model, inplace=True)(X)
    return quantization.convert(model)


def prepared(make, qconfig):
    model = nn.Sequential(quantization.QuantStub(), nn.Linear(8, 4), quantization.DeQuantStub())
    model.qconfig = qconfig("fbgemm")
    return make(model.train(make is quantization.prepare_qat), inplace=False)


def packed():
    layer = nn.Linear(8, 4)
    layer.weight = nn.Parameter(Shards(torch.randn(4, 8)), requires_grad=False)
    return nn.Sequential(layer)


class Locked(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        self[1].gate = threading.Lock()


class Pipe:
    def __init__(self):
        self.model = net()


# kind -> (how to make it, the class of the error, words that its sentence holds, words of what to do)
REFUSED = {
    "class": (lambda: nn.Sequential, InputError, "class Sequential", "make an instance"),
    "state dict": (lambda: net().state_dict(), InputError, "OrderedDict of 4 entries", "load_state_dict"),
    "path": (lambda: "model.pt", InputError, "text 'model.pt'", "load it first"),
    "function": (lambda: lambda x: x, InputError, "function", "wrap it"),
    "pipeline": (Pipe, InputError, "Pipe, which holds one", "pass its module: pipe.model"),
    "nothing": (lambda: None, InputError, "NoneType", "torch.nn.Module"),
    "static": (static, UnsupportedError, "quantised", "prune the float model first"),
    "dynamic": (lambda: quantization.quantize_dynamic(net(), {nn.Linear}), UnsupportedError, "quantised", "first"),
    "bitsandbytes": (lambda: nn.Sequential(of("Linear4bit", "bitsandbytes.nn.modules")(8, 4)), UnsupportedError,
                     "quantised", "prune the float model first"),
    "own int8": (lambda: nn.Sequential(Int8()), UnsupportedError, "int8 beside its scale", "first"),
    "float8": (lambda: with_dtype(torch.float8_e4m3fn), UnsupportedError, "float8_e4m3fn", "bfloat16"),
    "int4": (lambda: with_dtype(torch.int4), UnsupportedError, "int4", "bfloat16"),
    "subclass": (packed, UnsupportedError, "tensor that is made of other tensors", "plain weights"),
    "script": (lambda: torch.jit.script(net()), UnsupportedError, "TorchScript", "original nn.Module"),
    "trace": (lambda: torch.jit.trace(net(), X), UnsupportedError, "TorchScript", "original nn.Module"),
    "script inside": (lambda: nn.Sequential(nn.Linear(8, 8), torch.jit.script(nn.Linear(8, 4))), UnsupportedError,
                      "'1' is a TorchScript", "original nn.Module"),
    "exported": (lambda: torch.export.export(net(), (X,)), UnsupportedError, "exported", "export the result"),
    "exported module": (lambda: torch.export.export(net(), (X,)).module(), UnsupportedError, "exported program",
                        "export the result"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(4)), InputError, "lazy module (LazyLinear)", "model(example)"),
    "sharded": (lambda: of("FullyShardedDataParallel", "torch.distributed.fsdp.api", base=nn.Sequential)(net()),
                UnsupportedError, "sharded over processes", "gather"),
}  # fmt: skip
PREPARED = {
    "qat": lambda: prepared(quantization.prepare_qat, quantization.get_default_qat_qconfig),
    "observed": lambda: prepared(quantization.prepare, quantization.get_default_qconfig),
}
LOOKS = {
    "inspect": lambda model: sc.inspect(model, X),
    "score": sc.score,
    "score with data": lambda model: sc.score(model, X, data=[X]),
    "plan": lambda model: sc.plan(model, X, target={"sparsity": 0.5}),
    "plan of masks": lambda model: sc.plan(model, X, **MASKS),
    "prune": lambda model: sc.prune(model, X, recipe=MASKS),
    "estimate": lambda model: sc.estimate(model, X, recipe=MASKS),
    "advise": lambda model: sc.advise(model, X),
}
APPLIES = {
    "apply": lambda model: sc.plan(net(), X, target={"sparsity": 0.5}).apply(model),
    "mask_model": lambda model: sc.mask_model(model, {}),
    "import_masks": lambda model: sc.import_masks(model),
}
ENTRIES = {**LOOKS, **APPLIES}


def told(entry, model):
    with pytest.raises(SecateurError) as caught:
        ENTRIES[entry](model)
    return caught.value


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_says_what_it_was_given(kind, entry):
    make, error, what, do = REFUSED[kind]
    found = told(entry, make())
    assert type(found) is error
    assert what in f"{found.what} {found.why}"
    assert do in found.hint


@pytest.mark.parametrize("kind", PREPARED)
@pytest.mark.parametrize("entry", [name for name in LOOKS if name != "inspect"])
def test_models_prepared_for_quantisation_are_told_the_right_order(kind, entry):
    found = told(entry, PREPARED[kind]())
    assert isinstance(found, UnsupportedError)
    assert "quantisation" in found.what
    assert "prune the float model first, then prepare" in found.hint


def test_models_prepared_for_quantisation_can_be_looked_at_and_masked():
    model = PREPARED["qat"]()
    model(X)
    assert "prune the float model first" in str(sc.inspect(model, X))
    name = next(n for n, p in model.named_parameters() if p.dim() == 2)
    keep = torch.rand(model.get_parameter(name).shape) > 0.5
    sc.mask_model(model, {name: keep})
    assert torch.equal(model.get_parameter(name) != 0, keep)


def test_a_comparison_asks_at_the_door_too(tmp_path):
    pytest.importorskip("scipy")
    for given, words in ((net().state_dict(), "OrderedDict"), (torch.jit.script(net()), "TorchScript")):
        with pytest.raises(SecateurError, match=words):
            sc.compare(
                given, [X], criteria=["magnitude"], evaluate=lambda _: 1.0, out=tmp_path / "out", levels=[0.5], seeds=1
            )


@pytest.mark.parametrize("make", [net, lambda: torch.fx.symbolic_trace(net()), lambda: net().bfloat16(),
                                  lambda: complex_net()])  # fmt: skip
def test_other_models_come_in_as_they_are(make):
    model = make()
    assert admit(model, copied=True) is model


def test_float_layers_of_the_quantised_packages_are_no_reason():
    model = nn.Sequential(net(), torch.ao.nn.quantized.FloatFunctional(), quantization.QuantStub())
    assert admit(model) is model


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled DataParallel": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_wrappers_are_taken_off_and_that_is_said(kind):
    inside = net()
    with pytest.warns(WrapperWarning, match="wrap it again"):
        plan = sc.plan(WRAPPERS[kind](inside), X, target={"sparsity": 0.5})
    assert plan.to_json() == sc.plan(inside, X, target={"sparsity": 0.5}).to_json()
    with pytest.warns(WrapperWarning):
        cut = plan.apply(WRAPPERS[kind](inside))
    assert type(cut) is nn.Sequential
    with pytest.warns(WrapperWarning):
        result = sc.prune(WRAPPERS[kind](inside), X, recipe=MASKS)
    assert any("wrapped by" in warning for warning in result.report.warnings)


@pytest.fixture
def group():
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available():
        pytest.skip("torch was built without it")
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_distributed_wrappers_are_taken_off_and_guard_what_they_hold():
    inside = net().train()
    wrapped = nn.parallel.DistributedDataParallel(inside)
    with pytest.warns(WrapperWarning, match="DistributedDataParallel"):
        plan = sc.plan(wrapped, X, target={"sparsity": 0.5})
    before = [p.shape for p in inside.parameters()]
    for model in (inside, wrapped):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", WrapperWarning)
            with pytest.raises(UnsupportedError, match="cannot be cut in place") as caught:
                plan.apply(model, inplace=True)
        assert "model.module" in caught.value.hint
    assert [p.shape for p in inside.parameters()] == before
    wrapped(X).sum().backward()
    assert plan.apply(inside)[0].out_features == 8
    del wrapped, model, caught
    plan.apply(inside, inplace=True)
    inside(X).sum().backward()


@pytest.mark.parametrize("entry", ["plan", "prune", "estimate", "apply"])
def test_what_cannot_be_copied_is_named(entry):
    run = ENTRIES[entry]
    if entry in ("prune", "estimate"):
        run = lambda model: getattr(sc, entry)(model, X, recipe={"target": {"sparsity": 0.5}, "recover": []})  # noqa: E731
    with pytest.raises(UnsupportedError, match=r"'1.gate' cannot be copied") as caught:
        run(Locked())
    assert "lock" in caught.value.why
    assert "__deepcopy__" in caught.value.hint


@pytest.mark.parametrize("put", [
    lambda layer, held: setattr(layer, "held", held),
    lambda layer, held: setattr(layer, "held", [1, held]),
    lambda layer, held: setattr(layer, "held", {"a": held}),
    lambda layer, held: layer.register_forward_hook(lambda *_: None).hooks_dict_ref().update({-1: held}),
    lambda layer, held: layer.register_module("inside", Locked()),
])  # fmt: skip
def test_layers_of_torch_are_looked_into_where_they_hold_more_than_values(put):
    model = net()
    put(model[0], threading.Lock())
    with pytest.raises(UnsupportedError, match="cannot be copied"):
        admit(model, copied=True)


def test_what_is_not_copied_need_not_be_copyable():
    model = Locked()
    plan = sc.plan(model, **MASKS)
    plan.apply(model, inplace=True)
    assert int((model[0].weight == 0).sum()) > 0


def test_the_trial_copy_leaves_weights_where_they_are(monkeypatch):
    copies = []
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", lambda self, memo: copies.append(1) or self)
    require_copyable(net())
    assert copies == []


def test_a_door_that_looks_away_is_seen(monkeypatch):
    # The fault that the table above is there to catch: a kind that nobody recognises gets further than the door.
    monkeypatch.setattr(door, "QUANTISED", ())
    model = nn.Sequential(of("Linear4bit", "bitsandbytes.nn.modules")(8, 4))
    assert admit(model) is model


def test_a_default_device_without_values_is_told_so() -> None:
    layer = nn.Linear(2, 1)
    with torch.device("meta"), pytest.raises(UnsupportedError, match="the default device is 'meta'"):
        admit(layer)
    assert admit(layer) is layer
