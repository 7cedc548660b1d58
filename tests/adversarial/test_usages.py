"""What people do with a model around a cut: the cut model follows the original with zeros, or it is refused."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import random
import types
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.errors import SecateurError

from .cases import enliven
from .harness import differ, flat, same, snapshot
from .references import Kept, zeroed


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return enliven(build()).eval()


def data(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def equal(want: Any, have: Any) -> None:
    detached = ([o.detach() if isinstance(o, Tensor) else o for o in flat(x)] for x in (want, have))
    differ(*detached)


RANDOM: dict[str, Any] = {"criterion": {"name": "random"}, "target": {"sparsity": 0.3}, "scope": "local"}


def in_words(error: SecateurError) -> None:
    """A refusal says something, and does not ask for a report."""
    text = str(error)
    if len(text) <= 20 or "please report" in text.lower():
        raise AssertionError(f"an internal error: {text}") from error


def planned(model: nn.Module, example: Any, **options: Any) -> Any:
    """A plan; skipped where the library refuses in words."""
    try:
        if not {"keep", "remove", "masks", "scores"} & set(options):
            options = {**RANDOM, **options}
        return sc.plan(model, example, **options)
    except SecateurError as error:
        in_words(error)
        pytest.skip(f"refused: {error}")


def applied(plan: Any, model: nn.Module, **options: Any) -> nn.Module:
    try:
        return plan.apply(model, **options)
    except SecateurError as error:
        in_words(error)
        pytest.skip(f"refused: {error}")


def pair(model: nn.Module, example: Any, **options: Any) -> tuple[nn.Module, nn.Module, Any]:
    """The original with zeros, the cut model, the plan; the model of the user is as it was."""
    before, given = snapshot(model), copy.deepcopy(example)
    plan = planned(model, example, **options)
    cut = applied(plan, model)
    assert snapshot(model) == before, "the model was changed"
    assert same(example, given), "the example was changed"
    assert plan.cuts or plan.layers, "nothing was cut"
    return zeroed(model, Kept(model, plan)), cut, plan


class Convnet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, 12, 3, padding=1)
        self.c, self.out = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.bn(self.a(x)).relu()).relu()
        return self.out(self.c(h).mean((2, 3)))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(8, 24), nn.Linear(24, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.fc2(self.fc1(x).relu()).relu())


class Former(nn.Module):
    """Two blocks, a scale of one over the root of the width of heads."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(8, 24), nn.Linear(24, 3)
        self.blocks = nn.ModuleList(FormerBlock(24, heads) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.out(h)


class FormerBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return h + self.down(F.gelu(self.up(h)))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "conv": (Convnet, (2, 3, 8, 8), (3, 3, 12, 9)),
    "mlp": (Mlp, (5, 8), (7, 8)),
    "former": (Former, (2, 6, 8), (3, 9, 8)),
}


# --- one plan, then something is done to the cut model and to the original with zeros alike


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


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(("net", "kind"), [(n, k) for n, kinds in KINDS.items() for k in kinds])
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
@pytest.mark.parametrize("net", NETS)
def test_planned_in_one_dtype_used_in_float32(net: str, dtype: torch.dtype) -> None:
    build, shape, other = NETS[net]
    model = seeded(build).to(dtype)
    truth, cut, _ = pair(model, data(*shape).to(dtype))
    x = data(*other)
    equal(truth.float()(x), cut.float()(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
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


# --- rounds


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


# --- in place, with what trains it

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2),
}


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, number: int = 3) -> None:
    for step in range(number):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = (model(x + 0.1 * step) - 0.3).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


def silence(optimizer: torch.optim.Optimizer, model: nn.Module, plan: Any) -> None:
    """State of what the plan removes, set to zero."""
    kept = Kept(model, plan)
    for name, p in model.named_parameters():
        for dim in plan.cuts.get(name, {}):
            for tensor in optimizer.state.get(p, {}).values():
                if isinstance(tensor, Tensor) and tensor.shape == p.shape:
                    tensor.index_fill_(dim, kept.gone(name, dim), 0.0)


EXACT = {"sgd", "adam", "adamw foreach", "adamw fused", "rmsprop", "adagrad", "adamax", "nadam", "radam"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_in_place_with_an_optimizer(name: str) -> None:
    """Training goes on as if the removed units had been silent."""
    model = seeded(Mlp)
    groups = [{"params": [*model.fc2.parameters()]}, {"params": [*model.fc1.parameters(), *model.fc3.parameters()]}]
    optimizer = OPTIMIZERS[name](groups if name not in ("lbfgs",) else model.parameters())
    x = data(5, 8)
    steps(model, optimizer, x)
    twin = copy.deepcopy((model, optimizer))
    plan = planned(model, x, granularity="neuron")
    identities = {n: id(p) for n, p in model.named_parameters()}
    cut = applied(plan, model, inplace=True, optimizer=optimizer)
    assert cut is model
    assert identities == {n: id(p) for n, p in model.named_parameters()}
    steps(model, optimizer, x)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    steps(model, optimizer, x, 1)
    if name in EXACT:
        other, its = twin
        truth = zeroed(other, Kept(other, plan))
        with torch.no_grad():
            for a, b in zip(other.parameters(), truth.parameters(), strict=True):
                a.copy_(b)
        silence(its, other, plan)
        steps(other, its, x)
        steps(other, its, x, 1)
        equal(other(data(7, 8)), model(data(7, 8)))


class OwnOptimizer(torch.optim.Optimizer):
    """State per row and per column, in lists and in nested mappings, as written by hand."""

    def __init__(self, parameters: Any, form: str) -> None:
        super().__init__(parameters, {"lr": 0.01})
        self.form = form

    def make(self, p: Tensor) -> dict[str, Any]:
        if self.form == "rows":
            return {"row": torch.ones(p.shape[0]), "column": torch.ones(p.shape[-1])}
        if self.form == "list":
            return {"moments": [torch.zeros_like(p), torch.zeros_like(p)]}
        if self.form == "nested":
            return {"slots": {"m": torch.zeros_like(p)}}
        if self.form == "flat":
            return {"m": torch.zeros(p.numel())}
        if self.form == "transposed":
            return {"m": torch.zeros_like(p.t()).contiguous() if p.dim() == 2 else torch.zeros_like(p)}
        return {"shape": tuple(p.shape), "m": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(self.make(p))
                g = p.grad
                if self.form == "rows" and p.dim() == 2:
                    state["row"].mul_(0.9).add_(g.square().mean(1))
                    state["column"].mul_(0.9).add_(g.square().mean(0))
                    g = g / (state["row"][:, None] * state["column"]).sqrt().clamp(min=1e-6)
                elif self.form == "list":
                    state["moments"][0].mul_(0.9).add_(g)
                    g = state["moments"][0]
                elif self.form == "nested":
                    g = state["slots"]["m"].mul_(0.9).add_(g)
                elif self.form == "flat":
                    g = state["m"].mul_(0.9).add_(g.flatten()).view(p.shape)
                elif self.form == "transposed" and p.dim() == 2:
                    g = state["m"].mul_(0.9).add_(g.t()).t()
                elif self.form == "shape":
                    g = state["m"].mul_(0.9).add_(g).view(state["shape"])
                p.sub_(g, alpha=group["lr"])


@pytest.mark.parametrize("form", ["rows", "list", "nested", "flat", "transposed", "shape"])
def test_in_place_with_an_optimizer_of_ones_own(form: str) -> None:
    """State that cannot be cut is refused, not left behind to crash or to be misread at the next step."""
    model, x = seeded(Mlp), data(5, 8)
    optimizer = OwnOptimizer(model.parameters(), form)
    steps(model, optimizer, x)
    before, state = snapshot(model), copy.deepcopy(optimizer.state_dict())
    plan = planned(model, x, granularity="neuron")
    try:
        plan.apply(model, inplace=True, optimizer=optimizer)
    except SecateurError:
        assert snapshot(model) == before, "refused, and changed the model"
        assert same(state["state"], optimizer.state_dict()["state"]), "refused, and changed the optimizer"
        return
    steps(model, optimizer, x)


def test_in_place_with_averages_and_schedule() -> None:
    model, x = seeded(Convnet), data(4, 3, 8, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=20)
    ema = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    for _ in range(2):
        steps(model, optimizer, x, 1)
        schedule.step()
        ema.update_parameters(model)
    twin = copy.deepcopy(ema.module)
    plan = planned(model, x)
    applied(plan, model, inplace=True, optimizer=optimizer, ema=ema)
    equal(zeroed(twin, Kept(twin, plan)).eval()(data(3, 3, 12, 9)), ema.module.eval()(data(3, 3, 12, 9)))
    steps(model, optimizer, x, 1)
    schedule.step()
    ema.update_parameters(model)
    ema(x)


@pytest.mark.parametrize("kind", ["mapping", "copy"])
def test_in_place_with_other_averages(kind: str) -> None:
    model, x = seeded(Former), data(2, 6, 8)
    shadow = copy.deepcopy(model)
    with torch.no_grad():
        for p in shadow.parameters():
            p.mul_(1.05)
    ema: Any = {n: p.detach().clone() for n, p in shadow.named_parameters()} if kind == "mapping" else shadow
    plan = planned(model, x, granularity="head_dim")
    truth = zeroed(shadow, Kept(shadow, plan))
    try:
        plan.apply(model, inplace=True, ema=ema)
    except SecateurError:
        return
    result = ema if isinstance(ema, nn.Module) else copy.deepcopy(model)
    if isinstance(ema, dict):
        result.load_state_dict(ema, strict=True)
    equal(truth(data(3, 9, 8)), result(data(3, 9, 8)))


def test_refused_in_place_leaves_all_as_it_was() -> None:
    """A proof that fails in place changes nothing: neither model, nor optimizer, nor averages."""
    model, x = seeded(Mlp), data(5, 8)
    optimizer = torch.optim.Adam(model.parameters())
    steps(model, optimizer, x)
    plan = planned(model, x, granularity="neuron")
    other = seeded(Mlp)
    other.fc2 = nn.Linear(24, 20)
    other.fc3 = nn.Linear(20, 4)
    before, state = snapshot(other), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(SecateurError):
        plan.apply(other, inplace=True, optimizer=optimizer)
    assert snapshot(other) == before
    assert same(state["state"], optimizer.state_dict()["state"])


# --- forwards that are not plain methods


def _lambda(m: nn.Module) -> None:
    m.forward = lambda x, inner=m.forward: inner(x) * 2


def _partial(m: nn.Module) -> None:
    m.forward = functools.partial(m.forward)


def _wrapped(m: nn.Module) -> None:
    inner = m.forward

    @functools.wraps(inner)
    def forward(x: Tensor) -> Tensor:
        return inner(x) + 1

    m.forward = forward


def _method(m: nn.Module) -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return type(self).forward(self, x) * 3

    m.forward = types.MethodType(forward, m)


def _inner(m: nn.Module) -> None:
    first = next(c for c in m.modules() if isinstance(c, (nn.Linear, nn.Conv2d)))
    inner = first.forward
    first.forward = lambda x: inner(x) * 0.5


def _inner_partial(m: nn.Module) -> None:
    first = next(c for c in m.modules() if isinstance(c, (nn.Linear, nn.Conv2d)))
    kind = F.linear if isinstance(first, nn.Linear) else functools.partial(F.conv2d, padding=1)
    first.forward = functools.partial(kind, weight=first.weight, bias=first.bias)


def _pre_hook(m: nn.Module) -> None:
    m.register_forward_pre_hook(lambda mod, args: (args[0] * 0.5,))


def _post_hook_of_the_original(m: nn.Module) -> None:
    m.register_forward_hook(lambda mod, args, out: out + m.offset)
    m.register_buffer("offset", torch.ones(()))


def _hook_holds_a_weight(m: nn.Module) -> None:
    last = [c for c in m.modules() if isinstance(c, nn.Linear)][-1]
    weight = last.weight
    m.register_forward_hook(lambda mod, args, out: out + weight.sum())


def _hook_holds_a_mask(m: nn.Module) -> None:
    first = next(c for c in m.modules() if isinstance(c, (nn.Linear, nn.Conv2d)))
    size = first.weight.shape[0]
    mask = torch.linspace(0.5, 2, size)
    mask = mask[:, None, None] if isinstance(first, nn.Conv2d) else mask
    first.register_forward_hook(lambda mod, args, out: out * mask)


def _weights_pre_hook(m: nn.Module) -> None:
    first = next(c for c in m.modules() if isinstance(c, (nn.Linear, nn.Conv2d)))
    first.register_forward_pre_hook(lambda mod, args: (mod.weight.data.clamp_(-0.2, 0.2), None)[1])


def _compiled_inside(m: nn.Module) -> None:
    torch._dynamo.reset()
    m.compile(backend="eager")


def _checkpointed(m: nn.Module) -> None:
    from torch.utils.checkpoint import checkpoint

    inner = m.forward
    m.forward = lambda x: checkpoint(inner, x, use_reentrant=False)


def _no_grad(m: nn.Module) -> None:
    m.forward = torch.no_grad()(m.forward)


def _own_call(m: nn.Module) -> None:
    class Called(type(m)):  # type: ignore[misc]
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x * 2) - 1

    m.__class__ = Called


WRAPPERS = {
    f.__name__[1:]: f
    for f in (
        _lambda,
        _partial,
        _wrapped,
        _method,
        _inner,
        _inner_partial,
        _pre_hook,
        _post_hook_of_the_original,
        _hook_holds_a_weight,
        _hook_holds_a_mask,
        _weights_pre_hook,
        _compiled_inside,
        _checkpointed,
        _no_grad,
        _own_call,
    )
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_wrapped(net: str, wrapper: str) -> None:
    """Whatever is certified gives the outputs of the zeroed original, also once the original is gone."""
    build, shape, other = NETS[net]
    model, plain_model = seeded(build), seeded(build)
    WRAPPERS[wrapper](model)
    plan = planned(model, data(*shape))
    cut = applied(plan, model)
    truth = zeroed(plain_model, Kept(plain_model, plan))
    WRAPPERS[wrapper](truth)
    with torch.no_grad():
        want = truth(data(*other))
        for p in model.parameters():
            p.data.fill_(7.0)  # the user goes on with the original; the cut model has nothing to do with it
        have = cut(data(*other))
    equal(want, have)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_and_cut_in_place(wrapper: str) -> None:
    model, plain_model = seeded(Mlp), seeded(Mlp)
    WRAPPERS[wrapper](model)
    plan = planned(model, data(5, 8))
    cut = applied(plan, model, inplace=True)
    truth = zeroed(plain_model, Kept(plain_model, plan))
    WRAPPERS[wrapper](truth)
    with torch.no_grad():
        equal(truth(data(7, 8)), cut(data(7, 8)))


# --- methods of the model besides forward


class Deploys(nn.Module):
    """Three branches in training, one convolution after `deploy`; sizes are remembered as integers."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = 3, 12
        self.stem, self.three, self.one = (
            nn.Conv2d(3, 12, 3, padding=1),
            nn.Conv2d(12, 12, 3, padding=1),
            nn.Conv2d(12, 12, 1),
        )
        self.width, self.head = 12, nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).relu()
        if hasattr(self, "merged"):
            h = self.merged(h)
        else:
            h = self.three(h) + self.one(h) + h
        return self.head(h.relu().mean((2, 3)))

    def deploy(self) -> None:
        merged = nn.Conv2d(self.width, self.width, 3, padding=1)
        eye = torch.zeros(self.width, self.width, 3, 3)
        for i in range(self.width):
            eye[i, i, 1, 1] = 1
        with torch.no_grad():
            merged.weight.copy_(self.three.weight + F.pad(self.one.weight, [1] * 4) + eye)
            merged.bias.copy_(self.three.bias + self.one.bias)
        self.merged = merged
        del self.three, self.one


class Lora(nn.Module):
    """Merged in evaluation, apart in training, as an override of `train`."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(out, into) / 4), nn.Parameter(torch.zeros(out))
        self.a, self.b = nn.Parameter(torch.randn(3, into) / 4), nn.Parameter(torch.randn(out, 3) / 4)
        self.merged = False

    def train(self, mode: bool = True) -> Lora:
        super().train(mode)
        with torch.no_grad():
            if mode == self.merged:
                self.weight.add_(self.b @ self.a, alpha=-1 if mode else 1)
                self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y if self.merged else y + x @ self.a.t() @ self.b.t()


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = Lora(8, 24), Lora(24, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc2(self.fc1(x).relu()).relu())


class ResetsItsHead(Convnet):
    def __init__(self) -> None:
        super().__init__()
        self.num_features, self.feature_info = 12, [{"name": "a", "channels": 16}, {"name": "b", "channels": 12}]

    def features(self, x: Tensor) -> list[Tensor]:
        h = self.bn(self.a(x)).relu()
        return [h, self.b(h).relu()]

    def reset_classifier(self, classes: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.out = nn.Linear(self.num_features, classes)


def test_deployed_after_the_cut() -> None:
    truth, cut, plan = pair(seeded(Deploys), data(2, 3, 8, 8))
    x = data(3, 3, 9, 9)
    equal(truth(x), cut(x))
    truth.deploy()
    with torch.no_grad():
        gone = Kept(seeded(Deploys), plan).gone("head.weight", 1)
        truth.head.weight[:, gone] = 0
    try:
        cut.deploy()
        have = cut(x)
    except RuntimeError:
        assert "Deploys.deploy() reads width, which stays 12" in plan.explain()
        return
    equal(truth(x), have)


@pytest.mark.parametrize("first", ["eval", "train"])
def test_merging_by_train_and_eval(first: str) -> None:
    model = seeded(Adapted)
    model.train(first == "train")
    truth, cut, plan = pair(model, data(5, 8))
    for mode in (True, False, True):
        truth.train(mode)
        try:
            cut.train(mode)
            have = cut(data(7, 8))
        except RuntimeError:
            assert "fc1.a" in plan.explain() or "fc2.a" in plan.explain(), "nothing said that the other mode breaks"
            return
        equal(truth(data(7, 8)), have)


def test_head_is_reset_after_the_cut() -> None:
    """Integers of the model that name widths follow the cut, or what reads them is said."""
    _, cut, plan = pair(seeded(ResetsItsHead), data(2, 3, 8, 8))
    cut.reset_classifier(7)
    try:
        assert cut(data(2, 3, 8, 8)).shape == (2, 7)
    except RuntimeError:
        assert "ResetsItsHead.reset_classifier() reads num_features, which stays 12" in plan.explain()


# --- things around the call


def test_nothing_around_the_call_changes() -> None:
    """Generators, modes, gradients, hooks, defaults: all as they were, after a cut as after a refusal."""
    model, x = seeded(Convnet), data(2, 3, 8, 8)
    model.train()
    model(x).sum().backward()
    model.a.weight.requires_grad_(False)
    model.bn.eval()
    x.requires_grad_()

    def around() -> Any:
        return (
            torch.get_rng_state().tolist(),
            random.getstate(),
            numpy.random.get_state()[1].tolist(),  # noqa: NPY002 - the global state is what is asked about
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.mha.get_fastpath_enabled(),
            [m.training for m in model.modules()],
            [p.requires_grad for p in model.parameters()],
            [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
            [b.tolist() for b in model.buffers()],
            [p._version for p in model.parameters()],
            [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
            x._version,
            x.grad,
            x.requires_grad,
            __import__("sys").getrecursionlimit(),
            len(warnings.filters),
            [sorted(vars(m)) for m in model.modules()],
        )

    before = around()
    plan = planned(model, x)
    cut = applied(plan, model)
    assert around() == before
    assert [m.training for m in cut.modules()] == [m.training for m in model.modules()]
    assert [p.requires_grad for p in cut.parameters()] == [p.requires_grad for p in model.parameters()]
    with pytest.raises(SecateurError):
        sc.plan(model, x, granularity="channel", target={"macs": 1e-9})
    sc.score(model, x, granularity="channel")
    sc.inspect(model, x)
    sc.estimate(model, x, target={"macs": 0.5})
    assert around() == before


class HoldsGenerators(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.generator, self.chance, self.array = torch.Generator(), random.Random(1), numpy.random.default_rng(1)
        self.numbers = iter(range(1000))
        self.log: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(float(x.sum()))
        h = self.fc1(x).relu() + 0 * torch.randn(1, generator=self.generator)
        return self.fc3(self.fc2(h + 0 * self.chance.random()).relu())


def test_generators_of_the_model_stay() -> None:
    model, x = seeded(HoldsGenerators), data(5, 8)

    def state() -> Any:
        return (
            model.generator.get_state().tolist(),
            model.chance.getstate(),
            str(model.array.bit_generator.state),
            model.numbers.__reduce__(),
            list(model.log),
        )

    before = state()
    try:
        plan = sc.plan(model, x, **RANDOM)
        plan.apply(model)
    except SecateurError:
        pass
    assert state() == before


def test_the_example_is_used_again_by_its_owner() -> None:
    """A loader's buffer is overwritten between plan and apply."""
    model, x = seeded(Mlp), data(5, 8)
    plan = planned(model, x)
    x.zero_()
    cut = applied(plan, model)
    equal(zeroed(model, Kept(model, plan))(data(7, 8)), cut(data(7, 8)))


class Switch(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.flipped = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x).relu()
        if self.flipped:
            h = h.flip(-1)
        return self.fc3(self.fc2(h).relu())


@pytest.mark.parametrize("where", ["before apply", "after apply"])
def test_a_switch_is_turned(where: str) -> None:
    """Between plan and apply it has to be noticed; afterwards something has to have been said."""
    model, x = seeded(Switch), data(5, 8)
    plan = planned(model, x, remove={"fc1": [0, 1, 5]})
    if where == "before apply":
        model.flipped = True
    cut = applied(plan, model)
    truth = zeroed(model, Kept(model, plan))
    truth.flipped = cut.flipped = True
    try:
        equal(truth(data(7, 8)), cut(data(7, 8)))
    except Exception:
        if where == "before apply" or "flipped" not in plan.explain():
            raise


def test_trained_between_plan_and_apply() -> None:
    model, x = seeded(Former), data(2, 6, 8)
    plan = planned(model, x, granularity="head_dim")
    steps(model, torch.optim.SGD(model.parameters(), lr=0.01), x)
    cut = applied(plan, model)
    equal(zeroed(model, Kept(model, plan))(data(3, 9, 8)), cut(data(3, 9, 8)))


class HeadsElsewhere(Former):
    """Another number of heads under the same shapes, in a place that no integer attribute shows."""

    def __init__(self, heads: int) -> None:
        super().__init__(4)
        for block in self.blocks:
            block.heads = Number(heads)  # type: ignore[assignment]


class Number(int):
    """An integer of a class of its own."""


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("kind", ["head", "head_dim"])
def test_plan_for_other_heads_of_the_same_shapes(kind: str, loaded: bool) -> None:
    plan = planned(seeded(lambda: HeadsElsewhere(4)), data(2, 6, 8), granularity=kind)
    if loaded:
        plan.certify()
        plan = sc.Plan.from_data(__import__("json").loads(plan.to_json()))
    other = seeded(lambda: HeadsElsewhere(8))
    cut = applied(plan, other, example=data(2, 6, 8))
    equal(zeroed(other, Kept(other, plan))(data(3, 9, 8)), cut(data(3, 9, 8)))


# --- arguments

WRONG_ARGUMENTS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "all units": lambda m, x: sc.plan(m, x, remove={"fc1": list(range(24))}),
    "twice": lambda m, x: sc.plan(m, x, remove={"fc1": [1, 1, 2]}),
    "negative": lambda m, x: sc.plan(m, x, remove={"fc1": [-1]}),
    "out of range": lambda m, x: sc.plan(m, x, remove={"fc1": [24]}),
    "floats": lambda m, x: sc.plan(m, x, remove={"fc1": [1.5]}),
    "booleans": lambda m, x: sc.plan(m, x, remove={"fc1": [True, False]}),
    "tensor of numbers": lambda m, x: sc.plan(m, x, remove={"fc1": torch.tensor([1, 2])}),
    "boolean tensor": lambda m, x: sc.plan(m, x, remove={"fc1": torch.ones(24, dtype=torch.bool)}),
    "unknown group": lambda m, x: sc.plan(m, x, remove={"fc9": [1]}),
    "locked group": lambda m, x: sc.plan(m, x, remove={"fc3": [1]}),
    "keep of another size": lambda m, x: sc.plan(m, x, keep={"fc1": torch.ones(7, dtype=torch.bool)}),
    "keep of integers": lambda m, x: sc.plan(m, x, keep={"fc1": torch.arange(24)}),
    "keep nothing": lambda m, x: sc.plan(m, x, keep={"fc1": torch.zeros(24, dtype=torch.bool)}),
    "keep as a list": lambda m, x: sc.plan(m, x, keep={"fc1": [True] * 20 + [False] * 4}),
    "scores not finite": lambda m, x: sc.plan(
        m, x, scores={"fc1": torch.full((24,), float("nan"))}, target={"sparsity": 0.2}
    ),
    "scores of another size": lambda m, x: sc.plan(m, x, scores={"fc1": torch.rand(3)}, target={"sparsity": 0.2}),
    "scores complex": lambda m, x: sc.plan(m, x, scores={"fc1": torch.rand(24) + 1j}, target={"sparsity": 0.2}),
    "scores on meta": lambda m, x: sc.plan(
        m, x, scores={"fc1": torch.rand(24, device="meta")}, target={"sparsity": 0.2}
    ),
    "scores as a list": lambda m, x: sc.plan(m, x, scores={"fc1": [1.0] * 24}, target={"sparsity": 0.2}),
    "keep and target": lambda m, x: sc.plan(m, x, keep={"fc1": torch.arange(24) > 3}, target={"sparsity": 0.2}),
    "no examples": lambda m, x: sc.plan(m, examples=[], target={"sparsity": 0.2}),
    "example of another kind": lambda m, x: sc.plan(m, examples=[x, {"y": x}], target={"sparsity": 0.2}),
    "example empty": lambda m, x: sc.plan(m, x[:0], target={"sparsity": 0.2}).apply(m),
    "example on meta": lambda m, x: sc.plan(m, x.to("meta"), target={"sparsity": 0.2}).apply(m),
    "example not finite": lambda m, x: sc.plan(m, x * float("nan"), target={"sparsity": 0.2}).apply(m),
    "example of another dtype": lambda m, x: sc.plan(m, x.double(), target={"sparsity": 0.2}).apply(m),
    "example a shape": lambda m, x: sc.plan(m, tuple(x.shape), target={"sparsity": 0.2}),
    "example an array": lambda m, x: sc.plan(m, x.numpy(), target={"sparsity": 0.2}),
    "model on meta": lambda m, x: sc.plan(m.to("meta"), x.to("meta"), target={"sparsity": 0.2}).apply(m),
    "model scripted": lambda m, x: sc.plan(torch.jit.script(m), x, target={"sparsity": 0.2}),
    "model traced": lambda m, x: sc.plan(torch.jit.trace(m, x), x, target={"sparsity": 0.2}),
    "model compiled": lambda m, x: sc.plan(torch.compile(m, backend="eager"), x, target={"sparsity": 0.2}).apply(m),
    "model a function": lambda m, x: sc.plan(m.forward, x, target={"sparsity": 0.2}),
    "model a class": lambda m, x: sc.plan(type(m), x, target={"sparsity": 0.2}),
    "model exported": lambda m, x: sc.plan(torch.export.export(m, (x,)).module(), x, target={"sparsity": 0.2}),
    "applied to another": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}).apply(seeded(Convnet)),
    "applied to nothing": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}).apply(None),
    "applied to its result": lambda m, x: (lambda p: p.apply(p.apply(m)))(sc.plan(m, x, target={"sparsity": 0.2})),
    "optimizer not in place": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}).apply(
        m, optimizer=torch.optim.SGD(m.parameters(), 0.1)
    ),
    "optimizer of another": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}).apply(
        m, inplace=True, optimizer=torch.optim.SGD(seeded(Mlp).parameters(), 0.1)
    ),
    "then itself": lambda m, x: (lambda p: p.then(p, m))(sc.plan(m, x, target={"sparsity": 0.2})),
    "then of another": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}).then(
        sc.plan(seeded(Convnet), data(2, 3, 8, 8), target={"sparsity": 0.2}), m
    ),
    "sparsity of one": lambda m, x: sc.plan(m, x, target={"sparsity": 1.0}),
    "sparsity of nothing": lambda m, x: sc.plan(m, x, target={"sparsity": float("nan")}),
    "sparsity negative": lambda m, x: sc.plan(m, x, target={"sparsity": -0.1}),
    "sparsity a tensor": lambda m, x: sc.plan(m, x, target={"sparsity": torch.tensor(0.2)}),
    "round to nought": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}, round_to=0),
    "round to a word": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}, round_to="yes"),
    "protect modules": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}, protect=[m.fc1]),
    "protect one word": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}, protect="fc1"),
    "seed a float": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}, seed=1.5),
    "tolerance negative": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}, tolerance=-1.0).apply(m),
    "tolerance a word": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}, tolerance="small").apply(m),
    "dtype of torch": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}, dtype=torch.float64).apply(m),
    "granularity nothing": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}, granularity=[]),
    "granularity mixed": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}, granularity=["neuron", "element"]),
    "granularity twice": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}, granularity=["neuron", "neuron"]),
    "scales a word": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}, scales="drop"),
    "masks of a buffer": lambda m, x: sc.plan(m, masks={"fc9.weight": torch.ones(2, dtype=torch.bool)}),
    "masks of floats": lambda m, x: sc.plan(m, masks={"fc1.weight": torch.ones(24, 8)}),
    "mask model of floats": lambda m, x: sc.mask_model(m, {"fc1.weight": torch.ones(24, 8)}),
    "criterion a function": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}, criterion=lambda w: w.abs()),
    "data exhausted": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}, criterion="taylor", data=iter([(x, x)])),
    "data empty": lambda m, x: sc.plan(m, x, target={"sparsity": 0.2}, criterion="taylor", data=[]),
    "labels too large": lambda m, x: sc.plan(
        m, x, target={"sparsity": 0.2}, criterion="taylor", data=[(x, torch.full((5,), 9))]
    ),
}


@pytest.mark.parametrize("name", WRONG_ARGUMENTS)
def test_arguments(name: str) -> None:
    """It works, or it is an error of the library with words; the model is never changed."""
    model, x = seeded(Mlp), data(5, 8)
    before = snapshot(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            WRONG_ARGUMENTS[name](model, x)
    except SecateurError as error:
        in_words(error)
    if name not in ("model on meta", "optimizer of another", "model scripted", "model compiled"):
        assert snapshot(model) == before
