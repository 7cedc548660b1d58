"""Models that are unusual Python objects, and settings around the calls: the original stays, and the cut is right."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.errors import SecateurError

from .harness import snapshot
from .references import Kept, zeroed
from .test_usages import Convnet, Former, Mlp, applied, data, equal, in_words, pair, planned, seeded, steps

OBJECTS: dict[str, Callable[[], nn.Module]] = {}


def made(build: Any) -> Any:
    OBJECTS[build.__name__] = build
    return build


@made
class SharesWhenCopied(Mlp):
    """A copy keeps the very same first layer, as wrappers of frozen backbones do."""

    def __deepcopy__(self, memo: Any) -> SharesWhenCopied:
        new = type(self)()
        new.fc1 = self.fc1
        new.fc2.load_state_dict(self.fc2.state_dict())
        new.fc3.load_state_dict(self.fc3.state_dict())
        return new.train(self.training)


@made
class CopiesToItself(Mlp):
    """A copy is the model itself."""

    def __deepcopy__(self, memo: Any) -> CopiesToItself:
        return self


class Holder:
    """Copies by reference."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __deepcopy__(self, memo: Any) -> Holder:
        return self


@made
class HoldsALayerByReference(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.held = Holder(self.fc2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.held.module(self.fc1(x).relu()).relu())


@made
class LayerOfTheClass(Mlp):
    """A layer stands on the class: all instances and copies have the same."""

    shared = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.fc2(type(self).shared(self.fc1(x).relu()).relu()).relu())


class Child(nn.Module):
    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "parent", weakref.proxy(parent))

    def forward(self, h: Tensor) -> Tensor:
        return self.parent.fc2(h)


@made
class ParentByWeakReference(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.child = Child(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.child(self.fc1(x).relu()).relu())


class ChildOfParent(nn.Module):
    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        self.parents = [parent]

    def forward(self, h: Tensor) -> Tensor:
        return self.parents[0].fc2(h)


@made
class ParentInAList(ParentByWeakReference):
    def __init__(self) -> None:
        super().__init__()
        self.child = ChildOfParent(self)


@made
class Delegates(nn.Module):
    """Attributes come from the module inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Mlp()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.fc2(self.fc1(x).relu()).relu())


@made
class SlotsAndProperties(Mlp):
    @property
    def middle(self) -> nn.Module:
        return self.fc2

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.middle(self.fc1(x).relu()).relu())


@made
class WatchesItsAttributes(Mlp):
    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("fc") and name in self.__dict__.get("_modules", {}):
            raise AttributeError("frozen")
        super().__setattr__(name, value)


@made
class OwnStateDict(Mlp):
    """Saves its weights turned."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        return {k: v.t() if v.dim() == 2 else v for k, v in state.items()}

    def load_state_dict(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        return super().load_state_dict({k: v.t() if v.dim() == 2 else v for k, v in state.items()}, *args, **kwargs)


class TaggedParameter(nn.Parameter):
    """A parameter with a class of its own."""


@made
class TaggedParameters(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.fc2.weight = TaggedParameter(self.fc2.weight.data)
        self.fc1.weight.no_decay = True  # type: ignore[attr-defined]


@made
class LayersInADictionary(nn.Module):
    """Layers in a plain dictionary, registered under other names."""

    def __init__(self) -> None:
        super().__init__()
        self.table = {"a": nn.Linear(8, 24), "b": nn.Linear(24, 16), "c": nn.Linear(16, 4)}
        for name, layer in self.table.items():
            self.add_module(f"layer_{name}", layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.table["c"](self.table["b"](self.table["a"](x).relu()).relu())


@made
class DispatchTable(Mlp):
    """Bound methods in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = {"first": self.fc1.forward, "second": self.fc2.__call__}

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.steps["second"](self.steps["first"](x).relu()).relu())


@made
class LambdasInside(Mlp):
    """Closures over the layers, made once."""

    def __init__(self) -> None:
        super().__init__()
        second = self.fc2
        self.middle = lambda h: second(h)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.middle(self.fc1(x).relu()).relu())


@made
class HalfFrozenNoStatistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.bn, self.fc2 = nn.Linear(8, 24), nn.BatchNorm1d(24, track_running_stats=False), nn.Linear(24, 4)
        self.fc1.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.bn(self.fc1(x)).relu())


@made
class CumulativeStatistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.bn, self.fc2 = nn.Linear(8, 24), nn.BatchNorm1d(24, momentum=None), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.bn(self.fc1(x)).relu())


@made
class StrideZero(Mlp):
    """An expanded parameter: all rows are one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc2.weight = nn.Parameter(torch.randn(1, 24).expand(16, 24), requires_grad=False)


@made
class ReadOnlyArrays(Mlp):
    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            array = self.fc1.weight.detach().numpy().copy()
            array.setflags(write=False)
            self.fc1.weight = nn.Parameter(torch.from_numpy(array))


def plain(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", OBJECTS)
def test_objects(name: str, inplace: bool) -> None:
    """The original stays as it was, and the cut model doesn't need it."""
    model, twin, x = plain(OBJECTS[name]), plain(OBJECTS[name]), data(5, 8)
    if name == "LayerOfTheClass":
        pytest.importorskip("torch")
    before, want_before = snapshot(model), model(x).detach()
    plan = planned(model, x)
    assert snapshot(model) == before, "plan changed the model"
    cut = applied(plan, model, inplace=inplace)
    if not inplace:
        assert snapshot(model) == before, "apply changed the model"
        equal(want_before, model(x))
        assert cut is not model
    kept = Kept(twin, plan)
    with torch.no_grad():  # zeros in the twin itself: some of these do not copy
        for tensor, dims in plan.cuts.items():
            for dim in dims:
                owner = (
                    twin.get_parameter(tensor) if tensor in dict(twin.named_parameters()) else twin.get_buffer(tensor)
                )
                owner.data = owner.data.clone().index_fill_(dim, kept.gone(tensor, dim), 0.0)
        want = twin(data(7, 8)).clone()
        if not inplace:
            for p in model.parameters():
                p.data = torch.full_like(p.data, 7.0)
        equal(want, cut(data(7, 8)))


# --- settings around the calls

AROUND: dict[str, Callable[[], Any]] = {
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default device meta": lambda: torch.device("meta"),
    "anomaly": torch.autograd.detect_anomaly,
    "saved tensors": lambda: torch.autograd.graph.save_on_cpu(),
    "graph break": lambda: torch.autograd.set_multithreading_enabled(False),
}


@pytest.mark.parametrize("name", AROUND)
@pytest.mark.parametrize("net", ["conv", "former"])
def test_planned_and_applied_under(net: str, name: str) -> None:
    build, shape = (Convnet, (2, 3, 8, 8)) if net == "conv" else (Former, (2, 6, 8))
    model, x = seeded(build), data(*shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with AROUND[name]():
            plan = planned(model, x, **({"granularity": "head_dim"} if net == "former" else {}))
            cut = applied(plan, model)
    assert not any(p.is_inference() for p in cut.parameters())
    equal(zeroed(model, Kept(model, plan))(x), cut(x))
    if net == "conv":
        steps(cut, torch.optim.SGD(cut.parameters(), 0.01), x)


def test_default_dtype_of_double() -> None:
    model, x = seeded(Former), data(2, 6, 8)
    torch.set_default_dtype(torch.float64)
    try:
        plan = planned(model, x, granularity="head_dim")
        cut = applied(plan, model)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in cut.parameters()} == {torch.float32}
    equal(zeroed(model, Kept(model, plan))(x), cut(x))


# --- several examples, given scores, masks before cuts


class Branchy(Mlp):
    """Long inputs take another path, and the example list shows both."""

    def forward(self, x: Tensor, far: bool = False) -> Tensor:
        h = self.fc1(x).relu()
        if len(x) > 16 or far:
            h = h * torch.linspace(0.5, 2, h.shape[-1])
        return self.fc3(self.fc2(h).relu())


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("second", ["long", "keyword"])
def test_examples_show_both_paths(second: str, order: int) -> None:
    model = seeded(Branchy)
    other: Any = data(20, 8) if second == "long" else (data(5, 8), True)
    examples: list[Any] = [data(5, 8), other]
    plan = planned(model, None, examples=examples[::-1] if order else examples, granularity="channel")
    cut, truth = applied(plan, model), zeroed(model, Kept(model, plan))
    for x in (data(7, 8), data(30, 8), data(20, 8)):
        equal(truth(x), cut(x))
    equal(truth(data(5, 8), True), cut(data(5, 8), True))


def test_masked_then_cut_then_trained() -> None:
    """Masks held by an optimizer, a cut in place, and the hold goes on (or is refused)."""
    model, x = seeded(Mlp), data(5, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    masks = sc.select(sc.score(model, granularity="element"), sparsity=0.5)
    handle = sc.mask_model(model, masks)
    handle.hold(optimizer)
    steps(model, optimizer, x)
    plan = planned(model, x, granularity="neuron")
    truth = zeroed(model, Kept(model, plan))
    try:
        plan.apply(model, inplace=True, optimizer=optimizer)
    except SecateurError:
        return
    equal(truth(data(7, 8)), model(data(7, 8)))
    zeros = {n: p == 0 for n, p in model.named_parameters() if p.dim() == 2}
    try:
        steps(model, optimizer, x)
        handle.enforce()
    except SecateurError:
        return
    for n, p in model.named_parameters():
        if n in zeros:
            assert bool((p[zeros[n]] == 0).all()), "masks were lost by the cut, without a word"


@pytest.mark.parametrize("after", ["remove", "state_dict"])
def test_a_handle_after_the_cut(after: str) -> None:
    model, x = seeded(Mlp), data(5, 8)
    handle = sc.mask_model(model, sc.select(sc.score(model, granularity="element"), sparsity=0.5))
    plan = planned(model, x, granularity="neuron")
    applied(plan, model, inplace=True)
    with contextlib.suppress(SecateurError):
        handle.remove() if after == "remove" else handle.load_state_dict(handle.state_dict())
    model(x)


def test_scales_follow_is_said() -> None:
    model, x = seeded(Former), data(2, 6, 8)
    plan = planned(model, x, granularity="head_dim", scales="follow")
    cut = applied(plan, model)
    truth = zeroed(model, Kept(model, plan))
    try:
        equal(truth(data(3, 9, 8)), cut(data(3, 9, 8)))
    except Exception:
        assert "scale" in plan.explain().lower()


@pytest.mark.parametrize("form", ["mapping", "module"])
@pytest.mark.parametrize("kind", ["head_dim", "channel", "head", "layer"])
def test_averages_follow(form: str, kind: str) -> None:
    model, x = seeded(Former), data(2, 6, 8)
    shadow = copy.deepcopy(model)
    with torch.no_grad():
        for p in shadow.parameters():
            p.mul_(1.05)
    averaged = torch.optim.swa_utils.AveragedModel(shadow)
    ema: Any = {n: p.detach().clone() for n, p in shadow.named_parameters()} if form == "mapping" else averaged
    options: dict[str, Any] = {"granularity": kind}
    if kind == "layer":
        options |= {"criterion": "magnitude", "scope": "global"}
    plan = planned(model, x, **options)
    truth = zeroed(shadow, Kept(shadow, plan))
    applied(plan, model, inplace=True, ema=ema)
    result = ema.module if form == "module" else copy.deepcopy(model)
    if form == "mapping":
        result.load_state_dict(ema, strict=True)
    equal(truth(data(3, 9, 8)), result(data(3, 9, 8)))


@pytest.mark.parametrize("kind", ["channel", "head", "head_dim", "layer", "element"])
def test_result_is_saved_and_loaded(kind: str, tmp_path: Any) -> None:
    model, x = seeded(Former), data(2, 6, 8)
    options: dict[str, Any] = {"granularity": kind, "target": {"sparsity": 0.3}}
    if kind != "layer":
        options["criterion"] = "magnitude"
    recipe = {"target": {"sparsity": 0.3}, "measure": {"latency": False, "quality": False}}
    try:
        result = sc.prune(model, x, recipe=recipe, **options)
    except SecateurError as error:
        pytest.skip(str(error))
    result.save(tmp_path / "out")
    loaded = sc.load(tmp_path / "out", model=seeded(Former))
    equal(result.model(data(3, 9, 8)), loaded(data(3, 9, 8)))


def test_an_edited_plan_is_found_out() -> None:
    model, x = seeded(Former), data(2, 6, 8)
    plan = planned(model, x, granularity="head_dim")
    plan.certify()
    text = json.loads(plan.to_json())
    scales = text.get("scales")
    assert scales, "a width sets a scale here"
    for scale in scales if isinstance(scales, list) else scales.values():
        for key, value in list(scale.items()):
            if isinstance(value, float):
                scale[key] = value * 2
    try:
        edited = sc.Plan.from_data(text)
        cut = edited.apply(seeded(Former), example=x)
    except SecateurError:
        return
    equal(zeroed(model, Kept(model, edited))(x), cut(x))


# --- inputs of other kinds


class Point(NamedTuple):
    x: Tensor
    scale: float


@dataclasses.dataclass
class Batch:
    x: Tensor
    note: str = "n"


class TakesMany(Mlp):
    def forward(self, batch: Any) -> Tensor:
        x = batch
        if isinstance(batch, (Point, Batch)):
            x = batch.x
        elif isinstance(batch, dict):
            x = batch["x"]
        elif isinstance(batch, nn.utils.rnn.PackedSequence):
            x = batch.data
        elif isinstance(batch, list):
            x = torch.stack(batch)
        elif isinstance(batch, str):
            x = torch.tensor([[float(ord(c)) / 100 for c in batch[:8]]])
        return super().forward(x.float())


KINDS: dict[str, Callable[[int], Any]] = {
    "named tuple": lambda n: (Point(data(n, 8), 1.0),),
    "dataclass": lambda n: (Batch(data(n, 8)),),
    "mapping": lambda n: ({"x": data(n, 8), "names": ["a"] * n, "none": None},),
    "packed": lambda n: (nn.utils.rnn.pack_sequence([data(n, 8), data(1, 8)]),),
    "list": lambda n: ([*data(n, 8)],),
    "words": lambda n: ("abcdefgh" * n,),
    "integers": lambda n: (torch.arange(8 * n).view(n, 8),),
    "booleans": lambda n: (data(n, 8) > 0,),
    "expanded": lambda n: (data(1, 8).expand(n, 8),),
}


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_other_kinds(kind: str) -> None:
    model = seeded(TakesMany)
    truth, cut, _ = pair(model, KINDS[kind](5))
    for n in (5, 3):
        equal(truth(*KINDS[kind](n)), cut(*KINDS[kind](n)))


def test_nested_tensor_of_rows() -> None:
    class Ragged(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.fc3(self.fc2(self.fc1(x).relu()).relu()))

    model = seeded(Ragged)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch.nested.nested_tensor([data(3, 8), data(5, 8)], layout=torch.jagged)
        try:
            plan = sc.plan(model, x, target={"sparsity": 0.3})
            cut = plan.apply(model)
        except SecateurError as error:
            in_words(error)
            return
        equal(zeroed(model, Kept(model, plan))(data(4, 8)), cut(data(4, 8)))
