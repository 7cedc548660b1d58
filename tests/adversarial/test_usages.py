"""What people do with a smaller model: it follows the original with zeros, or the cut is refused."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc

from .references import Kept, zeroed
from .usages import (
    NETS,
    Convnet,
    Former,
    applied,
    data,
    equal,
    pair,
    planned,
    seeded,
    thirds,
)


def cast(dtype: torch.dtype) -> Callable[[nn.Module, Tensor], Any]:
    return lambda m, x: m.to(dtype)(x.to(dtype)).double()


def trained(m: nn.Module, x: Tensor) -> Any:
    m.train()
    optimizer = torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9)
    for step in range(3):
        optimizer.zero_grad()
        m(x + step * 0.1).square().mean().backward()
        optimizer.step()
    return m.eval()(x)


def traced(m: nn.Module, x: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(m, (x,), check_trace=False)(x)


def exported(m: nn.Module, x: Tensor) -> Any:
    return torch.export.export(m, (x,)).module()(x)


def pickled(m: nn.Module, x: Tensor) -> Any:
    buffer = io.BytesIO()
    torch.save(m, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)(x), pickle.loads(pickle.dumps(m))(x), copy.deepcopy(m)(x)


def quantised(m: nn.Module, x: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, dtype=torch.qint8)(x)
    return (found * 4).round() if found.isfinite().all() else found


def functional(m: nn.Module, x: Tensor) -> Any:
    state = {**dict(m.named_parameters()), **dict(m.named_buffers())}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of batching rules that it does not have
        one = torch.func.vmap(lambda row: torch.func.functional_call(m, state, (row[None],)))(x)
        return one, torch.func.jacrev(lambda row: m(row[None]).sum(0))(x[0])


def under_autocast(m: nn.Module, x: Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return (m(x).float() * 8).round()


def hooked(m: nn.Module, x: Tensor) -> Any:
    seen: list[Any] = []
    for name, module in m.named_modules():
        if name.endswith(("out", "fc3", "proj", "down")):  # whole on their outputs
            module.register_forward_hook(lambda mod, args, out: seen.append(out.square().sum()))
    return [m(x), *seen]


def on_meta(m: nn.Module, x: Tensor) -> Any:
    return str(m.to("meta")(x.to("meta")).shape)


def last_channels(m: nn.Module, x: Tensor) -> Any:
    kind = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    return m.to(memory_format=kind)(x.contiguous(memory_format=kind))


def fused(m: nn.Module, x: Tensor) -> Any:
    if isinstance(m, Convnet):
        m.a = torch.nn.utils.fusion.fuse_conv_bn_eval(m.a, m.bn)
        m.bn = nn.Identity()
    return m(x)


def restored(m: nn.Module, x: Tensor) -> Any:
    other = copy.deepcopy(m)
    for p in other.parameters():
        p.data.zero_()
    other.load_state_dict(m.state_dict(), strict=True, assign=True)
    return other(x)


def compiled(m: nn.Module, x: Tensor) -> Any:
    torch._dynamo.reset()
    return torch.compile(m, backend="eager")(x)


def symbolic(m: nn.Module, x: Tensor) -> Any:
    return torch.fx.symbolic_trace(m)(x) if not isinstance(m, Former) else m(x)


def reparametrised(m: nn.Module, x: Tensor) -> Any:
    for module in m.modules():
        if isinstance(module, nn.Linear) and module.out_features in (3, 4):
            torch.nn.utils.parametrizations.weight_norm(module)
    return m(x)


def counted(m: nn.Module, x: Tensor) -> Any:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        return m(x)


USES: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "double": cast(torch.float64),
    "trained": trained,
    "traced": traced,
    "exported": exported,
    "pickled": pickled,
    "functional": functional,
    "hooked": hooked,
    "meta": on_meta,
    "channels last": last_channels,
    "fused": fused,
    "restored": restored,
    "compiled": compiled,
    "symbolic": symbolic,
    "reparametrised": reparametrised,
    "counted": counted,
    "train mode": lambda m, x: m.train()(x),
    "twice": lambda m, x: (m(x), m(x * 3)),
    "empty batch": lambda m, x: m(x[:0]).shape[1:],
}


KINDS = {"conv": ("channel",), "mlp": ("neuron",), "former": ("channel", "head", "head_dim", "neuron", "layer")}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("net", "kind", "use"), thirds([(n, k, use) for use in USES for n, kinds in KINDS.items() for k in kinds], of=10)
)
def test_after_the_cut(net: str, kind: str, use: str) -> None:
    build, shape, other = NETS[net]
    options: dict[str, Any] = {"granularity": kind}
    if kind == "layer":
        options |= {"criterion": "magnitude", "scope": "global"}
    truth, cut, _ = pair(seeded(build), data(*shape), **options)
    x = data(*other)
    if use == "meta":  # the truth of a norm does not run there
        want = str(truth(x).shape)
    elif use == "trained" and kind == "head_dim":
        pytest.skip("a factor in the weights changes the way of training, not the function")
    else:
        want = USES[use](truth, x)
    equal(want, USES[use](cut, x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("net", thirds(NETS))
def test_planned_in_one_dtype_used_in_float32(net: str, dtype: torch.dtype) -> None:
    build, shape, other = NETS[net]
    model = seeded(build).to(dtype)
    truth, cut, _ = pair(model, data(*shape).to(dtype))
    x = data(*other)
    equal(truth.float()(x), cut.float()(x))


@pytest.mark.parametrize("dtype", thirds([torch.float64, torch.float16, torch.bfloat16]))
@pytest.mark.parametrize("kind", ["channel", "head_dim"])
def test_planned_in_float32_applied_to_another_dtype(kind: str, dtype: torch.dtype) -> None:
    """head_dim puts a factor into weights: it must not be lost or put in twice."""
    model = seeded(Former)
    plan = planned(model, data(2, 6, 8), granularity=kind)
    other = copy.deepcopy(model).to(dtype)
    cut = applied(plan, other)
    truth = zeroed(other.float(), Kept(model, plan))
    tolerance = 3e-4 if dtype == torch.float64 else 0.05
    want, have = truth(data(3, 9, 8)), cut.float()(data(3, 9, 8))
    assert (want - have).abs().max() <= tolerance * want.abs().max()


def chain(net: str, kinds: Iterable[str]) -> None:
    build, shape, other = NETS[net]
    model, plans = seeded(build), []
    current = model
    for number, kind in enumerate(kinds):
        options: dict[str, Any] = {"granularity": kind, "seed": number}
        if kind in ("layer", "element"):
            options |= {"criterion": "magnitude", "scope": "global"}
        example = None if kind == "element" else data(*shape)
        plan = planned(current, example, **options)
        current = applied(plan, current)
        plans.append(plan)
    whole = functools.reduce(lambda a, b: a.then(b, model), plans)
    fresh = seeded(build)
    again = applied(whole, fresh)
    equal(current(data(*other)), again(data(*other)))
    names = [(n, tuple(p.shape)) for n, p in current.state_dict().items()]
    assert names == [(n, tuple(p.shape)) for n, p in again.state_dict().items()]
    text = whole.to_json()
    buffer = sc.Plan.from_data(__import__("json").loads(text))
    equal(current(data(*other)), applied(buffer, seeded(build), example=data(*shape))(data(*other)))


@pytest.mark.parametrize(
    ("net", "kinds"),
    thirds(
        [
            ("former", ("head", "head_dim")),
            ("former", ("head_dim", "head_dim")),
            ("former", ("head_dim", "head", "neuron", "channel")),
            ("former", ("layer", "head", "layer")),
            ("former", ("channel", "layer", "head_dim")),
            ("former", ("element", "head_dim")),
            ("former", ("head_dim", "element", "head")),
            ("former", ("layer", "element", "layer")),
            ("conv", ("channel", "channel", "element")),
            ("conv", ("element", "channel", "channel")),
            ("mlp", ("neuron", "element", "neuron", "element")),
        ],
        of=4,
    ),
)
def test_rounds_compose(net: str, kinds: tuple[str, ...]) -> None:
    chain(net, kinds)


def test_head_dim_twice_equals_the_original_with_zeros() -> None:
    """Two rounds of folded scales: the factor is the product."""
    model = seeded(Former)
    first = planned(model, data(2, 6, 8), granularity="head_dim")
    small = applied(first, model)
    with torch.no_grad():
        for p in small.parameters():
            p.mul_(1.1)
    truth, cut, _ = pair(small, data(2, 6, 8), granularity="head_dim", seed=5)
    equal(truth(data(3, 9, 8)), cut(data(3, 9, 8)))


def test_saved_between_rounds(tmp_path: Any) -> None:
    model, example = seeded(Former), data(2, 6, 8)
    plan = planned(model, example, granularity=["head", "neuron", "channel"], scope="global")
    plan.save(tmp_path / "one.json")
    loaded = sc.Plan.load(tmp_path / "one.json")
    small = applied(loaded, seeded(Former), example=example)
    second = planned(small, example, granularity="head_dim")
    smaller = applied(second, small)
    whole = loaded.then(second, seeded(Former))
    whole.save(tmp_path / "two.json")
    again = applied(sc.Plan.load(tmp_path / "two.json"), seeded(Former), example=example)
    equal(smaller(data(3, 9, 8)), again(data(3, 9, 8)))
